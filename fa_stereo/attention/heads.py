"""What factorized and conventional attention share: their linear maps, and the division among heads (equation 5)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from fa_stereo.attention.positions import Pointwise
from fa_stereo.errors import InputError


def linear_maps(
    channels: int, key_channels: int, value_channels: int | None, heads: int
) -> tuple[Pointwise, Pointwise, Pointwise, nn.Module]:
    """Build the linear maps of an attention block that starts as the identity.

    The last layer, the reprojection or, without a value bottleneck, the map to the value itself, starts at zero.

    Args:
        channels: c.
        key_channels: b or k of all heads together.
        value_channels: m of the value bottleneck, reprojected to c; None is a value of c channels, not reprojected.
        heads: h.

    Returns:
        The two maps c to ``key_channels``, the map c to m, and the reprojection m to c (or the identity).

    Raises:
        InputError: The channels are not divisible by the heads.
    """
    bottleneck = value_channels is not None
    values = channels if value_channels is None else value_channels
    check_heads(heads, key_channels=key_channels, value_channels=values)
    return (
        Pointwise(channels, key_channels),
        Pointwise(channels, key_channels),
        Pointwise(channels, values, zero=not bottleneck),
        Pointwise(values, channels, zero=True) if bottleneck else nn.Identity(),
    )


def by_head(head: Callable[..., Tensor], heads: int, *matrices: Tensor) -> Tensor:
    """Divide matrices [B, N, channels] among the heads and put their results [B, N, m/h] side by side [B, N, m]."""
    if heads == 1:  # the backward pass of a division, even into one, is a copy
        return head(*matrices)  # [B, N, m]
    parts = zip(*(matrix.chunk(heads, -1) for matrix in matrices), strict=True)
    return torch.cat([head(*part) for part in parts], dim=-1)  # [B, N, m]


def check_heads(heads: int, **channels: int) -> None:
    """Raise InputError if a number of channels cannot be divided among the heads."""
    for name, count in channels.items():
        if count % heads:
            raise InputError(f"attention.{name} ({count}) must be divisible by attention.heads ({heads})")
