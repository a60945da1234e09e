"""From two pictures to disparity: uint8 arrays in, float32 array out."""

from __future__ import annotations

import dataclasses
import logging
import math
import os
import sys
import threading
import time
from dataclasses import dataclass
from functools import partial
from typing import Any

import cv2
import numpy as np
import torch
from numpy.typing import NDArray

from fa_stereo.compilation import compile_network
from fa_stereo.config import INFERENCE_PRECISIONS
from fa_stereo.cuda_graph import GraphedNetwork, Network
from fa_stereo.data.transforms import normalize_images
from fa_stereo.errors import InputError
from fa_stereo.memory import is_out_of_memory
from fa_stereo.models.checkpoint import load_model
from fa_stereo.models.optimized import (
    computes_in_hardware,
    cpu_computes_bfloat16,
    cpu_computes_float16,
    optimize_for_inference,
)
from fa_stereo.models.psmnet import PSMNet
from fa_stereo.tiling import choose_band_height, predict_in_bands
from fa_stereo.weights import find_checkpoint

logger = logging.getLogger(__name__)

MINIMUM_SIZE_PX = 16


@dataclass(frozen=True)
class Prediction:
    """What a predictor returns for one pair.

    Attributes:
        disparity: Of the left view, float32 [H, W], in pixels: ``x_right = x_left - disparity``; that of the right one
            if it was asked for.
        confidence: The largest probability that the network gives to any 12 px of the range (of pixels of the resized
            pictures with a ``scale``), float32 [H, W] from 0 to 1; None if it was not asked for.
        seconds: Time from the arrays to the result, moving data to and from the device included.
        device: Where it was computed, e.g. ``cpu`` or ``cuda:0``.
        precision: What it was computed with: fp32, bf16, fp16 or mixed.
    """

    disparity: NDArray[np.float32]
    seconds: float
    device: str
    precision: str
    confidence: NDArray[np.float32] | None = None


def choose_device(device: str | torch.device = "auto") -> torch.device:
    """Return the device to compute on.

    Args:
        device: ``auto`` (CUDA where there is a GPU that PyTorch can use), ``cpu``, ``cuda`` or ``cuda:N``.

    Raises:
        InputError: The device is unknown, or is not there.
    """
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
    except (RuntimeError, TypeError):
        raise InputError(f"device must be auto, cpu or cuda, got {device!r}") from None
    if chosen.type not in ("cpu", "cuda"):
        raise InputError(f"device must be auto, cpu or cuda, got {str(device)!r}")
    if chosen.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if (chosen.index or 0) >= count:
            raise InputError(f"device {str(device)!r} is not there (PyTorch sees {count} CUDA devices): use device cpu")
    return chosen


def choose_precision(precision: str, device: torch.device) -> str:
    """Return the precision to compute with.

    Args:
        precision: fp32, bf16, fp16, mixed (features in fp32, what follows in bf16), or ``auto``: fp16 on CUDA and on
            CPUs that multiply float16 matrices, mixed on those that multiply bfloat16, else fp32. On a CPU with AMX
            for bfloat16 both moved disparity by a hundredth of a pixel; the other machines take the choice from there.
            Never bf16, which is faster, but moves it several times as far.
        device: Where the network runs.

    Raises:
        InputError: The precision is unknown.
    """
    if precision == "auto":
        if device.type == "cuda" or cpu_computes_float16():
            return "fp16"
        return "mixed" if cpu_computes_bfloat16() else "fp32"
    if precision not in INFERENCE_PRECISIONS:
        raise InputError(f"precision must be one of auto, {', '.join(INFERENCE_PRECISIONS)}, got {precision!r}")
    return precision


class DisparityPredictor:
    """Predicts the disparity of the left view of rectified pairs.

    Several threads may share one: from call to call it keeps networks and CUDA graphs, but nothing of a pair.

    Examples:
        >>> from fa_stereo.config import ModelConfig
        >>> from fa_stereo.models.psmnet import build_model
        >>> predictor = DisparityPredictor(build_model(ModelConfig(base_channels=8, max_disparity=32)), device="cpu")
        >>> picture = np.zeros((40, 60, 3), np.uint8)
        >>> predictor(picture, picture).disparity.shape
        (40, 60)

    Attributes:
        model: The network, in eval mode, on ``device``. What runs is a faster copy of it as it was at first: see
            ``fa_stereo.models.optimized``.
        scale: Pictures are resized by this factor first, and disparity is brought back to their size; None is their
            own size, and for small ones a larger one too, where that belongs to the weights. (That large ones count at
            half the size too, where that does, is the same for any scale.)
        band_height: Rows computed at a time in pixels; None for all.
        memory_gb: Choose the band height for each pair so that it takes about this much memory at most; None for any.
    """

    def __init__(
        self,
        model: PSMNet,
        device: str | torch.device = "auto",
        precision: str = "auto",
        *,
        scale: float | None = None,
        band_height: int | None = None,
        memory_gb: float | None = None,
        confidence: bool = False,
        compile: bool = False,
        cuda_graph: bool = False,
    ) -> None:
        """Take over a network: it is moved to the device and put into eval mode.

        Args:
            model: A network on normalised [B, 3, H, W] pictures, as ``load_model`` or ``build_model`` return it.
            device: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.
            precision: ``auto``, ``fp32``, ``bf16``, ``fp16`` or ``mixed``; see ``choose_precision``. On a CPU without
                hardware for it, where it is far slower than fp32, a warning is logged.
            scale: Predict at this size alone: 0.5 takes a quarter of the time and memory and sees twice the disparity.
                None predicts pictures at their own size, and small ones at a larger size too where the weights say so
                (``ModelConfig.enlarge_below_px``), which 1.0 does not.
            band_height: Rows computed at a time, a multiple of 16, for large pictures; see ``fa_stereo.tiling``.
            memory_gb: Instead, the memory that a pair may take, in GB, besides the process itself.
            confidence: Predict confidence too.
            compile: Compile the network for every size of picture, those it is predicted at besides included (up to
                eight): a minute each, no gain on the CPU.
            cuda_graph: From the second pair of a size in a row on, launch all of the network's kernels at once. For a
                GPU, without effect elsewhere; for whole pictures, not bands. Keeps the memory of two sizes, which
                ``memory_gb`` does not count.

        Raises:
            InputError: The device or the precision is unknown or unavailable, there is no compiler, or another value is
                refused.
        """
        self._device = choose_device(device)
        self._precision = choose_precision(precision, self.device)
        if scale is not None and not 0 < scale < math.inf:
            raise InputError(f"the scale must be positive, got {scale}")
        if band_height is not None and (not hasattr(band_height, "__index__") or band_height <= 0 or band_height % 16):
            raise InputError(f"the rows of a tile must be a positive multiple of 16, got {band_height}")
        if memory_gb is not None and not 0 < memory_gb < math.inf:
            raise InputError(f"the memory must be a positive number of GB, got {memory_gb}")
        if memory_gb is not None and band_height is not None:
            raise InputError("either the memory or the rows of a tile are given, as one follows from the other")
        if cuda_graph and band_height is not None:
            raise InputError("a CUDA graph is of whole pictures: leave out cuda_graph or band_height")
        if not computes_in_hardware(self.precision, self.device):
            logger.warning("%s is far slower than fp32 on this CPU, which has no hardware for it", self.precision)
        self.scale, self.band_height, self.memory_gb = scale, band_height, memory_gb
        self._confidence, self._compile, self._cuda_graph = confidence, compile, cuda_graph
        self.model = model.to(self.device).eval()
        if scale is not None:
            self.model.set_prediction(enlarge_below_px=0)
        self._networks = {self.precision: self._build_networks(self.precision)}
        self._building = threading.Lock()

    @property
    def device(self) -> torch.device:
        """Where it runs."""
        return self._device

    @property
    def precision(self) -> str:
        """fp32, bf16, fp16 or mixed (scores, softmax and regression stay fp32).

        A pair whose result is not finite is computed again in fp32, and its ``Prediction`` says so.
        """
        return self._precision

    @property
    def confidence(self) -> bool:
        """Whether confidence is predicted too."""
        return self._confidence

    @property
    def compile(self) -> bool:
        """Whether features and aggregation are compiled; see ``fa_stereo.compilation``."""
        return self._compile

    @property
    def cuda_graph(self) -> bool:
        """Whether pairs of repeated sizes run as a CUDA graph; see ``fa_stereo.cuda_graph``."""
        return self._cuda_graph

    def __call__(self, left: NDArray[np.uint8], right: NDArray[np.uint8]) -> Prediction:
        """Predict one pair.

        Args:
            left: uint8 RGB [H, W, 3], at least 16x16; a grey picture [H, W] counts as RGB with equal channels. Any
                memory order, contiguous or not; never modified.
            right: Likewise, of the same size.

        Raises:
            InputError: An array has another type or shape, the views differ in size, memory does not suffice, or the
                network's result is not finite.
        """
        start = time.perf_counter()
        views = check_pair(left, right)
        height, width = views[0].shape[:2]
        precision = self.precision
        try:
            if self.scale not in (None, 1):
                views = _resize_pair(*views, self.scale)
            pair = torch.from_numpy(np.ascontiguousarray(np.stack(views).transpose(0, 3, 1, 2)))  # [2, 3, H, W]
            disparity, confidence = self._predict(pair, precision)
            if precision != "fp32" and not np.isfinite(disparity).all():
                precision = "fp32"  # activations that float16 cannot hold
                disparity, confidence = self._predict(pair, precision)
            if not np.isfinite(disparity).all():
                raise InputError("the network's disparity is not finite: its weights are damaged; load others")
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            raise InputError(
                f"not enough memory on {self.device} for {width}x{height} pictures: compute them in bands (memory_gb; "
                f"--memory on the command line), or use a smaller scale or maximum disparity "
                f"({str(error) or type(error).__name__})"
            ) from error
        if self.scale not in (None, 1):
            # Disparity in pixels of the smaller picture, each of which is width / disparity width pixels wide.
            stretched = cv2.resize(disparity, (width, height), interpolation=cv2.INTER_LINEAR)
            disparity = stretched * np.float32(width / disparity.shape[1])
            if confidence is not None:
                resized = cv2.resize(confidence, (width, height), interpolation=cv2.INTER_LINEAR)
                confidence = np.asarray(resized, np.float32)
        return Prediction(disparity, time.perf_counter() - start, str(self.device), precision, confidence)

    def predict_right(self, left: NDArray[np.uint8], right: NDArray[np.uint8]) -> Prediction:
        """Predict the disparity of the right view: ``x_left = x_right + disparity``.

        Mirrored, the right view is a left one. Arguments and errors are those of a call.
        """
        left, right = check_pair(left, right)
        prediction = self(right[:, ::-1], left[:, ::-1])
        confidence = prediction.confidence
        return dataclasses.replace(
            prediction,
            disparity=np.ascontiguousarray(prediction.disparity[:, ::-1]),
            confidence=None if confidence is None else np.ascontiguousarray(confidence[:, ::-1]),
        )

    def _build_networks(self, precision: str) -> tuple[PSMNet, Network]:
        """Return the network, and what to call with whole pictures."""
        network = optimize_for_inference(self.model, precision)
        if self.compile:
            compile_network(network)
        whole: Network = partial(network, confidence=True) if self.confidence else network
        return network, GraphedNetwork(whole) if self.cuda_graph else whole

    def _predict(self, pair: torch.Tensor, precision: str) -> tuple[NDArray[np.float32], NDArray[np.float32] | None]:
        """Return disparity [H, W], and confidence if asked for, for both views as uint8 [2, 3, H, W]."""
        # What the caller's autocast says about precision is not what was asked of the predictor.
        with torch.inference_mode(), torch.autocast(self.device.type, enabled=False):
            return self._compute(pair, precision)

    def _compute(self, pair: torch.Tensor, precision: str) -> tuple[NDArray[np.float32], NDArray[np.float32] | None]:
        left, right = normalize_images(pair.to(self.device)).chunk(2)  # [1, 3, H, W] each
        with self._building:  # by one thread only
            if precision not in self._networks:
                self._networks[precision] = self._build_networks(precision)
        network, whole = self._networks[precision]
        band_height = self.band_height
        if self.memory_gb is not None:
            band_height = choose_band_height(
                network.config,
                left.shape[2],
                left.shape[3],
                int(min(self.memory_gb * 1e9, sys.maxsize)),
                precision=precision,
            )
        if band_height is None:
            result = whole(left, right)
        else:
            result = predict_in_bands(network, left, right, band_height, confidence=self.confidence)
        found = result if self.confidence else (result,)
        maps = [np.ascontiguousarray(x[0].float().cpu().numpy()) for x in found]  # [H, W] each, of their own
        return maps[0], maps[1] if self.confidence else None


def load_predictor(
    weights: str | os.PathLike[str] | None = None,
    device: str | torch.device = "auto",
    precision: str = "auto",
    max_disparity: int | None = None,
    *,
    regression: str | None = None,
    scale: float | None = None,
    band_height: int | None = None,
    memory_gb: float | None = None,
    confidence: bool = False,
    compile: bool = False,
    cuda_graph: bool = False,
) -> DisparityPredictor:
    """Load weights and return a predictor.

    Args:
        weights: ``small`` or ``full`` (bundled), the path of a checkpoint, or None: the full model on CUDA if it is
            bundled, else the small one.
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.
        precision: ``auto``, ``fp32``, ``bf16``, ``fp16`` or ``mixed``.
        max_disparity: Search up to this many pixels (exclusive, a multiple of 16) instead of the range the weights
            were trained for. Results beyond the trained range are poor.
        regression: ``expectation`` or ``modal`` (see ``ModelConfig``) instead of what belongs to the weights.
        scale: As for ``DisparityPredictor``, like the following.
        band_height: Rows computed at a time, for large pictures.
        memory_gb: Memory that a pair may take.
        confidence: Predict confidence too.
        compile: Compile the network.
        cuda_graph: On a GPU, launch its kernels at once for pairs of repeated sizes.

    Raises:
        InputError: The weights are not there or are not this network's, or another value is refused.
    """
    chosen = choose_device(device)
    choose_precision(precision, chosen)  # refuse a wrong value before reading a large file
    model = load_model(find_checkpoint(weights, chosen), device=chosen)
    if max_disparity is not None:
        model.set_max_disparity(max_disparity)
    model.set_prediction(regression=regression)
    return DisparityPredictor(
        model, chosen, precision,
        scale=scale, band_height=band_height, memory_gb=memory_gb, confidence=confidence, compile=compile,
        cuda_graph=cuda_graph,
    )  # fmt: skip


def check_pair(left: Any, right: Any) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Return both views as uint8 [H, W, 3] of one size.

    Raises:
        InputError: They are anything else, or smaller than 16x16.
    """
    views = []
    for name, picture in (("left", left), ("right", right)):
        if not isinstance(picture, np.ndarray):
            raise InputError(f"{name} must be a numpy array, got {type(picture).__name__}")
        if picture.dtype != np.uint8:
            raise InputError(f"{name} must be uint8 with values 0 to 255, got {picture.dtype}")
        if picture.ndim == 2:
            picture = np.repeat(picture[..., None], 3, axis=2)
        if picture.ndim != 3 or picture.shape[2] != 3:
            raise InputError(f"{name} must be RGB [H, W, 3] or grey [H, W], got shape {list(picture.shape)}")
        views.append(picture)
    if views[0].shape != views[1].shape:
        sizes = " and ".join(f"{view.shape[1]}x{view.shape[0]}" for view in views)
        raise InputError(f"the views of a pair must have one size, got {sizes}")
    height, width = views[0].shape[:2]
    if min(height, width) < MINIMUM_SIZE_PX:
        raise InputError(f"pictures must be at least {MINIMUM_SIZE_PX}x{MINIMUM_SIZE_PX}, got {width}x{height}")
    return views[0], views[1]


def _resize_pair(
    left: NDArray[np.uint8], right: NDArray[np.uint8], scale: float
) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    height, width = (round(scale * side) for side in left.shape[:2])
    if min(height, width) < MINIMUM_SIZE_PX:
        raise InputError(f"at scale {scale:g} the pictures are {width}x{height}, too small: choose a larger scale")
    method = cv2.INTER_AREA if scale < 1 else cv2.INTER_CUBIC
    try:
        resized = [
            np.asarray(cv2.resize(np.ascontiguousarray(view), (width, height), interpolation=method), np.uint8)
            for view in (left, right)
        ]
    except cv2.error:  # more than memory holds, or than OpenCV counts
        raise InputError(
            f"at scale {scale:g} the pictures are {width}x{height}, too large: choose a smaller scale"
        ) from None
    return resized[0], resized[1]
