"""Scores of the picture at half its size, and of that at half of its, added where the larger one's are less sure.

How far around a pixel the network sees is a number of pixels: a plain surface in a large picture outgrows it. At half
the size surfaces are half as large; the features have a quarter of the pixels then and the volumes, as disparities are
halved too, an eighth of the cells. Where a picture's scores ``s`` leave a doubt, those of half the size, ``s'``,
brought to the same pixels and disparities, count:

``scores = s + u / (u + u' + DOUBTLESS) s'``, ``u = 1 - mean over a window of max_d (p_(d-1) + p_d + p_(d+1))``,

with ``p`` the softmax of ``s`` over the quarter-resolution disparities ``d``, and ``u'`` that of ``s'`` likewise. Where
the picture itself is sure, as at what is too thin for half the size, ``u`` is near 0 and nothing changes. Adding scores
multiplies probabilities (a product of experts, Hinton 2002): what is added decides between what is possible in both
sizes, and invents nothing. How, and from which size on, was chosen by rendered pairs (see the model card of the bundled
weights).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from fa_stereo.memory import return_freed_memory
from fa_stereo.models.regression import at_least_float32

WINDOW = 5
"""Side of the square over which the doubt is averaged, in pixels of the scores: four of the picture each."""

DOUBTLESS = 1e-3
"""So much doubt is none: where both sizes have less, half the size does not count."""

ScorePair = Callable[[Tensor, Tensor, int], Tensor]
"""From pictures [B, 3, H, W] and D, the disparities to search, to scores [B, D/4, H/4, W/4]."""

Pad = Callable[[Tensor, Tensor], tuple[Tensor, Tensor, int]]
"""From both views to larger ones, and how many rows came on top; columns come at the right."""


def half_range(max_disparity: int) -> int:
    """Return what to search in the picture of half the size: half the range in pixels, as a multiple of 16.

    Examples:
        >>> half_range(192), half_range(48)
        (96, 32)
    """
    return -(-max_disparity // 32) * 16


def score_with_halvings(
    score: ScorePair, pad: Pad, left: Tensor, right: Tensor, max_disparity: int, from_px: int, *, align_corners: bool
) -> Tensor:
    """Score a pair at its own size and at smaller ones, and add them as the module's formula says, smallest first.

    Args:
        score: What scores pictures of any size of which both sides are multiples of 16.
        pad: What makes them so.
        left: Float [B, 3, H, W]; H and W are multiples of 16.
        right: Likewise.
        max_disparity: D, in pixels.
        from_px: The pictures are halved, and so are their halves that have at least so many pixels; 0 scores the
            pictures at their own size alone.
        align_corners: As for ``regress_disparity``.

    Returns:
        Scores [B, D/4, H/4, W/4].
    """
    if not from_px:
        return score(left, right, max_disparity)
    # First, as next to nothing of it is kept while the picture itself is scored.
    halves = F.avg_pool2d(left, 2), F.avg_pool2d(right, 2)
    further_from_px = from_px if halves[0].shape[2] * halves[0].shape[3] >= from_px else 0
    half_left, half_right, top = pad(*halves)
    half = score_with_halvings(
        score, pad, half_left, half_right, half_range(max_disparity), further_from_px, align_corners=align_corners
    )
    if half.device.type == "cpu":
        return_freed_memory()  # what the smaller size left fits this one badly
    own = score(left, right, max_disparity)
    half = half[:, :, top // 4 :, : own.shape[3] // 2]  # without what was padded
    with torch.autocast(own.device.type, enabled=False):
        own, half = at_least_float32(own), at_least_float32(half)
        return add_scores(own, enlarge_scores(half, own, max_disparity, align_corners=align_corners))


def enlarge_scores(half: Tensor, own: Tensor, max_disparity: int, *, align_corners: bool) -> Tensor:
    """Interpolate scores of the picture at half its size where its own are, linearly in rows, columns and disparities.

    Args:
        half: [B, D'/4, H/8, W/8], with D' the ``half_range`` of D.
        own: [B, D/4, H/4, W/4], for its shape.
        max_disparity: D, in pixels.
        align_corners: As for ``regress_disparity``.

    Returns:
        Those of half the size, [B, D/4, H/4, W/4].
    """
    depths, half_depths = own.shape[1], half.shape[1]
    first, step = _disparities(depths, max_disparity, align_corners)
    half_first, half_step = _disparities(half_depths, half_range(max_disparity), align_corners)
    index = torch.arange(depths, device=half.device, dtype=half.dtype)
    index = (((first + step * index) / 2 - half_first) / half_step).clamp(0, half_depths - 1)  # in half, of each of own
    neighbours = torch.arange(half_depths, device=half.device, dtype=half.dtype)
    matrix = (1 - (index[:, None] - neighbours).abs()).clamp(min=0)  # [D/4, D'/4]
    scores = torch.einsum("dk,bkyx->bdyx", matrix, half)
    return F.interpolate(scores, own.shape[2:], mode="bilinear", align_corners=align_corners)


def _disparities(depths: int, max_disparity: int, align_corners: bool) -> tuple[float, float]:
    """Return the disparity of the first score in pixels, and from one to the next."""
    if align_corners:  # the first and the last score are those of the first and the last disparity
        return 0.0, (max_disparity - 1) / (depths - 1)
    step = max_disparity / depths
    return (step - 1) / 2, step


def add_scores(own: Tensor, half: Tensor) -> Tensor:
    """Return the sum of both [B, D/4, H/4, W/4], that of half the size weighted as the module's formula says."""
    doubt, doubt_at_half = _doubt(own), _doubt(half)
    return own + doubt / (doubt + doubt_at_half + DOUBTLESS) * half


def _doubt(scores: Tensor) -> Tensor:
    """Return the probability outside of the three neighbouring disparities that hold most: [B, 1, H/4, W/4]."""
    probability = torch.softmax(scores, dim=1)
    window = probability[:, :-2] + probability[:, 1:-1] + probability[:, 2:]
    doubt = 1 - window.amax(1, keepdim=True)
    margin = WINDOW // 2
    doubt = F.avg_pool2d(F.pad(doubt, (margin,) * 4, mode="replicate"), WINDOW, stride=1)
    return doubt.clamp(min=0)  # rounded, it can be less
