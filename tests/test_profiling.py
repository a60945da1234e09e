"""Measurements of variants in processes of their own."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fa_stereo import cuda_graph, profiling
from fa_stereo.config import ModelConfig, RenderConfig
from fa_stereo.cuda_graph import Passes
from fa_stereo.data.rendered import RenderedPairs
from fa_stereo.errors import InputError
from fa_stereo.machine import describe_machine
from fa_stereo.models.checkpoint import save_weights
from fa_stereo.models.psmnet import PSMNet, build_model
from fa_stereo.profiling import PARTS, Task, build_run, compare, example_pair, measure

SMALL = {"height": 32, "width": 64, "base_channels": 8, "max_disparity": 32, "threads": 1}


@pytest.mark.parametrize("part", [part for part in PARTS if part != "training_step"])
def test_both_paths_measure_the_same_function(part: str, tmp_path: Path) -> None:
    pictures = ()
    if part == "pairs":
        pair = RenderedPairs(RenderConfig(height=32, width=64, samples=1, max_disparity=20))[0]
        files = [str(tmp_path / name) for name in ("left.png", "right.png")]
        for file, view in zip(files, (pair.left, pair.right), strict=True):
            Image.fromarray(view).save(file)
        pictures = (tuple(files),)
    plain, fast = (build_run(Task(part, path, pictures=pictures, **SMALL))() for path in ("plain", "fast"))
    assert plain is not None
    assert fast is not None
    scale = 1 if part in ("network", "pairs", "regression") else plain.abs().max().item()
    torch.testing.assert_close(fast / scale, plain / scale, atol=2e-3 if scale == 1 else 1e-5, rtol=0)


@pytest.mark.parametrize("part", ["aggregation", "network"])
def test_every_repetition_computes_the_same(part: str) -> None:
    run = build_run(Task(part, "fast", **SMALL))
    first, second = run(), run()
    assert first is not None
    assert torch.equal(first, second)


@pytest.mark.parametrize("path", ["plain", "fast"])
def test_the_training_step_leaves_gradients(path: str) -> None:
    run = build_run(Task("training_step", path, activation_checkpointing=path == "fast", **SMALL))
    assert run() is None


def test_the_training_step_as_a_graph_is_recorded_before_it_is_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A graph needs a GPU; here the passes are replayed by calling them."""
    recorded, models = [], []

    def record(passes: Passes, inputs: tuple[torch.Tensor, ...]) -> Passes:
        recorded.append([tuple(x.shape) for x in inputs])
        return passes

    def build(task: Task) -> PSMNet:
        models.append(build_model_of(task))
        return models[-1]

    build_model_of = profiling._build_model
    monkeypatch.setattr(profiling, "_build_model", build)
    monkeypatch.setattr(cuda_graph, "record_passes", record)
    gradients = []
    for path in ("fast", "graph"):
        run = build_run(Task("training_step", path, **SMALL))
        assert len(recorded) == (path == "graph")
        for _ in range(2):  # each from zero
            run()
        gradients.append([parameter.grad.clone() for parameter in models[-1].parameters()])
    assert recorded == [2 * [(1, 3, SMALL["height"], SMALL["width"])]]
    for found, expected in zip(gradients[1], gradients[0], strict=True):
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("frozen", [False, True])
def test_the_training_step_freezes_batch_norm(frozen: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    modes: list[bool] = []
    forward = torch.nn.BatchNorm3d.forward
    monkeypatch.setattr(torch.nn.BatchNorm3d, "forward", lambda m, x: modes.append(m.training) or forward(m, x))
    build_run(Task("training_step", "fast", freeze_batch_norm=frozen, **SMALL))()
    assert set(modes) == {not frozen}


def test_interleaved_processes() -> None:
    turns: list[int] = []
    tasks = [Task("network", path, precision, **SMALL) for path, precision in (("plain", "fp32"), ("fast", "bf16"))]
    measurements = measure(tasks, repeats=2, progress=lambda: turns.append(1))
    assert len(turns) == 2 * (2 + 1)  # one to warm up
    for measurement in measurements:
        assert len(measurement.seconds) == 2
        assert min(measurement.seconds) > 0
        assert measurement.peak_bytes > 10**8
        assert 0 <= measurement.extra_bytes < measurement.peak_bytes
        assert measurement.result is not None
        assert measurement.result.shape == (1, 32, 64)
        assert measurement.result.dtype == np.float32
    rows = compare(measurements, relative=False)
    assert rows[0]["speedup"] == 1
    assert rows[0]["largest_deviation"] == 0
    assert rows[1]["largest_deviation"] > 0
    json.dumps(rows)


def test_weights_and_environment(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_weights(build_model(ModelConfig(base_channels=4, max_disparity=16)), tmp_path / "w.safetensors")
    task = Task("regression", "fast", height=16, width=32, weights=str(tmp_path / "w.safetensors"))
    (measurement,) = measure([task], repeats=1, environment={"OMP_NUM_THREADS": "1"})
    assert measurement.result is not None
    assert measurement.result.max() < 16


def test_a_file_called_like_bundled_weights(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("small").write_bytes(checkpoint.read_bytes())
    features = build_run(Task("features", "plain", height=32, width=64, weights="small"))()
    assert features is not None
    assert features.shape == (2, 8, 8, 16)  # its 8 channels, not the 16 of those bundled


def test_a_failing_process_says_why(tmp_path) -> None:
    with pytest.raises(InputError, match=r"measuring network \(fast, fp32\) failed: .*no such checkpoint file"):
        measure([Task("network", "fast", weights=str(tmp_path / "none.safetensors"), **SMALL)], repeats=1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"part": "everything"}, "part must be one of"),
        ({"path": "slow"}, "path must be one of"),
        ({"precision": "int8"}, "precision must be one of"),
        ({"precision": "fp64"}, "fp64 is for the plain path's inference"),
        ({"height": 40}, "height must be a positive multiple of 16, got 40"),
        ({"width": 0}, "width must be a positive multiple of 16"),
    ],
)
def test_unusable_tasks(changes: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        Task(**{"part": "network", "path": "fast", **SMALL, **changes})


def test_example_pair_and_machine() -> None:
    left, right = example_pair(32, 64, 2)
    assert left.shape == right.shape == (2, 3, 32, 64)
    assert torch.equal(left, example_pair(32, 64, 2)[0])
    assert not torch.equal(left, right)
    machine = describe_machine()
    assert machine["torch"] == torch.__version__
    assert machine["cpu"]
