"""``fa-stereo widen-weights``: weights of twice the width that compute the same, to train on from."""

from __future__ import annotations

import argparse
from pathlib import Path

from fa_stereo.errors import InputError

DESCRIPTION = """\
Writes weights of a network of twice the channels that computes what the given one does (Net2Net): a start for the
training of a large network that has learnt what a small one took far less time to learn."""

EXAMPLES = """\
examples:
  fa-stereo widen-weights small -o wide.safetensors
  fa-stereo train experiment=full_rendered init_from=wide.safetensors"""


def main(argv: list[str]) -> int:
    """Widen one file and say what came of it."""
    parser = argparse.ArgumentParser(
        prog="fa-stereo widen-weights",
        description=DESCRIPTION,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("weights", metavar="WEIGHTS", help="the name of bundled weights, or a file")
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="OUT.safetensors")
    parser.add_argument(
        "--noise", type=float, default=0.5, metavar="F",
        help="how different twin channels are to become in training, in units of each layer's deviation (default 0.5)",
    )  # fmt: skip
    parser.add_argument("--seed", type=int, default=0, help="of the noise")
    arguments = parser.parse_args(argv)
    if arguments.output.suffix != ".safetensors":
        raise InputError(f"{arguments.output}: name the output *.safetensors")
    if not 0 <= arguments.noise < float("inf"):
        raise InputError(f"--noise must be zero or more, got {arguments.noise:g}")
    if not 0 <= arguments.seed < 2**32:
        raise InputError(f"--seed must be from 0 to {2**32 - 1}, got {arguments.seed}")

    import torch

    from fa_stereo.export import find_record
    from fa_stereo.models.checkpoint import load_model, save_weights
    from fa_stereo.models.widening import widen
    from fa_stereo.weights import find_checkpoint

    file = find_checkpoint(arguments.weights, torch.device("cpu"))
    wide = widen(load_model(file), noise=arguments.noise, seed=arguments.seed)
    settings = {"noise": arguments.noise, "seed": arguments.seed}
    record = {"widened": settings, "steps": 0, "samples_seen": 0, "started_from": find_record(file)}
    try:
        save_weights(wide, arguments.output, record)
    except OSError as error:
        reason = error.strerror or error
        raise InputError(f"{arguments.output}: cannot be written ({reason}); choose another place") from error
    parameters = sum(parameter.numel() for parameter in wide.parameters())
    print(
        f"{arguments.output}: base_channels {wide.config.base_channels} instead of {wide.config.base_channels // 2}, "
        f"{parameters:,} parameters, the same function"
    )
    return 0
