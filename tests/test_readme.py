"""README and its like: their commands are understood, the Python runs, demo row and picture are what the demo gives."""

from __future__ import annotations

import argparse
import importlib
import re
import shlex
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from omegaconf import OmegaConf

from fa_stereo.cli.demo import main as demo
from fa_stereo.cli.demo import measure, read_demo_pair
from fa_stereo.cli.hydra_entry import find_conf_dir
from fa_stereo.cli.main import COMMANDS
from fa_stereo.cli.train import _expand_alias
from fa_stereo.config import EvaluateConfig, ModelConfig, RenderConfig, TrainConfig, from_plain
from fa_stereo.data.formats import write_picture
from fa_stereo.data.rendered import render_pair
from fa_stereo.inference import load_predictor
from fa_stereo.models.checkpoint import save_weights
from fa_stereo.models.psmnet import build_model
from fa_stereo.sgbm import match_semi_global

REPOSITORY = Path(__file__).resolve().parent.parent
README = (REPOSITORY / "README.md").read_text(encoding="utf-8")
DOCUMENTS = [REPOSITORY / name for name in ("README.md", "data/README.md", "fa_stereo/weights/README.md")]
PYTHON = re.findall(r"^```python\n(.*?)^```", README, re.M | re.S)


def commands() -> list[tuple[str, ...]]:
    """Return every command line that begins with fa-stereo, in blocks, in running text, and at the head of a recipe."""
    lines = []
    for document in DOCUMENTS:
        text = document.read_text(encoding="utf-8")
        blocks = "\n".join(
            block for kind, block in re.findall(r"^```(\w*)\n(.*?)^```", text, re.M | re.S) if kind != "python"
        )
        lines += blocks.replace("\\\n", " ").splitlines()
        prose = re.sub(r"^```.*?^```", "", text, flags=re.M | re.S)
        lines += [" ".join(code.split()) for code in re.findall(r"`(fa-stereo [^`]+)`", prose)]
    for recipe in sorted(REPOSITORY.glob("conf/experiment/*.yaml")):
        comments = "\n".join(re.findall(r"^# *(.*)$", recipe.read_text(encoding="utf-8"), re.M))
        lines += comments.replace("\\\n", " ").splitlines()
    split = [shlex.split(line, comments=True)[1:] for line in lines if line.startswith("fa-stereo ")]
    return list(dict.fromkeys(map(tuple, split)))


def test_there_are_commands_and_snippets_to_test() -> None:
    assert len(commands()) > 50
    for known in (("train", "experiment=quick"), ("evaluate", "compare", "RUN_A", "RUN_B")):  # beyond a python block
        assert known in commands()
    assert len(PYTHON) == 2


class _Parsed(Exception):
    """The command line was understood."""


@pytest.mark.parametrize("command", commands(), ids=" ".join)
def test_commands_are_understood(command: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    name, *arguments = command
    assert name in COMMANDS
    if not arguments or {"-m", "--help", "..."} & set(arguments):
        return
    if name not in ("train", "evaluate") or "compare" in arguments:
        parse = argparse.ArgumentParser.parse_args

        def only_parse(parser: argparse.ArgumentParser, *given: Any) -> None:
            parse(parser, *given)
            raise _Parsed

        monkeypatch.setattr(argparse.ArgumentParser, "parse_args", only_parse)
        with pytest.raises(_Parsed):
            importlib.import_module(COMMANDS[name][0]).main(arguments)
        return
    schema = TrainConfig if name == "train" else EvaluateConfig
    ConfigStore.instance().store(name=f"{name}_schema", node=schema)
    OmegaConf.register_new_resolver("started", lambda pattern: "now", replace=True)
    with initialize_config_dir(str(find_conf_dir()), version_base="1.3"):
        composed = compose(name, [_expand_alias(argument) for argument in arguments])
    plain: Any = OmegaConf.to_container(composed, resolve=True)
    from_plain(schema, plain)


def test_the_python_of_prediction_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    save_weights(build_model(ModelConfig(base_channels=4, max_disparity=32)), "weights.safetensors")
    left, right = np.random.default_rng(0).integers(0, 256, (2, 48, 64, 3), dtype=np.uint8)
    write_picture(Path("left.png"), left)
    write_picture(Path("right.png"), right)
    names: dict[str, Any] = {}
    exec(PYTHON[0], names)
    np.testing.assert_array_equal(names["right"], right)
    assert names["disparity"].shape == (48, 64)
    assert names["disparity"].dtype == np.float32
    assert names["model"].config.base_channels == 16


def test_the_python_of_attention_elsewhere_runs() -> None:
    pytest.importorskip("torchvision")
    names: dict[str, Any] = {}
    exec(PYTHON[1], names)
    assert names["model"].backbone.body.layer3.attention is not None
    with torch.no_grad():
        assert len(names["model"].eval()(torch.rand(1, 3, 64, 96))) == 1


def test_the_demo_pair_is_what_the_stated_command_renders() -> None:
    stated = re.search(
        r"fa-stereo render pair --samples 1 --height (\d+) --width (\d+) --seed (\d+) --option min_shapes=(\d+)",
        " ".join(README.split()),
    )
    assert stated is not None
    height, width, seed, shapes = map(int, stated.groups())
    rendered = render_pair(RenderConfig(height=height, width=width, samples=1, seed=seed, min_shapes=shapes), 0)
    bundled = read_demo_pair()
    assert bundled.disparity is not None
    assert rendered.disparity is not None
    # Another processor may round the last bit otherwise, and thereby move a pixel at an edge.
    assert np.mean(np.abs(rendered.disparity - bundled.disparity) > 1e-3) < 1e-3
    for view in ("left", "right"):
        difference = np.abs(getattr(rendered, view).astype(int) - getattr(bundled, view))
        assert np.mean(difference > 1) < 1e-3, view


def test_the_demo_row_is_measured() -> None:
    row = next(line for line in README.splitlines() if line.startswith("| the bundled rendered pair"))
    stated = [float(figure) for figure in re.findall(r"([\d.]+) (?:px|%)", row)]
    pair = read_demo_pair()
    found = [
        *(load_predictor(name, "cpu", "fp32")(pair.left, pair.right).disparity for name in ("small", "full")),
        match_semi_global(pair.left, pair.right),
    ]
    for disparity, place in zip(found, (0, 2, 4), strict=True):
        error, _, bad_3 = measure(disparity, pair)
        assert stated[place] == pytest.approx(error, abs=0.011)
        assert stated[place + 1] == pytest.approx(bad_3, abs=0.11)


def test_the_demo_picture_is_what_the_demo_draws(tmp_path: Path) -> None:
    assert demo(["--device", "cpu", "--precision", "fp32", "-o", str(tmp_path)]) == 0
    drawn = cv2.imread(str(tmp_path / "side_by_side.png"))
    shown = cv2.imread(str(REPOSITORY / "data" / "pictures" / "demo.jpg"))
    assert drawn is not None
    assert shown is not None
    difference = np.abs(cv2.resize(drawn, shown.shape[1::-1], interpolation=cv2.INTER_AREA).astype(int) - shown)
    height, width = shown.shape[:2]
    prediction_and_error = difference[: height * 9 // 20, width // 2 :]
    # JPEG moves it by 3.6 in the mean, another processor's rounding by less; the weights before these by 17.
    assert prediction_and_error.mean() < 7
