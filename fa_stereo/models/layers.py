"""The convolution with batch norm that every part of PSMNet is made of.

Convolution and norm are kept as named children, so that a fast path can fold one into the other: for prediction once
and for all (``fa_stereo.models.optimized``), and on a CPU in training with frozen batch norm in fp32 at every step, in
this module's layers (the cost volume's first convolution calls its norm itself). That saves a pass over the
convolution's result in each direction, and keeping it for the backward pass. On a GPU in training, batch norm of large
maps has kernels of its own (``batch_norm_triton``; its plain form is PyTorch's). In prediction on a CPU the sum and the
ReLU that follow are part of the convolution (``fused``). Where that cannot be, volumes too small for PyTorch to hand
them to oneDNN get zeros at the end, cut off again from what comes out.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fa_stereo.models import fused
from fa_stereo.models.memory_format import channels_last_format
from fa_stereo.models.triton_support import Kernel, checked_kernel

ONEDNN_ELEMENTS = 20480
"""PyTorch hands a float32 convolution of a single sample to oneDNN only if channels x disparities x rows exceed this;
its own takes about five times as long (on x86), and memory for every tap of the kernel."""

_LARGE_MAP = 1 << 21
"""Values of a map from which on batch norm's own kernels are worth being launched."""

_as_written = False  # see convolved_as_written


class ConvNorm2d(nn.Module):
    """A convolution without bias, then batch norm: [B, C_in, H, W] -> [B, C_out, H', W'].

    A 1x1 kernel with a stride is given the pixels it looks at, and no stride: the same function. With the stride,
    oneDNN's gradient of the weights writes out of bounds on CPUs with AVX2 alone, for fewer than 8 input channels (its
    issue 6035).
    """

    plain = False  # batch norm by PyTorch, and never folded: see PSMNet.plain

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
        if _folds(self):
            conv = self.conv
            return F.conv2d(x, *fold(conv, self.norm), conv.stride, conv.padding, conv.dilation)  # type: ignore[arg-type]
        return normalize(self.norm, self.conv(x), plain=self.plain)


class ConvNorm3d(nn.Module):
    """A 3x3x3 convolution without bias, then batch norm: [B, C_in, D, H, W] -> [B, C_out, D', H', W']."""

    plain = False  # batch norm by PyTorch, and never folded: see PSMNet.plain

    def __init__(self, in_channels: int, out_channels: int, *, stride: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv3d(in_channels, out_channels, 3, stride, 1, bias=False)
        self.norm = nn.BatchNorm3d(out_channels)

    def forward(self, x: Tensor, *, padding: int = 1) -> Tensor:
        """Convolve, with this padding along disparity, and normalise."""
        if _folds(self):
            return F.conv3d(x, *fold(self.conv, self.norm), self.conv.stride, (padding, 1, 1))
        return normalize(self.norm, convolve(self.conv, x, padding), plain=self.plain)


class DeconvNorm3d(nn.Module):
    """A transposed 3x3x3 convolution that doubles D, H and W, then batch norm."""

    plain = False  # batch norm by PyTorch, and never folded: see PSMNet.plain

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.conv = nn.ConvTranspose3d(in_channels, out_channels, 3, 2, 1, output_padding=1, bias=False)
        self.norm = nn.BatchNorm3d(out_channels)

    def forward(self, x: Tensor) -> Tensor:
        """Convolve and normalise."""
        if fuses(self, x):
            return fused.convolve_transposed(self.conv, x)
        if _folds(self):
            return F.conv_transpose3d(x, *fold(self.conv, self.norm), 2, 1, output_padding=1)
        return normalize(self.norm, upsample(self.conv, x), plain=self.plain)


def finished(
    layer: ConvNorm2d | ConvNorm3d, x: Tensor, *, padding: int = 1, relu: bool = False, addend: Tensor | None = None
) -> Tensor:
    """Return ``layer(x) + addend``, and of that the positive part if ``relu``.

    In prediction by a folded network the result may be written over ``addend``.

    Args:
        layer: A convolution with its batch norm.
        x: What it maps, [B, C_in, H, W], or [B, C_in, D, H, W] for a 3-D one.
        padding: Of a 3-D one, along disparity.
        relu: Apply a ReLU.
        addend: Of the result's shape, [B, C_out, H', W'] or [B, C_out, D', H', W'].
    """
    if fuses(layer, x, addend):
        conv = layer.conv
        around = conv.padding if isinstance(layer, ConvNorm2d) else (padding, 1, 1)
        at_once = relu and x.dtype != torch.float16  # of whose overflows oneDNN's ReLU would make zeros
        if addend is None:
            out = fused.convolve(conv, x, around, relu=at_once)  # type: ignore[arg-type]
        else:
            out = fused.add_convolution(addend, conv, x, around, relu=at_once)  # type: ignore[arg-type]
        relu = relu and not at_once
    else:
        out = layer(x) if isinstance(layer, ConvNorm2d) else layer(x, padding=padding)
        if addend is not None:
            out = out.add_(addend)
    return F.relu(out, inplace=True) if relu else out


def add_convolved(total: Tensor, layer: ConvNorm3d, x: Tensor, *, padding: int = 1) -> None:
    """Add ``layer(x)`` to ``total``, which is overwritten; it may be a part of a larger volume."""
    if fuses(layer, x, total):
        fused.add_convolution(total, layer.conv, x, (padding, 1, 1))
    else:
        total += layer(x, padding=padding)


def fuses(layer: ConvNorm2d | ConvNorm3d | DeconvNorm3d, x: Tensor, addend: Tensor | None = None) -> bool:
    """Tell whether ``fused`` computes a layer: batch norm is folded away, nobody listens, no gradient is asked for."""
    if layer.plain or not isinstance(layer.norm, nn.Identity) or x.device.type != "cpu" or _as_written:
        return False
    if torch.is_grad_enabled() or torch.is_autocast_enabled("cpu") or torch.compiler.is_compiling():
        return False
    for values in (x,) if addend is None else (x, addend):
        if values.dtype != layer.conv.weight.dtype or not values.is_contiguous(memory_format=channels_last_format(x)):
            return False
    if isinstance(layer, ConvNorm2d) and layer.step > 1:
        return False
    return not (_has_hooks(layer) or _has_hooks(layer.conv) or _has_hooks(layer.norm)) and fused.works(x.dtype)


def normalize(norm: nn.Module, x: Tensor, *, plain: bool = False) -> Tensor:
    """Return ``norm(x)`` for a map [B, C, ...]: on a GPU in training by kernels for large maps, unless ``plain``."""
    if not plain and isinstance(norm, nn.BatchNorm2d | nn.BatchNorm3d) and _suits_kernels(norm, x):
        kernels = _triton_batch_norm(x.device, x.dtype)
        if kernels is not None:
            assert norm.num_batches_tracked is not None
            norm.num_batches_tracked.add_(1)
            normalized: Tensor = kernels(
                x, norm.weight, norm.bias, norm.running_mean, norm.running_var, norm.momentum, norm.eps
            )
            return normalized
    out: Tensor = norm(x)
    return out


def _suits_kernels(norm: nn.BatchNorm2d | nn.BatchNorm3d, x: Tensor) -> bool:
    """Tell whether a batch norm has to find the statistics of a map that our kernels take, and that is worth it."""
    if not x.is_cuda or not norm.training or x.numel() < _LARGE_MAP or x.dtype == torch.float64:
        return False
    if not norm.affine or norm.running_mean is None or norm.momentum is None or norm.weight.dtype != torch.float32:
        return False
    if torch.compiler.is_compiling() or _has_hooks(norm):
        return False
    return x.is_contiguous(memory_format=channels_last_format(x)) and x.shape[1] in (4, 8, 16, 32, 64, 128, 256, 512)


@cache
def _triton_batch_norm(device: torch.device, dtype: torch.dtype) -> Kernel | None:
    """Return the kernels if Triton is there and compiles them for this GPU and type, else None."""

    def load() -> Kernel:
        from fa_stereo.models.batch_norm_triton import TritonBatchNorm

        x = torch.tensor([1.0, 2.0, 3.0, 7.0], device=device, dtype=dtype).view(1, 2, 1, 2)
        x = x.contiguous(memory_format=torch.channels_last).requires_grad_()  # means 1.5 and 5, deviations 0.5 and 2
        weight, bias, mean, variance = (torch.ones(2, device=device) for _ in range(4))
        out = TritonBatchNorm.apply(x, weight.requires_grad_(), bias.requires_grad_(), mean, variance, 0.5, 0.0)
        gradients = torch.autograd.grad(out, (x, weight, bias), x.detach())
        found = torch.cat([values.detach().float().flatten() for values in (out, *gradients, mean, variance)])
        expected = [0, 2, 0, 2, 0, 0, 0, 0, 1, 4, 3, 10, 1.25, 3, 0.75, 4.5]
        if not torch.allclose(found, found.new_tensor(expected), atol=1e-4, rtol=0):
            raise RuntimeError(f"of 1, 2 and 3, 7 came out {found.tolist()}")
        apply: Kernel = TritonBatchNorm.apply
        return apply

    return checked_kernel(load, "batch norm in training")


def _folds(layer: ConvNorm2d | ConvNorm3d | DeconvNorm3d) -> bool:
    """Tell whether a layer computes as one convolution: batch norm is in eval mode and a gradient may be asked for.

    The gradient of batch norm's weight is then a difference of two sums over the convolution's results. So not where
    those are rounded to few digits, under autocast or on a GPU (TF32); and not where somebody listens to one of both.
    """
    norm = layer.norm
    if layer.plain or not isinstance(norm, nn.modules.batchnorm._BatchNorm):
        return False
    if norm.training or not torch.is_grad_enabled():
        return False
    if norm.weight.device.type != "cpu" or torch.is_autocast_enabled("cpu"):
        return False
    return not _has_hooks(layer.conv) and not _has_hooks(norm)


def _has_hooks(module: nn.Module) -> bool:
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return any(getattr(module, kind) for kind in kinds)


def fold(
    conv: nn.Conv2d | nn.Conv3d | nn.ConvTranspose3d,
    norm: nn.modules.batchnorm._BatchNorm,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """Return the one convolution that a convolution without bias and batch norm in eval mode are.

    ``norm(w * x) = (s w) * x + (bias - s mean)`` with ``s = weight / sqrt(var + eps)``. Gradients pass through to both.

    Args:
        conv: The convolution.
        norm: What follows it.
        dtype: Type to multiply the kernel in; None takes the kernel's own, of which nothing more is kept for the
            backward pass then. What it is multiplied by is computed in float64.

    Returns:
        Kernel, of the convolution's shape, and bias [C_out], of the kernel's type.
    """
    assert conv.bias is None
    assert norm.running_mean is not None
    assert norm.running_var is not None
    scale = norm.weight.double() / torch.sqrt(norm.running_var.double() + norm.eps)  # [C_out]
    bias = norm.bias.double() - scale * norm.running_mean.double()
    output_axis = 1 if isinstance(conv, nn.ConvTranspose3d) else 0
    shape = [1] * conv.weight.dim()
    shape[output_axis] = -1
    dtype = dtype or conv.weight.dtype
    kernel = conv.weight.to(dtype) * scale.to(dtype).view(shape)
    return kernel.to(conv.weight.dtype), bias.to(conv.weight.dtype)


def convolve(conv: nn.Conv3d, x: Tensor, padding: int = 1) -> Tensor:
    """Convolve [B, C_in, D, H, W] with a 3x3x3 kernel to [B, C_out, D', H', W']: ``conv(x)``, by oneDNN if it can be.

    ``padding`` is the one along disparity, 1 or 0; the rest is the convolution's own.
    """
    missing = _missing_disparities(x)
    if missing == 0 and padding == 1:
        out: Tensor = conv(x)
        return out
    out = F.conv3d(_append_zeros(x, missing), conv.weight, conv.bias, conv.stride, (padding, 1, 1))
    return out.narrow(2, 0, (x.shape[2] + 2 * padding - 3) // conv.stride[0] + 1)


def upsample(conv: nn.ConvTranspose3d, x: Tensor) -> Tensor:
    """Map [B, C_in, D, H, W] by a transposed 3x3x3 kernel to [B, C_out, 2D, 2H, 2W]: ``conv(x)``, by oneDNN too."""
    missing = _missing_disparities(x)
    if missing == 0:
        out: Tensor = conv(x)
        return out
    out = F.conv_transpose3d(_append_zeros(x, missing), conv.weight, conv.bias, 2, 1, output_padding=1)
    return out.narrow(2, 0, 2 * x.shape[2])


@contextmanager
def convolved_as_written() -> Iterator[None]:
    """Nothing is fused or appended inside this context: for whoever counts or exports what the network computes."""
    global _as_written
    before, _as_written = _as_written, True
    try:
        yield
    finally:
        _as_written = before


def _append_zeros(x: Tensor, disparities: int) -> Tensor:
    """Append zeros along disparity, which no result sees, or sees in place of the zeros of a padding."""
    return F.pad(x, (0, 0, 0, 0, 0, disparities)) if disparities else x


def _missing_disparities(x: Tensor) -> int:
    """Return how many disparities [B, C, D, H, W] lacks for a convolution by oneDNN; 0 where that is no matter.

    In lower precision, in batches and in float64 PyTorch's choice does not depend on the size. In training nothing is
    gained, and more than three times as many as there are would take longer than PyTorch's own convolution.
    """
    has_onednn: bool = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    if not has_onednn or _as_written or torch.is_grad_enabled() or torch.is_autocast_enabled("cpu"):
        return 0
    if x.device.type != "cpu" or x.dtype != torch.float32 or x.shape[0] > 1:
        return 0
    missing = ONEDNN_ELEMENTS // (x.shape[1] * x.shape[3]) + 1 - x.shape[2]
    return missing if 0 < missing <= 3 * x.shape[2] else 0


def initialize_like_psmnet(module: nn.Module) -> None:
    """Initialise one module as PSMNet does; meant for ``Module.apply``.

    Conv2d and Conv3d: N(0, sqrt(2 / (k C_out))) with k the kernel's volume. Batch norm: weight 1, bias 0.
    ConvTranspose3d keeps PyTorch's default. A tensor without memory (device ``meta``) is left alone: to draw numbers
    for it PyTorch would load its compiler, which takes a second and 100 MB.
    """
    if isinstance(module, (nn.Conv2d, nn.Conv3d)) and not module.weight.is_meta:
        fan_out = math.prod(module.kernel_size) * module.out_channels
        with torch.no_grad():
            module.weight.normal_(0.0, math.sqrt(2.0 / fan_out))
    elif isinstance(module, (nn.BatchNorm2d, nn.BatchNorm3d)):
        nn.init.ones_(module.weight)
        nn.init.zeros_(module.bias)
