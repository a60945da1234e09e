"""Original PSMNet checkpoints: imported, they give the original network's disparity."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import official_psmnet
import pytest
import torch

from fa_stereo.cli.main import main
from fa_stereo.errors import InputError
from fa_stereo.models.checkpoint import import_official_weights, load_model


def save_official(path: Path, state: dict, *, prefix: str) -> Path:
    content = {"epoch": 9, "train_loss": 0.5, "state_dict": {prefix + key: value for key, value in state.items()}}
    torch.save(content, path)
    return path


@pytest.mark.parametrize(
    ("stacked", "align_corners", "prefix"), [(True, True, "module."), (True, False, ""), (False, False, "module.")]
)
def test_imported_network_is_the_original(tmp_path: Path, stacked: bool, align_corners: bool, prefix: str) -> None:
    state = official_psmnet.random_state(stacked, channels=8)
    model = import_official_weights(
        save_official(tmp_path / "official.tar", state, prefix=prefix), align_corners=align_corners, max_disparity=48
    ).double()
    state = {key: value.double() for key, value in state.items()}
    left, right = torch.randn(2, 1, 3, 256, 272, dtype=torch.float64)
    with torch.inference_mode():
        expected = official_psmnet.forward(state, left, right, align_corners, max_disparity=48)
        torch.testing.assert_close(model(left, right), expected, atol=1e-7, rtol=0)
    assert model.config.aggregation == ("stacked_hourglass" if stacked else "basic")
    assert expected.std() > 0.01  # a constant would prove nothing


def test_command_converts_full_network_on_a_real_pair(tmp_path: Path, shared_data: Path) -> None:
    from PIL import Image
    from torchvision.transforms.functional import normalize, to_tensor

    state = official_psmnet.random_state(stacked=True)
    tar = save_official(tmp_path / "pretrained_sceneflow.tar", state, prefix="module.")
    weights = tmp_path / "psmnet.safetensors"
    assert main(["import-weights", str(tar), "--align-corners", "true", "-o", str(weights)]) == 0
    model = load_model(weights)
    assert sum(parameter.numel() for parameter in model.parameters()) == 5_224_768

    folder = shared_data / "middlebury_v2" / "venus"
    views = []
    for name in ("imL.png", "imR.png"):
        view = to_tensor(Image.open(folder / name).convert("RGB").crop((60, 60, 60 + 320, 60 + 256)))
        views.append(normalize(view, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225])[None])
    with torch.inference_mode():
        expected = official_psmnet.forward(state, *views, align_corners=True)
        assert (model(*views) - expected).abs().max() < 1e-3


def test_foreign_file_is_refused(tmp_path: Path) -> None:
    torch.save({"state_dict": {"conv.weight": torch.zeros(1)}}, tmp_path / "other.tar")
    with pytest.raises(InputError, match=r"other\.tar: not an original PSMNet checkpoint"):
        import_official_weights(tmp_path / "other.tar", align_corners=False)


def test_altered_network_is_refused(tmp_path: Path) -> None:
    state = official_psmnet.random_state(stacked=True, channels=8)
    del state["dres3.conv2.0.weight"]
    with pytest.raises(InputError, match=r"1 tensors do not fit PSMNet.*hourglasses\.1\.conv2\.conv\.weight"):
        import_official_weights(save_official(tmp_path / "cut.tar", state, prefix=""), align_corners=False)


def test_original_file_needs_import_first(tmp_path: Path) -> None:
    tar = save_official(tmp_path / "psmnet.tar", official_psmnet.random_state(True, channels=8), prefix="module.")
    with pytest.raises(InputError, match="import-weights"):
        load_model(tar)


def test_the_script_measures_the_original_beside_ours(repository: Path) -> None:
    command = [sys.executable, repository / "scripts" / "compare_with_original.py", "--size", "256x256"]
    options = ["--channels", "4", "--repeats", "1"]
    done = subprocess.run([*command, *options], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in done.stdout.splitlines()[-3:]]
    assert [row[0] for row in rows] == ["original", "plain", "fast"]
    for row in rows:
        assert float(row[1].removesuffix(" s")) > 0
        assert float(row[3].removesuffix(" px")) < 5e-3
