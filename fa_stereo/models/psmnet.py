"""PSMNet with attention slots, assembled: FA-PSMNet is ``ModelConfig()``, PSMNet the same with attention ``none``.

Legend: B batch, H x W picture in pixels, c base channels (32), D maximum disparity in pixels (192, exclusive).
"""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fa_stereo.config import ModelConfig
from fa_stereo.errors import InputError
from fa_stereo.models.aggregation import BasicAggregation, StackedHourglass
from fa_stereo.models.features import FeatureExtractor
from fa_stereo.models.halving import score_with_halvings
from fa_stereo.models.layers import ConvNorm2d, ConvNorm3d, DeconvNorm3d
from fa_stereo.models.recomputation import Run, call, recompute
from fa_stereo.models.regression import (
    regress_disparity,
    regress_disparity_reference,
    regress_modal_disparity,
    regress_modal_disparity_reference,
)
from fa_stereo.models.two_sizes import predict_at_two_sizes

SIZE_MULTIPLE = 16
"""Heights and widths the network works on: quarter resolution, then two halvings."""

Score = Callable[[Tensor, Tensor, int], list[Tensor]]
"""From the features of both views, [B, c, H/4, W/4] each, and D/4 to scores [B, D/4, H/4, W/4]."""


class StereoOutput(NamedTuple):
    """What the network returns in training mode: one entry per supervised output, the best last.

    Attributes:
        disparities: In pixels, float32, each [B, H, W].
        logits: Scores before upsampling, each [B, D/4, H/4, W/4], higher = better.
    """

    disparities: tuple[Tensor, ...]
    logits: tuple[Tensor, ...]


class PSMNet(nn.Module):
    """Pyramid stereo matching network with attention slots.

    | step | output |
    |---|---|
    | features of each view (shared weights) | [B, c, H/4, W/4] |
    | first convolutions over the cost volume (which is not stored) | [B, c, D/4, H/4, W/4] |
    | aggregation | logits [B, D/4, H/4, W/4] (three in training) |
    | regression | disparity [B, H, W] |

    Attributes:
        config: The model configuration; stored in every checkpoint.
        plain: Store the concatenated features, the cost volume and the upsampled score volume, as the formulas read.
            Slower, several times the memory, the same function: the reference that the default is held against. Frozen
            batch norm is not folded either, and that of the batch is PyTorch's.
        volume_dtype: Type that the features are converted to for the cost volume; None leaves them as they are.
        activation_checkpointing: In training, keep the inputs of each part only and compute it again in the backward
            pass: less memory for about a third more time, the same gradients.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self._plain = False
        self.volume_dtype: torch.dtype | None = None
        self.activation_checkpointing = False
        self.features = FeatureExtractor(config)
        self.aggregation: StackedHourglass | BasicAggregation
        self.aggregation = (
            StackedHourglass(config) if config.aggregation == "stacked_hourglass" else BasicAggregation(config)
        )

    @property
    def plain(self) -> bool:
        """Whether to compute as the formulas read; see the class."""
        return self._plain

    @plain.setter
    def plain(self, plain: bool) -> None:
        self._plain = plain
        for layer in self.modules():
            if isinstance(layer, ConvNorm2d | ConvNorm3d | DeconvNorm3d):
                layer.plain = plain

    def forward(
        self, left: Tensor, right: Tensor, *, score: Score | None = None, confidence: bool = False
    ) -> Tensor | tuple[Tensor, Tensor] | StereoOutput:
        """Estimate the left view's disparity.

        Sizes that are no multiples of 16 are padded at the top and the right (``config.padding``), as PSMNet's
        evaluation does with its normalised pictures, and the result is cropped back.

        Args:
            left: Normalised picture, float [B, 3, H, W]; H and W at least 16.
            right: Likewise.
            score: What turns features into scores instead of ``self.score``, to do so in pieces for example.
            confidence: In eval mode, return confidence too.

        Returns:
            In eval mode disparity in pixels, float32 [B, H, W], by ``config.regression``, and with ``confidence`` that
            of ``regress_modal_disparity``, likewise; pictures of less than ``config.enlarge_below_px`` are predicted at
            two sizes, and of those from ``config.halve_from_px`` on half the size counts too. In training mode a
            ``StereoOutput``.

        Raises:
            InputError: The views differ in size, or are smaller than 16x16.
        """
        if left.shape != right.shape or left.dim() != 4 or left.shape[1] != 3:
            raise InputError(
                f"left and right must both be [B, 3, H, W] of one size, got {list(left.shape)} and {list(right.shape)}"
            )
        height, width = left.shape[-2:]
        if min(height, width) < SIZE_MULTIPLE:
            raise InputError(f"pictures must be at least {SIZE_MULTIPLE}x{SIZE_MULTIPLE} pixels, got {width}x{height}")
        score = score or self.score
        if self.training:
            padded_left, padded_right, top = self._pad(left, right)
            logits = score(*self.extract_features(padded_left, padded_right), self.config.max_disparity // 4)
            size = padded_left.shape[-2:]
            return StereoOutput(tuple(self.expectation(x, *size)[:, top:, :width] for x in logits), tuple(logits))
        # Small pictures do not become large by being enlarged.
        halve_from_px = self.config.halve_from_px if height * width >= self.config.halve_from_px else 0
        if height * width < self.config.enlarge_below_px:
            predict = partial(self._predict, score, halve_from_px, confidence=True)
            disparity, *others = predict_at_two_sizes(predict, left, right, self.config.max_disparity)
        else:
            disparity, *others = self._predict(score, halve_from_px, left, right, confidence=confidence)
        return (disparity, others[0]) if confidence else disparity

    def _predict(
        self, score: Score, halve_from_px: int, left: Tensor, right: Tensor, *, confidence: bool
    ) -> tuple[Tensor, ...]:
        """Return disparity by ``config.regression`` and confidence, if asked for, at the size of these pictures."""
        width = left.shape[-1]

        def score_pair(left: Tensor, right: Tensor, max_disparity: int) -> Tensor:
            return score(*self.extract_features(left, right), max_disparity // 4)[-1]

        left, right, top = self._pad(left, right)
        scores = score_with_halvings(
            score_pair, self._pad, left, right, self.config.max_disparity, halve_from_px,
            align_corners=self.config.align_corners,
        )  # fmt: skip
        size = left.shape[-2:]
        modal = self.config.regression == "modal"
        found = self.mode(scores, *size) if modal or confidence else ()
        if not modal:
            found = (self.expectation(scores, *size), *found[1:])
        return tuple(x[:, top:, :width] for x in found)

    def _pad(self, left: Tensor, right: Tensor) -> tuple[Tensor, Tensor, int]:
        """Return both pictures with sides that are multiples of 16, and how many rows came on top."""
        top, right_margin = (-side % SIZE_MULTIPLE for side in left.shape[-2:])
        if top or right_margin:
            mode = "constant" if self.config.padding == "zeros" else "replicate"
            left, right = (F.pad(image, (0, right_margin, top, 0), mode=mode) for image in (left, right))
        return left, right, top

    def expectation(self, scores: Tensor, height: int, width: int) -> Tensor:
        """Return disparity [B, H, W] of scores [B, D/4, H/4, W/4] by ``regress_disparity``."""
        regress = regress_disparity_reference if self.plain else regress_disparity
        return regress(scores, self.config.max_disparity, height, width, align_corners=self.config.align_corners)

    def mode(self, scores: Tensor, height: int, width: int) -> tuple[Tensor, Tensor]:
        """Return disparity and confidence [B, H, W] of scores [B, D/4, H/4, W/4] by ``regress_modal_disparity``."""
        regress = regress_modal_disparity_reference if self.plain else regress_modal_disparity
        return regress(scores, self.config.max_disparity, height, width, align_corners=self.config.align_corners)

    def set_max_disparity(self, max_disparity: int) -> None:
        """Search another range: no parameter depends on it, only the depth of the cost volume does.

        Args:
            max_disparity: In pixels (exclusive).

        Raises:
            InputError: It is no positive multiple of 16.
        """
        if not hasattr(max_disparity, "__index__"):
            raise InputError(f"max_disparity must be a whole number of pixels, got {max_disparity!r}")
        self.config = dataclasses.replace(self.config, max_disparity=operator.index(max_disparity))

    def set_prediction(
        self,
        *,
        regression: str | None = None,
        padding: str | None = None,
        halve_from_px: int | None = None,
        enlarge_below_px: int | None = None,
    ) -> None:
        """Predict disparity in another way: no parameter depends on it.

        Args:
            regression: ``expectation`` or ``modal``, see ``ModelConfig``; None leaves it as it is.
            padding: ``zeros`` or ``replicate``, likewise.
            halve_from_px: Of pictures of at least so many pixels, half the size counts too, likewise; 0 never.
            enlarge_below_px: Pictures of fewer pixels are predicted at two sizes, likewise; 0 never.

        Raises:
            InputError: A value is refused.
        """
        given: dict[str, Any] = {
            "regression": regression,
            "padding": padding,
            "halve_from_px": halve_from_px,
            "enlarge_below_px": enlarge_below_px,
        }
        changes = {key: value for key, value in given.items() if value is not None}
        self.config = dataclasses.replace(self.config, **changes)

    def extract_features(self, left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
        """Return matching features [B, c, H/4, W/4] of both views [B, 3, H, W], whose sizes are multiples of 16."""
        dtype = self.features.projection.weight.dtype
        run = self._run()
        if self.training or left.device.type == "cpu":
            # One pass per view, as PSMNet trains: batch norm takes its statistics from each view by itself. A CPU is
            # busy with one view anyway, in half the memory.
            left_features, right_features = (
                self.features(view.to(dtype), plain=self.plain, run=run) for view in (left, right)
            )
            return left_features, right_features
        both = self.features(torch.cat([left, right]).to(dtype), plain=self.plain, run=run)
        left_features, right_features = both.chunk(2)
        return left_features, right_features

    def score(self, left_features: Tensor, right_features: Tensor, disparities: int | None = None) -> list[Tensor]:
        """Return scores [B, D/4, H/4, W/4], one for each supervised output in training mode, else the last alone.

        Args:
            left_features: [B, c, H/4, W/4].
            right_features: Likewise.
            disparities: D/4, how many to score, at quarter resolution; None is what ``config.max_disparity`` asks for.
        """
        run = self._run()
        if self.volume_dtype is not None:
            left_features, right_features = (view.to(self.volume_dtype) for view in (left_features, right_features))
        if disparities is None:
            disparities = self.config.max_disparity // 4
        volume = run(self.aggregation.entry, left_features, right_features, disparities, plain=self.plain)
        scores: list[Tensor] = self.aggregation(volume, plain=self.plain, run=run)
        return scores

    def _run(self) -> Run:
        return recompute if self.activation_checkpointing and torch.is_grad_enabled() else call


def build_model(config: ModelConfig | None = None) -> PSMNet:
    """Build the network with fresh weights; FA-PSMNet by default.

    Examples:
        >>> from fa_stereo.config import AttentionConfig
        >>> psmnet = build_model(ModelConfig(attention=AttentionConfig(kind="none")))
        >>> sum(parameter.numel() for parameter in psmnet.parameters())
        5224768
    """
    return PSMNet(config if config is not None else ModelConfig())
