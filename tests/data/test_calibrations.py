from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pytest

from fa_stereo.data.calibrations import read_calibration
from fa_stereo.errors import InputError
from fa_stereo.geometry import StereoCalibration

CALIBRATION = """cam0=[999.421 0 294.182; 0 999.421 252.932; 0 0 1]
cam1=[999.421 0 326.96; 0 999.421 252.932; 0 0 1]
doffs=32.778
baseline=193.001
width=741
height=497
ndisp=70
"""
# a raw recording's: of the picture before rectification, and of it; left and right colour camera
KITTI = """calib_time: 09-Jan-2012 13:57:47
corner_dist: 9.950000e-02
S_02: 1.392000e+03 5.120000e+02
K_02: 9.597910e+02 0.0e+00 6.960217e+02 0.0e+00 9.569251e+02 2.241806e+02 0.0e+00 0.0e+00 1.0e+00
S_rect_02: 1.242000e+03 3.750000e+02
P_rect_02: 7.0e+02 0.0e+00 6.0e+02 4.2e+01 0.0e+00 7.0e+02 1.7e+02 2.1e-01 0.0e+00 0.0e+00 1.0e+00 2.7e-03
S_rect_03: 1.242000e+03 3.750000e+02
P_rect_03: 7.0e+02 0.0e+00 6.0e+02 -3.36e+02 0.0e+00 7.0e+02 1.7e+02 2.1e+00 0.0e+00 0.0e+00 1.0e+00 2.7e-03
"""


def test_calibration(tmp_path: Path) -> None:
    (tmp_path / "calib.txt").write_text(CALIBRATION)
    calibration = read_calibration(tmp_path / "calib.txt")
    assert calibration == StereoCalibration(
        focal_length_px=999.421, baseline_m=193.001 / 1000, cx_px=294.182, cy_px=252.932, doffs_px=32.778,
        size_px=(741, 497),
    )  # fmt: skip
    half = calibration.resized(0.5, 0.5)
    assert half.size_px == (370, 248)
    assert half.doffs_px == 16.389
    (tmp_path / "calib.txt").write_text("\n".join(line for line in CALIBRATION.splitlines() if line[:5] != "doffs"))
    assert read_calibration(tmp_path / "calib.txt").doffs_px == pytest.approx(32.778)  # the second camera says it too
    (tmp_path / "calib.txt").write_text("cam0=[9 0 4; 0 9 5; 0 0 1]\nbaseline=100\n")
    assert read_calibration(tmp_path / "calib.txt") == StereoCalibration(9, 0.1, 4, 5)


@pytest.mark.parametrize(
    "text",
    [
        "hello",
        "cam0=[a b; c d]\nbaseline=1",
        CALIBRATION.replace("baseline=193.001", ""),
        "cam0=[9 0 1]\nbaseline=1",
        CALIBRATION.replace("999.421", "0"),
        CALIBRATION.replace("doffs=32.778", "doffs=nan"),
        CALIBRATION.replace("0 999.421 252.932", "0 900 252.932"),
        CALIBRATION.replace("width=741", "width=wide"),
    ],
)
def test_damaged_calibration_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "calib.txt").write_text(text)
    with pytest.raises(InputError, match=r"calib\.txt"):
        read_calibration(tmp_path / "calib.txt")


def test_a_mark_of_the_encoding_may_come_first(tmp_path: Path) -> None:
    path = tmp_path / "calib.txt"
    for text in (CALIBRATION, KITTI):
        path.write_text(text, encoding="utf-8-sig")
        assert read_calibration(path).focal_length_px > 600


def test_kitti_calibration(tmp_path: Path) -> None:
    path = tmp_path / "calib_cam_to_cam.txt"
    path.write_text(KITTI)
    assert read_calibration(path) == StereoCalibration(700.0, 0.54, 600.0, 170.0, 0.0, (1242, 375))
    lines = {line.split(":")[0]: line for line in KITTI.splitlines()}
    path.write_text("\n".join(lines[name].replace("_rect_0", "") for name in ("P_rect_02", "P_rect_03")))
    assert read_calibration(path) == StereoCalibration(700.0, 0.54, 600.0, 170.0)
    path.write_text(KITTI.replace("rect_02", "rect_00").replace("rect_03", "rect_01"))
    assert read_calibration(path).baseline_m == pytest.approx(0.54)  # of grey pictures


ROS = """image_width: 640
image_height: 480
camera_name: right
distortion_coefficients:
  rows: 1
  cols: 5
  data: [0.1, 0, 0, 0, 0]
projection_matrix:
  rows: 3
  cols: 4
  data: [500.0, 0.0, 310.5, -60.0,
         0.0, 500.0, 239.5, 0.0,
         0.0, 0.0, 1.0, 0.0]
"""


def test_ros_calibration(tmp_path: Path) -> None:
    path = tmp_path / "right.yaml"
    path.write_text(ROS)
    assert read_calibration(path) == StereoCalibration(500.0, 0.12, 310.5, 239.5, 0.0, (640, 480))
    path.write_text("height: 480\nwidth: 640\nP: [500.0, 0.0, 310.5, -60.0, 0, 500.0, 239.5, 0, 0, 0, 1.0, 0]\n")
    assert read_calibration(path) == StereoCalibration(500.0, 0.12, 310.5, 239.5, 0.0, (640, 480))  # of a message
    block = ROS.partition("  data: [500")[0] + "  data:\n" + "".join(
        f"  - {number}\n" for number in (500.0, 0.0, 310.5, -60.0, 0.0, 5.0e2, 239.5, 0, 0, 0, 1, 0)
    )  # fmt: skip
    for text in (block, "%YAML 1.1\n---\n" + block + "roi: {}\n", "%YAML 1.2\n---\n" + ROS):
        path.write_text(text)
        assert read_calibration(path) == StereoCalibration(500.0, 0.12, 310.5, 239.5, 0.0, (640, 480))


@pytest.mark.parametrize("suffix", [".yml", ".xml", ".json"])
@pytest.mark.parametrize("zero_disparity", [True, False])
def test_opencv_calibration(tmp_path: Path, suffix: str, zero_disparity: bool) -> None:
    """What cv2.stereoRectify makes of two turned cameras of which one stands 0.12 m to the right of the other."""
    matrix = np.array([[500.0, 0, 320], [0, 500, 240], [0, 0, 1]])
    other = np.array([[510.0, 0, 330], [0, 510, 236], [0, 0, 1]])
    rotation, _ = cv2.Rodrigues(np.array([0.01, -0.03, 0.02]))
    translation = rotation @ [[-0.12], [0.004], [0.002]]
    flags = cv2.CALIB_ZERO_DISPARITY if zero_disparity else 0
    none = np.zeros(5)
    _, _, left, right, reprojection, _, _ = cv2.stereoRectify(
        matrix, none, other, none, (640, 480), rotation, translation, flags=flags
    )
    path = tmp_path / f"extrinsics{suffix}"
    storage = cv2.FileStorage(str(path), cv2.FILE_STORAGE_WRITE)
    for name, value in (("P1", left), ("P2", right), ("Q", reprojection)):
        storage.write(name, value)
    storage.release()
    calibration = read_calibration(path)
    assert calibration.baseline_m == pytest.approx(np.linalg.norm(translation))
    assert (calibration.doffs_px == 0) == zero_disparity
    # OpenCV's own formula: [X, Y, Z, W] = Q [x, y, d, 1] with the disparity d of the left view
    x, y, disparity = 400.0, 200.0, 30.0
    point = reprojection @ [x, y, disparity, 1]
    depth = calibration.focal_length_px * calibration.baseline_m / (disparity + calibration.doffs_px)
    assert depth == pytest.approx(point[2] / point[3])
    assert (x - calibration.cx_px) / calibration.focal_length_px * depth == pytest.approx(point[0] / point[3])
    assert (y - calibration.cy_px) / calibration.focal_length_px * depth == pytest.approx(point[1] / point[3])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (CALIBRATION.replace("cam1=[999.421", "cam1=[1100"), "differ in focal length or principal row"),
        (CALIBRATION.replace("252.932;", "262.932;", 1), "differ in focal length or principal row"),
        ("%YAML:1.0\n---\nP1: 3\n", "no 3x4 matrices P1 and P2"),
        ("%YAML:1.0\n---\nP1: !!opencv-matrix\n  rows: [", "no 3x4 matrices P1 and P2"),
        ("{}", "no 3x4 matrices P1 and P2"),
        ("<?xml version='1.0'?><calibration/>", "no 3x4 matrices P1 and P2"),
        (ROS.replace("-60.0", "0.0"), "this is the left camera's calibration"),
        (ROS.replace("-60.0,", ""), "a projection_matrix must have 12 numbers"),
        (ROS.replace("-60.0", "60.0"), "the second camera stands to the left of the first"),
        (KITTI.replace("P_rect_03", "P_rect_04"), "without P_rect_02 and P_rect_03"),
        (KITTI.replace("-3.36e+02 ", ""), "must have 12 numbers each"),
        (KITTI.replace("-3.36e+02", "wide"), "a number is damaged"),
        (KITTI.replace("1.242000e+03 3.75", "inf 3.75"), "a number is damaged"),
        (KITTI.replace("-3.36e+02", "nan"), "not finite"),
        (KITTI.replace("-3.36e+02", "3.36e+02"), "the second camera stands to the left of the first"),
        (KITTI.replace("2.1e+00", "3.36e+04"), "above each other"),
        (KITTI.replace("7.0e+02", "0.0e+00"), "focal_length_px must be positive"),
        (KITTI.replace("P_rect_03: 7.0e+02", "P_rect_03: 7.1e+02"), "differ in focal length or principal row"),
        (KITTI.replace("7.0e+02 1.7e+02", "7.5e+02 1.7e+02"), "rectify the pictures to square pixels"),
    ],
)
def test_unusable_calibrations_are_refused(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "cameras.txt"
    path.write_text(text)
    with pytest.raises(InputError, match=message) as caught:
        read_calibration(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert "\n" not in str(caught.value)
