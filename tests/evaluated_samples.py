"""Random pairs to evaluate, and what stands in for a network."""

from __future__ import annotations

import math

import numpy as np
from torch import Tensor
from torch.utils.data import Dataset

from fa_stereo.data.sample import StereoSample
from fa_stereo.errors import InputError


class Samples(Dataset[StereoSample]):
    """Random pairs of different sizes; every third has an occlusion mask, the fifth nothing below 192 px."""

    def __init__(self, count: int = 11, broken: int | None = None) -> None:
        self.count = count
        self.broken = broken

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> StereoSample:
        if index == self.broken:
            raise InputError(f"frame{index}.png: truncated; fetch it again")
        rng = np.random.default_rng(index)
        height, width = 16 + index, 40 - index
        left, right = rng.integers(0, 256, (2, height, width, 3), np.uint8)
        disparity = rng.uniform(0 if index != 5 else 192, 250, (height, width)).astype(np.float32)
        disparity[0, :3] = (0, math.inf, 192)
        return StereoSample(
            name=f"scene/{index:04d}",
            left=left,
            right=right,
            disparity=disparity,
            occluded=rng.random((height, width)) < 0.2 if index % 3 == 0 else None,
        )


def brightness(left: Tensor, right: Tensor) -> Tensor:
    """Stand in for a network: any function of the two views."""
    return (left.float().mean(dim=1) + right.float().mean(dim=1)) / 3
