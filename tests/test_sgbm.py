from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from fa_stereo.config import DatasetConfig, SceneFlowConfig
from fa_stereo.errors import InputError
from fa_stereo.metrics import bad_n, end_point_error, valid_mask
from fa_stereo.sgbm import fill_from_background, match_semi_global

# What StereoSGBM reaches on the real pairs for development: folder, kind, split, and (EPE, bad-3) by name.
REAL = [
    ("scene_flow", "scene_flow", "train", {"TRAIN/A/0000/left/0006": (1.84, 6.6)}),
    (
        "scene_flow",
        "scene_flow",
        "test",
        {"TEST/B/0004/left/0006": (3.64, 11.9), "TEST/A/0032/left/0006": (6.57, 30.7)},
    ),
    ("kitti2015", "kitti2015", "all", {"training/000046_10": (0.95, 3.3)}),
    ("middlebury2014", "middlebury2014", "train", {"Motorcycle": (1.66, 8.5)}),
    ("middlebury_v2", "middlebury_v2", "train", {"cones": (1.29, 8.5), "venus": (0.30, 1.5)}),
    (
        "middlebury2006_third",
        "middlebury2006",
        "train",
        {
            "Art": (2.85, 18.1), "Moebius": (1.81, 12.1), "Bowling1": (2.48, 9.9), "Cloth1": (0.28, 1.3),
            "Lampshade1": (1.49, 8.3), "Midd1": (6.78, 31.0), "Monopoly": (8.85, 31.2), "Plastic": (2.65, 23.5),
            "Rocks1": (0.59, 3.3), "Wood1": (0.71, 3.0), "Baby1": (0.69, 4.3),
        },
    ),
]  # fmt: skip


@pytest.mark.parametrize(("folder", "kind", "split", "expected"), REAL, ids=lambda value: str(value)[:20])
def test_reference_figures_on_real_pairs(
    shared_data: Path, folder: str, kind: str, split: str, expected: dict[str, tuple[float, float]]
) -> None:
    from fa_stereo.data import open_dataset

    scene_flow = SceneFlowConfig(cache_index=False, sets=["flyingthings3d"])
    dataset = open_dataset(DatasetConfig(kind, str(shared_data / folder), split, scene_flow=scene_flow))
    samples = [dataset[index] for index in range(len(dataset))]  # type: ignore[arg-type]
    assert {sample.name for sample in samples} == set(expected)
    for sample in samples:
        prediction = match_semi_global(sample.left, sample.right)
        assert sample.disparity is not None
        valid = valid_mask(sample.disparity, 0, 192)
        end_point, bad_3 = expected[sample.name]
        assert end_point_error(prediction, sample.disparity, valid) == pytest.approx(end_point, abs=0.05), sample.name
        assert bad_n(prediction, sample.disparity, valid, 3) == pytest.approx(bad_3, abs=0.15), sample.name


def textured_pair(disparity: int, height: int = 48, width: int = 220) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    wide = np.random.default_rng(1).integers(0, 256, (height, width + disparity, 3), np.uint8)
    return wide[:, :width], wide[:, disparity:]


def test_a_shift_is_found_and_nothing_is_left_open() -> None:
    left, right = textured_pair(23)
    prediction = match_semi_global(left, right, max_disparity=64)
    assert prediction.shape == left.shape[:2]
    assert prediction.dtype == np.float32
    assert np.isfinite(prediction).all()
    assert np.median(prediction[:, 23:]) == 23
    # columns 23 to 64 lie left of what OpenCV searches by itself
    assert (np.abs(prediction[:, 28:60] - 23) <= 1).mean() > 0.98


def test_channels_in_any_order_match_alike() -> None:
    left, right = textured_pair(9)
    np.testing.assert_array_equal(
        match_semi_global(left, right, 32),
        match_semi_global(np.ascontiguousarray(left[..., ::-1]), np.ascontiguousarray(right[..., ::-1]), 32),
    )


def test_small_pictures_and_grey_ones_are_fine() -> None:
    left, right = textured_pair(4, height=16, width=16)
    assert match_semi_global(left, right).shape == (16, 16)
    assert match_semi_global(left[..., 0], right[..., 0]).shape == (16, 16)


def test_holes_take_the_farther_neighbour() -> None:
    disparity = np.array([[-1, 5, -1, -1, 9, 0], [3, -1, 2, 8, -1, 4], [-1] * 6], np.float32)
    expected = np.array([[5, 5, 5, 5, 9, 9], [3, 2, 2, 8, 4, 4], [0] * 6], np.float32)
    np.testing.assert_array_equal(fill_from_background(disparity), expected)


def test_wrong_input_is_refused() -> None:
    left, right = textured_pair(4)
    with pytest.raises(InputError, match="one size"):
        match_semi_global(left, right[:, 1:])
    with pytest.raises(InputError, match="at most 2032, got 2048"):
        match_semi_global(left, right, max_disparity=2048)
    with pytest.raises(InputError, match="multiple of 16, got 100"):
        match_semi_global(left, right, max_disparity=100)
