"""Evaluation: a predictor, a data set and a protocol in, every published kind of average out.

The loop here is the only one: ``fa-stereo evaluate``, validation during training and the SGBM baseline all use it.
"""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from fa_stereo import distributed
from fa_stereo.confidence import ConfidenceCounts
from fa_stereo.config import AVERAGINGS, PRECISIONS, ProtocolConfig, to_plain
from fa_stereo.data.loading import process_options
from fa_stereo.data.sample import StereoSample, to_batch_item
from fa_stereo.data.transforms import normalize_images
from fa_stereo.errors import InputError
from fa_stereo.files import write_bytes
from fa_stereo.machine import available_cores
from fa_stereo.metrics import (
    METRICS,
    REGIONS,
    Averages,
    ErrorSums,
    ImageErrors,
    StreamingMetrics,
    headline_averaging,
    valid_mask,
)
from fa_stereo.models.optimized import autocast

Predict = Callable[[Tensor, Tensor], Tensor]
"""Left and right view, uint8 [1, 3, H, W] on the CPU, to left disparity in pixels, float [1, H, W] on any device; or to
disparity and its confidence, [2, H, W]."""

METRICS_FILE = "metrics.json"
PER_IMAGE_FILE = "per_image.csv"
TABLE_ERRORS = "surrogateescape"
"""How the table holds names of files that are no text."""

_METRIC_TITLES = {"end_point_error": "EPE px", "bad_1": "bad-1 %", "bad_2": "bad-2 %", "bad_3": "bad-3 %", "d1": "D1 %"}
_REGION_TITLES = {"all": "all", "noc": "non-occluded", "occ": "occluded"}


# --------------------------------------------------------------------------------------------------------------------
# the loop


@dataclass(frozen=True)
class EvaluatedImage:
    """One image with its prediction, as handed to ``on_image``; cropped if the protocol crops.

    Attributes:
        left: Left picture, uint8 RGB [H, W, 3].
        right: Right picture, uint8 RGB [H, W, 3].
        prediction: Disparity in pixels, float32 [H, W].
        target: Ground truth in pixels, float32 [H, W]; inf = none.
        valid: Bool [H, W], the pixels that count.
        errors: The image's sums.
    """

    left: NDArray[np.uint8]
    right: NDArray[np.uint8]
    prediction: NDArray[np.float32]
    target: NDArray[np.float32]
    valid: NDArray[np.bool_]
    errors: ImageErrors


def evaluate(
    predict: Predict | nn.Module,
    dataset: Dataset[StereoSample],
    protocol: ProtocolConfig | None = None,
    *,
    device: torch.device | str | None = None,
    precision: str = "fp32",
    max_images: int | None = None,
    workers: int = 0,
    progress: bool = True,
    on_image: Callable[[EvaluatedImage], None] | None = None,
) -> EvaluationResult:
    """Predict every image of a data set and measure the errors.

    Called in all processes of a ``torch.distributed`` group, it shares the images among them (none twice, none left
    out) and returns the same result in each. The result does not depend on the number of processes.

    Args:
        predict: A network on normalised pictures (it is put into eval mode, and back), or a function from uint8 views
            [1, 3, H, W] to disparity [1, H, W], or to disparity and confidence [2, H, W], which is measured too.
        dataset: Samples with ground truth.
        protocol: Which images and pixels count, and what is averaged; None is ``ProtocolConfig()``.
        device: Where a network computes; None is where its parameters are. A function knows its own.
        precision: Of a network: ``fp32``, or ``bf16`` or ``fp16`` by autocast.
        max_images: Evaluate only the first n of the protocol's images; None evaluates all.
        workers: Loader processes, at most one for each core and image.
        progress: Show a progress bar on stderr, if that is a terminal.
        on_image: Called after each image of this process, for pictures and the like.

    Raises:
        InputError: The data set is empty, has no ground truth, or an image cannot be read; a prediction is not finite.
    """
    protocol = protocol or ProtocolConfig()
    count = len(dataset)  # type: ignore[arg-type]
    selected = select_images(count, protocol)
    chosen = selected[:max_images]
    if not chosen:
        raise InputError("there is no image to evaluate: the data set is empty")
    mine = list(range(distributed.rank(), len(chosen), distributed.world_size()))
    items = _Items(dataset, [chosen[index] for index in mine])
    loader: DataLoader[Any] = DataLoader(
        items, batch_size=None, **process_options(items, min(workers, len(mine), available_cores()))
    )
    function = network_predictor(predict, device, precision) if isinstance(predict, nn.Module) else predict
    streaming, counts = StreamingMetrics(protocol), ConfidenceCounts()
    failure: Exception | None = None
    hide = True if not progress or distributed.rank() > 0 else None  # None: hidden unless stderr is a terminal
    try:
        with torch.no_grad(), _eval_mode(predict):
            bar = tqdm(loader, desc="evaluate", unit="image", total=len(mine), disable=hide, leave=False)
            for index, item in zip(mine, bar, strict=True):
                if isinstance(item, Exception):
                    raise item
                image = _evaluate_image(function, index, item, streaming, counts)
                if on_image is not None:
                    on_image(image)
    except (InputError, OSError) as error:
        failure = error  # told to all processes: the others would wait for this one forever
    gathered = distributed.gather_objects((streaming, counts, failure))
    parts, all_counts, failures = zip(*gathered, strict=True)
    for failed in failures:
        if failed is not None:
            raise failed
    notes = []
    if protocol.expected_images not in (None, count):
        notes.append(f"the data set has {count:,} images, the protocol's {protocol.expected_images:,}")
    if len(chosen) < len(selected):
        notes.append(f"only the first {len(chosen):,} of its {len(selected):,} images were evaluated")
    counts = ConfidenceCounts.merge(all_counts)
    return EvaluationResult(StreamingMetrics.merge(parts), notes, confidence=counts if counts.by_image else None)


def select_images(count: int, protocol: ProtocolConfig) -> list[int]:
    """Return which of ``count`` images a protocol evaluates, in the order of the data set."""
    if protocol.images is None or protocol.images >= count:
        return list(range(count))
    # RAFT-Stereo's subset is defined by NumPy's legacy generator.
    shuffled = np.random.RandomState(protocol.image_seed).permutation(count)
    return sorted(int(index) for index in shuffled[: protocol.images])


def network_predictor(
    network: Callable[..., Any],
    device: torch.device | str | None = None,
    precision: str = "fp32",
    *,
    confidence: bool = False,
) -> Predict:
    """Return a function from uint8 views to disparity, [1, H, W], by a network on normalised pictures.

    Args:
        network: A network in eval mode, or what calls one: returns disparity [B, H, W], and with ``confidence=True``
            confidence likewise.
        device: Where to compute; None is where the network's parameters are.
        precision: ``fp32``, or ``bf16`` or ``fp16`` by autocast.
        confidence: Ask the network for its confidence too, and return [2, H, W].

    Raises:
        InputError: The precision is unknown.
    """
    if precision not in PRECISIONS:
        raise InputError(f"precision must be one of {', '.join(PRECISIONS)}, got {precision!r}")
    if device is None:
        assert isinstance(network, nn.Module)
        device = next(network.parameters()).device
    place = torch.device(device)

    def predict(left: Tensor, right: Tensor) -> Tensor:
        views = [normalize_images(view.to(place, non_blocking=True)) for view in (left, right)]
        with autocast(place, precision):
            if confidence:
                return torch.cat(network(*views, confidence=True)).float()
            disparity: Tensor = network(*views)
        return disparity.float()

    return predict


@contextmanager
def _eval_mode(predict: Predict | nn.Module) -> Iterator[None]:
    """Put a network into eval mode, and back into the mode it was in; a plain function has none."""
    if not isinstance(predict, nn.Module):
        yield
        return
    training = predict.training
    predict.eval()
    try:
        yield
    finally:
        predict.train(training)


class _Items(Dataset[Any]):
    """Chosen samples as tensors. A file that cannot be read comes as the exception itself.

    Raised in a loader process, it would reach the user wrapped into a traceback.
    """

    def __init__(self, dataset: Dataset[StereoSample], indices: list[int]) -> None:
        self.dataset = dataset
        self.indices = indices

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, position: int) -> dict[str, Any] | Exception:
        try:
            sample = self.dataset[self.indices[position]]
            if sample.disparity is None:
                return InputError(
                    f"{sample.name}: there is no ground truth to evaluate against; "
                    "data/README.md says where the data set keeps it"
                )
            return to_batch_item(sample)
        except (InputError, OSError) as error:
            return error


def _evaluate_image(
    predict: Predict, index: int, item: dict[str, Any], streaming: StreamingMetrics, counts: ConfidenceCounts
) -> EvaluatedImage:
    protocol, name = streaming.protocol, item["name"]
    if protocol.crop is not None:
        item = {key: _crop(value, protocol.crop) if isinstance(value, Tensor) else value for key, value in item.items()}
    left, right, target = item["left"], item["right"], item["disparity"].numpy()
    try:
        predicted = predict_padded(predict, left[None], right[None], protocol)
    except InputError as error:
        raise InputError(f"{name}: {error}") from error
    maps: NDArray[np.float32] = predicted.float().cpu().numpy()
    if len(maps) > 2:
        raise ValueError(f"{name}: predicted {len(maps)} maps, not disparity, or disparity and confidence")
    prediction = maps[0]  # [H, W]
    if prediction.shape != target.shape:
        raise ValueError(f"{name}: predicted {list(prediction.shape)}, but the ground truth is {list(target.shape)}")
    occluded = item["occluded"].numpy() if "occluded" in item else None
    errors = streaming.update(index, name, prediction, target, occluded)
    valid = valid_mask(target, protocol.min_disparity, protocol.max_disparity)
    if len(maps) == 2:
        counts.update(index, name, maps[1], prediction, target, valid & (not errors.skipped))
    return EvaluatedImage(
        left=left.permute(1, 2, 0).numpy(),
        right=right.permute(1, 2, 0).numpy(),
        prediction=prediction,
        target=target,
        valid=valid,
        errors=errors,
    )


def _crop(image: Tensor, size: list[int]) -> Tensor:
    """Keep the bottom right of an image [..., H, W]."""
    height, width = size
    return image[..., -height:, -width:]


def predict_padded(predict: Predict, left: Tensor, right: Tensor, protocol: ProtocolConfig) -> Tensor:
    """Pad both views as a protocol does, predict, and crop the disparity back.

    What comes after normalisation is left to the network: ``by_network`` and ``top_right_zeros``, which
    ``fa-stereo evaluate`` has told it by then. Repeating the border and
    normalising may change places, so the other two are done here on the pictures.

    Args:
        predict: The function to call.
        left: uint8 [1, 3, H, W].
        right: Likewise.
        protocol: Says how to pad.

    Returns:
        What the function returns: disparity in pixels, [1, H, W], or disparity and confidence, [2, H, W].
    """
    if protocol.padding in ("by_network", "top_right_zeros"):
        return predict(left, right)
    height, width = left.shape[-2:]
    rows, columns = -height % protocol.padding_multiple, -width % protocol.padding_multiple
    before_columns, before_rows = (columns // 2, rows // 2) if protocol.padding == "symmetric_replicate" else (0, rows)
    margins = (before_columns, columns - before_columns, before_rows, rows - before_rows)
    left, right = (F.pad(view.float(), margins, mode="replicate").to(view.dtype) for view in (left, right))
    return predict(left, right)[..., before_rows : before_rows + height, before_columns : before_columns + width]


# --------------------------------------------------------------------------------------------------------------------
# the result


@dataclass
class EvaluationResult:
    """What an evaluation found.

    Attributes:
        streaming: The rows it rests on.
        notes: In what it departs from its protocol, one sentence each; empty if in nothing.
        source: What was evaluated (weights, data set, precision, ...), plain data for the record.
        confidence: What the predictions' confidence is worth; None if they had none.
    """

    streaming: StreamingMetrics
    notes: list[str] = field(default_factory=list)
    source: dict[str, Any] = field(default_factory=dict)
    confidence: ConfidenceCounts | None = None

    def __post_init__(self) -> None:
        self.averages: Averages = self.streaming.averages()
        """Region (all, noc, occ) -> averaging (pixel, image, batch) -> metric -> value."""

    @property
    def protocol(self) -> ProtocolConfig:
        """The protocol."""
        return self.streaming.protocol

    @property
    def per_image(self) -> list[ImageErrors]:
        """One row per image, in the order of the data set."""
        return self.streaming.images

    @property
    def metrics(self) -> dict[str, float]:
        """The headline: see ``StreamingMetrics.headline``."""
        return self.streaming.headline()

    @property
    def pixels(self) -> int:
        """Number of valid pixels in the images that were not skipped."""
        return sum(image.regions["all"].pixels for image in self.per_image if not image.skipped)

    def worst(self, count: int) -> list[ImageErrors]:
        """Return the images with the largest end-point error, the worst first; skipped and empty ones never."""
        counted = [image for image in self.per_image if not image.skipped]
        measured = [image for image in counted if not math.isnan(image.mean("end_point_error"))]
        return sorted(measured, key=lambda image: (-image.mean("end_point_error"), image.index))[:count]

    def to_plain(self) -> dict[str, Any]:
        """Return the content of ``metrics.json``; NaN becomes None, which JSON can say."""
        return {
            "protocol": to_plain(self.protocol),
            "notes": self.notes,
            "source": self.source,
            "images": len(self.per_image),
            "skipped_images": sum(image.skipped for image in self.per_image),
            "empty_images": sum(image.regions["all"].pixels == 0 for image in self.per_image),
            "pixels": self.pixels,
            "metrics": _without_nan(self.metrics),
            "averages": _without_nan(self.averages),
            **({"confidence": _without_nan(self.confidence.to_plain())} if self.confidence else {}),
        }

    def save(self, folder: str | Path) -> None:
        """Write ``metrics.json`` and ``per_image.csv``, each whole or not at all.

        Raises:
            InputError: The folder cannot be written.
        """
        folder = prepare_folder(folder)
        write_bytes(folder / METRICS_FILE, (json.dumps(self.to_plain(), indent=2, allow_nan=False) + "\n").encode())
        write_bytes(folder / PER_IMAGE_FILE, self._csv().encode(errors=TABLE_ERRORS))

    def _csv(self) -> str:
        regions = [region for region in REGIONS if any(region in image.regions for image in self.per_image)]
        columns = ["index", "name", "height", "width", "skipped"]
        for region in regions:
            prefix = "" if region == "all" else f"{region}_"
            columns += [f"{prefix}{name}" for name in ("pixels", *METRICS)]
        columns.append("truth")
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(columns)
        for image in self.per_image:
            row: list[Any] = [image.index, image.name, image.height, image.width, int(image.skipped)]
            for region in regions:
                sums = image.regions.get(region, ErrorSums())
                row += [sums.pixels, *(_number(sums.mean(metric)) for metric in METRICS)]
            writer.writerow([*row, image.truth])
        return text.getvalue()

    def table(self) -> str:
        """Return everything as text for a person; a star marks the protocol's own average."""
        skipped = sum(image.skipped for image in self.per_image)
        lines = [
            f"protocol {self.protocol.name}: {describe_protocol(self.protocol)}",
            *(f"  departs from it: {note}" for note in self.notes),
            f"{len(self.per_image):,} images{f' ({skipped:,} of them skipped)' if skipped else ''}, "
            f"{self.pixels:,} valid pixels",
            "",
            f"{'pixels':<13}{'mean over':<11}"
            + "".join(f"{_METRIC_TITLES[metric]:>10} " for metric in METRICS).rstrip(),
        ]
        for region, table in self.averages.items():
            for averaging in AVERAGINGS:
                title = _REGION_TITLES[region] if averaging == AVERAGINGS[0] else ""
                unit = {"pixel": "pixels", "image": "images", "batch": f"batches/{self.protocol.batch_size}"}[averaging]
                cells = ""
                for metric in METRICS:
                    own = region == "all" and averaging == headline_averaging(self.protocol, metric)
                    digits = 3 if metric == "end_point_error" else 2
                    value = table[averaging][metric]
                    cells += ("-" if math.isnan(value) else f"{value:.{digits}f}").rjust(10) + ("*" if own else " ")
                lines.append(f"{title:<13}{unit:<11}{cells}".rstrip())
        if self.confidence:
            lines += ["", self.confidence.table()]
        return "\n".join(lines)


def describe_protocol(protocol: ProtocolConfig) -> str:
    """Return a protocol in one line.

    Examples:
        >>> describe_protocol(ProtocolConfig())
        '0 < d < 192 px, EPE and outliers averaged over images, images without valid pixels left out'
    """
    low = "" if protocol.min_disparity is None else f"{protocol.min_disparity:g} < "
    high = "" if protocol.max_disparity is None else f" < {protocol.max_disparity:g}"
    units = {"pixel": "pixels", "image": "images", "batch": f"batches of {protocol.batch_size}"}
    outliers = headline_averaging(protocol, "d1")
    means = (
        f"EPE and outliers averaged over {units[outliers]}"
        if outliers == protocol.averaging
        else f"EPE averaged over {units[protocol.averaging]}, outliers over {units[outliers]}"
    )
    parts = [f"{low}d{high} px" if low or high else "all known pixels", means]
    if protocol.averaging != "pixel":
        fate = "left out" if protocol.empty == "skip" else "counted as 0"
        parts.append(f"{'batches' if protocol.averaging == 'batch' else 'images'} without valid pixels {fate}")
    if protocol.min_valid_fraction:
        parts.append(f"images with less than {protocol.min_valid_fraction:.0%} valid left out")
    if protocol.images is not None:
        parts.append(f"{protocol.images} images (seed {protocol.image_seed})")
    if protocol.crop is not None:
        parts.append(f"bottom right {protocol.crop[1]}x{protocol.crop[0]}")
    if protocol.padding != "by_network":
        parts.append(f"padding {protocol.padding.replace('_', ', ')}")
    return ", ".join(parts)


def prepare_folder(folder: str | Path) -> Path:
    """Create a folder for results.

    Raises:
        InputError: It cannot be created.
    """
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{folder}: this output folder cannot be created ({error.strerror or error})") from error
    return Path(folder)


def _number(value: float) -> str:
    return "" if math.isnan(value) else repr(value)


def _without_nan(values: Any) -> Any:
    if isinstance(values, dict):
        return {key: _without_nan(value) for key, value in values.items()}
    if isinstance(values, list):
        return [_without_nan(value) for value in values]
    return None if math.isnan(values) else values
