"""The options that say what the cameras were, for depth in metres and points."""

from __future__ import annotations

import argparse
import dataclasses
import math
from typing import TYPE_CHECKING

from fa_stereo.errors import InputError

if TYPE_CHECKING:
    from fa_stereo.geometry import StereoCalibration

METRIC_FORMATS = ("depth_m", "depth_mm", "ply")
"""Formats of results that need the cameras."""

_OPTIONS = (
    ("--focal-length-px", "F", "focal length in pixels"),
    ("--baseline-m", "B", "distance of the cameras in metres"),
    ("--cx-px", "X", "column of the left camera's principal point (default: the middle)"),
    ("--cy-px", "Y", "its row (default: the middle)"),
    ("--doffs-px", "D", "column of the right principal point minus that of the left one (default 0)"),
)


def add_camera_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options that describe the cameras."""
    group = parser.add_argument_group("cameras", "at the size of the pictures, for depth and points")
    group.add_argument(
        "--calibration", metavar="FILE", help="Middlebury's calib.txt: cam0, baseline in millimetres, doffs"
    )
    for option, metavar, what in _OPTIONS:
        group.add_argument(option, type=float, metavar=metavar, help=what)
    group.add_argument("--max-depth-m", type=float, metavar="Z", help="leave farther points out of point clouds")


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
        from fa_stereo.data.middlebury import read_calibration
        from fa_stereo.geometry import StereoCalibration

        values = {option[2:].replace("-", "_"): option for option, *_ in _OPTIONS}
        given = {name: getattr(arguments, name) for name in values if getattr(arguments, name) is not None}
        options = ["--calibration"] * (arguments.calibration is not None) + [values[name] for name in given]
        metric = [name for name in formats if name in METRIC_FORMATS]
        if options and not metric:
            raise InputError(f"{options[0]} is for --formats {', '.join(METRIC_FORMATS)}: add one, or leave it out")
        self.max_depth_m = math.inf if arguments.max_depth_m is None else arguments.max_depth_m
        if not self.max_depth_m > 0:
            raise InputError(f"--max-depth-m must be positive, got {arguments.max_depth_m}")
        if arguments.max_depth_m is not None and "ply" not in formats:
            raise InputError("--max-depth-m is for point clouds: add ply to --formats, or leave it out")
        self._calibration: StereoCalibration | None = None
        self._centred: list[str] = []  # what lies in the middle of the pictures, whatever their size
        if arguments.calibration is not None:
            if given:
                raise InputError(f"--calibration says what {options[1]} says: leave one of them out")
            self._calibration = read_calibration(arguments.calibration)
        elif metric:
            if not {"focal_length_px", "baseline_m"} <= given.keys():
                raise InputError(
                    f"{metric[0]} needs the cameras: add --calibration FILE, or --focal-length-px and --baseline-m"
                )
            self._centred = [name for name in ("cx_px", "cy_px") if name not in given]
            self._calibration = StereoCalibration(**{"cx_px": 0.0, "cy_px": 0.0, **given})

    def check(self, height: int, width: int) -> None:
        """Make sure, where a result needs the cameras, that they can have taken pictures of a size.

        Raises:
            InputError: They cannot.
        """
        if self._calibration is not None:
            self.of_pictures(height, width)

    def of_pictures(self, height: int, width: int) -> StereoCalibration:
        """Return the cameras that took pictures of a size; only for a format that needs them.

        Raises:
            InputError: They cannot have taken such pictures.
        """
        assert self._calibration is not None
        middle = {"cx_px": (width - 1) / 2, "cy_px": (height - 1) / 2}
        calibration = dataclasses.replace(self._calibration, **{name: middle[name] for name in self._centred})
        if not (0 <= calibration.cx_px < width and 0 <= calibration.cy_px < height):
            raise InputError(
                f"the principal point ({calibration.cx_px:g}, {calibration.cy_px:g}) lies outside of the {width}x"
                f"{height} picture: give the calibration at the size of the pictures"
            )
        return calibration
