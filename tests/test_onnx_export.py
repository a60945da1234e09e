"""Networks as ONNX files: ONNX Runtime computes what PyTorch computes."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from fa_stereo.cli.main import main
from fa_stereo.config import AttentionConfig, ModelConfig, to_plain
from fa_stereo.data.transforms import normalize_images
from fa_stereo.errors import InputError
from fa_stereo.models.cost_volume import build_cost_volume, gather_cost_volume
from fa_stereo.models.psmnet import build_model
from fa_stereo.onnx_export import export_onnx, run_onnx

pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")


@pytest.mark.parametrize(("width", "disparities"), [(9, 4), (5, 8), (4, 4), (1, 2)])
def test_the_volume_by_indices(width: int, disparities: int) -> None:
    left, right = torch.randn(2, 2, 3, 5, width)
    assert torch.equal(gather_cost_volume(left, right, disparities), build_cost_volume(left, right, disparities))


@pytest.mark.parametrize(
    ("kind", "aggregation", "align_corners", "regression", "size", "batch"),
    [
        ("factorized", "stacked_hourglass", False, "modal", (50, 70), 1),
        ("non_local", "basic", True, "expectation", (32, 64), 2),
        ("axial", "basic", False, "expectation", (48, 32), 1),
        ("none", "basic", False, "modal", (16, 16), 1),
        ("factorized", "basic", False, "modal", (20, 24), 1),  # at two sizes
    ],
)
def test_onnx_runtime_computes_the_same(
    kind: str, aggregation: str, align_corners: bool, regression: str, size: tuple[int, int], batch: int
) -> None:
    torch.manual_seed(0)
    config = ModelConfig(
        base_channels=4, max_disparity=32, align_corners=align_corners, aggregation=aggregation, regression=regression,
        attention=AttentionConfig(kind=kind, key_channels=8, heads=2 if kind == "factorized" else 1),
        padding="replicate", halve_from_px=2000, enlarge_below_px=500,
    )  # fmt: skip
    model = build_model(config).eval()
    with torch.no_grad():  # neither the identity nor all disparities alike
        for name, parameter in model.named_parameters():
            if "attention" in name:
                parameter.normal_(std=0.3)
        for module in model.modules():
            if isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
                module.running_mean.normal_(std=0.1)
                module.running_var.uniform_(0.5, 1.5)
    left, right = np.random.default_rng(0).integers(0, 256, (2, batch, *size, 3), dtype=np.uint8)
    views = [normalize_images(torch.from_numpy(view).permute(0, 3, 1, 2)) for view in (left, right)]
    with torch.no_grad():
        expected = model(*views).numpy()
    content = export_onnx(model, *size, batch=batch)
    disparity = run_onnx(content, left, right)
    assert disparity.shape == (batch, *size)
    np.testing.assert_allclose(disparity, expected, atol=1e-3)
    assert expected.std() > 0.1

    import onnx

    file = onnx.load_from_string(content)
    onnx.checker.check_model(file)
    assert [entry.name for entry in file.graph.input] == ["left", "right"]
    assert [entry.name for entry in file.graph.output] == ["disparity"]
    assert {entry.key: json.loads(entry.value) for entry in file.metadata_props} == {"fa_stereo": to_plain(config)}
    assert not model.plain  # the network given is left alone
    assert b"stack_trace" not in content  # where the exporter's source code lies
    assert str(Path.cwd()).encode() not in content
    with pytest.raises(InputError, match="ONNX Runtime cannot run the network"):
        run_onnx(content, left[:, :-1], right[:, :-1])


def test_the_command(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "new" / "net.onnx"
    options = ["--checkpoint", str(checkpoint), "--height", "40", "--width", "72", "--max-disparity", "48",
               "--batch", "3"]  # fmt: skip
    assert main(["export-onnx", "-o", str(out), *options]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith(f"{out}: ")
    assert "on the bundled pair at 72x40" in printed
    assert [path.name for path in out.parent.iterdir()] == ["net.onnx"]
    assert run_onnx(out.read_bytes(), *np.zeros((2, 3, 40, 72, 3), np.uint8)).shape == (3, 40, 72)


def test_packages_that_do_not_fit_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise ModuleNotFoundError("No module named 'onnxscript._framework_apis.torch_9_9'")

    monkeypatch.setattr(torch.onnx, "export", fail)
    with pytest.raises(InputError, match=r"torch_9_9.* pip install --upgrade '\.\[onnx\]'"):
        export_onnx(build_model(ModelConfig(base_channels=4, max_disparity=16)), 16, 16)


def test_a_file_that_computes_something_else_is_not_written(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fa_stereo.onnx_export.export_onnx", lambda *_: b"")
    monkeypatch.setattr("fa_stereo.onnx_export.run_onnx", lambda *_: np.full((1, 16, 32), np.nan, np.float32))
    options = ["--checkpoint", str(checkpoint), "--height", "16", "--width", "32"]
    assert main(["export-onnx", "-o", str(tmp_path / "net.onnx"), *options]) == 2
    assert "not written, as what ONNX Runtime computes with it is nan px from PyTorch" in capsys.readouterr().err
    assert not list(tmp_path.glob("*.onnx"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["-o", "net.pt", "--height", "32", "--width", "32"], "-o net.pt: name a file *.onnx"),
        (["-o", "net.onnx", "--height", "8", "--width", "32"], "pictures must be at least 16x16 pixels, got 32x8"),
        (["-o", "net.onnx", "--height", "32", "--width", "32", "--batch", "0"], "the batch must be positive, got 0"),
        (["-o", "net.onnx", "--height", "32", "--width", "32", "--max-disparity", "50"], "max_disparity"),
        (["-o", "net.onnx", "--height", "32", "--width", "32", "--weights", "none"], "none: neither a checkpoint"),
    ],
)
def test_unusable_options(
    options: list[str],
    message: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["export-onnx", *options]) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("package", ["onnx", "onnxscript", "onnxruntime"])
def test_missing_packages_are_named(
    package: str, checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    options = ["--checkpoint", str(checkpoint), "--height", "16", "--width", "32"]
    assert main(["export-onnx", "-o", str(tmp_path / "net.onnx"), *options]) == 2
    assert f"this needs the package {package}: pip install '.[onnx]'" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
