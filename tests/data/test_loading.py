"""Loader processes: spawned where pairs are rendered on a GPU, in training and in evaluation."""

from __future__ import annotations

import multiprocessing

import numpy as np
import pytest
import torch
from torch.utils.data import ConcatDataset, Dataset

from fa_stereo.config import AugmentationConfig, DatasetConfig
from fa_stereo.data.datasets import LimitedDataset, open_dataset
from fa_stereo.data.loading import process_options
from fa_stereo.data.sample import StereoSample
from fa_stereo.data.transforms import TrainingTransform
from fa_stereo.evaluation import evaluate
from fa_stereo.sampling import StepSampler, TrainingStream, make_loader


class OnGpu(Dataset[StereoSample]):
    """Claims to render on a GPU; the name of a pair tells how the process that made it was started."""

    device = "cuda"

    def __len__(self) -> int:
        return 2

    def __getitem__(self, index: int) -> StereoSample:
        picture = np.zeros((16, 16, 3), np.uint8)
        started = type(multiprocessing.current_process()).__name__
        return StereoSample(f"{started} {index}", picture, picture, np.ones((16, 16), np.float32))


@pytest.mark.parametrize("dataset", [OnGpu(), LimitedDataset(OnGpu(), 1), ConcatDataset([[], OnGpu()])])
def test_what_renders_on_a_gpu_is_loaded_by_spawned_processes(dataset: Dataset[StereoSample]) -> None:
    stream = TrainingStream(dataset, TrainingTransform(AugmentationConfig()), seed=0)
    for view in (dataset, stream):
        assert process_options(view, 2)["multiprocessing_context"] == "spawn"
        assert process_options(view, 0)["multiprocessing_context"] is None


def test_other_pairs_are_loaded_by_the_systems_own_kind_of_process() -> None:
    dataset = open_dataset(DatasetConfig(kind="rendered", limit=2))
    assert process_options(dataset, 2)["multiprocessing_context"] is None


def test_training_and_evaluation_start_them_alike() -> None:
    transform = TrainingTransform(AugmentationConfig(crop_height=16, crop_width=16))
    loader = make_loader(TrainingStream(OnGpu(), transform, 0), StepSampler(0, 1, 2), 1, pin_memory=False)
    trained = {name for batch in loader for name in batch["name"]}
    result = evaluate(lambda left, right: torch.ones(1, 16, 16), OnGpu(), workers=1)
    assert trained == {image.name for image in result.per_image} == {"SpawnProcess 0", "SpawnProcess 1"}
