"""Reading, rendering and changing stereo pairs."""

from fa_stereo.data.datasets import open_dataset
from fa_stereo.data.sample import StereoSample, to_batch_item

__all__ = ["StereoSample", "open_dataset", "to_batch_item"]
