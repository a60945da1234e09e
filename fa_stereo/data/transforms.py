"""Normalisation, random crops and augmentation of training samples.

Geometry moves the disparity with the pictures: whatever is done to a sample, warping the right picture by the new
disparity still gives the new left one.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fa_stereo.config import AugmentationConfig
from fa_stereo.data.sample import StereoSample
from fa_stereo.errors import InputError

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

# at strength 1
_LARGEST_BRIGHTNESS_CHANGE = 0.4
_LARGEST_CONTRAST_CHANGE = 0.4
_LARGEST_SATURATION_CHANGE = 0.4
_LARGEST_LOG_GAMMA = 0.25
_OCCLUDER_SIZES_PX = (50, 100)
_LARGEST_OCCLUDER_COUNT = 2
# Neighbours whose disparities differ by more lie on different surfaces: between them nothing is interpolated.
_LARGEST_STEP_ON_SURFACE_PX = 1.0
LUMA = np.array([0.299, 0.587, 0.114], dtype=np.float32)  # ITU-R BT.601


def normalize_images(images: Tensor) -> Tensor:
    """Bring pictures to ImageNet's mean and deviation, as PSMNet does, on the device they are on.

    Args:
        images: uint8, or float from 0 to 255, [..., 3, H, W] RGB.

    Returns:
        float32 of the same shape.
    """
    mean = torch.tensor(IMAGENET_MEAN, device=images.device).view(3, 1, 1)
    std = torch.tensor(IMAGENET_STD, device=images.device).view(3, 1, 1)
    return (images.to(torch.float32) / 255 - mean) / std


class TrainingTransform:
    """Random crop and augmentation of a sample, in this order: flips, scale, vertical jitter, crop, occluder, colour.

    With the default configuration the result is a plain slice of every array. A sample smaller than the crop is filled
    up at the bottom and at the right: pictures by their last row and column, disparity by inf (no ground truth).

    What cannot be kept true is left out of the result, for every sample alike: the occlusion mask if views may be
    swapped, the right view's disparity if that view may be shifted vertically. (The mask is that of the whole views:
    what crop and occluder hide besides is not in it.)

    Args:
        config: What to do; by default only the crop.
    """

    def __init__(self, config: AugmentationConfig) -> None:
        self.config = config

    def __call__(self, sample: StereoSample, rng: np.random.Generator) -> StereoSample:
        """Return a changed copy; all chance comes from ``rng``.

        Raises:
            InputError: ``horizontal_flip`` is on and the sample has no right disparity.
        """
        config = self.config
        if config.horizontal_flip > 0:
            if sample.right_disparity is None:
                raise InputError(
                    f"augmentation.horizontal_flip needs the right view's disparity, which {sample.name} does not "
                    "have: set scene_flow.right_disparity=true, or augmentation.horizontal_flip=0"
                )
            sample = dataclasses.replace(sample, occluded=None)
            if rng.random() < config.horizontal_flip:
                sample = flip_horizontally(sample)
        if config.vertical_flip > 0 and rng.random() < config.vertical_flip:
            sample = _map_arrays(sample, lambda array: array[::-1])
        if (config.scale > 0 or config.stretch > 0) and rng.random() < config.scale_probability:
            sample = self._scale(sample, rng)
        if config.vertical_jitter > 0:
            shift_px = rng.uniform(-config.vertical_jitter, config.vertical_jitter)
            sample = dataclasses.replace(sample, right=shift_rows(sample.right, shift_px), right_disparity=None)
        sample = self._crop(sample, rng)
        if config.right_occluder > 0 and rng.random() < config.right_occluder:
            sample = dataclasses.replace(sample, right=_paint_occluders(sample.right, rng))
        if config.color > 0:
            left_change = _ColorChange.draw(config.color, rng)
            asymmetric = config.asymmetric_color > 0 and rng.random() < config.asymmetric_color
            right_change = _ColorChange.draw(config.color, rng) if asymmetric else left_change
            mean = float(sample.left.mean())  # of one view for both, so that equal changes are equal maps
            sample = dataclasses.replace(
                sample, left=left_change.apply(sample.left, mean), right=right_change.apply(sample.right, mean)
            )
        return sample

    def _scale(self, sample: StereoSample, rng: np.random.Generator) -> StereoSample:
        height, width = sample.left.shape[:2]
        scale = 2 ** rng.uniform(-self.config.scale, self.config.scale)
        stretch = 2 ** rng.uniform(-self.config.stretch, self.config.stretch)
        # shrunk at most to the crop, so that large samples are never filled up
        least_rows, least_columns = min(height, self.config.crop_height), min(width, self.config.crop_width)
        new_height = max(least_rows, round(height * scale))
        new_width = max(least_columns, round(width * scale * stretch))
        return resize(sample, new_height, new_width)

    def _crop(self, sample: StereoSample, rng: np.random.Generator) -> StereoSample:
        rows, columns = self.config.crop_height, self.config.crop_width
        sample = _fill_up(sample, rows, columns)
        height, width = sample.left.shape[:2]
        top, left = int(rng.integers(height - rows + 1)), int(rng.integers(width - columns + 1))
        return _map_arrays(sample, lambda array: array[top : top + rows, left : left + columns])


# --------------------------------------------------------------------------------------------------------------------
# geometry


def flip_horizontally(sample: StereoSample) -> StereoSample:
    """Mirror both views and swap them: the mirrored right view is the left one of the mirrored scene.

    Args:
        sample: A sample whose right disparity is known.

    Returns:
        The mirrored sample, without occlusion mask (the other view's is not known).
    """
    return StereoSample(
        sample.name,
        left=sample.right[:, ::-1],
        right=sample.left[:, ::-1],
        disparity=None if sample.right_disparity is None else sample.right_disparity[:, ::-1],
        right_disparity=None if sample.disparity is None else sample.disparity[:, ::-1],
    )


def resize(sample: StereoSample, height: int, width: int) -> StereoSample:
    """Resample to [height, width]; disparities are multiplied by the ratio of the widths.

    Pictures are averaged when they shrink and interpolated when they grow. Disparities are interpolated on surfaces
    only: across an edge, or beside a pixel without ground truth, the nearest value is taken, never a mixture.
    """
    factor = width / sample.left.shape[1]
    disparity, right_disparity = (
        None if values is None else _resize_disparity(values, height, width) * np.float32(factor)
        for values in (sample.disparity, sample.right_disparity)
    )
    return StereoSample(
        sample.name,
        _resize_picture(sample.left, height, width),
        _resize_picture(sample.right, height, width),
        disparity,
        right_disparity,
        None
        if sample.occluded is None
        else _resize_nearest(sample.occluded.view(np.uint8), height, width).view(np.bool_),
    )


def shift_rows(picture: NDArray[np.uint8], shift_px: float) -> NDArray[np.uint8]:
    """Move a picture [H, W, 3] down by a fraction of pixels; the rows that come in repeat the edge."""
    matrix = np.array([[1, 0, 0], [0, 1, shift_px]], dtype=np.float64)
    size = (picture.shape[1], picture.shape[0])
    shifted = cv2.warpAffine(
        np.ascontiguousarray(picture), matrix, size, flags=cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE
    )
    return np.asarray(shifted, dtype=np.uint8)


def _map_arrays(sample: StereoSample, change: Callable[[NDArray[Any]], NDArray[Any]]) -> StereoSample:
    """Return the sample with the same change made to every array [H, W, ...]."""
    arrays: dict[str, Any] = {
        field.name: change(getattr(sample, field.name))
        for field in dataclasses.fields(sample)
        if isinstance(getattr(sample, field.name), np.ndarray)
    }
    return dataclasses.replace(sample, **arrays)


def _fill_up(sample: StereoSample, height: int, width: int) -> StereoSample:
    rows, columns = max(0, height - sample.left.shape[0]), max(0, width - sample.left.shape[1])
    if rows == 0 and columns == 0:
        return sample

    def fill(array: NDArray[Any]) -> NDArray[Any]:
        if array.ndim == 3:
            return np.pad(array, ((0, rows), (0, columns), (0, 0)), mode="edge")
        value = False if array.dtype == np.bool_ else np.inf
        return np.pad(array, ((0, rows), (0, columns)), constant_values=value)

    return _map_arrays(sample, fill)


def _resize_picture(picture: NDArray[np.uint8], height: int, width: int) -> NDArray[np.uint8]:
    # one after the other, as OpenCV averages only where neither side grows
    least = min(width, picture.shape[1]), min(height, picture.shape[0])
    smaller = cv2.resize(np.ascontiguousarray(picture), least, interpolation=cv2.INTER_AREA)
    return np.asarray(cv2.resize(smaller, (width, height), interpolation=cv2.INTER_LINEAR), dtype=np.uint8)


def _resize_nearest(values: NDArray[Any], height: int, width: int) -> NDArray[Any]:
    # plain INTER_NEAREST is off by up to half a pixel: it aligns the corners of pixels, not their centres
    size = (width, height)
    return np.asarray(cv2.resize(np.ascontiguousarray(values), size, interpolation=cv2.INTER_NEAREST_EXACT))


def _resize_disparity(disparity: NDArray[np.float32], height: int, width: int) -> NDArray[np.float32]:
    disparity = np.ascontiguousarray(disparity)
    window = np.ones((3, 3), dtype=np.uint8)
    with np.errstate(invalid="ignore"):  # inf - inf
        on_surface = cv2.dilate(disparity, window) - cv2.erode(disparity, window) <= _LARGEST_STEP_ON_SURFACE_PX
    known = np.where(np.isfinite(disparity), disparity, np.float32(0))
    interpolated = cv2.resize(known, (width, height), interpolation=cv2.INTER_LINEAR)
    interpolate = _resize_nearest(on_surface.view(np.uint8), height, width).view(np.bool_)
    return np.where(interpolate, interpolated, _resize_nearest(disparity, height, width)).astype(np.float32)


# --------------------------------------------------------------------------------------------------------------------
# colour


@dataclasses.dataclass(frozen=True)
class _ColorChange:
    """One change of brightness, contrast, saturation and gamma; all 1 changes nothing."""

    brightness: float
    contrast: float
    saturation: float
    gamma: float

    @classmethod
    def draw(cls, strength: float, rng: np.random.Generator) -> _ColorChange:
        def around_one(largest: float) -> float:
            return max(0.0, 1 + strength * rng.uniform(-largest, largest))

        return cls(
            brightness=around_one(_LARGEST_BRIGHTNESS_CHANGE),
            contrast=around_one(_LARGEST_CONTRAST_CHANGE),
            saturation=around_one(_LARGEST_SATURATION_CHANGE),
            gamma=float(np.exp(strength * rng.uniform(-_LARGEST_LOG_GAMMA, _LARGEST_LOG_GAMMA))),
        )

    def apply(self, picture: NDArray[np.uint8], mean: float) -> NDArray[np.uint8]:
        """Change a picture [H, W, 3]; contrast is measured from ``mean``."""
        values: NDArray[Any] = picture.astype(np.float32)
        grey = values @ LUMA
        values = grey[..., None] + self.saturation * (values - grey[..., None])
        values = self.brightness * (mean + self.contrast * (values - mean))
        values = 255 * (np.clip(values, 0, 255) / 255) ** np.float32(self.gamma)
        return np.asarray(np.rint(values), dtype=np.uint8)


def _paint_occluders(picture: NDArray[np.uint8], rng: np.random.Generator) -> NDArray[np.uint8]:
    """Return the picture with one or two rectangles of its mean colour: what the left view shows there is hidden."""
    painted: NDArray[np.uint8] = picture.copy()
    height, width = picture.shape[:2]
    color = np.rint(picture.reshape(-1, 3).mean(axis=0)).astype(np.uint8)
    for _ in range(int(rng.integers(1, _LARGEST_OCCLUDER_COUNT + 1))):
        rows = min(int(rng.integers(_OCCLUDER_SIZES_PX[0], _OCCLUDER_SIZES_PX[1] + 1)), height // 2)
        columns = min(int(rng.integers(_OCCLUDER_SIZES_PX[0], _OCCLUDER_SIZES_PX[1] + 1)), width // 2)
        top, left = int(rng.integers(height - rows + 1)), int(rng.integers(width - columns + 1))
        painted[top : top + rows, left : left + columns] = color
    return painted
