"""Small pictures predicted at two sizes, their own and a larger one, and merged by confidence.

Features have a quarter of the picture's resolution, so that in a small picture what is a few pixels wide is hardly
there. Enlarged, it is; but surfaces are larger too, and outgrow what the network sees at once, and so do disparities,
of which the larger picture covers a smaller range. Where the two predictions differ, the one that is more confident
counts, as the mean over a small window has it:

``w = 1 / (1 + (c / (ADVANTAGE c')) ** POWER)``, ``disparity = (1 - w) disparity_own + w disparity_larger``,

with the means ``c`` and ``c'`` of the confidence in the picture's own size and in the larger one, and ``w = 0`` where
the disparity in its own size is beyond what the larger picture sees. The power is high, as the mean of two surfaces
lies between them, where there is neither (see ``fa_stereo.models.regression``). These figures were chosen by rendered
pairs (see the model card of the bundled weights).
"""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor

ENLARGEMENT = 1.5
"""The larger size beside the picture's own."""

ADVANTAGE = 1.1
"""How much the larger picture's confidence counts beside the other, as it has more detail."""

POWER = 32
"""How steeply the weight turns from one prediction to the other: confidences 5 % apart count 5 to 1."""

MARGIN_PX = 12
"""So near to the end of its range the larger picture is not asked, in its pixels: the span of a confidence."""

WINDOW_PX = 9
"""Side of the square over which confidence is averaged before it is compared, in pixels of the picture."""

Predict = Callable[[Tensor, Tensor], tuple[Tensor, ...]]
"""From pictures [B, 3, H, W] to disparity in their pixels and confidence, [B, H, W] each."""


def enlarged_size(height: int, width: int) -> tuple[int, int]:
    """Return the height and width of the larger picture.

    Examples:
        >>> enlarged_size(370, 463)
        (555, 694)
    """
    return round(ENLARGEMENT * height), round(ENLARGEMENT * width)


def predict_at_two_sizes(predict: Predict, left: Tensor, right: Tensor, max_disparity: int) -> tuple[Tensor, Tensor]:
    """Predict a pair at its own size and enlarged, and merge both.

    Args:
        predict: What predicts pictures of any size.
        left: Float [B, 3, H, W].
        right: Likewise.
        max_disparity: What it searches, in pixels of the picture that it is given.

    Returns:
        Disparity in pixels of the picture, and confidence, [B, H, W] each.
    """
    height, width = left.shape[-2:]
    own = predict(left, right)
    larger_size = enlarged_size(height, width)
    larger = predict(*(F.interpolate(x, larger_size, mode="bicubic", align_corners=False) for x in (left, right)))
    disparity, confidence = (
        F.interpolate(x.unsqueeze(1), (height, width), mode="bilinear", align_corners=False).squeeze(1) for x in larger
    )
    larger = disparity * (width / larger_size[1]), confidence
    return merge_by_confidence(own, larger, (max_disparity - MARGIN_PX) / ENLARGEMENT)


def merge_by_confidence(own: tuple[Tensor, ...], larger: tuple[Tensor, ...], reach_px: float) -> tuple[Tensor, Tensor]:
    """Return the mean of two predictions, weighted as the module's formula says.

    Args:
        own: Disparity and confidence in the picture's own size, [B, H, W] each.
        larger: Those of the larger picture, brought to that size and its pixels.
        reach_px: Up to which disparity the larger picture sees, in pixels of the other.

    Returns:
        Disparity in pixels of the picture's own size, and confidence, [B, H, W] each.
    """
    ratio = _window_mean(own[1]) / (ADVANTAGE * _window_mean(larger[1]))
    weight = (own[0] <= reach_px) / (1 + ratio**POWER)
    disparity, confidence = (x + weight * (y - x) for x, y in zip(own, larger, strict=True))
    return disparity, confidence


def _window_mean(x: Tensor) -> Tensor:
    """Return the mean over the window around each pixel, [B, H, W], whose border goes on outside."""
    margin = WINDOW_PX // 2
    return F.avg_pool2d(F.pad(x.unsqueeze(1), (margin,) * 4, mode="replicate"), WINDOW_PX, stride=1).squeeze(1)
