"""The convolutional blocks that the paper's tables 9 and 10 set beside attention."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn


class ResBlock(nn.Module):
    """Residual block of two 3x3 convolutions with batch normalization on a map [B, c, H, W] (ResBlock of table 9).

    As in the rest of this network, no rectification follows the sum. The last normalization starts with weight zero,
    and so the block as the identity. A volume [B, c, D, H, W] is treated plane by plane.

    Args:
        channels: c.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.branch = nn.Sequential(
            nn.Conv2d(channels, channels, 3, padding=1, bias=False),
            nn.BatchNorm2d(channels),
            nn.ReLU(inplace=True),
            nn.Conv2d(channels, channels, 3, padding=1, bias=False),
            zero_batch_norm(channels),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Map [B, c, H, W] or [B, c, D, H, W] to the same shape."""
        return by_plane(lambda plane: plane + self.branch(plane), x)


class ResBlockBottleneck(nn.Module):
    """Residual bottleneck: 1x1 to m channels, 3x3, 1x1 back to c, with batch normalization (ResBlock-bot of table 9).

    Starts as the identity and treats volumes plane by plane, as ``ResBlock`` does.

    Args:
        channels: c.
        bottleneck_channels: m.
    """

    def __init__(self, channels: int, bottleneck_channels: int) -> None:
        super().__init__()
        self.branch = nn.Sequential(
            nn.Conv2d(channels, bottleneck_channels, 1, bias=False),
            nn.BatchNorm2d(bottleneck_channels),
            nn.ReLU(inplace=True),
            nn.Conv2d(bottleneck_channels, bottleneck_channels, 3, padding=1, bias=False),
            nn.BatchNorm2d(bottleneck_channels),
            nn.ReLU(inplace=True),
            nn.Conv2d(bottleneck_channels, channels, 1, bias=False),
            zero_batch_norm(channels),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Map [B, c, H, W] or [B, c, D, H, W] to the same shape."""
        return by_plane(lambda plane: plane + self.branch(plane), x)


def zero_batch_norm(channels: int) -> nn.BatchNorm2d:
    """Return a batch normalization whose output starts at zero."""
    norm = nn.BatchNorm2d(channels)
    nn.init.zeros_(norm.weight)
    return norm


def by_plane(block: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Apply a block for maps [B, c, H, W] to a map, or to every plane of a volume [B, c, D, H, W]."""
    if x.dim() == 4:
        return block(x)
    planes = x.transpose(1, 2).flatten(0, 1)  # [B*D, c, H, W]
    out: Tensor = torch.unflatten(block(planes), 0, (x.shape[0], x.shape[2]))  # [B, D, c, H, W]
    return out.transpose(1, 2)  # [B, c, D, H, W]
