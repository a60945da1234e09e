"""The training loop on a run of seconds: every promise of the trainer but resuming, which has its own file."""

from __future__ import annotations

import copy
import errno
import json
import logging
import math
import multiprocessing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn
from training_runs import assert_identical, tiny_config, write_pairs

import fa_stereo.cuda_graph
import fa_stereo.models.optimized
import fa_stereo.training
from fa_stereo.config import DatasetConfig, ModelConfig, OptimizerConfig, ProtocolConfig
from fa_stereo.cuda_graph import Passes
from fa_stereo.data.formats import write_pfm
from fa_stereo.errors import InputError
from fa_stereo.evaluation import evaluate
from fa_stereo.machine import compute_float32_in_full
from fa_stereo.models import layers
from fa_stereo.models.checkpoint import load_model, read_record, read_torch_file, save_weights
from fa_stereo.models.psmnet import build_model
from fa_stereo.training import Trainer, TrainingError, build_optimizer
from fa_stereo.weight_average import WeightAverage
from tests.gpu import needs_gpu


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pairs(tmp_path_factory.mktemp("training") / "pairs")


def first_batch(trainer: Trainer) -> dict[str, Any]:
    return next(trainer._batches())


def gradients(trainer: Trainer) -> dict[str, torch.Tensor]:
    """Make one step of plain gradient descent with rate 1 and return how far the weights moved."""
    trainer.model.double()  # untrained and without batch norm, single precision would show little but rounding
    before = copy.deepcopy(trainer.model.state_dict())
    trainer.optimizer = build_optimizer(OptimizerConfig("sgd", learning_rate=1.0, momentum=0.0), trainer.model)
    trainer._train_mode()
    trainer.train_step(first_batch(trainer))
    return {name: before[name] - value for name, value in trainer.model.state_dict().items()}


# --------------------------------------------------------------------------------------------------------------------
# the update


@pytest.mark.parametrize("cross_entropy_weight", [0.0, 0.5])
@pytest.mark.parametrize("size", [1, 2, 3])
def test_accumulated_gradients_are_those_of_the_whole_batch(
    pairs: Path, tmp_path: Path, size: int, cross_entropy_weight: float
) -> None:
    common = {
        "trainer__freeze_batch_norm": True,  # the one thing that sees the micro-batch
        "loss__cross_entropy_weight": cross_entropy_weight,
        "optimizer__learning_rate": 1.0,
    }
    whole = gradients(Trainer(tiny_config(pairs, tmp_path, **common)))
    parts = gradients(Trainer(tiny_config(pairs, tmp_path, trainer__micro_batch_size=size, **common)))
    assert max(float(gradient.abs().max()) for gradient in whole.values()) > 1e-3
    for name, gradient in whole.items():
        torch.testing.assert_close(parts[name], gradient, rtol=1e-3, atol=1e-5 * float(gradient.abs().max()) + 1e-7)


def test_a_batch_without_ground_truth_changes_no_weight(pairs: Path, tmp_path: Path) -> None:
    trainer = Trainer(tiny_config(pairs, tmp_path))
    batch = first_batch(trainer)
    batch["disparity"] = torch.full_like(batch["disparity"], torch.inf)
    before = copy.deepcopy(dict(trainer.model.named_parameters()))
    trainer._train_mode()
    values = trainer.train_step(batch)
    assert values["loss/total"] == values["train/gradient_norm"] == 0
    assert math.isnan(values["train/end_point_error"])  # as measured nowhere
    assert_identical(
        {k: v.data for k, v in before.items()}, {k: v.data for k, v in trainer.model.named_parameters()}, ""
    )


def test_clipping_bounds_the_gradient_and_reports_it_unclipped(pairs: Path, tmp_path: Path) -> None:
    free = gradients(Trainer(tiny_config(pairs, tmp_path, optimizer__learning_rate=1.0)))
    clipped = gradients(
        Trainer(tiny_config(pairs, tmp_path, optimizer__learning_rate=1.0, trainer__gradient_clip_norm=0.5))
    )
    names = [name for name in free if not name.endswith(("running_mean", "running_var", "num_batches_tracked"))]
    free_norm, clipped_norm = (torch.stack([g[name].norm() for name in names]).norm() for g in (free, clipped))
    assert float(free_norm) > 1
    assert float(clipped_norm) == pytest.approx(0.5, rel=1e-3)


def test_frozen_batch_norm_keeps_its_statistics(pairs: Path, tmp_path: Path) -> None:
    moved = gradients(Trainer(tiny_config(pairs, tmp_path, trainer__freeze_batch_norm=True)))
    assert all(float(moved[name].abs().max()) == 0 for name in moved if "running" in name)
    moved = gradients(Trainer(tiny_config(pairs, tmp_path)))
    assert all(float(moved[name].abs().max()) > 0 for name in moved if "running_mean" in name)


def test_activation_checkpointing_changes_no_gradient(pairs: Path, tmp_path: Path) -> None:
    plain = gradients(Trainer(tiny_config(pairs, tmp_path)))
    recomputed = gradients(Trainer(tiny_config(pairs, tmp_path, trainer__activation_checkpointing=True)))
    for name, gradient in plain.items():
        torch.testing.assert_close(recomputed[name].double(), gradient.double(), rtol=1e-3, atol=1e-6)


def test_the_optimizers_are_pytorchs() -> None:
    model = nn.Linear(2, 2)
    adam = build_optimizer(OptimizerConfig(), model)
    assert type(adam) is torch.optim.Adam
    assert adam.defaults["betas"] == (0.9, 0.999)
    adamw = build_optimizer(OptimizerConfig("adamw", weight_decay=0.1), model)
    assert type(adamw) is torch.optim.AdamW
    assert adamw.defaults["weight_decay"] == 0.1
    sgd = build_optimizer(OptimizerConfig("sgd", momentum=0.8), model)
    assert sgd.defaults["momentum"] == 0.8


def test_the_average_of_the_weights_by_hand() -> None:
    model = build_model(ModelConfig(base_channels=4, max_disparity=16))
    average = WeightAverage(model, decay=0.5)
    name = "features.projection.weight"
    expected = model.state_dict()[name].clone()
    for step, value in enumerate((1.0, 2.0, 5.0)):
        with torch.no_grad():
            model.features.projection.weight.fill_(value)
            model.features.fusion.norm.running_mean.fill_(value)
            model.features.fusion.norm.num_batches_tracked.fill_(step)
        average.update(model, step)
        decay = min(0.5, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * value
    averaged = average.model.state_dict()
    torch.testing.assert_close(averaged[name], expected)
    assert float(averaged["features.fusion.norm.running_mean"][0]) == pytest.approx(float(expected.mean()), rel=0.05)
    assert int(averaged["features.fusion.norm.num_batches_tracked"]) == 2
    assert not average.model.training


# --------------------------------------------------------------------------------------------------------------------
# a whole run


@pytest.fixture(scope="module")
def finished(pairs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole run with everything on."""
    output = tmp_path_factory.mktemp("finished")
    config = tiny_config(
        pairs, output, trainer__epochs=8, trainer__ema_decay=0.9, loss__cross_entropy_weight=0.3,
        trainer__log_every_steps=2, trainer__picture_every_steps=5, trainer__keep_every_steps=5,
        trainer__validate_every_steps=6, data__validation=DatasetConfig("pairs", str(pairs)),
    )  # fmt: skip
    result = Trainer(config).run()
    assert result.finished
    assert result.step == 12  # 8 epochs of 6 pairs in batches of 4
    return output


def test_a_run_leaves_its_files(finished: Path) -> None:
    names = {path.name for path in finished.iterdir() if not path.name.startswith("events")}
    assert names == {
        "last.pt", "best.pt", "step_0000005.pt", "step_0000010.pt", "weights.safetensors", "metrics.json",
        "history.jsonl", ".lock",
    }  # fmt: skip


def test_metrics_are_those_of_the_exported_weights(finished: Path, pairs: Path) -> None:
    metrics = json.loads((finished / "metrics.json").read_text())
    assert metrics["step"] == metrics["validated_step"] == 12
    assert metrics["best"]["end_point_error"] <= metrics["validation"]["end_point_error"]
    record = read_record(finished / "weights.safetensors")
    assert record["averaged"] is True
    assert record["validation"] == metrics["validation"]
    assert str(pairs) not in json.dumps(record)  # no folders of somebody's machine
    model = load_model(finished / "weights.safetensors")
    dataset = fa_stereo.training.open_dataset(DatasetConfig("pairs", str(pairs)))
    result = evaluate(model, dataset, ProtocolConfig(max_disparity=16.0, averaging="pixel"))
    assert result.metrics["end_point_error"] == pytest.approx(metrics["validation"]["end_point_error"], rel=1e-4)


def test_checkpoints_load_as_models_with_the_averaged_weights(finished: Path) -> None:
    with safe_open(finished / "weights.safetensors", framework="pt") as file:
        exported = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    assert_identical(dict(load_model(finished / "last.pt").state_dict()), exported, "last.pt")
    state = torch.load(finished / "last.pt", weights_only=True)
    assert not torch.equal(state["model"]["features.projection.weight"], exported["features.projection.weight"])


def test_tensorboard_has_curves_and_pictures(finished: Path) -> None:
    events = EventAccumulator(str(finished), size_guidance={"images": 0, "scalars": 0})
    events.Reload()
    curves = set(events.Tags()["scalars"])
    assert curves >= {
        "loss/total", "loss/output_1", "loss/output_2", "loss/output_3", "loss/cross_entropy", "train/end_point_error",
        "train/learning_rate", "train/gradient_norm", "speed/samples_per_second", "memory/gigabytes",
        "validation/end_point_error", "validation/bad_1", "validation/d1",
    }  # fmt: skip
    assert [event.step for event in events.Scalars("loss/total")] == [1, 2, 4, 6, 8, 10, 12]
    assert [event.step for event in events.Scalars("validation/end_point_error")] == [6, 12]
    total = events.Scalars("loss/total")[0].value
    outputs = [events.Scalars(f"loss/output_{number}")[0].value for number in (1, 2, 3)]
    cross_entropy = events.Scalars("loss/cross_entropy")[0].value
    assert total == pytest.approx(np.dot([0.5, 0.7, 1.0], outputs) + 0.3 * cross_entropy, rel=1e-5)
    names = ("1_left", "2_ground_truth", "3_prediction", "4_error", "5_basis_masks_res4")
    pictures = [f"pictures/{name}" for name in names]
    assert events.Tags()["images"] == pictures
    assert [event.step for event in events.Images("pictures/4_error")] == [5, 10]
    assert (events.Images("pictures/4_error")[0].width, events.Images("pictures/4_error")[0].height) == (64, 32)


def test_training_lowers_the_error(pairs: Path, tmp_path: Path) -> None:
    config = tiny_config(
        pairs, tmp_path, model__base_channels=8, trainer__max_steps=60, trainer__epochs=100,
        data__augmentation__color=0.0, loss__cross_entropy_weight=1.0, optimizer__learning_rate=5e-3,
        trainer__validate_every_steps=20, data__validation=DatasetConfig("pairs", str(pairs)),
    )  # fmt: skip
    result = Trainer(config).run()
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    errors = [event.value for event in events.Scalars("train/end_point_error")]
    assert errors[-1] < 0.5 * errors[0]
    assert result.step == 60


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_a_precision_that_the_cpu_has_no_hardware_for_is_told(
    precision: str, pairs: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny_config(pairs, tmp_path, trainer__precision=precision, model__max_disparity=48)
    for present in (True, False):
        caplog.clear()
        for name in ("cpu_computes_bfloat16", "cpu_computes_float16"):
            monkeypatch.setattr(fa_stereo.models.optimized, name, lambda present=present: present)
        Trainer(config)
        assert (f"trainer.precision={precision} is far slower than fp32" in caplog.text) == (not present)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_mixed_precision_trains(pairs: Path, tmp_path: Path, precision: str) -> None:
    config = tiny_config(pairs, tmp_path, trainer__precision=precision, trainer__epochs=2, model__max_disparity=48)
    trainer = Trainer(config)
    assert trainer.scaler.is_enabled() == (precision == "fp16")
    before = trainer.model.features.projection.weight.detach().clone()
    trainer._train_mode()
    values = trainer.train_step(first_batch(trainer))
    reference = Trainer(tiny_config(pairs, tmp_path, trainer__epochs=2, model__max_disparity=48))
    reference._train_mode()
    expected = reference.train_step(first_batch(reference))
    assert values["loss/total"] == pytest.approx(expected["loss/total"], rel=0.05)
    assert trainer.model.features.projection.weight.dtype == torch.float32
    if precision == "bf16":
        assert not torch.equal(trainer.model.features.projection.weight, before)
    assert Trainer(config).run().finished


def test_validation_at_the_start_and_at_the_end_of_each_epoch(pairs: Path, tmp_path: Path) -> None:
    config = tiny_config(
        pairs,
        tmp_path,
        trainer__epochs=4,
        trainer__validate_at_start=True,
        data__validation=DatasetConfig("pairs", str(pairs)),
    )
    Trainer(config).run()
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    # 6 pairs in batches of 4: passes end within steps 2, 3, 5 and 6
    assert [event.step for event in events.Scalars("validation/end_point_error")] == [0, 2, 3, 5, 6]


# --------------------------------------------------------------------------------------------------------------------
# what goes wrong


def test_a_loss_that_is_not_finite_stops_and_names_the_pairs(pairs: Path, tmp_path: Path) -> None:
    config = tiny_config(pairs, tmp_path, trainer__epochs=2, trainer__checkpoint_every_steps=1)
    Trainer(config).run()
    before = {path.name: path.read_bytes() for path in tmp_path.glob("*.pt")}

    trainer = Trainer(tiny_config(pairs, tmp_path, trainer__epochs=6, trainer__checkpoint_every_steps=1))
    with torch.no_grad():
        trainer.model.features.projection.weight.fill_(torch.nan)
    with pytest.raises(TrainingError) as caught:
        trainer.run()
    message = str(caught.value)
    assert message.startswith("the loss of step 4 is not finite; the last checkpoint, of step 3, is untouched")
    names = [trainer.stream[position]["name"] for position in range(12, 16)]
    assert all(name in message for name in names)
    assert {path.name: path.read_bytes() for path in tmp_path.glob("*.pt")} == before


def test_a_gradient_that_is_not_finite_stops_too(pairs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = Trainer(tiny_config(pairs, tmp_path))
    trainer.model.features.projection.weight.register_hook(lambda gradient: gradient * torch.inf)
    weight = trainer.model.features.stem[0].conv.weight.detach().clone()
    with pytest.raises(TrainingError, match="the gradient of step 1 is not finite"):
        trainer.run()
    assert torch.equal(trainer.model.features.stem[0].conv.weight, weight)


def test_gradients_that_no_loss_scale_makes_finite_stop_the_run(pairs: Path, tmp_path: Path) -> None:
    trainer = Trainer(tiny_config(pairs, tmp_path, trainer__precision="fp16", trainer__epochs=100))
    next(iter(trainer.model.features.parameters())).register_hook(lambda gradient: gradient * math.nan)
    with pytest.raises(TrainingError, match=r"the gradient of step 3\d is not finite"):
        trainer.run()


def test_a_full_disk_is_told_and_loses_nothing(pairs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Trainer(tiny_config(pairs, tmp_path, trainer__epochs=2)).run()
    before = (tmp_path / "last.pt").read_bytes()

    write = Path.write_bytes

    def fill_up(path: Path, content: bytes) -> int:
        if path.name.startswith(".metrics"):  # it is small
            return write(path, content)
        write(path, content[:1000])
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    trainer = Trainer(tiny_config(pairs, tmp_path, trainer__epochs=4))
    monkeypatch.setattr(Path, "write_bytes", fill_up)
    with pytest.raises(TrainingError, match=r"last\.pt: the checkpoint of step 6 could not be written \(No space left"):
        trainer.run()
    assert (tmp_path / "last.pt").read_bytes() == before
    assert not [path for path in tmp_path.iterdir() if path.name.endswith(".tmp")]


def test_curves_that_cannot_be_written_do_not_stop_the_training(
    pairs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("torch.utils.tensorboard.SummaryWriter.add_scalar", fail)
    with caplog.at_level(logging.WARNING, logger="fa_stereo"):
        assert Trainer(tiny_config(pairs, tmp_path, trainer__log_every_steps=1)).run().finished
    assert caplog.text.count("TensorBoard's file cannot be written (No space left on device)") == 1


def test_metrics_that_cannot_be_written_do_not_stop_the_training(
    pairs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    changes: dict[str, Any] = {
        "data__validation": DatasetConfig("pairs", str(pairs)), "trainer__validate_every_steps": 2,
    }  # fmt: skip
    trainer = Trainer(tiny_config(pairs, tmp_path, **changes))
    write = Path.write_bytes
    written: list[Path] = []

    def full_after_the_first(path: Path, content: bytes) -> int:
        if path.name.startswith(".metrics"):
            written.append(path)
            if len(written) > 1:
                raise OSError(errno.ENOSPC, "No space left on device", str(path))
        return write(path, content)

    monkeypatch.setattr(Path, "write_bytes", full_after_the_first)
    with caplog.at_level(logging.WARNING, logger="fa_stereo"):
        assert trainer.run().finished
    assert "metrics.json: cannot be written (No space left on device)" in caplog.text
    assert (tmp_path / "weights.safetensors").is_file()


def test_an_output_folder_that_cannot_be_written_is_told_at_once(pairs: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(InputError, match=r"file/run: cannot be written .* choose another output_dir"):
        Trainer(tiny_config(pairs, tmp_path / "file" / "run")).run()


def test_a_plateau_raises_the_alarm(pairs: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    config = tiny_config(pairs, tmp_path, optimizer__learning_rate=1e-12, trainer__plateau_alarm_steps=2)
    with caplog.at_level(logging.WARNING, logger="fa_stereo"):
        Trainer(config).run()
    assert "the loss has not fallen for 2 steps" in caplog.text


def test_init_from_loads_what_matches_and_says_so(
    pairs: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    source = build_model(tiny_config(pairs, tmp_path, model__attention__kind="none").model)
    save_weights(source, tmp_path / "psmnet.safetensors")
    with caplog.at_level(logging.INFO, logger="fa_stereo"):
        config = tiny_config(pairs, tmp_path / "run", trainer__init_from=str(tmp_path / "psmnet.safetensors"))
        trainer = Trainer(config)
    for name, tensor in source.state_dict().items():
        assert torch.equal(trainer.model.state_dict()[name], tensor), name
    assert f"loaded {len(source.state_dict())} tensors" in caplog.text
    assert "features.attention.res4" in caplog.text


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data__augmentation__crop_width": 72}, r"data\.augmentation\.crop_width must be a multiple of 16"),
        ({"data__train__root": None}, r"data\.train\.root must be given"),
        ({"trainer__precision": "bf16"}, r"bf16 on the CPU gives wrong gradients with model\.max_disparity below 48"),
        ({"trainer__init_from": "missing.safetensors"}, r"missing\.safetensors"),
        ({"trainer__resume": "missing.pt"}, r"missing\.pt"),
    ],
)
def test_unusable_settings_are_refused(pairs: Path, tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Trainer(tiny_config(pairs, tmp_path, **changes))


def test_an_unreadable_pair_ends_the_run_by_its_name(pairs: Path, tmp_path: Path) -> None:
    broken = write_pairs(tmp_path / "pairs")
    (broken / "right" / "002.png").write_bytes(b"no picture")
    with pytest.raises(InputError, match=r"002\.png"):
        Trainer(tiny_config(broken, tmp_path / "run")).run()


def test_cuda_that_is_not_there(pairs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(InputError, match=r"trainer\.device=cuda, but PyTorch finds no CUDA device"):
        Trainer(tiny_config(pairs, tmp_path, trainer__device="cuda"))


@needs_gpu
@pytest.mark.parametrize("large_map", [1, layers._LARGE_MAP])  # batch norm by kernels everywhere, and nowhere
@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 1e-3), ("bf16", 0.1), ("fp16", 0.1)])
def test_steps_on_a_gpu(
    pairs: Path, tmp_path: Path, precision: str, tolerance: float, large_map: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pinned batches, loss scaling, kernels: the first loss is the CPU's, and a run of steps ends."""
    monkeypatch.setattr(layers, "_LARGE_MAP", large_map)
    compute_float32_in_full()
    losses = []
    for device, chosen in (("cpu", "fp32"), ("cuda", precision)):
        trainer = Trainer(tiny_config(pairs, tmp_path / device, trainer__device=device, trainer__precision=chosen))
        losses.append(trainer.train_step(first_batch(trainer))["loss/total"])
    assert losses[1] == pytest.approx(losses[0], rel=tolerance)
    config = tiny_config(
        pairs, tmp_path / "run", trainer__device="cuda", trainer__precision=precision, trainer__max_steps=3,
        trainer__ema_decay=0.5, trainer__activation_checkpointing=True,
    )  # fmt: skip
    assert Trainer(config).run().finished


def steps_with_and_without_a_graph(pairs: Path, tmp_path: Path, device: str, precision: str) -> list[list[float]]:
    """Return the losses of six steps of two parts of four samples and a smaller one, without and with a graph.

    The first parts are not recorded yet, and the smaller ones never are.
    """
    losses: list[list[float]] = []
    trainers = []
    for graph in (False, True):
        config = tiny_config(
            pairs, tmp_path / str(graph), trainer__device=device, trainer__precision=precision, trainer__batch_size=10,
            trainer__micro_batch_size=4, trainer__cuda_graph=graph, trainer__gradient_clip_norm=1.0,
            trainer__max_steps=6, trainer__epochs=100, optimizer__learning_rate=1e-4,
        )  # fmt: skip
        trainer = Trainer(config)
        trainer._train_mode()
        losses.append([])
        for batch in trainer._batches():
            losses[-1].append(trainer.train_step(batch)["loss/total"])
            trainer.step += 1
        trainers.append(trainer)
    assert len(losses[0]) == len(losses[1]) == 6
    expected, found = (trainer.model.state_dict() for trainer in trainers)
    counters = [name for name in expected if name.endswith("num_batches_tracked")]
    assert all(torch.equal(expected[name], found[name]) for name in counters)
    return losses


def test_steps_by_a_graph_that_replays_on_the_cpu(pairs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A graph needs a GPU; what the trainer does around it does not: here the passes are replayed by calling them."""
    recorded = []

    def record(passes: Passes, inputs: tuple[torch.Tensor, ...]) -> Passes:
        recorded.append(len(inputs[0]))
        results: list[torch.Tensor] = []

        def replay(*inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
            for number, new in enumerate(passes(*inputs)):
                if number == len(results):
                    results.append(new.clone())
                results[number].copy_(new)
            return tuple(results)  # which the next replay overwrites

        return replay

    monkeypatch.setattr(fa_stereo.training, "_check_graph", lambda *_: None)
    monkeypatch.setattr(fa_stereo.cuda_graph, "record_passes", record)
    losses = steps_with_and_without_a_graph(pairs, tmp_path, "cpu", "fp32")
    assert losses[0] == losses[1]
    assert recorded == [4]


@needs_gpu
@pytest.mark.parametrize("large_map", [1, layers._LARGE_MAP])
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_steps_by_a_cuda_graph_are_the_same(
    pairs: Path, tmp_path: Path, precision: str, large_map: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(layers, "_LARGE_MAP", large_map)
    compute_float32_in_full()
    losses = steps_with_and_without_a_graph(pairs, tmp_path, "cuda", precision)
    assert losses[1] == pytest.approx(losses[0], rel=1e-3 if precision == "fp32" else 0.05)


def test_pairs_rendered_beside_the_training(pairs: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The run ends, and with it the processes that render."""
    others = set(multiprocessing.active_children())
    config = tiny_config(
        pairs, tmp_path, data__train__kind="rendered", data__render_workers=1, data__train__rendered__height=32,
        data__train__rendered__width=64, data__train__rendered__max_disparity=32.0, data__train__rendered__samples=3,
        trainer__batch_size=2, trainer__max_steps=2, data__workers=1,
    )  # fmt: skip
    trainer = Trainer(config)
    rendering = set(multiprocessing.active_children()) - others
    assert len(rendering) == 1
    with caplog.at_level(logging.INFO):
        assert trainer.run().finished
    assert not any(process.is_alive() for process in rendering)
    assert "3 pairs are rendered meanwhile, by 1 at a time; it draws from those there" in caplog.messages
    assert any(message.endswith(" of 3 pairs were rendered") for message in caplog.messages)


def test_a_checkpoint_of_another_device_brings_its_counters_along(
    pairs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Adam counts its steps on a GPU where its update is fused, and on the CPU where it is not."""
    config = tiny_config(pairs, tmp_path / "run", trainer__max_steps=1)
    Trainer(config).run()
    state = read_torch_file(tmp_path / "run" / "last.pt")
    for group in state["optimizer"]["param_groups"]:
        assert not group["fused"]
        group["fused"] = True  # as though it had been written on a GPU
    torch.save(state, tmp_path / "run" / "last.pt")
    loaded = []
    load = torch.optim.Adam.load_state_dict

    def watched(optimizer: torch.optim.Adam, state: dict[str, Any]) -> None:
        loaded.extend(group["fused"] for group in state["param_groups"])  # says where the counters go
        load(optimizer, state)

    monkeypatch.setattr(torch.optim.Adam, "load_state_dict", watched)
    trainer = Trainer(tiny_config(pairs, tmp_path / "run", trainer__max_steps=2))
    assert loaded == [None]
    assert not any(group["fused"] for group in trainer.optimizer.param_groups)
    assert trainer.run().step == 2


@needs_gpu
def test_a_checkpoint_of_a_cpu_goes_on_on_a_gpu(pairs: Path, tmp_path: Path) -> None:
    for steps, device in ((1, "cpu"), (2, "cuda"), (3, "cpu")):
        config = tiny_config(pairs, tmp_path / "run", trainer__max_steps=steps, trainer__device=device)
        assert Trainer(config).run().step == steps


def test_a_cuda_graph_without_a_gpu(pairs: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"trainer\.cuda_graph needs a GPU, but the device is cpu: set it to false"):
        Trainer(tiny_config(pairs, tmp_path, trainer__device="cpu", trainer__cuda_graph=True))
    with pytest.raises(InputError, match=r"trainer\.compile and trainer\.cuda_graph exclude each other"):
        tiny_config(pairs, tmp_path, trainer__compile=True, trainer__cuda_graph=True)


def test_a_loader_process_that_is_killed_does_not_cost_what_was_trained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Deadly(Trainer):
        def train_step(self, *arguments: Any) -> dict[str, float]:
            if self.step == 2:
                for child in multiprocessing.active_children():
                    child.kill()
            return super().train_step(*arguments)

    changes = {"data__workers": 1, "trainer__epochs": 40, "trainer__checkpoint_every_steps": 1000}
    trainer = Deadly(tiny_config(write_pairs(tmp_path / "pairs"), tmp_path / "run", **changes))
    with pytest.raises(RuntimeError, match="DataLoader worker"):
        trainer.run()
    state = read_torch_file(tmp_path / "run" / "last.pt")
    assert state["step"] == trainer.step >= 2
    assert_identical(state["model"], trainer.model.state_dict(), "model")


@pytest.mark.parametrize("where", ["passes", "pictures"])
def test_a_lack_of_memory_in_a_step_does_not_cost_what_was_trained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, where: str
) -> None:
    """Pictures are left out, their step stands; a step that cannot be made leaves those before it saved."""
    changes = {"trainer__epochs": 4, "trainer__picture_every_steps": 3, "trainer__checkpoint_every_steps": 1000}
    trainer = Trainer(tiny_config(write_pairs(tmp_path / "pairs"), tmp_path / "run", **changes))

    def starved(*_: Any, **__: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory")

    with caplog.at_level(logging.WARNING):
        if where == "pictures":
            monkeypatch.setattr(fa_stereo.training.TrainingLog, "pictures", starved)
            assert trainer.run().finished
            warnings = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
            assert warnings == ["no pictures of step 3: out of memory", "no pictures of step 6: out of memory"]
            return
        both_passes = trainer._both_passes
        statistics = {}

        def passes(*inputs: Any) -> Any:
            if trainer.step == 4:
                statistics.update({name: buffer.clone() for name, buffer in trainer.model.named_buffers()})
                both_passes(*inputs)  # as far as that moves batch norm's statistics
                starved()
            return both_passes(*inputs)

        monkeypatch.setattr(trainer, "_both_passes", passes)
        with pytest.raises(torch.OutOfMemoryError):
            trainer.run()
    state = read_torch_file(tmp_path / "run" / "last.pt")
    assert state["step"] == 4
    assert statistics
    for name, buffer in statistics.items():
        assert torch.equal(state["model"][name], buffer), name
    assert_identical(state["optimizer"], trainer.optimizer.state_dict(), "optimizer")


def test_the_clock_does_not_hide_that_there_is_nothing_to_learn_from(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    pairs = write_pairs(tmp_path / "pairs")
    for path in (pairs / "disparity").iterdir():
        write_pfm(path, np.full((48, 80), 40.0, np.float32))
    changes = {"trainer__max_minutes": 1e-6, "data__validation": None}
    with caplog.at_level(logging.INFO, logger="fa_stereo"), pytest.raises(InputError, match="no pixel among them"):
        Trainer(tiny_config(pairs, tmp_path / "run", **changes)).run()
    assert "EPE - px" in caplog.text
    assert not (tmp_path / "run" / "weights.safetensors").exists()


@pytest.mark.parametrize("truth", [-3.0, np.inf, 40.0])
def test_data_without_anything_to_learn_from_end_the_run(tmp_path: Path, truth: float) -> None:
    """Of the wrong sign, unknown, or beyond the range searched: the loss would be zero for ever."""
    pairs = write_pairs(tmp_path / "pairs")
    for path in (pairs / "disparity").iterdir():
        write_pfm(path, np.full((48, 80), truth, np.float32))
    changes = {"trainer__epochs": 9, "data__validation": None}
    with pytest.raises(
        InputError, match=r"no pixel among them whose disparity is known, below model\.max_disparity=16"
    ):
        Trainer(tiny_config(pairs, tmp_path / "run", **changes)).run()
    for _ in range(2):  # whatever was saved on the way, the same command says so again
        with pytest.raises(InputError, match="no pixel among them"):
            Trainer(tiny_config(pairs, tmp_path / "run", **changes)).run()
    write_pfm(pairs / "disparity/002.pfm", np.full((48, 80), 5.0, np.float32))  # one pair in an epoch is enough
    changes |= {"trainer__batch_size": 1, "trainer__freeze_batch_norm": True}
    assert Trainer(tiny_config(pairs, tmp_path / "other", **changes)).run().finished
    for steps in range(1, 7):  # whatever the last one sees
        folder = tmp_path / f"resumed_{steps}"
        for until in (12, 12 + steps):
            changes["trainer__max_steps"] = until
            assert Trainer(tiny_config(pairs, folder, **changes)).run().finished


def test_weights_to_start_from_are_told_to_be_unused_by_a_run_that_goes_on(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    pairs = write_pairs(tmp_path / "pairs")
    Trainer(tiny_config(pairs, tmp_path / "run", trainer__max_steps=1)).run()
    start = str(tmp_path / "run" / "weights.safetensors")
    with caplog.at_level(logging.INFO):
        Trainer(tiny_config(pairs, tmp_path / "run", trainer__max_steps=2, trainer__init_from=start))
    assert f"resuming the run, which is there already: init_from={start} is not used" in caplog.messages
