"""From feature maps to the paper's matrices and back: X [B, N, c] has one row per position.

The paper regards any map or volume of h x w (x d) positions and c channels as a matrix with s = N rows (section 3.1).
Here that matrix is a view of the map, in either memory layout, and linear layers (the paper's 1x1 and 1x1x1
convolutions) act on its rows without copying it.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from fa_stereo.errors import InputError


def to_positions(x: Tensor) -> Tensor:
    """Return map or volume [B, c, *spatial] as the paper's X [B, N, c], a view for contiguous and channels_last."""
    return x.flatten(2).mT  # [B, N, c]


def from_positions(rows: Tensor, spatial: Sequence[int]) -> Tensor:
    """Return rows [B, N, c] as a map or volume [B, c, *spatial], always a view.

    In this order of steps even a batch of one has the strides by which PyTorch knows a map as channels_last.
    """
    return torch.unflatten(rows, 1, tuple(spatial)).movedim(-1, 1)  # [B, c, *spatial]


def flat_position(position: Sequence[int], spatial: Sequence[int]) -> int:
    """Return the row of X that holds ``position``, such as (y, x), of a map or volume of size ``spatial``.

    Raises:
        InputError: The position has another number of axes or lies outside.
    """
    inside = len(position) == len(spatial) and all(
        0 <= index < size for index, size in zip(position, spatial, strict=True)
    )
    if not inside:
        raise InputError(f"position {tuple(position)} is not inside a map of size {tuple(spatial)}")
    return sum(index * math.prod(spatial[axis + 1 :]) for axis, index in enumerate(position))


class Pointwise(nn.Linear):
    """Linear layer on the rows of X: the paper's product X W, W^T = ``weight`` [out, in].

    ``nn.Linear`` copies an X that is the transposed view of a feature map, once a layer, and keeps the copies for the
    backward pass; a batched product reads the view itself.

    Args:
        in_channels: Channels of X.
        out_channels: Channels of the result.
        bias: Whether to add a bias; the paper's maps have none.
        zero: Start from zero: as the last layer of a residual branch, it makes the block start as the identity.
    """

    def __init__(self, in_channels: int, out_channels: int, *, bias: bool = False, zero: bool = False) -> None:
        self.zero = zero
        super().__init__(in_channels, out_channels, bias=bias)

    def reset_parameters(self) -> None:
        """Draw new weights, or zeros for a layer that starts from zero."""
        super().reset_parameters()
        if self.zero:
            for parameter in self.parameters():
                nn.init.zeros_(parameter)

    def forward(self, input: Tensor) -> Tensor:
        """Map X [B, N, in] to [B, N, out]."""
        weight = self.weight.mT.expand(input.shape[0], -1, -1)  # [B, in, out], not copied
        if self.bias is None:
            return torch.bmm(input, weight)  # [B, N, out]
        return torch.baddbmm(self.bias, input, weight)  # [B, N, out]


def without_autocast(device_type: str) -> contextlib.AbstractContextManager[object]:
    """Return a context in which autocast does not lower the precision of products."""
    if torch.amp.is_autocast_available(device_type) and torch.is_autocast_enabled(device_type):
        return torch.autocast(device_type, enabled=False)
    return contextlib.nullcontext()
