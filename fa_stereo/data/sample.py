"""The one form in which every data set hands out a stereo pair."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray


@dataclass
class StereoSample:
    """A rectified pair with what is known about it.

    Disparity is in pixels of its own view's image and never negative; a pixel without ground truth is ``inf``, so
    that PSMNet's mask ``d < max_disparity`` leaves it out. Arrays are never modified in place.

    Attributes:
        name: Unique within the data set, path-like, e.g. ``TRAIN/A/0000/left/0006``.
        left: Left picture, uint8 RGB [H, W, 3].
        right: Right picture, uint8 RGB [H, W, 3].
        disparity: Left disparity, float32 [H, W]: ``x_right = x_left - d``; None where there is no ground truth.
        right_disparity: Right view's disparity, float32 [H, W]: ``x_left = x_right + d``.
        occluded: Bool [H, W], True where the left pixel is not visible in the right view.
    """

    name: str
    left: NDArray[np.uint8]
    right: NDArray[np.uint8]
    disparity: NDArray[np.float32] | None = None
    right_disparity: NDArray[np.float32] | None = None
    occluded: NDArray[np.bool_] | None = None


def to_batch_item(sample: StereoSample) -> dict[str, Any]:
    """Return the sample as tensors that PyTorch's default collation can batch.

    Returns:
        ``left`` and ``right`` uint8 [3, H, W], ``disparity`` float32 [H, W] (inf = no ground truth), ``name``, and
        ``occluded`` bool [H, W] where the sample has it. The network's normalisation happens on the device:
        ``fa_stereo.data.transforms.normalize_images``.
    """
    item: dict[str, Any] = {
        "left": torch.from_numpy(np.ascontiguousarray(sample.left.transpose(2, 0, 1))),
        "right": torch.from_numpy(np.ascontiguousarray(sample.right.transpose(2, 0, 1))),
        "name": sample.name,
    }
    if sample.disparity is not None:
        item["disparity"] = torch.from_numpy(np.ascontiguousarray(sample.disparity))
    if sample.occluded is not None:
        item["occluded"] = torch.from_numpy(np.ascontiguousarray(sample.occluded))
    return item
