from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from fa_stereo.cli import render
from fa_stereo.cli.main import main
from fa_stereo.config import RenderConfig
from fa_stereo.data.formats import read_pfm, read_picture
from fa_stereo.data.rendered import frame_files, render_pair
from fa_stereo.errors import InputError

SMALL = ["--height", "32", "--width", "64", "--seed", "7"]
CONFIG = RenderConfig(height=32, width=64, seed=7)


def test_written_pairs_read_back_identically(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["render", str(tmp_path), "--samples", "12", *SMALL, "--workers", "0"]) == 0
    assert "12 pairs (TRAIN), 12 of them new" in capsys.readouterr().out
    pictures = tmp_path / "FlyingThings3D/frames_cleanpass/TRAIN/A"
    assert (pictures / "0000/left/0006.png").is_file()
    assert (pictures / "0001/right/0007.png").is_file()  # the twelfth
    assert (tmp_path / "FlyingThings3D/disparity/TRAIN/A/0001/right/0007.pfm").is_file()
    for index in (0, 11):
        s = render_pair(CONFIG, index)
        left, right, disparity, right_disparity = frame_files(tmp_path, "TRAIN", index)
        assert np.array_equal(read_picture(left), s.left)
        assert np.array_equal(read_picture(right), s.right)
        assert np.array_equal(read_pfm(disparity), s.disparity)
        assert np.array_equal(read_pfm(right_disparity), s.right_disparity)
    assert not [p for p in tmp_path.rglob("*") if p.name.endswith(".tmp")]


def test_scene_flow_reader_finds_them(tmp_path: Path) -> None:
    from fa_stereo.config import DatasetConfig, SceneFlowConfig
    from fa_stereo.data import open_dataset

    for split, count, seed in (("TRAIN", 3, 7), ("TEST", 2, 8)):
        arguments = ["render", str(tmp_path), *SMALL[:4], "--seed", str(seed), "--workers", "0", "--split", split]
        assert main([*arguments, "--samples", str(count)]) == 0
    for split, count, seed in (("train", 3, 7), ("test", 2, 8)):
        choice = SceneFlowConfig(sets=["flyingthings3d"], right_disparity=True, cache_index=False)
        dataset = open_dataset(DatasetConfig(kind="scene_flow", root=str(tmp_path), split=split, scene_flow=choice))
        assert len(dataset) == count  # type: ignore[arg-type]
        s = dataset[1]
        reference = render_pair(RenderConfig(height=32, width=64, seed=seed), 1)
        assert np.array_equal(s.left, reference.left)
        assert np.array_equal(s.disparity, reference.disparity)
        assert np.array_equal(s.right_disparity, reference.right_disparity)


def test_a_stopped_run_goes_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["render", str(tmp_path), *SMALL, "--workers", "0", "--samples"]
    assert main([*arguments, "3"]) == 0
    kept = frame_files(tmp_path, "TRAIN", 0)[0]
    stamp = kept.stat().st_mtime_ns
    frame_files(tmp_path, "TRAIN", 1)[3].unlink()  # as if stopped in the middle of a pair
    capsys.readouterr()
    assert main([*arguments, "5"]) == 0
    assert "5 pairs (TRAIN), 3 of them new" in capsys.readouterr().out
    assert kept.stat().st_mtime_ns == stamp
    assert np.array_equal(read_pfm(frame_files(tmp_path, "TRAIN", 1)[3]), render_pair(CONFIG, 1).right_disparity)


def test_workers_write_the_same_files(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "fa_stereo.cli.main", "render", str(tmp_path), "--samples", "3", *SMALL]
    result = subprocess.run([*command, "--workers", "2"], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    for index in range(3):
        s = render_pair(CONFIG, index)
        left, *_, right_disparity = frame_files(tmp_path, "TRAIN", index)
        assert np.array_equal(read_picture(left), s.left)
        assert np.array_equal(read_pfm(right_disparity), s.right_disparity)


def test_options_reach_the_renderer_and_are_recorded(tmp_path: Path) -> None:
    options = ["--option", "thin=0", "--option", "texture_maps=2", "--difficulty", "0.5", "--max-disparity", "64"]
    assert main(["render", str(tmp_path), "--samples", "1", *SMALL, "--workers", "0", *options]) == 0
    config = RenderConfig(
        height=32, width=64, seed=7, thin=0.0, texture_maps=2, difficulty=0.5, max_disparity=64.0, samples=1
    )
    assert np.array_equal(read_picture(frame_files(tmp_path, "TRAIN", 0)[0]), render_pair(config, 0).left)
    record = json.loads((tmp_path / "rendered_train.json").read_text())
    assert record["thin"] == 0
    assert record["seed"] == 7


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--samples", "0"], "rendered.samples must be positive"),
        (["--height", "4"], "rendered.height must be at least 16"),
        (["--seed", "-1"], "rendered.seed"),
        (["--difficulty", "2"], "rendered.difficulty"),
        (["--workers", "-1"], "--workers"),
        (["--samples", "1000000"], "several folders"),
        (["--option", "thinn=1"], "NAME=VALUE"),
        (["--option", "thin"], "NAME=VALUE"),
        (["--option", "thin=much"], "not a number"),
    ],
)
def test_bad_values_exit_with_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert main(["render", str(tmp_path / "out"), *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("arguments", [[], ["OUT", "--split", "VALIDATION"], ["OUT", "--samples", "many"]])
def test_bad_arguments_exit_with_2(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["render", *arguments])
    assert stop.value.code == 2


def test_a_folder_is_not_mixed_from_two_configurations(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["render", str(tmp_path), "--samples", "1", *SMALL, "--workers", "0"]) == 0
    assert main(["render", str(tmp_path), "--samples", "2", *SMALL[:4], "--seed", "8", "--workers", "0"]) == 2
    assert "another seed" in capsys.readouterr().err
    (tmp_path / "rendered_train.json").write_text("{")
    assert main(["render", str(tmp_path), "--samples", "1", *SMALL, "--workers", "0"]) == 2


def test_the_same_pairs_are_not_both_for_training_and_for_testing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["render", str(tmp_path), "--samples", "2", *SMALL, "--workers", "0"]) == 0
    assert main(["render", str(tmp_path), "--samples", "1", *SMALL, "--workers", "0", "--split", "TEST"]) == 2
    assert f"{tmp_path} holds these very pairs as TRAIN already: give another --seed" in capsys.readouterr().err
    assert not frame_files(tmp_path, "TEST", 0)[0].exists()


def test_pairs_of_others_are_not_written_over(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Scene Flow itself has the same names: here the third frame, one file of it."""
    theirs = frame_files(tmp_path, "TRAIN", 2)[2]
    theirs.parent.mkdir(parents=True)
    theirs.write_bytes(b"theirs")
    assert main(["render", str(tmp_path), "--samples", "5", *SMALL, "--workers", "0"]) == 2
    assert f"{tmp_path} holds TRAIN pairs that are not this command's" in capsys.readouterr().err
    assert theirs.read_bytes() == b"theirs"
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == [theirs]


def test_it_goes_on_on_another_device(tmp_path: Path) -> None:
    size = ["render", str(tmp_path), "--height", "32", "--width", "48", "--workers", "0"]
    assert main([*size, "--samples", "1", "--option", "device=auto"]) == 0
    assert main([*size, "--samples", "2"]) == 0


def test_a_process_that_the_system_ends_is_told_of() -> None:
    message = r"ended by the system.*fewer --workers \(now 1\) goes on"
    with pytest.raises(InputError, match=message), render._mapped(partial(os._exit), [3], 1) as done:
        list(done)


def test_an_unusable_output_folder_exits_with_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    assert main(["render", str(tmp_path / "file"), "--samples", "1", *SMALL, "--workers", "0"]) == 2
    assert "output folder" in capsys.readouterr().err
    blocked = tmp_path / "half"
    blocked.mkdir()
    (blocked / "FlyingThings3D").write_text("")
    assert main(["render", str(blocked), "--samples", "1", *SMALL, "--workers", "0"]) == 2


@pytest.mark.skipif(os.name == "nt", reason="sends SIGINT to a process group")
def test_ctrl_c_stops_all_workers_with_one_line(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "fa_stereo.cli.main", "render", str(tmp_path / "out"), "--samples", "5000", *SMALL]
    with subprocess.Popen(
        [*command, "--workers", "2"], stderr=subprocess.PIPE, text=True, start_new_session=True
    ) as process:
        while not list(tmp_path.rglob("*.pfm")):
            assert process.poll() is None
            time.sleep(0.1)
        os.killpg(process.pid, signal.SIGINT)  # as the terminal does: to the workers too
        try:
            _, error = process.communicate(timeout=120)
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 130
    assert error.strip() == "fa-stereo render: interrupted"
    assert not list(tmp_path.rglob("*.tmp"))


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="looks for processes in /proc")
def test_workers_do_not_outlive_a_killed_command(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "fa_stereo.cli.main", "render", str(tmp_path / "out"), "--samples", "5000", *SMALL]
    process = subprocess.Popen([*command, "--workers", "2"], stderr=subprocess.DEVNULL, start_new_session=True)
    try:
        while not list(tmp_path.rglob("*.pfm")):
            assert process.poll() is None
            time.sleep(0.1)
        assert len(_running_in_group(process.pid)) >= 3
        process.kill()
        process.wait()
        deadline = time.monotonic() + 60
        while _running_in_group(process.pid):
            assert time.monotonic() < deadline
            time.sleep(0.1)
    finally:
        for pid in _running_in_group(process.pid):
            os.kill(pid, signal.SIGKILL)


def _running_in_group(group: int) -> list[int]:
    """Return the processes of a group that are not dead, be they buried or not."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, process_group = stat.read_text().rpartition(")")[2].split()[:3]
        except OSError:
            continue  # ended meanwhile
        if int(process_group) == group and state not in "ZX":
            found.append(int(stat.parent.name))
    return found
