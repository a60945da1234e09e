"""The convolution with batch norm that the network is made of."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from fa_stereo.models.layers import ConvNorm2d


@pytest.mark.parametrize(("kernel_size", "stride", "dilation"), [(3, 1, 1), (3, 2, 1), (3, 1, 2), (1, 1, 1), (1, 2, 1)])
@pytest.mark.parametrize("size", [(8, 12), (7, 11)])
def test_convolution_and_norm(kernel_size: int, stride: int, dilation: int, size: tuple[int, int]) -> None:
    """Values and gradients against PyTorch's own strided convolution."""
    torch.manual_seed(0)
    layer = ConvNorm2d(4, 6, kernel_size, stride=stride, dilation=dilation).double()
    x = torch.randn(2, 4, *size, dtype=torch.float64, requires_grad=True)
    result = layer(x)
    convolved = F.conv2d(x, layer.conv.weight, None, stride, dilation * (kernel_size // 2), dilation)
    expected = F.batch_norm(convolved, None, None, layer.norm.weight, layer.norm.bias, training=True)
    torch.testing.assert_close(result, expected, atol=1e-12, rtol=0)
    inputs = (x, layer.conv.weight)
    upstream = torch.randn_like(result)
    for ours, plain in zip(
        torch.autograd.grad(result, inputs, upstream), torch.autograd.grad(expected, inputs, upstream), strict=True
    ):
        torch.testing.assert_close(ours, plain, atol=1e-11, rtol=0)


@pytest.mark.parametrize("channels", [2, 4, 7, 8, 16])
def test_narrow_layers_train_in_channels_last(channels: int) -> None:
    """With a stride of its own, the 1x1 convolution of fewer than 8 channels would corrupt memory on some CPUs."""
    torch.manual_seed(0)
    layer = ConvNorm2d(channels, 2 * channels, 1, stride=2).to(memory_format=torch.channels_last)
    x = torch.randn(2, channels, 16, 24).contiguous(memory_format=torch.channels_last)
    exact = ConvNorm2d(channels, 2 * channels, 1, stride=2).double()
    exact.load_state_dict(layer.state_dict())
    for _ in range(3):
        layer.zero_grad()
        layer(x).square().mean().backward()
    exact(x.double()).square().mean().backward()
    for ours, double in zip(layer.parameters(), exact.parameters(), strict=True):
        torch.testing.assert_close(ours.grad.double(), double.grad, atol=1e-5, rtol=1e-3)
