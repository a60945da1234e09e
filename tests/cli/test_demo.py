"""``fa-stereo demo``: the main job, on a pair made here and on the one that comes with the package."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

from fa_stereo.cli import demo
from fa_stereo.cli.main import main
from fa_stereo.data.formats import read_pfm, read_picture, write_pfm, write_picture
from fa_stereo.inference import load_predictor
from fa_stereo.weights import list_weights

DISPARITY = 40
PICTURES = ["left.png", "right.png", "disparity.png", "error.png", "side_by_side.png"]


@pytest.fixture
def pair_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A textured pair in the place of the bundled one, farther apart than the network here can tell."""
    folder = tmp_path / "pair"
    folder.mkdir()
    wide = np.random.default_rng(0).integers(0, 256, (64, 160 + DISPARITY, 3), dtype=np.uint8)
    write_picture(folder / "left.png", wide[:, :160])
    write_picture(folder / "right.png", wide[:, DISPARITY:])
    write_pfm(folder / "disparity.pfm", np.full((64, 160), DISPARITY, np.float32))
    occluded = np.zeros((64, 160), np.uint8)
    occluded[:, :DISPARITY] = 255
    write_picture(folder / "occluded.png", occluded)
    monkeypatch.setattr(demo, "demo_folder", lambda: folder)
    return folder


def printed_figures(text: str, name: str) -> list[float]:
    line = next(line for line in text.splitlines() if line.startswith(name))
    return [float(figure) for figure in re.findall(r"([\d.]+) (?:px|%)", line)]


def test_figures_and_pictures(
    pair_folder: Path, checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert main(["demo", "-o", str(out), "--checkpoint", str(checkpoint), "--device", "cpu"]) == 0
    text = capsys.readouterr().out
    left, right = (read_picture(pair_folder / f"{name}.png") for name in ("left", "right"))
    expected = load_predictor(checkpoint, "cpu")(left, right).disparity
    truth = np.full((64, 160), DISPARITY, np.float32)
    error = np.abs(expected - truth)
    figures = [error.mean(), 100 * np.mean(error > 1), 100 * np.mean(error > 3)]
    assert printed_figures(text, "FA-PSMNet") == pytest.approx(figures, abs=0.051)
    matched = printed_figures(text, "OpenCV SGBM")
    assert matched[0] < 0.5  # SGBM solves this pair
    assert matched[2] < 5
    assert [path for path in text.splitlines() if path.startswith(str(out))] == [
        *(str(out / name) for name in PICTURES), str(out / "disparity.pfm")
    ]  # fmt: skip
    np.testing.assert_array_equal(read_pfm(out / "disparity.pfm"), expected)
    np.testing.assert_array_equal(read_picture(out / "left.png"), left)
    np.testing.assert_array_equal(read_picture(out / "right.png"), right)
    assert read_picture(out / "disparity.png").shape == read_picture(out / "error.png").shape == (64, 160, 3)
    sheet = read_picture(out / "side_by_side.png")
    assert sheet.shape[0] > 2 * 64
    assert sheet.shape[1] > 4 * 160


@pytest.mark.parametrize("name", ["left.png", "right.png", "disparity.pfm", "occluded.png"])
def test_an_incomplete_pair_is_named(
    pair_folder: Path, checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    (pair_folder / name).unlink()
    assert main(["demo", "-o", str(tmp_path / "out"), "--checkpoint", str(checkpoint)]) == 2
    assert str(pair_folder / name) in capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"P5\n160 64\n255\n", "not a PFM"),
        (b"Pf\n160 64\n-1.0\n" + bytes(100), "truncated"),
        (b"PF\n160 64\n-1.0\n" + bytes(160 * 64 * 12), "colour"),
        (b"Pf\n64 160\n-1.0\n" + bytes(160 * 64 * 4), "differ in size"),
        (b"", "empty"),
    ],
)
def test_a_damaged_ground_truth(
    pair_folder: Path, checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], content: bytes, said: str
) -> None:
    (pair_folder / "disparity.pfm").write_bytes(content)
    assert main(["demo", "-o", str(tmp_path / "out"), "--checkpoint", str(checkpoint)]) == 2
    message = capsys.readouterr().err
    assert said in message
    assert "Traceback" not in message


def test_an_output_folder_that_cannot_be_written(
    pair_folder: Path, checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "out").write_text("a file")
    assert main(["demo", "-o", str(tmp_path / "out"), "--checkpoint", str(checkpoint)]) == 2
    assert "cannot be written (a file is in its place)" in capsys.readouterr().err


def test_the_bundled_pair_with_the_bundled_weights(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if not (demo.demo_folder().is_dir() and list_weights()):
        pytest.skip("this checkout has no bundled pair or no bundled weights yet")
    assert main(["demo", "-o", str(tmp_path), "--device", "cpu"]) == 0
    text = capsys.readouterr().out
    error, bad_1, bad_3 = printed_figures(text, "FA-PSMNet")
    assert 0 < error < 5
    assert bad_3 <= bad_1 < 60
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*PICTURES, "disparity.pfm"])
