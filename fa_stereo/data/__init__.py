"""Reading, rendering and changing stereo pairs."""

from fa_stereo.data.datasets import open_dataset, open_training_pairs
from fa_stereo.data.sample import StereoSample, to_batch_item

__all__ = ["StereoSample", "open_dataset", "open_training_pairs", "to_batch_item"]
