"""Alarms are raised for swapped, rotated and shifted views, and for no real rectified pair."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import cv2
import numpy as np
import pytest

from fa_stereo.data.formats import read_picture
from fa_stereo.rectification import MIN_MATCHES, judge_pair, match_corners

Pair = tuple[np.ndarray, np.ndarray]


def synthetic_pair(height: int = 300, width: int = 400, seed: int = 0) -> Pair:
    """Random blobs on a slanted plane, disparity 5 to 25 px from top to bottom."""
    rng = np.random.default_rng(seed)
    texture = rng.integers(0, 256, (height // 6 + 1, (width + 60) // 6 + 1, 3), dtype=np.uint8)
    wide = cv2.resize(texture, (width + 60, height), interpolation=cv2.INTER_CUBIC)
    disparity = np.linspace(5, 25, height, dtype=np.float32)[:, None]
    x, y = np.meshgrid(np.arange(width, dtype=np.float32), np.arange(height, dtype=np.float32))
    left = cv2.remap(wide, x + 30 - disparity / 2, y, cv2.INTER_LINEAR)
    right = cv2.remap(wide, x + 30 + disparity / 2, y, cv2.INTER_LINEAR)
    return left, right


def rotated(picture: np.ndarray, degrees: float) -> np.ndarray:
    height, width = picture.shape[:2]
    matrix = cv2.getRotationMatrix2D((width / 2, height / 2), degrees, 1)
    return cv2.warpAffine(picture, matrix, (width, height))


def real_pairs(shared_data: Path) -> Iterator[tuple[str, Pair]]:
    patterns = [
        ("scene_flow/FlyingThings3D/frames_cleanpass/*/*/*/left/*.png", "/left/", "/right/"),
        ("middlebury2006_third/*/view1.png", "view1", "view5"),
        ("middlebury2014/*/*/im0.png", "im0", "im1"),
        ("middlebury_v2/*/imL.png", "imL", "imR"),
        ("kitti2015/training/image_2/*.png", "image_2", "image_3"),
        ("oak_d/*_left.png", "_left", "_right"),
    ]
    for pattern, one, other in patterns:
        paths = sorted(shared_data.glob(pattern))
        assert paths, pattern
        for path in paths:
            yield str(path.relative_to(shared_data)), (read_picture(path), read_picture(str(path).replace(one, other)))


def test_a_good_pair_raises_no_alarm() -> None:
    judgement = judge_pair(*synthetic_pair())
    assert judgement is not None
    assert judgement.matches >= 100
    assert judgement.warnings == []
    assert judgement.misalignment_px < 0.3
    assert judgement.swapped_share < 0.02


def test_swapped_views() -> None:
    left, right = synthetic_pair()
    judgement = judge_pair(right, left)
    assert judgement is not None
    assert judgement.looks_swapped
    assert not judgement.looks_unrectified
    assert len(judgement.warnings) == 1
    assert "swapped" in judgement.warnings[0]


def test_points_far_away_do_not_outvote_the_near_ones() -> None:
    left, right = synthetic_pair()
    right[:220] = left[:220]  # as if infinitely far: the same in both views
    judgement, swapped = judge_pair(left, right), judge_pair(right, left)
    assert judgement is not None
    assert swapped is not None
    assert judgement.warnings == []
    assert 20 <= swapped.moved < swapped.matches / 2
    assert swapped.looks_swapped


@pytest.mark.parametrize("degrees", [1.5, -1.5, 4.0])
def test_a_rotated_view(degrees: float) -> None:
    left, right = synthetic_pair()
    judgement = judge_pair(left, rotated(right, degrees))
    assert judgement is not None
    assert judgement.looks_unrectified
    assert not judgement.looks_swapped
    assert judgement.tilt_degrees == pytest.approx(-degrees, abs=0.2)
    assert "unrectified" in judgement.warnings[0]


@pytest.mark.parametrize("shift", [3, -3, 8, -8, 20])
def test_a_vertically_shifted_view(shift: int) -> None:
    left, right = synthetic_pair()
    judgement = judge_pair(left, np.roll(right, shift, axis=0))
    assert judgement is not None
    assert judgement.looks_unrectified
    assert judgement.vertical_shift_px == pytest.approx(shift, abs=0.3)


def test_swapped_and_shifted_are_both_said() -> None:
    left, right = synthetic_pair()
    judgement = judge_pair(np.roll(right, 8, axis=0), left)
    assert judgement is not None
    assert len(judgement.warnings) == 2


def test_grey_and_colour_are_judged_alike() -> None:
    left, right = synthetic_pair()
    grey = [cv2.cvtColor(view, cv2.COLOR_RGB2GRAY) for view in (left, right)]
    assert judge_pair(*grey) == judge_pair(left, right)


def test_large_pictures_are_reduced_first() -> None:
    left, right = (cv2.resize(view, None, fx=8, fy=8, interpolation=cv2.INTER_CUBIC) for view in synthetic_pair())
    points, _ = match_corners(left, right)
    assert points.max() < 1280
    judgement = judge_pair(left, right)
    assert judgement is not None
    assert judgement.warnings == []
    judgement = judge_pair(left, np.roll(right, 40, axis=0))  # 16 of them in the reduced pictures
    assert judgement is not None
    assert judgement.vertical_shift_px == pytest.approx(16, abs=0.3)
    (warning,) = judgement.warnings
    shift = re.search(r"shift \+(\d+\.\d) px", warning)
    assert shift is not None
    assert float(shift[1]) == pytest.approx(40, abs=0.8)


def test_nothing_is_said_where_little_matches() -> None:
    flat = np.full((120, 160, 3), 90, np.uint8)
    assert judge_pair(flat, flat) is None
    assert judge_pair(np.zeros((16, 16, 3), np.uint8), np.zeros((16, 16, 3), np.uint8)) is None
    few = flat.copy()
    few[50:60, 70:80] = 255
    assert judge_pair(few, few) is None


def test_strips_of_any_length_are_judged() -> None:
    strip = np.random.default_rng(0).integers(0, 256, (16, 60000), dtype=np.uint8)
    assert judge_pair(strip, strip) is None
    assert judge_pair(strip.T, strip.T) is None


@pytest.mark.parametrize("seed", range(5))
def test_unrelated_pictures_and_noise_raise_no_alarm(seed: int) -> None:
    left, right = synthetic_pair(seed=seed)[0], synthetic_pair(seed=seed + 100)[1]
    rng = np.random.default_rng(seed)
    for pair in ((left, right), tuple(rng.integers(0, 256, (2, 200, 300, 3), dtype=np.uint8))):
        judgement = judge_pair(*pair)
        assert judgement is None or judgement.warnings == []


def test_the_same_picture_twice_raises_no_alarm() -> None:
    left, _ = synthetic_pair()
    judgement = judge_pair(left, left)
    assert judgement is not None
    assert judgement.warnings == []


def test_repetitive_texture_raises_no_alarm() -> None:
    y, x = np.mgrid[:300, :400].astype(np.float32)
    for disparity in (0, 7, 16):
        views = [
            np.clip(127 + 60 * np.sin((x + shift) / 3) + 60 * np.sin(y / 4), 0, 255).astype(np.uint8)
            for shift in (0, disparity)
        ]
        judgement = judge_pair(*views)
        assert judgement is None or judgement.warnings == []


def test_real_rectified_pairs_raise_no_alarm_and_spoilt_ones_do(shared_data: Path) -> None:
    judged = 0
    for name, (left, right) in real_pairs(shared_data):
        judgement = judge_pair(left, right)
        assert judgement is not None, name
        assert judgement.matches >= MIN_MATCHES
        assert judgement.warnings == [], name
        swapped = judge_pair(right, left)
        assert swapped is not None
        assert swapped.looks_swapped, name
        assert not swapped.looks_unrectified, name
        for spoilt in ((left, rotated(right, 1.5)), (rotated(left, 1.5), right), (left, np.roll(right, 8, axis=0))):
            judgement = judge_pair(*spoilt)
            assert judgement is not None
            assert judgement.looks_unrectified, name
            assert not judgement.looks_swapped, name
        judged += 1
    assert judged >= 20
