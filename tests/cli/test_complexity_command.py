"""``fa-stereo complexity``: tables, JSON and plot."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
from pathlib import Path

import cv2
import pytest

from fa_stereo.cli.main import main


def test_tables_show_print_and_count(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["complexity", "--size", "34x60", "--channels", "32", "--value-channels", "16"]) == 0
    lines = capsys.readouterr().out.splitlines()
    text = "\n".join(lines)
    for title in (
        "Table 9",
        "Table 10",
        "Table 11",
        "Table 12",
        "Where print and count disagree",
        "Figure 4",
        "Figure 5: BERT-base",
        "Figure 5: BERT-large",
    ):
        assert any(line.startswith(title) for line in lines), title
    (row,) = [line.split("  ") for line in lines if line.startswith("FA-dot") and "bc" in line]
    assert [cell.strip() for cell in row if cell.strip()] == ["FA-dot", "(2b + 3c)s + bc", "(8bc + 2c²)s"]
    assert "(2kc + c²)s + (2k + 2c)s²" in text  # as printed
    assert "(4kc + 2c²)s + (2k + 2c)s²" in text  # as counted
    assert sum("DISAGREES: half of what table 9 gives" in line and "412" in line for line in lines) == 1
    assert any(line.startswith("axial, span 65") for line in lines)


def test_json_is_complete(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["complexity", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert set(report["tables"]) == {"9", "10", "11", "12"}
    assert len(report["tables"]["9"]) == len(report["tables"]["12"]) == 10
    assert report["tables"]["9"]["CA-multi"]["printed_computation"] == "(4kc + 4mc)s + (2hk + 2m)s²"
    assert len(report["disagreements"]) == 9
    assert {point["module"] for point in report["figure_4"]} == {"FA-dot", "CA-dot"}
    curves = {(point["network"], point["module"]) for point in report["figure_5"]}
    assert curves == set(itertools.product(("BERT-base", "BERT-large"), ("FA-Tfm", "CA-Tfm")))
    blocks = {block["block"]: block for block in report["blocks"]}
    assert blocks["FA"]["parameters"] == 2 * 64 * 128 + 128 * 128
    assert blocks["FA"]["flops"] == (8 * 64 * 128 + 2 * 128**2) * 136 * 240
    assert blocks["FA-multi"]["attention"]["heads"] == 8


def test_plot_is_a_picture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["complexity", "--plot", str(tmp_path / "curves.png")]) == 0
    picture = cv2.imread(str(tmp_path / "curves.png"))
    assert picture.shape == (1440, 1200, 3)
    assert picture.std() > 10
    assert [path.name for path in tmp_path.iterdir()] == ["curves.png"]


def test_matplotlib_is_loaded_for_plots_only() -> None:
    program = (
        "import sys; from fa_stereo.cli.main import main; main(['complexity', '--size', '8x8']); "
        "sys.exit('matplotlib' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", program], check=True, capture_output=True)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--size", "12"], "--size must be HEIGHTxWIDTH"),
        (["--size", "12x0"], "--size must be HEIGHTxWIDTH"),
        (["--channels", "0"], "--channels must be positive"),
        (["--heads", "3"], "must be divisible by attention.heads (3)"),
        (["--plot", "curves.txt"], "curves.txt: name the plot *.png, *.pdf, *.svg"),
        (["--plot", "/nonexistent/curves.png"], "/nonexistent"),
    ],
)
def test_unusable_input_ends_with_one_sentence(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["complexity", *arguments]) == 2
    error = capsys.readouterr().err.strip()
    assert message in error
    assert len(error.splitlines()) == 1
