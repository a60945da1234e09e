"""``fa-stereo compare-attention``: a tiny real run, and tables and plots of made-up ones."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fa_stereo import attention_profiling
from fa_stereo.attention_profiling import Case, Outcome
from fa_stereo.cli.compare_attention import parse_bytes
from fa_stereo.cli.main import main
from fa_stereo.data.formats import read_picture

TINY = ["--base-channels", "8", "--max-disparity", "32", "--threads", "1", "--device", "cpu"]


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="limits on the CPU are Linux'")
def test_a_real_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--variants", "factorized,non_local_materialized", "--sizes", "256x256", "--modes", "inference"]
    arguments = ["compare-attention", *TINY, *options, "--budget", "100MB", "--repeats", "0"]
    assert main([*arguments, "-o", str(tmp_path / "out")]) == 0
    text = capsys.readouterr().out
    report = json.loads((tmp_path / "out" / "attention.json").read_text())
    assert [(row["variant"], row["height"], row["status"]) for row in report["rows"]] == [
        ("factorized", 256, "measured"),
        ("non_local_materialized", 256, "out_of_memory"),
    ]
    assert report["budget_bytes"] == 10**8
    assert report["command"].startswith("fa-stereo compare-attention --base-channels 8")
    assert report["machine"]["torch"]
    (row,) = [line for line in text.splitlines() if "OOM" in line]
    assert row.startswith("| 1x256x256 | 4,096     | non_local_materialized |")
    assert f" {report['rows'][1]['formula_bytes'] / 1e6:.1f} MB |" in row
    assert (tmp_path / "out" / "attention.md").read_text().strip() in text
    assert read_picture(tmp_path / "out" / "attention.png").shape[1] > 500


@pytest.fixture
def made_up(monkeypatch: pytest.MonkeyPatch) -> list[Case]:
    """Measure nothing: quadratic attention takes N^2 of time and memory. Returns the cases asked for."""
    asked: list[Case] = []

    def measure(cases: Sequence[Case], repeats: int, time_limit: float, progress: Any = lambda: None) -> list[Outcome]:
        asked.extend(cases)
        return [outcome(one, time_limit) for one in cases]

    def outcome(one: Case, time_limit: float) -> Outcome:
        quadratic = one.variant.startswith("non_local")
        n = one.positions * one.batch
        stored = one.variant == "non_local_materialized"
        seconds = (0.5e-9 if stored else 1e-9) * n**2 if quadratic else 1e-6 * n
        extra = 8 * n**2 if stored else 0 if one.variant == "none" else 2000 * n
        if extra > one.budget_bytes:
            by_machine = one.mode == "training"
            return Outcome(
                "out_of_memory", "no more", limit_bytes=10**9, limited_by="machine" if by_machine else "budget"
            )
        if seconds > time_limit:
            return Outcome("too_slow", f"more than {time_limit:g} s")
        if one.variant == "axial_5":
            return Outcome("failed", "ended by signal 11")
        result = np.ones(3, np.float32) + seconds
        return Outcome("measured", "", [seconds], 10**8 + extra, extra, 10**6 + extra, 10**9, "budget", result)

    monkeypatch.setattr(attention_profiling, "measure", measure)
    return asked


def test_tables_of_the_block(made_up: list[Case], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--time-limit", "1", "--search", "--precisions", "fp32,bf16", "-o", str(tmp_path)]
    assert main(["compare-attention", "--device", "cpu", *options]) == 0
    text = capsys.readouterr().out
    report = json.loads((tmp_path / "attention.json").read_text())
    assert len(report["rows"]) == 2 * 6 * 5 * 2  # modes, sizes, variants, precisions
    lines = text.splitlines()
    assert any(line.startswith("| 1x544x960  | 32,640    | non_local_materialized bf16 |") for line in lines)
    fused = [row for row in report["rows"] if row["variant"] == "non_local_fused" and row["positions"] == 64512]
    assert {row["reason"] for row in fused} == {"a smaller input took more than 1 s"}
    assert any("OOM (at 1.00 GB, all the machine had)" in line for line in lines)
    assert any("| factorized " in line and "N^1.00" in line for line in lines)
    assert any("| non_local_materialized " in line and "N^2.00" in line for line in lines)
    assert any("largest that fits" in line for line in lines)
    assert {entry["variant"] for entry in report["largest"]} >= {"factorized", "non_local_materialized"}
    assert len(made_up) < 400
    assert read_picture(tmp_path / "attention.png").shape[1] > 500


def test_tables_of_the_network(made_up: list[Case], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--scope", "network", "--batches", "1,2,4,8", "--fit-batch", "24", "--activation-checkpointing"]
    variants = ["--variants", "none,factorized,non_local_materialized,axial_5"]
    arguments = ["compare-attention", "--device", "cpu", *options, *variants, "-o", str(tmp_path), "--budget", "5GB"]
    assert main(arguments) == 1  # something failed
    text = capsys.readouterr().out
    assert {(one.height, one.width, one.mode, one.activation_checkpointing) for one in made_up} == {
        (256, 512, "training", True)
    }
    assert [one.batch for one in made_up[::4]] == [1, 2, 4, 8]
    assert "| over none |" in text
    assert "failed: ended by signal 11" in text
    assert "**Computed, not measured**" in text
    report = json.loads((tmp_path / "attention.json").read_text())
    assert {fit["variant"] for fit in report["fits"]} == {"none", "factorized", "non_local_materialized"}
    assert read_picture(tmp_path / "attention.png").shape[1] > 500


@pytest.mark.parametrize(
    ("text", "expected"),
    [("12GB", 12 * 10**9), ("12 gib", 12 * 2**30), ("0.5GB", 5 * 10**8), ("800MB", 8 * 10**8), ("1000", 1000)],
)
def test_sizes_in_bytes(text: str, expected: int) -> None:
    assert parse_bytes(text) == expected


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--variants", "linear"], "there is no variant 'linear'"),
        (["--variants", ","], "--variants takes a list of names"),
        (["--sizes", "544"], "a size is HEIGHTxWIDTH"),
        (["--sizes", "50x64"], "the height must be a positive multiple of 16, got 50"),
        (["--modes", "testing"], "--modes takes any of inference,training"),
        (["--precisions", "int8"], "--precisions takes any of fp32,bf16,fp16"),
        (["--budget", "12 apples"], "--budget is a size such as 12GB"),
        (["--budget", "0GB"], "--budget is a size such as 12GB"),
        (["--batches", "1,two"], "--batches takes whole numbers separated by commas, got 'two'"),
        (["--repeats", "-1"], "--repeats must not be negative"),
        (["--time-limit", "0"], "--time-limit must be positive"),
        (["--time-limit", "inf"], "--time-limit must be positive and at most"),
        (["--time-limit", "nan"], "--time-limit must be positive and at most"),
        (["--activation-checkpointing"], "--activation-checkpointing changes nothing in --scope block"),
        (["--slots", "res1,res4"], "the block alone has the map of one slot, got res1, res4"),
        (["--heads", "0"], "--heads must be positive, got 0"),
        (["--heads", "3"], "must be divisible by attention.heads (3)"),
        (["--slots", "res9"], "--slots takes any of res1"),
        (["--fit-batch", "24"], "--fit-batch draws a line through measured batches"),
        (["--device", "tpu"], "device must be auto, cpu or cuda"),
    ],
)
def test_unusable_options(options: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare-attention", *TINY, *options]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error
