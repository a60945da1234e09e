"""From quarter-resolution scores to disparity in pixels (PSMNet, eq. 3).

The upsampled score volume [B, D, H, W] need not exist at once. Trilinear upsampling is linear and separable: columns
are interpolated first, at low disparity resolution; then, a band of rows at a time, rows are interpolated, and what is
left of each pixel is a column of D/4 scores, from which ``_AnyDepths`` or ``_QuarterDepths`` compute softmax and
expectation over D. The backward pass computes the band again: with ``p`` the softmax and ``disparity = sum_d d p_d``,
the gradient of a score is ``p_d (d - disparity)``.

The expectation of two surfaces lies between them, where there is neither: at edges, and where a match is ambiguous. For
prediction there is the modal regression besides, which takes the expectation around the most probable disparity (after
the dominant-modal estimator of Xu et al., CVPR 2024, in a form that is smooth in the scores).
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from fa_stereo.models.triton_support import Kernel, checked_kernel

_BAND_ELEMENTS = {"cpu": 1 << 17, "cuda": 1 << 24}
"""Scores [b, D/4, W] in one band; on the CPU for each thread: few enough for a cache, enough to be worth a call."""

_GREATEST_SPAN = 140.0
"""How far apart the scores of a pixel may lie for float32 to hold exp(±span / 2) and what is made of it."""


def regress_disparity_reference(
    logits: Tensor, max_disparity: int, height: int, width: int, *, align_corners: bool
) -> Tensor:
    """Upsample all scores, then softmax and expectation: what ``regress_disparity`` computes, written plainly."""
    _, moments = _probabilities(logits, max_disparity, height, width, align_corners)
    return moments.sum(1)


def regress_modal_disparity_reference(
    logits: Tensor, max_disparity: int, height: int, width: int, *, align_corners: bool
) -> tuple[Tensor, Tensor]:
    """Upsample all scores, then softmax and windows: what ``regress_modal_disparity`` computes, written plainly."""
    before, after = _group_margins(max_disparity)
    group, group_moment = (
        F.pad(summands, (0, 0, 0, 0, before, after)).view(len(logits), -1, 4, height, width).sum(2)  # [B, G, H, W]
        for summands in _probabilities(logits, max_disparity, height, width, align_corners)
    )
    window, moment = (x[:, :-2] + x[:, 1:-1] + x[:, 2:] for x in (group, group_moment))  # [B, G - 2, H, W]
    largest = window.amax(1)
    weights = (window / largest.unsqueeze(1)) ** 7
    return (weights * moment).sum(1) / (weights * window).sum(1), largest.clamp(max=1)


def _probabilities(
    logits: Tensor, max_disparity: int, height: int, width: int, align_corners: bool
) -> tuple[Tensor, Tensor]:
    """Return the softmax p_d of the upsampled scores, and d p_d: [B, D, H, W] each."""
    scores = F.interpolate(
        at_least_float32(logits).unsqueeze(1),
        (max_disparity, height, width),
        mode="trilinear",
        align_corners=align_corners,
    ).squeeze(1)  # [B, D, H, W]
    probabilities = torch.softmax(scores, dim=1)
    values = torch.arange(max_disparity, device=logits.device, dtype=probabilities.dtype)
    return probabilities, probabilities * values[:, None, None]


def regress_disparity(logits: Tensor, max_disparity: int, height: int, width: int, *, align_corners: bool) -> Tensor:
    """Upsample scores to full resolution, take the softmax over disparity and its expectation.

    ``disparity[y, x] = sum_d d softmax_d(upsampled[d, y, x])``; higher scores mean better matches. The same function
    as ``regress_disparity_reference``, without the volume, but for its second derivative: there is none.

    Args:
        logits: Scores [B, D/4, H/4, W/4].
        max_disparity: D, in pixels.
        height: H, in pixels.
        width: W, in pixels.
        align_corners: Convention of the trilinear upsampling; it belongs to the weights.

    Returns:
        Disparity in pixels, float32 (float64 for float64 logits) [B, H, W].
    """
    with torch.autocast(logits.device.type, enabled=False):
        logits = at_least_float32(logits)
        kernel = _triton_regression(logits.device) if logits.is_cuda and logits.dtype == torch.float32 else None
        if kernel is not None:
            sizes = zip(logits.shape[1:], (max_disparity, height, width), strict=True)
            matrices = [interpolation_matrix(*size, logits, align_corners=align_corners) for size in sizes]
            disparity: Tensor = kernel(logits, *matrices)
        else:
            disparity = _Regression.apply(logits, max_disparity, height, width, align_corners)
    return disparity


def regress_modal_disparity(
    logits: Tensor, max_disparity: int, height: int, width: int, *, align_corners: bool
) -> tuple[Tensor, Tensor]:
    """Upsample scores to full resolution and take the expectation around the most probable disparity.

    Disparities 0 and 1, 2 to 5, 6 to 9, ... are a group each (four between two coarse scores), three neighbours of them
    a window. With the probability m_s and the expectation mu_s of window s, ``disparity = sum_s m_s^8 mu_s / sum_s
    m_s^8``: that of the window that holds most, or a mean of several that hold about as much. (Power 1 instead of 8
    would be PSMNet's expectation, but for the ends of the range.)

    For prediction: without the volume only where no gradient is asked for; otherwise it is
    ``regress_modal_disparity_reference``.

    Arguments are those of ``regress_disparity``.

    Returns:
        Disparity in pixels, and confidence, the largest probability of a window, from 0 to 1; both float32 (float64 for
        float64 logits) [B, H, W].
    """
    arguments = max_disparity, height, width
    with torch.autocast(logits.device.type, enabled=False):
        logits = at_least_float32(logits)
        if logits.requires_grad and torch.is_grad_enabled():
            return regress_modal_disparity_reference(logits, *arguments, align_corners=align_corners)
        kernel = _triton_modal_regression(logits.device) if logits.is_cuda and logits.dtype == torch.float32 else None
        if kernel is not None:
            sizes = zip(logits.shape[1:], arguments, strict=True)
            modal: tuple[Tensor, Tensor] = kernel(
                logits, *(interpolation_matrix(*size, logits, align_corners=align_corners) for size in sizes)
            )
            return modal
        bands = _Bands(logits, *arguments, align_corners)
        disparity, confidence = (logits.new_empty(logits.shape[0], height, width) for _ in range(2))
        for sample, rows in bands.positions():
            groups = bands.depths(sample, rows).groups(bands.scores(sample, rows))
            disparity[sample, rows], confidence[sample, rows] = _modal(*groups)
    return disparity, confidence


def _group_margins(max_disparity: int) -> tuple[int, int]:
    """Return how many disparities to add before 0 and after D - 1 for whole groups, three at least."""
    return 2, max(12, -(-(max_disparity + 2) // 4) * 4) - max_disparity - 2


def _modal(mass: Tensor, moment: Tensor) -> tuple[Tensor, Tensor]:
    """Return disparity and confidence [b, W].

    Args:
        mass: Of each group of disparities, in any unit: [b, G, W].
        moment: First moment of each group about its middle, 4 g - 1/2 for group g.
    """
    window = mass[:, :-2] + mass[:, 1:-1] + mass[:, 2:]  # [b, G - 2, W]
    offset = moment[:, :-2] + moment[:, 1:-1] + moment[:, 2:]
    offset.add_(mass[:, 2:] - mass[:, :-2], alpha=4).div_(window)  # of the window's expectation from its middle
    middles = torch.arange(window.shape[1], device=mass.device, dtype=mass.dtype)[:, None] * 4 + 3.5
    greatest = window.amax(1)
    # Clamped, as what its eighth power would be is nothing beside 1, but a denormal number, slow to compute with.
    weights = window.div_(greatest[:, None]).clamp_(min=1e-4)
    for _ in range(3):
        weights.mul_(weights)  # to the power of 8
    disparity = offset.add_(middles).mul_(weights).sum(1) / weights.sum(1)
    return disparity, (greatest / mass.sum(1)).clamp_(max=1)  # rounded, it can be more


@cache
def _triton_regression(device: torch.device) -> Kernel | None:
    """Return the fused kernel if Triton is there and compiles it for this GPU, else None."""

    def load() -> Kernel:
        from fa_stereo.models.regression_triton import TritonRegression

        matrix = torch.tensor([[1.0], [1.0]], device=device)
        logits = torch.zeros(1, 1, 1, 1, device=device, requires_grad=True)
        disparity = TritonRegression.apply(logits, matrix, matrix, matrix)  # 0 and 1 px, equally likely
        disparity.sum().backward()
        if not (disparity == 0.5).all():
            raise RuntimeError(f"the mean of 0 and 1 came out as {disparity.flatten()[0]:g}")
        apply: Kernel = TritonRegression.apply
        return apply

    return checked_kernel(load, "disparity regression")


@cache
def _triton_modal_regression(device: torch.device) -> Kernel | None:
    """Return the fused kernel of the modal regression likewise."""

    def load() -> Kernel:
        from fa_stereo.models.regression_triton import regress_modal

        matrix = torch.tensor([[1.0], [1.0]], device=device)
        disparity, confidence = regress_modal(torch.zeros(1, 1, 1, 1, device=device), matrix, matrix, matrix)
        found = disparity.flatten()[0], confidence.flatten()[0]
        if not (abs(found[0] - 0.5) < 1e-6 and found[1] == 1):
            raise RuntimeError("the mean of 0 and 1, with confidence 1, came out as {:g}, with {:g}".format(*found))
        return regress_modal

    return checked_kernel(load, "modal disparity regression")


def at_least_float32(x: Tensor) -> Tensor:
    """Return a tensor as float32, of float64 as it is."""
    return x if x.dtype == torch.float64 else x.float()


def interpolation_matrix(inputs: int, outputs: int, like: Tensor, *, align_corners: bool) -> Tensor:
    """Return linear interpolation from ``inputs`` to ``outputs`` samples as a matrix [outputs, inputs]."""
    identity = torch.eye(inputs, dtype=torch.float64, device=like.device)
    matrix = F.interpolate(identity[None], outputs, mode="linear", align_corners=align_corners)[0].T
    return matrix.to(like.dtype).contiguous()


class _Regression(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, max_disparity: int, height: int, width: int, align_corners: bool) -> Tensor:
        bands = _Bands(logits, max_disparity, height, width, align_corners)
        disparity = logits.new_empty(logits.shape[0], height, width)
        for sample, rows in bands.positions():
            disparity[sample, rows] = bands.depths(sample, rows).expectation(bands.scores(sample, rows))
        ctx.save_for_backward(logits, disparity)
        ctx.arguments = max_disparity, height, width, align_corners
        return disparity

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, grad: Tensor) -> Any:
        logits, disparity = ctx.saved_tensors
        with torch.autocast(logits.device.type, enabled=False):
            bands = _Bands(logits, *ctx.arguments)
            for sample, rows in bands.positions():
                depths = bands.depths(sample, rows)
                scores_grad = depths.gradient(bands.scores(sample, rows), disparity[sample, rows], grad[sample, rows])
                bands.scores_backward(sample, rows, scores_grad)
            return bands.logits_grad(), None, None, None, None


class _Bands:
    """The scores of every pixel at low disparity resolution, a band of rows of one sample at a time."""

    def __init__(self, logits: Tensor, max_disparity: int, height: int, width: int, align_corners: bool) -> None:
        batch, depths, rows, columns = logits.shape
        self.column_matrix = interpolation_matrix(columns, width, logits, align_corners=align_corners)  # [W, W/4]
        self.row_matrix = interpolation_matrix(rows, height, logits, align_corners=align_corners)  # [H, H/4]
        largest, smallest = logits.amax(1, keepdim=True), logits.amin(1, keepdim=True)
        # The softmax does not see what all scores of a pixel have in common: put them around zero.
        centered = (logits - (largest + smallest) / 2).transpose(1, 2)  # [B, H/4, D/4, W/4]
        self.columns = F.interpolate(centered.flatten(0, 1), width, mode="linear", align_corners=align_corners)
        self.columns = self.columns.view(batch, rows, depths, width)
        self.columns_grad: Tensor | None = None
        self.any_depths = _AnyDepths(depths, max_disparity, logits, align_corners=align_corners)
        self.quarter_depths: _QuarterDepths | None = None
        if logits.device.type == "cpu" and max_disparity == 4 * depths > 4 and not align_corners:
            self.quarter_depths = _QuarterDepths(depths, logits)
            self.narrow = ((largest - smallest).amax((1, 3)) <= _GREATEST_SPAN).tolist()  # of each coarse row [B, H/4]
        elements = _BAND_ELEMENTS["cuda"]
        if logits.device.type == "cpu":
            elements = _BAND_ELEMENTS["cpu"] * torch.get_num_threads()
        self.band_height = max(1, elements // (depths * width))
        # On the CPU, as a GPU would have to be waited for.
        touched = interpolation_matrix(rows, height, torch.empty(0), align_corners=align_corners) != 0
        self.first = touched.int().argmax(1).tolist()  # first and last coarse row that each row reads
        self.last = (rows - 1 - touched.flip(1).int().argmax(1)).tolist()

    def positions(self) -> list[tuple[int, slice]]:
        batch, height = self.columns.shape[0], self.row_matrix.shape[0]
        starts = range(0, height, self.band_height)
        rows = [slice(start, min(start + self.band_height, height)) for start in starts]
        return [(sample, band) for sample in range(batch) for band in rows]

    def _coarse_rows(self, rows: slice) -> slice:
        return slice(self.first[rows.start], self.last[rows.stop - 1] + 1)

    def depths(self, sample: int, rows: slice) -> _AnyDepths | _QuarterDepths:
        """Return what computes the softmax of a band."""
        if self.quarter_depths is not None and all(self.narrow[sample][self._coarse_rows(rows)]):
            return self.quarter_depths
        return self.any_depths

    def scores(self, sample: int, rows: slice) -> Tensor:
        """Return the scores of a band: [b, D/4, W]."""
        coarse = self._coarse_rows(rows)
        band = self.row_matrix[rows, coarse] @ self.columns[sample, coarse].flatten(1)
        return band.view(-1, *self.columns.shape[2:])

    def scores_backward(self, sample: int, rows: slice, grad: Tensor) -> None:
        """Add the gradient of a band's scores [b, D/4, W] to that of ``columns``."""
        if self.columns_grad is None:
            self.columns_grad = torch.zeros_like(self.columns)
        coarse = self._coarse_rows(rows)
        self.columns_grad[sample, coarse].flatten(1).addmm_(self.row_matrix[rows, coarse].T, grad.flatten(1))

    def logits_grad(self) -> Tensor:
        """Return the gradient of the logits [B, D/4, H/4, W/4]."""
        # That of the centering is nothing: the gradients of a pixel's scores add up to zero.
        assert self.columns_grad is not None
        return (self.columns_grad @ self.column_matrix).transpose(1, 2)


class _AnyDepths:
    """Softmax over interpolated scores, by the interpolation matrix [D, D/4]."""

    def __init__(self, depths: int, max_disparity: int, like: Tensor, *, align_corners: bool) -> None:
        self.matrix = interpolation_matrix(depths, max_disparity, like, align_corners=align_corners)
        values = torch.arange(max_disparity, device=like.device, dtype=like.dtype)
        self.moments = torch.stack([torch.ones_like(values), values])  # [2, D]
        groups = torch.arange(sum((max_disparity, *_group_margins(max_disparity))) // 4, device=like.device)
        members = torch.div(values + 2, 4, rounding_mode="floor") == groups[:, None]  # [G, D]
        offsets = values + 0.5 - 4 * groups[:, None]
        self.group_moments = torch.stack([members.to(like.dtype), members * offsets])  # [2, G, D]

    def _exponentials(self, scores: Tensor) -> Tensor:
        """Interpolate scores and exponentiate them less their largest: [b, D/4, W] -> [b, D, W]."""
        scores = self.matrix @ scores
        # exp(-80) is nothing beside the largest, 1, but not yet a denormal number, of which processors make slow work.
        return scores.sub_(scores.amax(1, keepdim=True)).clamp_(min=-80).exp_()

    def expectation(self, scores: Tensor) -> Tensor:
        """Return the disparity [b, W] of scores [b, D/4, W]."""
        total, first_moment = (self.moments @ self._exponentials(scores)).unbind(1)  # sums over d of e_d and d e_d
        return first_moment / total

    def groups(self, scores: Tensor) -> tuple[Tensor, Tensor]:
        """Return mass and moment [b, G, W] of groups of disparities, for ``_modal``, of scores [b, D/4, W]."""
        exponentials = self._exponentials(scores)
        mass, moment = (matrix @ exponentials for matrix in self.group_moments)
        return mass, moment

    def gradient(self, scores: Tensor, disparity: Tensor, grad: Tensor) -> Tensor:
        """Return the gradient of scores [b, D/4, W] whose disparity [b, W] has the gradient ``grad``."""
        weights = self._exponentials(scores)
        weights *= grad[:, None] / (self.moments[:1] @ weights)  # g p_d
        weights *= self.moments[1][:, None] - disparity[:, None]  # g p_d (d - disparity)
        return self.matrix.T @ weights


class _QuarterDepths:
    """Softmax over four times as many scores, align_corners false, without interpolating them.

    Four disparities lie between two scores, an eighth, three, five and seven eighths of the way up; two lie beyond the
    first score and two beyond the last, and are equal to them. With u = exp(score / 8) below and v above, the
    exponentials of the four are u^7 v, u^5 v^3, u^3 v^5 and u v^7. Their sum and their moments about their middle are,
    with a = u^2 and b = v^2:

        sum e_j               = uv (a + b) (a^2 + b^2)
        sum (j - 3/2) e_j     = uv (b - a) (3/2 (a^2 + b^2) + 2 ab)
        sum (j - 3/2)^2 e_j   = uv (a + b) (9/4 (a^2 + b^2) - 2 ab)

    so that D/4 exponentials are enough. No maximum is subtracted: scores must lie within ``_GREATEST_SPAN`` / 2 of 0.
    """

    def __init__(self, depths: int, like: Tensor) -> None:
        self.last = 4 * depths - 1
        self.middles = torch.arange(1, depths, device=like.device, dtype=like.dtype)[:, None] * 4 - 0.5  # [D/4 - 1, 1]

    @staticmethod
    def _parts(scores: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Return uv (a + b), uv (b - a), a^2 + b^2, ab, [b, D/4 - 1, W] each, and u^8 of both ends [b, 2, W]."""
        u = scores.mul_(0.125).exp_()  # [b, D/4, W]
        product = u[:, :-1] * u[:, 1:]
        a = u.mul_(u)
        even = (a[:, :-1] + a[:, 1:]).mul_(product)
        odd = (a[:, 1:] - a[:, :-1]).mul_(product)
        squares = a.mul_(a)
        ends = squares[:, [0, -1]].square()
        return even, odd, squares[:, :-1] + squares[:, 1:], product.mul_(product), ends

    def expectation(self, scores: Tensor) -> Tensor:
        """Return the disparity [b, W] of scores [b, D/4, W], which are overwritten."""
        total, moment, squares, product, ends = self._parts(scores)
        total.mul_(squares)
        moment.mul_(squares.add_(product, alpha=4 / 3))  # 2/3 of the first moment about the middle
        first, last = ends.unbind(1)
        denominator = total.sum(1) + 2 * (first + last)
        numerator = total.mul_(self.middles).add_(moment, alpha=3 / 2).sum(1) + first + (2 * self.last - 1) * last
        return numerator / denominator

    def groups(self, scores: Tensor) -> tuple[Tensor, Tensor]:
        """Return mass and moment [b, G, W] of groups of disparities, of scores [b, D/4, W] (overwritten)."""
        total, moment, squares, product, ends = self._parts(scores)
        total.mul_(squares)
        moment.mul_(squares.add_(product, alpha=4 / 3)).mul_(3 / 2)
        ends = 2 * ends  # two disparities each, 1 from the middle of their group
        first, last = ends[:, :1], ends[:, 1:]
        return torch.cat([first, total, last], 1), torch.cat([first, moment, -last], 1)

    def gradient(self, scores: Tensor, disparity: Tensor, grad: Tensor) -> Tensor:
        """Return the gradient of scores [b, D/4, W] (overwritten) whose disparity [b, W] has the gradient ``grad``."""
        total, moment, squares, product, ends = self._parts(scores)
        second = torch.sub(squares, product, alpha=8 / 9).mul_(total)  # 4/9 of the second moment
        moment.mul_(product.mul_(4 / 3).add_(squares))  # 2/3 of the first
        total.mul_(squares)
        first, last = ends.unbind(1)
        denominator = total.sum(1) + 2 * (first + last)

        # With d = middle + j - 3/2, e_j (d - disparity) goes to the score above by 1/2 + (j - 3/2) / 4, the rest below.
        offset = self.middles - disparity[:, None]  # [b, D/4 - 1, W]
        half = total.mul_(offset).add_(moment, alpha=3 / 2)  # sum e_j (d - disparity)
        tilt = moment.mul_(offset).add_(second, alpha=3 / 2)  # 2/3 sum (j - 3/2) e_j (d - disparity)
        out = scores
        out[:, 0] = 2 * first * (1 - 2 * disparity)
        torch.add(half, tilt, alpha=3 / 4, out=out[:, 1:])
        out[:, :-1] += half.sub_(tilt, alpha=3 / 4)
        out[:, -1] += 2 * last * (2 * self.last - 1 - 2 * disparity)
        return out.mul_((grad / denominator / 2)[:, None])
