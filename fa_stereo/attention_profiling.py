"""Attention measured: time, memory, deviation and largest input of every variant, within a memory budget.

Three scopes: the block alone on the map that it gets in the network, the feature extractor that holds it, and the whole
network. Each case (variant, inference or training step, size, precision) runs in a process of its own whose memory is
limited to the budget, so that a lack of memory is an error that the process reports, and never the system's. The
processes of a group take turns, one repetition at a time. Medians are reported.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from fa_stereo.attention import build_attention
from fa_stereo.attention.complexity import block_cost
from fa_stereo.config import PRECISIONS, AttentionConfig, ModelConfig
from fa_stereo.errors import InputError
from fa_stereo.machine import compute_float32_in_full
from fa_stereo.measuring import MeasuringProcess
from fa_stereo.memory import (
    MemoryLimit,
    is_out_of_memory,
    keep_large_blocks,
    peak_memory,
    return_large_blocks,
    start_peak,
)
from fa_stereo.models.features import SLOT_MAPS
from fa_stereo.models.memory_format import to_channels_last
from fa_stereo.models.optimized import autocast, optimize_for_inference
from fa_stereo.models.psmnet import StereoOutput, build_model

SCOPES = ("block", "features", "network")
"""Alone, inside the feature extractor, inside the whole network."""

MODES = ("inference", "training")
"""A forward pass without gradients; a forward and a backward pass."""

VARIANTS: dict[str, dict[str, Any]] = {
    "none": {"kind": "none"},
    "resblock": {"kind": "resblock"},
    "resblock_bottleneck": {"kind": "resblock_bottleneck"},
    "factorized": {"kind": "factorized"},
    "factorized_dot": {"kind": "factorized", "normalization": "dot"},
    "factorized_bottleneck": {"kind": "factorized", "bottleneck": True},
    "factorized_heads": {"kind": "factorized", "heads": 8},
    "factorized_transformer": {"kind": "factorized", "heads": 8, "transformer": True},
    "non_local": {"kind": "non_local"},
    "non_local_materialized": {"kind": "non_local"},
    "non_local_chunked": {"kind": "non_local", "computation": "chunked"},
    "non_local_fused": {"kind": "non_local", "computation": "fused"},
    "non_local_dot": {"kind": "non_local", "normalization": "dot"},
    "non_local_bottleneck": {"kind": "non_local", "bottleneck": True},
    "non_local_heads": {"kind": "non_local", "heads": 8},
    "non_local_transformer": {"kind": "non_local", "heads": 8, "transformer": True},
    "axial": {"kind": "axial", "heads": 8, "span": 65},
    "axial_whole": {"kind": "axial", "heads": 8},
}
"""Options of ``AttentionConfig`` by the names of conf/attention; beside these, axial_5, axial_17 and so on for a span.

``none`` is the baseline; ``non_local_materialized`` says what ``non_local`` is. A bottleneck has m = b or k channels,
which by default are half of the map's, as in the paper's table 10.
"""

SAME_FUNCTION = (
    ("non_local", "non_local_materialized", "non_local_chunked", "non_local_fused"),
    ("non_local_dot", "factorized_dot"),
)
"""Variants that compute one function: deviations are from the first of them that was measured."""

STARTUP_SECONDS = 60.0
"""Beside the limit of time, for a process to start and to build weights and inputs."""


def variant_config(
    variant: str, key_channels: int = 64, heads: int | None = None, value_channels: int | None = None
) -> AttentionConfig:
    """Return the configuration of a variant by its name.

    Args:
        variant: One of ``VARIANTS``, or axial_SPAN.
        key_channels: b or k.
        heads: h; None is the variant's own.
        value_channels: m; None is b or k for a bottleneck, no bottleneck for the others.

    Raises:
        InputError: There is no such variant, or the values do not go together.
    """
    axial = re.fullmatch(r"axial_(\d+)", variant)
    if axial is None and variant not in VARIANTS:
        raise InputError(f"there is no variant {variant!r}: choose from {', '.join(VARIANTS)}, axial_5, axial_17 ...")
    options = {**VARIANTS["axial"], "span": int(axial[1])} if axial else dict(VARIANTS[variant])
    if options.pop("bottleneck", False):
        options["value_channels"] = key_channels
    for key, value in (("heads", heads), ("value_channels", value_channels)):
        if value is not None:
            options[key] = value
    return AttentionConfig(key_channels=key_channels, **options)


@dataclass(frozen=True)
class Case:
    """What one process measures.

    Attributes:
        variant: Its name.
        attention: Its configuration.
        scope: One of ``SCOPES``.
        mode: One of ``MODES``.
        height: Of a picture in pixels, a multiple of 16; the block's map has a share of it (``SLOT_MAPS``).
        width: Likewise.
        batch: Maps, pictures or pairs at once.
        precision: fp32; bf16 and fp16 are autocast.
        base_channels: c of the network; the block's map has so many times c channels (``SLOT_MAPS``).
        slots: Of the network that hold a block; for the block alone one, whose map it gets.
        max_disparity: Search range of the whole network in pixels.
        activation_checkpointing: In the training step of the whole network.
        device: cpu, cuda or cuda:N.
        threads: Of the CPU; None for PyTorch's choice.
        budget_bytes: Memory that the process may take for weights, inputs and all that is computed.
    """

    variant: str
    attention: AttentionConfig
    scope: str = "block"
    mode: str = "inference"
    height: int = 544
    width: int = 960
    batch: int = 1
    precision: str = "fp32"
    base_channels: int = 32
    slots: tuple[str, ...] = ("res4",)
    max_disparity: int = 192
    activation_checkpointing: bool = False
    device: str = "cpu"
    threads: int | None = None
    budget_bytes: int = 12 * 10**9

    def __post_init__(self) -> None:
        for name, choices in (("scope", SCOPES), ("mode", MODES), ("precision", PRECISIONS)):
            if getattr(self, name) not in choices:
                raise InputError(f"{name} must be one of {', '.join(choices)}, got {getattr(self, name)!r}")
        for name in ("height", "width"):
            if getattr(self, name) < 16 or getattr(self, name) % 16:
                raise InputError(f"the {name} must be a positive multiple of 16, got {getattr(self, name)}")
        if self.scope == "block" and len(self.slots) != 1:
            raise InputError(f"the block alone has the map of one slot, got {', '.join(self.slots) or 'none'}")
        for name in ("batch", "budget_bytes"):
            if getattr(self, name) < 1:
                raise InputError(f"the {name.removesuffix('_bytes')} must be positive, got {getattr(self, name)}")
        self.model_config()  # refuses what no network can be built of

    @property
    def channels(self) -> int:
        """Channels of the block's map, the first one's."""
        return SLOT_MAPS[self.slots[0]][0] * self.base_channels

    @property
    def map_size(self) -> tuple[int, int]:
        """Height and width of the block's map, with several the largest one's."""
        scale = min(SLOT_MAPS[slot][1] for slot in self.slots)
        return self.height // scale, self.width // scale

    @property
    def positions(self) -> int:
        """Positions of the block's map, of one picture."""
        return math.prod(self.map_size)

    def model_config(self) -> ModelConfig:
        """Return the configuration of the network with the block."""
        return ModelConfig(
            base_channels=self.base_channels,
            max_disparity=self.max_disparity,
            attention=self.attention,
            attention_slots=list(self.slots),
        )

    def formula_bytes(self) -> int | None:
        """Return by closed form what the block alone needs in float32, beyond weights and input; None if unknown.

        In inference that is the peak; in training what is kept for the backward pass, a lower bound of the peak.
        """
        if self.scope != "block" or self.precision != "fp32" or self.attention.kind == "none":
            return None
        cost = block_cost(self.attention, self.channels, self.map_size, self.batch)
        return cost.inference_bytes if self.mode == "inference" else cost.training_bytes

    def to_json(self) -> str:
        """Return the case as text."""
        return json.dumps(dataclasses.asdict(self))

    @staticmethod
    def from_json(text: str) -> Case:
        """Return the case of ``to_json``."""
        values = json.loads(text)
        attention = AttentionConfig(**values.pop("attention"))
        return Case(**{**values, "attention": attention, "slots": tuple(values["slots"])})


# --------------------------------------------------------------------------------------------------------------------
# in the measuring process


@dataclass(frozen=True)
class Run:
    """A function to measure.

    Attributes:
        compute: Runs the case once and returns its output, or for the training step of the block the gradient of its
            input; None where there is nothing to compare.
        passed: Part of that which has only gone past the block, over its residual connection; None for nothing.
    """

    compute: Callable[[], Tensor | None]
    passed: Tensor | None = None


def build_run(case: Case) -> Run:
    """Return what to measure, on weights and inputs that are the same for all variants of the same function."""
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(1)

    def random(channels: int, height: int, width: int) -> Tensor:
        values = torch.randn(case.batch, channels, height, width, generator=generator)
        return values.to(case.device)

    if case.scope == "block":
        block = build_attention(case.attention, case.channels).to(case.device)
        randomize_zeros(block)
        x, gradient = random(case.channels, *case.map_size), random(case.channels, *case.map_size)
        if case.mode == "inference":
            return Run(_forward(case, block.eval(), lambda: block(x)), passed=x)
        x.requires_grad_()
        step = _step(case, block.train(), lambda: block(x), gradient)

        def gradient_step() -> Tensor | None:
            x.grad = None
            step()
            return x.grad

        return Run(gradient_step, passed=gradient)

    model = build_model(case.model_config())
    for block in model.features.attention.values():
        randomize_zeros(block)
    # what is in the pictures makes no difference to time and memory
    left, right = (random(3, case.height, case.width) for _ in range(2))
    if case.mode == "inference":
        model = optimize_for_inference(model.to(case.device))
        if case.scope == "features":
            return Run(_forward(case, model, lambda: model.features(left)))
        return Run(_forward(case, model, lambda: model(left, right)))
    to_channels_last(model.to(case.device)).train()
    model.activation_checkpointing = case.activation_checkpointing
    model.features.pyramid.freeze_lonely_values(case.batch, case.height // 4, case.width // 4)
    if case.scope == "features":
        gradient = random(case.base_channels, case.height // 4, case.width // 4)
        return Run(_step(case, model, lambda: model.features(left), gradient))

    def loss() -> Tensor:
        output = model(left, right)
        assert isinstance(output, StereoOutput)
        return torch.stack([disparity.mean() for disparity in output.disparities]).sum()

    return Run(_step(case, model, loss, None))


def _forward(case: Case, module: nn.Module, compute: Callable[[], Any]) -> Callable[[], Tensor]:
    module.requires_grad_(False)

    def forward() -> Tensor:
        with torch.inference_mode(), autocast(torch.device(case.device), case.precision):
            result: Tensor = compute()
            return result

    return forward


def _step(
    case: Case, module: nn.Module, compute: Callable[[], Any], gradient: Tensor | None
) -> Callable[[], Tensor | None]:
    def step() -> None:
        module.zero_grad()
        with autocast(torch.device(case.device), case.precision):
            output: Tensor = compute()
        torch.autograd.backward(output, None if gradient is None else gradient.to(output.dtype))

    return step


@torch.no_grad()
def randomize_zeros(block: nn.Module) -> None:
    """Draw the parameters of a block that start from zero, so that it computes something that can be compared."""
    for parameter in block.parameters():
        if not parameter.any():
            parameter.normal_(std=parameter.shape[-1] ** -0.5 if parameter.dim() > 1 else 1.0)


def serve(case: Case, result_path: Path, requests: IO[str], replies: IO[str]) -> None:
    """Run the case once per line of ``requests`` within its budget; after the last, report memory, store the output.

    The memory is that of the first run, for which every freed tensor's memory goes back to the system at once.

    Every reply is a line of JSON: ``{}`` when all is built, ``{"seconds"}`` after a run, and the memory at the end. If
    memory runs out, ``{"out_of_memory"}`` with the allocator's words comes in its place and ends everything.
    """

    def reply(**values: object) -> None:
        print(json.dumps(values), file=replies, flush=True)

    prefer_as_victim()
    compute_float32_in_full()
    if case.threads is not None:
        torch.set_num_threads(case.threads)
    return_large_blocks()
    prime(case)
    process_bytes = start_peak(case.device)
    limit = MemoryLimit(case.device, case.budget_bytes)
    memory: dict[str, Any] = {"limit_bytes": limit.bytes, "limited_by": limit.by}
    result: Tensor | None = None
    words: str | None = None
    try:
        run = build_run(case)
        before = start_peak(case.device)
        reply()
        for turn, _ in enumerate(requests):
            if turn == 0:
                limit.set(case.budget_bytes)  # by what is left now that the other processes are there
                memory = {"limit_bytes": limit.bytes, "limited_by": limit.by}
            result = None  # an old output is no memory that the run needs
            start = time.perf_counter()
            result = run.compute()
            if case.device != "cpu":
                torch.cuda.synchronize(case.device)
            reply(seconds=time.perf_counter() - start)
            if turn == 0:
                peak = peak_memory(case.device)
                memory |= {
                    "peak_bytes": peak,
                    "extra_bytes": max(peak - before, 0),
                    "used_bytes": max(peak - process_bytes, 0),
                }
                # It fits. From here on it is time that counts, and the allocator may do as it pleases.
                keep_large_blocks()
                limit.set(sys.maxsize)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        words = " ".join(str(error).split())
    limit.lift()
    if words is not None:
        reply(out_of_memory=words, **memory)
        return
    if result is not None:
        result = result.detach().float()
        if run.passed is not None:
            result = result - run.passed.detach()
        np.save(result_path, result.cpu().contiguous().numpy())
    reply(**memory)


def prime(case: Case) -> None:
    """Run a case on a tiny picture: loads libraries and starts threads, which belong to the process and not the case.

    Where that works, what fails on a larger picture fails for want of memory, also if it says only that it fails.
    """
    build_run(dataclasses.replace(case, height=32, width=32, batch=1)).compute()
    if case.device != "cpu":
        torch.cuda.empty_cache()


def prefer_as_victim() -> None:
    """Ask the system, should memory run out all the same, to end this process rather than anybody else's."""
    with suppress(OSError):  # not Linux
        Path("/proc/self/oom_score_adj").write_text("1000")


# --------------------------------------------------------------------------------------------------------------------
# in the reporting process


@dataclass(frozen=True)
class Outcome:
    """What became of a case.

    Attributes:
        status: ``measured``; ``out_of_memory``; ``too_slow``, a run took longer than the limit of time; ``failed``.
        reason: The allocator's or the process's last words, or the limit of time.
        seconds: Of every timed repetition.
        peak_bytes: Largest memory: of the process (resident), or on a GPU what PyTorch allocated.
        extra_bytes: That, less what was in use before the first run: process, weights and inputs.
        used_bytes: That, less what was in use before weights and inputs: what counts against the budget.
        limit_bytes: The limit that it ran under.
        limited_by: ``budget``, or ``machine`` where that has less memory.
        result: What the case computes, as float32, to compare variants; None if there is nothing to compare.
    """

    status: str
    reason: str = ""
    seconds: Sequence[float] = ()
    peak_bytes: int | None = None
    extra_bytes: int | None = None
    used_bytes: int | None = None
    limit_bytes: int | None = None
    limited_by: str | None = None
    result: NDArray[np.float32] | None = None

    @property
    def median_seconds(self) -> float:
        """Median time of a repetition."""
        return statistics.median(self.seconds)


def measure(
    cases: Sequence[Case],
    repeats: int = 3,
    time_limit: float = 120.0,
    progress: Callable[[], object] = lambda: None,
) -> list[Outcome]:
    """Measure cases, each in a process of its own.

    On the CPU all processes exist at once and take turns, so that whatever else the machine does meets all alike. On a
    GPU they come one after another: waiting, each would keep some of its memory.

    Args:
        cases: To compare.
        repeats: Timed runs of each, after one to warm up; 0 times that one.
        time_limit: Seconds for a run, after which the case is given up.
        progress: Called once a case and run, whether it ran or not.
    """
    if any(case.device != "cpu" for case in cases) and len(cases) > 1:
        return [measure([case], repeats, time_limit, progress)[0] for case in cases]
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="fa_stereo_attention_")))
        processes = [
            stack.enter_context(_Process(case, folder / str(number), time_limit)) for number, case in enumerate(cases)
        ]
        for process in processes:
            process.start()
        for _ in range(repeats + 1):
            for process in processes:
                process.run()
                progress()
        return [process.finish(warm_up=repeats > 0) for process in processes]


class _Process(MeasuringProcess):
    """A process that measures a case. Once it has ended early, nothing more is asked of it."""

    def __init__(self, case: Case, folder: Path, time_limit: float) -> None:
        self.time_limit = time_limit
        self.seconds: list[float] = []
        self.outcome: Outcome | None = None
        folder.mkdir()
        super().__init__("fa_stereo.attention_profiling", case.to_json(), folder)

    def start(self) -> None:
        """Wait until weights and inputs are built."""
        self._answer(self.time_limit + STARTUP_SECONDS)

    def run(self) -> None:
        """Have the case run once."""
        if self.outcome is None:
            self.request()
            answer = self._answer(self.time_limit)
            if self.outcome is None:
                self.seconds.append(answer["seconds"])

    def finish(self, *, warm_up: bool) -> Outcome:
        """Return what became of the case; ``warm_up`` leaves the first run's time out."""
        if self.outcome is None:
            self.request_end()
            memory = self._answer(self.time_limit)
            if self.outcome is None:
                return Outcome("measured", "", self.seconds[int(warm_up) :], **memory, result=self.result())
        return self.outcome

    def _answer(self, time_limit: float) -> dict[str, Any]:
        """Return the next answer; if there is none, or memory has run out, note the outcome."""
        try:
            line = self.read(time_limit)
        except TimeoutError:
            self.outcome = Outcome("too_slow", f"more than {self.time_limit:g} s")
            return {}
        if line is None:
            self.outcome = Outcome("failed", self.last_words())
            return {}
        answer: dict[str, Any] = json.loads(line)
        if "out_of_memory" in answer:
            self.outcome = Outcome("out_of_memory", answer.pop("out_of_memory"), **answer)
        return answer


def compare(cases: Sequence[Case], outcomes: Sequence[Outcome]) -> list[dict[str, Any]]:
    """Return plain data for each case of a group: same scope, mode, size and batch, precisions in the order of trust.

    Beside what was measured: ``attention_seconds`` and ``attention_bytes``, which are time and extra memory over the
    baseline without attention; ``deviation``, the largest difference from the first measured variant of the same
    function, ``deviation_from``, relative to that variant's largest absolute value (of the block alone: of what it
    adds to its input, or in training to the gradient that goes past it); and ``formula_bytes`` (``Case``).
    """
    measured = {
        (case.variant, case.precision): outcome
        for case, outcome in zip(cases, outcomes, strict=True)
        if outcome.status == "measured"
    }
    precisions = list(dict.fromkeys(case.precision for case in cases))
    rows = []
    for case, outcome in zip(cases, outcomes, strict=True):
        row: dict[str, Any] = {
            "variant": case.variant,
            **{key: getattr(case, key) for key in ("scope", "mode", "height", "width", "positions", "batch")},
            "precision": case.precision,
            "status": outcome.status,
            "reason": outcome.reason,
            **{key: getattr(outcome, key) for key in ("peak_bytes", "extra_bytes", "used_bytes")},
            "limit_bytes": outcome.limit_bytes,
            "limited_by": outcome.limited_by,
            "formula_bytes": case.formula_bytes(),
        }
        if outcome.status == "measured":
            row |= {"seconds": outcome.median_seconds, "all_seconds": list(outcome.seconds)}
            baseline = measured.get(("none", case.precision))
            if baseline is not None:
                assert outcome.extra_bytes is not None
                assert baseline.extra_bytes is not None
                row["attention_seconds"] = outcome.median_seconds - baseline.median_seconds
                row["attention_bytes"] = outcome.extra_bytes - baseline.extra_bytes
            same = next((group for group in SAME_FUNCTION if case.variant in group), (case.variant,))
            references = [(variant, precision) for precision in precisions for variant in same]
            reference = next(key for key in references if key in measured)
            if reference != (case.variant, case.precision) and outcome.result is not None:
                expected = measured[reference].result
                assert expected is not None
                difference, largest = np.abs(outcome.result - expected).max(), np.abs(expected).max()
                if difference > 0 or largest > 0:  # no attention adds 0 in every precision
                    row["deviation"] = float(difference / max(largest, np.finfo(np.float32).tiny))
                    row["deviation_from"] = " ".join(reference)
        rows.append(row)
    return rows


# --------------------------------------------------------------------------------------------------------------------
# what the measurements say


def growth(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return how time and extra memory of each variant grow: the exponent p of (positions x batch)^p.

    It is the slope of the line fitted by least squares to the logarithms, over the rows with a value above zero, and
    None for fewer than three.
    """
    found = []
    for (variant, mode, precision), group in _grouped(rows, ("variant", "mode", "precision")).items():
        entry: dict[str, Any] = {"variant": variant, "mode": mode, "precision": precision}
        for key, value in (("time", "seconds"), ("memory", "extra_bytes")):
            points = [(row["positions"] * row["batch"], row[value]) for row in group if row.get(value)]
            entry[f"{key}_points"] = len(points)
            slope = None
            if len({positions for positions, _ in points}) >= 3:
                positions, values = np.log(np.asarray(points, float)).T
                slope = float(np.polyfit(positions, values, 1)[0])
            entry[f"{key}_exponent"] = slope
        found.append(entry)
    return found


def fit_batches(rows: Sequence[dict[str, Any]], batch: int, budget_bytes: int) -> list[dict[str, Any]]:
    """Return the memory of a batch that was not measured, by a line fitted to the batches that were.

    Args:
        rows: Measured rows; those of fewer than two batches are passed over.
        batch: To extrapolate to.
        budget_bytes: What counts against it is memory for weights, inputs and all that is computed.

    Returns:
        Of each variant, mode, size and precision the line ``fixed_bytes + bytes_per_sample * batch``, its largest
        error at the measured batches, ``used_bytes`` at ``batch``, and the ``largest_batch`` within the budget: all of
        them computed, not measured.
    """
    found = []
    keys = ("variant", "mode", "height", "width", "precision")
    for key, group in _grouped([row for row in rows if row["status"] == "measured"], keys).items():
        batches, used = np.asarray([(row["batch"], row["used_bytes"]) for row in group], float).T
        if len(set(batches)) < 2:
            continue
        slope, fixed = np.polyfit(batches, used, 1)
        found.append(
            {
                **dict(zip(keys, key, strict=True)),
                "fixed_bytes": int(fixed),
                "bytes_per_sample": int(slope),
                "largest_error_bytes": int(np.abs(used - slope * batches - fixed).max()),
                "measured_batches": [int(value) for value in batches],
                "batch": batch,
                "used_bytes": int(fixed + slope * batch),
                "largest_batch": max(0, math.floor((budget_bytes - fixed) / slope)) if slope > 0 else None,
            }
        )
    return found


def _grouped(rows: Sequence[dict[str, Any]], keys: Sequence[str]) -> dict[tuple[Any, ...], list[dict[str, Any]]]:
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault(tuple(row[key] for key in keys), []).append(row)
    return groups


def find_largest(
    case: Case,
    time_limit: float = 120.0,
    precision: float = 1.1,
    progress: Callable[[], object] = lambda: None,
) -> dict[str, Any]:
    """Search the largest picture of a case's shape that fits its budget, one run each: doubling, then halving the gap.

    Args:
        case: Where to start, and the proportions.
        time_limit: Seconds after which a run is given up; then the search ends, with what fitted so far.
        precision: Ratio of the areas of the smallest that does not fit and the largest that does, at which to stop.
        progress: Called after each run.

    Returns:
        ``fits`` and ``fails``, height and width of either, or None; ``positions`` of the one that fits; why the other
        fails (``status``, ``reason``, ``limited_by``, ``limit_bytes``).
    """
    area, best, worst, ending = float(case.height * case.width), None, None, None
    while worst is None or best is None or worst.positions / best.positions > precision:
        candidate = _scaled(case, area)
        if candidate in (best, worst):
            break
        (outcome,) = measure([candidate], 0, time_limit, progress)
        if outcome.status == "measured":
            best = candidate
        else:
            worst, ending = candidate, outcome
            if outcome.status != "out_of_memory":
                break
        low, high = (float(end.height * end.width) if end else None for end in (best, worst))
        area = math.sqrt(low * high) if low and high else 2 * low if low else (high or 0.0) / 2
    return {
        **{key: getattr(case, key) for key in ("variant", "scope", "mode", "batch", "precision")},
        "fits": [best.height, best.width] if best else None,
        "positions": best.positions if best else None,
        "fails": [worst.height, worst.width] if worst else None,
        **{key: getattr(ending, key, None) for key in ("status", "reason", "limited_by", "limit_bytes")},
    }


def _scaled(case: Case, area: float) -> Case:
    """Return the case with a picture of about this area, in proportion."""
    scale = math.sqrt(area / (case.height * case.width))
    height, width = (max(16, 16 * round(scale * side / 16)) for side in (case.height, case.width))
    return dataclasses.replace(case, height=height, width=width)


if __name__ == "__main__":
    serve(Case.from_json(sys.argv[1]), Path(sys.argv[2]), sys.stdin, sys.stdout)
