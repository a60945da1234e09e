"""fa-stereo check-data, run as a process: counts, problems, statistics, exit codes."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from training_runs import write_pairs

from fa_stereo.cli import check_data
from fa_stereo.cli.main import main
from fa_stereo.data.formats import read_picture, write_kitti_disparity, write_pfm, write_picture
from fa_stereo.errors import InputError


def run(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "fa_stereo.cli.main", "check-data", *map(str, arguments)]
    return subprocess.run(
        command, capture_output=True, text=True, check=False, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )


def make_scene_flow(root: Path) -> Path:
    """Three scenes in the official layout: one FlyingThings3D frame for each split, two Driving frames."""
    scenes = [
        ("FlyingThings3D", "TRAIN/A/0000", ["0006"]),
        ("FlyingThings3D", "TEST/C/0000", ["0006"]),
        ("Driving", "15mm_focallength/scene_forwards/fast", ["0001", "0002"]),
    ]
    for folder, scene, stems in scenes:
        for stem in stems:
            for view in ("left", "right"):
                picture = root / folder / "frames_cleanpass" / scene / view / f"{stem}.png"
                picture.parent.mkdir(parents=True, exist_ok=True)
                write_picture(picture, np.full((4, 6, 3), 90, np.uint8))
            disparity = np.full((4, 6), 100, np.float32)
            disparity[0] = 200
            disparity[1, 0] = np.inf
            path = root / folder / "disparity" / scene / "left" / f"{stem}.pfm"
            path.parent.mkdir(parents=True, exist_ok=True)
            write_pfm(path, disparity)
    return root


def test_counts_against_the_published_ones(tmp_path: Path) -> None:
    make_scene_flow(tmp_path / "data")
    done = run(tmp_path / "data", "--json", tmp_path / "report.json", "--workers", "2")
    assert done.returncode == 1
    assert "problems found" in done.stdout
    assert "Monkaa is missing (official layout)" in done.stdout
    report = json.loads((tmp_path / "report.json").read_text())
    counts = {count["what"]: (count["found"], count["expected"]) for count in report["counts"]}
    assert counts == {
        "clean train flyingthings3d": (1, 22390),
        "clean train monkaa": (0, 8664),
        "clean train driving": (2, 4400),
        "clean train driving/15mm_focallength": (2, 2200),
        "clean train driving/35mm_focallength": (0, 2200),  # what the total alone would not show
        "clean test flyingthings3d": (1, 4370),
        "clean test TEST/A": (0, 1440),
        "clean test TEST/B": (0, 1470),
        "clean test TEST/C": (1, 1460),
    }
    assert report["layout"] == "official"
    assert report["frames_read"] == 4
    assert report["broken"] == []
    assert report["sound"] is False


def test_published_totals_add_up() -> None:
    train = sum(n for (_, split), n in check_data.EXPECTED_FRAMES.items() if split == "train")
    assert train == 35454
    parts = check_data.EXPECTED_FRAMES_OF_PART
    assert sum(n for (split, _), n in parts.items() if split == "test") == 4370
    assert sum(n for (split, _), n in parts.items() if split == "train") == 4400


def test_part_known_to_be_one_is_sound_and_described(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_scene_flow(tmp_path)
    assert check_data.main([str(tmp_path), "--partial"]) == 0
    out = capsys.readouterr().out
    assert "all sound" in out
    # of 24 pixels 6 hold 200, 17 hold 100 and 1 nothing
    assert "min 100.00, mean 126.09, max 200.00 px; 26.09 % at least 192 px, 4.17 % without ground truth" in out


def test_part_without_a_split_is_sound_but_not_with_half_of_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_scene_flow(tmp_path)
    shutil.rmtree(tmp_path / "FlyingThings3D/frames_cleanpass/TEST")
    assert check_data.main([str(tmp_path), "--partial", "--quick"]) == 1
    assert "TEST is missing" in capsys.readouterr().out
    shutil.rmtree(tmp_path / "FlyingThings3D/disparity/TEST")
    assert check_data.main([str(tmp_path), "--partial", "--quick"]) == 0
    assert check_data.main([str(tmp_path), "--quick"]) == 1


def test_missing_and_broken_files_are_listed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_scene_flow(tmp_path / "data")
    (tmp_path / "data/Driving/frames_cleanpass/15mm_focallength/scene_forwards/fast/right/0002.png").unlink()
    truncated = tmp_path / "data/FlyingThings3D/disparity/TEST/C/0000/left/0006.pfm"
    truncated.write_bytes(truncated.read_bytes()[:-1])
    (tmp_path / "data/FlyingThings3D/frames_cleanpass/TRAIN/A/0000/left/0006.png").write_bytes(b"")
    assert check_data.main([str(tmp_path / "data"), "--partial", "--json", str(tmp_path / "report.json")]) == 1
    report = json.loads((tmp_path / "report.json").read_text())
    assert [Path(file).name for file in report["missing"]] == ["0002.png"]
    assert len(report["broken"]) == 2
    assert "left/0006.png: the file is empty" in report["broken"][0]
    assert "left/0006.pfm: the PFM file is truncated" in report["broken"][1]
    out = capsys.readouterr().out
    assert "1 files missing" in out
    assert "broken: 2" in out


def test_quick_reads_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_scene_flow(tmp_path)
    for picture in tmp_path.rglob("*.png"):
        picture.write_bytes(b"broken")
    assert check_data.main([str(tmp_path), "--quick", "--partial"]) == 0
    assert "disparity:" not in capsys.readouterr().out


def test_limit_bounds_what_is_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_scene_flow(tmp_path)
    assert check_data.main([str(tmp_path), "--partial", "--limit", "1", "--sets", "driving"]) == 0
    out = capsys.readouterr().out
    assert "read 1 frames" in out
    assert "flyingthings3d" not in out


def test_unusable_root_leaves_with_2(tmp_path: Path) -> None:
    done = run(tmp_path / "none")
    assert done.returncode == 2
    assert "none: no such folder; data/README.md" in done.stderr
    assert "Traceback" not in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    (tmp_path / "other").mkdir()
    with pytest.raises(InputError, match="nothing of Scene Flow"):
        check_data.main([str(tmp_path)])


def test_report_that_cannot_be_written(tmp_path: Path) -> None:
    make_scene_flow(tmp_path / "data")
    with pytest.raises(InputError, match=r"report\.json: cannot be written"):
        check_data.main([str(tmp_path / "data"), "--quick", "--json", str(tmp_path / "none/report.json")])
    with pytest.raises(InputError, match=r"data: cannot be written \(a folder is in its place\)"):
        check_data.main([str(tmp_path / "data"), "--json", str(tmp_path / "data")])


def test_other_kinds(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for folder in ("image_2", "image_3"):
        (tmp_path / "training" / folder).mkdir(parents=True)
        write_picture(tmp_path / "training" / folder / "000000_10.png", np.full((4, 6, 3), 90, np.uint8))
    (tmp_path / "training/disp_occ_0").mkdir()
    write_kitti_disparity(tmp_path / "training/disp_occ_0/000000_10.png", np.full((4, 6), 12.5))
    assert check_data.main([str(tmp_path), "--kind", "kitti2015"]) == 1
    assert check_data.main([str(tmp_path), "--kind", "kitti2015", "--partial"]) == 0
    assert "mean 12.50" in capsys.readouterr().out
    (tmp_path / "training/image_3/000000_10.png").unlink()
    report = tmp_path / "report.json"
    assert check_data.main([str(tmp_path), "--kind", "kitti2015", "--partial", "--json", str(report)]) == 1
    assert "image_3/000000_10.png" in json.loads(report.read_text())["missing"][0]


def test_a_folder_of_another_kind_cannot_be_used_at_all(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_pairs(tmp_path, count=1)
    for kind, message in (
        ("kitti2015", "image_2: no such folder"),
        ("eth3d", "no scenes (<scene>/im0.png) there"),
        ("middlebury2006", "no scenes (<scene>/view1.png) there"),
    ):
        assert main(["check-data", str(tmp_path), "--kind", kind]) == 2
        assert message in capsys.readouterr().err
    assert main(["check-data", str(tmp_path), "--kind", "middlebury2006", "--resolution", "quarter"]) == 2
    assert "resolution must be one of third, half, full here" in capsys.readouterr().err


def test_pillow_does_not_warn_of_large_pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_pairs(tmp_path, count=1)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 48 * 80 - 1)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        read_picture(tmp_path / "left/000.png")
        assert [warning.category for warning in told] == [Image.DecompressionBombWarning]
        assert main(["check-data", str(tmp_path), "--kind", "pairs"]) == 0
        assert len(told) == 1


def test_own_pairs_without_ground_truth_are_not_called_otherwise(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_pairs(tmp_path / "mine", count=3)
    assert main(["check-data", str(tmp_path / "mine"), "--kind", "pairs"]) == 0
    assert re.search(r"frames with ground truth +3\n", capsys.readouterr().out)
    shutil.rmtree(tmp_path / "mine/disparity")
    assert main(["check-data", str(tmp_path / "mine"), "--kind", "pairs"]) == 0
    assert re.search(r"frames without ground truth, enough for fa-stereo predict alone +3\n", capsys.readouterr().out)


def test_ground_truth_without_a_known_pixel_is_broken(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_pairs(tmp_path, count=3)
    write_pfm(tmp_path / "disparity/001.pfm", np.full((48, 80), -7.0, np.float32))  # as of the right view
    assert main(["check-data", str(tmp_path), "--kind", "pairs"]) == 1
    said = capsys.readouterr().out
    assert "001: its ground truth has no known pixel" in said
    assert "read 3 frames, 1 broken" in said


def test_real_data(shared_data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert check_data.main([str(shared_data / "scene_flow"), "--partial", "--right-disparity"]) == 0
    assert "read 3 frames, 0 broken" in capsys.readouterr().out
    assert check_data.main([str(shared_data / "middlebury_v2"), "--kind", "middlebury_v2"]) == 0
