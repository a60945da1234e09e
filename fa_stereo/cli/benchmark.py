"""``fa-stereo benchmark``: the network's fast path against the plain one, in time, memory and deviation."""

from __future__ import annotations

import argparse
import dataclasses
import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fa_stereo.cli.options import parse_names, parse_size
from fa_stereo.cli.outputs import prepare_output_folder
from fa_stereo.cli.predictors import add_weights_arguments, named_weights
from fa_stereo.cli.tables import duration, markdown_table
from fa_stereo.config import INFERENCE_PRECISIONS, PRECISIONS
from fa_stereo.errors import InputError
from fa_stereo.files import write_bytes

if TYPE_CHECKING:
    import torch

    from fa_stereo.profiling import Task

DESCRIPTION = """\
Measures the parts of the network, inference as a whole, and a training step (forward and backward), each computed
plainly (cost volume and upsampled scores stored, as the formulas read) and fast, as the commands run it: on a CPU with
glibc told to keep freed memory (--tuned-allocator: in the plain path too). Every variant runs in a process of its own;
the processes take turns; medians are reported.

  time       median of the repetitions; speedups refer to the plain path's first precision, or as --speedup-over says
  pairs/s    of inference and training
  peak       largest memory: resident, of the whole process; on a GPU what PyTorch allocated
  extra      that, less what process, weights and inputs take
  deviation  of the output from the plain one in the first precision: px for network, pairs and regression, else
             relative to its largest value; of the network it says something only with trained weights (--weights,
             --checkpoint); --plain-precisions fp64,fp32 gives that from float64, the plain path's own too

All parts are of one size, as PSMNet's are; only --pairs are predicted at every size that belongs to the weights.
Low precision is autocast in the plain path, and in the fast path weights of that type (in training autocast too);
mixed is bf16 after features in fp32. A training step in fp16 is measured on a GPU alone.
--pairs measures inference on pictures of your own too, whatever their sizes: above all how far low precision moves
disparity in px on real ones. --compile and --cuda-graph (on a GPU) measure the fast path in these ways as well."""

PLAIN_PRECISIONS = ("fp64", *PRECISIONS)
IN_PIXELS = ("network", "regression", "pairs")
COLOURS = {"plain": "#9aa5b1", "fast": "#1f77b4", "compiled": "#2a9d8f", "graph": "#8e6bbf"}
WITH_RATE = ("network", "training_step", "pairs")


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = argparse.ArgumentParser(
        prog="fa-stereo benchmark", description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--parts", default="all", metavar="LIST",
        help="any of features,first_convolution,aggregation,regression,network,training_step,pairs",
    )  # fmt: skip
    parser.add_argument("--sizes", default="544x960", metavar="LIST", help="HEIGHTxWIDTH of pictures, multiples of 16")
    parser.add_argument("--batch", type=int, default=1, metavar="N", help="pairs at once in inference")
    parser.add_argument("--training-size", default="256x512", metavar="HxW", help="crop of the training step")
    parser.add_argument("--training-batch", type=int, default=1, metavar="N", help="crops at once in the training step")
    parser.add_argument("--activation-checkpointing", action="store_true", help="in the fast training step")
    parser.add_argument("--freeze-batch-norm", action="store_true", help="in the training step, plain and fast")
    parser.add_argument("--precisions", default="fp32", metavar="LIST",
                        help="of the fast path: any of fp32,bf16,fp16,mixed")  # fmt: skip
    parser.add_argument("--plain-precisions", default="fp32", metavar="LIST",
                        help="of the plain path: any of fp32,bf16,fp16, or fp64 before another; the first is the "
                             "reference of the deviations (default fp32)")  # fmt: skip
    parser.add_argument(
        "--speedup-over", metavar="NAME",
        help="the precision of the plain path that speedups refer to (default: its first but fp64)",
    )  # fmt: skip
    parser.add_argument("--compile", action="store_true", help="also measure the fast path through torch.compile")
    parser.add_argument(
        "--cuda-graph", action="store_true", help="also measure the network and the training step as a CUDA graph"
    )
    parser.add_argument(
        "--pairs", nargs=2, metavar=("LEFT", "RIGHT"),
        help="pictures, folders or quoted glob patterns; needs trained weights",
    )  # fmt: skip
    add_weights_arguments(parser, default="fresh ones, of the full model")
    parser.add_argument(
        "--base-channels", type=int, metavar="C", help="width of a model with fresh weights (default 32)"
    )
    parser.add_argument("--max-disparity", type=int, metavar="PX", help="search range, a multiple of 16")
    parser.add_argument("--device", default="auto", help="auto (default), cpu, cuda or cuda:N")
    parser.add_argument("--threads", type=int, metavar="N", help="of the CPU")
    parser.add_argument("--repeats", type=int, default=5, metavar="N", help="timed repetitions, after one to warm up")
    parser.add_argument("--tuned-allocator", action="store_true",
                        help="let glibc keep freed memory in the plain path too (MALLOC_MMAP_MAX_=0 ...)")  # fmt: skip
    parser.add_argument("-o", "--output", metavar="FOLDER", help="write benchmark.json and benchmark.png there")
    return parser


def main(argv: list[str]) -> int:
    """Run the command; see ``DESCRIPTION``."""
    arguments = build_parser().parse_args(argv)
    groups = plan(arguments)
    output = Path(arguments.output) if arguments.output else None
    if output:
        prepare_output_folder(output)

    from tqdm import tqdm

    from fa_stereo.machine import describe_machine
    from fa_stereo.profiling import TUNED_ALLOCATOR, compare, measure

    report: dict[str, Any] = {
        "command": " ".join(["fa-stereo", "benchmark", *argv]),
        "date": time.strftime("%Y-%m-%d"),
        "machine": describe_machine() | ({"threads": arguments.threads} if arguments.threads else {}),
        "rows": [],
    }
    environment = TUNED_ALLOCATOR if arguments.tuned_allocator else {}
    wanted = arguments.speedup_over or _reference_precision(arguments)
    runs = sum(len(tasks) for tasks in groups) * (arguments.repeats + 1)
    with tqdm(total=runs, desc="benchmark", unit="run", disable=None) as progress:
        for tasks in groups:
            measurements = measure(tasks, arguments.repeats, environment, progress.update)
            candidates = [i for i, task in enumerate(tasks) if task.path == "plain" and task.precision != "fp64"]
            base = next((i for i in candidates if tasks[i].precision == wanted), candidates[0])
            rows = compare(measurements, relative=tasks[0].part not in IN_PIXELS, base=base)
            for task, row in zip(tasks, rows, strict=True):
                if task.part in WITH_RATE:
                    row["pairs_per_second"] = task.samples / row["seconds"]
                report["rows"].append(dataclasses.asdict(task) | row)
            if output:  # after every group, so that what was measured is there whatever becomes of the next
                write_bytes(output / "benchmark.json", json.dumps(report, indent=2).encode())
                plot_report(report, output / "benchmark.png")
    print(format_report(report))
    if output:
        print(f"\n{output / 'benchmark.json'}\n{output / 'benchmark.png'}")
    return 0


def plan(arguments: argparse.Namespace) -> list[list[Task]]:
    """Return the tasks to measure, in groups to be compared, the reference first in each.

    Raises:
        InputError: An option makes no sense.
    """
    from fa_stereo.inference import choose_device
    from fa_stereo.profiling import Task

    device = choose_device(arguments.device)
    parts = _parts(arguments)
    _check(arguments, parts, device.type)
    common: dict[str, Any] = {
        **_network(arguments, device), "max_disparity": arguments.max_disparity, "device": str(device),
        "threads": arguments.threads,
    }  # fmt: skip
    groups = []
    for part in parts:
        variants = _variants(arguments, part)
        missing = None
        if all(path == "plain" for path, _ in variants):
            missing = f"--precisions {arguments.precisions}"
        elif not any(path == "plain" and precision != "fp64" for path, precision in variants):
            missing = f"--plain-precisions {arguments.plain_precisions}"
        if missing and arguments.parts == "all":
            continue
        if missing:
            raise InputError(f"{part} is not measured in {missing} on {device}: name another precision")
        checkpointing = part == "training_step" and arguments.activation_checkpointing
        frozen = part == "training_step" and arguments.freeze_batch_norm
        groups += [
            [
                Task(
                    part,
                    path,
                    precision,
                    activation_checkpointing=checkpointing and path in ("fast", "graph"),
                    freeze_batch_norm=frozen,
                    **inputs,
                    **common,
                )
                for path, precision in variants
            ]
            for inputs in _inputs(arguments, part)
        ]
    return groups


def _parts(arguments: argparse.Namespace) -> tuple[str, ...]:
    from fa_stereo.profiling import PARTS

    if arguments.parts == "all":
        return tuple(part for part in PARTS if part != "pairs" or arguments.pairs)
    parts = parse_names(arguments.parts, PARTS, "--parts")
    if ("pairs" in parts) != (arguments.pairs is not None):
        raise InputError("--parts pairs and --pairs LEFT RIGHT need each other: give both or neither")
    return parts


def _check(arguments: argparse.Namespace, parts: tuple[str, ...], device_type: str) -> None:
    """Refuse what makes no sense, or would be ignored."""
    from fa_stereo.profiling import COMPILED_PARTS, GRAPHED_PARTS

    for option in ("repeats", "batch", "training_batch", "threads", "base_channels"):
        value = getattr(arguments, option)
        if value is not None and value < 1:
            raise InputError(f"--{option.replace('_', '-')} must be positive, got {value}")
    if arguments.max_disparity is not None and (arguments.max_disparity < 16 or arguments.max_disparity % 16):
        raise InputError(f"--max-disparity must be a positive multiple of 16, got {arguments.max_disparity}")
    if arguments.cuda_graph and device_type != "cuda":
        raise InputError(f"--cuda-graph needs a GPU, but the device is {device_type}")
    for wanted, option, where in (
        (arguments.compile, "--compile", COMPILED_PARTS),
        (arguments.cuda_graph, "--cuda-graph", GRAPHED_PARTS),
        (arguments.activation_checkpointing, "--activation-checkpointing", ("training_step",)),
        (arguments.freeze_batch_norm, "--freeze-batch-norm", ("training_step",)),
    ):
        if wanted and not {*where} & {*parts}:
            raise InputError(f"{option} changes none of --parts {arguments.parts}: add one of {', '.join(where)}")
    plain = parse_names(arguments.plain_precisions, PLAIN_PRECISIONS, "--plain-precisions")
    if plain == ("fp64",) or "fp64" in plain[1:]:
        raise InputError(
            f"--plain-precisions names fp64, the reference, before others, got {arguments.plain_precisions}"
        )
    if arguments.speedup_over is not None and arguments.speedup_over not in {*plain} - {"fp64"}:
        raise InputError(f"--speedup-over must be one of --plain-precisions but fp64, got {arguments.speedup_over}")


def _reference_precision(arguments: argparse.Namespace) -> str:
    """Return the precision of the plain path that speedups refer to where nothing else is asked for."""
    plain = parse_names(arguments.plain_precisions, PLAIN_PRECISIONS, "--plain-precisions")
    return next(name for name in plain if name != "fp64")


def _network(arguments: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """Return which network is measured."""
    from fa_stereo.models.checkpoint import load_model
    from fa_stereo.weights import find_checkpoint

    weights = named_weights(arguments)
    if weights is None:
        return {"weights": None, "base_channels": arguments.base_channels or 32}
    if arguments.base_channels is not None:
        raise InputError("--base-channels is for fresh weights: leave it out, or the weights")
    file = find_checkpoint(weights, device)
    return {"weights": str(file), "base_channels": load_model(file).config.base_channels}


def _variants(arguments: argparse.Namespace, part: str) -> list[tuple[str, str]]:
    """Return paths and precisions in which a part is to be measured, the reference first."""
    from fa_stereo.inference import choose_device
    from fa_stereo.profiling import COMPILED_PARTS, GRAPHED_PARTS

    precisions = parse_names(arguments.precisions, INFERENCE_PRECISIONS, "--precisions")
    plain_precisions = parse_names(arguments.plain_precisions, PLAIN_PRECISIONS, "--plain-precisions")
    if part in ("features", "first_convolution", "aggregation", "training_step"):  # mixed is nothing new there
        precisions = tuple(name for name in precisions if name != "mixed")
    if part == "training_step":
        plain_precisions = tuple(name for name in plain_precisions if name != "fp64")
    if part == "training_step" and choose_device(arguments.device).type == "cpu":
        # Without hardware for it, convolutions take minutes backward.
        precisions, plain_precisions = (
            tuple(name for name in names if name != "fp16") for names in (precisions, plain_precisions)
        )
    if part == "regression":  # computed in float32 whatever the precision of the rest
        precisions = ("fp32",)
        plain_precisions = ("fp64", "fp32") if "fp64" in plain_precisions else ("fp32",)
    paths = {"plain": plain_precisions, "fast": precisions}
    if arguments.compile and part in COMPILED_PARTS:
        paths["compiled"] = precisions
    if arguments.cuda_graph and part in GRAPHED_PARTS:
        paths["graph"] = precisions
    return [(path, precision) for path in paths for precision in paths[path]]


def _inputs(arguments: argparse.Namespace, part: str) -> list[dict[str, Any]]:
    """Return what a part is to be measured on: sizes, or given pictures."""
    if part == "pairs":
        from fa_stereo.data.pairs import pair_pictures

        if named_weights(arguments) is None:
            raise InputError("--pairs needs trained weights: add --weights small, for example")
        return [{"pictures": [(str(p.left_path), str(p.right_path)) for p in pair_pictures(*arguments.pairs)]}]
    training = part == "training_step"
    sizes = [arguments.training_size] if training else arguments.sizes.split(",")
    batch = arguments.training_batch if training else arguments.batch
    return [{"height": height, "width": width, "batch": batch} for height, width in map(parse_size, sizes)]


def format_report(report: dict[str, Any]) -> str:
    """Return the report as a table for the terminal, and for Markdown."""
    machine = report["machine"]
    header = ["part", "size", "path", "time", "speedup", "pairs/s", "peak", "extra", "deviation, largest", "mean"]
    rows = []
    for row in report["rows"]:
        unit = " px" if row["part"] in IN_PIXELS else ""
        rate = f"{row['pairs_per_second']:.3g}" if "pairs_per_second" in row else ""
        deviations = [f"{row[key]:.2g}{unit}" if key in row else "" for key in ("largest_deviation", "mean_deviation")]
        memory = [_gigabytes(row[key]) for key in ("peak_bytes", "extra_bytes")]
        speed = [duration(row["seconds"]), f"{row['speedup']:.1f}x", rate]
        path = f"{row['path']} {row['precision']}" + (", recomputing" if row["activation_checkpointing"] else "")
        path += ", batch norm frozen" if row["freeze_batch_norm"] else ""
        rows.append([row["part"], _size_label(row), path, *speed, *memory, *deviations])
    return "\n".join(
        [
            f"`{report['command']}`, {report['date']}",
            ", ".join([*machine["gpus"], _describe_cpu(machine), f"PyTorch {machine['torch']}"]),
            "",
            markdown_table(header, rows, left=3),
        ]
    )


def _gigabytes(count: int) -> str:
    return f"{count / 1e9:.2f} GB"


def _size_label(row: dict[str, Any]) -> str:
    if row["part"] == "pairs":
        return f"{len(row['pictures'])} given"
    return f"{row['batch']}x{row['height']}x{row['width']}"


def _describe_cpu(machine: dict[str, Any]) -> str:
    return f"{machine['cpu']} ({machine['cpu_capability']}, threads: {machine['threads']})"


def plot_report(report: dict[str, Any], path: Path) -> None:
    """Write a bar chart of time and memory, one row of two panels for each part and size."""
    import io

    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    groups: dict[str, list[dict[str, Any]]] = {}
    for row in report["rows"]:
        groups.setdefault(f"{row['part'].replace('_', ' ')}\n{_size_label(row)}", []).append(row)
    bars = [len(rows) for rows in groups.values()]
    figure = Figure(figsize=(9, 0.9 + 0.24 * sum(bars) + 0.2 * len(bars)), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(len(groups), 2, squeeze=False, gridspec_kw={"height_ratios": [n + 0.6 for n in bars]})
    for (name, rows), (times, memories) in zip(groups.items(), panels, strict=True):
        speedups = ["", *(f"  ({row['speedup']:.1f}x)" for row in rows[1:])]
        labels = [duration(row["seconds"]) + speedup for row, speedup in zip(rows, speedups, strict=True)]
        _draw_bars(times, rows, "seconds", labels)
        _draw_bars(memories, rows, "extra_bytes", [_gigabytes(row["extra_bytes"]) for row in rows])
        times.set_ylabel(name, rotation=0, ha="right", va="center", fontsize=9, labelpad=8)
        times.set_yticks(range(len(rows)), [f"{row['path']} {row['precision']}" for row in rows], fontsize=8)
        memories.set_yticks([])
    panels[0][0].set_title("time (lengths compare within a part)", fontsize=9)
    panels[0][1].set_title("memory beyond weights and inputs", fontsize=9)
    machine = report["machine"]
    place = ", ".join(machine["gpus"]) or _describe_cpu(machine)
    figure.suptitle(f"{place}, PyTorch {machine['torch']}, {report['date']}", fontsize=9)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120)
    write_bytes(path, buffer.getvalue())


def _draw_bars(axes: Any, rows: list[dict[str, Any]], key: str, labels: list[str]) -> None:
    values = [row[key] for row in rows]
    bars = axes.barh(range(len(rows)), values, 0.75, color=[COLOURS[row["path"]] for row in rows])
    axes.bar_label(bars, labels, padding=3, fontsize=8)
    axes.set_xlim(0, 1.35 * max(*values, 1e-9))  # room for the label of the longest
    axes.invert_yaxis()
    axes.set_xticks([])
    axes.tick_params(length=0)
    axes.spines[["top", "right", "bottom"]].set_visible(False)
