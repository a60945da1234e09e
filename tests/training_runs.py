"""What the tests of training share: a folder of tiny pairs, and a run short enough to be made many times."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fa_stereo.config import TrainConfig, from_plain
from fa_stereo.data.formats import write_pfm, write_picture

REPOSITORY = Path(__file__).resolve().parent.parent


def write_pairs(root: Path, count: int = 6, height: int = 48, width: int = 80) -> Path:
    """Write random pictures seen at one disparity each, with some pixels unknown, as people's own pairs."""
    rng = np.random.default_rng(7)
    for index in range(count):
        disparity = 2 + index % 5
        scene = rng.integers(0, 256, (height, width + disparity, 3), dtype=np.uint8)
        truth = np.full((height, width), disparity, np.float32)
        truth[: 4 + 6 * index, : width // 2] = np.inf  # as unequal between pairs as real data are
        for folder in ("left", "right", "disparity"):
            (root / folder).mkdir(parents=True, exist_ok=True)
        write_picture(root / "left" / f"{index:03}.png", scene[:, :width])
        write_picture(root / "right" / f"{index:03}.png", scene[:, disparity:])
        write_pfm(root / "disparity" / f"{index:03}.pfm", truth)
    return root


def tiny_overrides(pairs: Path, output_dir: Path) -> dict[str, Any]:
    """Return the keys of a run that takes a second: 4 channels, 16 disparities, 32x64 crops."""
    return {
        "model.base_channels": 4,
        "model.max_disparity": 16,
        "model.attention.key_channels": 4,
        "data.train.kind": "pairs",
        "data.train.root": str(pairs),
        "data.augmentation.crop_height": 32,
        "data.augmentation.crop_width": 64,
        "data.augmentation.color": 1.0,
        "data.workers": 0,
        "trainer.epochs": 4,
        "trainer.batch_size": 4,
        "trainer.device": "cpu",
        "output_dir": str(output_dir),
    }


def tiny_config(pairs: Path, output_dir: Path, **changes: Any) -> TrainConfig:
    """Return that run as a configuration; ``changes`` have ``__`` for the dots of a key."""
    nested: dict[str, Any] = {}
    overrides = tiny_overrides(pairs, output_dir) | {key.replace("__", "."): value for key, value in changes.items()}
    for key, value in overrides.items():
        *groups, name = key.split(".")
        place = nested
        for group in groups:
            place = place.setdefault(group, {})
        place[name] = value
    return from_plain(TrainConfig, nested)


def command_line(pairs: Path, output_dir: Path, *more: str) -> list[str]:
    """Return that run as the arguments of ``fa-stereo train``; validation on the same pairs."""
    overrides = {"data": "pairs"} | tiny_overrides(pairs, output_dir)
    overrides["data.validation.root"] = str(pairs)
    return [*(f"{key}={value}" for key, value in overrides.items()), *more]


def environment(**more: str) -> dict[str, str]:
    """Return the environment of a subprocess: one thread, this repository's package."""
    path = os.pathsep.join(filter(None, [str(REPOSITORY), os.environ.get("PYTHONPATH")]))
    return os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path} | more


def start(arguments: list[str], **more: str) -> subprocess.Popen[str]:
    """Start ``fa-stereo train`` as a process of its own."""
    command = [sys.executable, "-m", "fa_stereo.cli.main", "train", *arguments]
    return subprocess.Popen(
        command, env=environment(**more), text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )


def assert_same_state(one: Path, other: Path) -> None:
    """Assert that two checkpoints hold the same training state to the last bit."""
    first, second = (torch.load(path, weights_only=True) for path in (one, other))
    for part in ("model", "ema", "optimizer", "step", "best", "alarm", "random_states"):
        assert_identical(first[part], second[part], part)


def assert_identical(one: Any, other: Any, where: str) -> None:
    """Assert that nested containers of tensors and plain values are equal to the last bit."""
    assert type(one) is type(other), where
    if isinstance(one, dict):
        assert one.keys() == other.keys(), where
        for key in one:
            assert_identical(one[key], other[key], f"{where}.{key}")
    elif isinstance(one, (list, tuple)):
        assert len(one) == len(other), where
        for index, (a, b) in enumerate(zip(one, other, strict=True)):
            assert_identical(a, b, f"{where}[{index}]")
    elif isinstance(one, torch.Tensor):
        assert torch.equal(one, other), where
    else:
        assert one == other, where
