"""Disparity regression as one GPU kernel each way: nothing of full resolution is stored but disparity and one more map.

The forward kernel walks along disparity at every pixel with a running maximum (online softmax); the disparities between
two coarse ones share the eight neighbouring scores that they are interpolated from. The backward kernel computes the
probabilities again from the stored log-sum-exp; each of its programs gathers what belongs to one coarse row and a block
of columns, so that no two write to the same place and the result does not depend on their order. The modal regression
has a forward kernel alone, as it is for prediction: it finds the largest score, then walks once more with the last
three groups of four disparities at hand. Importing this file needs Triton; ``regression`` uses it where it works.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

_BLOCK_COLUMNS = 128


class TritonRegression(torch.autograd.Function):
    """``regress_disparity`` for float32 scores [B, D/4, H/4, W/4]; takes the three interpolation matrices."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, depth_matrix: Tensor, row_matrix: Tensor, column_matrix: Tensor) -> Tensor:
        """Return disparity [B, H, W]; matrices are [D, D/4], [H, H/4] and [W, W/4], linear interpolation each."""
        logits = logits.contiguous()
        batch, depths, rows, columns = logits.shape
        height, width = row_matrix.shape[0], column_matrix.shape[0]
        taps = [_groups(depth_matrix), _taps(row_matrix), _taps(column_matrix)]
        disparity = logits.new_empty(batch, height, width)
        log_sum = torch.empty_like(disparity)
        grid = (triton.cdiv(width, _BLOCK_COLUMNS), height, batch)
        with torch.cuda.device_of(logits):  # type: ignore[no-untyped-call]
            _regress[grid](
                logits, disparity, log_sum, *taps[0], *taps[1], *taps[2],
                depths, rows, columns, height, width, BLOCK=_BLOCK_COLUMNS,
            )  # fmt: skip
        ctx.save_for_backward(logits, disparity, log_sum, depth_matrix, row_matrix, column_matrix)
        return disparity

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, grad: Tensor) -> Any:
        """Return the gradient of the scores."""
        logits, disparity, log_sum, depth_matrix, row_matrix, column_matrix = ctx.saved_tensors
        batch, depths, rows, columns = logits.shape
        height, width = disparity.shape[1:]
        taps = [_groups(depth_matrix), _taps(row_matrix), _taps(column_matrix)]
        grad_columns = logits.new_empty(batch, depths, rows, width)
        grid = (triton.cdiv(width, _BLOCK_COLUMNS), rows, batch)
        with torch.cuda.device_of(logits):  # type: ignore[no-untyped-call]
            _regress_backward[grid](
                logits, disparity, log_sum, grad.contiguous(), grad_columns, *taps[0], *taps[1], *taps[2],
                *_readers(row_matrix),
                depths, rows, columns, height, width, BLOCK=_BLOCK_COLUMNS,
            )  # fmt: skip
        with torch.autocast(logits.device.type, enabled=False):
            return grad_columns @ column_matrix, None, None, None  # [B, D/4, H/4, W] -> [B, D/4, H/4, W/4]


def regress_modal(
    logits: Tensor, depth_matrix: Tensor, row_matrix: Tensor, column_matrix: Tensor
) -> tuple[Tensor, Tensor]:
    """Return disparity in pixels and confidence, [B, H, W] each, as ``regress_modal_disparity`` does; no gradient.

    Args:
        logits: Scores [B, D/4, H/4, W/4], float32.
        depth_matrix: Linear interpolation [D, D/4].
        row_matrix: Likewise [H, H/4].
        column_matrix: Likewise [W, W/4].
    """
    logits = logits.contiguous()
    batch, depths, rows, columns = logits.shape
    disparities, height, width = depth_matrix.shape[0], row_matrix.shape[0], column_matrix.shape[0]
    disparity, confidence = (logits.new_empty(batch, height, width) for _ in range(2))
    grid = (triton.cdiv(width, _BLOCK_COLUMNS), height, batch)
    with torch.cuda.device_of(logits):  # type: ignore[no-untyped-call]
        _regress_modal[grid](
            logits, disparity, confidence, *_groups(depth_matrix), *_taps(row_matrix), *_taps(column_matrix),
            depths, rows, columns, height, width, disparities,
            max(3, (disparities + 5) // 4),  # groups, as regression._group_margins makes them
            BLOCK=_BLOCK_COLUMNS,
        )  # fmt: skip
    return disparity, confidence


def _taps(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Return, for each row of an interpolation matrix [fine, coarse], the first coarse index and the second's weight.

    The second coarse index is the next one, or the same at the end, where its weight is 0.
    """
    first = (matrix != 0).int().argmax(1)
    weight = 1 - matrix.gather(1, first[:, None]).squeeze(1)
    return first.int(), weight.contiguous()


def _groups(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Return where those of the fine indices begin whose first tap is each coarse index, and the second taps' weights.

    The first has one entry more than there are coarse indices: where the last one's end.
    """
    first, weight = _taps(matrix)
    coarse = torch.arange(matrix.shape[1] + 1, dtype=torch.int32, device=matrix.device)
    return torch.searchsorted(first, coarse).int(), weight


def _readers(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Return, for each coarse index of [fine, coarse], the first fine index that reads it, and one past the last."""
    reads = (matrix != 0).int()
    return reads.argmax(0).int(), (matrix.shape[0] - reads.flip(0).argmax(0)).int()


@triton.jit  # type: ignore[untyped-decorator]
def _column(plane, index, x0, x1, wx, mask, rows_y0, rows_y1, wy, plane_stride):  # type: ignore[no-untyped-def]
    """Return scores of one coarse disparity, interpolated to a block of pixels of one row."""
    base = plane + index * plane_stride
    top = tl.load(base + rows_y0 + x0, mask=mask, other=0.0)
    top += wx * (tl.load(base + rows_y0 + x1, mask=mask, other=0.0) - top)
    bottom = tl.load(base + rows_y1 + x0, mask=mask, other=0.0)
    bottom += wx * (tl.load(base + rows_y1 + x1, mask=mask, other=0.0) - bottom)
    return top + wy * (bottom - top)


@triton.jit  # type: ignore[untyped-decorator]
def _pixels(  # type: ignore[no-untyped-def]
    logits, row_first, row_weight, column_first, column_weight, depths, rows, columns, width, BLOCK: tl.constexpr
):  # fmt: skip
    """Return where a block of columns of one row of one sample is, what it reads with which weights, and its scores."""
    x = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    y = tl.program_id(1)
    sample = tl.program_id(2).to(tl.int64)
    mask = x < width
    x0 = tl.load(column_first + x, mask=mask, other=0)
    wx = tl.load(column_weight + x, mask=mask, other=0.0)
    x1 = tl.minimum(x0 + 1, columns - 1)
    y0 = tl.load(row_first + y)
    wy = tl.load(row_weight + y)
    y1 = tl.minimum(y0 + 1, rows - 1)
    plane = logits + sample * depths * rows * columns
    return x, y, sample, mask, x0, x1, wx, y0, y1, wy, plane


@triton.jit  # type: ignore[untyped-decorator]
def _regress(  # type: ignore[no-untyped-def]
    logits, disparity, log_sum,
    depth_begin, depth_weight, row_first, row_weight, column_first, column_weight,
    depths, rows, columns, height, width, BLOCK: tl.constexpr,
):  # fmt: skip
    """Write disparity and log-sum-exp of a block of columns of one row of one sample."""
    x, y, sample, mask, x0, x1, wx, y0, y1, wy, plane = _pixels(
        logits, row_first, row_weight, column_first, column_weight, depths, rows, columns, width, BLOCK
    )
    plane_stride = rows * columns

    largest = tl.full([BLOCK], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    moment = tl.zeros([BLOCK], tl.float32)
    near = _column(plane, 0, x0, x1, wx, mask, y0 * columns, y1 * columns, wy, plane_stride)
    for index in range(depths):
        following = tl.minimum(index + 1, depths - 1)
        far = _column(plane, following, x0, x1, wx, mask, y0 * columns, y1 * columns, wy, plane_stride)
        for d in range(tl.load(depth_begin + index), tl.load(depth_begin + index + 1)):
            score = near + tl.load(depth_weight + d) * (far - near)
            new_largest = tl.maximum(largest, score)
            shrink = tl.exp(largest - new_largest)
            weight = tl.exp(score - new_largest)
            total = total * shrink + weight
            moment = moment * shrink + weight * d
            largest = new_largest
        near = far
    out = (sample * height + y) * width + x
    tl.store(disparity + out, moment / total, mask=mask)
    tl.store(log_sum + out, largest + tl.log(total), mask=mask)


@triton.jit  # type: ignore[untyped-decorator]
def _add_window(  # type: ignore[no-untyped-def]
    mass0, mass1, mass2, moment0, moment1, moment2, middle, weights, weighted, greatest
):  # fmt: skip
    """Add a window of three groups, weighted by the 8th power of its mass; moments are about the groups' middles."""
    window = mass0 + mass1 + mass2
    moment = moment0 + moment1 + moment2 + 4.0 * (mass2 - mass0) + middle * window
    cube = window * window * window
    power = cube * cube * window
    return weights + power * window, weighted + power * moment, tl.maximum(greatest, window)


@triton.jit  # type: ignore[untyped-decorator]
def _regress_modal(  # type: ignore[no-untyped-def]
    logits, disparity, confidence,
    depth_begin, depth_weight, row_first, row_weight, column_first, column_weight,
    depths, rows, columns, height, width, disparities, groups, BLOCK: tl.constexpr,
):  # fmt: skip
    """Write disparity and confidence of a block of columns of one row of one sample."""
    x, y, sample, mask, x0, x1, wx, y0, y1, wy, plane = _pixels(
        logits, row_first, row_weight, column_first, column_weight, depths, rows, columns, width, BLOCK
    )
    plane_stride = rows * columns

    largest = tl.full([BLOCK], float("-inf"), tl.float32)
    near = _column(plane, 0, x0, x1, wx, mask, y0 * columns, y1 * columns, wy, plane_stride)
    for index in range(depths):
        following = tl.minimum(index + 1, depths - 1)
        far = _column(plane, following, x0, x1, wx, mask, y0 * columns, y1 * columns, wy, plane_stride)
        for d in range(tl.load(depth_begin + index), tl.load(depth_begin + index + 1)):
            largest = tl.maximum(largest, near + tl.load(depth_weight + d) * (far - near))
        near = far

    # Group g is the disparities 4 g - 2 to 4 g + 1: the one being summed (2), and the two before it.
    total = tl.zeros([BLOCK], tl.float32)
    mass0, mass1, mass2 = total, total, total
    moment0, moment1, moment2 = total, total, total
    weights, weighted, greatest = total, total, total
    near = _column(plane, 0, x0, x1, wx, mask, y0 * columns, y1 * columns, wy, plane_stride)
    for index in range(depths):
        following = tl.minimum(index + 1, depths - 1)
        far = _column(plane, following, x0, x1, wx, mask, y0 * columns, y1 * columns, wy, plane_stride)
        for d in range(tl.load(depth_begin + index), tl.load(depth_begin + index + 1)):
            place = (d + 2) % 4
            if place == 0:
                if d >= 10:
                    weights, weighted, greatest = _add_window(
                        mass0, mass1, mass2, moment0, moment1, moment2, d - 6.5, weights, weighted, greatest
                    )
                mass0, mass1, mass2 = mass1, mass2, tl.zeros([BLOCK], tl.float32)
                moment0, moment1, moment2 = moment1, moment2, tl.zeros([BLOCK], tl.float32)
            exponential = tl.exp(near + tl.load(depth_weight + d) * (far - near) - largest)
            total += exponential
            mass2 += exponential
            moment2 += exponential * (place - 1.5)
        near = far
    for group in range((disparities + 1) // 4, groups):  # the last of all, and empty ones where there are not three
        if group >= 2:
            weights, weighted, greatest = _add_window(
                mass0, mass1, mass2, moment0, moment1, moment2, 4 * group - 4.5, weights, weighted, greatest
            )
        mass0, mass1, mass2 = mass1, mass2, tl.zeros([BLOCK], tl.float32)
        moment0, moment1, moment2 = moment1, moment2, tl.zeros([BLOCK], tl.float32)
    out = (sample * height + y) * width + x
    tl.store(disparity + out, weighted / weights, mask=mask)
    share = greatest / total
    tl.store(confidence + out, tl.where(share > 1.0, 1.0, share), mask=mask)  # not a number is passed on


@triton.jit  # type: ignore[untyped-decorator]
def _regress_backward(  # type: ignore[no-untyped-def]
    logits, disparity, log_sum, grad, grad_columns,
    depth_begin, depth_weight, row_first, row_weight, column_first, column_weight, row_begin, row_end,
    depths, rows, columns, height, width, BLOCK: tl.constexpr,
):  # fmt: skip
    """Write the gradient of scores interpolated along columns only, [B, D/4, H/4, W], for one coarse row."""
    x = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    row = tl.program_id(1)
    sample = tl.program_id(2).to(tl.int64)
    mask = x < width
    x0 = tl.load(column_first + x, mask=mask, other=0)
    wx = tl.load(column_weight + x, mask=mask, other=0.0)
    x1 = tl.minimum(x0 + 1, columns - 1)
    plane_stride = rows * columns
    plane = logits + sample * depths * plane_stride
    y_begin = tl.load(row_begin + row)
    y_end = tl.load(row_end + row)

    carried = tl.zeros([BLOCK], tl.float32)  # what the disparities before this coarse one give to it
    for index in range(depths):
        following = tl.minimum(index + 1, depths - 1)
        d_begin = tl.load(depth_begin + index)
        d_end = tl.load(depth_begin + index + 1)
        gathered = carried
        carried = tl.zeros([BLOCK], tl.float32)
        for y in range(y_begin, y_end):
            y0 = tl.load(row_first + y)
            wy = tl.load(row_weight + y)
            y1 = tl.minimum(y0 + 1, rows - 1)
            row_share = tl.where(y0 == row, 1.0 - wy, 0.0) + tl.where((y1 == row) & (y1 != y0), wy, 0.0)
            pixel = (sample * height + y) * width + x
            expected = tl.load(disparity + pixel, mask=mask, other=0.0)
            normalizer = tl.load(log_sum + pixel, mask=mask, other=0.0)
            upstream = row_share * tl.load(grad + pixel, mask=mask, other=0.0)
            near = _column(plane, index, x0, x1, wx, mask, y0 * columns, y1 * columns, wy, plane_stride)
            far = _column(plane, following, x0, x1, wx, mask, y0 * columns, y1 * columns, wy, plane_stride)
            for d in range(d_begin, d_end):
                wz = tl.load(depth_weight + d)
                probability = tl.exp(near + wz * (far - near) - normalizer)
                share = upstream * probability * (d - expected)
                gathered += (1.0 - wz) * share
                carried += wz * share
        out = ((sample * depths + index) * rows + row) * width + x
        tl.store(grad_columns + out, gathered, mask=mask)
