"""``fa-stereo summarize``: runs of several variants and seeds as one table, one plot, and what they allow to say."""

from __future__ import annotations

import argparse
import io
import json
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fa_stereo.cli.outputs import prepare_output_folder
from fa_stereo.errors import InputError
from fa_stereo.files import write_bytes

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from fa_stereo.summary import Variant

DESCRIPTION = """\
Groups finished runs of 'fa-stereo train' that differ in their seed alone, and compares the groups by the last
validation of each run (not by the best one): mean and standard deviation over seeds, and the difference to a baseline
paired by seed, with its 95 % interval (Student's t). Writes summary.md, summary.json and summary.png.

  multiply-adds  of the inference of one pair, counted
  kept           from the forward for the backward pass, in a training step of the runs' crop, batch and precision,
                 counted: what attention adds to the memory of training
  step           median time of a training step as the runs recorded it, by the clock and in processor time (of all
                 threads); both mean little if other programs used the machine
  peak           most memory PyTorch allocated, as recorded on a GPU"""

METRICS = ("end_point_error", "bad_3")


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = argparse.ArgumentParser(
        prog="fa-stereo summarize", description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="+", metavar="RUN", help="folder of a run, of a sweep, or of several sweeps")
    parser.add_argument("-o", "--output", required=True, metavar="FOLDER", help="where the results go")
    parser.add_argument("--size", metavar="HxW", help="of pictures, for the multiply-adds (default: the runs' crop)")
    parser.add_argument("--baseline", metavar="NAME", help="variant to compare with, by its name in the table "
                        "(default: the one without attention, else the first)")  # fmt: skip
    parser.add_argument("--title", metavar="TEXT", help="of the plot")
    return parser


def main(argv: list[str]) -> int:
    """Run the command; see ``DESCRIPTION``."""
    arguments = build_parser().parse_args(argv)
    size = parse_size(arguments.size) if arguments.size else None
    output = Path(arguments.output)

    from fa_stereo.history import FILE_NAME
    from fa_stereo.summary import choose_baseline, find_runs, group_runs

    runs, unfinished = find_runs(arguments.runs)
    for folder in unfinished:
        reason = "is not finished" if (folder / FILE_NAME).exists() else "has no validation"
        print(f"fa-stereo summarize: {folder} {reason} and is left out", file=sys.stderr)
    if not runs:
        raise InputError(
            f"none of the {len(unfinished)} runs is finished: the same 'fa-stereo train' goes on with them"
        )
    variants = group_runs(runs)
    baseline = choose_baseline(variants, arguments.baseline)
    prepare_output_folder(output)
    report = make_report(variants, baseline, size)
    report["command"] = " ".join(["fa-stereo", "summarize", *argv])

    text = format_report(report)
    write_bytes(output / "summary.md", (text + "\n").encode())
    write_bytes(output / "summary.json", (json.dumps(report, indent=2) + "\n").encode())
    write_bytes(output / "summary.png", draw(report, arguments.title))
    print(text)
    print(f"\n{output / 'summary.md'}\n{output / 'summary.json'}\n{output / 'summary.png'}")
    return 0


def parse_size(text: str) -> tuple[int, int]:
    """Return height and width of pictures written as 544x960.

    Raises:
        InputError: They are not, or are not multiples of 16.
    """
    match = re.fullmatch(r"(\d+)x(\d+)", text.lower())
    if not match or any(int(side) < 16 or int(side) % 16 for side in match.groups()):
        raise InputError(f"--size must be HEIGHTxWIDTH in multiples of 16, such as 544x960, got {text!r}")
    return int(match[1]), int(match[2])


# --------------------------------------------------------------------------------------------------------------------
# the report as plain data


def make_report(variants: list[Variant], baseline: Variant, size: tuple[int, int] | None) -> dict[str, Any]:
    """Return everything the summary tells, as plain data."""
    from tqdm import tqdm

    from fa_stereo.summary import common_seeds

    others = [variant for variant in variants if variant is not baseline]
    comparisons = sum(len(common_seeds(variant, baseline)) > 1 for variant in others)
    rows = [
        describe(variant, baseline, size, max(comparisons, 1))
        for variant in tqdm([baseline, *others], desc="counting", disable=None)
    ]
    return {"baseline": baseline.label, "variants": rows, "remarks": remarks(rows)}


def describe(variant: Variant, baseline: Variant, size: tuple[int, int] | None, comparisons: int) -> dict[str, Any]:
    """Return what there is to tell about one variant, of which so many are compared with the baseline."""
    from fa_stereo.summary import compare, count_kept_bytes, count_multiply_adds, count_parameters

    run = next(iter(variant.runs.values()))
    crop = (run.settings["data.augmentation.crop_height"], run.settings["data.augmentation.crop_width"])
    share = -(-run.settings["trainer.batch_size"] // run.settings["processes"])  # of the largest process
    batch = min(run.settings["trainer.micro_batch_size"] or share, share)
    precision = run.settings["trainer.precision"]
    steps, values = variant.curve("end_point_error")
    row: dict[str, Any] = {
        "variant": variant.label,
        "seeds": list(variant.runs),
        "runs": ["/".join(run.folder.parts[-2:]) for run in variant.runs.values()],
        "parameters": count_parameters(variant.model),
        "multiply_adds": count_multiply_adds(variant.model, *(size or crop)),
        "multiply_adds_size": list(size or crop),
        "kept_bytes": count_kept_bytes(
            variant.model,
            *crop,
            batch,
            precision,
            freeze_batch_norm=bool(run.settings.get("trainer.freeze_batch_norm")),
            activation_checkpointing=bool(run.settings.get("trainer.activation_checkpointing")),
        ),
        "training_step": {"crop": list(crop), "batch": batch, "precision": precision},
        **{key: variant.recorded(key) for key in ("step_seconds", "step_cpu_seconds", "peak_memory_bytes")},
        "last_steps": list(variant.last_steps),
        "curve": {"steps": steps, "end_point_error": values},
    }
    for metric in METRICS:
        mean, deviation = variant.mean_and_deviation(metric)
        row[metric] = {"mean": mean, "standard_deviation": deviation, "values": variant.finals(metric)}
    if variant is not baseline:
        comparison = compare(variant, baseline, comparisons=comparisons)
        row["difference"] = {
            "by_seed": comparison.differences,
            "mean": comparison.mean,
            "interval": comparison.interval,
            "joint_interval": comparison.joint_interval,
            "verdict": comparison.verdict,
        }
    return row


def remarks(rows: list[dict[str, Any]]) -> list[str]:
    """Return what a reader of the table must know so as not to read too much into it."""
    told = []
    tested = sum(1 for row in rows[1:] if row["difference"]["interval"] is not None)
    if tested > 1:
        told.append(
            f"Each interval holds 95 times in 100 by itself. If there were no true difference, one or more of {tested} "
            f"would exclude zero in about {100 * (1 - 0.95**tested):.0f} cases of 100: the verdict allows for that."
        )
    if any(len(row["seeds"]) < 3 for row in rows):
        told.append("A variant with fewer than 3 seeds says how it runs, not how good it is.")
    elif max(len(row["seeds"]) for row in rows) < 6:
        told.append("So few seeds show large differences only: an interval over 0 is no proof that there is none.")
    if len({step for row in rows for step in row["last_steps"]}) > 1:
        told.append("The runs were not trained for the same number of steps.")
    if len({json.dumps(row["training_step"]) for row in rows}) > 1:
        told.append("The variants were not trained with the same crop, batch and precision.")
    return told


# --------------------------------------------------------------------------------------------------------------------
# text


def format_report(report: dict[str, Any]) -> str:
    """Return the table and what it allows to say, in Markdown."""
    from fa_stereo.summary import CONFIDENCE

    rows = report["variants"]
    with_peak = any(row["peak_memory_bytes"] is not None for row in rows)
    first = rows[0]
    size = "x".join(map(str, first["multiply_adds_size"]))
    training_steps = [_training_step(row) for row in rows]
    alike = len(set(training_steps)) == 1
    header = ["variant", "parameters", f"multiply-adds at {size}", "kept", "step, clock", "step, processor"]
    header += [] if alike else ["training step"]
    header += ["peak"] if with_peak else []
    header += ["EPE", "bad-3", "seeds", f"EPE less that of {report['baseline']}", "verdict"]
    lines = ["| " + " | ".join(header) + " |", "|---|" + "---:|" * (len(header) - 2) + "---|"]
    for row, training_step in zip(rows, training_steps, strict=True):
        cells = [
            row["variant"], f"{row['parameters']:,}", f"{row['multiply_adds'] / 1e9:.3f} G",
            f"{row['kept_bytes'] / 1e6:.1f} MB", seconds(row["step_seconds"]), seconds(row["step_cpu_seconds"]),
        ]  # fmt: skip
        cells += [] if alike else [training_step]
        if with_peak:
            peak = row["peak_memory_bytes"]
            cells.append("" if peak is None else f"{peak / 1e9:.2f} GB")
        cells += [spread(row["end_point_error"], "px"), spread(row["bad_3"], "%", 2), str(len(row["seeds"]))]
        difference = row.get("difference")
        cells += [interval(difference), difference["verdict"]] if difference else ["", "baseline"]
        lines.append("| " + " | ".join(cells) + " |")
    last = [count for row in rows for count in row["last_steps"]]
    steps = f"{min(last)}" if min(last) == max(last) else f"{min(last)} to {max(last)}"
    return "\n".join(
        [
            *lines,
            "",
            f"EPE and bad-3: last validation, after {steps} steps; mean ± standard deviation over seeds.",
            f"Difference of the EPE: mean and {100 * CONFIDENCE:.0f} % interval, paired by seed.",
            *([f"Training step: {training_steps[0]}."] if alike else []),
            "What a training step keeps is counted, of one process; its time is as recorded.",
            *report["remarks"],
        ]
    )


def _training_step(row: dict[str, Any]) -> str:
    step = row["training_step"]
    return f"{step['batch']} crops of {'x'.join(map(str, step['crop']))} in {step['precision']}"


def seconds(value: float | None) -> str:
    """Return a time in seconds, or nothing."""
    return "" if value is None else f"{value:.3f} s"


def spread(metric: dict[str, Any], unit: str, digits: int = 3) -> str:
    """Return a metric as mean ± standard deviation."""
    deviation = metric["standard_deviation"]
    more = "" if deviation is None else f" ± {deviation:.{digits}f}"
    return f"{metric['mean']:.{digits}f}{more} {unit}"


def interval(difference: dict[str, Any]) -> str:
    """Return a difference with its interval, as far as there is one."""
    if difference["mean"] is None:
        return ""
    bounds = difference["interval"]
    more = "" if bounds is None else f" ({bounds[0]:+.3f} to {bounds[1]:+.3f})"
    return f"{difference['mean']:+.3f}{more} px"


# --------------------------------------------------------------------------------------------------------------------
# plot


def draw(report: dict[str, Any], title: str | None = None) -> bytes:
    """Return the learning curves, and the differences to the baseline if there are any, as PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = report["variants"]
    several = len(rows) > 1
    figure = Figure(figsize=(12 if several else 7, max(4.5, 1.5 + 0.36 * len(rows))), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, 2 if several else 1, squeeze=False, width_ratios=[3, 2] if several else [1])[0]
    colours = pick_colours(len(rows))
    _draw_curves(panels[0], rows, colours)
    if several:
        _draw_differences(panels[1], rows, colours, report["baseline"])
    if title:
        figure.suptitle(title)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120)
    return buffer.getvalue()


def pick_colours(count: int) -> list[Any]:
    """Return a grey for the baseline, and colours that can be told apart for the others."""
    from matplotlib import colormaps

    others = colormaps["tab10"] if count <= 10 else colormaps["turbo"]
    picked = [others(index if count <= 10 else index / count) for index in range(count)]
    return ["#444444", *[colour for index, colour in enumerate(picked) if index != 7 or count > 10]][:count]


def _draw_curves(axes: Axes, rows: list[dict[str, Any]], colours: list[Any]) -> None:
    for row, colour in zip(rows, colours, strict=True):
        steps, values = row["curve"]["steps"], row["curve"]["end_point_error"]
        means = [sum(at_step) / len(at_step) for at_step in values]
        count = len(row["seeds"])
        label = f"{row['variant']} ({count} seed{'s' if count > 1 else ''}): {spread(row['end_point_error'], 'px')}"
        axes.plot(steps, means, color=colour, marker="o", markersize=3, linewidth=1.5, label=label)
        if count > 1:
            axes.fill_between(steps, list(map(min, values)), list(map(max, values)), color=colour, alpha=0.15, lw=0)
    axes.set(xlabel="training step", ylabel="validation EPE / px")
    values = [value for row in rows for at_step in row["curve"]["end_point_error"] for value in at_step]
    if values and min(values) > 0 and max(values) > 3 * min(values):  # runs by the clock may have no step in common
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter("{x:g}")
        axes.tick_params(axis="y", which="minor", labelsize=7)
    axes.set_title("mean over seeds; bands from the best to the worst seed", fontsize=9)
    axes.grid(visible=True, which="both", alpha=0.25)
    axes.legend(fontsize=7, framealpha=0.7)


def _draw_differences(axes: Axes, rows: list[dict[str, Any]], colours: list[Any], baseline: str) -> None:
    axes.axvline(0, color=colours[0], linewidth=1)
    for place, (row, colour) in enumerate(zip(rows[1:], colours[1:], strict=True)):
        difference = row["difference"]
        values = list(difference["by_seed"].values())
        axes.scatter(values, [place] * len(values), color=colour, s=18, alpha=0.6, zorder=3)
        if difference["interval"] is not None:
            axes.plot(difference["interval"], [place, place], color=colour, linewidth=2)
            axes.plot(difference["mean"], place, "D", color=colour, markersize=6)
    axes.set_yticks(range(len(rows) - 1), [row["variant"] for row in rows[1:]], fontsize=8)
    axes.set_ylim(len(rows) - 1.5, -0.5)
    axes.set_xlabel(f"final EPE less that of '{baseline}', same seed / px")
    axes.set_title("points: seeds; bars: mean and its 95 % interval", fontsize=9)
    axes.grid(visible=True, axis="x", alpha=0.25)
