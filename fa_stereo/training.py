"""The training loop: one step after another, every one of them resumable.

    >>> Trainer(TrainConfig(...)).run()                                             # doctest: +SKIP

What a run does next depends on its weights, its optimizer and the number of steps taken, and on nothing else: the data
order and the learning rate are pure functions of the step (``fa_stereo.sampling``, ``fa_stereo.schedules``). So a run
that was killed and resumed ends, on the CPU, with the very weights of one that was not. (With ``trainer.max_minutes``
the learning rate goes by the clock, with ``data.render_workers`` the data; no two such runs are the same.)
"""

from __future__ import annotations

import io
import json
import logging
import math
import statistics
import sys
import time
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import Dataset
from tqdm.contrib.logging import logging_redirect_tqdm

from fa_stereo import distributed
from fa_stereo.attention.masks import record_inputs
from fa_stereo.compilation import compile_network, uncompiled
from fa_stereo.config import (
    PREDICTION_SETTINGS,
    DataConfig,
    DatasetConfig,
    OptimizerConfig,
    ProtocolConfig,
    TrainConfig,
    flatten,
    flatten_used,
    to_plain,
)
from fa_stereo.cuda_graph import GraphedPass
from fa_stereo.data import open_dataset, open_training_pairs
from fa_stereo.data.datasets import check_truth, rendered_settings
from fa_stereo.data.pool import RenderedPool, pools_of
from fa_stereo.data.sample import StereoSample
from fa_stereo.data.transforms import TrainingTransform, normalize_images
from fa_stereo.errors import InputError
from fa_stereo.evaluation import evaluate, network_predictor
from fa_stereo.export import WATCHING, find_record, training_record
from fa_stereo.files import expand_user, save_atomically, sole_use
from fa_stereo.history import FILE_NAME, History
from fa_stereo.inference import choose_device
from fa_stereo.losses import StereoLoss
from fa_stereo.machine import describe_device
from fa_stereo.memory import is_out_of_memory
from fa_stereo.models.batch_norm import set_batch_norm_to_eval
from fa_stereo.models.checkpoint import load_matching_weights, read_torch_file, save_weights
from fa_stereo.models.memory_format import to_channels_last
from fa_stereo.models.optimized import autocast, computes_in_hardware
from fa_stereo.models.psmnet import SIZE_MULTIPLE, StereoOutput, build_model
from fa_stereo.random_states import random_state, seed_everything, set_random_state
from fa_stereo.sampling import Batch, StepSampler, TrainingStream, make_loader
from fa_stereo.schedules import learning_rate_factor
from fa_stereo.stop_request import StopRequest
from fa_stereo.training_log import PlateauAlarm, TrainingLog
from fa_stereo.weight_average import WeightAverage
from fa_stereo.weights import find_checkpoint

logger = logging.getLogger(__name__)


# What must be as it was for a resumed run to see the data it would have seen, and for its optimizer's state to fit.
_MUST_AGREE = ("trainer.batch_size", "trainer.seed", "optimizer.kind")
_PREDICTION_KEYS = tuple(f"model.{key}" for key in PREDICTION_SETTINGS)

# Loss scaling starts at 2^16 and halves with every gradient that overflows; down here it is not the scale's fault.
_LEAST_LOSS_SCALE = 2.0**-14

# An epoch without a known pixel ends a run, but not sooner than this, as crops may miss what is known, nor later.
_STEPS_WITHOUT = (20, 100)


class TrainingError(RuntimeError):
    """Training cannot go on, for a reason that lies in the run and not in its input; one sentence."""


@dataclass
class TrainingResult:
    """How a run ended.

    Attributes:
        step: Optimizer steps taken, over all its resumptions.
        finished: False if a signal stopped it before its last step.
        output_dir: Folder of its results.
        validation: Metrics of the last validation, by name.
        best: End-point error and step of the best validation; empty if there was none.
    """

    step: int
    finished: bool
    output_dir: Path
    validation: dict[str, float] = field(default_factory=dict)
    best: dict[str, float] = field(default_factory=dict)


class Trainer:
    """Trains a network: builds everything a configuration names, resumes if there is something to resume, and runs.

    Gradient accumulation gives the update of the whole batch, since every part is divided by the number of valid pixels
    of the whole (over all processes, too). Batch norm is the exception: it normalises by the statistics of what passes
    through the network at once, the micro-batch, and updates its running statistics once for each.

    Under ``torchrun``, construct and run it inside ``fa_stereo.distributed.process_group()``. Python's, NumPy's and
    PyTorch's global random generators are seeded.

    Args:
        config: The run.

    Raises:
        InputError: The configuration, the data or a checkpoint cannot be used.
    """

    def __init__(self, config: TrainConfig) -> None:
        self.config = config
        self.settings = config.trainer
        self.output_dir = Path(distributed.broadcast_object(config.output_dir))
        self.device = _choose_device(self.settings.device)
        self.is_first = distributed.rank() == 0

        _check_data(config)
        _check_precision(config, self.device)
        _check_graph(config, self.device)
        _check_clock(config)
        checkpoint = self._find_checkpoint()
        self.stream = TrainingStream(
            open_training_pairs(config.data), TrainingTransform(config.data.augmentation), self.settings.seed
        )
        self.rendered_pairs = _how_rendered(config.data)
        self.validation_pairs = _open_validation(config.data.validation)
        if self.validation_pairs is None:
            self._tell("no validation: data.validation is not given")
        self.total_steps = max(1, self.settings.epochs * self.stream.samples // self.settings.batch_size)
        if self.settings.max_steps is not None:
            self.total_steps = min(self.total_steps, self.settings.max_steps)
        if self.settings.max_minutes is not None:
            self.total_steps = sys.maxsize  # until the time is over

        seed_everything(self.settings.seed)
        self.model = build_model(config.model)
        self.started_from: dict[str, Any] | None = None
        if checkpoint is None and self.settings.init_from is not None:
            weights = find_checkpoint(self.settings.init_from, self.device)
            report = load_matching_weights(self.model, weights)
            self.started_from = find_record(weights)
            self._tell("from %s: %s", self.settings.init_from, report.summary().replace("\n", "; "))
        to_channels_last(self.model.to(self.device))
        torch.backends.cudnn.benchmark = True  # all training crops have one size
        self.average = WeightAverage(self.model, self.settings.ema_decay) if self.settings.ema_decay else None
        if self.settings.activation_checkpointing:
            self.model.activation_checkpointing = True
        if self.settings.sync_batch_norm:
            distributed.synchronize_batch_norm(self.model, self.device)
        if self.settings.compile:
            compile_network(self.model)

        self.loss = StereoLoss(config.loss, config.model)
        self.optimizer = build_optimizer(config.optimizer, self.model)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.settings.precision == "fp16")
        self.graph = GraphedPass(self._both_passes, self.model.parameters()) if self.settings.cuda_graph else None
        self.alarm = PlateauAlarm(self.settings.plateau_alarm_steps)
        self.ground_truth_seen, self.steps_without = False, 0
        self.phase = "between steps"  # or "passes", which move batch norm's statistics, or "update" of the weights
        self.buffers = list(self.model.buffers())
        self.buffers_before = [buffer.clone() for buffer in self.buffers]
        self.step = self.saved_step = 0
        self.validated_step = 0 if not self.settings.validate_at_start else -1
        self.validation: dict[str, float] = {}
        self.best: dict[str, float] = {}
        self.history: History | None = None
        self.lines: list[dict[str, Any]] | None = []  # of the history of the run that this one goes on with
        self.best_settings: dict[str, Any] = {}  # of the validation by which it is the best
        self.best_kept_as: str | None = None  # where best.pt goes that is the best by another validation
        self.started = time.perf_counter()
        self.seconds: float | None = 0.0  # that the run took before
        self.seconds_in_steps = 0.0  # that all steps took, loading included, validations and writing not
        self.machine = describe_device(self.device, distributed.world_size())
        self.machines = [self.machine]
        self.changes: list[dict[str, Any]] = []  # of settings, on the way: step, key and the value before
        self.step_times: deque[tuple[float, float]] = deque(maxlen=1000)  # wall and processor seconds of late
        if checkpoint is not None:
            self._restore(checkpoint)
        if self.step > self.total_steps:
            self._tell("%d steps are taken already, more than the %d asked for", self.step, self.total_steps)
            self.total_steps = self.step

        # The network as training calls it; ``self.model`` stays the bare one, whose names checkpoints have.
        self.network: nn.Module = self.model
        if distributed.world_size() > 1:
            devices = [self.device] if self.device.type == "cuda" else None
            self.network = DistributedDataParallel(self.model, device_ids=devices)

    # ----------------------------------------------------------------------------------------------------------------
    # the loop

    def run(self) -> TrainingResult:
        """Train to the last step, or until SIGTERM or SIGINT asks to stop; either way the state is saved.

        Returns:
            How it ended.

        Raises:
            TrainingError: The loss is no longer finite, or a checkpoint cannot be written.
            InputError: A training pair cannot be read, another process uses the folder, or a validation is out of
                memory.
        """
        minutes = self.settings.max_minutes
        length = f"{self.total_steps}"
        if minutes is not None:
            length = f"{minutes:g} minutes ({self.seconds_in_steps / 60:.0f} of them used) of"
        self._tell(
            "%s: %d pairs, %s steps of %d, from step %d, on %s (%s)", self.output_dir, self.stream.samples,
            length, self.settings.batch_size, self.step, self.machine, self.settings.precision,
        )  # fmt: skip
        pools = pools_of(self.stream.dataset)
        try:
            return self._run(pools)
        finally:
            for pool in pools:
                pool.close()

    def _run(self, pools: list[RenderedPool]) -> TrainingResult:
        for pool in pools:
            self._tell(
                "%d pairs are rendered meanwhile, by %d at a time; it draws from those there", len(pool), pool.workers
            )
        with ExitStack() as held:
            log = None
            if self.is_first:
                self._prepare_output_dir(held)
                self.history = History(self.output_dir, self.validated_step, self.lines)
                if self.device.type == "cuda":
                    torch.cuda.reset_peak_memory_stats(self.device)
                log = TrainingLog(self.output_dir, self.step, self.expected_steps)
            try:
                with StopRequest() as stop, logging_redirect_tqdm():
                    finished = self._loop(log, stop)
            except TrainingError:
                raise
            except Exception:  # a lack of memory; or PyTorch interrupts whatever goes on as a loader's process is gone
                if distributed.world_size() == 1 and self.phase != "update":
                    if self.phase == "passes":
                        torch._foreach_copy_(self.buffers, self.buffers_before)
                    self._keep_training()
                raise
            finally:
                if log:
                    log.close()
            for pool in pools:
                self._tell("%d of %d pairs were rendered", pool.rendered, len(pool))
            if finished and self.step > 0 and not self.ground_truth_seen:  # the clock may end a run before that is told
                raise self._nothing_learnt()
            if finished:
                self._export()
        if not finished:
            again = f"output_dir={self.output_dir}" + (" resume=auto" if self.settings.resume != "auto" else "")
            self._tell("stopped at step %d; the same command with %s goes on", self.step, again)
        return TrainingResult(self.step, finished, self.output_dir, self.validation, self.best)

    def _loop(self, log: TrainingLog | None, stop: StopRequest) -> bool:
        """Take all steps that are left; return False if asked to stop before the last."""
        self._end_by_the_clock()
        # A run that was stopped during a validation still owes it.
        validated_step = self.validated_step
        if not self._validate_if_due(log, stop):
            return False
        if self.validated_step > validated_step and self.step == self.total_steps:
            self._save("last.pt")  # there is no step left that would
        self._train_mode()
        begin: float | None = None  # that of the first step is when its batch is there
        for loaded in self._batches():
            batch = self._checked(loaded)
            start = time.perf_counter(), time.process_time()
            begin = start[0] if begin is None else begin
            values = self.train_step(batch, log)
            self.step_times.append((time.perf_counter() - start[0], time.process_time() - start[1]))
            self.step += 1
            self.phase = "between steps"
            self.seconds_in_steps += time.perf_counter() - begin
            self._end_by_the_clock()
            if log:
                self._report(log, values)
            stopping = self._all_agree_to_stop(stop) or not self._validate_if_due(log, stop)
            self._save_if_due(stopping)
            if stopping:
                return False
            if self.step == self.total_steps:
                break
            begin = time.perf_counter()
        return True

    def _end_by_the_clock(self) -> None:
        """With ``max_minutes``, agree on the time used; where it is all of it, the step just made was the last."""
        if self.settings.max_minutes is None:
            return
        self.seconds_in_steps = distributed.broadcast_object(self.seconds_in_steps)
        if self.seconds_in_steps >= 60 * self.settings.max_minutes:
            self.total_steps = self.step

    @property
    def expected_steps(self) -> int | None:
        """Steps of the whole run: with ``max_minutes`` as many as the time so far promises, None before the first."""
        if self.settings.max_minutes is None or self.total_steps == self.step:
            return self.total_steps
        if not self.seconds_in_steps:
            return None
        return round(self.step * 60 * self.settings.max_minutes / self.seconds_in_steps)

    def _batches(self) -> Iterator[Batch | Exception]:
        """Yield this process's share of every step that is left, on the host, or why it could not be loaded."""
        sampler = StepSampler(
            self.step, self.total_steps, self.settings.batch_size, distributed.rank(), distributed.world_size()
        )
        pin_memory = self.device.type == "cuda"
        try:
            yield from make_loader(self.stream, sampler, self.config.data.workers, pin_memory=pin_memory)
        except Exception as error:  # of the loader itself, as when the system ends one of its processes
            yield error

    def _checked(self, batch: Batch | Exception) -> Batch:
        """Return a batch; if any process could not load its own, save what was trained and raise that in all."""
        failed = torch.tensor(int(isinstance(batch, Exception)))
        if distributed.sum_over_processes(failed):
            self._keep_training()
            failures = distributed.gather_objects(batch if isinstance(batch, Exception) else None)
            raise next(failure for failure in failures if failure is not None)
        assert not isinstance(batch, Exception)
        return batch

    def _keep_training(self) -> None:
        """Write ``last.pt`` before an error ends the run, unless it holds this step already or nothing was learnt."""
        if self.step > self.saved_step and self.ground_truth_seen:
            self._save("last.pt")
            self._tell("last.pt holds the training up to step %d", self.step)

    def train_step(self, batch: Batch, log: TrainingLog | None = None) -> dict[str, float]:
        """Make one optimizer step from this process's share of a batch.

        Args:
            batch: ``left``, ``right`` uint8 [B, 3, H, W], ``disparity`` float32 [B, H, W], ``name``.
            log: Where the pictures go, if they are due.

        Returns:
            Loss terms, end-point error (pixels), gradient norm and learning rate of the step, over all processes.

        Raises:
            TrainingError: The loss or the gradient is not finite; the weights are still as they were.
        """
        self.phase = "passes"
        if distributed.world_size() == 1:
            torch._foreach_copy_(self.buffers_before, self.buffers)
        disparity = batch["disparity"].to(self.device, non_blocking=True)  # [B, H, W]
        counts = distributed.sum_over_processes(self.loss.count(disparity))
        self._check_ground_truth(counts)
        rate = self.config.optimizer.learning_rate * learning_rate_factor(
            self.config.schedule, self.step, self.expected_steps or self.total_steps, self.epoch
        )
        for group in self.optimizer.param_groups:
            group["lr"] = rate

        sums = torch.zeros(0)
        parts = _split_batch(batch, self.settings.micro_batch_size)
        drawing = log is not None and self._due(self.settings.picture_every_steps, self.step + 1)
        watched: dict[str, nn.Module] = dict(self.model.features.attention.items()) if drawing else {}
        both_passes = self.graph if self.graph and not drawing else self._both_passes
        for number, part in enumerate(parts, start=1):
            truth = part["disparity"].to(self.device, non_blocking=True)
            left, right = (
                normalize_images(part[view].to(self.device, non_blocking=True)) for view in ("left", "right")
            )
            # Processes exchange gradients once per step, with the last part.
            with (
                self._gradient_exchange(number == len(parts)),
                record_inputs(watched) as attended,
                self._uncompiled(drawing),
            ):
                values, prediction = both_passes(left, right, truth, counts)
            sums = values.clone() if number == 1 else sums + values  # a graph writes over its values
        total, cross_entropy, *outputs, end_point_error = distributed.sum_over_processes(sums.double()).tolist()
        if not math.isfinite(total):
            raise self._not_finite("loss", batch)
        norm = self._update_weights(batch)
        if log and drawing:
            try:
                log.pictures(self.step + 1, part["left"][-1], truth[-1], prediction[-1], self.loss.valid(truth)[-1])
                log.basis_masks(self.step + 1, part["left"][-1], watched, attended)
            except Exception as error:  # the step is made
                if not is_out_of_memory(error):
                    raise
                logger.warning("no pictures of step %d: out of memory", self.step + 1)
        return {
            "loss/total": total,
            **{f"loss/output_{number}": value for number, value in enumerate(outputs, start=1)},
            **({"loss/cross_entropy": cross_entropy} if self.config.loss.cross_entropy_weight else {}),
            "train/end_point_error": end_point_error if counts[0] > 0 else math.nan,
            "train/learning_rate": rate,
            "train/gradient_norm": norm,
            "train/epoch": self.epoch,
        }

    def _check_ground_truth(self, counts: Tensor) -> None:
        """Refuse to go on without anything to learn from: an epoch without a known pixel (of 20 to 100 steps).

        Args:
            counts: Of the step to come, over all processes, see ``StereoLoss``.
        """
        if self.ground_truth_seen or bool(counts[0] > 0):
            self.ground_truth_seen = True
            return
        self.steps_without += 1
        epoch = math.ceil(self.stream.samples / self.settings.batch_size)
        low, high = _STEPS_WITHOUT
        if self.steps_without >= min(max(epoch, low), high) or self.step + 1 >= self.total_steps:
            raise self._nothing_learnt()

    def _nothing_learnt(self) -> InputError:
        above = "above 0 and " if self.config.loss.mask_zero else ""
        return InputError(
            f"{self.steps_without * self.settings.batch_size} training samples, and no pixel among them whose "
            f"disparity is known, {above}below model.max_disparity={self.config.model.max_disparity}: look at the "
            "ground truth with 'fa-stereo check-data' (positive, in pixels of the left view)"
        )

    def _both_passes(self, left: Tensor, right: Tensor, truth: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
        """Pass forward and backward through network and loss, and add to the gradients.

        Args:
            left: Normalised pictures of a part of the batch, [B, 3, H, W].
            right: Likewise.
            truth: Disparity [B, H, W].
            counts: Of the whole batch, see ``StereoLoss``.

        Returns:
            Loss, cross-entropy, the loss of each output and the end-point error, all divided by the counts; and the
            disparity predicted, [B, H, W].
        """
        with autocast(self.device, self.settings.precision):
            output: StereoOutput = self.network(left, right)
        terms = self.loss(output, truth, counts)
        # DistributedDataParallel averages over processes; the loss is a share of a sum over them.
        self.scaler.scale(terms.total * distributed.world_size()).backward()  # type: ignore[no-untyped-call]
        with torch.no_grad():
            prediction, valid = output.disparities[-1].detach(), self.loss.valid(truth)
            error = torch.where(valid, prediction - torch.where(valid, truth, 0.0), 0.0).abs().sum()
            values = [terms.total, terms.cross_entropy, *terms.outputs, error / counts[0].clamp(min=1)]
            return torch.stack(values), prediction

    def _update_weights(self, batch: Batch) -> float:
        """Clip the gradient, step, and move the average; return the gradient's norm before clipping."""
        self.scaler.unscale_(self.optimizer)
        parameters = [p for p in self.model.parameters() if p.grad is not None]
        norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        # Loss scaling overflows now and then; the scaler skips that step and lowers the scale.
        overflows = self.scaler.is_enabled() and self.scaler.get_scale() > _LEAST_LOSS_SCALE
        if not overflows and not torch.isfinite(norm):
            raise self._not_finite("gradient", batch)
        if self.settings.gradient_clip_norm is not None:
            torch.nn.utils.clip_grads_with_norm_(parameters, self.settings.gradient_clip_norm, norm)
        self.phase = "update"
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=self.graph is None)  # a graph writes where the gradients were
        if self.average:
            self.average.update(self.model, self.step)
        return float(norm)

    @property
    def epoch(self) -> float:
        """Passes over the training pairs made so far."""
        return self.step * self.settings.batch_size / self.stream.samples

    def _train_mode(self) -> None:
        self.network.train()
        if self.settings.freeze_batch_norm:
            set_batch_norm_to_eval(self.model)

    def _uncompiled(self, wanted: bool = True) -> AbstractContextManager[object]:
        """Run the network as it is written: hooks are called, other sizes than that of the crops do not recompile."""
        return uncompiled() if wanted and self.settings.compile else nullcontext()

    def _gradient_exchange(self, wanted: bool) -> AbstractContextManager[Any]:
        if wanted or not isinstance(self.network, DistributedDataParallel):
            return nullcontext()
        context: AbstractContextManager[Any] = self.network.no_sync()
        return context

    def _not_finite(self, what: str, batch: Batch) -> TrainingError:
        names = [name for share in distributed.gather_objects(list(batch["name"])) for name in share]
        return TrainingError(
            f"the {what} of step {self.step + 1} is not finite; the last checkpoint, of step {self.saved_step}, "
            f"is untouched; look at the pairs of this batch ({', '.join(names)}), or lower optimizer.learning_rate "
            "or set trainer.gradient_clip_norm"
        )

    def _all_agree_to_stop(self, stop: StopRequest) -> bool:
        return bool(distributed.sum_over_processes(torch.tensor(int(stop.requested))))

    # ----------------------------------------------------------------------------------------------------------------
    # telling

    def _tell(self, message: str, *values: object) -> None:
        if self.is_first:
            logger.info(message, *values)

    def _report(self, log: TrainingLog, values: Mapping[str, float]) -> None:
        log.advance(self.step, self.expected_steps, self.epoch, self.settings.batch_size, values)
        if self._due(self.settings.log_every_steps, self.step) or self.step == 1:
            log.scalars(self.step, values)
        if not math.isnan(values["train/end_point_error"]) and self.alarm.update(values["loss/total"]):
            logger.warning(
                "the loss has not fallen for %d steps (%.4g, and %.4g at best): lower optimizer.learning_rate, or look "
                "at the pictures in TensorBoard", self.alarm.window, self.alarm.mean, self.alarm.best,
            )  # fmt: skip

    # ----------------------------------------------------------------------------------------------------------------
    # validation

    def _due(self, every: int, step: int) -> bool:
        return every > 0 and step % every == 0

    def _due_or_epoch_ends(self, every: int) -> bool:
        """Return whether something is due after this step: every so many steps or, with 0, after each epoch."""
        if self.step in (0, self.total_steps):
            return True
        if every:
            return self._due(every, self.step)
        size, samples = self.settings.batch_size, self.stream.samples
        return self.step * size // samples > (self.step - 1) * size // samples

    def _validate_if_due(self, log: TrainingLog | None, stop: StopRequest) -> bool:
        """Validate if it is due at this step and was not done; return False if asked to stop in the middle."""
        if (
            self.validation_pairs is None
            or self.validated_step == self.step
            or not self._due_or_epoch_ends(self.settings.validate_every_steps)
        ):
            return True
        start = time.perf_counter()
        try:
            self.validation = self.validate(stop)
        except _StoppedInValidation:
            return False
        except Exception as cause:
            # A bad validation pair, of which all processes hear, or a lack of memory shall not cost what was trained.
            together = distributed.world_size() == 1 or isinstance(cause, (InputError, OSError))
            if together and self.step > self.saved_step:
                self._save("last.pt")
            if is_out_of_memory(cause):
                kept = (
                    f"last.pt holds the training up to step {self.saved_step}" if self.saved_step else "none is saved"
                )
                raise InputError(
                    f"out of memory in the validation after step {self.step}: give data.validation smaller pictures, "
                    f"or leave it out with data.validation=null; {kept}"
                ) from cause
            raise
        finally:
            self._train_mode()
        self.validated_step = self.step
        if log:
            log.validation(self.step, self.validation, time.perf_counter() - start)
            self._add_to_history()
        error = self.validation["end_point_error"]
        if not self.best or error < self.best["end_point_error"]:
            self.best = {"end_point_error": error, "step": self.step}
            self.best_settings = _validation_settings(self.config)
            self._save("best.pt")
        self._write_metrics_if_possible()
        return True

    def _add_to_history(self) -> None:
        assert self.history is not None
        wall, processor = zip(*self.step_times, strict=True) if self.step_times else ((), ())
        self.step_times.clear()
        on_gpu = self.device.type == "cuda"
        values = {
            "step": self.step, "epoch": self.epoch, **self.validation,
            "step_seconds": statistics.median(wall) if wall else None,
            "step_cpu_seconds": statistics.median(processor) if processor else None,
            "peak_memory_bytes": torch.cuda.max_memory_allocated(self.device) if on_gpu else None,
        }  # fmt: skip
        try:
            self.history.add(values)
        except InputError as error:  # a full disk is the checkpoints' to tell; the next line brings this one along
            logger.warning("%s", error)

    def validate(self, stop: StopRequest | None = None) -> dict[str, float]:
        """Evaluate the network (the averaged weights, if they are on) on the validation pairs.

        Args:
            stop: Alone, give up when asked to stop. With several processes the validation is finished first: they
                would wait for each other's results in vain.

        Returns:
            Metrics by name.
        """
        assert self.validation_pairs is not None
        model = (self.average.model if self.average else self.model).eval()
        distributed.broadcast_buffers(model)
        network = network_predictor(model, precision=self.settings.precision)

        def predict(left: Tensor, right: Tensor) -> Tensor:
            if stop is not None and stop.requested and distributed.world_size() == 1:
                raise _StoppedInValidation
            return network(left, right)

        protocol = ProtocolConfig(
            name="validation", max_disparity=float(self.config.model.max_disparity), averaging="pixel"
        )
        with self._uncompiled():
            metrics = evaluate(predict, self.validation_pairs, protocol, workers=self.config.data.workers).metrics
        if math.isnan(metrics["end_point_error"]):
            raise InputError("data.validation has no pixel with ground truth below model.max_disparity")
        return metrics

    # ----------------------------------------------------------------------------------------------------------------
    # checkpoints

    def _save_if_due(self, stopping: bool) -> None:
        names = []
        if self._due(self.settings.keep_every_steps, self.step):
            names.append(f"step_{self.step:07d}.pt")
        if stopping or self._due_or_epoch_ends(self.settings.checkpoint_every_steps):
            names.append("last.pt")  # the last: whoever resumes from it has passed this step for good
        if names:
            self._save(*names)

    def _save(self, *names: str) -> None:
        """Write the whole state under one or several names; all processes call it, the first writes.

        Raises:
            TrainingError: It could not be written; what was there before is untouched.
        """
        random_states = distributed.gather_objects(random_state())
        if not self.is_first:
            self._note_saved(names)
            return
        # Into memory first: PyTorch reports a full disk as an internal error, plain bytes as what it is.
        buffer = io.BytesIO()
        torch.save(
            {
                "model_config": to_plain(self.config.model),
                "model": self.model.state_dict(),
                "ema": self.average.model.state_dict() if self.average else None,
                "optimizer": self.optimizer.state_dict(),
                "scaler": self.scaler.state_dict(),
                "alarm": self.alarm.state_dict(),
                "ground_truth_seen": self.ground_truth_seen,
                "validated_step": self.validated_step,
                "best": self.best,
                "best_settings": self.best_settings,
                "random_states": random_states,
                **self._facts(),
            },
            buffer,
        )
        for name in names:
            path = self.output_dir / name
            try:
                if name == "best.pt" and self.best_kept_as is not None:
                    path.rename(self.output_dir / self.best_kept_as)
                    self.best_kept_as = None
                save_atomically(path, lambda temporary: temporary.write_bytes(buffer.getbuffer()))
            except OSError as error:
                raise TrainingError(
                    f"{path}: the checkpoint of step {self.step} could not be written ({error.strerror or error}); "
                    "what was there before is untouched: make room and start the same command again"
                ) from error
        self._note_saved(names)
        self.saved_at = _modification_time(self.output_dir / "last.pt")

    def _note_saved(self, names: Sequence[str]) -> None:
        if "last.pt" in names:  # from which the same command goes on
            self.saved_step = self.step

    def _is_in_output_dir(self, path: Path) -> bool:
        return path.resolve().parent == self.output_dir.resolve()

    def _holds_best(self, checkpoint: Path) -> bool:
        """Tell whether ``best.pt`` is the one that a checkpoint calls so."""
        best = self.output_dir / "best.pt"
        if not self.best or not self._is_in_output_dir(checkpoint) or not best.is_file():
            return False
        try:
            return bool(read_torch_file(best).get("step") == self.best["step"])
        except InputError:
            return False

    def _facts(self) -> dict[str, Any]:
        """Return what the record of the weights is made from, see ``fa_stereo.export``."""
        return {
            "config": to_plain(self.config),
            "step": self.step,
            "samples": self.stream.samples,
            "validation": self.validation,
            "history": self.history.lines if self.history else [],
            "seconds": None if self.seconds is None else self.seconds + time.perf_counter() - self.started,
            "seconds_in_steps": self.seconds_in_steps,
            "machines": self.machines,
            "processes": distributed.world_size(),
            "changes": self.changes,
            "rendered_pairs": self.rendered_pairs,
            "started_from": self.started_from,
        }

    def _find_checkpoint(self) -> Path | None:
        last = self.output_dir / "last.pt"
        named = expand_user(self.settings.resume or "auto")
        # Only the first process looks: on several nodes the others may not see its disk yet.
        self.saved_at = _modification_time(last)
        begun, own = distributed.broadcast_object((self.saved_at is not None, self._is_in_output_dir(named)))
        if self.settings.resume == "auto":
            return last if begun else None
        if self.settings.resume is not None:
            if not begun or own:  # that is going back
                return named
            self._tell("%s is there already: going on from it, not from %s", last, named)
            return last
        if begun:
            raise InputError(
                f"{last}: there is a run already; go on with trainer.resume=auto, or choose another output_dir"
            )
        return None

    def _restore(self, path: Path) -> None:
        state = self._read_checkpoint(path)
        missing = {"model_config", "model", "optimizer", "scaler", "step", "random_states", "config"} - state.keys()
        if missing:
            raise InputError(
                f"{path}: not a training checkpoint (no {sorted(missing)[0]!r}); use init_from for weights"
            )
        changed = self._check_agreement(path, state)
        self.model.load_state_dict(state["model"])
        if self.average:
            self.average.model.load_state_dict(state["ema"] or state["model"])
        settings = [
            {key: value for key, value in group.items() if key not in ("params", "lr")}  # every step sets its rate
            for group in self.optimizer.param_groups
        ]
        for group, own in zip(state["optimizer"]["param_groups"], settings, strict=True):
            group["fused"] = own["fused"]  # tells on which device its counters are loaded
        self.optimizer.load_state_dict(state["optimizer"])
        for group, own in zip(self.optimizer.param_groups, settings, strict=True):
            group.update(own)  # decay rates and the like are this run's: those that were saved may have been changed
        if state["scaler"]:  # empty where precision was not fp16
            self.scaler.load_state_dict(state["scaler"])
        same_loss = not any(key.startswith("loss.") for key in changed)
        if same_loss:  # another's is not to be compared with the best so far
            self.alarm.load_state_dict(state["alarm"])
        self.step = self.saved_step = state["step"]
        self.ground_truth_seen = state.get("ground_truth_seen", True)  # older checkpoints do not say
        self.validated_step = state["validated_step"]
        self.validation, self.best = state["validation"], state["best"]
        self.lines = state.get("history", None if self._is_in_output_dir(path) else [])
        self.best_settings = state.get("best_settings", {})  # older checkpoints do not have them
        if not distributed.broadcast_object(self.is_first and self._holds_best(path)):
            self.best = {}  # its weights are not in this folder, or those of a run that went on from here are
        elif self.best and self._validates_otherwise(changed):
            self.best = {}  # errors cannot be compared
            self.best_kept_as = f"best_before_{self.step:07d}.pt"
            self._tell(
                "resuming with another validation: the best so far does not count, and is kept as %s",
                self.best_kept_as,
            )
        self.seconds, self.started_from = state.get("seconds"), state.get("started_from")
        self.seconds_in_steps = state.get("seconds_in_steps", self.seconds or 0.0)  # older checkpoints do not have it
        self.machines = list(dict.fromkeys([*state.get("machines", []), *self.machines]))
        self.changes = [
            *state.get("changes", []),
            *({"step": self.step, "key": key, "before": value} for key, value in changed.items() if self._trains(key)),
        ]
        if distributed.rank() < len(state["random_states"]):
            set_random_state(state["random_states"][distributed.rank()])

    def _trains(self, key: str) -> bool:
        """Tell whether another value of this key makes other weights."""
        if key in ("trainer.epochs", "trainer.max_steps", "trainer.max_minutes"):
            return self.config.schedule.kind not in ("constant", "multi_step")  # where it only goes on for longer
        beside = ("output_dir", "trainer.resume", "trainer.init_from", *WATCHING)
        return key not in beside and not key.startswith("data.validation.")

    def _validates_otherwise(self, changed: Iterable[str]) -> bool:
        """Tell whether the errors to come cannot be compared with the best one's, given the keys that have changed."""
        if self.validation_pairs is None:
            return False
        if not self.best_settings:
            return any(_changes_validation(key) for key in changed)
        now = _validation_settings(self.config)
        return any(_resolved(key, self.best_settings.get(key, x)) != _resolved(key, x) for key, x in now.items())

    def _read_checkpoint(self, path: Path) -> dict[str, Any]:
        """Return a checkpoint that only the first process reads: on several nodes the others may not have its disk."""
        state: dict[str, Any] | InputError = {}
        if self.is_first:
            try:
                state = read_torch_file(path)
            except InputError as error:
                state = error
        state = distributed.broadcast_object(state)
        if isinstance(state, InputError):
            raise state
        return state

    def _check_agreement(self, path: Path, state: Mapping[str, Any]) -> dict[str, Any]:
        """Refuse what would not be the same run; tell what else has changed, and return by key what it was."""
        before, now = flatten_used(state["config"]), flatten_used(to_plain(self.config))
        before = flatten(to_plain(TrainConfig())) | before  # with defaults for settings that came later
        changed = {key: before[key] for key in now if key in before and before[key] != now[key]}
        for key, value in changed.items():
            if key in _MUST_AGREE or (key.startswith("model.") and key not in _PREDICTION_KEYS):
                raise InputError(
                    f"{key} is {now[key]}, but {value} in the run to resume ({path}): set it back, or start "
                    "anew with init_from and another output_dir"
                )
        if state["samples"] != self.stream.samples:
            subject = "data.train and data.also have" if self.config.data.also else "data.train has"
            raise InputError(
                f"{subject} {self.stream.samples} pairs, but had {state['samples']} in the run to resume "
                f"({path}): restore the data, or start anew with init_from and another output_dir"
            )
        for key, value in changed.items():
            if key == "trainer.init_from" and now[key] is not None:
                self._tell("resuming the run, which is there already: init_from=%s is not used", now[key])
            elif key not in ("output_dir", "trainer.resume", "trainer.init_from"):
                self._tell("resuming with %s = %s (it was %s)", key, now[key], value)
        sources = [{key.split(".")[2] for key in flat if key.startswith("data.also.")} for flat in (now, before)]
        if sources[0] != sources[1]:
            self._tell("resuming with %d sources in data.also (there were %d)", *map(len, sources))
        return changed

    def _export(self) -> None:
        """Write the weights for use: the averaged ones, if they are on."""
        distributed.broadcast_buffers(self.model)
        if not self.is_first:
            return
        path = self.output_dir / "weights.safetensors"
        try:
            save_weights(self.average.model if self.average else self.model, path, training_record(self._facts()))
        except OSError as error:
            raise TrainingError(f"{path}: the weights could not be written ({error.strerror or error})") from error
        self._write_metrics_if_possible()
        self._tell("trained: %s", path)

    def _prepare_output_dir(self, held: ExitStack) -> None:
        try:
            self.output_dir.mkdir(parents=True, exist_ok=True)
            held.enter_context(sole_use(self.output_dir))
            if _modification_time(self.output_dir / "last.pt") != self.saved_at:
                raise InputError(
                    f"{self.output_dir}: another process has just trained on here: start the same command again"
                )
            self._write_metrics()  # tells now, not at the first checkpoint, that nothing can be written
        except OSError as error:
            raise InputError(
                f"{self.output_dir}: cannot be written ({error.strerror or error}): "
                "make room or choose another output_dir"
            ) from error
        for name in ("*.pt", "metrics.json", FILE_NAME, "weights.safetensors"):
            for half_written in self.output_dir.glob(f".{name}.*.tmp"):  # by a process that was killed
                half_written.unlink()

    def _write_metrics_if_possible(self) -> None:
        try:
            self._write_metrics()
        except OSError as error:  # a full disk is the checkpoints' to tell
            logger.warning("%s: cannot be written (%s)", self.output_dir / "metrics.json", error.strerror or error)

    def _write_metrics(self) -> None:
        if not self.is_first:
            return
        metrics = {
            "step": self.step, "epoch": self.epoch, "validated_step": self.validated_step,
            "validation": self.validation, "best": self.best,
        }  # fmt: skip
        text = json.dumps(metrics, indent=2) + "\n"
        self.output_dir.mkdir(parents=True, exist_ok=True)
        save_atomically(self.output_dir / "metrics.json", lambda temporary: temporary.write_bytes(text.encode()))


# --------------------------------------------------------------------------------------------------------------------
# what the loop is made of


class _StoppedInValidation(Exception):
    """Asked to stop while a validation was under way."""


def build_optimizer(config: OptimizerConfig, model: nn.Module) -> torch.optim.Optimizer:
    """Return the optimizer of all of a network's parameters; on a GPU Adam updates them in a few kernels."""
    parameters, rate, decay = list(model.parameters()), config.learning_rate, config.weight_decay
    if config.kind == "sgd":
        return torch.optim.SGD(parameters, rate, config.momentum, weight_decay=decay)
    kind = torch.optim.AdamW if config.kind == "adamw" else torch.optim.Adam
    fused = all(parameter.is_cuda for parameter in parameters) or None
    return kind(parameters, rate, (config.betas[0], config.betas[1]), weight_decay=decay, fused=fused)


def _modification_time(path: Path) -> int | None:
    return path.stat().st_mtime_ns if path.is_file() else None


def _validation_settings(config: TrainConfig) -> dict[str, Any]:
    """Return by full key what decides about the error of given weights."""
    return {key: value for key, value in flatten_used(to_plain(config)).items() if _changes_validation(key)}


def _changes_validation(key: str) -> bool:
    """Tell whether another value of this key makes other errors of the same weights."""
    harmless = "device", "cache_index", "layout"  # where pairs are rendered, or how they are found
    return key in _PREDICTION_KEYS or (key.startswith("data.validation.") and not key.endswith(harmless))


def _resolved(key: str, value: Any) -> Any:
    """Return a setting's value; a path without what it may be spelt by."""
    is_path = isinstance(value, str) and key.rpartition(".")[2] in ("root", "unused_files")
    return expand_user(value).resolve() if is_path else value


def _split_batch(batch: Batch, size: int | None) -> list[Batch]:
    """Cut a batch into micro-batches; the last may be smaller."""
    count = len(batch["name"])
    size = size or count
    return [{key: value[start : start + size] for key, value in batch.items()} for start in range(0, count, size)]


def _check_data(config: TrainConfig) -> None:
    for name, source in config.data.sources.items():
        if source.lacks_root:
            raise InputError(f"{name}.root must be given: the folder of the pairs, laid out as data/README.md says")
    for name in ("crop_height", "crop_width"):
        value = getattr(config.data.augmentation, name)
        if value % SIZE_MULTIPLE:
            raise InputError(
                f"data.augmentation.{name} must be a multiple of {SIZE_MULTIPLE} for training, got {value}"
            )


def _check_precision(config: TrainConfig, device: torch.device) -> None:
    # PyTorch 2.15's (oneDNN's) bf16 weight gradient of a padded 3x3x3 convolution over two slices holds whatever was in
    # memory. The hourglasses work on D/8 and D/16 slices.
    if device.type == "cpu" and config.trainer.precision == "bf16" and config.model.max_disparity < 48:
        raise InputError(
            "trainer.precision=bf16 on the CPU gives wrong gradients with model.max_disparity below 48 (a fault of the "
            "library underneath): use fp32 or a larger model.max_disparity"
        )
    if not computes_in_hardware(config.trainer.precision, device):
        logger.warning(
            "trainer.precision=%s is far slower than fp32 on this CPU, which has no hardware for it",
            config.trainer.precision,
        )


def _check_graph(config: TrainConfig, device: torch.device) -> None:
    if config.trainer.cuda_graph and device.type != "cuda":
        raise InputError(f"trainer.cuda_graph needs a GPU, but the device is {device.type}: set it to false")
    if config.trainer.cuda_graph and distributed.world_size() > 1:
        raise InputError("trainer.cuda_graph is for one process, and there are several: set it to false")


def _check_clock(config: TrainConfig) -> None:
    if config.trainer.max_minutes is not None and config.schedule.kind == "multi_step":
        raise InputError(
            "trainer.max_minutes does not go with schedule=multi_step, whose milestones are epochs: "
            "take schedule=cosine, linear, one_cycle or constant"
        )


def _how_rendered(config: DataConfig) -> dict[str, Any] | list[dict[str, Any] | None] | None:
    """Return the settings that lie beside rendered pairs on disk; with ``also``, those of every source, or None."""
    settings = [rendered_settings(source) for source in config.sources.values()]
    return settings if config.also and any(settings) else settings[0]


def _open_validation(config: DatasetConfig | None) -> Dataset[StereoSample] | None:
    if config is None or config.lacks_root:
        return None
    pairs = open_dataset(config)
    check_truth(pairs, "data.validation")
    return pairs


def _choose_device(name: str) -> torch.device:
    if name == "cpu" or (name == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise InputError(f"trainer.device={name}, but PyTorch finds no CUDA device: use trainer.device=cpu")
    device = torch.device("cuda", distributed.local_rank() % torch.cuda.device_count())
    if ":" in name:
        if distributed.world_size() > 1:
            raise InputError(
                f"trainer.device={name} is for one process: with several trainer.device=cuda gives each one"
            )
        device = choose_device(name)
        torch.cuda.set_device(device)
    return device
