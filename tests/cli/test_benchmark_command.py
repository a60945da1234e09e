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
    assert ["training_step", "1x32x64", "fast bf16"] in [cells[1:4] for cells in table]
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


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--parts", "everything"], "--parts takes any of features,"),
        (["--sizes", "544"], "a size is HEIGHTxWIDTH"),
        (["--sizes", "50x64"], "the height must be a positive multiple of 16, got 50"),
        (["--precisions", "int8"], "--precisions takes any of fp32,bf16,fp16,mixed"),
        (["--repeats", "0"], "must be positive"),
        (["--weights", "huge"], "neither a checkpoint file nor bundled weights"),
        (["--max-disparity", "20", "--parts", "network"], "multiple of 16"),
    ],
)
def test_unusable_options(options: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["benchmark", *TINY, *options]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error
