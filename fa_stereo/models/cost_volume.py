"""Matching features of both views, side by side, for every disparity (PSMNet, section 3.3), and its first convolution.

The first 3-D convolution over the concatenated volume can be done without the volume. Write x for the column, d for the
disparity, and delta = x - d for the column of the right view that (x, d) looks at. A tap (a, b) of the kernel, a over
disparity and b over columns in {-1, 0, 1}, meets a non-zero entry iff ``0 <= d + a < D``, ``delta >= a - b`` and
``x + b < W``. Therefore:

- Left half. The volume does not depend on d where it is not masked, so the taps over a add up into 2-D kernels: one for
  the middle disparities and one for each end (d = 0 lacks a = -1, d = D - 1 lacks a = +1) wherever delta >= 2; and for
  each delta in {-2, -1, 0, 1} the sum over the surviving taps, needed on one column per disparity.
- Right half. ``right[x + b - (d + a)] = right[delta + j]`` with j = b - a in {-2..2}: a 3x5 convolution of the right
  features, again one for the middle and one for each end, read out sheared by d. The last column lacks b = +1.

What is left per disparity is one addition of two maps. On a GPU one kernel does them all (``cost_volume_triton``).
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from fa_stereo.models.triton_support import Kernel, checked_kernel

_EDGE = (-2, -1, 0, 1)
"""Values of delta = x - d at which some but not all taps of the left half survive."""


def build_cost_volume(left: Tensor, right: Tensor, disparities: int) -> Tensor:
    """Concatenate left features with right features shifted by each disparity.

    ``volume[:, :C, d, y, x] = left[:, :, y, x]`` and ``volume[:, C:, d, y, x] = right[:, :, y, x - d]`` where
    ``x >= d``; both are zero where ``x < d``.

    Args:
        left: [B, C, H, W].
        right: [B, C, H, W].
        disparities: D, in cells of this resolution.

    Returns:
        [B, 2C, D, H, W].
    """
    batch, channels, height, width = left.shape
    volume = left.new_zeros(batch, 2 * channels, disparities, height, width)
    for d in range(min(disparities, width)):
        volume[:, :channels, d, :, d:] = left[..., d:]
        volume[:, channels:, d, :, d:] = right[..., : width - d]
    return volume


def gather_cost_volume(left: Tensor, right: Tensor, disparities: int) -> Tensor:
    """Build the same volume by indices and a mask: three operations instead of one for each disparity, for exporters.

    Arguments and result are those of ``build_cost_volume``.
    """
    batch, channels, height, width = left.shape
    column = torch.arange(width, device=left.device) - torch.arange(disparities, device=left.device)[:, None]  # [D, W]
    shifted = right.index_select(3, column.clamp(min=0).flatten())  # [B, C, H, D W]
    shifted = shifted.view(batch, channels, height, disparities, width).transpose(2, 3)  # [B, C, D, H, W]
    seen = (column >= 0).to(left.dtype)[:, None]  # [D, 1, W]
    return torch.cat([left[:, :, None] * seen, shifted * seen], dim=1)


def convolve_cost_volume_reference(
    left: Tensor, right: Tensor, weight: Tensor, disparities: int, bias: Tensor | None = None
) -> Tensor:
    """Build the volume, then convolve it: what ``convolve_cost_volume`` computes, written plainly."""
    return F.conv3d(build_cost_volume(left, right, disparities), weight, bias, padding=1)


def convolve_cost_volume(
    left: Tensor, right: Tensor, weight: Tensor, disparities: int, bias: Tensor | None = None
) -> Tensor:
    """Convolve the cost volume without building it; the same function as ``convolve_cost_volume_reference``.

    Args:
        left: Features [B, C, H, W].
        right: Features [B, C, H, W].
        weight: Kernel [O, 2C, 3, 3, 3] over (disparity, row, column); stride 1, padding 1.
        disparities: D >= 2, in cells of this resolution.
        bias: [O] or None.

    Returns:
        [B, O, D, H, W], in channels_last_3d memory.

    Raises:
        ValueError: ``disparities`` is below 2.
    """
    if disparities < 2:  # the first and the last disparity would be one, and lack taps at both ends
        raise ValueError(f"disparities must be at least 2, got {disparities}")
    channels, width = left.shape[1], left.shape[3]
    taps = weight.to(torch.promote_types(weight.dtype, torch.float32))  # sums are rounded once, as kernels
    left_taps, right_taps = taps[:, :channels], taps[:, channels:]  # [O, C, a, row, b]
    # The surviving a at d = 0, in the middle, and at d = D - 1: one group of O output channels each.
    ends = ((0, 1), (-1, 0, 1), (-1, 0))

    # Left half where delta >= 2.
    kernels = torch.cat([_left_kernel(left_taps, end, delta=2) for end in ends])  # [3 O, C, 3, 3]
    biases = None if bias is None else bias.repeat(3)
    full = F.conv2d(left, kernels.to(weight.dtype), biases, padding=1)  # [B, 3 O, H, W]

    # Left half where delta is in _EDGE: column x = d + delta, so the first D + 1 columns are enough.
    kernels = torch.cat([_left_kernel(left_taps, end, delta) for end in ends for delta in _EDGE])  # [12 O, C, 3, 3]
    columns = min(disparities + 1, width)
    biases = None if bias is None else bias.repeat(12)
    edge = F.conv2d(left[..., : columns + 1], kernels.to(weight.dtype), biases, padding=1)
    edge = edge[..., :columns]  # [B, 12 O, H, columns]

    # Right half: entry i of the last dimension is delta = i - 2.
    kernels = torch.cat([_right_kernel(right_taps, end, (-1, 0, 1)) for end in ends])  # [3 O, C, 3, 5]
    padded = F.pad(right, (2, 0))
    sheared = F.conv2d(padded, kernels.to(weight.dtype), padding=(1, 2))  # [B, 3 O, H, W + 2]

    # Right half at x = W - 1: delta = W - 1 - d, so the last D entries are enough (and the kernel's reach).
    kernels = torch.cat([_right_kernel(right_taps, end, (-1, 0)) for end in ends])
    columns = min(disparities, width + 2)
    last = F.conv2d(padded[..., -(columns + 2) :], kernels.to(weight.dtype), padding=(1, 2))
    last = last[..., -columns:]  # [B, 3 O, H, columns]

    assemble: Kernel = _Assemble.apply
    if full.is_cuda and full.dtype != torch.float64 and not (bias is not None and _needs_gradient(bias)):
        assemble = _triton_assemble(full.device, full.dtype) or assemble
    volume: Tensor = assemble(full, edge, sheared, last, bias, disparities)
    return volume


def _needs_gradient(x: Tensor) -> bool:
    """Tell whether what is computed from ``x`` now will be differentiated."""
    return x.requires_grad and torch.is_grad_enabled()


@cache
def _triton_assemble(device: torch.device, dtype: torch.dtype) -> Kernel | None:
    """Return the fused kernel if Triton is there and compiles it for this GPU and type, else None."""

    def load() -> Kernel:
        from fa_stereo.models.cost_volume_triton import TritonAssemble

        sizes = ((3, 1), (12, 1), (3, 3), (3, 3))  # channels and columns, of one pixel and four disparities
        parts = [torch.ones(1, n, 1, m, device=device, dtype=dtype).requires_grad_() for n, m in sizes]
        volume = TritonAssemble.apply(*parts, None, 4)  # 1 + 1 at d = 0 to 2; at d = 3 nothing is left, or the bias
        uses = [int(gradient.sum()) for gradient in torch.autograd.grad(volume.sum(), parts)]
        with torch.no_grad():
            biased = TritonAssemble.apply(*parts, torch.full((1,), 3.0, device=device, dtype=dtype), 4)
        values = volume.flatten().tolist(), biased.flatten().tolist(), uses
        if values != ([2, 2, 2, 0], [2, 2, 2, 3], [0, 3, 0, 3]):
            raise RuntimeError(f"sums of 1 and 1 came out as {values}")
        apply: Kernel = TritonAssemble.apply
        return apply

    return checked_kernel(load, "the cost volume")


def _left_kernel(taps: Tensor, end: tuple[int, ...], delta: int) -> Tensor:
    """Sum taps [O, C, a, row, b] over the a of ``end`` with a - b <= delta: [O, C, row, b]."""
    columns = [_sum_of_taps(taps, [(a, b) for a in end if a - b <= delta]) for b in (-1, 0, 1)]
    return torch.stack(columns, dim=-1)


def _right_kernel(taps: Tensor, end: tuple[int, ...], columns: tuple[int, ...]) -> Tensor:
    """Collect taps [O, C, a, row, b], a in ``end`` and b in ``columns``, by j = b - a: [O, C, row, j]."""
    kernels = [_sum_of_taps(taps, [(a, a + j) for a in end if a + j in columns]) for j in (-2, -1, 0, 1, 2)]
    return torch.stack(kernels, dim=-1)


def _sum_of_taps(taps: Tensor, offsets: list[tuple[int, int]]) -> Tensor:
    """Add up taps [O, C, a, row, b] at offsets (a, b): [O, C, row]; zeros without any."""
    terms = [taps[:, :, a + 1, :, b + 1] for a, b in offsets]
    return sum(terms[1:], terms[0]) if terms else torch.zeros_like(taps[:, :, 0, :, 0])


class _Assemble(torch.autograd.Function):
    """Add the parts of ``convolve_cost_volume`` up, disparity by disparity."""

    @staticmethod
    def forward(
        ctx: Any, full: Tensor, edge: Tensor, sheared: Tensor, last: Tensor, bias: Tensor | None, disparities: int
    ) -> Tensor:
        batch, channels, height, width = full.shape
        channels //= 3
        ctx.shapes = full.shape, edge.shape, sheared.shape, last.shape, channels
        ctx.has_bias = bias is not None
        out = full.new_empty(batch, disparities, height, width, channels).permute(0, 4, 1, 2, 3)
        for d in range(disparities):
            group = _group(d, disparities, channels)
            row = out[:, :, d]  # [B, O, H, W]
            masked = min(max(d - 2, 0), width)  # nothing but the bias where delta < -2
            row[..., :masked] = 0 if bias is None else bias[:, None, None]
            if d > width + 1:
                continue  # delta < -2 in the last column too
            at_end = last[:, group, :, last.shape[3] - 1 - d]  # the right half where x = W - 1
            if d + 2 < width:
                inner = slice(d + 2, width - 1)
                torch.add(full[:, group, :, inner], sheared[:, group, :, 4 : width + 1 - d], out=row[..., inner])
                torch.add(full[:, group, :, -1], at_end, out=row[..., -1])
            for index, delta in enumerate(_EDGE):
                x = d + delta
                if 0 <= x < width:
                    right = at_end if x == width - 1 else sheared[:, group, :, delta + 2]
                    torch.add(edge[:, _edge_group(group, index), :, x], right, out=row[..., x])
        return out

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, grad: Tensor) -> Any:
        *shapes, channels = ctx.shapes
        disparities, width = grad.shape[2], grad.shape[4]
        accumulate = torch.promote_types(grad.dtype, torch.float32)
        full, edge, sheared, last = (
            torch.zeros(shape, dtype=accumulate, device=grad.device).contiguous(memory_format=torch.channels_last)
            for shape in shapes
        )
        bias = torch.zeros(channels, dtype=accumulate, device=grad.device) if ctx.has_bias else None
        for d in range(disparities):
            group = _group(d, disparities, channels)
            row = grad[:, :, d]
            if bias is not None:
                bias += row[..., : min(max(d - 2, 0), width)].sum((0, 2, 3))
            if d + 2 < width:
                full[:, group, :, d + 2 :] += row[..., d + 2 :]
            start = max(d - 2, 0)  # every column with delta >= -2, but the last column reads another kernel
            if start < width - 1:
                sheared[:, group, :, start - d + 2 : width + 1 - d] += row[..., start : width - 1]
            for index, delta in enumerate(_EDGE):
                if 0 <= d + delta < width:
                    edge[:, _edge_group(group, index), :, d + delta] += row[..., d + delta]
            if width + 1 - d >= 0:
                last[:, group, :, last.shape[3] - 1 - d] += row[..., -1]
        gradients = [None if g is None else g.to(grad.dtype) for g in (full, edge, sheared, last, bias)]
        return (*gradients, None)


def _group(d: int, disparities: int, channels: int) -> slice:
    """Return the output channels of disparity d: those of the first, the middle or the last."""
    end = 0 if d == 0 else 2 if d == disparities - 1 else 1
    return slice(end * channels, (end + 1) * channels)


def _edge_group(group: slice, index: int) -> slice:
    channels = group.stop - group.start
    start = group.start * len(_EDGE) + index * channels
    return slice(start, start + channels)
