"""``fa-stereo predict``: disparity, depth and points of one picture pair, of two folders, or of two glob patterns."""

from __future__ import annotations

import argparse
import dataclasses
import math
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from fa_stereo.cli.cameras import Cameras, add_camera_arguments
from fa_stereo.cli.options import parse_names
from fa_stereo.cli.outputs import check_outputs, prepare_output_folder
from fa_stereo.cli.predictors import add_predictor_arguments, load_named_predictor
from fa_stereo.errors import InputError, RangeError
from fa_stereo.threads import Threads

if TYPE_CHECKING:
    from fa_stereo.data.pairs import PicturePair
    from fa_stereo.geometry import StereoCalibration
    from fa_stereo.inference import DisparityPredictor, Prediction
    from fa_stereo.rectification import PairJudgement

DESCRIPTION = """\
Predicts the disparity of rectified pairs, of the left view or with --view right of the right one, and writes it in the
formats asked for:

  png       coloured picture: far is blue, near is red; from 0 to the 99.5th percentile of the picture
  pfm       32-bit float, pixels (Scene Flow, Middlebury, ETH3D)
  kitti     16-bit PNG named NAME_kitti.png: disparity * 256, 0 = no value
  npy       NumPy float32 [H, W], pixels
  depth_m   NAME_depth_m.npy: NumPy float32 [H, W], metres; inf at infinity, nan = no value, or behind the cameras
  depth_mm  NAME_depth_mm.png: 16-bit PNG, millimetres; 0 = no value, or 65.5 m and more
  ply       coloured point cloud, metres from the view's camera: x to the right, y down, z forward
  confidence  NAME_confidence.png: 8-bit PNG, the largest probability that the network gives to any 12 px of the range,
              255 = 1; low at edges, in hidden and in plain places

Depth and points need the cameras: --calibration FILE, or --focal-length-px and --baseline-m.

LEFT and RIGHT are two pictures, two folders, or two quoted glob patterns, paired by name.
A pair whose matched corners lie in different rows, or the wrong way round, is reported on stderr as looking
unrectified or swapped (see fa_stereo/rectification.py for how this is judged); it is predicted all the same."""

SUFFIXES = {
    "png": ".png", "pfm": ".pfm", "kitti": "_kitti.png", "npy": ".npy", "depth_m": "_depth_m.npy",
    "depth_mm": "_depth_mm.png", "ply": ".ply", "confidence": "_confidence.png",
}  # fmt: skip
FORMATS = tuple(SUFFIXES)
OTHER_SUFFIXES = (
    ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".ppm", ".pgm", ".exr", ".hdr", ".npz", ".mat", ".txt",
    ".csv", ".json", ".pcd", ".xyz", ".obj",
)  # fmt: skip
"""Endings of a file that people may ask for, rather than of a folder's name."""
DEFAULT_FORMATS = "png,pfm"
MOST_WARNINGS = 5


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = argparse.ArgumentParser(
        prog="fa-stereo predict", description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("left", metavar="LEFT", help="left picture, folder or quoted glob pattern")
    parser.add_argument("right", metavar="RIGHT", help="right picture, folder or quoted glob pattern")
    parser.add_argument(
        "-o", "--output", required=True, metavar="OUT",
        help="folder for the results; for a single pair also a file, whose ending says the format",
    )  # fmt: skip
    parser.add_argument(
        "--formats", metavar="LIST", help=f"any of {','.join(FORMATS)}, separated by commas (default {DEFAULT_FORMATS})"
    )
    parser.add_argument(
        "--view", choices=("left", "right"), default="left",
        help="whose disparity to predict (default left); that of the right view is written to NAME_right...",
    )  # fmt: skip
    parser.add_argument(
        "--color-max", type=float, metavar="PX",
        help="for png: disparity of the last colour, the same for all pairs, as the pictures of a video should have it",
    )  # fmt: skip
    parser.add_argument(
        "--min-confidence", type=float, default=0.0, metavar="P",
        help="pixels of less confidence, from 0 to 1, get no value: black in png, inf in pfm and npy, 0 in kitti and "
        "depth_mm, nan in depth_m, no point in ply (default 0: all get one)",
    )  # fmt: skip
    parser.add_argument(
        "--left-right", type=float, metavar="PX",
        help="predict both views, in twice the time: pixels that the other view's disparity contradicts by more than "
        "this get no value likewise, above all those that one view alone sees",
    )  # fmt: skip
    parser.add_argument(
        "--skip-existing", action="store_true",
        help="pass over pairs all of whose results are there, as when a stopped command is given again",
    )  # fmt: skip
    add_camera_arguments(parser)
    add_predictor_arguments(parser)
    return parser


def main(argv: list[str]) -> int:
    """Run the command; see ``DESCRIPTION``."""
    arguments = build_parser().parse_args(argv)
    from fa_stereo.data.pairs import pair_pictures

    if not 0 <= arguments.min_confidence <= 1:
        raise InputError(f"--min-confidence must be from 0 to 1, got {arguments.min_confidence:g}")
    if arguments.left_right is not None and not 0 <= arguments.left_right < math.inf:
        raise InputError(f"--left-right must be zero or more pixels, got {arguments.left_right:g}")
    pairs = pair_pictures(arguments.left, arguments.right)
    folder = Path(arguments.output)
    single_format = _single_format(arguments.output, arguments.formats, len(pairs))
    formats = (single_format,) if single_format else parse_formats(arguments.formats or DEFAULT_FORMATS)
    if arguments.color_max is not None and "png" not in formats:
        raise InputError("--color-max is for the format png: ask for it, or leave --color-max out")
    if arguments.color_max is not None and not 0 < arguments.color_max < math.inf:
        raise InputError(f"--color-max must be a positive number of pixels, got {arguments.color_max:g}")
    if single_format:
        outputs = {pairs[0].name: {folder: single_format}}
        folder = folder.parent
    else:
        suffix = "_right" if arguments.view == "right" else ""
        outputs = {pair.name: output_paths(folder, f"{pair.name}{suffix}", formats) for pair in pairs}
    check_outputs(pairs, outputs)
    several = len(pairs) > 1
    if arguments.skip_existing:
        found, pairs = len(pairs), [pair for pair in pairs if not all(path.exists() for path in outputs[pair.name])]
        print(f"{found - len(pairs)} of {found} pairs are there already")
        if not pairs:
            return 0
    cameras = Cameras(arguments, formats)
    needs_confidence = arguments.min_confidence > 0 or "confidence" in formats
    predictor = load_named_predictor(arguments, confidence=needs_confidence)
    job = _Job(predictor, cameras, arguments.view, arguments.min_confidence, arguments.left_right, arguments.color_max)
    if several:
        prepare_output_folder(folder)
        return _predict_many(job, pairs, folder, outputs)
    _predict_one(job, pairs[0], folder, outputs[pairs[0].name])
    return 0


def parse_formats(text: str) -> tuple[str, ...]:
    """Return the formats named in a list separated by commas.

    Raises:
        InputError: One is unknown, or none is given.
    """
    return parse_names(text.lower(), FORMATS, "--formats")


def output_paths(folder: Path, name: str, formats: tuple[str, ...]) -> dict[Path, str]:
    """Return the format by the file to write it to, for the pair of this (path-like) name."""
    return {folder / f"{name}{SUFFIXES[kind]}": kind for kind in formats}


@dataclasses.dataclass(frozen=True)
class _Job:
    """How every pair is predicted, and its results are written.

    Attributes:
        predictor: The network.
        cameras: For depth and points.
        view: ``left`` or ``right``: whose disparity.
        min_confidence: Pixels of less get no value.
        left_right: Nor do those that the other view contradicts by more pixels than this; None asks no other view.
        color_max: Disparity of the last colour in pixels; None is each picture's own.
    """

    predictor: DisparityPredictor
    cameras: Cameras
    view: str
    min_confidence: float
    left_right: float | None
    color_max: float | None

    def predict(self, left: NDArray[np.uint8], right: NDArray[np.uint8]) -> Prediction:
        """Return the view's disparity, before any pixel loses it."""
        return self._predict(left, right, self.view)

    def _predict(self, left: NDArray[np.uint8], right: NDArray[np.uint8], view: str) -> Prediction:
        return self.predictor(left, right) if view == "left" else self.predictor.predict_right(left, right)

    def without_doubtful(
        self, name: str, left: NDArray[np.uint8], right: NDArray[np.uint8], prediction: Prediction
    ) -> Prediction:
        """Return the prediction of a pair whose disparity is infinite (no value) where it is in doubt.

        That is where it is not confident enough, and where the other view contradicts it.
        """
        from tqdm import tqdm

        disparity, seconds = prediction.disparity, prediction.seconds
        if prediction.confidence is not None:
            confident = prediction.confidence >= self.min_confidence
            if not confident.any():
                tqdm.write(
                    f"warning: {name}: no pixel has a confidence of {self.min_confidence:g} or more", file=sys.stderr
                )
            disparity = np.where(confident, disparity, np.float32(np.inf))
        if self.left_right is not None:
            other = self._predict(left, right, "right" if self.view == "left" else "left")
            seconds += other.seconds
            agrees = self._agrees(prediction.disparity, other.disparity)
            if not agrees.any():
                tqdm.write(f"warning: {name}: the other view agrees nowhere", file=sys.stderr)
            disparity = np.where(agrees, disparity, np.float32(np.inf))
        return dataclasses.replace(prediction, disparity=disparity, seconds=seconds)

    def _agrees(self, disparity: NDArray[np.float32], other: NDArray[np.float32]) -> NDArray[np.bool_]:
        from fa_stereo.geometry import left_right_consistent

        assert self.left_right is not None
        if self.view == "left":
            return left_right_consistent(disparity, other, self.left_right)
        return left_right_consistent(disparity[:, ::-1], other[:, ::-1], self.left_right)[:, ::-1]

    def calibration(self, height: int, width: int) -> StereoCalibration:
        """Return the cameras; ``cx_px`` is the column of the view's own principal point."""
        cameras = self.cameras.of_pictures(height, width)
        return cameras if self.view == "left" else dataclasses.replace(cameras, cx_px=cameras.cx_px + cameras.doffs_px)

    def write_all(self, outputs: dict[Path, str], picture: NDArray[np.uint8], prediction: Prediction) -> Iterator[Path]:
        """Write what follows from the prediction of a view in some of ``FORMATS``; yield the files as they are there.

        Raises:
            RangeError: A format cannot hold the values; all others are written before.
            InputError: A file cannot be written.
        """
        refused: RangeError | None = None
        for path, kind in outputs.items():
            try:
                self.write(path, kind, picture, prediction)
            except RangeError as error:
                refused = refused or error
            else:
                yield path
        if refused is not None:
            raise refused

    def write(self, path: Path, kind: str, picture: NDArray[np.uint8], prediction: Prediction) -> None:
        """Write what follows from the prediction of a view in one of ``FORMATS``, whole or not at all.

        Raises:
            RangeError: The format cannot hold the values.
            InputError: The file cannot be written.
        """
        from tqdm import tqdm

        from fa_stereo.data import formats
        from fa_stereo.geometry import disparity_to_depth, point_cloud
        from fa_stereo.visualization import colorize_disparity

        disparity, confidence = prediction.disparity, prediction.confidence
        some_known = bool(np.isfinite(disparity).any())

        def depth_m() -> NDArray[np.float32]:
            cameras = self.calibration(*disparity.shape)
            return disparity_to_depth(disparity, cameras.focal_length_px, cameras.baseline_m, cameras.doffs_px)

        def write_points() -> None:
            points_m, mask = point_cloud(disparity, self.calibration(*disparity.shape), self.cameras.max_depth_m)
            formats.write_ply(path, points_m, picture[mask])
            if some_known and not len(points_m):
                tqdm.write(f"warning: {path}: no point is near enough", file=sys.stderr)

        def write_depth_mm() -> None:
            formats.write_depth_mm(path, depth_m())
            if some_known and not (depth_m() < formats.DEPTH_MM_LIMIT_M).any():
                tqdm.write(f"warning: {path}: all is too far for 16 bits: is the baseline in metres?", file=sys.stderr)

        def write_confidence() -> None:
            assert confidence is not None
            formats.write_picture(path, np.rint(255 * confidence).astype(np.uint8))

        writers: dict[str, Callable[[], None]] = {
            "png": lambda: formats.write_picture(path, colorize_disparity(disparity, self.color_max)),
            "pfm": lambda: formats.write_pfm(path, disparity),
            "kitti": lambda: formats.write_kitti_disparity(path, disparity),
            "npy": lambda: formats.write_npy(path, disparity),
            "depth_m": lambda: formats.write_npy(path, depth_m()),
            "depth_mm": write_depth_mm,
            "ply": write_points,
            "confidence": write_confidence,
        }
        writers[kind]()


@dataclasses.dataclass(frozen=True)
class _Predicted:
    """A pair, the picture of the view, and what was predicted of it."""

    pair: PicturePair
    picture: NDArray[np.uint8]
    prediction: Prediction


def _single_format(output: str, formats: str | None, pairs: int) -> str | None:
    """Return the format of OUT if it means one file rather than a folder."""
    path = Path(output)
    if path.is_dir():
        return None
    if path.suffix.lower() in OTHER_SUFFIXES:
        raise InputError(f"-o {output}: a result can be written as .png, .pfm, .npy or .ply; name one, or a folder")
    name = f"_{path.name.lower()}"  # confidence.png is one as well as desk_confidence.png
    fitting = {len(suffix): kind for kind, suffix in SUFFIXES.items() if name.endswith(suffix)}
    if not fitting:
        return None
    if pairs > 1:
        raise InputError(f"-o {output} is a file, but there are {pairs} pairs: give a folder")
    if formats is not None:
        raise InputError(f"-o {output} is a file, which says its format: leave out --formats, or give a folder")
    return fitting[max(fitting)]


def _predict_one(job: _Job, pair: PicturePair, folder: Path, outputs: dict[Path, str]) -> None:
    from fa_stereo.data.formats import read_picture_pair
    from fa_stereo.inference import check_pair
    from fa_stereo.rectification import judge_pair

    left, right = read_picture_pair(pair.left_path, pair.right_path)
    try:
        check_pair(left, right)
    except InputError as error:
        raise InputError(f"{pair.left_path}: {error}") from error
    job.cameras.check(*left.shape[:2])
    for parent in dict.fromkeys([folder, *(path.parent for path in outputs)]):
        prepare_output_folder(parent)
    judgement = judge_pair(left, right)
    for sentence in judgement.warnings if judgement else []:
        print(f"warning: {pair.name}: {sentence}", file=sys.stderr)
    prediction = job.predict(left, right)
    disparity = prediction.disparity
    prediction = job.without_doubtful(pair.name, left, right, prediction)
    print(
        f"{pair.name}: {left.shape[1]}x{left.shape[0]}, disparity {disparity.min():.1f} to {disparity.max():.1f} px, "
        f"{prediction.seconds:.2f} s on {prediction.device} in {prediction.precision}"
    )
    for path in job.write_all(outputs, left if job.view == "left" else right, prediction):
        print(path)


def _predict_many(job: _Job, pairs: list[PicturePair], folder: Path, outputs: dict[str, dict[Path, str]]) -> int:
    """Predict all pairs; one that cannot be read is reported and passed over.

    While one is predicted, threads read and judge the next ones and write the last ones: on a GPU all of that takes
    several times as long as the network.

    Returns:
        0, or 2 if a pair failed.
    """
    from tqdm import tqdm

    from fa_stereo.data.formats import read_picture_pair
    from fa_stereo.rectification import judge_pair

    seconds: list[float] = []
    precisions: Counter[str] = Counter()
    failed: list[str] = []
    suspicious = 0
    ahead = 4 if job.predictor.device.type == "cuda" else 1

    def fail(pair: PicturePair, error: InputError) -> None:
        failed.append(pair.name)
        tqdm.write(f"failed: {pair.name}: {error}", file=sys.stderr)

    def read(pair: PicturePair) -> tuple[NDArray[np.uint8], NDArray[np.uint8], PairJudgement | None]:
        left, right = read_picture_pair(pair.left_path, pair.right_path)
        job.cameras.check(*left.shape[:2])
        return left, right, judge_pair(left, right)

    def predict(reading: Iterator[tuple[PicturePair, Future[Any]]]) -> Iterator[_Predicted]:
        nonlocal suspicious
        for pair, future in reading:
            try:
                left, right, judgement = future.result()
                prediction = job.without_doubtful(pair.name, left, right, job.predict(left, right))
            except InputError as error:
                fail(pair, error)
                progress.update()
                continue
            if judgement is not None and judgement.warnings:
                suspicious += 1
                if suspicious <= MOST_WARNINGS:
                    for sentence in judgement.warnings:
                        tqdm.write(f"warning: {pair.name}: {sentence}", file=sys.stderr)
            yield _Predicted(pair, left if job.view == "left" else right, prediction)

    def write(predicted: _Predicted) -> None:
        paths = outputs[predicted.pair.name]
        for parent in {path.parent for path in paths}:
            parent.mkdir(parents=True, exist_ok=True)
        for _ in job.write_all(paths, predicted.picture, predicted.prediction):
            pass

    with (
        tqdm(total=len(pairs), desc="predict", unit="pair", disable=None) as progress,
        Threads(ahead) as readers,
        Threads(ahead, finish=True) as writers,  # what was predicted is written, whatever ends the command
    ):
        for predicted, future in writers.run(write, predict(readers.run(read, pairs))):
            try:
                future.result()
            except RangeError as error:  # this pair's alone; a folder that cannot be written ends it all
                fail(predicted.pair, error)
            else:
                seconds.append(predicted.prediction.seconds)
                precisions[predicted.prediction.precision] += 1
            progress.update()
    if suspicious > MOST_WARNINGS:
        print(f"warning: {suspicious} of {len(pairs)} pairs look unrectified or swapped", file=sys.stderr)
    if seconds:
        print(
            f"{len(seconds)} of {len(pairs)} pairs written to {folder}: "
            f"{float(np.median(seconds)):.2f} s a pair on {job.predictor.device} in {_in_words(precisions)}"
        )
    if failed:
        names = ", ".join(failed[:5]) + (", ..." if len(failed) > 5 else "")
        print(f"{len(failed)} of {len(pairs)} pairs failed: {names}", file=sys.stderr)
        return 2
    return 0


def _in_words(precisions: Counter[str]) -> str:
    """Return the precision of all pairs, or of most and how many were computed in another."""
    (usual, _), *others = precisions.most_common()
    return usual + "".join(f" ({count} in {name})" for name, count in others)
