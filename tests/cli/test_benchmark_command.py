"""``fa-stereo benchmark`` end to end, tiny."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fa_stereo.cli.main import main
from fa_stereo.data.formats import read_picture

TINY = ["--base-channels", "4", "--max-disparity", "16", "--sizes", "32x64", "--training-size", "32x64",
        "--repeats", "1", "--threads", "1", "--device", "cpu"]  # fmt: skip


def test_table_json_and_plot(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["benchmark", "--parts", "network,training_step", "--precisions", "fp32,bf16", *TINY]
    assert main([*arguments, "--tuned-allocator", "--activation-checkpointing", "-o", str(tmp_path / "out")]) == 0
    table = [[cell.strip() for cell in line.split("|")] for line in capsys.readouterr().out.splitlines()]
    assert ["network", "1x32x64", "plain fp32"] in [cells[1:4] for cells in table]
    assert ["training_step", "1x32x64", "fast bf16, recomputing"] in [cells[1:4] for cells in table]
    report = json.loads((tmp_path / "out" / "benchmark.json").read_text())
    assert report["command"].startswith("fa-stereo benchmark --parts network,training_step")
    assert [(row["part"], row["path"], row["precision"]) for row in report["rows"]] == [
        (part, path, precision)
        for part in ("network", "training_step")
        for path, precision in (("plain", "fp32"), ("fast", "fp32"), ("fast", "bf16"))
    ]
    network = report["rows"][1]
    assert network["largest_deviation"] < 5e-3
    assert network["seconds"] > 0
    assert report["rows"][4]["activation_checkpointing"]
    assert report["machine"]["torch"]
    assert read_picture(tmp_path / "out" / "benchmark.png").shape[1] > 500
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["benchmark.json", "benchmark.png"]


def test_a_step_with_frozen_batch_norm(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["benchmark", "--parts", "training_step", "--freeze-batch-norm", *TINY]
    assert main(arguments) == 0
    table = [[cell.strip() for cell in line.split("|")] for line in capsys.readouterr().out.splitlines()]
    steps = [cells[3] for cells in table if cells[1:3] == ["training_step", "1x32x64"]]
    assert steps == ["plain fp32, batch norm frozen", "fast fp32, batch norm frozen"]


def test_the_network_of_a_file_and_the_base_of_speedups(checkpoint: Path, tmp_path: Path) -> None:
    options = ["--parts", "regression,network", "--checkpoint", str(checkpoint), "--max-disparity", "16", "--sizes",
               "32x64", "--plain-precisions", "fp32,bf16", "--speedup-over", "bf16", "--repeats", "1", "--threads", "1",
               "--device", "cpu", "-o", str(tmp_path)]  # fmt: skip
    assert main(["benchmark", *options]) == 0
    rows = json.loads((tmp_path / "benchmark.json").read_text())["rows"]
    assert {row["base_channels"] for row in rows} == {8}
    network = {(row["path"], row["precision"]): row for row in rows if row["part"] == "network"}
    assert network["plain", "bf16"]["speedup"] == 1
    assert network["plain", "fp32"]["largest_deviation"] == 0
    regression = [row for row in rows if row["part"] == "regression"]
    assert [row["speedup"] == 1 for row in regression] == [True, False]  # there is no other plain one


def test_deviations_from_float64(checkpoint: Path, tmp_path: Path) -> None:
    options = ["--parts", "regression,network,training_step", "--checkpoint", str(checkpoint), "--sizes", "32x64",
               "--training-size", "32x64", "--plain-precisions", "fp64,fp32", "--repeats", "1", "--threads", "1",
               "--device", "cpu", "-o", str(tmp_path)]  # fmt: skip
    assert main(["benchmark", *options]) == 0
    rows = json.loads((tmp_path / "benchmark.json").read_text())["rows"]
    variants = [(row["part"], row["path"], row["precision"]) for row in rows]
    both = [("plain", "fp64"), ("plain", "fp32"), ("fast", "fp32")]
    assert variants == [(part, *variant) for part in ("regression", "network") for variant in both] + [
        ("training_step", *variant) for variant in both[1:]
    ]
    for row in rows[:6]:
        if row["precision"] == "fp64":
            assert row["largest_deviation"] == 0
        else:  # both are rounded, and by float32 alone
            assert 0 < row["mean_deviation"] < row["largest_deviation"] < 1e-3
    assert [row["speedup"] for row in rows if row["path"] == "plain" and row["precision"] == "fp32"] == [1, 1, 1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--parts", "everything"], "--parts takes any of features,"),
        (["--sizes", "544"], "a size is HEIGHTxWIDTH"),
        (["--sizes", "50x64"], "the height must be a positive multiple of 16, got 50"),
        (["--precisions", "int8"], "--precisions takes any of fp32,bf16,fp16,mixed"),
        (["--repeats", "0"], "--repeats must be positive, got 0"),
        (["--threads", "0"], "--threads must be positive, got 0"),
        (["--base-channels", "-4"], "--base-channels must be positive, got -4"),
        (["--max-disparity", "20", "--parts", "network"], "--max-disparity must be a positive multiple of 16"),
        (["--parts", "pairs"], "--parts pairs and --pairs LEFT RIGHT need each other"),
        (["--parts", "network", "--pairs", "a", "b"], "--parts pairs and --pairs LEFT RIGHT need each other"),
        (["--parts", "training_step", "--precisions", "fp16"], "training_step is not measured in --precisions fp16"),
        (["--parts", "features", "--precisions", "mixed"], "features is not measured in --precisions mixed"),
        (["--parts", "regression", "--compile"], "--compile changes none of --parts regression"),
        (["--parts", "network", "--activation-checkpointing"], "--activation-checkpointing changes none of"),
        (["--parts", "network", "--freeze-batch-norm"], "--freeze-batch-norm changes none of"),
        (["--cuda-graph"], "--cuda-graph needs a GPU"),
        (
            ["--parts", "training_step", "--plain-precisions", "fp16"],
            "training_step is not measured in --plain-precisions fp16",
        ),
        (["--plain-precisions", "fp64"], "--plain-precisions names fp64, the reference, before others, got fp64"),
        (["--plain-precisions", "fp32,fp64"], "--plain-precisions names fp64, the reference, before others"),
        (["--precisions", "fp64"], "--precisions takes any of fp32,bf16,fp16,mixed, got 'fp64'"),
        (["--speedup-over", "bf16"], "--speedup-over must be one of --plain-precisions but fp64, got bf16"),
        (["--weights", "small"], "--base-channels is for fresh weights"),
    ],
)
def test_unusable_options(options: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["benchmark", *TINY, *options]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error
