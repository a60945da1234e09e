"""``fa-stereo compare-attention``: what every variant of attention costs as inputs grow, measured within a budget."""

from __future__ import annotations

import argparse
import itertools
import json
import math
import re
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fa_stereo.cli.options import parse_names, parse_size
from fa_stereo.cli.outputs import prepare_output_folder
from fa_stereo.cli.tables import duration, markdown_table
from fa_stereo.config import ATTENTION_SLOTS, PRECISIONS
from fa_stereo.errors import InputError
from fa_stereo.files import write_bytes

if TYPE_CHECKING:
    from fa_stereo.attention_profiling import Case

DESCRIPTION = """\
Measures variants of attention on growing inputs, each case in a process of its own whose memory is limited to the
budget: one that needs more ends as a row "OOM". The processes of a size take turns; medians are reported.

  --scope block     the block alone, on the map that it gets in its slot of the network: by default 4 x base channels, a
                    quarter of the picture's height and width (in the tables, positions is the size of that map, of
                    several slots' the largest)
  --scope features  the feature extractor with the block in its slots, on one picture
  --scope network   the whole network, on a pair; by default its training step on 256x512 crops

  time       median of the repetitions; training is a forward and a backward pass
  extra      largest memory beyond process, weights and inputs
  by formula what the closed form of the block alone gives for that, in training without the backward pass's own
  / FA       the same as a multiple of factorized attention's (on a network: of what attention adds)
  over none  that, less what it is without attention (variant none)
  used       largest memory beyond the process: what counts against the budget
  deviation  largest difference from the first variant in the list of the same function (non_local_materialized,
             _chunked and _fused; non_local_dot and factorized_dot), relative to the largest value: of what the block
             adds to its input, or in training to the gradient; else of the network's output

Layers that start at zero, so that a new block is the identity, are drawn at random here. On the CPU memory is what is
resident in the first run, for which the allocator keeps no large block that is free, and the limit is on all that is
allocated; on a GPU both are PyTorch's own count."""

_ATTENTION = "factorized,non_local_materialized,non_local_chunked,non_local_fused,axial_65"
DEFAULT_VARIANTS = {"block": _ATTENTION, "features": f"none,{_ATTENTION}", "network": f"none,{_ATTENTION}"}
DEFAULT_SIZES = {
    "block": "128x224,192x320,272x480,384x672,544x960,768x1344",
    "features": "128x224,192x320,272x480,384x672,544x960",
    "network": "256x512",
}
DEFAULT_MODES = {"block": "inference,training", "features": "inference,training", "network": "training"}
COLOURS = {
    "none": "#7f7f7f",
    "resblock": "#8c564b",
    "resblock_bottleneck": "#c49c94",
    "factorized": "#1f77b4",
    "factorized_dot": "#17becf",
    "non_local_materialized": "#d62728",
    "non_local_chunked": "#ff7f0e",
    "non_local_fused": "#9467bd",
    "non_local_dot": "#e377c2",
    "factorized_bottleneck": "#6baed6",
    "factorized_heads": "#08519c",
    "factorized_transformer": "#3182bd",
    "non_local": "#d62728",
    "non_local_bottleneck": "#fb6a4a",
    "non_local_heads": "#a50f15",
    "non_local_transformer": "#fc9272",
}
AXIAL_COLOURS = ("#2ca02c", "#98df8a", "#bcbd22", "#006400", "#dbdb8d")
UNITS = {"": 1, "MB": 10**6, "GB": 10**9, "MIB": 2**20, "GIB": 2**30}


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = argparse.ArgumentParser(
        prog="fa-stereo compare-attention",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--scope", default="block", choices=tuple(DEFAULT_SIZES))
    parser.add_argument(
        "--variants", metavar="LIST",
        help="any of conf/attention (none, factorized, factorized_heads, non_local_fused, axial_whole, ...), "
        f"non_local_materialized, axial_SPAN (default {DEFAULT_VARIANTS['network']}; in --scope block without none)",
    )  # fmt: skip
    parser.add_argument("--sizes", metavar="LIST", help="HEIGHTxWIDTH of pictures or crops, multiples of 16")
    parser.add_argument("--batches", default="1", metavar="LIST", help="maps, pictures or pairs at once")
    parser.add_argument("--modes", metavar="LIST", help="inference, training or both")
    parser.add_argument("--precisions", default="fp32", metavar="LIST", help="any of fp32,bf16,fp16 (autocast)")
    parser.add_argument("--budget", default="12GB", metavar="SIZE",
                        help="memory for weights, inputs and all that is computed (default 12GB)")  # fmt: skip
    parser.add_argument("--time-limit", type=float, default=120, metavar="SECONDS",
                        help="give a variant up when a run takes longer (default 120)")  # fmt: skip
    parser.add_argument("--search", action="store_true",
                        help="search the largest picture that fits, with the last size's proportions")  # fmt: skip
    parser.add_argument("--fit-batch", type=int, metavar="N",
                        help="compute memory at this batch from the measured batches, by a straight line")  # fmt: skip
    parser.add_argument("--base-channels", type=int, default=32, metavar="C", help="of the network (default 32)")
    parser.add_argument("--key-channels", type=int, metavar="B", help="b and k (default 2 x base channels)")
    parser.add_argument("--value-channels", type=int, metavar="M",
                        help="of all variants (default: B of *_bottleneck, else those of the map)")  # fmt: skip
    parser.add_argument("--heads", type=int, metavar="H", help="default 1; of axial*, *_heads and *_transformer 8")
    parser.add_argument("--slots", default="res4", metavar="LIST", help="where the network has blocks (default res4)")
    parser.add_argument("--max-disparity", type=int, default=192, metavar="PX", help="of the whole network")
    parser.add_argument("--activation-checkpointing", action="store_true", help="in the whole network's training step")
    parser.add_argument("--device", default="auto", help="auto (default), cpu, cuda or cuda:N")
    parser.add_argument("--threads", type=int, metavar="N", help="of the CPU")
    parser.add_argument("--repeats", type=int, default=3, metavar="N",
                        help="timed runs, after one to warm up; 0 times that one (default 3)")  # fmt: skip
    parser.add_argument("-o", "--output", metavar="FOLDER", help="write attention.json, .md and .png there")
    return parser


def main(argv: list[str]) -> int:
    """Run the command; see ``DESCRIPTION``."""
    arguments = build_parser().parse_args(argv)
    groups = plan(arguments)
    output = Path(arguments.output) if arguments.output else None
    if output:
        prepare_output_folder(output)

    from tqdm import tqdm

    from fa_stereo.attention_profiling import compare, find_largest, fit_batches, growth
    from fa_stereo.machine import describe_machine

    report: dict[str, Any] = {
        "command": " ".join(["fa-stereo", "compare-attention", *argv]),
        "date": time.strftime("%Y-%m-%d"),
        "machine": describe_machine() | ({"threads": arguments.threads} if arguments.threads else {}),
        "scope": arguments.scope,
        "budget_bytes": parse_bytes(arguments.budget),
        "rows": [],
    }
    runs = sum(len(cases) for cases in groups) * (arguments.repeats + 1)
    with tqdm(total=runs, desc="compare-attention", unit="run", disable=None) as progress:
        slow: set[tuple[str, str, str]] = set()
        for cases in groups:
            outcomes = measure_group(cases, slow, arguments, progress.update)
            report["rows"] += compare(cases, outcomes)
    report["growth"] = growth(report["rows"])
    if arguments.fit_batch:
        report["fits"] = fit_batches(report["rows"], arguments.fit_batch, report["budget_bytes"])
    if arguments.search:
        starts = {(case.variant, case.mode, case.precision): case for cases in groups for case in cases}
        with tqdm(desc="search", unit="run", disable=None) as progress:
            report["largest"] = [
                find_largest(case, arguments.time_limit, progress=progress.update) for case in starts.values()
            ]
    text = format_report(report)
    print(text)
    if output:
        write_bytes(output / "attention.json", json.dumps(report, indent=2).encode())
        write_bytes(output / "attention.md", (text + "\n").encode())
        plot_report(report, output / "attention.png")
        print("\n" + "\n".join(str(output / f"attention.{suffix}") for suffix in ("json", "md", "png")))
    return 1 if any(row["status"] == "failed" for row in report["rows"]) else 0


def plan(arguments: argparse.Namespace) -> list[list[Case]]:
    """Return the cases to measure, in groups to be compared, smaller inputs first.

    Raises:
        InputError: An option makes no sense.
    """
    from fa_stereo.attention_profiling import MODES, Case, variant_config
    from fa_stereo.inference import choose_device

    if arguments.repeats < 0 or not 0 < arguments.time_limit <= threading.TIMEOUT_MAX:
        raise InputError(
            f"--repeats must not be negative, --time-limit must be positive and at most {threading.TIMEOUT_MAX:.0f}"
        )
    if arguments.activation_checkpointing and arguments.scope != "network":
        raise InputError(f"--activation-checkpointing changes nothing in --scope {arguments.scope}: leave it out")
    for option in ("base_channels", "key_channels", "value_channels", "heads", "fit_batch", "threads"):
        value = getattr(arguments, option)
        if value is not None and value < 1:
            raise InputError(f"--{option.replace('_', '-')} must be positive, got {value}")
    variants = parse_names(arguments.variants or DEFAULT_VARIANTS[arguments.scope], None, "--variants")
    modes = parse_names(arguments.modes or DEFAULT_MODES[arguments.scope], MODES, "--modes")
    precisions = parse_names(arguments.precisions, PRECISIONS, "--precisions")
    slots = parse_names(arguments.slots, ATTENTION_SLOTS, "--slots")
    batches = [_number(text, "--batches") for text in arguments.batches.split(",")]
    sizes = [parse_size(text) for text in (arguments.sizes or DEFAULT_SIZES[arguments.scope]).split(",")]
    if arguments.fit_batch and len(set(batches)) < 2:
        raise InputError("--fit-batch draws a line through measured batches: give two or more, such as --batches 1,2,4")
    key_channels = arguments.key_channels or 2 * arguments.base_channels
    configs = {
        variant: variant_config(variant, key_channels, arguments.heads, value_channels=arguments.value_channels)
        for variant in variants
    }
    device, budget_bytes = str(choose_device(arguments.device)), parse_bytes(arguments.budget)
    inputs = sorted(itertools.product(sizes, batches), key=lambda entry: math.prod(entry[0]) * entry[1])
    return [
        [
            Case(
                variant, configs[variant], arguments.scope, mode, *size, batch, precision,
                base_channels=arguments.base_channels, slots=slots, max_disparity=arguments.max_disparity,
                activation_checkpointing=arguments.activation_checkpointing,
                device=device, threads=arguments.threads, budget_bytes=budget_bytes,
            )
            for precision in precisions
            for variant in variants
        ]
        for mode in modes
        for size, batch in inputs
    ]  # fmt: skip


def measure_group(
    cases: Sequence[Case],
    slow: set[tuple[str, str, str]],
    arguments: argparse.Namespace,
    progress: Any,
) -> list[Any]:
    """Measure a group, but for the variants that took too long on a smaller input; ``slow`` keeps account of them."""
    from fa_stereo.attention_profiling import Outcome, measure

    keys = [(case.variant, case.mode, case.precision) for case in cases]
    run = [case for case, key in zip(cases, keys, strict=True) if key not in slow]
    measured = iter(measure(run, arguments.repeats, arguments.time_limit, progress))
    skipped = Outcome("too_slow", f"a smaller input took more than {arguments.time_limit:g} s")
    outcomes = [skipped if key in slow else next(measured) for key in keys]
    slow |= {key for key, outcome in zip(keys, outcomes, strict=True) if outcome.status == "too_slow"}
    progress((len(cases) - len(run)) * (arguments.repeats + 1))
    return outcomes


def parse_bytes(text: str) -> int:
    """Return a size in bytes: 12GB (10^9), 12GiB (2^30), 500MB, or plain bytes.

    Raises:
        InputError: It is none.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Z]*)", text.strip().upper())
    if match is None or match[2] not in UNITS or float(match[1]) == 0:
        raise InputError(f"--budget is a size such as 12GB, 11.5GiB or 800MB, got {text!r}")
    return int(float(match[1]) * UNITS[match[2]])


def _number(text: str, option: str) -> int:
    if not text.strip().isdecimal():
        raise InputError(f"{option} takes whole numbers separated by commas, got {text!r}")
    return int(text)


# --------------------------------------------------------------------------------------------------------------------
# text


def format_report(report: dict[str, Any]) -> str:
    """Return the report as tables for the terminal, and for Markdown."""
    machine = report["machine"]
    gpus = f", {', '.join(machine['gpus'])}" if machine["gpus"] else ""
    cores = f"{machine['threads']} of {machine['cores']} cores"
    cpu = f"{machine['cpu']} ({machine['cpu_capability']}, {cores})"
    parts = [
        f"`{report['command']}`, {report['date']}\n"
        f"{cpu}{gpus}, PyTorch {machine['torch']}; scope {report['scope']}, budget {_bytes(report['budget_bytes'])}"
    ]
    for mode in dict.fromkeys(row["mode"] for row in report["rows"]):
        parts.append(_measured_table([row for row in report["rows"] if row["mode"] == mode], report))
    if any(entry["time_exponent"] is not None for entry in report["growth"]):
        parts.append(_growth_table(report["growth"]))
    if report.get("largest"):
        parts.append(_largest_table(report["largest"]))
    if report.get("fits"):
        parts.append(_fit_table(report["fits"]))
    return "\n\n".join(parts)


def _measured_table(rows: list[dict[str, Any]], report: dict[str, Any]) -> str:
    block = report["scope"] == "block"
    header = ["input", "positions", "variant", "time", "time / FA", "extra", "by formula" if block else "over none",
              "memory / FA", "used", "deviation"]  # fmt: skip
    cells = []
    for row in rows:
        reference = next(
            (
                other
                for other in rows
                if other["variant"] == "factorized"
                and all(other[key] == row[key] for key in ("height", "width", "batch", "precision"))
                and other["status"] == "measured"
            ),
            {},
        )
        memory = "attention_bytes" if "attention_bytes" in row and not block else "extra_bytes"
        cells.append(
            [
                f"{row['batch']}x{row['height']}x{row['width']}",
                f"{row['positions']:,}",
                _label(row),
                _time_or_status(row),
                _ratio(row.get("seconds"), reference.get("seconds")),
                _bytes(row["extra_bytes"]),
                _by_formula(row) if block else _bytes(row.get("attention_bytes")),
                _ratio(row.get(memory), reference.get(memory)),
                _bytes(row["used_bytes"]),
                f"{row['deviation']:.0e}" if "deviation" in row else "",
            ]
        )
    return f"**{rows[0]['mode']}**\n\n" + markdown_table(header, cells, left=3)


def _label(row: dict[str, Any]) -> str:
    return str(row["variant"]) + ("" if row["precision"] == "fp32" else f" {row['precision']}")


def _time_or_status(row: dict[str, Any]) -> str:
    if row["status"] == "measured":
        return duration(row["seconds"])
    if row["status"] == "out_of_memory":
        return "OOM" + _of_machine(row)
    return str(row["reason"]) if row["status"] == "too_slow" else f"failed: {row['reason']}"


def _of_machine(row: dict[str, Any]) -> str:
    return f" (at {_bytes(row['limit_bytes'])}, all the machine had)" if row["limited_by"] == "machine" else ""


def _by_formula(row: dict[str, Any]) -> str:
    if row["formula_bytes"] is None:
        return ""
    return f"{'over ' if row['mode'] == 'training' else ''}{_bytes(row['formula_bytes'])}"


def _growth_table(entries: list[dict[str, Any]]) -> str:
    def exponent(value: float | None) -> str:
        return "" if value is None else f"N^{value:.2f}"

    cells = [
        [
            entry["mode"],
            _label(entry),
            *(text for key in ("time", "memory")
              for text in (exponent(entry[f"{key}_exponent"]), str(entry[f"{key}_points"]))),
        ]
        for entry in entries
    ]  # fmt: skip
    title = "**Growth** with N positions (lines fitted to the logarithms of what was measured)"
    return f"{title}\n\n" + markdown_table(
        ["mode", "variant", "time", "inputs", "extra memory", "inputs"], cells, left=2
    )


def _largest_table(entries: list[dict[str, Any]]) -> str:
    cells = []
    for entry in entries:
        if entry["status"] == "out_of_memory":
            why = "OOM" + _of_machine(entry)
        else:
            why = entry["reason"] or ""
        cells.append(
            [
                entry["mode"],
                _label(entry),
                "x".join(map(str, [entry["batch"], *entry["fits"]])) if entry["fits"] else "none",
                f"{entry['positions']:,}" if entry["fits"] else "",
                "x".join(map(str, [entry["batch"], *entry["fails"]])) if entry["fails"] else "",
                why,
            ]
        )
    header = ["mode", "variant", "largest that fits", "positions", "does not", "why"]
    return "**Largest input**, by search\n\n" + markdown_table(header, cells, left=2)


def _fit_table(entries: list[dict[str, Any]]) -> str:
    cells = [
        [
            entry["mode"],
            _label(entry),
            f"{entry['height']}x{entry['width']}",
            ", ".join(map(str, entry["measured_batches"])),
            f"{_bytes(entry['fixed_bytes'])} + {_bytes(entry['bytes_per_sample'])} x batch",
            _bytes(entry["largest_error_bytes"]),
            _bytes(entry["used_bytes"]),
            str(entry["largest_batch"]),
        ]
        for entry in entries
    ]
    header = ["mode", "variant", "input", "measured at", "line", "off by up to", f"batch {entries[0]['batch']}",
              "largest batch in the budget"]  # fmt: skip
    return "**Computed, not measured**: memory used at other batches, by straight lines\n\n" + markdown_table(
        header, cells, left=3
    )


def _bytes(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value / 1e9:.2f} GB" if abs(value) >= 1e9 else f"{value / 1e6:.1f} MB"


def _ratio(value: float | None, reference: float | None) -> str:
    if value is None or not reference or reference < 0 or value < 0:
        return ""
    ratio = value / reference
    return f"{ratio:.0f}" if ratio >= 10 else f"{ratio:.2g}" if ratio < 1 else f"{ratio:.1f}"


# --------------------------------------------------------------------------------------------------------------------
# plot


def plot_report(report: dict[str, Any], path: Path) -> None:
    """Draw time and memory over positions, or over the batch where there is one size, all axes logarithmic."""
    import io

    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = report["rows"]
    modes = list(dict.fromkeys(row["mode"] for row in rows))
    by_batch = len({row["positions"] for row in rows}) == 1 and len({row["batch"] for row in rows}) > 1
    figure = Figure(figsize=(11, 0.9 + 4.1 * len(modes)), layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(len(modes), 2, squeeze=False)
    block = report["scope"] == "block"
    memory = ("extra_bytes", "memory beyond weights and input") if block else ("used_bytes", "memory used")
    for mode, line in zip(modes, grid, strict=True):
        for axes, (key, title) in zip(line, (("seconds", "time"), memory), strict=True):
            budget = None if key == "seconds" else report["budget_bytes"]
            _draw_panel(axes, [row for row in rows if row["mode"] == mode], key, by_batch, budget)
            axes.set_title(f"{title}, {mode}", fontsize=10)
    product = " x batch" if any(row["batch"] > 1 for row in rows) else ""
    for axes in grid[-1]:
        axes.set_xlabel("batch" if by_batch else "positions of the map" + product)
    handles, labels = grid[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(4, len(labels)), fontsize=8, frameon=False)
    machine = report["machine"]
    name = ", ".join(machine["gpus"]) or f"{machine['cpu']} ({machine['threads']} threads)"
    scope = {"block": "Attention block alone", "features": "Feature extractor", "network": "Whole network"}
    size = f", {rows[0]['height']}x{rows[0]['width']}" if by_batch else ""
    figure.suptitle(f"{scope[report['scope']]}{size}: {name}, PyTorch {machine['torch']}", fontsize=10)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120)
    write_bytes(path, buffer.getvalue())


def _draw_panel(axes: Any, rows: list[dict[str, Any]], key: str, by_batch: bool, budget_bytes: int | None) -> None:
    """Draw one quantity of all variants; what ran out of memory or time is a mark at the upper edge."""
    from matplotlib.ticker import FuncFormatter, NullLocator

    variants = list(dict.fromkeys((row["variant"], row["precision"]) for row in rows))
    axial = [variant for variant, _ in variants if variant.startswith("axial")]
    marks: dict[float, int] = {}
    for variant, precision in variants:
        own = [row for row in rows if (row["variant"], row["precision"]) == (variant, precision)]
        colour = COLOURS.get(variant) or AXIAL_COLOURS[axial.index(variant) % len(AXIAL_COLOURS)]
        label = _label(own[0]).replace("_", " ")
        points = [(_abscissa(row, by_batch), row[key]) for row in own if row["status"] == "measured" and row[key]]
        style = {"fp32": "-", "bf16": "--", "fp16": ":"}[precision]
        axes.plot(*zip(*points, strict=True) if points else ([], []), style, marker="o", markersize=4, color=colour,
                  label=label)  # fmt: skip
        for row in own:
            if row["status"] in ("out_of_memory", "too_slow"):
                x = _abscissa(row, by_batch)
                height = 0.965 - 0.05 * marks.get(x, 0)
                marks[x] = marks.get(x, 0) + 1
                word = "OOM" if row["status"] == "out_of_memory" else "too slow"
                axes.annotate(f"× {word}", (x, height), xycoords=("data", "axes fraction"), color=colour, fontsize=8,
                              ha="center", va="center", fontweight="bold",
                              bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.5})  # fmt: skip
    axes.set_xscale("log")
    axes.set_yscale("log")
    ticks = sorted({_abscissa(row, by_batch) for row in rows})
    axes.set_xticks(ticks, [f"{tick:,.0f}" for tick in ticks], fontsize=8)
    axes.xaxis.set_minor_locator(NullLocator())
    axes.tick_params(axis="y", labelsize=8)
    axes.set_xlim(ticks[0] / 1.25, ticks[-1] * 1.25)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: _tick(value, key)))
    axes.grid(True, which="major", color="0.9", linewidth=0.8)
    axes.spines[["top", "right"]].set_visible(False)
    low, high = axes.get_ylim()
    if budget_bytes and (marks or high > budget_bytes / 10):
        high = max(high, 1.5 * budget_bytes)
        axes.axhline(budget_bytes, color="black", linestyle="--", linewidth=0.8, zorder=1)
        axes.annotate(f"budget {_bytes(budget_bytes)}", (0.01, budget_bytes), xycoords=("axes fraction", "data"),
                      xytext=(0, 3), textcoords="offset points", fontsize=8)  # fmt: skip
    if marks:  # room for them above the curves
        high *= (high / low) ** (0.06 * max(marks.values()) + 0.04)
    axes.set_ylim(low, high)
    if not by_batch and len(ticks) > 1:
        _draw_slopes(axes, [row for row in rows if row["status"] == "measured" and row[key]], key)


def _draw_slopes(axes: Any, rows: list[dict[str, Any]], key: str) -> None:
    """Draw what N and N^2 would look like, through the middle of the factorized and of the materialized curve."""
    for variant, power in (("factorized", 1), ("non_local_materialized", 2)):
        points = sorted((_abscissa(row, False), row[key]) for row in rows if row["variant"] == variant)
        if points:
            x, y = points[len(points) // 2]
            ends = axes.get_xlim()
            axes.plot(ends, [y * (end / x) ** power for end in ends], ":", color="0.6", linewidth=1, zorder=1,
                      scalex=False, scaley=False, label="N and N²" if power == 1 else None)  # fmt: skip


def _abscissa(row: dict[str, Any], by_batch: bool) -> float:
    return float(row["batch"] if by_batch else row["positions"] * row["batch"])


def _tick(value: float, key: str) -> str:
    if key == "seconds":
        return f"{value:g} s" if value >= 1 else f"{1000 * value:g} ms"
    return f"{value / 1e9:g} GB" if value >= 1e9 else f"{value / 1e6:g} MB"
