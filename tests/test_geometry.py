from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from fa_stereo.errors import InputError
from fa_stereo.geometry import (
    StereoCalibration,
    depth_to_disparity,
    disparity_to_depth,
    left_right_consistent,
    point_cloud,
    warp_right_to_left,
)


def test_depth_with_middleburys_doffs() -> None:
    # Motorcycle at quarter size: f = 999.421 px, baseline 193.001 mm, doffs 32.778 px
    depth = disparity_to_depth(np.array([40.0], np.float32), 999.421, 0.193001, 32.778)
    assert depth.dtype == np.float32
    assert depth[0] == pytest.approx(999.421 * 0.193001 / 72.778, rel=1e-6)


def test_depth_of_nothing_is_unknown_and_of_zero_infinite() -> None:
    depth = disparity_to_depth(np.array([0, math.inf, math.nan, -3]), 100, 1)
    assert depth[0] == math.inf
    assert np.isnan(depth[1:]).all()
    assert disparity_to_depth(np.array([1e-37]), 1000, 1)[0] == math.inf  # farther than float32 can say
    assert disparity_to_depth(np.array([0.0]), 100, 1, doffs_px=20)[0] == 5


def test_disparity_and_depth_are_inverse() -> None:
    disparity = np.append(np.linspace(0.25, 192, 50), math.inf).astype(np.float32)
    depth = disparity_to_depth(disparity, 700, 0.5, 12)
    np.testing.assert_allclose(depth_to_disparity(depth, 700, 0.5, 12), disparity, rtol=1e-5)
    assert depth_to_disparity(np.array([math.inf]), 700, 0.5, 12)[0] == -12


def test_point_cloud_projects_back_to_its_pixels() -> None:
    calibration = StereoCalibration(focal_length_px=50, baseline_m=0.2, cx_px=3.5, cy_px=2.0, doffs_px=1.5)
    disparity = np.random.default_rng(0).uniform(1, 20, (5, 8)).astype(np.float32)
    disparity[1, 2] = math.inf
    points, mask = point_cloud(disparity, calibration)
    assert points.shape == (39, 3)
    assert not mask[1, 2]
    rows, columns = np.nonzero(mask)
    x, y, z = points.astype(np.float64).T
    np.testing.assert_allclose(50 * x / z + 3.5, columns, atol=1e-4)
    np.testing.assert_allclose(50 * y / z + 2.0, rows, atol=1e-4)
    # seen from 0.2 m further right, by a camera whose principal point is 1.5 px further right
    np.testing.assert_allclose(50 * (x - 0.2) / z + 3.5 + 1.5, columns - disparity[mask], atol=1e-4)


def test_point_cloud_can_end_at_a_depth() -> None:
    calibration = StereoCalibration(focal_length_px=10, baseline_m=1, cx_px=0, cy_px=0)
    points, mask = point_cloud(np.array([[10.0, 1.0]]), calibration, max_depth_m=5)
    assert mask.tolist() == [[True, False]]
    assert points.tolist() == [[0, 0, 1]]


def test_calibration_follows_the_size_of_the_picture() -> None:
    whole = StereoCalibration(focal_length_px=100, baseline_m=0.1, cx_px=49.5, cy_px=29.5, doffs_px=4)
    half = whole.resized(0.5, 0.5)
    assert (half.focal_length_px, half.cx_px, half.cy_px, half.doffs_px) == (50, 24.5, 14.5, 2)
    # halved disparity at half size is the same depth
    assert disparity_to_depth(np.array([6.0]), 100, 0.1, 4) == disparity_to_depth(np.array([3.0]), 50, 0.1, 2)


@pytest.mark.parametrize(
    "wrong", [{"focal_length_px": 0}, {"baseline_m": -1}, {"cx_px": math.nan}, {"doffs_px": math.inf}]
)
def test_wrong_calibration_is_refused(wrong: dict[str, float]) -> None:
    values = {"focal_length_px": 1.0, "baseline_m": 1.0, "cx_px": 0.0, "cy_px": 0.0} | wrong
    with pytest.raises(InputError, match=next(iter(wrong))):
        StereoCalibration(**values)


@pytest.mark.parametrize("numbers", [(-700.0, 0.1, 0.0), (700.0, 0.0, 0.0), (700.0, float("nan"), 0.0)])
def test_no_camera_gives_no_depth(numbers: tuple[float, float, float]) -> None:
    for convert in (disparity_to_depth, depth_to_disparity):
        with pytest.raises(InputError, match="must be"):
            convert(np.ones((2, 2)), *numbers)


def test_views_of_different_sizes_cannot_agree() -> None:
    with pytest.raises(InputError, match="must have one size"):
        left_right_consistent(np.ones((2, 8)), np.ones((2, 9)))


def test_warping_fetches_from_x_minus_d() -> None:
    right = torch.arange(8, dtype=torch.uint8).expand(1, 1, 2, 8)
    disparity = torch.tensor([0, 1, 0.5, 3, 5, math.inf, -1, -1]).expand(1, 2, 8)
    warped, mask = warp_right_to_left(right, disparity)
    assert warped[0, 0, 0].tolist() == [0, 0, 1.5, 0, 0, 0, 7, 0]
    assert mask[0, 1].tolist() == [True, True, True, True, False, False, True, False]


def test_warping_by_the_true_disparity_gives_the_left_view() -> None:
    wave = torch.linspace(0, 6, 64).sin()
    right = wave[None, None, None, :].expand(2, 3, 4, -1)
    disparity = torch.full((2, 4, 64), 2.25)
    warped, mask = warp_right_to_left(right, disparity)
    expected = 0.75 * wave[1:-3] + 0.25 * wave[:-4]  # x - 2.25 lies between x - 3 and x - 2
    assert torch.allclose(warped[1, 2, 3, 3:-1], expected, atol=1e-6)
    assert mask[..., 3:].all()
    assert not mask[..., :3].any()


def test_warping_is_differentiable() -> None:
    right = torch.rand(1, 2, 3, 9, dtype=torch.float64, requires_grad=True)
    disparity = (torch.rand(1, 3, 9, dtype=torch.float64) * 2 + 0.1).requires_grad_()
    assert torch.autograd.gradcheck(lambda r, d: warp_right_to_left(r, d)[0], (right, disparity))


def test_real_ground_truth_explains_the_left_picture(shared_data) -> None:  # type: ignore[no-untyped-def]
    from fa_stereo.data.formats import read_pfm, read_picture

    frame = "TRAIN/A/0000"
    base = shared_data / "scene_flow" / "FlyingThings3D"
    left, right = (
        torch.from_numpy(read_picture(base / "frames_cleanpass" / frame / view / "0006.png")).permute(2, 0, 1)[None]
        for view in ("left", "right")
    )
    disparity = torch.from_numpy(read_pfm(base / "disparity" / frame / "left" / "0006.pfm").copy())[None]
    warped, mask = warp_right_to_left(right, disparity)
    error = (warped - left.float()).abs().mean(dim=1)[mask]
    unwarped = (right.float() - left.float()).abs().mean(dim=1)[mask]
    assert error.median() < 3
    assert error.mean() < unwarped.mean() / 3
