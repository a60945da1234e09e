"""The wheel: built, installed elsewhere, and used there, with conf/, weights and the demo pair inside."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory, repository: Path) -> Path:
    """A folder with the installed wheel and nothing else of this project."""
    folder = tmp_path_factory.mktemp("wheel")
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder), str(repository)]
    subprocess.run(build, check=True, capture_output=True)
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder / "site")
    return folder / "site"


def run(installed: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    # -P and another working folder: the repository must not be found by accident.
    command = [sys.executable, "-P", "-m", "fa_stereo.cli.main", *arguments]
    environment = os.environ | {"PYTHONPATH": str(installed)}
    return subprocess.run(command, cwd=installed.parent, env=environment, capture_output=True, text=True)


def test_wheel_holds_configurations_and_data(installed: Path) -> None:
    for name in (
        "conf/train.yaml",
        "weights/small.safetensors",
        "demo_pair/left.png",
        "attention_page.html",
        "py.typed",
    ):
        assert (installed / "fa_stereo" / name).is_file(), name
    top_level = sorted(path.name for path in installed.iterdir())
    assert top_level[0] == "fa_stereo"
    assert top_level[1].endswith(".dist-info")
    assert len(top_level) == 2


def test_installed_command_composes_a_configuration(installed: Path) -> None:
    result = run(installed, "train", "experiment=fa_psmnet_scene_flow", "--cfg", "job")
    assert result.returncode == 0, result.stderr
    assert "batch_size: 24" in result.stdout


def test_installed_demo(installed: Path, tmp_path: Path) -> None:
    result = run(installed, "demo", "-o", str(tmp_path / "demo"))
    assert result.returncode == 0, result.stderr
    assert "SGBM" in result.stdout
    assert list((tmp_path / "demo").glob("*.png"))
