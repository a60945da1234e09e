"""``fa-stereo export-weights``: a training checkpoint becomes a small, self-describing weights file."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from fa_stereo.config import NETWORK_PADDINGS, REGRESSIONS
from fa_stereo.errors import InputError

DESCRIPTION = """\
Writes the weights of a training run, the averaged ones if it averaged, as a safetensors file for use: in float16
(batch norm in float32), with the model configuration and the record of the training inside."""

EXAMPLES = """\
examples:
  fa-stereo export-weights runs/train/2031-05-06_07-08-09 -o small.safetensors
  fa-stereo export-weights RUN/best.pt -o small.safetensors --reestimate-batch-norm 400
  fa-stereo export-weights RUN -o mean.safetensors --average-with small --average-with RUN_2
  fa-stereo export-weights RUN -o small.safetensors --note data="pairs rendered by fa_stereo" --note licence=MIT"""


def main(argv: list[str]) -> int:
    """Export one checkpoint and print what its record says."""
    parser = argparse.ArgumentParser(
        prog="fa-stereo export-weights",
        description=DESCRIPTION,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "checkpoint",
        metavar="RUN",
        help="folder of a run, for its last.pt, or one of its .pt files; or weights (a bundled name or a file)",
    )
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="OUT.safetensors")
    parser.add_argument("--precision", choices=("fp16", "fp32"), default="fp16", help="default fp16, half the size")
    parser.add_argument(
        "--regression", choices=REGRESSIONS, help="how the weights are to predict (default: as the run validated)"
    )
    parser.add_argument(
        "--padding", choices=NETWORK_PADDINGS,
        help="what pictures whose sides are no multiples of 16 px are padded with, likewise",
    )  # fmt: skip
    parser.add_argument(
        "--halve-from", type=int, metavar="PIXELS",
        help="pictures of so many pixels or more are to count at half their size too (0: none), likewise",
    )  # fmt: skip
    parser.add_argument(
        "--enlarge-below", type=int, metavar="PIXELS",
        help="pictures of fewer pixels are to be predicted at one and a half times their size too (0: none), likewise",
    )  # fmt: skip
    parser.add_argument(
        "--average-with", action="append", default=[], metavar="WEIGHTS",
        help="write the mean of these and other weights of the same network (a bundled name, file or run), those that "
        "the run started from for example, or those of other runs from the same start; may be repeated",
    )  # fmt: skip
    parser.add_argument(
        "--reestimate-batch-norm",
        type=int,
        default=0,
        metavar="N",
        help="estimate batch norm's statistics anew over N samples of the run's training data: worth it where batches "
        "were tiny (default 0: keep those of the training)",
    )
    parser.add_argument("--batch-size", type=int, default=8, help="samples of a batch for that (default 8)")
    parser.add_argument("--data-root", metavar="FOLDER", help="where the training data is now, if not where it was")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N, for that (default auto)")
    parser.add_argument("--workers", type=int, default=2, help="loader processes for that (default 2)")
    parser.add_argument(
        "--note",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="what else the record should say, or say otherwise; the value is JSON or text; may be repeated",
    )
    arguments = parser.parse_args(argv)
    for name in ("reestimate_batch_norm", "workers"):
        if getattr(arguments, name) < 0:
            raise InputError(f"--{name.replace('_', '-')} must be zero or more, got {getattr(arguments, name)}")
    if arguments.batch_size < 1:
        raise InputError(f"--batch-size must be positive, got {arguments.batch_size}")
    notes = dict(map(_read_note, arguments.note))

    import torch

    from fa_stereo.export import export_weights
    from fa_stereo.inference import choose_device

    record = export_weights(
        arguments.checkpoint,
        arguments.output,
        dtype=torch.float16 if arguments.precision == "fp16" else torch.float32,
        regression=arguments.regression,
        padding=arguments.padding,
        halve_from_px=arguments.halve_from,
        enlarge_below_px=arguments.enlarge_below,
        average_with=arguments.average_with,
        batch_norm_pairs=arguments.reestimate_batch_norm,
        batch_size=arguments.batch_size,
        data_root=arguments.data_root,
        device=choose_device(arguments.device),
        workers=arguments.workers,
        notes=notes,
    )
    print(f"{arguments.output}: {arguments.output.stat().st_size / 1e6:.2f} MB, {arguments.precision}; its record:")
    print(summary(record))
    return 0


def summary(record: dict[str, Any]) -> str:
    """Return a record as lines for a person, its lists of settings and validations by their length."""
    lines = []
    for key, value in record.items():
        if key == "validation_curve":
            value = f"{len(value)} validations" if isinstance(value, list) and value else value or None
        elif key in ("training", "rendered_pairs", "started_from") and isinstance(value, dict | list):
            value = f"{len(value)} entries"
        elif key == "validation" and isinstance(value, dict):
            figures = {k: f"{v:.4g}" if isinstance(v, int | float) else v for k, v in value.items()}
            value = ", ".join(f"{name} {figure}" for name, figure in figures.items()) or None
        lines.append(f"  {key}: {'not known' if value is None else value}")
    return "\n".join(lines)


def _read_note(text: str) -> tuple[str, Any]:
    key, equals, value = text.partition("=")
    if not equals or not key:
        raise InputError(f"--note {text}: write it as KEY=VALUE")
    try:
        return key, json.loads(value)
    except json.JSONDecodeError:
        return key, value
