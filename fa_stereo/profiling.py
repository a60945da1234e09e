"""Time, memory and deviation of the network's fast path against the plain one, part by part.

Each variant (plain or fast, a precision, an environment) of each part runs in a process of its own, so that one's
memory and caches do not help or hurt another's, and the processes take turns, one repetition at a time, so that
whatever else the machine does meets all alike. Medians are reported.
"""

from __future__ import annotations

import dataclasses
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from torch import Tensor

from fa_stereo.compilation import compile_network
from fa_stereo.config import INFERENCE_PRECISIONS, AttentionConfig, ModelConfig, RenderConfig
from fa_stereo.cuda_graph import GraphedPass, record_cuda_graph
from fa_stereo.errors import InputError
from fa_stereo.machine import compute_float32_in_full
from fa_stereo.measuring import MeasuringProcess
from fa_stereo.memory import keep_freed_memory, memory_in_use, peak_memory, return_freed_memory, start_peak
from fa_stereo.models.batch_norm import set_batch_norm_to_eval
from fa_stereo.models.checkpoint import load_model
from fa_stereo.models.cost_volume import convolve_cost_volume, convolve_cost_volume_reference
from fa_stereo.models.memory_format import to_channels_last
from fa_stereo.models.optimized import DTYPES, autocast, optimize_for_inference
from fa_stereo.models.psmnet import PSMNet, build_model

PARTS = ("features", "first_convolution", "aggregation", "regression", "network", "training_step", "pairs")
"""What can be measured: the parts of inference, inference as a whole on a rendered pair, one forward and backward pass,
and inference on all of some given pairs, one after another."""

PATHS = ("plain", "fast", "compiled", "graph")
"""How it can be computed: plainly, fast, and fast through torch.compile or as a CUDA graph."""

BENCHMARK_PRECISIONS = ("fp64", *INFERENCE_PRECISIONS)
"""What can be computed in: float64, to tell how exact the others are, for the plain path alone."""

COMPILED_PARTS = ("features", "aggregation", "network", "training_step", "pairs")
"""Parts in which there is anything for torch.compile."""

GRAPHED_PARTS = ("network", "training_step")
"""Parts that can run as a CUDA graph, on CUDA."""

TUNED_ALLOCATOR = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": "20000000000"}
"""Environment in which glibc keeps freed memory, instead of asking the system for zeroed pages again each time."""


@dataclass(frozen=True)
class Task:
    """What one process measures.

    Attributes:
        part: One of ``PARTS``.
        path: One of ``PATHS``; ``compiled`` for ``COMPILED_PARTS`` alone, ``graph`` for ``GRAPHED_PARTS``.
        precision: fp32; bf16 or fp16 are weights of that type in the fast path's inference, else autocast;
            ``mixed`` for the fast path of the whole network alone, fp64 for the plain path's inference alone.
        height: In pixels, of a picture or training crop.
        width: In pixels.
        batch: Pairs at once.
        weights: A checkpoint; None for fresh random weights of the default model.
        base_channels: Of the network; with weights only told.
        max_disparity: Search range in pixels; None for the model's own.
        device: cpu or cuda.
        threads: Of the CPU; None for PyTorch's choice.
        activation_checkpointing: In the training step.
        freeze_batch_norm: In the training step.
        pictures: Files of left and right views for the part ``pairs``, which has no other size.
        example: File of ``example_pair`` in NumPy's format, so that rendering it is no part of what is measured; None
            renders it in the measuring process.
    """

    part: str
    path: str
    precision: str = "fp32"
    height: int = 544
    width: int = 960
    batch: int = 1
    weights: str | None = None
    base_channels: int = 32
    max_disparity: int | None = None
    device: str = "cpu"
    threads: int | None = None
    activation_checkpointing: bool = False
    freeze_batch_norm: bool = False
    pictures: tuple[tuple[str, str], ...] = ()
    example: str | None = None

    def __post_init__(self) -> None:
        for name, choices in (("part", PARTS), ("path", PATHS), ("precision", BENCHMARK_PRECISIONS)):
            if getattr(self, name) not in choices:
                raise InputError(f"{name} must be one of {', '.join(choices)}, got {getattr(self, name)!r}")
        if self.precision == "fp64" and (self.path != "plain" or self.part == "training_step"):
            raise InputError(f"fp64 is for the plain path's inference, got {self.part} ({self.path})")
        for name in ("height", "width"):
            if getattr(self, name) < 16 or getattr(self, name) % 16:
                raise InputError(f"the {name} must be a positive multiple of 16, got {getattr(self, name)}")

    @property
    def samples(self) -> int:
        """Pairs that one repetition computes."""
        return len(self.pictures) if self.part == "pairs" else self.batch


@dataclass(frozen=True)
class Measurement:
    """What one process found.

    Attributes:
        seconds: Of every repetition, after one to warm up.
        peak_bytes: Largest memory: of the process (resident), or on the GPU what PyTorch allocated.
        extra_bytes: That, less what was in use before the first run: process, weights and inputs (of a graph in
            training, gradients too).
        result: The last output, float32 (float64 in fp64), to compare variants; None for the training step.
    """

    seconds: list[float]
    peak_bytes: int
    extra_bytes: int
    result: np.ndarray[Any, np.dtype[np.floating]] | None

    @property
    def median_seconds(self) -> float:
        """Median time of a repetition."""
        return statistics.median(self.seconds)


# --------------------------------------------------------------------------------------------------------------------
# in the measuring process


def build_run(task: Task) -> Callable[[], Tensor | None]:
    """Return a function that runs the task's part once on inputs that are the same for every variant."""
    torch.manual_seed(0)
    device = torch.device(task.device)
    model = _build_model(task).to(device)
    if task.part == "training_step":
        return _training_step(task, model)
    lowered = task.path == "plain" and task.precision not in ("fp32", "fp64")
    if task.path != "plain":
        model = optimize_for_inference(model, task.precision)
    elif task.precision == "fp64":
        model = model.double()
    if task.path == "compiled":
        compile_network(model)
    model.plain = task.path == "plain"
    with torch.inference_mode():
        compute = _inference_part(task, model)

    def run() -> Tensor:
        with torch.inference_mode(), torch.autocast(device.type, dtype=DTYPES.get(task.precision), enabled=lowered):
            return compute()

    return run


def _build_model(task: Task) -> PSMNet:
    if task.weights is None:
        attention = AttentionConfig(key_channels=2 * task.base_channels)
        model = build_model(ModelConfig(base_channels=task.base_channels, attention=attention))
    else:
        model = load_model(Path(task.weights))  # a file, whatever it is called
    if task.max_disparity is not None:
        model.set_max_disparity(task.max_disparity)
    if task.part != "pairs":  # which are predicted as they always are
        model.set_prediction(halve_from_px=0, enlarge_below_px=0)
    return model.eval()


def _inference_part(task: Task, model: PSMNet) -> Callable[[], Tensor]:
    plain = task.path == "plain"
    full = torch.float64 if task.precision == "fp64" else torch.float32  # of pictures and scores
    dtype = full if plain else DTYPES[task.precision]
    config, generator = model.config, torch.Generator().manual_seed(1)
    channels, depths = config.base_channels, config.max_disparity // 4
    height4, width4 = task.height // 4, task.width // 4

    def random(*shape: int, scale: float = 1.0, memory_format: torch.memory_format = torch.contiguous_format) -> Tensor:
        values = (scale * torch.randn(*shape, generator=generator)).to(task.device, dtype)
        return values if plain else values.contiguous(memory_format=memory_format)

    if task.part in ("network", "features"):
        left, right = (view.to(full) for view in _example_views(task))
        if task.part == "features":
            return lambda: torch.cat(model.extract_features(left, right))
        network = record_cuda_graph(model, left, right) if task.path == "graph" else model
        return lambda: network(left, right)
    if task.part == "pairs":
        pairs = [[view.to(task.device, full) for view in read_views(*files)] for files in task.pictures]
        return lambda: torch.cat([model(left, right).flatten() for left, right in pairs])
    if task.part == "first_convolution":
        left, right = (
            random(task.batch, channels, height4, width4, memory_format=torch.channels_last) for _ in range(2)
        )
        weight = random(channels, 2 * channels, 3, 3, 3, scale=(54 * channels) ** -0.5)
        convolve = convolve_cost_volume_reference if plain else convolve_cost_volume
        return lambda: convolve(left, right, weight, depths)
    if task.part == "aggregation":
        volume = random(task.batch, channels, depths, height4, width4, memory_format=torch.channels_last_3d).relu()
        # The fast path overwrites its input: each repetition gets another copy.
        return lambda: model.aggregation(volume if plain else volume.clone(), plain=plain)[-1]
    logits = 10 * torch.randn(task.batch, depths, height4, width4, generator=generator).to(task.device, full)
    if config.regression == "modal":
        return lambda: model.mode(logits, task.height, task.width)[0]
    return lambda: model.expectation(logits, task.height, task.width)


def _training_step(task: Task, model: PSMNet) -> Callable[[], None]:
    device = torch.device(task.device)
    model.train()
    model.plain = task.path == "plain"
    model.activation_checkpointing = task.activation_checkpointing
    if task.freeze_batch_norm:
        set_batch_norm_to_eval(model)
    if task.path != "plain":
        to_channels_last(model)
    if task.path == "compiled":
        compile_network(model)
    model.features.pyramid.freeze_lonely_values(task.batch, task.height // 4, task.width // 4)
    left, right = _example_views(task)
    torch.backends.cudnn.benchmark = True  # as in training

    def both_passes(left: Tensor, right: Tensor) -> tuple[Tensor, ...]:
        with autocast(device, task.precision):
            disparities = model(left, right).disparities
        loss = torch.stack([disparity.mean() for disparity in disparities]).sum()
        loss.backward()  # type: ignore[no-untyped-call]
        return (loss.detach(),)

    passes: Callable[..., tuple[Tensor, ...]] = both_passes
    if task.path == "graph":
        passes = GraphedPass(both_passes, model.parameters())
        for _ in range(GraphedPass.CALLS_BEFORE + 1):  # it is recorded with the last
            passes(left, right)

    def run() -> None:
        model.zero_grad(set_to_none=task.path != "graph")
        passes(left, right)

    return run


def _example_views(task: Task) -> list[Tensor]:
    if task.example is None:
        views = example_pair(task.height, task.width, task.batch)
    else:
        left, right = torch.from_numpy(np.load(task.example))
        views = left.repeat(task.batch, 1, 1, 1), right.repeat(task.batch, 1, 1, 1)
    return [view.to(task.device) for view in views]


def example_pair(height: int, width: int, batch: int) -> tuple[Tensor, Tensor]:
    """Return a rendered pair as normalised views [B, 3, H, W]."""
    from fa_stereo.data.rendered import RenderedPairs
    from fa_stereo.data.transforms import normalize_images

    pairs = RenderedPairs(RenderConfig(height=height, width=width, samples=1, max_disparity=min(192, width / 3)))
    left, right = (torch.from_numpy(view).permute(2, 0, 1)[None] for view in (pairs[0].left, pairs[0].right))
    return normalize_images(left).repeat(batch, 1, 1, 1), normalize_images(right).repeat(batch, 1, 1, 1)


def read_views(left: str, right: str) -> tuple[Tensor, Tensor]:
    """Read two pictures as normalised views [1, 3, H, W].

    Raises:
        InputError: A file is not there or no picture, or they differ in size.
    """
    from fa_stereo.data.formats import read_picture_pair
    from fa_stereo.data.transforms import normalize_images

    views = [torch.from_numpy(view).permute(2, 0, 1)[None] for view in read_picture_pair(left, right)]
    return normalize_images(views[0]), normalize_images(views[1])


def serve(task: Task, result_path: Path, requests: IO[str], replies: IO[str]) -> None:
    """Run the task once per line of ``requests``; after the last, report memory and store the output.

    Each run is answered by its seconds on a line of ``replies``, the end by ``{"peak_bytes", "extra_bytes"}``.
    """
    if task.threads is not None:
        torch.set_num_threads(task.threads)
    compute_float32_in_full()
    if task.device != "cpu":
        torch.cuda.set_device(torch.device(task.device).index or 0)  # what is synchronized and counted below
    if task.device == "cpu" and task.path != "plain":
        keep_freed_memory(whole=task.part == "training_step")  # as the commands do
    run = build_run(task)
    return_freed_memory()  # of loading, building and copying the network
    # A graph's memory is taken when it is recorded, and nothing more when it runs.
    before = memory_in_use(task.device) if task.path == "graph" else start_peak(task.device)
    result: Tensor | None = None
    print("ready", file=replies, flush=True)
    for _ in requests:
        result = None  # an old output is no memory that the run needs
        if task.device != "cpu":
            run()  # the memory given back below has to be asked for again, in no time of ours
            torch.cuda.synchronize()
        start = time.perf_counter()
        result = run()
        if task.device != "cpu":
            torch.cuda.synchronize()
        print(time.perf_counter() - start, file=replies, flush=True)
        if task.device != "cpu":
            torch.cuda.empty_cache()  # the other processes need the GPU's memory in their turn
    peak = peak_memory(task.device)
    if result is not None:
        result = result.to(torch.promote_types(result.dtype, torch.float32))
        np.save(result_path, result.cpu().contiguous().numpy())
    print(json.dumps({"peak_bytes": peak, "extra_bytes": max(peak - before, 0)}), file=replies, flush=True)


# --------------------------------------------------------------------------------------------------------------------
# in the reporting process


def measure(
    tasks: list[Task],
    repeats: int = 5,
    environment: dict[str, str] | None = None,
    progress: Callable[[], object] = lambda: None,
) -> list[Measurement]:
    """Measure tasks in turn, each in a process of its own; they start at once and exist side by side.

    Args:
        tasks: Variants to compare.
        repeats: Timed runs of each, after one to warm up.
        environment: Variables to set for the plain path, ``TUNED_ALLOCATOR`` for example.
        progress: Called after every run.

    Raises:
        InputError: A process failed: its last words say why.
    """
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="fa_stereo_benchmark_")))
        processes = [
            stack.enter_context(
                _Process(
                    _with_example(task, folder),
                    folder / str(number),
                    environment or {} if task.path == "plain" else {},
                )
            )
            for number, task in enumerate(tasks)
        ]
        for process in processes:  # which all start at once
            process.answer()  # when the network is built and the inputs are there
        seconds: list[list[float]] = [[] for _ in tasks]
        for _ in range(repeats + 1):
            for process, times in zip(processes, seconds, strict=True):
                times.append(process.run())
                progress()
        return [process.finish(times[1:]) for process, times in zip(processes, seconds, strict=True)]


def _with_example(task: Task, folder: Path) -> Task:
    """Return the task with the file of its example pair, rendered unless one of that size is in the folder."""
    if task.part not in ("network", "features", "training_step"):
        return task
    file = folder / f"example_{task.height}x{task.width}.npy"
    if not file.exists():
        np.save(file, torch.stack(example_pair(task.height, task.width, 1)).numpy())
    return dataclasses.replace(task, example=str(file))


class _Process(MeasuringProcess):
    """A process that measures a task."""

    def __init__(self, task: Task, folder: Path, environment: dict[str, str]) -> None:
        self.task = task
        folder.mkdir()
        super().__init__("fa_stereo.profiling", json.dumps(dataclasses.asdict(task)), folder, environment)

    def answer(self) -> str:
        """Return the next answer.

        Raises:
            InputError: The process ended instead.
        """
        answer = self.read()
        if answer is None:
            task, words = self.task, self.last_words().removeprefix("fa_stereo.errors.InputError: ")
            if words.startswith(("exit code", "ended by")):
                words += ", perhaps for want of memory"
            raise InputError(f"measuring {task.part} ({task.path}, {task.precision}) failed: {words}")
        return answer

    def run(self) -> float:
        """Return the seconds of another run."""
        self.request()
        return float(self.answer())

    def finish(self, seconds: list[float]) -> Measurement:
        """Return what was measured, with the seconds of the runs that count."""
        self.request_end()
        memory = json.loads(self.answer())
        return Measurement(seconds, memory["peak_bytes"], memory["extra_bytes"], self.result())


def compare(measurements: list[Measurement], *, relative: bool, base: int = 0) -> list[dict[str, Any]]:
    """Return plain data for each measurement, compared with the first, the reference.

    Args:
        measurements: Of variants of one part.
        relative: Give deviations of the output relative to the reference's largest absolute value, instead of as they
            are, which is in pixels for the network and the regression.
        base: Which of them speedups refer to.
    """
    reference = measurements[0]
    rows = []
    for measurement in measurements:
        row: dict[str, Any] = {
            "seconds": measurement.median_seconds,
            "all_seconds": measurement.seconds,
            "speedup": measurements[base].median_seconds / measurement.median_seconds,
            "peak_bytes": measurement.peak_bytes,
            "extra_bytes": measurement.extra_bytes,
        }
        if measurement.result is not None and reference.result is not None:
            deviation = np.abs(measurement.result - reference.result)
            unit = float(np.abs(reference.result).max()) if relative else 1.0
            row["largest_deviation"] = float(deviation.max()) / unit
            row["mean_deviation"] = float(deviation.mean()) / unit
        rows.append(row)
    return rows


if __name__ == "__main__":
    serve(Task(**json.loads(sys.argv[1])), Path(sys.argv[2]), sys.stdin, sys.stdout)
