"""``fa-stereo summarize``: table, JSON and plot, and what goes wrong."""

from __future__ import annotations

import json
from pathlib import Path

import cv2
import pytest
from summary_runs import write_run

from fa_stereo.cli.main import main
from fa_stereo.cli.summarize import parse_size


@pytest.fixture(scope="module")
def sweep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three variants: two with three seeds, one with one."""
    root = tmp_path_factory.mktemp("summarize") / "sweep"
    for seed in range(3):
        write_run(root / f"{seed}", [20.0, 4.0, 2.0 + 0.1 * seed], seed=seed, kind="none")
        write_run(root / f"{10 + seed}", [20.0, 3.0, 1.5 + 0.11 * seed], seed=seed)
    write_run(root / "20", [20.0, 5.0, 2.0], kind="axial", heads=2, span=5)
    return root


def test_table_json_and_plot(sweep: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["summarize", str(sweep), "-o", str(tmp_path / "out"), "--size", "64x96", "--title", "three"]) == 0
    out = capsys.readouterr().out
    lines = out.splitlines()
    assert "multiply-adds at 64x96" in lines[0]
    assert [line.split("|")[1].strip() for line in lines[2:5]] == ["none", "factorized", "axial"]
    assert "2.100 ± 0.100 px" in lines[2]
    assert lines[2].rstrip().endswith("baseline |")
    assert "1.610 ± 0.110 px" in lines[3]
    assert "better, with 3 seeds" in lines[3]
    assert "one seed: nothing to tell chance by" in lines[4]
    assert "fewer than 3 seeds" in out
    assert (tmp_path / "out" / "summary.md").read_text().strip() in out

    report = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert report["baseline"] == "none"
    assert report["command"].startswith("fa-stereo summarize ")
    none, factorized, axial = report["variants"]
    assert none["curve"] == {"steps": [0, 10, 20], "end_point_error": [[20.0] * 3, [4.0] * 3, [2.0, 2.1, 2.2]]}
    assert factorized["parameters"] > none["parameters"]
    assert factorized["multiply_adds"] > none["multiply_adds"]
    assert factorized["kept_bytes"] > none["kept_bytes"]
    assert factorized["training_step"] == {"crop": [32, 64], "batch": 3, "precision": "fp32"}
    assert factorized["difference"]["mean"] == pytest.approx(-0.49)
    assert factorized["difference"]["interval"][1] < 0
    assert axial["difference"]["interval"] is None
    picture = cv2.imread(str(tmp_path / "out" / "summary.png"))
    assert picture.shape[1] > picture.shape[0] > 400
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["summary.json", "summary.md", "summary.png"]


def test_a_single_run_is_told_as_such(sweep: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["summarize", str(sweep / "10"), "-o", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "| factorized |" in out
    assert "1.500 px" in out
    assert "±" not in out.splitlines()[2]


def test_memory_is_told_where_it_was_recorded(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_run(tmp_path / "runs" / "0", memory=[10**9, 2 * 10**9])
    write_run(tmp_path / "runs" / "1", kind="none")
    assert main(["summarize", str(tmp_path / "runs"), "-o", str(tmp_path / "out")]) == 0
    header, _, none, factorized = capsys.readouterr().out.splitlines()[:4]
    assert "| peak |" in header
    assert "2.00 GB" in factorized
    assert "GB" not in none


def test_steps_that_differ_are_told_in_their_rows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_run(tmp_path / "runs" / "0", trainer={"batch_size": 4, "activation_checkpointing": True})
    write_run(tmp_path / "runs" / "1", trainer={"batch_size": 4})
    write_run(tmp_path / "runs" / "2", trainer={"batch_size": 4, "validate_every_steps": 7}, seed=1)
    write_run(tmp_path / "runs" / "3", trainer={"batch_size": 4}, more={"processes": 2})
    write_run(
        tmp_path / "runs" / "4",
        trainer={"batch_size": 4},
        more={"changes": [{"step": 5, "key": "optimizer.learning_rate", "before": 0.1}]},
    )
    assert main(["summarize", str(tmp_path / "runs"), "-o", str(tmp_path / "out")]) == 0
    header, _, *rows = capsys.readouterr().out.splitlines()
    assert "| training step |" in header
    of_two = [row for row in rows if "2 crops of 32x64 in fp32" in row]
    assert len(of_two) == sum("processes=2" in row for row in rows) == 1
    assert sum("4 crops of 32x64 in fp32" in row for row in rows) == 3
    assert sum("changes=optimizer.learning_rate=0.1 up to step 5" in row for row in rows) == 1
    report = {
        variant["runs"][0].rpartition("/")[2]: variant
        for variant in json.loads((tmp_path / "out" / "summary.json").read_text())["variants"]
    }
    assert report["1"]["seeds"] == [0, 1]  # how often a run is validated does not matter
    assert report["0"]["kept_bytes"] < 0.5 * report["1"]["kept_bytes"]


def test_unfinished_runs_are_left_out_aloud(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_run(tmp_path / "runs" / "0")
    (write_run(tmp_path / "runs" / "1", seed=1) / "weights.safetensors").unlink()
    assert main(["summarize", str(tmp_path / "runs"), "-o", str(tmp_path / "out")]) == 0
    assert "1 is not finished and is left out" in capsys.readouterr().err
    (tmp_path / "linked").mkdir()
    (tmp_path / "linked" / "0").symlink_to(tmp_path / "runs" / "0")
    killed = tmp_path / "linked" / "killed"  # before its first validation
    killed.mkdir()
    (killed / ".lock").touch()
    (tmp_path / "linked" / "again").symlink_to(tmp_path / "linked")
    assert main(["summarize", str(tmp_path / "linked"), "-o", str(tmp_path / "out")]) == 0
    assert "killed has no validation and is left out" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["{tmp}/missing", "-o", "{tmp}/out"], "missing: there is no such folder of runs"),
        (["{tmp}", "-o", "{tmp}/out"], "no run in it has a history.jsonl"),
        (["{sweep}", "-o", "{tmp}/out", "--size", "64"], "--size must be HEIGHTxWIDTH"),
        (["{sweep}", "-o", "{tmp}/out", "--size", "60x64"], "multiples of 16"),
        (["{sweep}", "-o", "{tmp}/out", "--baseline", "nothing"], "there are: none; factorized; axial"),
        (["{sweep}/10/weights.safetensors", "-o", "{tmp}/out"], "there is no such folder of runs"),
        (["{sweep}", "-o", "{sweep}/10/weights.safetensors"], "cannot be written (a file is in its place)"),
    ],
)
def test_a_mistake_ends_in_one_sentence(
    arguments: list[str], sentence: str, sweep: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["summarize", *(argument.format(tmp=tmp_path, sweep=sweep) for argument in arguments)]) == 2
    errors = capsys.readouterr().err.strip()
    assert errors.startswith("fa-stereo summarize: ")
    assert sentence in errors
    assert len(errors.splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_only_unfinished_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (write_run(tmp_path / "0") / "weights.safetensors").unlink()
    assert main(["summarize", str(tmp_path), "-o", str(tmp_path / "out")]) == 2
    assert "none of the 1 runs is finished" in capsys.readouterr().err


def test_sizes() -> None:
    assert parse_size("544X960") == (544, 960)
