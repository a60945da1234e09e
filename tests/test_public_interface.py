"""``import fa_stereo``: what it offers, and what it leaves alone until it is needed."""

from __future__ import annotations

import importlib
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import fa_stereo

PUBLIC_NAMES = {
    "AttentionConfig",
    "DisparityPredictor",
    "InputError",
    "ModelConfig",
    "Prediction",
    "build_model",
    "list_weights",
    "load_model",
    "load_predictor",
    "read_picture_pair",
}


def modules_after(statement: str) -> set[str]:
    """Return the top-level names in sys.modules after running a statement in a fresh interpreter."""
    code = f"{statement}\nimport sys\nprint(*{{name.partition('.')[0] for name in sys.modules}})"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(result.stdout.split())


def test_everything_promised_is_there_under_its_own_name() -> None:
    assert set(fa_stereo.__all__) == PUBLIC_NAMES | {"__version__"}
    for name in PUBLIC_NAMES:
        member = getattr(fa_stereo, name)
        assert member.__name__ == name
        assert getattr(importlib.import_module(member.__module__), name) is member
        assert member.__doc__
    assert set(dir(fa_stereo)) >= PUBLIC_NAMES


def test_an_unknown_name_is_an_ordinary_attribute_error() -> None:
    with pytest.raises(AttributeError, match="'fa_stereo' has no attribute 'load_predicter'"):
        _ = fa_stereo.load_predicter  # type: ignore[attr-defined]
    assert not hasattr(fa_stereo, "anything_else")


def test_importing_is_light() -> None:
    assert not modules_after("import fa_stereo") & {"torch", "numpy", "cv2", "hydra", "matplotlib", "tensorboard"}


def test_the_library_needs_no_command_line_packages() -> None:
    everything = "; ".join(f"fa_stereo.{name}" for name in sorted(PUBLIC_NAMES))
    loaded = modules_after(f"import fa_stereo; {everything}; import fa_stereo.visualization, fa_stereo.rectification")
    assert "torch" in loaded
    assert not loaded & {"hydra", "omegaconf", "matplotlib", "tensorboard", "torchvision"}


def test_loading_weights_does_not_load_a_compiler() -> None:
    axial = "ModelConfig(base_channels=4, max_disparity=16, attention=AttentionConfig('axial', key_channels=4))"
    code = f"""
import sys, torch
before = set(sys.modules)
from fa_stereo import AttentionConfig, ModelConfig, build_model, load_model
load_model("small")
with torch.device("meta"):
    build_model({axial})
print(*sorted(set(sys.modules) - before))
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = set(result.stdout.split())
    assert "fa_stereo.models.psmnet" in loaded
    assert not loaded & {"torch._dynamo", "sympy"}


def test_the_version_is_the_projects(repository: Path) -> None:
    assert f'version = "{fa_stereo.__version__}"\n' in (repository / "pyproject.toml").read_text()


def test_from_configuration_to_prediction(tmp_path: Path) -> None:
    config = fa_stereo.ModelConfig(
        base_channels=8, max_disparity=32, attention=fa_stereo.AttentionConfig(key_channels=8)
    )
    model = fa_stereo.build_model(config).eval()
    with torch.no_grad():
        disparity = model(torch.zeros(2, 3, 33, 50), torch.zeros(2, 3, 33, 50))
    assert disparity.shape == (2, 33, 50)
    from fa_stereo.models.checkpoint import save_weights

    path = tmp_path / "mine.safetensors"
    save_weights(model, path)
    again = fa_stereo.load_model(path)
    assert again.config == config
    assert not again.training
    picture = np.full((33, 50, 3), 100, np.uint8)
    result = fa_stereo.load_predictor(path, device="cpu")(picture, picture)
    assert isinstance(result, fa_stereo.Prediction)
    assert result.disparity.dtype == np.float32
    assert result.disparity.shape == (33, 50)


def test_bundled_weights_load_and_predict() -> None:
    names = fa_stereo.list_weights()
    assert set(names) <= {"small", "full"}
    if not names:
        pytest.skip("no weights are bundled yet")
    rng = np.random.default_rng(0)
    wide = rng.integers(0, 256, (64, 140, 3), dtype=np.uint8)
    for name in names:
        predictor = fa_stereo.load_predictor(name, device="cpu")
        disparity = predictor(wide[:, :128], wide[:, 10:138]).disparity
        assert np.median(disparity[:, 24:]) == pytest.approx(10, abs=1)
        assert fa_stereo.load_model(name).config == predictor.model.config


def test_errors_of_input_are_value_errors() -> None:
    assert issubclass(fa_stereo.InputError, ValueError)
    with pytest.raises(ValueError, match="base_channels"):
        fa_stereo.ModelConfig(base_channels=7)
