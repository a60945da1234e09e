"""``fa-stereo import-weights``: an original PSMNet checkpoint becomes a self-describing weights file."""

from __future__ import annotations

import argparse
from pathlib import Path

from fa_stereo.errors import InputError
from fa_stereo.models.checkpoint import import_official_weights, save_weights


def main(argv: list[str]) -> int:
    """Convert one file and say what came of it."""
    parser = argparse.ArgumentParser(
        prog="fa-stereo import-weights", description="Convert a checkpoint of the original PSMNet repository."
    )
    parser.add_argument(
        "checkpoint", type=Path, metavar="OFFICIAL.tar", help="the original's file (nothing in it is run)"
    )
    parser.add_argument(
        "--align-corners",
        choices=("true", "false"),
        required=True,
        help="upsampling the weights were trained with: true for those published before 2021 (PyTorch before 0.4), "
        "false for the re-trained ones of 2021; the wrong one costs 0.6 to 0.9 px",
    )
    parser.add_argument("--max-disparity", type=int, default=192, help="of the training, in pixels (default 192)")
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="OUT.safetensors")
    arguments = parser.parse_args(argv)
    if arguments.output.suffix != ".safetensors":
        raise InputError(f"{arguments.output}: name the output *.safetensors")
    model = import_official_weights(
        arguments.checkpoint,
        align_corners=arguments.align_corners == "true",
        max_disparity=arguments.max_disparity,
    )
    save_weights(model, arguments.output, {"imported_from": arguments.checkpoint.name, "architecture": "PSMNet"})
    parameters = sum(parameter.numel() for parameter in model.parameters())
    print(
        f"{arguments.output}: PSMNet, {model.config.aggregation}, {parameters:,} parameters, "
        f"align_corners {arguments.align_corners}"
    )
    return 0
