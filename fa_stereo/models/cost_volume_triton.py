"""Adding up the parts of ``convolve_cost_volume`` as one GPU kernel forward and four backward.

PyTorch's own additions take some seven small kernels for every disparity, each way, which a processor has to launch one
by one. Backward, each program gathers what belongs to one entry of one part, so that no two write to the same place and
the result does not depend on their order. Importing this file needs Triton; ``cost_volume`` uses it where it works, and
explains the parts. D, W and so on are those of quarter resolution.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

_BLOCK_COLUMNS = 32


class TritonAssemble(torch.autograd.Function):
    """Takes the parts full [B, 3 O, H, W], edge [B, 12 O, H, *], sheared [B, 3 O, H, W + 2] and last [B, 3 O, H, *].

    Their sums are float32 ones, rounded to the type of the parts once. No tensor is kept for the backward pass.
    """

    @staticmethod
    def forward(
        ctx: Any, full: Tensor, edge: Tensor, sheared: Tensor, last: Tensor, bias: Tensor | None, disparities: int
    ) -> Tensor:
        """Return [B, O, D, H, W] in channels_last_3d memory; bias [O], which gets no gradient, is where delta < -2."""
        batch, channels, height, width = full.shape
        channels //= 3
        ctx.parts = [part.shape for part in (full, edge, sheared, last)]
        out = full.new_empty(batch, disparities, height, width, channels)
        grid = (triton.cdiv(width, _BLOCK_COLUMNS), height, batch * disparities)
        with torch.cuda.device_of(full):  # type: ignore[no-untyped-call]
            _assemble[grid](
                out, full, edge, sheared, last, full if bias is None else bias,
                *full.stride(), *edge.stride(), *sheared.stride(), *last.stride(),
                disparities, height, width, channels, last.shape[3],
                HAS_BIAS=bias is not None, BLOCK=_BLOCK_COLUMNS, CHANNELS=triton.next_power_of_2(channels),
            )  # fmt: skip
        return out.permute(0, 4, 1, 2, 3)

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, grad: Tensor) -> Any:
        """Return the gradients of the four parts."""
        batch, channels, disparities, height, width = grad.shape
        gradients = [
            torch.empty(shape, dtype=grad.dtype, device=grad.device, memory_format=torch.channels_last)
            for shape in ctx.parts
        ]
        full, edge, sheared, last = gradients
        sizes = (disparities, height, width, channels)
        options = {"BLOCK": _BLOCK_COLUMNS, "CHANNELS": triton.next_power_of_2(channels)}

        def grid(columns: int) -> tuple[int, int, int]:
            return triton.cdiv(columns, _BLOCK_COLUMNS), height, batch

        with torch.cuda.device_of(grad):  # type: ignore[no-untyped-call]
            _full_backward[grid(width)](full, grad, *grad.stride(), *sizes, **options)
            _edge_backward[grid(edge.shape[3])](edge, grad, *grad.stride(), *sizes, edge.shape[3], **options)
            _sheared_backward[grid(width + 2)](sheared, grad, *grad.stride(), *sizes, **options)
            _last_backward[grid(last.shape[3])](last, grad, *grad.stride(), *sizes, last.shape[3], **options)
        return full, edge, sheared, last, None, None


@triton.jit  # type: ignore[untyped-decorator]
def _assemble(  # type: ignore[no-untyped-def]
    out, full, edge, sheared, last, bias,
    full_b, full_c, full_y, full_x, edge_b, edge_c, edge_y, edge_x,
    sheared_b, sheared_c, sheared_y, sheared_x, last_b, last_c, last_y, last_x,
    disparities, height, width, channels, last_columns,
    HAS_BIAS: tl.constexpr, BLOCK: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Write a block of columns of one row and one disparity of one sample: [BLOCK, O]."""
    x = (tl.program_id(0) * BLOCK + tl.arange(0, BLOCK))[:, None]
    c = tl.arange(0, CHANNELS)[None, :]
    y = tl.program_id(1).to(tl.int64)
    d = tl.program_id(2) % disparities
    sample = (tl.program_id(2) // disparities).to(tl.int64)
    inside = (x < width) & (c < channels)
    delta = x - d
    group = tl.where(d == 0, 0, tl.where(d == disparities - 1, 2, 1)) * channels  # of the first, middle or last

    inner = inside & (delta >= 2)
    value = tl.load(full + sample * full_b + y * full_y + x * full_x + (group + c) * full_c, mask=inner, other=0.0)
    total = value.to(tl.float32)
    at_edge = inside & (delta >= -2) & (delta <= 1)
    channel = group * 4 + (delta + 2) * channels + c
    value = tl.load(edge + sample * edge_b + y * edge_y + x * edge_x + channel * edge_c, mask=at_edge, other=0.0)
    total += value.to(tl.float32)

    seen = inside & (delta >= -2)
    place = sheared + sample * sheared_b + y * sheared_y + (delta + 2) * sheared_x + (group + c) * sheared_c
    total += tl.load(place, mask=seen & (x < width - 1), other=0.0).to(tl.float32)
    place = last + sample * last_b + y * last_y + (last_columns - 1 - d) * last_x + (group + c) * last_c
    total += tl.load(place, mask=seen & (x == width - 1), other=0.0).to(tl.float32)
    if HAS_BIAS:
        total += tl.load(bias + c, mask=inside & (delta < -2), other=0.0).to(tl.float32)
    row = (sample * disparities + d) * height + y
    tl.store(out + (row * width + x) * channels + c, total, mask=inside)


@triton.jit  # type: ignore[untyped-decorator]
def _full_backward(  # type: ignore[no-untyped-def]
    result, grad, grad_b, grad_c, grad_d, grad_y, grad_x,
    disparities, height, width, channels, BLOCK: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Write all three groups of a block of columns: the sum over d <= x - 2."""
    x = (tl.program_id(0) * BLOCK + tl.arange(0, BLOCK))[:, None]
    c = tl.arange(0, CHANNELS)[None, :]
    y, sample = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    inside = (x < width) & (c < channels)
    place = grad + sample * grad_b + y * grad_y + x * grad_x + c * grad_c
    out = result + ((sample * height + y) * width + x) * (3 * channels) + c
    tl.store(out, tl.load(place, mask=inside & (x >= 2), other=0.0), mask=inside)
    middle = tl.zeros([BLOCK, CHANNELS], tl.float32)
    for d in range(1, disparities - 1):
        middle += tl.load(place + d * grad_d, mask=inside & (x >= d + 2), other=0.0).to(tl.float32)
    tl.store(out + channels, middle, mask=inside)
    d = disparities - 1
    tl.store(out + 2 * channels, tl.load(place + d * grad_d, mask=inside & (x >= d + 2), other=0.0), mask=inside)


@triton.jit  # type: ignore[untyped-decorator]
def _edge_backward(  # type: ignore[no-untyped-def]
    result, grad, grad_b, grad_c, grad_d, grad_y, grad_x,
    disparities, height, width, channels, columns, BLOCK: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Write all twelve groups of a block of columns: what lies at d = x - delta, if d is of the group."""
    x = (tl.program_id(0) * BLOCK + tl.arange(0, BLOCK))[:, None]
    c = tl.arange(0, CHANNELS)[None, :]
    y, sample = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    inside = (x < columns) & (c < channels)
    place = grad + sample * grad_b + y * grad_y + x * grad_x + c * grad_c
    out = result + ((sample * height + y) * columns + x) * (12 * channels) + c
    for delta in range(-2, 2):
        d = x - delta
        value = tl.load(place + d * grad_d, mask=inside & (d >= 0) & (d < disparities), other=0.0)
        group = tl.where(d == 0, 0, tl.where(d == disparities - 1, 2, 1))
        for index in range(3):
            entry = (4 * index + delta + 2) * channels
            tl.store(out + entry, tl.where(group == index, value, 0.0), mask=inside)


@triton.jit  # type: ignore[untyped-decorator]
def _sheared_backward(  # type: ignore[no-untyped-def]
    result, grad, grad_b, grad_c, grad_d, grad_y, grad_x,
    disparities, height, width, channels, BLOCK: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Write all three groups of a block of delta + 2: the sum over x = d + delta, the last column left out."""
    entry = (tl.program_id(0) * BLOCK + tl.arange(0, BLOCK))[:, None]
    c = tl.arange(0, CHANNELS)[None, :]
    y, sample = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    inside = (entry < width + 2) & (c < channels)
    delta = entry - 2
    place = grad + sample * grad_b + y * grad_y + delta * grad_x + c * grad_c  # of d = 0
    out = result + ((sample * height + y) * (width + 2) + entry) * (3 * channels) + c
    tl.store(out, tl.load(place, mask=inside & (delta >= 0) & (delta < width - 1), other=0.0), mask=inside)
    middle = tl.zeros([BLOCK, CHANNELS], tl.float32)
    for d in range(1, disparities - 1):
        x = d + delta
        seen = inside & (x >= 0) & (x < width - 1)
        middle += tl.load(place + d * (grad_d + grad_x), mask=seen, other=0.0).to(tl.float32)
    tl.store(out + channels, middle, mask=inside)
    d = disparities - 1
    seen = inside & (d + delta >= 0) & (d + delta < width - 1)
    tl.store(out + 2 * channels, tl.load(place + d * (grad_d + grad_x), mask=seen, other=0.0), mask=inside)


@triton.jit  # type: ignore[untyped-decorator]
def _last_backward(  # type: ignore[no-untyped-def]
    result, grad, grad_b, grad_c, grad_d, grad_y, grad_x,
    disparities, height, width, channels, columns, BLOCK: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Write all three groups of a block of entries: the last column of the one disparity that reads them."""
    entry = (tl.program_id(0) * BLOCK + tl.arange(0, BLOCK))[:, None]
    c = tl.arange(0, CHANNELS)[None, :]
    y, sample = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    inside = (entry < columns) & (c < channels)
    d = columns - 1 - entry
    place = grad + sample * grad_b + d * grad_d + y * grad_y + (width - 1) * grad_x + c * grad_c
    value = tl.load(place, mask=inside, other=0.0)
    group = tl.where(d == 0, 0, tl.where(d == disparities - 1, 2, 1))
    out = result + ((sample * height + y) * columns + entry) * (3 * channels) + c
    for index in range(3):
        tl.store(out + index * channels, tl.where(group == index, value, 0.0), mask=inside)
