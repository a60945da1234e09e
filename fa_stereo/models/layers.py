"""The convolution with batch norm that every part of PSMNet is made of.

Convolution and norm are kept as named children, so that a fast path can fold one into the other.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn


class ConvNorm2d(nn.Module):
    """A convolution without bias, then batch norm: [B, C_in, H, W] -> [B, C_out, H', W']. No nonlinearity.

    A 1x1 kernel with a stride is given the pixels it looks at, and no stride: the same function. With the stride,
    oneDNN's gradient of the weights writes out of bounds on CPUs with AVX2 alone, for fewer than 8 input channels (its
    issue 6035).
    """

    def __init__(
        self, in_channels: int, out_channels: int, kernel_size: int = 3, *, stride: int = 1, dilation: int = 1
    ) -> None:
        super().__init__()
        padding = dilation * (kernel_size // 2)
        self.step, stride = (stride, 1) if kernel_size == 1 else (1, stride)
        self.conv = nn.Conv2d(in_channels, out_channels, kernel_size, stride, padding, dilation, bias=False)
        self.norm = nn.BatchNorm2d(out_channels)

    def forward(self, x: Tensor) -> Tensor:
        """Convolve and normalise."""
        if self.step > 1:
            x = x[..., :: self.step, :: self.step]
        out: Tensor = self.norm(self.conv(x))
        return out


class ConvNorm3d(nn.Module):
    """A 3x3x3 convolution without bias, then batch norm: [B, C_in, D, H, W] -> [B, C_out, D', H', W']."""

    def __init__(self, in_channels: int, out_channels: int, *, stride: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv3d(in_channels, out_channels, 3, stride, 1, bias=False)
        self.norm = nn.BatchNorm3d(out_channels)

    def forward(self, x: Tensor) -> Tensor:
        """Convolve and normalise."""
        out: Tensor = self.norm(self.conv(x))
        return out


class DeconvNorm3d(nn.Module):
    """A transposed 3x3x3 convolution that doubles D, H and W, then batch norm."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.conv = nn.ConvTranspose3d(in_channels, out_channels, 3, 2, 1, output_padding=1, bias=False)
        self.norm = nn.BatchNorm3d(out_channels)

    def forward(self, x: Tensor) -> Tensor:
        """Convolve and normalise."""
        out: Tensor = self.norm(self.conv(x))
        return out


def initialize_like_psmnet(module: nn.Module) -> None:
    """Initialise one module as PSMNet does; meant for ``Module.apply``.

    Conv2d and Conv3d: N(0, sqrt(2 / (k C_out))) with k the kernel's volume. Batch norm: weight 1, bias 0.
    ConvTranspose3d keeps PyTorch's default.
    """
    if isinstance(module, (nn.Conv2d, nn.Conv3d)):
        fan_out = math.prod(module.kernel_size) * module.out_channels
        with torch.no_grad():
            module.weight.normal_(0.0, math.sqrt(2.0 / fan_out))
    elif isinstance(module, (nn.BatchNorm2d, nn.BatchNorm3d)):
        nn.init.ones_(module.weight)
        nn.init.zeros_(module.bias)
