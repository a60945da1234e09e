"""Pictures of any size within a memory budget: the volumes of the network for a band of rows at a time.

Nearly all memory goes into the 3-D part of the network. It sees a neighbourhood only, while the features see the whole
picture through pyramid pooling and attention. So the features are computed once for the whole picture, exactly, and the
volumes for overlapping bands of rows. Each band is computed with ``overlap`` rows more on either side. The inner eighth
of them, and as many rows on this side of the border, are blended with the neighbour's; the rest is context, and
dropped. Scores are blended, not disparities: there is no seam, and from ``EXACT_OVERLAP_PX`` on the result is that of
the whole picture.
"""

from __future__ import annotations

import math
from functools import partial

import torch
from torch import Tensor

from fa_stereo.attention.complexity import block_cost
from fa_stereo.config import ModelConfig
from fa_stereo.errors import InputError
from fa_stereo.memory import return_freed_memory
from fa_stereo.models.features import SLOT_MAPS
from fa_stereo.models.psmnet import SIZE_MULTIPLE, PSMNet
from fa_stereo.models.two_sizes import enlarged_size

DEFAULT_OVERLAP_PX = 128
"""Rows added on either side of a band. Beside the whole picture, with the small weights, Middlebury's Motorcycle
moves by 4e-6 px in the mean, and by 0.002 px at most, or 0.013 px at edges by the modal regression."""

EXACT_OVERLAP_PX = 256
"""With this overlap bands compute what the whole picture does: 7/8 of it are the aggregation's reach in rows."""

_BYTES = {"fp32": (4, 4), "mixed": (4, 2), "bf16": (2, 2), "fp16": (2, 2)}
"""Of a value of the features, and of one of the volumes, by precision."""


def predict_in_bands(
    model: PSMNet, left: Tensor, right: Tensor, band_height: int, overlap: int = DEFAULT_OVERLAP_PX, *,
    confidence: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:  # fmt: skip
    """Estimate disparity like ``model(left, right)``, with volumes for one band of rows at a time.

    Args:
        model: A network in eval mode.
        left: Normalised picture, float [B, 3, H, W].
        right: Likewise.
        band_height: Rows of a band in pixels, without the overlap; a positive multiple of 16.
        overlap: Rows added on either side in pixels; a multiple of 16, at most ``band_height`` is blended.
        confidence: Return confidence too.

    Returns:
        Disparity in pixels, float32 [B, H, W], and confidence if asked for; see ``PSMNet.forward``.

    Raises:
        ValueError: The model is in training mode.
        InputError: ``band_height`` or ``overlap`` is no such multiple of 16.
    """
    if model.training:
        raise ValueError("bands are for prediction: the model is in training mode")
    for name, value, least in (("band height", band_height, SIZE_MULTIPLE), ("overlap", overlap, 0)):
        if value < least or value % SIZE_MULTIPLE:
            raise InputError(f"the {name} must be a multiple of {SIZE_MULTIPLE} pixels from {least} on, got {value}")
    score = partial(_score_in_bands, model, rows=band_height // 4, overlap=overlap // 4)
    result: Tensor | tuple[Tensor, Tensor] = model(left, right, score=score, confidence=confidence)
    return result


def _score_in_bands(
    model: PSMNet, left_features: Tensor, right_features: Tensor, disparities: int, *, rows: int, overlap: int
) -> list[Tensor]:
    """Return scores [B, D/4, H/4, W/4] from features [B, c, H/4, W/4], a band of ``rows`` rows of them at a time."""
    height = left_features.shape[2]
    ramp = min(overlap // 8, rows // 2)  # rows on either side of a border over which one band fades into the next
    scores = left_features.new_empty(0)
    for start in range(0, height, rows):
        if start and scores.device.type == "cpu":
            return_freed_memory()  # bands differ in height: what the last one left fits the next one badly
        stop = min(start + rows, height)
        first, last = max(start - overlap, 0), min(stop + overlap, height)
        left_band, right_band = (features[:, :, first:last] for features in (left_features, right_features))
        band = model.score(left_band, right_band, disparities)[-1]  # [B, D/4, band, W/4]
        if start == 0:
            scores = band.new_zeros(*band.shape[:2], height, band.shape[3])
        y = torch.arange(first, last, device=band.device, dtype=band.dtype) + 0.5
        weight = torch.ones_like(y)
        if ramp == 0:
            weight = ((y > start) & (y < stop)).to(band.dtype)
        else:
            if start > 0:
                weight = ((y - start + ramp) / (2 * ramp)).clamp(0, 1)
            if stop < height:
                weight = torch.minimum(weight, ((stop + ramp - y) / (2 * ramp)).clamp(0, 1))
        scores[:, :, first:last] += band.mul_(weight[:, None])
    return [scores]


def estimate_memory(
    config: ModelConfig, height: int, width: int, band_height: int | None = None, *, precision: str = "fp32"
) -> int:
    """Return about how many bytes predicting one pair takes on the CPU, beyond the process and the network itself.

    Args:
        config: The network's configuration.
        height: Of the picture, in pixels.
        width: Of the picture, in pixels.
        band_height: As for ``predict_in_bands``, with its usual overlap; None for the whole picture at once.
        precision: fp32, bf16, fp16 or mixed.
    """
    height, width = _largest_size(config, height, width)
    feature_bytes, volume_bytes = _BYTES[precision]
    c, depths = config.base_channels, config.max_disparity // 4
    height4, width4 = -(-height // SIZE_MULTIPLE) * 4, -(-width // SIZE_MULTIPLE) * 4
    rows = height4 if band_height is None else min(height4, (band_height + 2 * DEFAULT_OVERLAP_PX) // 4)
    cells = height4 * width4
    # Live at once in res1: three maps of c channels at half resolution, later res2, res4, pools and the result. Three
    # times that was measured, in sizes that an allocator cannot always use again; less than half of it stays.
    features = 3 * 12 * c * cells * feature_bytes
    kept_features = 16 * c * cells * feature_bytes
    # Attention, in float32 always: next to nothing beside that, unless it stores a map of all pairs of positions.
    attention = [
        block_cost(config.attention, share * c, (4 * height4 // scale, 4 * width4 // scale)).inference_bytes
        for share, scale in (SLOT_MAPS[slot] for slot in config.attention_slots)
        if config.attention.kind != "none"
    ]
    features = max(features, (2 + 4) * c * cells * feature_bytes + max(attention, default=0))
    # Two volumes, three maps of a quarter of a volume each, and slabs in several stages.
    volume = c * depths * rows * width4 * volume_bytes
    scores = 3 * depths * rows * width4 * 4
    volumes = int(2.75 * volume) + 3 * min(volume, 32 << 20) + scores + (0 if rows == height4 else depths * cells * 4)
    regression = depths * height4 * 4 * width4 * 4 + depths * cells * 4
    pictures = 6 * 3 * 16 * cells * 4
    # What the convolution library and the allocator keep for themselves does not grow with the picture.
    library = (96 if volume_bytes == 4 else 192) << 20
    return int(1.15 * (pictures + max(features, kept_features + max(volumes, regression)))) + library


def _largest_size(config: ModelConfig, height: int, width: int) -> tuple[int, int]:
    """Return the height and width at which a picture is predicted, of two sizes the larger one."""
    return enlarged_size(height, width) if height * width < config.enlarge_below_px else (height, width)


def choose_band_height(
    config: ModelConfig, height: int, width: int, budget_bytes: int, *, precision: str = "fp32"
) -> int | None:
    """Return the largest band height whose ``estimate_memory`` keeps within the budget; None if no bands are needed.

    Raises:
        InputError: Even the smallest bands take more.
    """

    def needed(band_height: int | None) -> int:
        return estimate_memory(config, height, width, band_height, precision=precision)

    if needed(None) <= budget_bytes:
        return None
    tallest, _ = _largest_size(config, height, width)
    for band_height in range(tallest // SIZE_MULTIPLE * SIZE_MULTIPLE, 0, -SIZE_MULTIPLE):
        if needed(band_height) <= budget_bytes:
            return band_height
    least_gb = math.ceil(needed(SIZE_MULTIPLE) / 1e7) / 100
    raise InputError(
        f"{width}x{height} pictures take about {least_gb:g} GB even in the smallest bands, the budget is "
        f"{budget_bytes / 1e9:g} GB: allow more memory, or predict at a smaller scale"
    )
