"""``fa-stereo export-onnx``: a network for other runtimes, compared with PyTorch before it is written."""

from __future__ import annotations

import argparse
from pathlib import Path

from fa_stereo.cli.outputs import prepare_output_folder
from fa_stereo.cli.predictors import add_weights_arguments, named_weights
from fa_stereo.errors import InputError
from fa_stereo.files import write_bytes

DESCRIPTION = """\
Writes the network as an ONNX file for pictures of one size, for ONNX Runtime and other runtimes that read such files:

  left, right  float32 [B, 3, HEIGHT, WIDTH], RGB from 0 to 255 (they are normalised inside)
  disparity    float32 [B, HEIGHT, WIDTH], pixels of the left view

Before it is written ONNX Runtime computes the bundled pair with it, brought to the size, and must come to what PyTorch
computes in fp32: to 0.001 px in the mean and 0.1 px everywhere. (Other runtimes were not tried.) The file holds the
plain path, which stores the cost volume: it takes several times the memory of fa-stereo predict. The packages needed
come with pip install '.[onnx]'."""

MEAN_TOLERANCE_PX = 0.001
TOLERANCE_PX = 0.1


def main(argv: list[str]) -> int:
    """Export one network and say how far it is from PyTorch."""
    parser = argparse.ArgumentParser(
        prog="fa-stereo export-onnx", description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="OUT.onnx", help="the file to write")
    parser.add_argument("--height", type=int, required=True, metavar="PX", help="of the pictures, any from 16 on")
    parser.add_argument("--width", type=int, required=True, metavar="PX", help="likewise")
    parser.add_argument("--batch", type=int, default=1, metavar="B", help="pairs at once (default 1)")
    add_weights_arguments(parser, default="small")
    parser.add_argument(
        "--max-disparity", type=int, metavar="PX",
        help="search range, a multiple of 16, instead of the one the weights were trained for",
    )  # fmt: skip
    arguments = parser.parse_args(argv)
    output: Path = arguments.output
    if output.suffix.lower() != ".onnx" or output.is_dir():
        raise InputError(f"-o {output}: name a file *.onnx")

    import cv2
    import numpy as np

    from fa_stereo.cli.demo import read_demo_pair
    from fa_stereo.inference import load_predictor
    from fa_stereo.onnx_export import check_packages, export_onnx, run_onnx

    check_packages()
    predictor = load_predictor(named_weights(arguments), "cpu", "fp32", arguments.max_disparity)
    prepare_output_folder(output.parent)
    height, width, batch = arguments.height, arguments.width, arguments.batch
    content = export_onnx(predictor.model, height, width, batch)
    pair = read_demo_pair()
    left, right = (
        np.asarray(cv2.resize(view, (width, height), interpolation=cv2.INTER_AREA), np.uint8)
        for view in (pair.left, pair.right)
    )
    # Entries that differ: every other one is upside down.
    views = [(left, right) if n % 2 == 0 else (left[::-1], right[::-1]) for n in range(batch)]
    lefts, rights = (np.stack(entries) for entries in zip(*views, strict=True))
    expected = [predictor(*view).disparity for view in views[:2]]
    deviation = np.abs(run_onnx(content, lefts, rights) - np.stack([expected[n % 2] for n in range(batch)]))
    if not (deviation.mean() <= MEAN_TOLERANCE_PX and deviation.max() <= TOLERANCE_PX):
        raise InputError(
            f"{output}: not written, as what ONNX Runtime computes with it is {deviation.mean():.2g} px from PyTorch "
            f"in the mean and {deviation.max():.2g} px at most: try another version of onnxscript or onnxruntime"
        )
    write_bytes(output, content)
    print(
        f"{output}: {len(content) / 1e6:.2f} MB; beside PyTorch in fp32, on the bundled pair at {width}x{height}: "
        f"{deviation.mean():.2g} px in the mean, {deviation.max():.2g} px at most"
    )
    return 0
