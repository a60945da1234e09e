"""Batch norm in training as GPU kernels that read large maps as fast as the memory is: three each way.

Channels lie together in memory (channels_last, channels_last_3d), so that a map is a matrix [N, C], N = B D H W, and
each program takes some rows of it. Forward: sums of every program's rows, mean and deviation from these, the result.
Backward, with ``n`` the normalised input: sums of the gradient ``g`` and of ``g n``, then ``g - mean(g) - n mean(g n)``
times weight over deviation (Ioffe and Szegedy 2015, section 3). Sums are float32 and added in a fixed order. Importing
this file needs Triton; ``fa_stereo.models.layers`` uses it where it works.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from fa_stereo.models.memory_format import channels_last_format

_TILE = 4096  # values a program reads at once
_PROGRAMS = 512  # that share the rows of a sum, at most


class TritonBatchNorm(torch.autograd.Function):
    """What ``F.batch_norm`` computes in training, for inputs whose channels are a power of two."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, running_mean: Tensor, running_var: Tensor, momentum: float,
        eps: float,
    ) -> Tensor:  # fmt: skip
        """Normalise by the statistics of the batch, and move the running ones.

        Args:
            ctx: For the backward pass.
            x: [B, C, ...], dense and in channels_last memory; float32, bfloat16 or float16.
            weight: float32 [C].
            bias: float32 [C].
            running_mean: float32 [C], changed.
            running_var: float32 [C], changed.
            momentum: The batch's share of the new running statistics.
            eps: Added to the variance.

        Returns:
            Of the shape, type and memory order of ``x``.
        """
        out = torch.empty_like(x)
        channels, rows = x.shape[1], x.numel() // x.shape[1]
        statistics = torch.empty(2, channels, dtype=torch.float32, device=x.device)  # mean, 1 / deviation
        programs, tile, each = _share(rows, channels)
        sums = torch.empty(programs, 2, channels, dtype=torch.float32, device=x.device)
        options = {"CHANNELS": channels, "TILE": tile}
        with torch.cuda.device_of(x):  # type: ignore[no-untyped-call]
            _sums[programs,](sums, statistics, x, rows, each, **options)
            _statistics[channels,](
                statistics, running_mean, running_var, sums, rows, programs, momentum, eps,
                CHANNELS=channels, PROGRAMS=triton.next_power_of_2(programs),
            )  # fmt: skip
            _normalize[triton.cdiv(rows, tile),](out, x, statistics, weight, bias, rows, **options)
        ctx.save_for_backward(x, weight, statistics)
        return out

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, grad: Tensor) -> Any:
        """Return the gradients of input, weight and bias."""
        x, weight, statistics = ctx.saved_tensors
        grad = grad.contiguous(memory_format=channels_last_format(x))
        channels, rows = x.shape[1], x.numel() // x.shape[1]
        programs, tile, each = _share(rows, channels)
        sums = torch.empty(programs, 2, channels, dtype=torch.float32, device=x.device)
        totals = torch.empty(2, channels, dtype=torch.float32, device=x.device)  # of g and of g n
        x_grad = torch.empty_like(x)
        options = {"CHANNELS": channels, "TILE": tile}
        with torch.cuda.device_of(x):  # type: ignore[no-untyped-call]
            _sums_backward[programs,](sums, grad, x, statistics, rows, each, **options)
            _totals[channels,](totals, sums, programs, CHANNELS=channels, PROGRAMS=triton.next_power_of_2(programs))
            _normalize_backward[triton.cdiv(rows, tile),](x_grad, grad, x, statistics, weight, totals, rows, **options)
        return x_grad, totals[1], totals[0], None, None, None, None


def _share(rows: int, channels: int) -> tuple[int, int, int]:
    """Return the programs that add up rows, the rows a program reads at once, and all that it reads."""
    tile = _TILE // channels
    tiles = triton.cdiv(rows, tile)
    each = triton.cdiv(tiles, min(tiles, _PROGRAMS)) * tile
    return triton.cdiv(rows, each), tile, each


@triton.jit  # type: ignore[untyped-decorator]
def _sums(sums, statistics, x, rows, each, CHANNELS: tl.constexpr, TILE: tl.constexpr):  # type: ignore[no-untyped-def]
    """Write, for a program's rows, the sums of x and x^2 [C], after the mean of the map's first 16 rows was taken off.

    So that values far from zero lose no digits: what is left is about as large as the deviation. What was taken off is
    written in place of the mean.
    """
    c = tl.arange(0, CHANNELS)
    early = tl.arange(0, 16)[:, None]
    sample = tl.load(x + early * CHANNELS + c[None, :], mask=early < rows, other=0.0).to(tl.float32)
    origin = tl.sum(sample, 0) / tl.minimum(rows, 16)
    tl.store(statistics + c, origin)  # every program the same
    first = tl.program_id(0).to(tl.int64) * each
    linear = tl.zeros([TILE, CHANNELS], tl.float32)
    square = tl.zeros([TILE, CHANNELS], tl.float32)
    for start in range(0, each, TILE):
        row = first + start + tl.arange(0, TILE)[:, None]
        inside = row < rows
        value = tl.load(x + row * CHANNELS + c[None, :], mask=inside, other=0.0).to(tl.float32)
        value = tl.where(inside, value - origin[None, :], 0.0)
        linear += value
        square += value * value
    place = sums + tl.program_id(0) * 2 * CHANNELS + c
    tl.store(place, tl.sum(linear, 0))
    tl.store(place + CHANNELS, tl.sum(square, 0))


@triton.jit  # type: ignore[untyped-decorator]
def _statistics(  # type: ignore[no-untyped-def]
    statistics, running_mean, running_var, sums, rows, programs, momentum, eps,
    CHANNELS: tl.constexpr, PROGRAMS: tl.constexpr,
):  # fmt: skip
    """Write mean and 1 / deviation of one channel, and move its running statistics."""
    c = tl.program_id(0)
    program = tl.arange(0, PROGRAMS)
    place = sums + program * 2 * CHANNELS + c
    linear = tl.sum(tl.load(place, mask=program < programs, other=0.0)) / rows
    square = tl.sum(tl.load(place + CHANNELS, mask=program < programs, other=0.0)) / rows
    mean = linear + tl.load(statistics + c)
    variance = tl.maximum(square - linear * linear, 0.0, propagate_nan=tl.PropagateNan.ALL)
    tl.store(statistics + c, mean)
    tl.store(statistics + CHANNELS + c, 1.0 / tl.sqrt(variance + eps))
    before = tl.load(running_mean + c)
    tl.store(running_mean + c, before + momentum * (mean - before))
    before = tl.load(running_var + c)
    tl.store(running_var + c, before + momentum * (variance * (rows / (rows - 1.0)) - before))


@triton.jit  # type: ignore[untyped-decorator]
def _normalize(out, x, statistics, weight, bias, rows, CHANNELS: tl.constexpr, TILE: tl.constexpr):  # type: ignore[no-untyped-def]
    """Write ``n * weight + bias`` for some rows."""
    c = tl.arange(0, CHANNELS)[None, :]
    row = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)[:, None]
    inside = row < rows
    value = tl.load(x + row * CHANNELS + c, mask=inside, other=0.0).to(tl.float32)
    normalized = (value - tl.load(statistics + c)) * tl.load(statistics + CHANNELS + c)
    tl.store(out + row * CHANNELS + c, normalized * tl.load(weight + c) + tl.load(bias + c), mask=inside)


@triton.jit  # type: ignore[untyped-decorator]
def _sums_backward(  # type: ignore[no-untyped-def]
    sums, grad, x, statistics, rows, each, CHANNELS: tl.constexpr, TILE: tl.constexpr
):
    """Write, for a program's rows, the sums of g and g n [C]."""
    c = tl.arange(0, CHANNELS)
    mean, inverse = tl.load(statistics + c)[None, :], tl.load(statistics + CHANNELS + c)
    first = tl.program_id(0).to(tl.int64) * each
    plain = tl.zeros([TILE, CHANNELS], tl.float32)
    product = tl.zeros([TILE, CHANNELS], tl.float32)
    for start in range(0, each, TILE):
        row = first + start + tl.arange(0, TILE)[:, None]
        inside = row < rows
        g = tl.load(grad + row * CHANNELS + c[None, :], mask=inside, other=0.0).to(tl.float32)
        value = tl.load(x + row * CHANNELS + c[None, :], mask=inside, other=0.0).to(tl.float32)
        plain += g
        product += g * (value - mean)
    place = sums + tl.program_id(0) * 2 * CHANNELS + c
    tl.store(place, tl.sum(plain, 0))
    tl.store(place + CHANNELS, tl.sum(product, 0) * inverse)


@triton.jit  # type: ignore[untyped-decorator]
def _totals(totals, sums, programs, CHANNELS: tl.constexpr, PROGRAMS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Add up what the programs found for one channel."""
    c = tl.program_id(0)
    program = tl.arange(0, PROGRAMS)
    place = sums + program * 2 * CHANNELS + c
    tl.store(totals + c, tl.sum(tl.load(place, mask=program < programs, other=0.0)))
    tl.store(totals + CHANNELS + c, tl.sum(tl.load(place + CHANNELS, mask=program < programs, other=0.0)))


@triton.jit  # type: ignore[untyped-decorator]
def _normalize_backward(  # type: ignore[no-untyped-def]
    x_grad, grad, x, statistics, weight, totals, rows, CHANNELS: tl.constexpr, TILE: tl.constexpr
):
    """Write ``weight / deviation * (g - mean(g) - n mean(g n))`` for some rows."""
    c = tl.arange(0, CHANNELS)[None, :]
    row = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)[:, None]
    inside = row < rows
    inverse = tl.load(statistics + CHANNELS + c)
    g = tl.load(grad + row * CHANNELS + c, mask=inside, other=0.0).to(tl.float32)
    value = tl.load(x + row * CHANNELS + c, mask=inside, other=0.0).to(tl.float32)
    normalized = (value - tl.load(statistics + c)) * inverse
    centered = g - tl.load(totals + c) / rows - normalized * (tl.load(totals + CHANNELS + c) / rows)
    tl.store(x_grad + row * CHANNELS + c, tl.load(weight + c) * inverse * centered, mask=inside)
