"""Disparity errors: of one map, and exact streaming sums over a data set in all the averagings that are published.

| name | definition over the valid pixels |
|---|---|
| end_point_error | mean of the error ``e = abs(prediction - target)`` in px |
| bad_n | % of pixels with ``e > n`` px |
| d1 | % of pixels with ``e > 3`` px and ``e > 5 %`` of the target (KITTI 2015) |

"The" error of a data set depends on what is averaged: all pixels alike, the images' means, or the means of batches.
All three are computed from the same sums, one row of them per image. The sums are of doubles, in a fixed order, and
rows are put in the order of the data set before anything is averaged: the result does not depend on how many processes
shared the images, nor on who finished first.
"""

from __future__ import annotations

import itertools
import math
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from fa_stereo.config import AVERAGINGS, ProtocolConfig
from fa_stereo.errors import InputError

METRICS = ("end_point_error", "bad_1", "bad_2", "bad_3", "d1")
REGIONS = ("all", "noc", "occ")
"""All valid pixels; those visible in both views; those that the right view does not see."""

Map = Tensor | NDArray[Any]
Averages = dict[str, dict[str, dict[str, float]]]
"""Region -> averaging -> metric -> value; NaN where there was no pixel."""


# --------------------------------------------------------------------------------------------------------------------
# of one map


def end_point_error(prediction: Map, target: Map, valid: Map | None = None) -> float:
    """Return the mean error over the valid pixels in px; NaN if there are none.

    Args:
        prediction: Disparity in pixels, any shape.
        target: Ground truth of that shape; inf = none.
        valid: Bool of that shape; None takes every pixel with ground truth.

    Examples:
        >>> end_point_error(np.array([1.0, 5.0, 9.0]), np.array([2.0, 2.0, np.inf]))
        2.0
    """
    return ErrorSums.measure(prediction, target, valid).mean("end_point_error")


def bad_n(prediction: Map, target: Map, valid: Map | None, n: float) -> float:
    """Return the percentage of valid pixels with an error above ``n`` px; NaN if there are none.

    Examples:
        >>> bad_n(np.array([1.0, 5.0]), np.array([2.0, 2.0]), None, n=1)  # an error of exactly 1 px is not bad
        50.0
    """
    error, _ = _errors(prediction, target, valid)
    return _percentage(_count_above(error, n), error.size)


def d1(prediction: Map, target: Map, valid: Map | None = None) -> float:
    """Return the percentage of valid pixels with an error above 3 px and above 5 % of the target; NaN without pixels.

    Source: the KITTI 2015 benchmark (Menze and Geiger, 2015). Not bad_3, which forgives nothing at large disparities.

    Examples:
        >>> d1(np.array([14.0, 104.0]), np.array([10.0, 100.0]))
        50.0
    """
    return ErrorSums.measure(prediction, target, valid).mean("d1")


def valid_mask(target: NDArray[np.float32], minimum: float | None, maximum: float | None) -> NDArray[np.bool_]:
    """Return where there is ground truth with ``minimum < target < maximum``; None leaves a bound out."""
    valid: NDArray[np.bool_] = np.isfinite(target)
    if minimum is not None:
        valid &= target > minimum
    if maximum is not None:
        valid &= target < maximum
    return valid


def _array(values: Map) -> NDArray[Any]:
    if isinstance(values, Tensor):
        values = values.detach().cpu()
        return (values.float() if values.is_floating_point() else values).numpy()
    return values


def _errors(prediction: Map, target: Map, valid: Map | None) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return error and target of the valid pixels, [N] each; in doubles, in which differences of floats are exact."""
    truth, estimate = _array(target), _array(prediction)
    mask = np.isfinite(truth) if valid is None else _array(valid).astype(bool) & np.isfinite(truth)
    if not estimate.shape == truth.shape == mask.shape:
        raise ValueError(f"shapes differ: prediction {estimate.shape}, target {truth.shape}, valid {mask.shape}")
    chosen = truth[mask].astype(np.float64)
    return np.abs(estimate[mask].astype(np.float64) - chosen), chosen


def _count_above(error: NDArray[np.float64], threshold_px: float) -> int:
    return int(np.count_nonzero(~(error <= threshold_px)))  # a NaN is no hit


def _percentage(count: int, total: int) -> float:
    return 100 * count / total if total else math.nan


@dataclass(frozen=True)
class ErrorSums:
    """Sums over the valid pixels of an image, from which every mean follows.

    Attributes:
        pixels: Number of valid pixels.
        absolute_error: Sum of the errors in px.
        bad_1: Pixels with an error above 1 px.
        bad_2: Pixels with an error above 2 px.
        bad_3: Pixels with an error above 3 px.
        d1: Pixels with an error above 3 px and above 5 % of the target.
    """

    pixels: int = 0
    absolute_error: float = 0.0
    bad_1: int = 0
    bad_2: int = 0
    bad_3: int = 0
    d1: int = 0

    @staticmethod
    def measure(prediction: Map, target: Map, valid: Map | None = None) -> ErrorSums:
        """Sum over one map; arguments as of ``end_point_error``."""
        error, truth = _errors(prediction, target, valid)
        # 20 e > d is e > 5 % of d without rounding 0.05
        outlier = ~(error <= 3) & ~(20 * error <= truth)
        return ErrorSums(
            pixels=error.size,
            absolute_error=float(error.sum()),
            bad_1=_count_above(error, 1),
            bad_2=_count_above(error, 2),
            bad_3=_count_above(error, 3),
            d1=int(np.count_nonzero(outlier)),
        )

    @staticmethod
    def total(parts: Iterable[ErrorSums]) -> ErrorSums:
        """Return the sums over several images, exact to the last bit whatever their order."""
        rows = list(parts)
        return ErrorSums(
            pixels=sum(row.pixels for row in rows),
            absolute_error=math.fsum(row.absolute_error for row in rows),
            bad_1=sum(row.bad_1 for row in rows),
            bad_2=sum(row.bad_2 for row in rows),
            bad_3=sum(row.bad_3 for row in rows),
            d1=sum(row.d1 for row in rows),
        )

    def mean(self, metric: str) -> float:
        """Return one of ``METRICS`` over these pixels: px or %; NaN if there are none."""
        if metric == "end_point_error":
            return self.absolute_error / self.pixels if self.pixels else math.nan
        return _percentage(getattr(self, metric), self.pixels)


# --------------------------------------------------------------------------------------------------------------------
# of a data set


@dataclass(frozen=True)
class ImageErrors:
    """What is kept of one image.

    Attributes:
        index: Position among the evaluated images, from 0: batches are counted by it.
        name: The sample's name.
        height: Rows that were evaluated.
        width: Columns that were evaluated.
        regions: Sums by region: ``all``, and ``noc`` and ``occ`` where the data set says what is occluded.
        skipped: Left out of every average, having too few valid pixels for the protocol.
        truth: CRC-32 of the ground truth (float32, row by row) in hexadecimal, by which images of one name
            can be told apart.
    """

    index: int
    name: str
    height: int
    width: int
    regions: dict[str, ErrorSums]
    skipped: bool = False
    truth: str = ""

    def mean(self, metric: str, region: str = "all") -> float:
        """Return the image's own metric over a region; NaN where that has no pixel."""
        return self.regions.get(region, ErrorSums()).mean(metric)


@dataclass
class StreamingMetrics:
    """Collects the errors of a data set image by image, in any order and any number of processes.

    Attributes:
        protocol: Which pixels count, and which mean.
        images: One row per image seen so far.
    """

    protocol: ProtocolConfig
    images: list[ImageErrors] = field(default_factory=list)

    def update(self, index: int, name: str, prediction: Map, target: Map, occluded: Map | None = None) -> ImageErrors:
        """Take in one image.

        Args:
            index: Its position among the evaluated images.
            name: Its name, for the per-image table and for errors.
            prediction: Disparity in pixels, [H, W].
            target: Ground truth in pixels, [H, W]; inf = none.
            occluded: Bool [H, W], True where the right view does not see the pixel; None if that is not known.

        Returns:
            The image's row.

        Raises:
            InputError: The prediction is not finite everywhere.
        """
        estimate, truth = _array(prediction), _array(target)
        broken = int(np.count_nonzero(~np.isfinite(estimate)))
        if broken:
            raise InputError(
                f"{name}: {broken} of {estimate.size} predicted disparities are NaN or infinite; "
                "the weights are broken, or the precision too low for them (try precision=fp32)"
            )
        protocol = self.protocol
        valid = valid_mask(truth, protocol.min_disparity, protocol.max_disparity)
        known = int(np.count_nonzero(valid_mask(truth, protocol.min_disparity, None)))
        regions = {"all": ErrorSums.measure(estimate, truth, valid)}
        if occluded is not None:
            hidden = _array(occluded).astype(bool)
            regions["noc"] = ErrorSums.measure(estimate, truth, valid & ~hidden)
            regions["occ"] = ErrorSums.measure(estimate, truth, valid & hidden)
        row = ImageErrors(
            index=index,
            name=name,
            height=truth.shape[0],
            width=truth.shape[1],
            regions=regions,
            skipped=regions["all"].pixels < protocol.min_valid_fraction * known
            or (protocol.min_valid_fraction > 0 and known == 0),
            truth=f"{zlib.crc32(np.ascontiguousarray(truth, np.float32).tobytes()):08x}",
        )
        self.images.append(row)
        return row

    @staticmethod
    def merge(parts: Iterable[StreamingMetrics]) -> StreamingMetrics:
        """Join what several processes saw, in the order of the data set.

        Raises:
            ValueError: An image was seen twice.
        """
        parts = list(parts)
        images = sorted((image for part in parts for image in part.images), key=lambda image: image.index)
        for before, after in itertools.pairwise(images):
            if before.index == after.index:
                raise ValueError(f"image {after.index} ({after.name}) was evaluated twice")
        return StreamingMetrics(parts[0].protocol, images)

    def averages(self) -> Averages:
        """Return every metric in every averaging over every region that the data set has."""
        images = sorted((image for image in self.images if not image.skipped), key=lambda image: image.index)
        regions = [region for region in REGIONS if any(region in image.regions for image in images)] or ["all"]
        return {
            region: {averaging: self._average(images, region, averaging) for averaging in AVERAGINGS}
            for region in regions
        }

    def headline(self) -> dict[str, float]:
        """Return every metric over all valid pixels, averaged as the protocol does; NaN without any pixel."""
        table = self.averages()["all"]
        return {metric: table[headline_averaging(self.protocol, metric)][metric] for metric in METRICS}

    def _average(self, images: Sequence[ImageErrors], region: str, averaging: str) -> dict[str, float]:
        units: dict[int, list[ErrorSums]] = {}
        for image in images:
            if region in image.regions:
                unit = {"pixel": 0, "image": image.index, "batch": image.index // self.protocol.batch_size}[averaging]
                units.setdefault(unit, []).append(image.regions[region])
        totals = [ErrorSums.total(parts) for parts in units.values()]
        # An image without occluded pixels was not predicted without error there: "zero" is said of whole images.
        zero = self.protocol.empty == "zero" and averaging != "pixel" and region == "all"
        return {metric: _mean((total.mean(metric) for total in totals), empty_as_zero=zero) for metric in METRICS}


def headline_averaging(protocol: ProtocolConfig, metric: str) -> str:
    """Return what a protocol averages a metric over: pixel, image or batch."""
    return protocol.averaging if metric == "end_point_error" else protocol.outlier_averaging or protocol.averaging


def _mean(values: Iterable[float], *, empty_as_zero: bool) -> float:
    """Average the means of images or batches; NaN, the mean over no pixel, is left out or counts as zero."""
    kept = [0.0 if math.isnan(value) else value for value in values if empty_as_zero or not math.isnan(value)]
    return math.fsum(kept) / len(kept) if kept else math.nan
