"""``fa-stereo complexity``: what attention costs, by the paper's tables and figures, by count, and here."""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from fa_stereo.attention import build_attention, complexity
from fa_stereo.attention.complexity import BlockCost, Resources
from fa_stereo.config import AttentionConfig
from fa_stereo.errors import InputError
from fa_stereo.files import save_atomically

PLOT_SUFFIXES = (".png", ".pdf", ".svg")


def main(argv: list[str]) -> int:
    """Print the tables, or the same as JSON; draw figures 4 and 5 if asked."""
    parser = argparse.ArgumentParser(
        prog="fa-stereo complexity",
        description="The paper's tables 9 to 12, its figures 4 and 5 and the figures of its text: as printed, as "
        "counted, and where the two disagree; then the cost of this software's blocks. Memory is in float32 values; "
        "one multiplication or one addition counts as 1.",
    )
    parser.add_argument("--size", default="136x240", help="map for this software's blocks (default 136x240, the res4 "
                        "map of a 544x960 picture)")  # fmt: skip
    parser.add_argument("--channels", type=int, default=128, help="c of that map (default 128)")
    parser.add_argument("--key-channels", type=int, default=64, help="b and k (default 64)")
    parser.add_argument("--value-channels", type=int, default=64, help="m of the bottlenecks (default 64)")
    parser.add_argument("--heads", type=int, default=8, help="h of the multi-head blocks (default 8)")
    parser.add_argument("--batch", type=int, default=1, help="maps at a time (default 1)")
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="draw figures 4 and 5 (png, pdf or svg)")
    arguments = parser.parse_args(argv)

    size = parse_size(arguments.size)
    for name in ("channels", "key_channels", "value_channels", "heads", "batch"):
        if getattr(arguments, name) < 1:
            raise InputError(f"--{name.replace('_', '-')} must be positive, got {getattr(arguments, name)}")
    if arguments.plot is not None and arguments.plot.suffix.lower() not in PLOT_SUFFIXES:
        raise InputError(f"{arguments.plot}: name the plot *{', *'.join(PLOT_SUFFIXES)}")
    if arguments.plot is not None and not arguments.plot.absolute().parent.is_dir():
        raise InputError(f"{arguments.plot}: cannot be written: there is no folder {arguments.plot.parent}")
    blocks = block_rows(
        arguments.channels, size, arguments.batch, arguments.key_channels, arguments.value_channels, arguments.heads
    )
    if arguments.json:
        print(json.dumps(as_plain(blocks), indent=2, ensure_ascii=False))
    else:
        shape = f"{arguments.batch} x {arguments.channels} x {'x'.join(map(str, size))}"
        print(as_text(blocks, shape))
    if arguments.plot is not None:
        draw(arguments.plot)
    return 0


def parse_size(text: str) -> tuple[int, ...]:
    """Return the size of a map or volume written as 136x240 or 48x136x240.

    Raises:
        InputError: It is neither.
    """
    parts = text.lower().split("x")
    if len(parts) not in (2, 3) or not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise InputError(f"--size must be HEIGHTxWIDTH or DEPTHxHEIGHTxWIDTH, such as 136x240, got {text!r}")
    return tuple(map(int, parts))


# --------------------------------------------------------------------------------------------------------------------
# this software's blocks

BlockRow = tuple[str, AttentionConfig, int, BlockCost]


def block_rows(
    channels: int, size: Sequence[int], batch: int, key_channels: int, value_channels: int, heads: int
) -> list[BlockRow]:
    """Return label, configuration, parameters and cost of one block of each sort."""
    variants: list[tuple[str, dict[str, Any]]] = [("ResBlock", {"kind": "resblock"})]
    variants += [("ResBlock-bot", {"kind": "resblock_bottleneck", "value_channels": value_channels})]
    bottleneck = {"value_channels": value_channels}
    multi = {**bottleneck, "heads": heads}
    for name, kind in (("FA", "factorized"), ("CA", "non_local")):
        variants += [
            (name, {"kind": kind}),
            (f"{name}-bot", {"kind": kind, **bottleneck}),
            (f"{name}-multi", {"kind": kind, **multi}),
            (f"{name}-Tfm", {"kind": kind, **multi, "transformer": True}),
        ]
    variants += [
        (f"CA, {computation}", {"kind": "non_local", "computation": computation})
        for computation in ("chunked", "fused")
    ]
    for span in (5, 17, 65, None):
        label = "axial, whole lines" if span is None else f"axial, span {span}"
        variants.append((label, {"kind": "axial", "heads": heads, "span": span}))
    rows = []
    for label, overrides in variants:
        config = AttentionConfig(key_channels=key_channels, **overrides)
        parameters = sum(parameter.numel() for parameter in build_attention(config, channels).parameters())
        rows.append((label, config, parameters, complexity.block_cost(config, channels, size, batch)))
    return rows


# --------------------------------------------------------------------------------------------------------------------
# text


def as_text(blocks: Iterable[BlockRow], shape: str) -> str:
    """Return all tables as text."""
    wrong = {(item.table, item.module) for item in complexity.disagreements()}
    assumptions = {9: "in general", 10: "b = k = m = c/2", 11: "b = k = m = c/4"}
    parts = []
    for number, assumption in assumptions.items():
        rows = [
            (module + (" *" if (number, module) in wrong else ""), str(cost.memory), str(cost.computation))
            for module, cost in complexity.counted_table(number).items()
        ]
        title = f"Table {number}, counted ({assumption}; * printed otherwise)"
        parts.append(columns(title, ("module", "memory, floats", "computation, MACC"), rows))
    rows = [
        (module, complexity.order(cost.memory), complexity.order(cost.computation))
        for module, cost in complexity.COUNTED.items()
    ]
    parts.append(columns("Table 12", ("module", "memory", "computation"), rows))
    parts.append(
        columns(
            "Where print and count disagree",
            ("table", "module", "printed", "counted", "why"),
            [
                (str(item.table), item.module, str(item.printed), str(item.counted), item.reason)
                for item in complexity.disagreements()
            ],
        )
    )
    parts.append(
        columns(
            "Figures of the paper's text (c = 64, b = k = 32 unless said)",
            ("statement", "stated", "by print", "by count", ""),
            [
                (
                    item.claim,
                    "below 1" if item.stated is None else f"{item.stated:g}",
                    f"{item.by_print:.4g}",
                    f"{item.by_count:.4g} {item.unit}",
                    "agrees" if item.agrees else f"DISAGREES: {item.reason}",
                )
                for item in complexity.statements()
            ],
        )
    )
    parts.append(curve_table("Figure 4: FA-dot and CA-dot, c = 64, b = k = 32", complexity.figure_4()))
    for name, bert in complexity.BERTS.items():
        parts.append(curve_table(f"Figure 5: {name} with FA-Tfm and CA-Tfm blocks", complexity.figure_5(bert)))
    parts.append(
        columns(
            f"This software's blocks on {shape}",
            ("block", "parameters", "FLOPs", "inference", "kept in training"),
            [
                (
                    label,
                    f"{parameters:,}",
                    f"{cost.flops / 1e9:,.2f} G",
                    megabytes(cost.inference_bytes),
                    megabytes(cost.training_bytes),
                )
                for label, _, parameters, cost in blocks
            ],
        )
    )
    return "\n\n".join(parts)


def curve_table(title: str, points: Sequence[Resources]) -> str:
    """Return a figure's points as a table, the factorized module beside the conventional one."""
    half = len(points) // 2
    rows = [
        (
            "x".join(map(str, factorized.size)),
            megabytes(factorized.memory_bytes),
            megabytes(conventional.memory_bytes),
            f"{conventional.memory_bytes / factorized.memory_bytes:.1f}x",
            f"{factorized.computation_macc / 1e9:,.2f} G",
            f"{conventional.computation_macc / 1e9:,.2f} G",
            f"{conventional.computation_macc / factorized.computation_macc:.1f}x",
        )
        for factorized, conventional in zip(points[:half], points[half:], strict=True)
    ]
    header = ("size", "FA memory", "CA memory", "saving", "FA MACC", "CA MACC", "saving")
    return columns(title, header, rows)


def megabytes(count: float) -> str:
    """Return bytes as MB of 10^6."""
    return f"{count / 1e6:,.1f} MB"


def columns(title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return rows as an aligned table under a title; columns of figures are set to the right."""
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    figures = [all(row[i][:1].isdecimal() and " + " not in row[i] for row in rows) for i in range(len(header))]

    def line(row: Sequence[str]) -> str:
        cells = zip(row, widths, figures, strict=True)
        return "  ".join(cell.rjust(w) if right else cell.ljust(w) for cell, w, right in cells).rstrip()

    rule = "  ".join("-" * width for width in widths)
    return "\n".join([title, "", line(header), rule, *map(line, rows)])


# --------------------------------------------------------------------------------------------------------------------
# JSON and plot


def as_plain(blocks: Iterable[BlockRow]) -> dict[str, Any]:
    """Return all tables as plain data; memory in bytes where the key says so, in floats in the formulas."""
    tables = {
        str(number): {
            module: {
                "memory": str(counted.memory),
                "computation": str(counted.computation),
                "printed_memory": str(complexity.PRINTED[number][module].memory),
                "printed_computation": str(complexity.PRINTED[number][module].computation),
            }
            for module, counted in complexity.counted_table(number).items()
        }
        for number in complexity.PRINTED
    }
    tables["12"] = {
        module: {"memory": complexity.order(cost.memory), "computation": complexity.order(cost.computation)}
        for module, cost in complexity.COUNTED.items()
    }
    return {
        "tables": tables,
        "disagreements": [
            {**asdict(item), "printed": str(item.printed), "counted": str(item.counted)}
            for item in complexity.disagreements()
        ],
        "statements": [{**asdict(item), "agrees": item.agrees} for item in complexity.statements()],
        "figure_4": [asdict(point) for point in complexity.figure_4()],
        "figure_5": [
            {"network": name, **asdict(point)}
            for name, bert in complexity.BERTS.items()
            for point in complexity.figure_5(bert)
        ],
        "blocks": [
            {"block": label, "attention": asdict(config), "parameters": parameters, **asdict(cost)}
            for label, config, parameters, cost in blocks
        ],
    }


def draw(path: Path) -> None:
    """Draw memory and computation of figures 4 and 5 over the number of positions, both axes logarithmic."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figures = [("Figure 4: attention, 64 channels", "positions", complexity.figure_4())]
    for name, bert in complexity.BERTS.items():
        figures.append((f"Figure 5: {name}", "entries of the sequence", complexity.figure_5(bert)))
    figure = Figure(figsize=(10, 4 * len(figures)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(figures), 2)
    for row, (title, label, points) in zip(axes, figures, strict=True):
        for axis, quantity in zip(row, ("memory", "computation"), strict=True):
            for module, color, marker in (("FA", "tab:blue", "o"), ("CA", "tab:red", "s")):
                curve = sorted((p for p in points if p.module.startswith(module)), key=lambda p: math.prod(p.size))
                values = [p.memory_bytes / 1e9 if quantity == "memory" else p.computation_macc / 1e9 for p in curve]
                name = "factorized" if module == "FA" else "conventional"
                axis.loglog([math.prod(p.size) for p in curve], values, color=color, marker=marker, label=name)
            axis.set(title=title, xlabel=label, ylabel="memory, GB" if quantity == "memory" else "computation, GMACC")
            axis.grid(visible=True, which="both", alpha=0.3)
            axis.legend()
    save_atomically(path, lambda temporary: figure.savefig(temporary, dpi=120, format=path.suffix[1:]), durable=False)
