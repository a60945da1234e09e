"""The order of the samples: covering, disjoint, and the same whoever reads it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from training_runs import write_pairs

from fa_stereo.config import AugmentationConfig, DatasetConfig
from fa_stereo.data import open_dataset
from fa_stereo.data.transforms import TrainingTransform
from fa_stereo.errors import InputError
from fa_stereo.sampling import StepSampler, TrainingStream, make_loader


@pytest.fixture
def pairs(tmp_path: Path) -> Path:
    return write_pairs(tmp_path / "pairs", count=7)


def make_stream(pairs: Path, seed: int = 0) -> TrainingStream:
    transform = TrainingTransform(AugmentationConfig(crop_height=32, crop_width=64, color=1.0, right_occluder=0.5))
    return TrainingStream(open_dataset(DatasetConfig(kind="pairs", root=str(pairs))), transform, seed)


def test_every_epoch_sees_every_pair_once_in_another_order(pairs: Path) -> None:
    stream = make_stream(pairs)
    epochs = [[stream.locate(7 * epoch + place) for place in range(7)] for epoch in range(4)]
    for number, epoch in enumerate(epochs):
        assert {which for which, _ in epoch} == {number}
        assert sorted(index for _, index in epoch) == list(range(7))
    orders = {tuple(index for _, index in epoch) for epoch in epochs}
    assert len(orders) > 1
    assert [make_stream(pairs, seed=1).locate(place)[1] for place in range(28)] != [
        index for epoch in epochs for _, index in epoch
    ]


@pytest.mark.parametrize("world_size", [1, 2, 3, 6])
def test_processes_share_the_batch_that_one_would_read(world_size: int) -> None:
    samplers = [StepSampler(2, 9, 6, rank, world_size) for rank in range(world_size)]
    for step, shares in zip(range(2, 9), zip(*samplers, strict=True), strict=True):
        together = [position for share in shares for position in share]
        assert together == list(range(6 * step, 6 * step + 6))  # disjoint, complete, in order


def test_a_batch_that_cannot_be_dealt_out_is_refused() -> None:
    with pytest.raises(
        InputError, match=r"trainer\.batch_size \(7\) must be a multiple of the number of processes \(2\)"
    ):
        StepSampler(0, 1, 7, 0, 2)


def test_batches_do_not_depend_on_workers_or_on_where_reading_began(pairs: Path) -> None:
    def read(first_step: int, workers: int) -> list[dict[str, torch.Tensor]]:
        sampler = StepSampler(first_step, 5, 3)
        return list(make_loader(make_stream(pairs), sampler, workers, pin_memory=False))

    state = torch.get_rng_state()
    reference = read(0, workers=0)
    assert torch.equal(torch.get_rng_state(), state)  # nor do they draw from the global generator
    assert reference[0]["left"].shape == (3, 3, 32, 64)
    for other in (read(0, workers=2), [*reference[:2], *read(2, workers=1)]):
        assert len(other) == len(reference) == 5
        for one, two in zip(reference, other, strict=True):
            assert one["name"] == two["name"]
            for key in ("left", "right", "disparity"):
                assert torch.equal(one[key], two[key])


def test_a_pair_looks_different_in_every_epoch(pairs: Path) -> None:
    stream = make_stream(pairs)
    views = {}
    for position in range(14):
        item = stream[position]
        assert isinstance(item, dict)
        views.setdefault(item["name"], []).append(np.asarray(item["left"]))
    assert all(not np.array_equal(one, two) for one, two in views.values())


@pytest.mark.parametrize("workers", [0, 1])
def test_an_unreadable_file_comes_as_its_own_error(pairs: Path, workers: int) -> None:
    (pairs / "left" / "003.png").write_bytes(b"")
    batches = list(make_loader(make_stream(pairs), StepSampler(0, 1, 7), workers, pin_memory=False))
    assert isinstance(batches[0], InputError)
    assert "003.png" in str(batches[0])
    assert "Traceback" not in str(batches[0])


def test_pairs_without_ground_truth_cannot_be_trained_on(pairs: Path) -> None:
    for path in (pairs / "disparity").iterdir():
        path.unlink()
    (pairs / "disparity").rmdir()
    assert "has no ground truth" in str(make_stream(pairs)[0])
