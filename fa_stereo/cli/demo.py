"""``fa-stereo demo``: the disparity of the pair that comes with the package, beside OpenCV's SGBM."""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from fa_stereo.cli.outputs import prepare_output_folder
from fa_stereo.cli.predictors import add_predictor_arguments, load_named_predictor
from fa_stereo.errors import InputError

if TYPE_CHECKING:
    from fa_stereo.data.sample import StereoSample

DESCRIPTION = """\
Predicts the disparity of a rendered pair that comes with the package, whose ground truth is known. Prints the
end-point error (EPE, mean error in pixels), bad-1 and bad-3 (share of pixels that are more than 1 or 3 px wrong) beside
those of OpenCV's semi-global matching (SGBM), and writes pictures whose paths it prints."""


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = argparse.ArgumentParser(
        prog="fa-stereo demo", description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("-o", "--output", default="demo", metavar="OUT", help="folder for the pictures (default demo)")
    add_predictor_arguments(parser)
    return parser


def main(argv: list[str]) -> int:
    """Run the command; see ``DESCRIPTION``."""
    arguments = build_parser().parse_args(argv)
    sample = read_demo_pair()
    output = Path(arguments.output)

    from fa_stereo.sgbm import match_semi_global

    predictor = load_named_predictor(arguments)
    prepare_output_folder(output)
    prediction = predictor(sample.left, sample.right)
    start = time.perf_counter()
    matched = match_semi_global(sample.left, sample.right)  # in its own range, whatever the network's is
    sgbm_seconds = time.perf_counter() - start

    height, width = sample.left.shape[:2]
    print(f"Rendered pair, {width}x{height}, every pixel with ground truth:\n")
    print(f"{'':12}{'EPE':>10}{'bad-1':>9}{'bad-3':>9}")
    titles = {}
    for name, disparity, note in (
        ("FA-PSMNet", prediction.disparity, f"{prediction.seconds:.2f} s, {prediction.device}, {prediction.precision}"),
        ("OpenCV SGBM", matched, f"{sgbm_seconds:.2f} s"),
    ):
        error, bad_1, bad_3 = measure(disparity, sample)
        print(f"{name:12}{error:7.2f} px{bad_1:7.1f} %{bad_3:7.1f} %   ({note})")
        titles[name] = f"{name}: EPE {error:.2f} px, bad-3 {bad_3:.1f} %"
    print()
    for path in write_pictures(output, sample, prediction.disparity, matched, titles):
        print(path)
    return 0


def demo_folder() -> Path:
    """Return the folder of the pair that comes with the package."""
    return Path(__file__).resolve().parent.parent / "demo_pair"


def read_demo_pair() -> StereoSample:
    """Read the pair that comes with the package.

    Raises:
        InputError: It is not there, or damaged.
    """
    from fa_stereo.data.formats import read_disparity, read_mask, read_picture_pair
    from fa_stereo.data.sample import StereoSample

    folder = demo_folder()
    for name in ("left.png", "right.png", "disparity.pfm", "occluded.png"):
        if not (folder / name).is_file():
            raise InputError(f"{folder / name}: this part of the bundled pair is missing; install the package again")
    left, right = read_picture_pair(folder / "left.png", folder / "right.png")
    disparity = read_disparity(folder / "disparity.pfm")
    occluded = read_mask(folder / "occluded.png") > 0
    if not left.shape[:2] == disparity.shape == occluded.shape:
        raise InputError(f"{folder}: the files of the bundled pair differ in size; install the package again")
    return StereoSample("demo", left, right, disparity, occluded=occluded)


def measure(prediction: NDArray[np.float32], sample: StereoSample) -> tuple[float, float, float]:
    """Return EPE in pixels, bad-1 and bad-3 in percent over all pixels with ground truth."""
    from fa_stereo.metrics import bad_n, end_point_error

    truth = sample.disparity
    assert truth is not None
    valid = np.isfinite(truth)
    error = end_point_error(prediction, truth, valid)
    return error, bad_n(prediction, truth, valid=valid, n=1), bad_n(prediction, truth, valid=valid, n=3)


def write_pictures(
    folder: Path,
    sample: StereoSample,
    predicted: NDArray[np.float32],
    matched: NDArray[np.float32],
    titles: dict[str, str],
) -> list[Path]:
    """Write the pair, the disparity, its error and all of it side by side.

    Args:
        folder: Where to.
        sample: The pair with its ground truth.
        predicted: The network's disparity [H, W].
        matched: SGBM's disparity [H, W].
        titles: Title of the disparity by method, ``FA-PSMNet`` and ``OpenCV SGBM``.

    Returns:
        The files written.
    """
    from fa_stereo import visualization
    from fa_stereo.data.formats import write_pfm, write_picture

    truth = sample.disparity
    assert truth is not None
    assert sample.occluded is not None
    top = visualization.disparity_range(truth)
    disparity = visualization.colorize_disparity(predicted, top)
    error = visualization.colorize_error(predicted, truth)
    sheet = visualization.side_by_side(
        [
            ("Left", sample.left),
            ("Ground truth", visualization.colorize_disparity(truth, top)),
            (titles["FA-PSMNet"], disparity),
            ("FA-PSMNet, error", error),
            ("Right", sample.right),
            ("Hidden in the right view (white)", (sample.occluded * 255).astype(np.uint8)),
            (titles["OpenCV SGBM"], visualization.colorize_disparity(matched, top)),
            ("OpenCV SGBM, error", visualization.colorize_error(matched, truth)),
        ],
        columns=4,
        footer=[
            ("Disparity", visualization.disparity_legend(top, sample.left.shape[1])),
            ("Error (blue: within 3 px or 5 %)", visualization.error_legend(sample.left.shape[1])),
        ],
    )
    pictures = {
        "left.png": sample.left,
        "right.png": sample.right,
        "disparity.png": disparity,
        "error.png": error,
        "side_by_side.png": sheet,
    }
    for name, picture in pictures.items():
        write_picture(folder / name, picture)
    write_pfm(folder / "disparity.pfm", predicted)
    return [folder / name for name in (*pictures, "disparity.pfm")]
