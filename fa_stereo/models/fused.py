"""Convolutions that add and apply a ReLU while they write, by oneDNN's post-operations; for prediction on a CPU.

Volumes and maps are far larger than caches. A sum or a ReLU of its own reads and writes all of it again, which in low
precision, where the convolution itself takes a sixth of the time, is no small part of the whole. PyTorch's own compiler
calls the same operators. They are not public, so each data type is tried out before it is used; where one is not there,
or does not do what is expected, the plain form computes (``fa_stereo.models.layers``).

oneDNN's ReLU maps NaN to zero, PyTorch's to NaN. Nothing is fused therefore in networks whose weights are not finite
(``fa_stereo.models.optimized``), and no ReLU in float16.
"""

from __future__ import annotations

from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def convolve(conv: nn.Conv2d | nn.Conv3d, x: Tensor, padding: tuple[int, ...], *, relu: bool = False) -> Tensor:
    """Return ``conv(x)``, [B, C_out, H', W'] or [B, C_out, D', H', W'], and of that the positive part if ``relu``.

    Args:
        conv: Any kernel; its own padding is not looked at.
        x: [B, C_in, H, W] or [B, C_in, D, H, W], channels last.
        padding: Along each axis.
        relu: Apply a ReLU.
    """
    out: Tensor = torch.ops.mkldnn._convolution_pointwise(
        x, conv.weight, conv.bias, padding, conv.stride, conv.dilation, conv.groups, "relu" if relu else "none", [], ""
    )
    return out


def add_convolution(
    total: Tensor, conv: nn.Conv2d | nn.Conv3d, x: Tensor, padding: tuple[int, ...], *, relu: bool = False
) -> Tensor:
    """Overwrite ``total`` by ``total + conv(x)``, or the positive part of it; return it.

    ``total`` has the shape of ``conv(x)``, [B, C_out, H', W'] or [B, C_out, D', H', W'], and is channels last too; it
    may be a part of a larger volume. The other arguments are those of ``convolve``.
    """
    torch.ops.mkldnn._convolution_pointwise_.binary(
        total, x, conv.weight, conv.bias, padding, conv.stride, conv.dilation, conv.groups,
        "add", None, "relu" if relu else None, [], None,
    )  # fmt: skip
    return total


def convolve_transposed(conv: nn.ConvTranspose3d, x: Tensor) -> Tensor:
    """Map [B, C_in, D, H, W], channels last, to ``conv(x)``, [B, C_out, 2D, 2H, 2W], by oneDNN whatever the size."""
    out: Tensor = torch.ops.mkldnn._convolution_transpose_pointwise(
        x, conv.weight, conv.bias, conv.padding, conv.output_padding, conv.stride, conv.dilation, conv.groups,
        "none", [], "",
    )  # fmt: skip
    return out


@cache
def works(dtype: torch.dtype) -> bool:
    """Tell whether these functions compute what they should on this machine, in this type."""
    if not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return False
    try:
        # Nothing of the caller's: neither its random numbers, nor the device on which it makes tensors.
        with torch.inference_mode(), torch.random.fork_rng(devices=[]), torch.device("cpu"):
            return all(_agrees(dimensions, dtype) for dimensions in (2, 3))
    except (RuntimeError, AttributeError, TypeError):  # a type it refuses, no such operator, or other arguments
        return False


def _agrees(dimensions: int, dtype: torch.dtype) -> bool:
    """Compare with PyTorch's convolutions on small whole numbers, which every type holds."""
    order = torch.channels_last if dimensions == 2 else torch.channels_last_3d
    padding = (1,) * dimensions

    def whole_numbers(*shape: int, modulus: int = 5) -> Tensor:
        values = torch.arange(torch.Size(shape).numel()).view(shape) * 7 % modulus - modulus // 2
        return values.to(dtype).contiguous(memory_format=order)

    kind = nn.Conv2d if dimensions == 2 else nn.Conv3d
    conv = kind(4, 8, 3, padding=1)
    conv.weight = nn.Parameter(whole_numbers(*conv.weight.shape, modulus=3), requires_grad=False)
    conv.bias = nn.Parameter(torch.arange(-4, 4).to(dtype), requires_grad=False)
    x = whole_numbers(2, 4, *range(3, 3 + dimensions))
    addend = whole_numbers(2, 8, *x.shape[2:], modulus=7)
    inputs = x.double(), conv.weight.double(), conv.bias.double()
    plain = F.conv2d(*inputs, padding=1) if dimensions == 2 else F.conv3d(*inputs, padding=1)
    found = [convolve(conv, x, padding), convolve(conv, x, padding, relu=True)]
    found += [add_convolution(addend.clone(), conv, x, padding, relu=relu) for relu in (False, True)]
    both = plain + addend
    expected = [plain, plain.relu(), both, both.relu()]
    if isinstance(conv, nn.Conv3d):
        deconv = nn.ConvTranspose3d(4, 8, 3, 2, 1, output_padding=1)
        deconv.weight = nn.Parameter(whole_numbers(*deconv.weight.shape, modulus=3), requires_grad=False)
        deconv.bias = conv.bias
        found.append(convolve_transposed(deconv, x))
        expected.append(F.conv_transpose3d(inputs[0], deconv.weight.double(), inputs[2], 2, 1, output_padding=1))
    return all(torch.equal(ours.double(), theirs) for ours, theirs in zip(found, expected, strict=True))
