"""``fa-stereo show-attention``: arrays against the blocks themselves, pictures by what is on them, and bad input."""

from __future__ import annotations

import base64
import json
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from fa_stereo.cli.main import main
from fa_stereo.cli.show_attention import Look, grid_of_pixels, look
from fa_stereo.config import AttentionConfig, ModelConfig
from fa_stereo.data.formats import read_picture, write_picture
from fa_stereo.data.transforms import normalize_images
from fa_stereo.models.checkpoint import load_model, save_weights
from fa_stereo.models.psmnet import build_model

HEIGHT, WIDTH = 37, 70  # 11 rows and 10 columns short of multiples of 16


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("pair")
    rng = np.random.default_rng(0)
    for name in ("desk_left.png", "desk_right.png"):
        write_picture(folder / name, rng.integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8))
    return [str(folder / "desk_left.png"), str(folder / "desk_right.png")]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., str]:
    """Return a function that writes the weights of a tiny network with some attention, once for each."""
    folder = tmp_path_factory.mktemp("weights")

    def write(slots: tuple[str, ...] = ("res4",), **attention: Any) -> str:
        settings = "_".join(f"{value}" for value in (*slots, *attention.values()))
        path = folder / f"{settings}.safetensors"
        if not path.exists():
            torch.manual_seed(0)
            config = AttentionConfig(**{"key_channels": 8, **attention})
            model = build_model(
                ModelConfig(base_channels=8, max_disparity=32, attention=config, attention_slots=list(slots))
            )
            for name, parameter in model.features.attention.named_parameters():
                if "values" in name or "reprojection" in name:
                    nn.init.normal_(parameter, std=0.1)
            save_weights(model, path)
        return str(path)

    return write


def show(pair: list[str], out: Path, weights: str, *more: str) -> int:
    return main(["show-attention", *pair, "-o", str(out), "--checkpoint", weights, "--device", "cpu", *more])


def what_is_seen(pair: list[str], weights: str, slot: str = "res4") -> tuple[nn.Module, Look]:
    model = load_model(weights).eval()
    block = model.features.attention[slot]
    return block, look(model, block, *(read_picture(path) for path in pair))


@pytest.fixture(scope="module")
def shown(pair: list[str], checkpoint: Callable[..., str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the command writes for two heads of factorized attention and two pixels."""
    out = tmp_path_factory.mktemp("shown")
    assert show(pair, out, checkpoint(heads=2), "--pixel", "0,0", "--pixel", "69,36", "--masks", "3") == 0
    return out


def test_the_network_sees_what_the_command_shows(pair: list[str], checkpoint: Callable[..., str]) -> None:
    """The recorded features are those of the network on a padded pair, and pixels are found on the padded map."""
    weights = checkpoint(heads=2)
    _, seen = what_is_seen(pair, weights)
    model = load_model(weights).eval()
    inputs: list[torch.Tensor] = []
    model.features.attention["res4"].register_forward_pre_hook(lambda _, arguments: inputs.append(arguments[0]))
    views = [normalize_images(torch.from_numpy(read_picture(path)).permute(2, 0, 1)[None]) for path in pair]
    with torch.no_grad():
        model(*views)
    expected = torch.cat(inputs)  # one call a view on the CPU
    assert seen.features.shape == (2, 32, 12, 20)
    torch.testing.assert_close(seen.features, expected, rtol=0, atol=1e-3 * float(expected.abs().max()))
    assert seen.views.shape == (2, 48, 80, 3)
    np.testing.assert_array_equal(seen.views[1, 11:, :WIDTH], read_picture(pair[1]))
    assert (seen.views[0, :11] == seen.views[0, 0, 0]).all()
    assert seen.position((0, 0)) == (2, 0)  # below 11 rows of padding, in cells of 4
    assert seen.position((69, 36)) == (11, 17)


def test_arrays_are_those_of_the_block(shown: Path, pair: list[str], checkpoint: Callable[..., str]) -> None:
    attention, seen = what_is_seen(pair, checkpoint(heads=2))
    masks, coefficients = np.load(shown / "masks.npy"), np.load(shown / "coefficients.npy")
    rows = np.load(shown / "rows.npy")
    assert masks.shape == coefficients.shape == (2, 2, 4, 12, 20)
    assert rows.shape == (2, 2, 12, 20)
    with torch.no_grad():
        np.testing.assert_allclose(masks, attention.basis_masks(seen.features).numpy(), rtol=1e-4, atol=1e-7)
    for row, (y, x) in zip(rows, ((2, 0), (11, 17)), strict=True):
        composed = np.einsum("hb,hbyx->hyx", coefficients[0, :, :, y, x], masks[0])
        np.testing.assert_allclose(row, composed, rtol=1e-4, atol=1e-7)
    np.testing.assert_allclose(rows.sum((2, 3)), 1, rtol=1e-4)


def test_files_and_summary(shown: Path) -> None:
    assert {path.name for path in shown.iterdir()} == {
        "masks_left.png", "masks_right.png", "masks.npy", "coefficients.npy", "attention.html", "rows_left.png",
        "rows.npy", "attention.json",
    }  # fmt: skip
    summary = json.loads((shown / "attention.json").read_text())
    assert summary["slot"] == "res4"
    assert summary["map_size"] == [12, 20]
    assert summary["rows_above_px"] == 11
    assert [row["position"] for row in summary["rows"]] == [[2, 0], [11, 17]]
    assert len(summary["masks"]) == 3
    shares = [mask["energy_share"] for mask in summary["masks"]]
    assert shares == sorted(shares, reverse=True)
    assert 0 < sum(shares) < 1
    masks = np.load(shown / "masks.npy")
    for mask in summary["masks"]:
        weights = masks[0, mask["head"], mask["mask"]].astype(np.float64)
        assert mask["spread_left"] == pytest.approx(weights.sum() ** 2 / (weights**2).sum(), rel=1e-4)


def test_sheets_show_something(shown: Path) -> None:
    left, right, rows = (read_picture(shown / f"{name}.png") for name in ("masks_left", "masks_right", "rows_left"))
    assert left.shape == right.shape
    assert left.shape[1] > 4 * 400  # the picture and three masks
    assert rows.shape[1] > 4 * 400  # a row and three terms
    assert (left != right).any()
    green = (rows == (80, 255, 80)).all(axis=2)
    assert green.any()  # the crosses


def values_of(page: str) -> dict[str, Any]:
    (line,) = re.findall(r"^const data = (.*);$", page, re.M)
    values: dict[str, Any] = json.loads(line)
    return values


def floats(encoded: str) -> np.ndarray:
    upper = np.frombuffer(base64.b64decode(encoded), "<u2")
    return (upper.astype(np.uint32) << 16).view(np.float32)


def test_the_page_holds_both_factors_of_every_row(shown: Path) -> None:
    values = values_of((shown / "attention.html").read_text())
    masks, coefficients = (floats(values[name]).reshape(8, 240) for name in ("masks", "coefficients"))
    assert values["map"] == [20, 12]
    assert values["size"] == [80, 48]
    assert values["top"] == 11
    assert values["names"][5] == "head 1 mask 1"
    rows = np.load(shown / "rows.npy").mean(1).reshape(2, 240)
    for row, position in zip(rows, (2 * 20, 11 * 20 + 17), strict=True):
        np.testing.assert_allclose(coefficients[:, position] @ masks, row, rtol=0.01)


@pytest.mark.skipif(shutil.which("node") is None, reason="runs the page's JavaScript with node, which is not there")
def test_the_page_composes_the_row(shown: Path) -> None:
    page = (shown / "attention.html").read_text()
    script = page[page.rindex("<script>") + 8 : page.rindex("</script>")]
    script += """
    const row = attentionRow(floats(data.coefficients), floats(data.masks), data.names.length, 240, 237);
    console.log(JSON.stringify([Array.from(row), Array.from(levels(row, data.decades))]));
    """
    result = subprocess.run(["node", "-"], input=script, capture_output=True, text=True, check=True)
    row, levels = (np.array(values) for values in json.loads(result.stdout))
    expected = np.load(shown / "rows.npy")[1].mean(0).ravel()
    np.testing.assert_allclose(row, expected, rtol=0.01)
    assert levels.max() == pytest.approx(1)
    assert levels.min() == pytest.approx(0, abs=1e-5)
    assert np.argmax(levels) == np.argmax(row)


def test_dot_product_attention_has_a_page_of_the_same_row(
    pair: list[str], checkpoint: Callable[..., str], tmp_path: Path
) -> None:
    assert show(pair, tmp_path, checkpoint(heads=2, normalization="dot"), "--pixel", "30,20") == 0
    values = values_of((tmp_path / "attention.html").read_text())
    masks, coefficients = (floats(values[name]).reshape(8, 240) for name in ("masks", "coefficients"))
    (row,) = np.load(tmp_path / "rows.npy").mean(1).reshape(1, 240)
    y, x = (20 + 11) // 4, 30 // 4
    np.testing.assert_allclose(coefficients[:, 20 * y + x] @ masks, row, atol=0.01 * np.abs(row).max())


@pytest.mark.parametrize(
    "attention",
    [
        {"kind": "non_local", "heads": 2, "computation": "fused"},
        {"kind": "axial", "heads": 1, "span": 5},
        {"kind": "non_local", "transformer": True},
    ],
)
def test_other_attention_shows_rows(
    pair: list[str], checkpoint: Callable[..., str], tmp_path: Path, attention: dict[str, Any]
) -> None:
    """Without masks to show, nine pixels are; the rows are the block's own."""
    weights = checkpoint(**attention)
    assert show(pair, tmp_path, weights) == 0
    assert {path.name for path in tmp_path.iterdir()} == {"rows.npy", "rows_left.png", "attention.json"}
    rows = np.load(tmp_path / "rows.npy")
    assert rows.shape == (9, attention.get("heads", 1), 12, 20)
    np.testing.assert_allclose(rows.sum((2, 3)), 1, rtol=1e-4)
    block, seen = what_is_seen(pair, weights)
    block = getattr(block, "attention", block)
    pixels = [tuple(row["pixel"]) for row in json.loads((tmp_path / "attention.json").read_text())["rows"]]
    assert pixels == grid_of_pixels(read_picture(pair[0]))
    with torch.no_grad():
        expected = block.attention_row(seen.features[:1], seen.position(pixels[4]))[0]
    np.testing.assert_allclose(rows[4], expected.numpy(), rtol=1e-3, atol=1e-6)


def test_a_slot_of_several(
    pair: list[str], checkpoint: Callable[..., str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    weights = checkpoint(("res1", "res3"), transformer=True)
    assert show(pair, tmp_path, weights) == 2
    assert "attention after res1 and res3: choose one with --slot" in capsys.readouterr().err
    assert show(pair, tmp_path, weights, "--slot", "res4") == 2
    assert "--slot res4" in capsys.readouterr().err
    assert show(pair, tmp_path, weights, "--slot", "res1") == 0
    assert np.load(tmp_path / "masks.npy").shape == (2, 1, 8, 24, 40)  # res1 is at half resolution


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--pixel", "70,0"], "--pixel 70,0 is outside of the left picture: X is from 0 to 69, Y from 0 to 36"),
        (["--pixel=-1,0"], "--pixel -1,0 is outside"),
        (["--pixel", "3"], "--pixel takes X,Y in pixels of the left picture, got '3'"),
        (["--pixel", "1,2,3"], "got '1,2,3'"),
        (["--pixel", "a,b"], "got 'a,b'"),
        (["--masks", "0"], "--masks must be positive, got 0"),
        (["--device", "gpu"], "gpu"),
    ],
)
def test_unusable_options(
    pair: list[str], checkpoint: Callable[..., str], tmp_path: Path, arguments: list[str], message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    assert show(pair, tmp_path / "out", checkpoint(heads=2), *arguments) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.err.startswith("fa-stereo show-attention: ")
    assert captured.err.count("\n") == 1
    assert captured.out == ""
    assert not (tmp_path / "out").exists()


def test_networks_without_attention_to_show(
    pair: list[str], checkpoint: Callable[..., str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert show(pair, tmp_path, checkpoint(kind="none")) == 2
    assert "this network has no attention" in capsys.readouterr().err
    assert show(pair, tmp_path, checkpoint(kind="resblock")) == 2
    assert "the ResBlock after res4 has no attention to show" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_unusable_files(
    pair: list[str], checkpoint: Callable[..., str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    weights = checkpoint(heads=2)
    assert show([pair[0], str(tmp_path / "nowhere.png")], tmp_path, weights) == 2
    assert "nowhere.png" in capsys.readouterr().err
    assert show(pair, tmp_path, str(tmp_path / "none.safetensors")) == 2
    assert "none.safetensors" in capsys.readouterr().err
    write_picture(tmp_path / "small.png", np.zeros((8, 8, 3), np.uint8))
    assert show([str(tmp_path / "small.png")] * 2, tmp_path, weights) == 2
    assert "at least 16x16" in capsys.readouterr().err
    for view in ("left", "right"):
        (tmp_path / view).mkdir()
        for name in ("a.png", "b.png"):
            shutil.copy(pair[0], tmp_path / view / name)
    assert show([str(tmp_path / "left"), str(tmp_path / "right")], tmp_path / "out", weights) == 2
    assert "are 2 pairs: name one" in capsys.readouterr().err
    occupied = tmp_path / "occupied"
    occupied.write_text("a file")
    assert show(pair, occupied, weights) == 2
    assert str(occupied) in capsys.readouterr().err
    shutil.copy(pair[0], tmp_path / "rows_left.png")
    assert show([str(tmp_path / "rows_left.png"), pair[1]], tmp_path, weights) == 2
    assert "would overwrite" in capsys.readouterr().err


def test_a_picture_too_large_for_a_page(
    pair: list[str],
    checkpoint: Callable[..., str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("fa_stereo.cli.show_attention.PAGE_LIMIT", 1000)
    assert show(pair, tmp_path, checkpoint(heads=2)) == 0
    assert "no attention.html: the picture is too large" in capsys.readouterr().out
    assert not (tmp_path / "attention.html").exists()
    assert (tmp_path / "masks.npy").exists()
