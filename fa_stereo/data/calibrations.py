"""Files that say what the two cameras of rectified pairs were, as the field's data sets and tools write them."""

from __future__ import annotations

import re
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray

from fa_stereo.errors import InputError
from fa_stereo.files import read_bytes
from fa_stereo.geometry import StereoCalibration


def read_calibration(path: str | Path) -> StereoCalibration:
    """Read the calibration of a rectified pair, in any of these formats, told apart by what they contain.

    * Middlebury 2014's ``calib.txt``: ``cam0=[f 0 cx; 0 f cy; 0 0 1]``, ``baseline`` in millimetres; ``doffs`` or
      ``cam1``, ``width`` and ``height`` if given.
    * KITTI's ``calib_cam_to_cam.txt``: ``P_rect_02``, ``P_rect_03`` and ``S_rect_02``, or the ``P2`` and ``P3`` of its
      other benchmarks: the projection matrices of the colour cameras, in metres. The grey ones (00 and 01, 0 and 1) are
      taken where the file has no others.
    * The right camera's file of a ROS calibration (``camera_calibration``), whose ``projection_matrix`` is in metres.
    * OpenCV's ``FileStorage`` (YAML, XML or JSON): ``P1`` and ``P2`` as ``cv2.stereoRectify`` returns them. OpenCV's
      lengths have the unit of the calibration pattern's; it must be metres.

    Raises:
        InputError: The file is unusable, of none of these formats, or describes no two equal cameras side by side with
            square pixels.
    """
    text = read_bytes(path).decode("utf-8-sig", errors="replace")
    try:
        ros = re.search(
            r"^(?:projection_matrix:.*?data|P):(?:\s*\[([^\]]*)\]|((?:\s*-\s[^\n]*$)+))", text,
            flags=re.MULTILINE | re.DOTALL,
        )  # fmt: skip
        stored = re.match(r"\s*(%YAML|<\?xml|\{)", text)  # by OpenCV, or any YAML file
        if ros and not (stored and re.search(r"\bP1\b", text)):
            numbers = ros[1] if ros[1] is not None else re.sub(r"^\s*-\s", " ", ros[2], flags=re.MULTILINE)
            return _from_projections(*_ros_projections(numbers, text))
        if stored:
            return _from_projections(*_opencv_projections(text))
        kitti = {key: numbers.split() for key, numbers in re.findall(r"^([PS]\w*):(.*)$", text, flags=re.MULTILINE)}
        if kitti:
            return _from_projections(*_kitti_projections(kitti))
        return _middlebury(text)
    except InputError as error:
        raise InputError(f"{path}: {error}") from error
    except (ValueError, OverflowError) as error:
        raise InputError(f"{path}: a number is damaged ({error}): fetch the calibration again") from error


def _middlebury(text: str) -> StereoCalibration:
    values = dict(re.findall(r"^\s*(\w+)\s*=\s*(.+?)\s*$", text, flags=re.MULTILINE))
    try:
        matrix = _matrix(values["cam0"])
        focal_length_px, cx_px, focal_length_y_px, cy_px = matrix[0], matrix[2], matrix[4], matrix[5]
        baseline_m = float(values["baseline"]) / 1000
        right = _matrix(values["cam1"]) if "cam1" in values else matrix
        doffs_px = float(values.get("doffs", right[2] - cx_px))
        size = [values.get(side) for side in ("width", "height")]
        size_px = None if None in size else (round(float(size[0])), round(float(size[1])))  # type: ignore[arg-type]
    except (KeyError, IndexError) as error:
        raise InputError(
            "neither Middlebury's calibration (cam0=[f 0 cx; 0 f cy; 0 0 1], baseline=...) nor KITTI's (P_rect_02, "
            "P_rect_03) nor ROS's (projection_matrix) nor OpenCV's (P1, P2)"
        ) from error
    _check_square(focal_length_px, focal_length_y_px)
    _check_alike(focal_length_px, right[0], cy_px, right[5])
    return StereoCalibration(focal_length_px, baseline_m, cx_px, cy_px, doffs_px, size_px)


def _matrix(text: str) -> list[float]:
    """Return the numbers of ``[a b c; d e f; g h i]``, row by row."""
    return [float(number) for number in re.split(r"[\s;,]+", text.strip("[] "))]


def _kitti_projections(
    values: dict[str, list[str]],
) -> tuple[NDArray[np.float64], NDArray[np.float64], tuple[int, int] | None]:
    """Return the projection matrices [3, 4] of the left and the right camera, and the pictures' size."""
    pairs = (("P_rect_02", "P_rect_03"), ("P2", "P3"), ("P_rect_00", "P_rect_01"), ("P0", "P1"))
    found = next((pair for pair in pairs if values.keys() >= set(pair)), None)
    if found is None:
        raise InputError("a KITTI calibration without P_rect_02 and P_rect_03, or P2 and P3: choose another file")
    left, right = (np.array([float(number) for number in values[name]]) for name in found)
    if not left.size == right.size == 12:
        raise InputError(f"{found[0]} and {found[1]} must have 12 numbers each: the file is damaged")
    size = values.get(found[0].replace("P", "S"))
    size_px = (round(float(size[0])), round(float(size[1]))) if size is not None and len(size) == 2 else None
    return left.reshape(3, 4), right.reshape(3, 4), size_px


def _ros_projections(
    numbers: str, text: str
) -> tuple[NDArray[np.float64], NDArray[np.float64], tuple[int, int] | None]:
    """Return the projection matrices [3, 4] that the right camera's says, as both have one but for its place."""
    right = np.array([float(number) for number in re.split(r"[\s,]+", numbers.strip())])
    if right.size != 12:
        raise InputError("a projection_matrix must have 12 numbers: the file is damaged")
    right = right.reshape(3, 4)
    if right[0, 3] == 0:
        raise InputError(
            "this is the left camera's calibration, which does not tell the baseline: give the right one's"
        )
    left = right.copy()
    left[:, 3] = 0
    size = [re.search(rf"^(?:image_)?{side}:\s*(\d+)\s*$", text, flags=re.MULTILINE) for side in ("width", "height")]
    return left, right, (int(size[0][1]), int(size[1][1])) if size[0] and size[1] else None


def _opencv_projections(text: str) -> tuple[NDArray[np.float64], NDArray[np.float64], None]:
    """Return the projection matrices [3, 4] of the left and the right camera."""
    try:
        storage = cv2.FileStorage(text, cv2.FILE_STORAGE_READ | cv2.FILE_STORAGE_MEMORY)
        matrices = [storage.getNode(name).mat() for name in ("P1", "P2")]
    except (cv2.error, SystemError):
        matrices = []
    if not matrices or any(matrix is None or matrix.shape != (3, 4) for matrix in matrices):
        raise InputError(
            "no 3x4 matrices P1 and P2 that cv2.FileStorage can read: write those that cv2.stereoRectify returns"
        )
    left, right = (np.asarray(matrix, dtype=np.float64) for matrix in matrices)
    return left, right, None


def _from_projections(
    left: NDArray[np.float64], right: NDArray[np.float64], size_px: tuple[int, int] | None
) -> StereoCalibration:
    """Return the cameras of two projections [f 0 cx -f X; 0 f cy -f Y; 0 0 1 0], for a camera that stands at (X, Y).

    So they are defined by KITTI (Geiger et al. 2013, "Vision meets robotics"), ROS (``sensor_msgs/CameraInfo``) and
    OpenCV (``stereoRectify``). f, cx, cy in pixels, X and Y in metres: ``baseline_m`` is the difference in X.
    """
    if not (np.isfinite(left).all() and np.isfinite(right).all()):
        raise InputError("a projection matrix has numbers that are not finite")
    focal_length_px = float(left[0, 0])
    _check_square(focal_length_px, float(left[1, 1]))
    _check_alike(focal_length_px, float(right[0, 0]), float(left[1, 2]), float(right[1, 2]))
    baseline_m, above_m = ((left - right)[:2, 3] / focal_length_px).tolist() if focal_length_px else (0.0, 0.0)
    if abs(above_m) > abs(baseline_m):
        raise InputError("the cameras stand above each other: turn the pictures by a quarter")
    if baseline_m < 0:
        raise InputError("the second camera stands to the left of the first: exchange them")
    doffs_px = float(right[0, 2] - left[0, 2])
    return StereoCalibration(focal_length_px, baseline_m, float(left[0, 2]), float(left[1, 2]), doffs_px, size_px)


def _check_alike(focal_length_px: float, right_focal_length_px: float, cy_px: float, right_cy_px: float) -> None:
    if abs(right_focal_length_px - focal_length_px) > 1e-3 * abs(focal_length_px) or abs(right_cy_px - cy_px) > 0.1:
        raise InputError("the two cameras differ in focal length or principal row: rectify the pictures")


def _check_square(focal_length_px: float, focal_length_y_px: float) -> None:
    if abs(focal_length_y_px - focal_length_px) > 1e-3 * abs(focal_length_px):
        raise InputError(
            f"the focal lengths along rows and columns, {focal_length_px:g} and {focal_length_y_px:g} px, are not one: "
            "rectify the pictures to square pixels"
        )
