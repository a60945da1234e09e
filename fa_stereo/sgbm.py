"""OpenCV's semi-global matching, configured once: the classical baseline that networks are compared with.

Hirschmüller, "Stereo Processing by Semiglobal Matching and Mutual Information", 2008, in OpenCV's variant
(``StereoSGBM``): all eight directions (``MODE_HH``), colour pictures, blocks of 5x5, holes filled from the background.
"""

from __future__ import annotations

import cv2
import numpy as np
from numpy.typing import NDArray

from fa_stereo.errors import InputError

LARGEST_RANGE = 2032  # OpenCV's result is int16 in sixteenths
BLOCK_SIZE = 5
SMALL_STEP_PENALTY = 600
LARGE_STEP_PENALTY = 2400
UNIQUENESS_PERCENT = 10
SPECKLE_PIXELS = 100
SPECKLE_RANGE_PX = 2
PREFILTER_CAP = 63


def match_semi_global(
    left: NDArray[np.uint8], right: NDArray[np.uint8], max_disparity: int = 192
) -> NDArray[np.float32]:
    """Match a rectified pair with OpenCV's StereoSGBM and fill what it leaves open.

    OpenCV only matches columns from ``max_disparity`` on, so both views are widened at the left by so many copies of
    their first column: the left border is searched like the rest.

    Args:
        left: uint8 RGB [H, W, 3] or grey [H, W].
        right: Likewise, of the same size.
        max_disparity: Number of disparities searched, from 0; a multiple of 16, at most ``LARGEST_RANGE``.

    Returns:
        Left disparity in pixels, float32 [H, W], in steps of 1/16, finite everywhere.

    Raises:
        InputError: The views differ in size, or ``max_disparity`` is no positive multiple of 16 or too large.

    Examples:
        >>> texture = np.random.default_rng(0).integers(0, 256, (40, 200), np.uint8)
        >>> disparity = match_semi_global(texture[:, 4:-4], texture[:, 8:], max_disparity=16)  # 4 px apart
        >>> float(np.median(disparity))
        4.0
    """
    if left.shape != right.shape:
        raise InputError(f"left and right must have one size, got shapes {list(left.shape)} and {list(right.shape)}")
    if max_disparity <= 0 or max_disparity % 16:
        raise InputError(
            f"max_disparity of semi-global matching must be a positive multiple of 16, got {max_disparity}"
        )
    if max_disparity > LARGEST_RANGE:
        raise InputError(f"max_disparity of semi-global matching must be at most {LARGEST_RANGE}, got {max_disparity}")
    matcher = cv2.StereoSGBM.create(
        minDisparity=0,
        numDisparities=max_disparity,
        blockSize=BLOCK_SIZE,
        P1=SMALL_STEP_PENALTY,
        P2=LARGE_STEP_PENALTY,
        disp12MaxDiff=1,
        preFilterCap=PREFILTER_CAP,
        uniquenessRatio=UNIQUENESS_PERCENT,
        speckleWindowSize=SPECKLE_PIXELS,
        speckleRange=SPECKLE_RANGE_PX,
        mode=cv2.STEREO_SGBM_MODE_HH,
    )
    wide_left, wide_right = (
        cv2.copyMakeBorder(view, 0, 0, max_disparity, 0, cv2.BORDER_REPLICATE) for view in (left, right)
    )
    sixteenths = matcher.compute(wide_left, wide_right)[:, max_disparity:]  # int16 [H, W]
    return fill_from_background(sixteenths.astype(np.float32) / np.float32(16))


def fill_from_background(disparity: NDArray[np.float32]) -> NDArray[np.float32]:
    """Fill pixels without a match with the smaller of the nearest disparities to their left and right.

    What only one camera sees lies behind what hides it: the farther neighbour is the better guess.

    Args:
        disparity: In pixels, [H, W]; zero and below is "no match" (zero is what a failed match often ends at).

    Returns:
        float32 [H, W], positive except in rows without any match, which are 0.
    """
    width = disparity.shape[1]
    matched = disparity > 0
    columns = np.arange(width)
    left_column = np.maximum.accumulate(np.where(matched, columns, -1), axis=1)
    right_column = np.minimum.accumulate(np.where(matched, columns, width)[:, ::-1], axis=1)[:, ::-1]
    padded = np.pad(disparity, ((0, 0), (1, 1)), constant_values=np.inf)  # column c is at c + 1: borders are inf
    from_left = np.take_along_axis(padded, left_column + 1, axis=1)
    from_right = np.take_along_axis(padded, right_column + 1, axis=1)
    filled = np.minimum(from_left, from_right)  # a matched pixel is its own nearest neighbour
    filled[np.isinf(filled)] = 0
    result: NDArray[np.float32] = filled.astype(np.float32)
    return result
