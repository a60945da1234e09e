"""ETH3D's two-view pairs: grey pictures, inf as invalid, masks, truth beside the pictures or in its own archive."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from fa_stereo.config import DatasetConfig
from fa_stereo.data import open_dataset
from fa_stereo.data.eth3d import Eth3d
from fa_stereo.data.formats import write_pfm, write_picture
from fa_stereo.errors import InputError


def make_scene(pictures: Path, truth: Path | None) -> None:
    pictures.mkdir(parents=True, exist_ok=True)
    for name in ("im0.png", "im1.png"):
        write_picture(pictures / name, np.full((4, 6), 90, np.uint8))
    if truth is not None:
        truth.mkdir(parents=True, exist_ok=True)
        disparity = np.full((4, 6), 3, np.float32)
        disparity[0] = np.inf
        write_pfm(truth / "disp0GT.pfm", disparity)
        mask = np.full((4, 6), 255, np.uint8)
        mask[:, 0] = 0
        write_picture(truth / "mask0nocc.png", mask)


@pytest.mark.parametrize("truth", ["two_view_training", "two_view_training_gt"])
def test_scene(tmp_path: Path, truth: str) -> None:
    make_scene(tmp_path / "two_view_training/forest_1s", tmp_path / truth / "forest_1s")
    sample = open_dataset(DatasetConfig("eth3d", str(tmp_path)))[0]
    assert sample.name == "forest_1s"
    assert sample.left.shape == (4, 6, 3)
    assert sample.disparity is not None
    assert np.isinf(sample.disparity[0]).all()
    assert (sample.disparity[1:] == 3).all()
    expected = np.zeros((4, 6), bool)
    expected[1:, 0] = True
    np.testing.assert_array_equal(sample.occluded, expected)


def test_folder_of_scenes_may_be_the_root(tmp_path: Path) -> None:
    make_scene(tmp_path / "scenes/a", tmp_path / "scenes/a")
    assert len(Eth3d(tmp_path / "scenes")) == 1


def test_test_split_has_no_truth(tmp_path: Path) -> None:
    make_scene(tmp_path / "two_view_test/lakeside_1l", None)
    assert Eth3d(tmp_path, "test")[0].disparity is None


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read every folder")
def test_a_scene_that_cannot_be_read_is_not_left_out(tmp_path: Path) -> None:
    for name in ("delivery_area", "electro"):
        make_scene(tmp_path / name, tmp_path / name)
    (tmp_path / "lost+found").mkdir(0)
    (tmp_path / "electro").chmod(0)
    try:
        with pytest.raises(InputError, match=r"electro: this folder cannot be read \(Permission denied\)"):
            Eth3d(tmp_path)
    finally:
        (tmp_path / "electro").chmod(0o755)
    assert len(Eth3d(tmp_path)) == 2


def test_incomplete_data_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no scenes"):
        Eth3d(tmp_path)
    with pytest.raises(InputError, match="not 'validation'"):
        Eth3d(tmp_path, "validation")
    make_scene(tmp_path / "two_view_training/a", None)
    with pytest.raises(InputError, match=r"two_view_training_gt/a/disp0GT\.pfm: no such file"):
        Eth3d(tmp_path)
    make_scene(tmp_path / "two_view_training/a", tmp_path / "two_view_training/a")
    (tmp_path / "two_view_training/a/im1.png").unlink()
    with pytest.raises(InputError, match=r"a/im1\.png: no such file"):
        Eth3d(tmp_path)
