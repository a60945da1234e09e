"""Augmentation is held by warping: the right picture, warped by the changed disparity, must be the changed left one."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch

from fa_stereo.config import AugmentationConfig, DatasetConfig, SceneFlowConfig
from fa_stereo.data import StereoSample, open_dataset
from fa_stereo.data.transforms import TrainingTransform, flip_horizontally, normalize_images, resize, shift_rows
from fa_stereo.errors import InputError

HEIGHT, WIDTH = 96, 160
ALL_ON = AugmentationConfig(
    crop_height=48,
    crop_width=80,
    color=1.0,
    asymmetric_color=0.5,
    right_occluder=0.5,
    scale=0.4,
    stretch=0.2,
    vertical_jitter=1.0,
    horizontal_flip=0.5,
    vertical_flip=0.5,
)


def smooth_texture(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """A smooth RGB texture at real positions on a surface."""
    channels = [
        128 + 50 * np.sin(0.23 * x + 0.11 * y + phase) + 50 * np.cos(0.17 * x - 0.19 * y + 2 * phase)
        for phase in (0.0, 1.0, 2.0)
    ]
    return np.rint(np.stack(channels, axis=-1)).astype(np.uint8)


def make_sample() -> StereoSample:
    """A slanted wall (disparity 6 to 10) with a flat square (20) before it, both views and both truths exact.

    On the wall, d = 6 + 0.02 x + 0.01 y for the left x; for the right x_r = x - d the same point has
    d = (6 + 0.02 x_r + 0.01 y) / 0.98.
    """
    y, x = np.mgrid[:HEIGHT, :WIDTH].astype(np.float64)
    left_wall = 6 + 0.02 * x + 0.01 * y
    right_wall = (6 + 0.02 * x + 0.01 * y) / 0.98
    in_left = (x >= 70) & (x < 110) & (y >= 30) & (y < 70)
    in_right = (x + 20 >= 70) & (x + 20 < 110) & (y >= 30) & (y < 70)
    left = np.where(in_left[..., None], 255 - smooth_texture(x, y), smooth_texture(x, y))
    right = np.where(in_right[..., None], 255 - smooth_texture(x + 20, y), smooth_texture(x + right_wall, y))
    disparity = np.where(in_left, 20, left_wall).astype(np.float32)
    right_disparity = np.where(in_right, 20, right_wall).astype(np.float32)
    wall_hidden = ~in_left & (x - left_wall + 20 >= 70) & (x - left_wall + 20 < 110) & (y >= 30) & (y < 70)
    occluded = wall_hidden | (x - disparity < 0)
    return StereoSample("wall", left, right, disparity, right_disparity, occluded)


def warp_error(sample: StereoSample, visible: np.ndarray | None = None) -> float:
    """Median absolute difference of the left picture to the right one warped by the disparity, in grey levels."""
    assert sample.disparity is not None
    height, width = sample.disparity.shape
    columns = np.arange(width) - np.where(np.isfinite(sample.disparity), sample.disparity, -1e6)
    inside = (columns >= 0) & (columns <= width - 1)
    if visible is not None:
        inside &= visible
    first = np.clip(np.floor(columns).astype(int), 0, width - 2)
    weight = np.clip(columns - first, 0, 1)[..., None]
    rows = np.arange(height)[:, None]
    warped = sample.right[rows, first] * (1 - weight) + sample.right[rows, first + 1] * weight
    return float(np.median(np.abs(warped - sample.left)[inside]))


def test_the_tests_own_pair_is_exact() -> None:
    sample = make_sample()
    assert sample.occluded is not None
    assert warp_error(sample) < 1.5
    wrong = dataclasses.replace(sample, disparity=sample.disparity * np.float32(1.2))
    assert warp_error(wrong) > 8


# --- the default


def test_default_is_an_exact_slice_of_every_array() -> None:
    sample = make_sample()
    result = TrainingTransform(AugmentationConfig(crop_height=32, crop_width=64))(sample, np.random.default_rng(3))
    places = [
        (top, left)
        for top in range(HEIGHT - 31)
        for left in range(WIDTH - 63)
        if np.array_equal(result.left, sample.left[top : top + 32, left : left + 64])
    ]
    assert len(places) == 1
    window = np.s_[places[0][0] : places[0][0] + 32, places[0][1] : places[0][1] + 64]
    for field in ("left", "right", "disparity", "right_disparity", "occluded"):
        np.testing.assert_array_equal(getattr(result, field), getattr(sample, field)[window])
    assert result.name == sample.name


def test_every_place_of_the_crop_occurs() -> None:
    sample = StereoSample("grid", *(np.arange(24, dtype=np.uint8).reshape(4, 6, 1).repeat(3, 2) for _ in range(2)))
    transform = TrainingTransform(AugmentationConfig(crop_height=3, crop_width=4))
    rng = np.random.default_rng(0)
    corners = {int(transform(sample, rng).left[0, 0, 0]) for _ in range(200)}
    assert corners == {0, 1, 2, 6, 7, 8}


def test_same_generator_same_result_and_input_untouched() -> None:
    sample, untouched = make_sample(), make_sample()
    transform = TrainingTransform(ALL_ON)
    first, second = (transform(sample, np.random.default_rng(5)) for _ in range(2))
    other = transform(sample, np.random.default_rng(6))
    np.testing.assert_array_equal(first.left, second.left)
    np.testing.assert_array_equal(first.right, second.right)
    np.testing.assert_array_equal(first.disparity, second.disparity)
    assert not np.array_equal(first.left, other.left)
    for field in ("left", "right", "disparity", "right_disparity", "occluded"):
        np.testing.assert_array_equal(getattr(sample, field), getattr(untouched, field))


def test_shapes_and_types_with_everything_on() -> None:
    transform = TrainingTransform(ALL_ON)
    for seed in range(30):
        result = transform(make_sample(), np.random.default_rng(seed))
        assert result.left.shape == result.right.shape == (48, 80, 3)
        assert result.left.dtype == result.right.dtype == np.uint8
        assert result.disparity is not None
        assert result.disparity.shape == (48, 80)
        assert result.disparity.dtype == np.float32
        assert (result.disparity >= 0).all()
        assert result.occluded is None
        assert result.right_disparity is None


def test_small_samples_are_filled_up_without_ground_truth() -> None:
    sample = make_sample()
    config = AugmentationConfig(crop_height=HEIGHT + 5, crop_width=WIDTH + 7)
    result = TrainingTransform(config)(sample, np.random.default_rng(0))
    assert result.left.shape == (HEIGHT + 5, WIDTH + 7, 3)
    assert result.disparity is not None
    assert result.occluded is not None
    np.testing.assert_array_equal(result.disparity[:HEIGHT, :WIDTH], sample.disparity)
    assert np.isposinf(result.disparity[HEIGHT:]).all()
    assert np.isposinf(result.disparity[:, WIDTH:]).all()
    assert not result.occluded[HEIGHT:].any()
    np.testing.assert_array_equal(result.left[-1, :WIDTH], sample.left[-1])


def test_sample_without_ground_truth() -> None:
    sample = dataclasses.replace(make_sample(), disparity=None, right_disparity=None, occluded=None)
    config = dataclasses.replace(ALL_ON, horizontal_flip=0.0)
    assert TrainingTransform(config)(sample, np.random.default_rng(0)).disparity is None


# --- geometry


@pytest.mark.parametrize(("height", "width"), [(96, 240), (144, 160), (130, 200), (80, 120), (96, 131)])
def test_scaled_disparity_still_warps(height: int, width: int) -> None:
    sample = make_sample()
    scaled = resize(sample, height, width)
    assert scaled.left.shape == (height, width, 3)
    assert warp_error(scaled) < 2
    assert scaled.disparity is not None
    unscaled = dataclasses.replace(scaled, disparity=scaled.disparity * np.float32(WIDTH / width))
    if width != WIDTH:
        assert warp_error(unscaled) > 2 * warp_error(scaled)


@pytest.mark.parametrize(("height", "width"), [(116, 89), (60, 211), (70, 100), (130, 180)])
def test_scaling_moves_no_point_of_a_picture(height: int, width: int) -> None:
    """One side may shrink while the other grows, too: a ramp stays the ramp that it was."""
    y, x = np.mgrid[:96, :160]
    for ramp, value in ((x, lambda row, column: (column + 0.5) * 160 / width - 0.5),
                        (y, lambda row, column: (row + 0.5) * 96 / height - 0.5)):  # fmt: skip
        picture = np.repeat(ramp[..., None], 3, axis=2).astype(np.uint8)
        scaled = resize(StereoSample("ramp", picture, picture), height, width).left[2:-2, 2:-2, 0]
        rows, columns = np.mgrid[2 : height - 2, 2 : width - 2]
        shrinks = width <= 160 if ramp is x else height <= 96
        # what grows is interpolated by OpenCV in whole numbers
        assert np.abs(scaled - value(rows, columns)).max() <= (0.51 if shrinks else 0.75)


@pytest.mark.parametrize("width", [120, 160, 250])
def test_scaling_interpolates_on_surfaces_to_subpixel(width: int) -> None:
    scaled = resize(make_sample(), 96, width)
    factor = width / WIDTH
    assert scaled.disparity is not None
    y, x = np.mgrid[:96, :width]
    expected = factor * (6 + 0.02 * ((x + 0.5) / factor - 0.5) + 0.01 * y)
    wall = np.s_[2:28, 2:-2]
    np.testing.assert_allclose(scaled.disparity[wall], expected[wall], atol=0.01)


def test_scaling_never_mixes_surfaces_or_unknown_pixels() -> None:
    disparity = np.full((40, 60), 10, np.float32)
    disparity[:, 30:] = 50
    disparity[20:] = np.inf
    disparity[5, 5] = np.inf
    pictures = np.zeros((40, 60, 3), np.uint8)
    for height, width in ((57, 91), (31, 43), (40, 61)):
        scaled = resize(StereoSample("edge", pictures, pictures, disparity), height, width).disparity
        assert scaled is not None
        factor = np.float32(width / 60)
        assert set(np.unique(scaled).tolist()) == {float(10 * factor), float(50 * factor), np.inf}
        assert abs(np.isinf(scaled).mean() - 0.5) < 0.05


def test_horizontal_flip_swaps_the_views() -> None:
    sample = make_sample()
    flipped = flip_horizontally(sample)
    np.testing.assert_array_equal(flipped.left, sample.right[:, ::-1])
    assert warp_error(flipped) < 1.5
    mirrored_only = dataclasses.replace(sample, left=sample.left[:, ::-1], right=sample.right[:, ::-1])
    assert warp_error(mirrored_only) > 8
    again = flip_horizontally(flipped)
    np.testing.assert_array_equal(again.left, sample.left)
    np.testing.assert_array_equal(again.disparity, sample.disparity)
    np.testing.assert_array_equal(again.right_disparity, sample.right_disparity)


def test_horizontal_flip_without_right_disparity_names_the_option() -> None:
    sample = dataclasses.replace(make_sample(), right_disparity=None)
    config = AugmentationConfig(crop_height=32, crop_width=32, horizontal_flip=0.01)
    with pytest.raises(InputError, match=r"augmentation\.horizontal_flip needs the right view's disparity, which wall"):
        TrainingTransform(config)(sample, np.random.default_rng(0))


def test_vertical_flip() -> None:
    sample = make_sample()
    config = AugmentationConfig(crop_height=HEIGHT, crop_width=WIDTH, vertical_flip=1.0)
    result = TrainingTransform(config)(sample, np.random.default_rng(0))
    for field in ("left", "right", "disparity", "right_disparity", "occluded"):
        np.testing.assert_array_equal(getattr(result, field), getattr(sample, field)[::-1])


def test_vertical_jitter_moves_only_the_right_view() -> None:
    sample = make_sample()
    config = AugmentationConfig(crop_height=HEIGHT, crop_width=WIDTH, vertical_jitter=2.0)
    result = TrainingTransform(config)(sample, np.random.default_rng(1))
    np.testing.assert_array_equal(result.left, sample.left)
    np.testing.assert_array_equal(result.disparity, sample.disparity)
    assert not np.array_equal(result.right, sample.right)
    whole = shift_rows(sample.right, 3)
    np.testing.assert_array_equal(whole[3:], sample.right[:-3])
    np.testing.assert_array_equal(whole[:3], np.repeat(sample.right[:1], 3, axis=0))

    # Drawn with another seed, the pictures at the same rows again: the disparity is still theirs.
    for seed in range(4):
        result = TrainingTransform(config)(sample, np.random.default_rng(seed))
        shift_px = np.random.default_rng(seed).uniform(-2.0, 2.0)
        back = dataclasses.replace(result, right=shift_rows(result.right, -shift_px))
        assert warp_error(back) < 2.5
        wrong = dataclasses.replace(back, disparity=back.disparity * np.float32(1.2))
        assert warp_error(wrong) > 8


@pytest.mark.parametrize(
    "options",
    [
        {"scale": 0.5, "scale_probability": 1.0},
        {"stretch": 0.5, "scale_probability": 1.0},
        {"horizontal_flip": 1.0},
        {"horizontal_flip": 0.5, "vertical_flip": 0.5, "scale": 0.3, "stretch": 0.2},
    ],
)
def test_random_geometry_still_warps(options: dict[str, float]) -> None:
    transform = TrainingTransform(AugmentationConfig(crop_height=64, crop_width=112, **options))
    for seed in range(12):
        result = transform(make_sample(), np.random.default_rng(seed))
        assert result.left.shape == (64, 112, 3)
        assert result.disparity is not None
        assert np.isfinite(result.disparity).all()  # a sample larger than the crop is never filled up
        assert warp_error(result) < 2.5


def test_scale_changes_the_size_of_what_is_seen() -> None:
    transform = TrainingTransform(AugmentationConfig(crop_height=32, crop_width=32, scale=0.8, scale_probability=1.0))
    flat = dataclasses.replace(make_sample(), disparity=np.full((HEIGHT, WIDTH), 8, np.float32))
    seen = []
    for seed in range(60):
        disparity = transform(flat, np.random.default_rng(seed)).disparity
        assert disparity is not None
        assert disparity.min() == disparity.max()
        seen.append(float(disparity[0, 0]) / 8)
    assert min(seen) < 0.7
    assert max(seen) > 1.5
    assert all(2**-0.81 < factor < 2**0.81 for factor in seen)


def test_geometry_on_real_frames(shared_data: Path) -> None:
    source = SceneFlowConfig(sets=["flyingthings3d"], right_disparity=True, cache_index=False)
    config = DatasetConfig("scene_flow", str(shared_data / "scene_flow"), scene_flow=source)
    sample = open_dataset(config)[0]
    options = AugmentationConfig(horizontal_flip=0.5, vertical_flip=0.5, scale=0.4, stretch=0.2)
    for seed in range(4):
        result = TrainingTransform(options)(sample, np.random.default_rng(seed))
        assert result.disparity is not None
        zero = dataclasses.replace(result, disparity=np.zeros_like(result.disparity))
        shuffled = np.random.default_rng(seed).permutation(result.disparity.ravel()).reshape(result.disparity.shape)
        assert warp_error(result) < 0.5 * warp_error(zero)
        assert warp_error(result) < 0.5 * warp_error(dataclasses.replace(result, disparity=shuffled))


# --- colour


def test_symmetric_colour_keeps_the_views_alike() -> None:
    sample = make_sample()
    sample = dataclasses.replace(sample, right=sample.left)
    transform = TrainingTransform(AugmentationConfig(crop_height=HEIGHT, crop_width=WIDTH, color=1.0))
    changed = 0
    for seed in range(10):
        result = transform(sample, np.random.default_rng(seed))
        np.testing.assert_array_equal(result.left, result.right)
        np.testing.assert_array_equal(result.disparity, sample.disparity)
        changed += not np.array_equal(result.left, sample.left)
    assert changed == 10


def test_asymmetric_colour_tells_the_views_apart() -> None:
    sample = make_sample()
    sample = dataclasses.replace(sample, right=sample.left)
    options = AugmentationConfig(crop_height=HEIGHT, crop_width=WIDTH, color=1.0, asymmetric_color=0.5)
    transform = TrainingTransform(options)
    results = [transform(sample, np.random.default_rng(seed)) for seed in range(100)]
    different = sum(not np.array_equal(result.left, result.right) for result in results)
    assert 30 < different < 70


def test_stronger_colour_changes_more() -> None:
    sample = make_sample()
    differences = []
    for strength in (0.2, 1.0):
        transform = TrainingTransform(AugmentationConfig(crop_height=HEIGHT, crop_width=WIDTH, color=strength))
        results = [transform(sample, np.random.default_rng(seed)).left for seed in range(20)]
        differences.append(np.mean([np.abs(r.astype(float) - sample.left).mean() for r in results]))
    assert 0.5 < differences[0] < differences[1] < 80


def test_occluder_hides_part_of_the_right_view_only() -> None:
    sample = make_sample()
    transform = TrainingTransform(AugmentationConfig(crop_height=HEIGHT, crop_width=WIDTH, right_occluder=1.0))
    for seed in range(10):
        result = transform(sample, np.random.default_rng(seed))
        np.testing.assert_array_equal(result.left, sample.left)
        painted = (result.right != sample.right).any(axis=2)
        assert 0.1 < painted.mean() < 0.8
        assert len(np.unique(result.right[painted], axis=0)) == 1
        mean = sample.right.reshape(-1, 3).mean(axis=0)
        np.testing.assert_allclose(result.right[painted][0], mean, atol=0.51)


# --- normalisation


def test_normalize_images_is_imagenets() -> None:
    images = torch.randint(0, 256, (2, 3, 4, 5), dtype=torch.uint8)
    normalized = normalize_images(images)
    assert normalized.dtype == torch.float32
    for channel, (mean, std) in enumerate(((0.485, 0.229), (0.456, 0.224), (0.406, 0.225))):
        expected = (images[:, channel].double() / 255 - mean) / std
        torch.testing.assert_close(normalized[:, channel].double(), expected, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(normalize_images(images.float()), normalized)
    assert normalize_images(images[0]).shape == (3, 4, 5)
