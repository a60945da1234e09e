"""Geometry of a rectified pair: disparity and depth, warping by disparity, point clouds.

Convention everywhere: disparity ``d >= 0`` in pixels of the left view, ``x_right = x_left - d``; ``inf`` means unknown.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fa_stereo.errors import InputError


@dataclass(frozen=True)
class StereoCalibration:
    """Two identical pinhole cameras side by side, rectified.

    Attributes:
        focal_length_px: Focal length in pixels (at the size of the pictures in use).
        baseline_m: Distance of the cameras in metres.
        cx_px: Column of the left camera's principal point.
        cy_px: Row of the principal point (both cameras, since rectified).
        doffs_px: Column of the right principal point minus that of the left one (Middlebury's ``doffs``); often 0.
        size_px: Width and height of the pictures it holds for; None if not known.
    """

    focal_length_px: float
    baseline_m: float
    cx_px: float
    cy_px: float
    doffs_px: float = 0.0
    size_px: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        for name in ("focal_length_px", "baseline_m"):
            if not getattr(self, name) > 0:
                raise InputError(f"{name} must be positive, got {getattr(self, name)}")
        for name in ("focal_length_px", "baseline_m", "cx_px", "cy_px", "doffs_px"):
            if not math.isfinite(getattr(self, name)):
                raise InputError(f"{name} must be finite, got {getattr(self, name)}")

    def resized(self, scale_x: float, scale_y: float) -> StereoCalibration:
        """Return the calibration for pictures whose width and height were multiplied by these factors.

        The focal length is that of the columns, by which depth goes; where the factors differ, that of the rows would
        be another. Pixel centres have integer coordinates, so the principal point moves by half a pixel less than the
        edges.
        """
        return StereoCalibration(
            focal_length_px=self.focal_length_px * scale_x,
            baseline_m=self.baseline_m,
            cx_px=(self.cx_px + 0.5) * scale_x - 0.5,
            cy_px=(self.cy_px + 0.5) * scale_y - 0.5,
            doffs_px=self.doffs_px * scale_x,
            size_px=self.size_px and (round(self.size_px[0] * scale_x), round(self.size_px[1] * scale_y)),
        )


def disparity_to_depth(
    disparity: NDArray[np.floating[Any]], focal_length_px: float, baseline_m: float, doffs_px: float = 0.0
) -> NDArray[np.float32]:
    """Convert disparity to depth: ``depth_m = focal_length_px * baseline_m / (disparity + doffs_px)``.

    Args:
        disparity: In pixels, any shape.
        focal_length_px: Focal length in pixels.
        baseline_m: Distance of the cameras in metres.
        doffs_px: Column of the right principal point minus that of the left one, ``cx_right - cx_left``.

    Returns:
        Distance from the cameras' plane in metres, float32: ``inf`` for points at infinity (``d + doffs_px == 0``),
        NaN where the disparity is unknown (not finite) or would lie behind the cameras.

    Raises:
        InputError: Focal length or baseline are not positive, or a number is not finite.

    Examples:
        >>> disparity_to_depth(np.array([20.0, 0.0, np.inf]), focal_length_px=1000, baseline_m=0.2).tolist()
        [10.0, inf, nan]
    """
    StereoCalibration(focal_length_px, baseline_m, 0.0, 0.0, doffs_px)  # refuses what is none
    shifted = np.asarray(disparity, np.float64) + doffs_px
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        depth = np.where(np.isfinite(shifted) & (shifted >= 0), focal_length_px * baseline_m / np.abs(shifted), np.nan)
        result: NDArray[np.float32] = depth.astype(np.float32)
    return result


def depth_to_disparity(
    depth_m: NDArray[np.floating[Any]], focal_length_px: float, baseline_m: float, doffs_px: float = 0.0
) -> NDArray[np.float32]:
    """Convert depth to disparity, the inverse of ``disparity_to_depth``.

    Returns:
        Pixels, float32: ``-doffs_px`` for points at infinity, ``inf`` (unknown) where the depth is NaN, zero or less.

    Raises:
        InputError: As for ``disparity_to_depth``.
    """
    StereoCalibration(focal_length_px, baseline_m, 0.0, 0.0, doffs_px)
    depth = np.asarray(depth_m, np.float64)
    with np.errstate(divide="ignore", invalid="ignore"):
        disparity = np.where(depth > 0, focal_length_px * baseline_m / depth - doffs_px, np.inf)
    result: NDArray[np.float32] = disparity.astype(np.float32)
    return result


def point_cloud(
    disparity: NDArray[np.floating[Any]], calibration: StereoCalibration, max_depth_m: float = np.inf
) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
    """Put every pixel with a finite depth into space, in the left camera's coordinates.

    Args:
        disparity: Left disparity in pixels, [H, W].
        calibration: The cameras.
        max_depth_m: Leave out what is farther.

    Returns:
        Points [N, 3] in metres, x to the right, y down, z forward, row by row; and the mask [H, W] of the N pixels
        they belong to: ``left[mask]`` are their colours.
    """
    depth = disparity_to_depth(
        disparity, calibration.focal_length_px, calibration.baseline_m, calibration.doffs_px
    ).astype(np.float64)
    mask: NDArray[np.bool_] = np.isfinite(depth) & (depth <= max_depth_m)
    rows, columns = np.nonzero(mask)
    z = depth[mask]
    x = (columns - calibration.cx_px) * z / calibration.focal_length_px
    y = (rows - calibration.cy_px) * z / calibration.focal_length_px
    return np.stack([x, y, z], axis=1).astype(np.float32), mask


def left_right_consistent(
    left_disparity: NDArray[np.floating[Any]], right_disparity: NDArray[np.floating[Any]], tolerance_px: float = 1.0
) -> NDArray[np.bool_]:
    """Tell which left pixels the right view's disparity agrees with: the left-right check.

    ``|d(x) - d_right(x - d(x))| <= tolerance_px``, ``x - d(x)`` rounded to the nearest column. What one view alone sees
    fails it. For the right view's pixels, mirror both maps and exchange them.

    Args:
        left_disparity: In pixels, [H, W]; not finite = unknown.
        right_disparity: Likewise, of the right view.
        tolerance_px: How much they may differ.

    Returns:
        Bool [H, W]; false where either disparity is unknown, or the match lies outside the right view.

    Raises:
        InputError: The maps differ in size.

    Examples:
        >>> left_right_consistent(np.array([[1.0, 1.0, 1.0, 1.0]]), np.array([[1.2, 4.0, 1.0, 0.0]])).tolist()
        [[False, True, False, True]]
    """
    if left_disparity.shape != right_disparity.shape:
        raise InputError(
            f"both disparities must have one size, got {list(left_disparity.shape)} and {list(right_disparity.shape)}"
        )
    width = left_disparity.shape[1]
    known = np.isfinite(left_disparity)
    columns = np.rint(np.arange(width) - np.where(known, left_disparity, 0)).astype(np.int64)  # [H, W]
    inside = known & (columns >= 0) & (columns < width)
    matched = np.take_along_axis(right_disparity, np.where(inside, columns, 0), axis=1)
    with np.errstate(invalid="ignore"):
        agrees: NDArray[np.bool_] = inside & (np.abs(left_disparity - matched) <= tolerance_px)
    return agrees


def warp_right_to_left(right: Tensor, disparity: Tensor) -> tuple[Tensor, Tensor]:
    """Fetch for every left pixel the right view's value at ``x - d``, interpolating linearly along the row.

    With the true disparity the result equals the left view wherever nothing hides the point in the right view.

    Args:
        right: Right view, [B, C, H, W], any type (the result is floating point).
        disparity: Left disparity in pixels, [B, H, W]; not finite = unknown.

    Returns:
        The warped view [B, C, H, W], zero where there is nothing to fetch, and the mask bool [B, H, W] of the pixels
        whose disparity is known and whose ``x - d`` lies inside the right view. Differentiable in both arguments.
    """
    values = right if right.is_floating_point() else right.float()
    width = values.shape[-1]
    columns = torch.arange(width, device=disparity.device, dtype=disparity.dtype)
    position = columns - disparity  # [B, H, W]
    mask = torch.isfinite(disparity) & (position >= 0) & (position <= width - 1)
    position = torch.where(mask, position, torch.zeros_like(position))
    first = position.detach().floor().long()
    second = (first + 1).clamp(max=width - 1)
    weight = (position - first).unsqueeze(1)  # [B, 1, H, W]
    warped = _gather_columns(values, first) * (1 - weight) + _gather_columns(values, second) * weight
    return warped * mask.unsqueeze(1), mask


def _gather_columns(values: Tensor, columns: Tensor) -> Tensor:
    """Return ``values[b, c, y, columns[b, y, x]]`` for values [B, C, H, W] and columns [B, H, W]."""
    return values.gather(-1, columns.unsqueeze(1).expand(-1, values.shape[1], -1, -1))
