"""Middlebury's three generations: naming, divisors, masks, resolutions."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from fa_stereo.config import DatasetConfig
from fa_stereo.data import open_dataset
from fa_stereo.data.formats import write_pfm, write_picture
from fa_stereo.data.middlebury import Middlebury2006, Middlebury2014, MiddleburyV2
from fa_stereo.errors import InputError


def gray(folder: Path, name: str, value: int | np.ndarray, size: tuple[int, int] = (4, 6)) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    array = np.full(size, value, np.uint8) if isinstance(value, int) else value.astype(np.uint8)
    write_picture(folder / name, array)


def make_2014(scene: Path, truth: str = "disp0GT.pfm") -> None:
    gray(scene, "im0.png", 1)
    gray(scene, "im1.png", 2)
    disparity = np.full((4, 6), 5, np.float32)
    disparity[0] = np.inf
    write_pfm(scene / truth, disparity)


def test_2014_masks_and_invalid_pixels(tmp_path: Path) -> None:
    make_2014(tmp_path / "trainingQ/Chair")
    mask = np.full((4, 6), 255)
    mask[:, 0], mask[0] = 128, 0
    gray(tmp_path / "trainingQ/Chair", "mask0nocc.png", mask)
    sample = open_dataset(DatasetConfig("middlebury2014", str(tmp_path)))[0]
    assert sample.name == "Chair"
    assert sample.disparity is not None
    assert np.isinf(sample.disparity[0]).all()
    assert (sample.disparity[1:] == 5).all()
    expected = np.zeros((4, 6), bool)
    expected[1:, 0] = True  # without ground truth nothing is known
    np.testing.assert_array_equal(sample.occluded, expected)


def test_2014_resolutions(tmp_path: Path) -> None:
    make_2014(tmp_path / "trainingQ/Chair")
    make_2014(tmp_path / "trainingH/Chair")
    with pytest.raises(InputError, match=r"holds quarter, half resolution: say which one is to be read"):
        Middlebury2014(tmp_path)
    assert "trainingH" in Middlebury2014(tmp_path, resolution="half").frames[0].left
    with pytest.raises(InputError, match="trainingF: no such folder"):
        Middlebury2014(tmp_path, resolution="full")
    with pytest.raises(InputError, match="must be one of quarter, half, full"):
        Middlebury2014(tmp_path, resolution="third")
    assert len(Middlebury2014(tmp_path / "trainingH")) == 1


def test_2014_archives_of_single_scenes(tmp_path: Path) -> None:
    make_2014(tmp_path / "Chair-perfect", "disp0.pfm")
    sample = Middlebury2014(tmp_path)[0]
    assert sample.disparity is not None
    assert sample.occluded is None


def test_2014_test_split_has_no_truth(tmp_path: Path) -> None:
    gray(tmp_path / "testH/Bus", "im0.png", 1)
    gray(tmp_path / "testH/Bus", "im1.png", 1)
    assert Middlebury2014(tmp_path, "test")[0].disparity is None
    with pytest.raises(InputError, match="no scenes"):
        Middlebury2014(tmp_path, "train")
    with pytest.raises(InputError, match="not 'validation'"):
        Middlebury2014(tmp_path, "validation")


def test_2014_missing_file_is_named(tmp_path: Path) -> None:
    make_2014(tmp_path / "trainingQ/Chair")
    (tmp_path / "trainingQ/Chair/disp0GT.pfm").unlink()
    with pytest.raises(InputError, match=r"Chair/disp0GT\.pfm: no such file"):
        Middlebury2014(tmp_path)


def make_2006(scene: Path, height: int) -> None:
    for name, value in (("view1.png", 1), ("view5.png", 2), ("disp5.png", 90)):
        gray(scene, name, value, (height, 6))
    stored = np.full((height, 6), 90)
    stored[0] = 0
    gray(scene, "disp1.png", stored, (height, 6))


@pytest.mark.parametrize(
    ("folder", "height", "divisor"), [("ThirdSize", 370, 3), ("HalfSize", 555, 2), ("FullSize", 1110, 1), (".", 370, 3)]
)
def test_2006_divisor_follows_the_size(tmp_path: Path, folder: str, height: int, divisor: int) -> None:
    make_2006(tmp_path / folder / "Art", height)
    sample = open_dataset(DatasetConfig("middlebury2006", str(tmp_path)))[0]
    assert sample.disparity is not None
    assert sample.right_disparity is not None
    assert np.isinf(sample.disparity[0]).all()
    assert (sample.disparity[1:] == 90 / divisor).all()
    assert (sample.right_disparity == 90 / divisor).all()


def test_2006_resized_pictures_are_refused(tmp_path: Path) -> None:
    make_2006(tmp_path / "Art", 400)
    with pytest.raises(InputError, match=r"disp1\.png is 400 rows high"):
        Middlebury2006(tmp_path)[0]


def test_2006_several_sizes(tmp_path: Path) -> None:
    make_2006(tmp_path / "ThirdSize/Art", 370)
    make_2006(tmp_path / "HalfSize/Art", 555)
    with pytest.raises(InputError, match="option resolution"):
        Middlebury2006(tmp_path)
    assert Middlebury2006(tmp_path, "half")[0].left.shape[0] == 555


def make_v2(scene: Path) -> None:
    for name, value in (("imL.png", 1), ("imR.png", 2), ("groundtruth.png", 40)):
        gray(scene, name, value)
    nonocc, evaluated = np.full((4, 6), 255), np.full((4, 6), 255)
    nonocc[:, :2] = 0
    evaluated[:, 0] = 0
    gray(scene, "nonocc.png", nonocc)
    gray(scene, "all.png", evaluated)


def test_v2_divisor_and_masks(tmp_path: Path) -> None:
    make_v2(tmp_path / "mine")
    (tmp_path / "mine/info.txt").write_text("8\n59\n19")
    sample = open_dataset(DatasetConfig("middlebury_v2", str(tmp_path)))[0]
    assert (sample.disparity == 5).all()
    expected = np.zeros((4, 6), bool)
    expected[:, :2] = True  # column 0 is in neither mask: not evaluated, and so not among the non-occluded either
    np.testing.assert_array_equal(sample.occluded, expected)


def test_v2_divisors_of_known_and_unknown_scenes(tmp_path: Path) -> None:
    make_v2(tmp_path / "known/cones")
    assert (MiddleburyV2(tmp_path / "known")[0].disparity == 10).all()
    make_v2(tmp_path / "unknown/mine")
    with pytest.raises(InputError, match=r"info\.txt: no such file, and the divisor of scene mine is unknown"):
        MiddleburyV2(tmp_path / "unknown")
    (tmp_path / "unknown/mine/info.txt").write_text("eight")
    with pytest.raises(InputError, match="first line is not the divisor"):
        MiddleburyV2(tmp_path / "unknown")


def test_v2_names_of_the_original_archives(tmp_path: Path) -> None:
    for name, value in (("im2.ppm", 1), ("im6.ppm", 2), ("disp2.pgm", 16), ("disp6.pgm", 24)):
        gray(tmp_path / "venus", name, value)
    sample = MiddleburyV2(tmp_path)[0]
    assert sample.right[0, 0, 0] == 2
    assert (sample.disparity == 2).all()
    assert (sample.right_disparity == 3).all()


def test_real_scenes(shared_data: Path) -> None:
    motorcycle = open_dataset(DatasetConfig("middlebury2014", str(shared_data / "middlebury2014")))[0]
    assert motorcycle.disparity is not None
    assert motorcycle.occluded is not None
    assert 62 < motorcycle.disparity[np.isfinite(motorcycle.disparity)].max() < 63
    assert 0.05 < motorcycle.occluded.mean() < 0.2
    scenes = open_dataset(DatasetConfig("middlebury2006", str(shared_data / "middlebury2006_third")))
    assert len(scenes) == 11
    cones, venus = open_dataset(DatasetConfig("middlebury_v2", str(shared_data / "middlebury_v2")))
    assert cones.disparity is not None
    assert venus.disparity is not None
    assert cones.disparity[np.isfinite(cones.disparity)].max() == 55
    assert venus.disparity[np.isfinite(venus.disparity)].max() == 19.75
    assert cones.occluded is not None
    assert 0.05 < cones.occluded.mean() < 0.2
