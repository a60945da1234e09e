"""The options that choose weights and how they are run, and the predictor that they describe."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from fa_stereo.config import REGRESSIONS
from fa_stereo.errors import InputError
from fa_stereo.weights import list_weights

if TYPE_CHECKING:
    from fa_stereo.inference import DisparityPredictor


def add_weights_arguments(
    parser: argparse.ArgumentParser, default: str = "on a GPU the largest bundled, else small"
) -> None:
    """Add the options that choose the weights; see ``named_weights``."""
    source = parser.add_mutually_exclusive_group()
    source.add_argument(
        "--weights",
        metavar="NAME",
        help=f"bundled weights ({', '.join(list_weights())}) or a file (default: {default})",
    )
    source.add_argument("--checkpoint", metavar="PATH", help="a file of your own (.safetensors or .pt)")


def add_predictor_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options that choose the weights and how they are run."""
    add_weights_arguments(parser)
    parser.add_argument("--device", default="auto", help="auto (default), cpu, cuda or cuda:N")
    parser.add_argument("--precision", default="auto", help="auto (default), fp32, bf16, fp16 or mixed")
    parser.add_argument(
        "--max-disparity", type=int, metavar="PX",
        help="search range, a multiple of 16, instead of the one the weights were trained for",
    )  # fmt: skip
    parser.add_argument(
        "--regression", choices=REGRESSIONS,
        help="disparity by its expectation over all of the range, as in PSMNet, or around the most probable value "
        "(default: what belongs to the weights; modal for the bundled ones)",
    )  # fmt: skip
    parser.add_argument(
        "--scale", type=float, metavar="FACTOR",
        help="predict at this size alone, e.g. 0.5, and bring the result back to that of the pictures (default: at "
        "their own; the bundled weights predict small pictures, of less than 0.4 megapixels, at 1.5 times it too, "
        "which takes three times as long and which --scale 1 leaves out)",
    )  # fmt: skip
    memory = parser.add_mutually_exclusive_group()
    memory.add_argument(
        "--tile", type=int, metavar="ROWS",
        help="for large pictures: compute this many rows at a time (a multiple of 16), blended without a seam",
    )  # fmt: skip
    memory.add_argument(
        "--memory",
        type=float,
        metavar="GB",
        help="tile so that a pair takes about this much memory at most, besides the process itself (0.6 GB); "
        "calibrated on CPUs",
    )
    parser.add_argument(
        "--compile", action="store_true",
        help="run the network through torch.compile, which takes a minute or so for every size of picture; on CPUs "
        "where it was measured it gained nothing",
    )  # fmt: skip
    parser.add_argument(
        "--cuda-graph", action="store_true",
        help="on a GPU, for many whole pictures of one size: launch all of the network at once, not bit by bit",
    )  # fmt: skip


def named_weights(arguments: argparse.Namespace) -> str | Path | None:
    """Return what ``--checkpoint`` or ``--weights`` names, None for the default."""
    if arguments.checkpoint is not None:
        return Path(arguments.checkpoint)  # always a file, even if called "small"
    weights: str | None = arguments.weights
    return weights


def load_named_predictor(arguments: argparse.Namespace, *, confidence: bool = False) -> DisparityPredictor:
    """Load the predictor that the options of ``add_predictor_arguments`` describe, with confidence if asked for.

    Raises:
        InputError: An option is refused, or there are no such weights.
    """
    from fa_stereo.inference import choose_device, load_predictor
    from fa_stereo.machine import compute_float32_in_full
    from fa_stereo.memory import keep_freed_memory

    if arguments.cuda_graph and (device := choose_device(arguments.device)).type != "cuda":
        raise InputError(f"--cuda-graph needs a GPU, but the device is {device}: leave it out")
    if arguments.cuda_graph and arguments.tile is not None:
        raise InputError("--cuda-graph is for whole pictures: leave out it or --tile")
    compute_float32_in_full()
    keep_freed_memory(whole=False)
    return load_predictor(
        named_weights(arguments),
        arguments.device,
        arguments.precision,
        arguments.max_disparity,
        regression=arguments.regression,
        scale=arguments.scale,
        band_height=arguments.tile,
        memory_gb=arguments.memory,
        confidence=confidence,
        compile=arguments.compile,
        cuda_graph=arguments.cuda_graph,
    )
