"""``fa-stereo export-onnx``: a network for other runtimes, compared with PyTorch before it is written."""

from __future__ import annotations

import argparse
from pathlib import Path

from fa_stereo.cli.predict import add_weights_arguments, named_weights
from fa_stereo.errors import InputError
from fa_stereo.files import save_atomically

DESCRIPTION = """\
Writes the network as an ONNX file for ONNX Runtime, TensorRT, OpenVINO and their like, for pictures of one size:

  left, right  float32 [B, 3, HEIGHT, WIDTH], RGB from 0 to 255 (they are normalised inside)
  disparity    float32 [B, HEIGHT, WIDTH], pixels of the left view

Before it is written ONNX Runtime computes the bundled pair with it (brought to the size), and the result must be that
of PyTorch in fp32. The packages it takes come with pip install '.[onnx]'."""

LARGEST_MEAN_DEVIATION_PX = 0.01


def main(argv: list[str]) -> int:
    """Export one network and say how far it is from PyTorch."""
    parser = argparse.ArgumentParser(
        prog="fa-stereo export-onnx", description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="OUT.onnx")
    parser.add_argument("--height", type=int, required=True, metavar="PX", help="of the pictures, any from 16 on")
    parser.add_argument("--width", type=int, required=True, metavar="PX", help="likewise")
    parser.add_argument("--batch", type=int, default=1, metavar="B", help="pairs at once (default 1)")
    add_weights_arguments(parser)
    parser.add_argument(
        "--max-disparity", type=int, metavar="PX",
        help="search range, a multiple of 16, instead of the one the weights were trained for",
    )  # fmt: skip
    arguments = parser.parse_args(argv)
    if arguments.output.suffix.lower() != ".onnx":
        raise InputError(f"-o {arguments.output}: name the file *.onnx")

    import cv2
    import numpy as np

    from fa_stereo.cli.demo import read_demo_pair
    from fa_stereo.inference import load_predictor
    from fa_stereo.onnx_export import export_onnx, run_onnx

    predictor = load_predictor(named_weights(arguments), "cpu", "fp32", arguments.max_disparity)
    height, width = arguments.height, arguments.width
    content = export_onnx(predictor.model, height, width, arguments.batch)
    pair = read_demo_pair()
    left, right = (
        np.asarray(cv2.resize(view, (width, height), interpolation=cv2.INTER_AREA), dtype=np.uint8)
        for view in (pair.left, pair.right)
    )
    deviation = np.abs(run_onnx(content, left, right) - predictor(left, right).disparity)
    if not deviation.mean() <= LARGEST_MEAN_DEVIATION_PX:
        raise InputError(
            f"{arguments.output}: not written, as ONNX Runtime computes with it what is {deviation.mean():.3g} px from "
            "PyTorch in the mean: try another version of onnxscript or onnxruntime"
        )
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    save_atomically(arguments.output, lambda temporary: temporary.write_bytes(content))
    print(
        f"{arguments.output}: {len(content) / 1e6:.2f} MB; beside PyTorch in fp32, on the bundled pair at "
        f"{width}x{height}: {deviation.mean():.2g} px in the mean, {deviation.max():.2g} px at most"
    )
    return 0
