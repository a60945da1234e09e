"""What a confidence is worth: the error of the pixels that are left where less sure ones are left out.

Pixels of all images together are counted by confidence, in small steps. From these counts follow the errors of what is
kept from a threshold on, and the sparsification curve: the share of wrong pixels (bad-3) among the surest ones, over
how many of them are kept. The area under it (Hu and Mordohai 2012, "A Quantitative Evaluation of Confidence Measures
for Stereo Vision") is given beside that of a confidence that says nothing, which is the share of wrong pixels, and of
one that knows the errors.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fa_stereo.errors import InputError

EDGES = np.concatenate([np.arange(100) / 100, 1 - 10 ** -np.linspace(2, 6, 201), [1.0]]).astype(np.float32)
"""Where the steps begin: every 0.01, and from 0.99 on fifty for each further nine, as most pixels lie there."""

THRESHOLDS = (0.0, 0.3, 0.5, 0.7, 0.8, 0.9, 0.95, 0.99, 0.999)
"""Confidences from which the table keeps pixels; each is one of ``EDGES``."""


@dataclass
class ConfidenceCounts:
    """Pixels and their errors by confidence.

    Attributes:
        by_image: For an image's index the number of its pixels, the sum of their errors in px, and how many have an
            error above 1 and above 3 px, float64 [4, E]: column i is of confidences from ``EDGES[i]`` to the next.
    """

    by_image: dict[int, NDArray[np.float64]] = field(default_factory=dict)

    def update(
        self,
        index: int,
        name: str,
        confidence: NDArray[np.float32],
        prediction: NDArray[np.float32],
        target: NDArray[np.float32],
        valid: NDArray[np.bool_],
    ) -> None:
        """Take in one image.

        Args:
            index: Its position among the evaluated images.
            name: Its name, for errors.
            confidence: From 0 to 1, [H, W].
            prediction: Disparity in pixels, [H, W].
            target: Ground truth in pixels, [H, W].
            valid: Which pixels count, [H, W].

        Raises:
            InputError: A confidence is not a number from 0 to 1.
        """
        if not ((confidence >= 0) & (confidence <= 1)).all():
            raise InputError(f"{name}: the predicted confidence is not from 0 to 1 everywhere; the weights are broken")
        error = np.abs(prediction[valid].astype(np.float64) - target[valid])
        place = np.searchsorted(EDGES, confidence[valid], side="right") - 1
        rows = (np.ones_like(error), error, error > 1, error > 3)
        self.by_image[index] = np.stack([np.bincount(place, row.astype(np.float64), len(EDGES)) for row in rows])

    @staticmethod
    def merge(parts: Iterable[ConfidenceCounts]) -> ConfidenceCounts:
        """Join what several processes saw."""
        return ConfidenceCounts({index: counts for part in parts for index, counts in part.by_image.items()})

    def total(self) -> NDArray[np.float64]:
        """Return the sums over all images, float64 [4, E]; they are added in the order of their indices."""
        total = np.zeros((4, len(EDGES)))
        for index in sorted(self.by_image):
            total += self.by_image[index]
        return total

    def kept(self, threshold: float) -> dict[str, float]:
        """Return what is left from a confidence on.

        Args:
            threshold: One of ``EDGES``, compared as float32.

        Returns:
            ``kept``, the percentage of the pixels, and their ``end_point_error`` (px), ``bad_1`` and ``bad_3`` (%);
            NaN of no pixels.

        Raises:
            ValueError: The threshold is none of ``EDGES``.
        """
        if np.float32(threshold) not in EDGES:
            raise ValueError(f"confidences are not counted from {threshold:g} on")
        sums = self.total()
        pixels, absolute_error, bad_1, bad_3 = sums[:, np.searchsorted(EDGES, np.float32(threshold)) :].sum(1)
        return {
            "kept": _ratio(100 * pixels, sums[0].sum()),
            "end_point_error": _ratio(absolute_error, pixels),
            "bad_1": _ratio(100 * bad_1, pixels),
            "bad_3": _ratio(100 * bad_3, pixels),
        }

    def sparsification(self) -> dict[str, float]:
        """Return the area under the curve of bad-3 over the share of pixels kept, in %, and its two bounds.

        With the share e of wrong pixels it is e for a confidence that says nothing, and for one that knows the errors
        ``e + (1 - e) ln(1 - e)`` (Hu and Mordohai 2012): none is wrong until only wrong ones are left.

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
        """Return both for ``metrics.json``: over all pixels of all images, px and %."""
        return {
            "thresholds": [{"from": threshold, **self.kept(threshold)} for threshold in THRESHOLDS],
            "area_under_bad_3_over_kept": self.sparsification(),
        }

    def table(self) -> str:
        """Return both as text for a person."""
        lines = [f"{'confidence':<13}{'kept %':>10}{'EPE px':>11}{'bad-1 %':>11}{'bad-3 %':>11}   over all pixels"]
        for threshold in THRESHOLDS:
            row = self.kept(threshold)
            cells = f"{_text(row['kept']):>10}{_text(row['end_point_error'], 3):>11}"
            cells += f"{_text(row['bad_1']):>11}{_text(row['bad_3']):>11}"
            lines.append(f"{f'from {threshold:g}' if threshold else 'all':<13}{cells}")
        own, by_chance, at_best = (_text(area) for area in self.sparsification().values())
        lines.append(
            f"area under bad-3 over the share kept: {own} %; of a confidence that says nothing {by_chance} %, of one "
            f"that knows the errors {at_best} %"
        )
        return "\n".join(lines)


def _ratio(value: float, total: float) -> float:
    return value / total if total else math.nan


def _text(value: float, digits: int = 2) -> str:
    return "-" if math.isnan(value) else f"{value:.{digits}f}"
