"""The options that say what the cameras were, for depth in metres and points."""

from __future__ import annotations

import argparse
import dataclasses
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fa_stereo.errors import InputError

if TYPE_CHECKING:
    from fa_stereo.geometry import StereoCalibration

METRIC_FORMATS = ("depth_m", "depth_mm", "ply")
"""Formats of results that need the cameras."""

_NUMBERS = {
    "focal_length_px": ("F", "focal length in pixels"),
    "baseline_m": ("B", "distance of the cameras in metres"),
    "doffs_px": ("D", "column of the right principal point minus that of the left one (default 0)"),
    "cx_px": ("X", "for point clouds: column of the left camera's principal point (default: the middle)"),
    "cy_px": ("Y", "for point clouds: its row (default: the middle)"),
    "max_depth_m": ("Z", "for point clouds: leave out what is farther"),
}
_OF_POINTS = ("cx_px", "cy_px", "max_depth_m")
_POSITIVE = ("focal_length_px", "baseline_m", "max_depth_m")


def add_camera_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options that describe the cameras."""
    group = parser.add_argument_group("cameras", "at the size of the pictures, for depth and points")
    group.add_argument(
        "--calibration", type=Path, metavar="FILE",
        help="Middlebury's calib.txt (baseline in millimetres), KITTI's calib_cam_to_cam.txt, the right camera's file "
        "of ROS's camera_calibration, or P1 and P2 of OpenCV's stereoRectify in its FileStorage (in metres)",
    )  # fmt: skip
    for name, (metavar, what) in _NUMBERS.items():
        group.add_argument(_option(name), type=float, metavar=metavar, help=what)


class Cameras:
    """What the options of ``add_camera_arguments`` say.

    Args:
        arguments: The command line.
        formats: Of the results asked for; see ``METRIC_FORMATS``.

    Attributes:
        max_depth_m: Of point clouds.

    Raises:
        InputError: A format needs what is not given, something is given that no format needs, or it is no camera.
    """

    def __init__(self, arguments: argparse.Namespace, formats: tuple[str, ...]) -> None:
        from fa_stereo.data.calibrations import read_calibration
        from fa_stereo.geometry import StereoCalibration

        given = {name: getattr(arguments, name) for name in _NUMBERS if getattr(arguments, name) is not None}
        metric = [name for name in formats if name in METRIC_FORMATS]
        self.file: Path | None = arguments.calibration
        if not metric and (self.file is not None or given):
            option = "--calibration" if self.file is not None else _option(next(iter(given)))
            raise InputError(f"{option} is for the formats {', '.join(METRIC_FORMATS)}: ask for one, or leave it out")
        for name, value in given.items():
            if not math.isfinite(value) or (name in _POSITIVE and value <= 0):
                kind = "positive" if name in _POSITIVE else "finite"
                raise InputError(f"{_option(name)} must be a {kind} number, got {value:g}")
            if name in _OF_POINTS and "ply" not in formats:
                raise InputError(f"{_option(name)} is for point clouds: ask for ply, or leave it out")
        self.max_depth_m = given.pop("max_depth_m", math.inf)
        self._calibration: StereoCalibration | None = None
        self._centred: list[str] = []  # what lies in the middle of the pictures, whatever their size
        if self.file is not None:
            if given:
                raise InputError(f"{self.file} says what {_option(next(iter(given)))} says: leave one of them out")
            self._calibration = read_calibration(self.file)
        elif metric:
            if not {"focal_length_px", "baseline_m"} <= given.keys():
                raise InputError(
                    f"{metric[0]} needs the cameras: add --calibration FILE, or --focal-length-px and --baseline-m"
                )
            self._centred = [name for name in ("cx_px", "cy_px") if name not in given]
            self._calibration = StereoCalibration(**{"cx_px": 0.0, "cy_px": 0.0, **given})

    def check(self, height: int, width: int) -> None:
        """Make sure, where a result needs the cameras, that they took pictures of this size.

        Raises:
            InputError: The calibration says another one.
        """
        size_px = None if self._calibration is None else self._calibration.size_px
        if size_px is not None and size_px != (width, height):
            raise InputError(
                f"{self.file} is for pictures of {size_px[0]}x{size_px[1]}, this one has {width}x{height}: give the "
                "calibration at the size of the pictures"
            )

    def of_pictures(self, height: int, width: int) -> StereoCalibration:
        """Return the cameras that took pictures of a size; only for a format that needs them."""
        assert self._calibration is not None
        middle = {"cx_px": (width - 1) / 2, "cy_px": (height - 1) / 2}
        centred: dict[str, Any] = {name: middle[name] for name in self._centred}
        return dataclasses.replace(self._calibration, **centred)


def _option(name: str) -> str:
    return f"--{name.replace('_', '-')}"
