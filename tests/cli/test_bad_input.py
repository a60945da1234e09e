"""Whatever is wrong with the input of ``fa-stereo predict``: exit code 2, one sentence naming it, no traceback."""

from __future__ import annotations

import importlib
import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pytest
import safetensors.torch
import torch
from PIL import Image

from fa_stereo.cli.main import COMMANDS, main


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path]:
    left, right = tmp_path / "im0.png", tmp_path / "im1.png"
    for path, seed in ((left, 0), (right, 1)):
        picture = np.random.default_rng(seed).integers(0, 256, (32, 48, 3), dtype=np.uint8)
        Image.fromarray(picture).save(path)
    return left, right


@pytest.fixture
def refused(tmp_path: Path, checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Run predict, check that it is refused properly, and return what it says."""

    def run(*arguments: str | Path, output: str | Path = tmp_path / "out", weights: Path = checkpoint) -> str:
        options = ["-o", str(output), "--checkpoint", str(weights), "--device", "cpu"]
        assert main(["predict", *map(str, arguments), *options]) == 2
        captured = capsys.readouterr()
        assert captured.out == ""
        assert captured.err.startswith("fa-stereo predict: ")
        assert captured.err.count("\n") == 1
        assert "Traceback" not in captured.err
        return captured.err

    return run


# --------------------------------------------------------------------------------------------------------------------
# pictures


def test_a_missing_picture(pair: tuple[Path, Path], refused: Callable[..., str], tmp_path: Path) -> None:
    message = refused(pair[0], tmp_path / "nowhere.png")
    assert "nowhere.png: no such file" in message
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "empty"),
        (b"hello, this is text", "not a picture"),
        (b"\x89PNG\r\n\x1a\n", "not a picture"),
        (bytes(range(256)) * 8, "not a picture"),
        (b"<html><body>404 Not Found</body></html>", "not a picture"),
    ],
)
def test_files_that_are_no_pictures(
    pair: tuple[Path, Path], refused: Callable[..., str], content: bytes, said: str
) -> None:
    pair[1].write_bytes(content)
    message = refused(*pair)
    assert str(pair[1]) in message
    assert said in message
    assert not (pair[1].parent / "out").exists()


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".webp", ".bmp", ".tif"])
@pytest.mark.parametrize("share", [0.3, 0.9])
def test_truncated_pictures(
    pair: tuple[Path, Path], refused: Callable[..., str], tmp_path: Path, suffix: str, share: float
) -> None:
    path = tmp_path / f"cut{suffix}"
    with Image.open(pair[1]) as image:
        image.save(path)
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    assert str(path) in refused(pair[0], path)


def test_a_folder_for_a_picture(pair: tuple[Path, Path], refused: Callable[..., str], tmp_path: Path) -> None:
    assert "folder" in refused(pair[0], tmp_path)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read every file")
def test_an_unreadable_picture(pair: tuple[Path, Path], refused: Callable[..., str]) -> None:
    pair[1].chmod(0)
    assert str(pair[1]) in refused(*pair)


def test_views_of_different_sizes(pair: tuple[Path, Path], refused: Callable[..., str]) -> None:
    Image.fromarray(np.zeros((32, 40, 3), np.uint8)).save(pair[1])
    message = refused(*pair)
    assert "48x32" in message
    assert "40x32" in message


def test_pictures_smaller_than_16_pixels(pair: tuple[Path, Path], refused: Callable[..., str]) -> None:
    for path in pair:
        Image.fromarray(np.zeros((15, 40, 3), np.uint8)).save(path)
    assert "at least 16x16, got 40x15" in refused(*pair)
    assert not (pair[1].parent / "out").exists()


def _save_grey(path: Path, picture: np.ndarray) -> None:
    Image.fromarray(picture[..., 0]).save(path)


def _save_rgba(path: Path, picture: np.ndarray) -> None:
    Image.fromarray(np.dstack([picture, np.full(picture.shape[:2], 128, np.uint8)])).save(path)


def _save_palette(path: Path, picture: np.ndarray) -> None:
    Image.fromarray(picture).quantize(256).save(path)


def _save_16_bit_grey(path: Path, picture: np.ndarray) -> None:
    assert cv2.imwrite(str(path), picture[..., 0].astype(np.uint16) * 257)


def _save_16_bit_colour(path: Path, picture: np.ndarray) -> None:
    assert cv2.imwrite(str(path), picture[..., ::-1].astype(np.uint16) * 257)


@pytest.mark.parametrize(
    ("save", "as_colour"),
    [
        (_save_grey, lambda picture: np.repeat(picture[..., :1], 3, axis=2)),
        (_save_rgba, lambda picture: picture),
        (_save_palette, lambda picture: np.asarray(Image.fromarray(picture).quantize(256).convert("RGB"))),
        (_save_16_bit_grey, lambda picture: np.repeat(picture[..., :1], 3, axis=2)),
        (_save_16_bit_colour, lambda picture: picture),
    ],
)
def test_other_kinds_of_pictures_give_the_same_as_their_8_bit_colours(
    tmp_path: Path,
    checkpoint: Path,
    save: Callable[[Path, np.ndarray], None],
    as_colour: Callable[[np.ndarray], np.ndarray],
) -> None:
    rng = np.random.default_rng(0)
    for name in ("left", "right"):
        picture = rng.integers(0, 256, (32, 48, 3), dtype=np.uint8)
        picture[0, 0] = 255  # so that the depth of 16-bit pictures is certain
        save(tmp_path / f"odd_{name}.png", picture)
        Image.fromarray(as_colour(picture)).save(tmp_path / f"plain_{name}.png")
    results = []
    for kind in ("odd", "plain"):
        out = tmp_path / f"{kind}.npy"
        views = [str(tmp_path / f"{kind}_{name}.png") for name in ("left", "right")]
        assert main(["predict", *views, "-o", str(out), "--checkpoint", str(checkpoint), "--device", "cpu"]) == 0
        results.append(np.load(out))
    np.testing.assert_array_equal(*results)


# --------------------------------------------------------------------------------------------------------------------
# sets of pictures


def test_folders_that_do_not_pair(pair: tuple[Path, Path], refused: Callable[..., str], tmp_path: Path) -> None:
    left, right = tmp_path / "left", tmp_path / "right"
    for folder in (left, right):
        folder.mkdir()
    assert "no pictures" in refused(left, right)
    for name in ("a", "b"):
        (left / f"{name}.png").write_bytes(pair[0].read_bytes())
    (right / "a.png").write_bytes(pair[1].read_bytes())
    assert "b" in refused(left, right)  # unequal in number
    (right / "c.png").write_bytes(pair[1].read_bytes())
    assert "b" in refused(left, right)  # equal in number, unpairable
    refused(left, right / "a.png")
    refused(str(tmp_path / "*.jpg"), str(tmp_path / "*.jpeg"))


# --------------------------------------------------------------------------------------------------------------------
# checkpoints


class _Hostile:
    """Unpickling this would create a file."""

    def __init__(self, proof: Path) -> None:
        self.proof = proof

    def __reduce__(self) -> tuple[object, ...]:
        return (Path.touch, (self.proof,))


@pytest.mark.parametrize("wrapping", ["bare", "torch", "torch_legacy", "entry"])
def test_a_hostile_pickle_is_not_executed(
    pair: tuple[Path, Path], refused: Callable[..., str], tmp_path: Path, wrapping: str
) -> None:
    proof, path = tmp_path / "executed", tmp_path / "hostile.pt"
    if wrapping == "bare":
        path.write_bytes(pickle.dumps(_Hostile(proof), protocol=2))
    elif wrapping == "entry":
        torch.save({"model_config": {}, "model": {}, "more": _Hostile(proof)}, path)
    else:
        torch.save(_Hostile(proof), path, _use_new_zipfile_serialization=wrapping == "torch")
    assert "hostile.pt" in refused(*pair, weights=path)
    assert not proof.exists()
    if wrapping == "bare":  # the trap works: an unsafe loader would have fallen into it
        pickle.loads(path.read_bytes())
        assert proof.exists()


def test_damaged_checkpoints(
    pair: tuple[Path, Path], refused: Callable[..., str], tmp_path: Path, checkpoint: Path
) -> None:
    whole = checkpoint.read_bytes()
    training = tmp_path / "training.pt"
    torch.save({"model_config": {}, "model": {"weight": torch.zeros(1000)}, "ema": None}, training)
    contents = {
        "empty.safetensors": b"",
        "half.safetensors": whole[: len(whole) // 2],
        "head.safetensors": whole[:100],
        "text.safetensors": b"these are no weights",
        "half.pt": training.read_bytes()[: training.stat().st_size // 2],
        "text.pt": b"neither are these",
    }
    for name, content in contents.items():
        path = tmp_path / name
        path.write_bytes(content)
        assert name in refused(*pair, weights=path)
    assert "nowhere.pt" in refused(*pair, weights=tmp_path / "nowhere.pt")
    assert str(tmp_path) in refused(*pair, weights=tmp_path)


def test_checkpoints_of_other_models(pair: tuple[Path, Path], refused: Callable[..., str], tmp_path: Path) -> None:
    other = tmp_path / "resnet.safetensors"
    safetensors.torch.save_file({"conv1.weight": torch.zeros(4, 3, 3, 3)}, other)
    assert "another model" in refused(*pair, weights=other)
    plain = tmp_path / "resnet.pt"
    torch.save({"conv1.weight": torch.zeros(4, 3, 3, 3)}, plain)
    assert "not a checkpoint of this project" in refused(*pair, weights=plain)
    values = tmp_path / "tensor.pt"
    torch.save(torch.zeros(3), values)
    assert "tensor.pt" in refused(*pair, weights=values)


def test_weights_that_do_not_fit_their_description(
    pair: tuple[Path, Path], refused: Callable[..., str], tmp_path: Path, checkpoint: Path
) -> None:
    tensors = safetensors.torch.load_file(checkpoint)
    with safetensors.safe_open(checkpoint, framework="pt") as file:
        metadata = file.metadata()
    path = tmp_path / "altered.safetensors"
    first = next(iter(tensors))
    safetensors.torch.save_file({key: value for key, value in tensors.items() if key != first}, path, metadata)
    assert first in refused(*pair, weights=path)
    broken = {**metadata, "model": metadata["model"].replace("base_channels", "base_chanels")}
    safetensors.torch.save_file(tensors, path, broken)
    assert "base_chanels" in refused(*pair, weights=path)
    safetensors.torch.save_file(tensors, path, {**metadata, "model": "{"})
    assert "altered.safetensors" in refused(*pair, weights=path)


# --------------------------------------------------------------------------------------------------------------------
# output and options


def test_an_output_folder_that_cannot_be_written(
    pair: tuple[Path, Path], refused: Callable[..., str], tmp_path: Path
) -> None:
    occupied = tmp_path / "occupied"
    occupied.write_text("a file")
    for output in (occupied, occupied / "below", occupied / "below.npy"):
        message = refused(*pair, output=output)
        assert str(occupied) in message
        assert "cannot be written" in message
    assert occupied.read_text() == "a file"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_protected_output_folder(pair: tuple[Path, Path], refused: Callable[..., str], tmp_path: Path) -> None:
    protected = tmp_path / "protected"
    protected.mkdir(mode=0o500)
    assert "cannot be written" in refused(*pair, output=protected)


def test_results_never_replace_the_pictures(pair: tuple[Path, Path], refused: Callable[..., str]) -> None:
    before = pair[0].read_bytes()
    assert "would overwrite" in refused(*pair, output=pair[0].parent)
    assert "would overwrite" in refused(*pair, output=pair[1])
    assert pair[0].read_bytes() == before


def test_a_file_for_many_results(pair: tuple[Path, Path], refused: Callable[..., str], tmp_path: Path) -> None:
    for index, folder in enumerate(("left", "right")):
        (tmp_path / folder).mkdir()
        for name in ("a.png", "b.png"):
            (tmp_path / folder / name).write_bytes(pair[index].read_bytes())
    assert "give a folder" in refused(tmp_path / "left", tmp_path / "right", output=tmp_path / "all.pfm")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--formats", "png,exr"], "exr"),
        (["--precision", "int8"], "int8"),
        (["--max-disparity", "100"], "multiple of 16"),
        (["--device", "gpu"], "gpu"),
        (["--left-right", "-1"], "--left-right must be zero or more pixels, got -1"),
    ],
)
def test_option_values(
    pair: tuple[Path, Path], checkpoint: Path, tmp_path: Path, options: list[str], said: str,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    arguments = ["predict", *map(str, pair), "-o", str(tmp_path / "out"), "--checkpoint", str(checkpoint), *options]
    assert main(arguments) == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "command", "said"),
    [
        (
            torch.OutOfMemoryError("CUDA out of memory. Tried\nmore"),
            "train",
            "(CUDA out of memory. Tried): lower trainer",
        ),
        (MemoryError(), "evaluate", "(nothing is left to allocate): compute bands of rows (tile=64)"),
        (
            RuntimeError("Caught MemoryError in x.\n  Traceback\nstd::bad_alloc"),
            "demo",
            "(std::bad_alloc): take smaller",
        ),
        (RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. "), "train", "lower data.workers (0"),
        (RuntimeError("DataLoader worker (pid(s) 7) exited unexpectedly"), "evaluate", "lower workers (0"),
    ],
)
def test_a_lack_of_memory_is_one_sentence(
    error: Exception, command: str, said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(_: list[str]) -> int:
        raise error

    module = importlib.import_module(COMMANDS[command][0])
    monkeypatch.setattr(module, "main", fail)
    assert main([command]) == 2
    told = capsys.readouterr().err
    assert said in told
    assert told.count("\n") == 1
    monkeypatch.setenv("FA_STEREO_DEBUG", "1")
    with pytest.raises(type(error)):
        main([command])


def test_other_errors_keep_their_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: list[str]) -> int:
        raise RuntimeError("a fault of ours")

    monkeypatch.setattr(importlib.import_module(COMMANDS["demo"][0]), "main", fail)
    with pytest.raises(RuntimeError, match="a fault of ours"):
        main(["demo"])


@pytest.mark.parametrize("name", ["disparity.exr", "disparity.JPG", "disparity.npz"])
def test_a_file_of_another_format(
    pair: tuple[Path, Path], tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["predict", *map(str, pair), "-o", str(tmp_path / name)]) == 2
    assert f"{name}: a result can be written as .png, .pfm, .npy or .ply" in capsys.readouterr().err


def test_bundled_weights_that_do_not_exist(
    pair: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["predict", *map(str, pair), "-o", str(tmp_path / "out"), "--weights", "huge"]) == 2
    assert "huge: neither a checkpoint file nor bundled weights" in capsys.readouterr().err


def test_as_a_command_of_its_own(pair: tuple[Path, Path], checkpoint: Path, tmp_path: Path) -> None:
    """The whole way once each: a good pair leaves with 0, a damaged one with 2 and without a traceback."""

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "fa_stereo.cli.main", "predict", *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    options = ["-o", str(tmp_path / "out"), "--checkpoint", str(checkpoint), "--device", "cpu"]
    good = run(*map(str, pair), *options)
    assert good.returncode == 0, good.stderr
    written = good.stdout.splitlines()[1:]
    assert len(written) == 2
    assert all(Path(path).is_file() for path in written)
    pair[1].write_bytes(pair[1].read_bytes()[:500])
    bad = run(*map(str, pair), *options)
    assert bad.returncode == 2
    assert bad.stdout == ""
    assert bad.stderr.count("\n") == 1
    assert str(pair[1]) in bad.stderr
    nothing = run()
    assert nothing.returncode == 2
    assert "usage" in nothing.stderr
