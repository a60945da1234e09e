"""What a training run tells: TensorBoard, a progress bar on a terminal, a plain line now and then without one."""

from __future__ import annotations

import logging
import math
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from tqdm import tqdm

from fa_stereo.attention import FactorizedAttention
from fa_stereo.attention.masks import attention_of, mask_name, strongest_masks
from fa_stereo.memory import peak_memory
from fa_stereo.visualization import colorize_disparity, colorize_error, contact_sheet, overlay_weights

logger = logging.getLogger(__name__)

LINE_EVERY_SECONDS = 30.0
BASIS_MASKS = 8


class TrainingLog:
    """Writes the curves and pictures of a run; of several processes only the first makes one.

    Args:
        folder: Where TensorBoard's files go.
        first_step: Step the run begins at; what an interrupted run wrote beyond it is dropped from the curves.
        total_steps: Step the run ends at, if that is known.
    """

    def __init__(self, folder: Path, first_step: int, total_steps: int | None) -> None:
        from torch.utils.tensorboard import SummaryWriter  # slow to import, and needed by training alone

        self._writer: Any = None
        with self._writing():
            self._writer = SummaryWriter(str(folder), purge_step=first_step + 1)
        self.bar = tqdm(total=total_steps, initial=first_step, unit="step", disable=None, dynamic_ncols=True)
        self._on_terminal = sys.stderr.isatty()
        self._line_due = 0.0  # the first step is always told
        self._speed_start = (time.perf_counter(), 0)
        self._samples = 0

    def close(self) -> None:
        """Write what is still buffered."""
        self.bar.close()
        with self._writing():
            if self._writer:
                self._writer.close()

    @contextmanager
    def _writing(self) -> Iterator[None]:
        """Go on without curves where they cannot be written: a full disk is the checkpoints' to tell."""
        try:
            yield
        except OSError as error:
            self._writer = None
            logger.warning("TensorBoard's file cannot be written (%s): no curves from here on", error.strerror or error)

    def _add_scalars(self, step: int, values: Mapping[str, float]) -> None:
        with self._writing():
            for name, value in values.items():
                if self._writer and not math.isnan(value):
                    self._writer.add_scalar(name, value, step)

    def _add_picture(self, step: int, name: str, picture: NDArray[np.uint8]) -> None:
        with self._writing():
            if self._writer:
                self._writer.add_image(f"pictures/{name}", picture, step, dataformats="HWC")

    def advance(
        self, step: int, total_steps: int | None, epoch: float, samples: int, values: Mapping[str, float]
    ) -> None:
        """Move the progress bar by one step, or write a line if one is due.

        Args:
            step: Steps made.
            total_steps: Of the whole run, as far as is known now.
            epoch: Passes over the training pairs made.
            samples: Of this step.
            values: What ``Trainer.train_step`` returned; an error that is NaN was measured nowhere.
        """
        error = values["train/end_point_error"]
        self._samples += samples
        self.bar.total = total_steps
        self.bar.update()
        self.bar.set_postfix(
            loss=f"{values['loss/total']:.3g}", epe="-" if math.isnan(error) else f"{error:.3g}", refresh=False
        )
        if not self._on_terminal and (time.perf_counter() >= self._line_due or step == total_steps):
            self._line_due = time.perf_counter() + LINE_EVERY_SECONDS
            logger.info(
                "step %d/%s  epoch %.2f  loss %.4g  EPE %s px  learning rate %.3g",
                step, total_steps or "?", epoch, values["loss/total"], "-" if math.isnan(error) else f"{error:.3f}",
                values["train/learning_rate"],
            )  # fmt: skip

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Write curves, with the speed since the last call and the memory in use."""
        now = time.perf_counter()
        start, samples = self._speed_start
        self._speed_start = (now, self._samples)
        speed = (self._samples - samples) / max(now - start, 1e-9)
        self._add_scalars(step, {**values, "speed/samples_per_second": speed, "memory/gigabytes": _memory_gigabytes()})

    def validation(self, step: int, metrics: Mapping[str, float], seconds: float) -> None:
        """Write validation metrics, and tell them."""
        self._add_scalars(step, {f"validation/{name}": value for name, value in metrics.items()})
        told = "  ".join(f"{name} {value:.3f}" for name, value in metrics.items())
        logger.info("validation at step %d: %s  (%.0f s)", step, told, seconds)
        # Its time is not training's.
        self._speed_start = (time.perf_counter(), self._samples)

    def pictures(self, step: int, left: Tensor, disparity: Tensor, prediction: Tensor, valid: Tensor) -> None:
        """Write one sample as left picture, ground truth, prediction, and error in KITTI's colours.

        Args:
            step: Step.
            left: uint8 [3, H, W].
            disparity: Ground truth in pixels [H, W].
            prediction: In pixels [H, W].
            valid: Bool [H, W].
        """
        truth, estimate, mask = (x.detach().cpu().numpy() for x in (disparity, prediction.float(), valid))
        maximum = max(float(truth[mask].max()), 1.0) if mask.any() else None
        self._add_picture(step, "1_left", left.permute(1, 2, 0).cpu().numpy())
        self._add_picture(step, "2_ground_truth", colorize_disparity(truth, maximum))
        self._add_picture(step, "3_prediction", colorize_disparity(estimate, maximum))
        self._add_picture(step, "4_error", colorize_error(estimate, truth, mask))

    def basis_masks(
        self, step: int, left: Tensor, blocks: Mapping[str, nn.Module], inputs: Mapping[str, Tensor]
    ) -> None:
        """Write the strongest basis masks of each factorized-attention block over a sample's left picture.

        Args:
            step: Step.
            left: uint8 [3, H, W].
            blocks: The network's attention blocks by slot; those of other kinds have no masks.
            inputs: What each was given, [B, c, h, w], the sample last.
        """
        picture = left.permute(1, 2, 0).cpu().numpy()
        for slot, x in inputs.items():
            attention = attention_of(blocks[slot])
            if isinstance(attention, FactorizedAttention):
                dtype = attention.to_basis.weight.dtype  # which autocast may have lowered in the input
                masks = strongest_masks(attention, x[-1:].to(dtype), BASIS_MASKS)
                panels = [
                    (
                        f"{mask_name(mask.head, mask.number, attention.heads)}: {mask.weight:.1%}",
                        overlay_weights(picture, mask.mask[0].cpu().numpy()),
                    )
                    for mask in masks
                ]
                self._add_picture(step, f"5_basis_masks_{slot}", contact_sheet(panels, width_px=picture.shape[1]))


def _memory_gigabytes() -> float:
    """Return the most memory used so far: PyTorch's on the GPU if there is one in use, else this process's."""
    in_use = torch.cuda.is_available() and torch.cuda.max_memory_allocated()
    return peak_memory("cuda" if in_use else "cpu") / 1e9


class PlateauAlarm:
    """Warns when the loss has stopped falling: when a window of steps is no better than the best one before.

    Args:
        window: Steps in a window; 0 never warns.

    Examples:
        >>> alarm = PlateauAlarm(window=2)
        >>> [alarm.update(loss) for loss in (4.0, 2.0, 2.0, 2.0, 3.0, 2.0)]
        [False, False, False, False, False, True]
    """

    # A window must be better by this share: noise alone makes every other one "better" by a little.
    IMPROVEMENT = 0.01

    def __init__(self, window: int) -> None:
        self.window = window
        self.count = 0
        self.total = 0.0
        self.mean = 0.0
        self.best: float | None = None

    def update(self, loss: float) -> bool:
        """Take in the loss of one step and return whether this is the moment to warn."""
        if not self.window:
            return False
        self.count += 1
        self.total += loss
        if self.count < self.window:
            return False
        self.mean, self.count, self.total = self.total / self.count, 0, 0.0
        stuck = self.best is not None and self.mean > self.best * (1 - self.IMPROVEMENT)
        self.best = self.mean if self.best is None else min(self.best, self.mean)
        return stuck

    def state_dict(self) -> dict[str, Any]:
        """Return the state as plain data."""
        return {"count": self.count, "total": self.total, "best": self.best}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over a saved state."""
        self.count, self.total, self.best = state["count"], state["total"], state["best"]
