"""Two evaluations of the same images, image by image: which is better, and whether chance could have done it."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fa_stereo.config import ProtocolConfig, from_plain
from fa_stereo.data.datasets import comparable_settings
from fa_stereo.errors import InputError
from fa_stereo.evaluation import METRICS_FILE, PER_IMAGE_FILE, TABLE_ERRORS
from fa_stereo.files import read_bytes
from fa_stereo.metrics import METRICS

LEAST_IMAGES = 6
"""Images that a verdict needs: five that all agree do so by chance in one case of sixteen, six in one of thirty-two."""


@dataclass(frozen=True)
class Comparison:
    """The difference of two evaluations of the same images; lower is better for every metric.

    Attributes:
        metric: Which metric.
        images: Images compared.
        left_out: Images without the metric in either.
        mean_a: Mean over images of the first.
        mean_b: Mean over images of the second.
        difference: ``mean_b - mean_a``.
        low: Lower end of the 95 % bootstrap interval of the difference.
        high: Upper end.
        better: Images on which the second is better.
        worse: Images on which the second is worse.
    """

    metric: str
    images: int
    left_out: int
    mean_a: float
    mean_b: float
    difference: float
    low: float
    high: float
    better: int
    worse: int

    def table(self) -> str:
        """Return the comparison as text for a person."""
        unit = "px" if self.metric == "end_point_error" else "%"
        if self.images < LEAST_IMAGES and (self.low > 0 or self.high < 0):
            verdict = f"no verdict: so few images can agree by chance, it takes {LEAST_IMAGES}"
        elif self.low > 0 or self.high < 0:
            verdict = f"B is {'worse' if self.difference > 0 else 'better'}: the interval does not contain 0"
        else:
            verdict = "no difference shown: the interval contains 0"
        left_out = f" ({self.left_out:,} without valid pixels left out)" if self.left_out else ""
        return "\n".join(
            [
                f"{self.metric}, mean over {self.images:,} images{left_out}",
                f"  A      {self.mean_a:10.4f} {unit}",
                f"  B      {self.mean_b:10.4f} {unit}",
                f"  B - A  {self.difference:+10.4f} {unit}, 95 % interval {self.low:+.4f} to {self.high:+.4f} "
                "(bootstrap over images)",
                f"  B is better on {self.better:,} images, worse on {self.worse:,}, equal on "
                f"{self.images - self.better - self.worse:,}",
                verdict,
            ]
        )


def compare(
    folder_a: str | Path, folder_b: str | Path, metric: str = "end_point_error", samples: int = 10000, seed: int = 0
) -> Comparison:
    """Compare two evaluations image by image, with a paired percentile bootstrap over images.

    Args:
        folder_a: Output folder of the first evaluation.
        folder_b: Output folder of the second, of the same images by the same protocol.
        metric: A column of ``per_image.csv``: one of ``METRICS``, or with ``noc_`` or ``occ_`` before it.
        samples: Bootstrap samples.
        seed: Of the bootstrap.

    Raises:
        InputError: A folder holds no evaluation, the data sets, the images or the protocols' pixels differ, or the
            metric is unknown.
    """
    if samples < 1:
        raise InputError(f"samples must be positive, got {samples}")
    if seed < 0:
        raise InputError(f"seed must be zero or more, got {seed}")
    for folder in (folder_a, folder_b):
        if Path(folder).is_file():
            raise InputError(f"{folder}: a file; name the folder of the evaluation that it belongs to")
    rendered_alike = _check_same_pixels(Path(folder_a), Path(folder_b))
    (a, areas_a, truths_a), (b, areas_b, truths_b) = (
        _read_per_image(Path(folder) / PER_IMAGE_FILE, metric) for folder in (folder_a, folder_b)
    )
    for one, other, where in ((a, b, folder_b), (b, a, folder_a)):
        missing = [name for name in one if name not in other]
        if missing:
            raise InputError(
                f"{Path(where) / PER_IMAGE_FILE}: {len(missing)} images of the other evaluation are not there, "
                f"first {missing[0]!r}; compare evaluations of the same images"
            )
    unlike = next((name for name in a if areas_a[name] != areas_b[name]), None)
    if unlike is not None:
        raise InputError(
            f"{folder_a} and {folder_b} are evaluations of different images: height, width and pixels that count "
            f"of {unlike!r} are {', '.join(areas_a[unlike])} in one and {', '.join(areas_b[unlike])} in the other"
        )
    recorded = [name for name in a if truths_a[name] and truths_b[name]]
    unlike = next((name for name in recorded if truths_a[name] != truths_b[name]), None)
    if unlike is not None and not rendered_alike:  # whose last bits depend on the device
        raise InputError(
            f"{folder_a} and {folder_b} are evaluations of different images: the ground truth of {unlike!r} is not the "
            "same in both"
        )
    pairs = np.array([(a[name], b[name]) for name in a], np.float64).reshape(-1, 2)
    measured = pairs[np.isfinite(pairs).all(axis=1)]
    if not len(measured):
        raise InputError(f"no image has {metric} in both {folder_a} and {folder_b}")
    difference = measured[:, 1] - measured[:, 0]
    low, high = np.percentile(_bootstrap_means(difference, samples, seed), [2.5, 97.5])
    return Comparison(
        metric=metric,
        images=len(measured),
        left_out=len(pairs) - len(measured),
        mean_a=float(measured[:, 0].mean()),
        mean_b=float(measured[:, 1].mean()),
        difference=float(difference.mean()),
        low=float(low),
        high=float(high),
        better=int(np.count_nonzero(difference < 0)),
        worse=int(np.count_nonzero(difference > 0)),
    )


def _bootstrap_means(values: NDArray[np.float64], samples: int, seed: int) -> NDArray[np.float64]:
    generator = np.random.default_rng(seed)
    chunk = max(1, 10_000_000 // len(values))  # bounds the memory, not the result's distribution
    parts = [
        values[generator.integers(0, len(values), (min(chunk, samples - start), len(values)))].mean(axis=1)
        for start in range(0, samples, chunk)
    ]
    return np.concatenate(parts)


def _read_per_image(path: Path, metric: str) -> tuple[dict[str, float], dict[str, tuple[str, ...]], dict[str, str]]:
    """Return by image name the metric, NaN where the image has none or was skipped, and what tells other images apart.

    That is the height, the width and how many pixels count, as they are written, and the checksum of the ground truth,
    empty where it was not recorded.
    """
    rows = csv.DictReader(io.StringIO(read_bytes(path).decode(errors=TABLE_ERRORS), newline=""))
    columns = rows.fieldnames or []
    if not {"name", "skipped"} <= set(columns):
        raise InputError(f"{path}: not a per-image table of 'fa-stereo evaluate'")
    known = [column for column in columns if column.removeprefix("noc_").removeprefix("occ_") in METRICS]
    if metric not in known:
        raise InputError(f"{path}: there is no metric {metric!r}; known there: {', '.join(known)}")
    values: dict[str, float] = {}
    areas: dict[str, tuple[str, ...]] = {}
    truths: dict[str, str] = {}
    for row in rows:
        if row["name"] in values:
            raise InputError(f"{path}: the image {row['name']!r} is there twice; evaluate one pass at a time")
        try:
            values[row["name"]] = float(row[metric]) if row[metric] and row["skipped"] == "0" else math.nan
        except ValueError as error:
            raise InputError(f"{path}: {row[metric]!r} is no number (image {row['name']!r})") from error
        areas[row["name"]] = tuple(row.get(column) or "unknown" for column in ("height", "width", "pixels"))
        truths[row["name"]] = row.get("truth") or ""
    return values, areas, truths


def _check_same_pixels(folder_a: Path, folder_b: Path) -> bool:
    """Refuse evaluations of other images or pixels; tell whether both are known to be of pairs rendered alike."""
    protocols, sources, rendered = zip(
        *(_read_source(folder / METRICS_FILE) for folder in (folder_a, folder_b)), strict=True
    )
    if None not in rendered:  # of which the same names can be other pictures, too
        a, b = map(comparable_settings, rendered)
        key = _first_difference(a, b)
        if key is not None:
            raise InputError(
                f"{folder_a} and {folder_b} are evaluations of different images: they were rendered with {key} "
                f"{a.get(key)} for one and {b.get(key)} for the other; evaluate both on the same data set"
            )
    if None not in sources and sources[0] != sources[1]:
        key = _first_difference(*sources)
        a, b = (source.get(key) for source in sources)
        raise InputError(
            f"{folder_a} and {folder_b} are evaluations of different images: {key} is {a} in one and {b} in the other; "
            "evaluate both on the same data set"
        )
    for name in ("min_disparity", "max_disparity", "crop", "min_valid_fraction"):
        a, b = (getattr(protocol, name) for protocol in protocols)
        if a != b:
            raise InputError(
                f"{folder_a} and {folder_b} were evaluated on different pixels: {name} is {a} by protocol "
                f"{protocols[0].name} and {b} by {protocols[1].name}; evaluate both by one protocol"
            )
    on_the_fly = None not in sources and sources[0]["dataset.kind"] == "rendered"
    return on_the_fly or None not in rendered


def _first_difference(a: Mapping[str, Any], b: Mapping[str, Any]) -> str | None:
    """Return the first key whose values differ, or which one lacks; None if there is none."""
    return next((key for key in {**a, **b} if a.get(key) != b.get(key)), None)


def _read_source(path: Path) -> tuple[ProtocolConfig, dict[str, Any] | None, dict[str, Any] | None]:
    """Return an evaluation's protocol, what makes its images, by full key, and how they were rendered to files.

    Of the last two, None where it was not recorded.
    """
    try:
        content = json.loads(read_bytes(path))
        protocol = from_plain(ProtocolConfig, content["protocol"], where=f"{path}: protocol")
        dataset = content.get("source", {}).get("dataset")
        if dataset is None:
            return protocol, None, None
        images = {"dataset.kind": dataset["kind"]}
        if dataset["kind"] == "rendered":  # of which the same names can be other pictures
            settings = comparable_settings(dataset["rendered"])
            images |= {f"dataset.rendered.{key}": value for key, value in settings.items()}
        return protocol, images, content["source"].get("rendered_pairs")
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{path}: not a result of 'fa-stereo evaluate'") from error
