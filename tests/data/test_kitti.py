"""KITTI 2012 and 2015: frames with ground truth only, the documented split, occlusion from the two kinds of truth."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from fa_stereo.config import DatasetConfig
from fa_stereo.data import open_dataset
from fa_stereo.data.formats import write_kitti_disparity, write_picture
from fa_stereo.data.kitti import Kitti
from fa_stereo.errors import InputError

FOLDERS = {
    2012: ("colored_0", "colored_1", "disp_occ", "disp_noc"),
    2015: ("image_2", "image_3", "disp_occ_0", "disp_noc_0"),
}


def make_kitti(root: Path, year: int, numbers: list[int], part: str = "training", noc: bool = True) -> None:
    left, right, occ, non_occluded = FOLDERS[year]
    for number in numbers:
        for folder in (left, right):
            for suffix in ("_10", "_11"):  # the second frame of the scene has no ground truth
                path = root / part / folder / f"{number:06d}{suffix}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                write_picture(path, np.full((4, 6, 3), number, np.uint8))
        if part == "training":
            truth = np.full((4, 6), 10.0, np.float32)
            truth[0] = np.inf
            for folder in (occ, non_occluded)[: 1 + noc]:
                (root / part / folder).mkdir(exist_ok=True)
                write_kitti_disparity(root / part / folder / f"{number:06d}_10.png", truth)
                truth = truth.copy()
                truth[:, :2] = np.inf  # in the second folder


@pytest.mark.parametrize("year", [2012, 2015])
def test_frames_and_occlusion(tmp_path: Path, year: int) -> None:
    make_kitti(tmp_path, year, [0, 3])
    dataset = open_dataset(DatasetConfig(f"kitti{year}", str(tmp_path)))
    assert [dataset[i].name for i in range(len(dataset))] == ["training/000000_10", "training/000003_10"]
    sample = dataset[1]
    assert sample.left[0, 0, 0] == 3
    assert sample.disparity is not None
    assert sample.occluded is not None
    assert np.isinf(sample.disparity[0]).all()
    assert (sample.disparity[1:] == 10).all()
    expected = np.zeros((4, 6), bool)
    expected[1:, :2] = True
    np.testing.assert_array_equal(sample.occluded, expected)


@pytest.mark.parametrize(("year", "frames", "validation"), [(2015, 200, 40), (2012, 194, 34)])
def test_split(tmp_path: Path, year: int, frames: int, validation: int) -> None:
    make_kitti(tmp_path, year, list(range(frames)), noc=False)
    parts = {split: Kitti(tmp_path, year, split) for split in ("train", "validation", "all")}
    assert {split: len(part) for split, part in parts.items()} == {
        "train": 160,
        "validation": validation,
        "all": frames,
    }
    assert parts["validation"].frames[0].name == "training/000160_10"
    train, held_out = ({frame.name for frame in parts[split].frames} for split in ("train", "validation"))
    assert not train & held_out
    assert parts["train"][0].occluded is None


def test_benchmark_frames_have_no_truth(tmp_path: Path) -> None:
    make_kitti(tmp_path, 2015, [0, 1], part="testing")
    dataset = Kitti(tmp_path, 2015, "test")
    assert [frame.name for frame in dataset.frames] == ["testing/000000_10", "testing/000001_10"]
    assert dataset[0].disparity is None


def test_training_folder_itself_may_be_the_root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_kitti(tmp_path, 2015, [7])
    for folder in (tmp_path / "training").iterdir():
        (folder / "._000007_10.png").write_bytes(b"what some systems put beside a file")
    dataset = Kitti(tmp_path / "training", 2015)
    assert [frame.name for frame in dataset.frames] == ["training/000007_10"]
    monkeypatch.chdir(tmp_path / "training")
    assert [frame.name for frame in Kitti(".", 2015).frames] == ["training/000007_10"]


def test_incomplete_data_are_refused(tmp_path: Path) -> None:
    make_kitti(tmp_path, 2015, [0, 1])
    with pytest.raises(InputError, match="no frames of split 'validation'"):
        Kitti(tmp_path, 2015, "validation")
    with pytest.raises(InputError, match="testing/image_2: no such folder"):
        Kitti(tmp_path, 2015, "test")
    with pytest.raises(InputError, match=r"colored_0: no such folder; see data/README\.md for KITTI 2012"):
        Kitti(tmp_path, 2012)
    (tmp_path / "training/image_3/000001_10.png").unlink()
    with pytest.raises(InputError, match=r"lacks 1 files: .*image_3/000001_10\.png"):
        Kitti(tmp_path, 2015)


def test_real_frame(shared_data: Path) -> None:
    dataset = open_dataset(DatasetConfig("kitti2015", str(shared_data / "kitti2015")))
    sample = dataset[0]
    assert sample.name == "training/000046_10"
    assert sample.disparity is not None
    known = np.isfinite(sample.disparity)
    assert 0.1 < known.mean() < 0.2
    assert 65 < sample.disparity[known].max() < 66
    assert sample.occluded is None
