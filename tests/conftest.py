"""Shared fixtures."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
import torch

from fa_stereo.config import ModelConfig
from fa_stereo.models.checkpoint import save_weights
from fa_stereo.models.psmnet import build_model

REPOSITORY = Path(__file__).resolve().parent.parent


def pytest_configure() -> None:
    """Let Ctrl-C arrive: a shell that starts a command in the background has it ignored, children included."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def repository() -> Path:
    return REPOSITORY


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Real stereo pairs for development: beside the repository, or where FA_STEREO_TEST_DATA says."""
    folder = Path(os.environ.get("FA_STEREO_TEST_DATA", REPOSITORY.parent / "shared" / "data"))
    if not (folder / "scene_flow").is_dir():
        pytest.skip(f"no real stereo pairs at {folder} (set FA_STEREO_TEST_DATA to their folder)")
    return folder


GPU = [pytest.param("cuda", marks=pytest.mark.gpu)] if torch.cuda.is_available() else []


@pytest.fixture(params=["cpu", *GPU])
def device(request: pytest.FixtureRequest) -> str:
    """Each kind of device that is there."""
    return str(request.param)


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights of a network of 8 channels and 32 disparities that has learnt nothing."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("weights") / "tiny.safetensors"
    save_weights(build_model(ModelConfig(base_channels=8, max_disparity=32)), path)
    return path


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)
