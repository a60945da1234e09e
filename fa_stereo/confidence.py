"""What a confidence is worth: the error of the pixels that are left where less sure ones are left out.

Pixels are counted by confidence, in steps of 0.01, over all images together. From these counts follow the errors of
what is kept from any threshold on, and the sparsification curve: the share of wrong pixels (bad-3) among the most
confident ones, over how many are kept. Its mean over the share kept (the area under it; Hu and Mordohai 2012, "A
Quantitative Evaluation of Confidence Measures for Stereo Vision") is compared with that of a confidence that says
nothing, for which it is the share of wrong pixels, and of one that knows the errors.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

STEPS = 100
THRESHOLDS = (0.0, 0.3, 0.5, 0.7, 0.8, 0.9, 0.95, 0.99)
"""Confidences from which the table keeps pixels, multiples of 1 / STEPS."""


@dataclass
class ConfidenceCounts:
    """Pixels and their errors by confidence.

    Attributes:
        images: By an image's index: its pixels, the sum of their errors in px, and how many have an error above 1 and
            above 3 px, float64 [4, STEPS + 1]; column i is of confidences from i / STEPS to below the next.
    """

    images: dict[int, NDArray[np.float64]] = field(default_factory=dict)

    def update(
        self, index: int, confidence: NDArray[np.float32], prediction: NDArray[np.float32],
        target: NDArray[np.float32], valid: NDArray[np.bool_],
    ) -> None:  # fmt: skip
        """Take in one image.

        Args:
            index: Its position among the evaluated images.
            confidence: From 0 to 1, [H, W].
            prediction: Disparity in pixels, [H, W].
            target: Ground truth in pixels, [H, W].
            valid: Which pixels count, [H, W].
        """
        error = np.abs(prediction[valid].astype(np.float64) - target[valid])
        edges = (np.arange(1, STEPS + 1) / STEPS).astype(np.float32)  # as a threshold is compared with a confidence
        place = np.searchsorted(edges, confidence[valid], side="right")
        rows = (np.ones_like(error), error, error > 1, error > 3)
        self.images[index] = np.stack([np.bincount(place, row.astype(np.float64), STEPS + 1) for row in rows])

    @staticmethod
    def merge(parts: Iterable[ConfidenceCounts]) -> ConfidenceCounts:
        """Join what several processes saw."""
        return ConfidenceCounts({index: counts for part in parts for index, counts in part.images.items()})

    def total(self) -> NDArray[np.float64]:
        """Return the sums over all images, float64 [4, STEPS + 1], whoever saw them: they are added by their index."""
        total = np.zeros((4, STEPS + 1))
        for index in sorted(self.images):
            total += self.images[index]
        return total

    def kept(self, threshold: float) -> dict[str, float]:
        """Return what is left from a confidence on.

        Args:
            threshold: A multiple of 1 / STEPS.

        Returns:
            Percentage of the pixels, and their ``end_point_error`` (px), ``bad_1`` and ``bad_3`` (%); NaN of none.
        """
        sums = self.total()
        pixels, absolute_error, bad_1, bad_3 = sums[:, round(threshold * STEPS) :].sum(1)
        total = sums[0].sum()
        return {
            "kept": 100 * pixels / total if total else math.nan,
            "end_point_error": absolute_error / pixels if pixels else math.nan,
            "bad_1": 100 * bad_1 / pixels if pixels else math.nan,
            "bad_3": 100 * bad_3 / pixels if pixels else math.nan,
        }

    def sparsification(self) -> dict[str, float]:
        """Return the mean of bad-3 over the share of pixels kept, in %, the surest first, and its two bounds.

        Returns:
            ``own``; ``by_chance``, of a confidence that says nothing; ``at_best``, of one that knows the errors. NaN
            without pixels.
        """
        pixels, _, _, bad = self.total()[:, ::-1]
        total, wrong = pixels.sum(), bad.sum()
        if not total:
            return dict.fromkeys(("own", "by_chance", "at_best"), math.nan)
        area = before = bad_before = 0.0
        for count, count_bad in zip(pixels, bad, strict=True):
            if count:  # within a step, in any order: the integral of (b + r (n - n0)) / n over n
                rate, after = count_bad / count, before + count
                area += rate * count + ((bad_before - rate * before) * math.log(after / before) if before else 0.0)
                before, bad_before = after, bad_before + count_bad
        share = wrong / total
        best = share + (1 - share) * math.log1p(-share) if share < 1 else 1.0
        return {"own": 100 * area / total, "by_chance": 100 * share, "at_best": 100 * best}

    def to_plain(self) -> dict[str, Any]:
        """Return thresholds and curve for ``metrics.json``."""
        return {
            "thresholds": [{"from": threshold, **self.kept(threshold)} for threshold in THRESHOLDS],
            "bad_3_over_kept": self.sparsification(),
        }

    def table(self) -> str:
        """Return thresholds and curve as text for a person."""
        lines = [f"{'confidence':<13}{'kept %':>10}{'EPE px':>11}{'bad-1 %':>11}{'bad-3 %':>11}"]
        for threshold in THRESHOLDS:
            row = self.kept(threshold)
            cells = [
                f"{row['kept']:.2f}",
                f"{row['end_point_error']:.3f}",
                f"{row['bad_1']:.2f}",
                f"{row['bad_3']:.2f}",
            ]
            name = f"from {threshold:g}" if threshold else "all"
            lines.append(f"{name:<13}{cells[0]:>10}" + "".join(f"{cell:>11}" for cell in cells[1:]))
        curve = self.sparsification()
        lines.append(
            f"bad-3 over the share kept: {curve['own']:.2f} % in the mean; {curve['by_chance']:.2f} % for a confidence "
            f"that says nothing, {curve['at_best']:.2f} % for one that knows the errors"
        )
        return "\n".join(lines).replace("nan", "  -")
