"""``fa-stereo predict`` on files, folders and patterns: what it writes, prints and warns of."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from random_networks import calibrated

from fa_stereo.cli.main import main
from fa_stereo.cli.predict import parse_formats
from fa_stereo.data.formats import read_disparity, read_pfm, read_picture, write_picture
from fa_stereo.errors import InputError
from fa_stereo.inference import DisparityPredictor, Prediction, load_predictor
from fa_stereo.models.checkpoint import save_weights
from fa_stereo.visualization import colorize_disparity


def write_pair(left: Path, right: Path, seed: int = 0, size: tuple[int, int] = (48, 64), disparity: int = 6) -> None:
    """Write a textured pair, everything ``disparity`` px apart."""
    rng = np.random.default_rng(seed)
    height, width = size
    texture = rng.integers(0, 256, (height // 4 + 1, (width + disparity) // 4 + 1, 3), dtype=np.uint8)
    wide = texture.repeat(4, axis=0).repeat(4, axis=1)[:height]
    for path in (left, right):
        path.parent.mkdir(parents=True, exist_ok=True)
    write_picture(left, wide[:, :width])
    write_picture(right, wide[:, disparity : width + disparity])


def write_three_pairs(folder: Path) -> None:
    """Write 0.png to 2.png into the folders left and right."""
    for index in range(3):
        write_pair(folder / f"left/{index}.png", folder / f"right/{index}.png", seed=index)


def predict(*arguments: str | Path) -> int:
    return main(["predict", *map(str, arguments), "--device", "cpu"])


def test_one_pair_in_all_formats(
    tmp_path: Path, checkpoint: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write_pair(Path("scene_left.png"), Path("scene_right.png"))
    out = Path("new/results")
    code = predict(
        "scene_left.png", "scene_right.png", "-o", out, "--formats", "png,pfm,kitti,npy", "--checkpoint", checkpoint
    )
    assert code == 0
    expected = load_predictor(checkpoint, "cpu")(read_picture("scene_left.png"), read_picture("scene_right.png"))
    names = sorted(path.name for path in out.iterdir())
    assert names == ["scene.npy", "scene.pfm", "scene.png", "scene_kitti.png"]
    np.testing.assert_array_equal(np.load(out / "scene.npy"), expected.disparity)
    np.testing.assert_array_equal(read_pfm(out / "scene.pfm"), expected.disparity)
    np.testing.assert_allclose(read_disparity(out / "scene_kitti.png"), expected.disparity, atol=1 / 256)
    np.testing.assert_array_equal(read_picture(out / "scene.png"), colorize_disparity(expected.disparity))
    printed = capsys.readouterr().out.splitlines()
    assert "64x48" in printed[0]
    assert f"on cpu in {expected.precision}" in printed[0]
    assert sorted(printed[1:]) == [str(out / name) for name in names]


def test_by_default_a_picture_and_pfm_and_old_results_are_replaced(tmp_path: Path, checkpoint: Path) -> None:
    write_pair(tmp_path / "im0.png", tmp_path / "im1.png")
    out = tmp_path / "out"
    out.mkdir()
    (out / "im0.pfm").write_text("old")
    assert predict(tmp_path / "im0.png", tmp_path / "im1.png", "-o", out, "--checkpoint", checkpoint) == 0
    assert sorted(path.name for path in out.iterdir()) == ["im0.pfm", "im0.png"]  # and no temporary file
    assert read_pfm(out / "im0.pfm").shape == (48, 64)


@pytest.mark.parametrize(
    ("name", "start"),
    [
        ("my.png", b"\x89PNG\r\n\x1a\n"),
        ("my.pfm", b"Pf\n64 48\n"),
        ("my.npy", b"\x93NUMPY"),
        ("kitti.png", b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR\0\0\0\x40\0\0\0\x30\x10\0"),
        ("my_kitti.png", b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR\0\0\0\x40\0\0\0\x30\x10\0"),  # 16 bits, grey
    ],
)
def test_a_single_pair_into_a_single_file(tmp_path: Path, checkpoint: Path, name: str, start: bytes) -> None:
    write_pair(tmp_path / "a_l.png", tmp_path / "a_r.png")
    out = tmp_path / "out" / name
    assert predict(tmp_path / "a_l.png", tmp_path / "a_r.png", "-o", out, "--checkpoint", checkpoint) == 0
    assert [path.name for path in out.parent.iterdir()] == [name]
    assert out.read_bytes().startswith(start)


def test_folders_keep_their_sub_folders(tmp_path: Path, checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for index, name in enumerate(("a/0001", "a/0002", "b/0001")):
        write_pair(tmp_path / f"left/{name}.png", tmp_path / f"right/{name}.png", seed=index)
    out = tmp_path / "out"
    assert (
        predict(tmp_path / "left", tmp_path / "right", "-o", out, "--formats", "npy", "--checkpoint", checkpoint) == 0
    )
    found = sorted(str(path.relative_to(out)) for path in out.rglob("*.npy"))
    assert found == ["a/0001.npy", "a/0002.npy", "b/0001.npy"]
    assert "3 of 3 pairs" in capsys.readouterr().out
    expected = load_predictor(checkpoint, "cpu")(
        read_picture(tmp_path / "left/b/0001.png"), read_picture(tmp_path / "right/b/0001.png")
    )
    np.testing.assert_array_equal(np.load(out / "b/0001.npy"), expected.disparity)


def test_a_single_pair_in_a_sub_folder(tmp_path: Path, checkpoint: Path) -> None:
    write_pair(tmp_path / "left/a/0001.png", tmp_path / "right/a/0001.png")
    options = ("-o", tmp_path / "out", "--formats", "npy", "--checkpoint", checkpoint)
    assert predict(tmp_path / "left", tmp_path / "right", *options) == 0
    assert (tmp_path / "out/a/0001.npy").is_file()


def test_a_single_pair_that_is_too_small_is_named(
    tmp_path: Path, checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for view in ("l", "r"):
        write_picture(tmp_path / f"{view}.png", np.zeros((8, 40, 3), np.uint8))
    assert predict(tmp_path / "l.png", tmp_path / "r.png", "-o", tmp_path / "out", "--checkpoint", checkpoint) == 2
    assert f"{tmp_path / 'l.png'}: pictures must be at least 16x16, got 40x8" in capsys.readouterr().err


def test_patterns(tmp_path: Path, checkpoint: Path) -> None:
    for index in range(2):
        write_pair(tmp_path / f"{index}_left.png", tmp_path / f"{index}_right.png", seed=index)
    out = tmp_path / "out"
    arguments = (tmp_path / "*_left.png", tmp_path / "*_right.png", "-o", out, "--formats", "pfm")
    assert predict(*arguments, "--checkpoint", checkpoint) == 0
    assert len(list(out.glob("*.pfm"))) == 2


def test_a_bad_pair_among_others_is_named_and_the_rest_is_kept(
    tmp_path: Path, checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_three_pairs(tmp_path)
    damaged = tmp_path / "right/1.png"
    damaged.write_bytes(damaged.read_bytes()[:200])
    out = tmp_path / "out"
    assert (
        predict(tmp_path / "left", tmp_path / "right", "-o", out, "--formats", "npy", "--checkpoint", checkpoint) == 2
    )
    assert sorted(path.name for path in out.iterdir()) == ["0.npy", "2.npy"]
    captured = capsys.readouterr()
    assert "2 of 3 pairs written" in captured.out
    assert str(damaged) in captured.err
    assert "1 of 3 pairs failed: 1" in captured.err
    assert "Traceback" not in captured.err


def test_pairs_computed_in_another_precision_are_counted(
    tmp_path: Path, checkpoint: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    write_three_pairs(tmp_path)
    call = DisparityPredictor.__call__
    precisions = iter(("mixed", "fp32", "mixed"))

    def fall_back(self: DisparityPredictor, left: np.ndarray, right: np.ndarray) -> Prediction:
        return dataclasses.replace(call(self, left, right), precision=next(precisions))

    monkeypatch.setattr(DisparityPredictor, "__call__", fall_back)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    arguments = (tmp_path / "left", tmp_path / "right", "-o", tmp_path / "out", "--checkpoint", checkpoint)
    assert predict(*arguments) == 0
    assert "s a pair on cpu in mixed (1 in fp32)" in capsys.readouterr().out
    assert torch.backends.cudnn.allow_tf32 is False  # fp32 is what it says, on a GPU too


def test_a_disparity_that_the_format_cannot_hold_costs_no_other_pair(
    tmp_path: Path, checkpoint: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    write_three_pairs(tmp_path)
    call = DisparityPredictor.__call__
    count = iter(range(3))

    def far(self: DisparityPredictor, left: np.ndarray, right: np.ndarray) -> Prediction:
        prediction = call(self, left, right)
        return dataclasses.replace(prediction, disparity=prediction.disparity + 300) if next(count) == 1 else prediction

    monkeypatch.setattr(DisparityPredictor, "__call__", far)
    out = tmp_path / "out"
    options = ("--formats", "pfm,kitti,npy", "--checkpoint", checkpoint)
    assert predict(tmp_path / "left", tmp_path / "right", "-o", out, *options) == 2
    assert len(list(out.glob("*_kitti.png"))) == 2
    assert len(list(out.glob("*.pfm"))) == len(list(out.glob("*.npy"))) == 3  # nor the others of its own
    errors = capsys.readouterr().err
    assert "does not fit KITTI's 16-bit PNG" in errors
    assert "1 of 3 pairs failed: 1" in errors

    count = iter((1,))
    one = tmp_path / "one"
    assert predict(tmp_path / "left/1.png", tmp_path / "right/1.png", "-o", one, *options) == 2
    assert sorted(path.name for path in one.iterdir()) == ["1.npy", "1.pfm"]
    assert "does not fit KITTI's 16-bit PNG" in capsys.readouterr().err


def test_suspicious_pairs_are_warned_of_and_good_ones_are_not(
    tmp_path: Path, checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    left, right = tmp_path / "left.png", tmp_path / "right.png"
    write_pair(left, right, size=(240, 320), disparity=12)
    arguments = ("-o", tmp_path / "out.npy", "--checkpoint", checkpoint)
    assert predict(left, right, *arguments) == 0
    assert capsys.readouterr().err == ""
    assert predict(right, left, *arguments) == 0
    assert "swapped" in capsys.readouterr().err
    write_picture(right, np.roll(read_picture(right), 8, axis=0))
    assert predict(left, right, *arguments) == 0
    assert "unrectified" in capsys.readouterr().err


def test_many_suspicious_pairs_do_not_flood_the_screen(
    tmp_path: Path, checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for index in range(8):
        write_pair(tmp_path / f"right/{index}.png", tmp_path / f"left/{index}.png", size=(120, 160))
    out = tmp_path / "out"
    assert (
        predict(tmp_path / "left", tmp_path / "right", "-o", out, "--formats", "npy", "--checkpoint", checkpoint) == 0
    )
    errors = capsys.readouterr().err
    assert errors.count("look swapped") == 5
    assert "8 of 8 pairs look unrectified or swapped" in errors
    assert len(list(out.iterdir())) == 8


def test_options_reach_the_predictor(tmp_path: Path, checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_pair(tmp_path / "im0.png", tmp_path / "im1.png")
    pair = (tmp_path / "im0.png", tmp_path / "im1.png")
    out = tmp_path / "wide.npy"
    code = predict(*pair, "-o", out, "--weights", checkpoint, "--precision", "bf16", "--max-disparity", "64")
    assert code == 0
    assert "in bf16" in capsys.readouterr().out
    expected = load_predictor(checkpoint, "cpu", "bf16", 64)(*(read_picture(path) for path in pair))
    np.testing.assert_array_equal(np.load(out), expected.disparity)


def test_confidence_and_pixels_without_enough(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint = tmp_path / "calibrated.safetensors"
    save_weights(calibrated(), checkpoint)
    for name in ("a", "b"):
        write_pair(tmp_path / f"left/{name}.png", tmp_path / f"right/{name}.png", seed=ord(name))
    lefts, rights = tmp_path / "left", tmp_path / "right"
    files = [read_picture(folder / "a.png") for folder in (lefts, rights)]
    expected = load_predictor(checkpoint, "cpu", regression="modal", confidence=True)(*files)
    assert expected.confidence is not None
    threshold = float(np.median(expected.confidence))
    options = ("--formats", "confidence,npy,kitti,ply", "--regression", "modal", "--checkpoint", checkpoint)
    options += ("--focal-length-px", "100", "--baseline-m", "0.1", "--min-confidence", threshold)
    assert predict(lefts, rights, "-o", tmp_path / "out", *options) == 0
    grey = read_picture(tmp_path / "out/a_confidence.png")[..., 0]
    np.testing.assert_allclose(grey / 255, expected.confidence, atol=0.51 / 255)
    disparity = np.load(tmp_path / "out/a.npy")
    known = np.isfinite(disparity)
    np.testing.assert_array_equal(known, expected.confidence >= threshold)
    np.testing.assert_array_equal(disparity[known], expected.disparity[known])
    np.testing.assert_array_equal(np.isfinite(read_disparity(tmp_path / "out/a_kitti.png")), known)
    assert len(read_ply(tmp_path / "out/a.ply")[0]) == known.sum()

    # A pair alone, into one file; nobody is that sure.
    pair, out = (lefts / "a.png", rights / "a.png"), tmp_path / "a_confidence.png"
    assert predict(*pair, "-o", out, "--checkpoint", checkpoint, "--regression", "modal") == 0
    np.testing.assert_array_equal(read_picture(out)[..., 0], grey)
    capsys.readouterr()
    assert predict(*pair, "-o", tmp_path / "all.pfm", "--checkpoint", checkpoint, "--min-confidence", "1") == 0
    assert not np.isfinite(read_disparity(tmp_path / "all.pfm")).any()
    assert "no pixel has a confidence of 1 or more" in capsys.readouterr().err
    assert predict(*pair, "-o", out, "--checkpoint", checkpoint, "--min-confidence", "1.5") == 2
    assert "--min-confidence must be from 0 to 1, got 1.5" in capsys.readouterr().err


@pytest.mark.parametrize("view", ["left", "right"])
def test_pixels_that_the_other_view_contradicts(tmp_path: Path, checkpoint: Path, view: str) -> None:
    pair = (tmp_path / "a_left.png", tmp_path / "a_right.png")
    write_pair(*pair)
    predictor, views = load_predictor(checkpoint, "cpu"), [read_picture(path) for path in pair]
    maps = {"left": predictor(*views).disparity, "right": predictor.predict_right(*views).disparity}
    own, other = maps[view], maps["right" if view == "left" else "left"]
    tolerance = 0.05  # a network that was not trained agrees with itself by chance
    expected = np.full_like(own, np.inf)
    for y, x in np.ndindex(*own.shape):
        # The right view is mirrored, so that of two columns as near the other one is taken.
        match = round(float(x - own[y, x])) if view == "left" else 63 - round(float(63 - x - own[y, x]))
        if 0 <= match < own.shape[1] and abs(own[y, x] - other[y, match]) <= tolerance:
            expected[y, x] = own[y, x]
    out = tmp_path / "out.npy"
    assert predict(*pair, "-o", out, "--checkpoint", checkpoint, "--view", view, "--left-right", str(tolerance)) == 0
    found = np.load(out)
    assert 0 < np.isfinite(found).sum() < found.size
    np.testing.assert_array_equal(found, expected)


def test_results_that_are_there_are_passed_over(
    tmp_path: Path, checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_three_pairs(tmp_path)
    out = tmp_path / "out"
    command = (tmp_path / "left", tmp_path / "right", "-o", out, "--checkpoint", checkpoint, "--skip-existing")
    assert predict(*command) == 0
    before = {path.name: path.stat().st_mtime_ns for path in out.iterdir()}
    (out / "1.pfm").unlink()
    capsys.readouterr()
    assert predict(*command) == 0
    assert capsys.readouterr().out.startswith(f"2 of 3 pairs are there already\n1 of 1 pairs written to {out}")
    after = {path.name: path.stat().st_mtime_ns for path in out.iterdir()}
    assert sorted(name for name in after if after[name] != before[name]) == ["1.pfm", "1.png"]
    assert predict(*command) == 0
    assert capsys.readouterr().out == "3 of 3 pairs are there already\n"


def test_the_right_view_in_fixed_colours(tmp_path: Path, checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_pair(tmp_path / "a_left.png", tmp_path / "a_right.png")
    (tmp_path / "calib.txt").write_text(CALIBRATION)
    pair = (tmp_path / "a_left.png", tmp_path / "a_right.png")
    left, right = (read_picture(path) for path in pair)
    expected = load_predictor(checkpoint, "cpu").predict_right(left, right).disparity
    options = ("--view", "right", "--color-max", "48", "--checkpoint", checkpoint)
    formats = ("--formats", "png,npy,ply", "--calibration", tmp_path / "calib.txt")
    assert predict(*pair, "-o", tmp_path / "out", *options, *formats) == 0
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["a_right.npy", "a_right.ply", "a_right.png"]
    np.testing.assert_array_equal(np.load(tmp_path / "out/a_right.npy"), expected)
    np.testing.assert_array_equal(read_picture(tmp_path / "out/a_right.png"), colorize_disparity(expected, 48))
    points_m, colors = read_ply(tmp_path / "out/a_right.ply")
    columns = np.tile(np.arange(64), 48)
    np.testing.assert_allclose(points_m[:, 2], 100 * 0.25 / (expected.ravel().astype(np.float64) + 3), rtol=1e-6)
    np.testing.assert_allclose(100 * points_m[:, 0] / points_m[:, 2] + 33.5, columns, atol=1e-3)  # cam1's
    np.testing.assert_array_equal(colors, right.reshape(-1, 3))
    assert predict(*pair, "-o", tmp_path / "out", "--color-max", "0", "--checkpoint", checkpoint) == 2
    assert "--color-max must be a positive number of pixels, got 0" in capsys.readouterr().err
    assert predict(*pair, "-o", tmp_path / "a.pfm", "--color-max", "9", "--checkpoint", checkpoint) == 2
    assert "--color-max is for the format png" in capsys.readouterr().err


CALIBRATION = """cam0=[100 0 30.5; 0 100 20.25; 0 0 1]
cam1=[100 0 33.5; 0 100 20.25; 0 0 1]
doffs=3
baseline=250
width=64
height=48
"""


def test_depth_and_points(tmp_path: Path, checkpoint: Path) -> None:
    write_pair(tmp_path / "a_left.png", tmp_path / "a_right.png")
    (tmp_path / "calib.txt").write_text(CALIBRATION)
    pair = (tmp_path / "a_left.png", tmp_path / "a_right.png")
    out = tmp_path / "out"
    options = ("-o", out, "--formats", "npy,depth_m,depth_mm,ply", "--calibration", tmp_path / "calib.txt")
    assert predict(*pair, *options, "--checkpoint", checkpoint) == 0
    assert sorted(p.name for p in out.iterdir()) == ["a.npy", "a.ply", "a_depth_m.npy", "a_depth_mm.png"]
    disparity, depth_m = np.load(out / "a.npy"), np.load(out / "a_depth_m.npy")
    np.testing.assert_allclose(depth_m, 100 * 0.25 / (disparity.astype(np.float64) + 3), rtol=1e-6)
    depth_mm = np.asarray(Image.open(out / "a_depth_mm.png"))
    np.testing.assert_allclose(depth_mm, 1000 * depth_m, atol=0.51)
    points_m, colors = read_ply(out / "a.ply")
    assert len(points_m) == disparity.size
    np.testing.assert_allclose(points_m[:, 2], depth_m.ravel(), rtol=1e-6)
    rows, columns = np.indices(disparity.shape).reshape(2, -1)
    np.testing.assert_allclose(100 * points_m[:, 0] / points_m[:, 2] + 30.5, columns, atol=1e-3)
    np.testing.assert_allclose(100 * points_m[:, 1] / points_m[:, 2] + 20.25, rows, atol=1e-3)
    np.testing.assert_array_equal(colors, read_picture(pair[0]).reshape(-1, 3))


def test_points_of_two_pairs_from_numbers(tmp_path: Path, checkpoint: Path) -> None:
    for index, size in enumerate(((48, 64), (32, 80))):
        write_pair(tmp_path / f"left/{index}.png", tmp_path / f"right/{index}.png", seed=index, size=size)
    pairs = (tmp_path / "left", tmp_path / "right")
    cameras = ("--focal-length-px", "50", "--baseline-m", "0.5", "--checkpoint", checkpoint)
    assert predict(*pairs, "-o", tmp_path / "out", "--formats", "npy,ply", *cameras) == 0
    for index in range(2):  # the principal point in the middle of each
        disparity = np.load(tmp_path / f"out/{index}.npy")
        points_m, _ = read_ply(tmp_path / f"out/{index}.ply")
        x, y, z = points_m.reshape(*disparity.shape, 3).transpose(2, 0, 1)
        np.testing.assert_allclose(z, 25 / disparity, rtol=1e-6)
        np.testing.assert_allclose(x[:, 0] / z[:, 0], -(disparity.shape[1] - 1) / 100, rtol=1e-5)
        np.testing.assert_allclose(y[0] / z[0], -(disparity.shape[0] - 1) / 100, rtol=1e-5)
    nearest, farthest = z.min(), z.max()
    limit = (nearest + farthest) / 2
    one = (tmp_path / "left/1.png", tmp_path / "right/1.png")
    assert predict(*one, "-o", tmp_path / "near.ply", "--max-depth-m", limit, *cameras) == 0
    near, _ = read_ply(tmp_path / "near.ply")
    np.testing.assert_array_equal(near, points_m[points_m[:, 2] <= limit])
    assert 0 < len(near) < len(points_m)


def test_a_single_file_of_depth_and_what_is_out_of_reach(
    tmp_path: Path, checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_pair(tmp_path / "a_left.png", tmp_path / "a_right.png")
    pair = (tmp_path / "a_left.png", tmp_path / "a_right.png")
    millimetres = ("--focal-length-px", "100", "--baseline-m", "25000", "--checkpoint", checkpoint)  # by mistake
    assert predict(*pair, "-o", tmp_path / "a_depth_m.npy", *millimetres) == 0
    assert np.load(tmp_path / "a_depth_m.npy").min() > 10000
    assert predict(*pair, "-o", tmp_path / "a_depth_mm.png", *millimetres) == 0
    assert not np.asarray(Image.open(tmp_path / "a_depth_mm.png")).any()
    assert "all is too far for 16 bits: is the baseline in metres?" in capsys.readouterr().err
    assert predict(*pair, "-o", tmp_path / "a.ply", "--max-depth-m", "9", "--cx-px", "-70", *millimetres) == 0
    assert "a.ply: no point is near enough" in capsys.readouterr().err
    assert len(read_ply(tmp_path / "a.ply")[0]) == 0


def test_results_that_would_overwrite_each_other(
    tmp_path: Path, checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("a", "a_depth_m"):
        write_pair(tmp_path / f"left/{name}.png", tmp_path / f"right/{name}.png")
    options = ("--formats", "npy,depth_m", "--focal-length-px", "9", "--baseline-m", "1", "--checkpoint", checkpoint)
    assert predict(tmp_path / "left", tmp_path / "right", "-o", tmp_path / "out", *options) == 2
    assert "a_depth_m.npy: the result of a_depth_m would overwrite" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--formats", "ply"], "ply needs the cameras: add --calibration FILE, or --focal-length-px and --baseline-m"),
        (["--formats", "depth_m", "--baseline-m", "1"], "depth_m needs the cameras"),
        (["--baseline-m", "1"], "--baseline-m is for the formats depth_m, depth_mm, ply: ask for one, or leave it out"),
        (["--calibration", "none.txt"], "--calibration is for the formats depth_m"),
        (["--formats", "ply", "--calibration", "none.txt"], "none.txt: no such file"),
        (["--formats", "ply", "--calibration", "none.txt", "--doffs-px", "1"], "none.txt says what --doffs-px says"),
        (["--formats", "ply", "--focal-length-px", "-5", "--baseline-m", "1"],
         "--focal-length-px must be a positive number, got -5"),
        (["--formats", "ply", "--focal-length-px", "5", "--baseline-m", "1", "--doffs-px", "nan"],
         "--doffs-px must be a finite number, got nan"),
        (["--formats", "depth_m", "--focal-length-px", "5", "--baseline-m", "1", "--cy-px", "9"],
         "--cy-px is for point clouds: ask for ply, or leave it out"),
        (["--formats", "depth_m", "--focal-length-px", "5", "--baseline-m", "1", "--max-depth-m", "9"],
         "--max-depth-m is for point clouds"),
        (["--formats", "ply", "--focal-length-px", "5", "--baseline-m", "1", "--max-depth-m", "0"],
         "--max-depth-m must be a positive number, got 0"),
    ],
)  # fmt: skip
def test_unusable_cameras(
    options: list[str], message: str, tmp_path: Path, checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_pair(tmp_path / "a_left.png", tmp_path / "a_right.png")
    arguments = (tmp_path / "a_left.png", tmp_path / "a_right.png", "-o", tmp_path / "out", "--checkpoint", checkpoint)
    assert predict(*arguments, *options) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_calibration_of_another_size_costs_no_pair_that_it_fits(
    tmp_path: Path, checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_three_pairs(tmp_path)
    write_pair(tmp_path / "left/1.png", tmp_path / "right/1.png", size=(16, 64))
    (tmp_path / "calib.txt").write_text(CALIBRATION)
    options = ("-o", tmp_path / "out", "--formats", "depth_mm", "--calibration", tmp_path / "calib.txt")
    assert predict(tmp_path / "left", tmp_path / "right", *options, "--checkpoint", checkpoint) == 2
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["0_depth_mm.png", "2_depth_mm.png"]
    error = capsys.readouterr().err
    assert f"failed: 1: {tmp_path / 'calib.txt'} is for pictures of 64x48, this one has 64x16" in error


def read_ply(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Return points float32 [N, 3] and colours uint8 [N, 3], read by what the header says."""
    header, body = path.read_bytes().split(b"end_header\n", 1)
    lines = header.decode("ascii").splitlines()
    assert lines[:2] == ["ply", "format binary_little_endian 1.0"]
    types = {"float": "<f4", "uchar": "u1"}
    properties = [line.split() for line in lines if line.startswith("property")]
    vertices = np.frombuffer(body, [(name, types[kind]) for _, kind, name in properties])
    assert f"element vertex {len(vertices)}" in lines
    return (
        np.stack([vertices[name] for name in ("x", "y", "z")], axis=1),
        np.stack([vertices[name] for name in ("red", "green", "blue")], axis=1),
    )


def test_formats_are_parsed() -> None:
    assert parse_formats(" PNG, npy,png") == ("png", "npy")
    for wrong in ("jpg", "png,exr", "", ","):
        with pytest.raises(
            InputError, match="--formats takes any of png,pfm,kitti,npy,depth_m,depth_mm,ply,confidence"
        ):
            parse_formats(wrong)


def test_help_describes_the_formats(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as leaving:
        main(["predict", "--help"])
    assert leaving.value.code == 0
    text = capsys.readouterr().out
    for word in ("--formats", "--checkpoint", "--precision", "kitti", "swapped"):
        assert word in text


def test_result_cannot_be_a_jpeg(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("left.png", "right.png"):
        write_picture(tmp_path / name, np.zeros((32, 32, 3), np.uint8))
    views = [str(tmp_path / "left.png"), str(tmp_path / "right.png")]
    assert main(["predict", *views, "-o", str(tmp_path / "out.jpg")]) == 2
    assert ".png, .pfm, .npy or .ply" in capsys.readouterr().err
    assert not (tmp_path / "out.jpg").exists()


def test_tiles_and_scale(tmp_path: Path, checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_pair(tmp_path / "a_left.png", tmp_path / "a_right.png", size=(160, 64))
    pair = [tmp_path / "a_left.png", tmp_path / "a_right.png"]
    options = ["--checkpoint", checkpoint, "-o"]
    assert predict(*pair, *options, tmp_path / "whole.npy") == 0
    assert predict(*pair, "--tile", "64", *options, tmp_path / "tiled.npy") == 0
    assert predict(*pair, "--memory", "2", *options, tmp_path / "memory.npy") == 0
    assert predict(*pair, "--scale", "0.5", *options, tmp_path / "half.npy") == 0
    whole, tiled, memory, half = (np.load(tmp_path / f"{n}.npy") for n in ("whole", "tiled", "memory", "half"))
    np.testing.assert_allclose(tiled, whole, atol=0.5)
    np.testing.assert_array_equal(memory, whole)
    assert half.shape == whole.shape
    assert not np.allclose(half, whole, atol=0.01)
    capsys.readouterr()
    for wrong, message in (
        (("--tile", "50"), "multiple of 16"),
        (("--scale", "-1"), "scale must be positive"),
        (("--scale", "1e8"), "too large: choose a smaller scale"),
        (("--cuda-graph", "--device", "cpu"), "--cuda-graph needs a GPU"),
    ):
        assert predict(*pair, *wrong, *options, tmp_path / "x.npy") == 2
        assert message in capsys.readouterr().err
