"""The convolution with batch norm that the network is made of."""

from __future__ import annotations

import copy
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fa_stereo.models import layers
from fa_stereo.models.layers import ConvNorm2d, convolve, upsample


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


@pytest.mark.parametrize("depths", [3, 4, 9])
@pytest.mark.parametrize("appended", [0, 1, 5])
@pytest.mark.parametrize(("stride", "padding"), [(1, 1), (2, 1), (1, 0), (2, 0), ("transposed", 1)])
def test_zeros_appended_along_disparity(
    stride: int | str, padding: int, appended: int, depths: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Values and gradients are those of the convolution without them."""
    torch.manual_seed(0)
    x = torch.randn(1, 3, depths, 5, 6, dtype=torch.float64).requires_grad_()
    conv: nn.Conv3d | nn.ConvTranspose3d
    if stride == "transposed":
        conv = nn.ConvTranspose3d(3, 4, 3, 2, 1, output_padding=1).double()
        expected, run = conv(x), upsample
    else:
        conv = nn.Conv3d(3, 4, 3, stride, 1).double()
        expected, run = F.conv3d(x, conv.weight, conv.bias, stride, (padding, 1, 1)), partial(convolve, padding=padding)
    monkeypatch.setattr(layers, "_missing_disparities", lambda x: appended)
    result = run(conv, x)
    torch.testing.assert_close(result, expected, atol=1e-12, rtol=0)
    inputs, upstream = (x, conv.weight, conv.bias), torch.randn_like(expected)
    for ours, plain in zip(
        torch.autograd.grad(result, inputs, upstream), torch.autograd.grad(expected, inputs, upstream), strict=True
    ):
        torch.testing.assert_close(ours, plain, atol=1e-11, rtol=0)


@torch.no_grad()
def test_which_volumes_get_zeros() -> None:
    """Small single ones of float32 on the CPU, with which oneDNN computes what PyTorch does."""
    least = 20480 // (16 * 20) + 1
    small = torch.randn(1, 16, least // 2, 20, 12)
    with_onednn = torch.backends.mkldnn.is_available()
    assert layers._missing_disparities(small) == (least - least // 2 if with_onednn else 0)
    assert layers._missing_disparities(torch.randn(1, 16, least, 20, 12)) == 0
    assert layers._missing_disparities(torch.randn(1, 16, least // 5, 20, 12)) == 0  # too small
    for other in (small.double(), small.bfloat16(), small.expand(2, -1, -1, -1, -1), small.to("meta")):
        assert layers._missing_disparities(other) == 0
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert layers._missing_disparities(small) == 0
    with layers.without_appended_zeros():
        assert layers._missing_disparities(small) == 0
    with torch.enable_grad():
        assert layers._missing_disparities(small) == 0
    for conv, run in ((nn.Conv3d(16, 8, 3, 2, 1), convolve), (nn.ConvTranspose3d(16, 8, 3, 2, 1, 1), upsample)):
        exact = copy.deepcopy(conv).double()(small.double())
        torch.testing.assert_close(run(conv, small).double(), exact, atol=1e-5, rtol=0)
