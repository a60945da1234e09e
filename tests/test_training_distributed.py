"""Two processes on one machine train the network that one process trains, and tell the same errors."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from training_runs import REPOSITORY, command_line, environment, start, tiny_config, write_pairs

from fa_stereo.config import DatasetConfig
from fa_stereo.models.checkpoint import save_weights
from fa_stereo.training import Trainer


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pairs(tmp_path_factory.mktemp("distributed") / "pairs", count=7)  # no multiple of the processes


@pytest.fixture(scope="module")
def trained(pairs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights whose batch norm statistics fit the data, so that freezing it makes sense."""
    trainer = Trainer(tiny_config(pairs, tmp_path_factory.mktemp("trained"), trainer__epochs=12))
    trainer.run()
    save_weights(trainer.model, trainer.output_dir / "start.safetensors")
    return trainer.output_dir / "start.safetensors"


def run_two(script: Path, *arguments: str) -> str:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    process = subprocess.run(
        [*command, *arguments],
        env=environment(),
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        timeout=300,
    )
    assert process.returncode == 0, process.stdout
    return process.stdout


COMMON = ["trainer.epochs=6", "optimizer=sgd", "optimizer.learning_rate=1e-3", "trainer.validate_every_steps=4"]


def _flat(weights: dict[str, torch.Tensor]) -> torch.Tensor:
    return torch.cat([tensor.double().flatten() for tensor in weights.values()])


@pytest.mark.parametrize("batch_norm", ["synchronized", "frozen"])
def test_two_processes_train_as_one(pairs: Path, trained: Path, tmp_path: Path, batch_norm: str) -> None:
    frozen = batch_norm == "frozen"
    options = (
        [f"init_from={trained}", "trainer.freeze_batch_norm=true", "trainer.micro_batch_size=1"]
        if frozen
        else ["trainer.sync_batch_norm=true"]
    )
    # With live batch norm, rounding grows thirtyfold a step in so small a network (other threads do it, too): there one
    # step, a large one, is compared.
    steps = 10 if frozen else 1
    length = [] if frozen else ["trainer.max_steps=1", "optimizer.learning_rate=5e-3"]
    output = run_two(
        REPOSITORY / "scripts" / "train.py", *command_line(pairs, tmp_path / "two", *COMMON, *options, *length)
    )
    assert "on 2 x " in output
    assert output.count("trained: ") == 1  # one process tells

    same = [f"init_from={trained}", "trainer.freeze_batch_norm=true"] if frozen else []
    alone = start(command_line(pairs, tmp_path / "one", *COMMON, *same, *length))
    text, _ = alone.communicate(timeout=300)
    assert alone.returncode == 0, text
    settings = {"trainer__init_from": str(trained)} if frozen else {}
    before = Trainer(tiny_config(pairs, tmp_path / "before", **settings)).model.state_dict()
    one, two = (torch.load(tmp_path / name / "last.pt", weights_only=True) for name in ("one", "two"))
    assert one["step"] == two["step"] == steps
    first, alone_end, two_end = (_flat(weights) for weights in (before, one["model"], two["model"]))
    moved = (alone_end - first).norm()
    assert (alone_end - first).abs().max() > 0.01  # it did train
    assert (two_end - alone_end).norm() < 0.02 * moved  # summed gradients, say, would double the way

    # The seven validation pairs are shared among two processes: none counts twice.
    metrics = [json.loads((tmp_path / name / "metrics.json").read_text()) for name in ("one", "two")]
    for name, value in metrics[0]["validation"].items():
        assert metrics[1]["validation"][name] == pytest.approx(
            value, rel=2e-2, abs=0.5 if name != "end_point_error" else 0
        )


def test_one_sample_a_process_is_enough_for_synchronized_batch_norm(pairs: Path, tmp_path: Path) -> None:
    """The coarsest pools of so small crops leave one value a channel and sample: of two processes that is a batch."""
    options = ["trainer.sync_batch_norm=true", "trainer.batch_size=2", "trainer.max_steps=1"]
    run_two(REPOSITORY / "scripts" / "train.py", *command_line(pairs, tmp_path / "two", *COMMON, *options))
    assert torch.load(tmp_path / "two" / "last.pt", weights_only=True)["step"] == 1


def test_a_signal_to_one_process_stops_all_and_one_process_can_go_on(pairs: Path, tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    script.write_text(
        """
import os, signal, sys
from fa_stereo import distributed
from fa_stereo.cli.main import main
from fa_stereo.training import Trainer

train_step = Trainer.train_step

def interrupted(self, *arguments):
    if self.step == 3 and distributed.rank() == 1:
        os.kill(os.getpid(), signal.SIGTERM)
    return train_step(self, *arguments)

Trainer.train_step = interrupted
sys.exit(main(["train", *sys.argv[1:]]))
"""
    )
    options = [*COMMON, "trainer.freeze_batch_norm=true", "optimizer.learning_rate=1e-8"]
    run_two(script, *command_line(pairs, tmp_path / "run", *options))
    state = torch.load(tmp_path / "run" / "last.pt", weights_only=True)
    assert state["step"] == 4
    assert len(state["random_states"]) == 2
    config = tiny_config(
        pairs, tmp_path / "run", trainer__epochs=6, trainer__freeze_batch_norm=True, optimizer__kind="sgd",
        optimizer__learning_rate=1e-8, trainer__validate_every_steps=4,
        data__validation=DatasetConfig("pairs", str(pairs)),
    )  # fmt: skip
    result = Trainer(config).run()
    assert (result.finished, result.step) == (True, 10)


def test_two_processes_end_by_one_clock(pairs: Path, tmp_path: Path) -> None:
    """The second process's clock runs ten times as fast: by its own it would leave the first one waiting."""
    script = tmp_path / "train.py"
    script.write_text(
        """
import os, sys, time
from types import SimpleNamespace
from fa_stereo import training
from fa_stereo.cli.main import main

pace = 10 if int(os.environ["RANK"]) else 1
training.time = SimpleNamespace(perf_counter=lambda: pace * time.perf_counter(), process_time=time.process_time)
sys.exit(main(["train", *sys.argv[1:]]))
"""
    )
    text = run_two(script, *command_line(pairs, tmp_path / "run", "trainer.max_minutes=0.05", "trainer.epochs=1"))
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert metrics["step"] > 1
    assert f"step {metrics['step']}/{metrics['step']} " in text
    assert (tmp_path / "run" / "weights.safetensors").is_file()


def test_a_pair_that_one_process_cannot_read_ends_both_in_a_sentence(tmp_path: Path) -> None:
    pairs = write_pairs(tmp_path / "pairs", count=7)
    content = (pairs / "left/003.png").read_bytes()
    (pairs / "left/003.png").write_bytes(content[: len(content) // 2])
    script = tmp_path / "train.py"
    script.write_text(
        "import sys\nfrom fa_stereo.cli.main import main\nprint('exit code', main(['train', *sys.argv[1:]]))"
    )
    options = ["trainer.epochs=4", "trainer.batch_size=2", "trainer.checkpoint_every_steps=100", "trainer.seed=2",
               "trainer.freeze_batch_norm=true", "data.validation=null"]  # fmt: skip
    output = run_two(script, *command_line(pairs, tmp_path / "run", *options))
    assert output.count("exit code 2") == 2
    assert "Traceback" not in output
    assert output.count("left/003.png") == 2
    kept = torch.load(tmp_path / "run/last.pt", weights_only=True)["step"]
    assert kept > 0
    assert f"last.pt holds the training up to step {kept}" in output


def test_collective_operations_and_batch_norm(tmp_path: Path) -> None:
    """Each process holds a half that is not the other's size; together they are one batch."""
    script = tmp_path / "check.py"
    script.write_text(
        """
import torch
from torch import nn
from fa_stereo import distributed

with distributed.process_group():
    rank = distributed.rank()
    assert distributed.world_size() == 2
    assert distributed.gather_objects({"rank": rank}) == [{"rank": 0}, {"rank": 1}]
    assert distributed.broadcast_object(f"from {rank}") == "from 0"
    assert distributed.sum_over_processes(torch.tensor([1.0, rank])).tolist() == [2.0, 1.0]
    module = nn.BatchNorm2d(2)
    module.running_mean.fill_(float(rank + 3))
    distributed.broadcast_buffers(module)
    assert module.running_mean.tolist() == [3.0, 3.0]

    for dims in (2, 3):
        torch.manual_seed(0)
        whole = torch.randn(5, 3, *([6] * dims), dtype=torch.float64) * 4 + 100
        weights = torch.randn_like(whole)
        plain = (nn.BatchNorm2d if dims == 2 else nn.BatchNorm3d)(3).double()
        nn.init.normal_(plain.weight), nn.init.normal_(plain.bias)
        model = nn.Sequential(nn.Identity(), plain)
        copy = nn.Sequential(nn.Identity(), type(plain)(3).double())
        copy.load_state_dict(model.state_dict())
        distributed.synchronize_batch_norm(copy, torch.device("cpu"))
        assert isinstance(copy[1], distributed.SynchronizedBatchNorm)
        rows = slice(0, 2) if rank == 0 else slice(2, 5)
        x, part = whole.clone().requires_grad_(), whole[rows].clone().requires_grad_()
        for _ in range(2):
            expected, got = model(x), copy(part)
        tolerance = dict(rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(got, expected[rows], **tolerance)
        (expected * weights).sum().backward()
        (got * weights[rows]).sum().backward()
        torch.testing.assert_close(part.grad, x.grad[rows], **tolerance)
        for one, two in zip(model.parameters(), copy.parameters()):
            torch.testing.assert_close(distributed.sum_over_processes(two.grad), one.grad, **tolerance)
        assert model.state_dict().keys() == copy.state_dict().keys()
        for name, value in model.state_dict().items():
            torch.testing.assert_close(copy.state_dict()[name], value, **tolerance)
        torch.testing.assert_close(copy.eval()(whole), model.eval()(whole), **tolerance)
print("checked", rank)
"""
    )
    assert run_two(script).count("checked") == 2
