"""A run that is killed, stopped or starved of disk, and resumed, ends with the weights of one that was left alone."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from training_runs import (
    assert_identical,
    assert_same_state,
    command_line,
    environment,
    start,
    tiny_config,
    write_pairs,
)

import fa_stereo.training
from fa_stereo.config import DatasetConfig, OptimizerConfig, TrainConfig
from fa_stereo.errors import InputError
from fa_stereo.evaluation import Predict
from fa_stereo.history import FILE_NAME, read_history
from fa_stereo.models.checkpoint import load_model, read_record
from fa_stereo.training import Trainer

# Everything that has a state: the average, the clipping, the schedule, loader processes, validation.
OPTIONS = [
    "trainer.epochs=12", "trainer.checkpoint_every_steps=4", "trainer.ema_decay=0.9", "trainer.validate_every_steps=7",
    "trainer.micro_batch_size=2", "trainer.gradient_clip_norm=1.0", "optimizer=adamw", "schedule=one_cycle",
    "loss.cross_entropy_weight=0.3", "data.workers=1",
]  # fmt: skip


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pairs(tmp_path_factory.mktemp("resume") / "pairs")


@pytest.fixture(scope="module")
def never_killed(pairs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 18 steps in a process of its own, left alone."""
    output = tmp_path_factory.mktemp("never_killed")
    finish(pairs, output)
    return output


def finish(pairs: Path, output: Path) -> str:
    process = start(command_line(pairs, output, *OPTIONS))
    text, _ = process.communicate(timeout=300)
    assert process.returncode == 0, text
    assert (output / "weights.safetensors").is_file()
    return text


def wait_for_checkpoint(process: subprocess.Popen[str], path: Path, newer_than: int) -> None:
    """Wait until a checkpoint is there that was not there before."""
    while process.poll() is None and (not path.is_file() or path.stat().st_mtime_ns <= newer_than):
        time.sleep(0.005)
    assert process.poll() is None, process.communicate()[0]


def assert_same_end(one: Path, other: Path) -> None:
    for name in ("last.pt", "best.pt"):
        assert_same_state(one / name, other / name)
    assert_identical(*(load_file(folder / "weights.safetensors") for folder in (one, other)), "weights")
    assert (one / "metrics.json").read_bytes() == (other / "metrics.json").read_bytes()


@pytest.mark.skipif(sys.platform == "win32", reason="SIGKILL")
def test_killed_at_any_moment_and_resumed_is_as_if_never_killed(
    pairs: Path, never_killed: Path, tmp_path: Path
) -> None:
    last = tmp_path / "last.pt"
    moments = random.Random(5)
    kills = 0
    for turn in range(3):
        newest = last.stat().st_mtime_ns if last.is_file() else 0
        process = start(command_line(pairs, tmp_path, *OPTIONS))
        if turn == 0:  # before there is any checkpoint
            wait_for_checkpoint(process, tmp_path / "metrics.json", 0)
        else:
            wait_for_checkpoint(process, last, newest)
            time.sleep(moments.uniform(0, 0.3))
        process.kill()
        kills += process.wait() == -signal.SIGKILL
        process.communicate()
    assert kills > 0
    finish(pairs, tmp_path)
    assert_same_end(tmp_path, never_killed)


def test_killed_while_writing_a_checkpoint(pairs: Path, never_killed: Path, tmp_path: Path) -> None:
    """The write is cut short half way, by SIGKILL, in the second checkpoint."""
    script = """
import os, signal, sys
from pathlib import Path
from fa_stereo.cli.main import main

write, sizes = Path.write_bytes, []

def cut_short(path, content):
    if path.name.startswith(".last.pt"):
        sizes.append(len(content))
    if len(sizes) == 2:
        write(path, content[: len(content) // 2])
        os.kill(os.getpid(), signal.SIGKILL)
    return write(path, content)

Path.write_bytes = cut_short
main(["train", *sys.argv[1:]])
"""
    arguments = command_line(pairs, tmp_path, *OPTIONS)
    killed = subprocess.run([sys.executable, "-c", script, *arguments], env=environment(), capture_output=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert torch.load(tmp_path / "last.pt", weights_only=True)["step"] == 4  # the first one, whole
    assert list(tmp_path.glob("*.tmp"))
    finish(pairs, tmp_path)
    assert not list(tmp_path.glob("*.tmp"))
    assert_same_end(tmp_path, never_killed)


def test_sigterm_to_the_whole_process_group_saves_and_leaves_with_success(
    pairs: Path, never_killed: Path, tmp_path: Path
) -> None:
    """As a scheduler sends it: loader processes get it too."""
    process = subprocess.Popen(
        [sys.executable, "-m", "fa_stereo.cli.main", "train", *command_line(pairs, tmp_path, *OPTIONS)],
        env=environment(), text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
    )  # fmt: skip
    wait_for_checkpoint(process, tmp_path / "last.pt", 0)
    os.killpg(process.pid, signal.SIGTERM)
    text, _ = process.communicate(timeout=120)
    assert process.returncode == 0, text
    assert "SIGTERM: finishing the step and saving" in text
    assert f"the same command with output_dir={tmp_path} goes on" in text
    assert "Traceback" not in text
    stopped_at = torch.load(tmp_path / "last.pt", weights_only=True)["step"]
    assert stopped_at < 18
    assert f"from step {stopped_at}, " in finish(pairs, tmp_path)
    assert_same_end(tmp_path, never_killed)


# --------------------------------------------------------------------------------------------------------------------
# the same inside one process


def config_with_everything(pairs: Path, output: Path, **changes: Any) -> TrainConfig:
    return tiny_config(
        pairs, output, trainer__epochs=6, trainer__ema_decay=0.9, trainer__validate_every_steps=3,
        trainer__checkpoint_every_steps=100, data__validation=DatasetConfig("pairs", str(pairs)), **changes,
    )  # fmt: skip


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_during_a_step(
    pairs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: signal.Signals
) -> None:
    Trainer(config_with_everything(pairs, tmp_path / "reference")).run()
    handlers = [signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGINT)]
    train_step = Trainer.train_step

    def interrupted(self: Trainer, *arguments: Any) -> dict[str, float]:
        if self.step == 4:
            os.kill(os.getpid(), number)
        return train_step(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "train_step", interrupted)
        result = Trainer(config_with_everything(pairs, tmp_path / "run")).run()
    assert (result.finished, result.step) == (False, 5)
    assert [signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGINT)] == handlers
    assert not (tmp_path / "run" / "weights.safetensors").exists()
    assert Trainer(config_with_everything(pairs, tmp_path / "run")).run().finished
    assert_same_end(tmp_path / "run", tmp_path / "reference")


def test_a_signal_during_validation_leaves_it_to_the_resumed_run(
    pairs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Trainer(config_with_everything(pairs, tmp_path / "reference")).run()
    network_predictor = fa_stereo.training.network_predictor

    def interrupted(*arguments: Any, **options: Any) -> Predict:
        os.kill(os.getpid(), signal.SIGTERM)
        return network_predictor(*arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(fa_stereo.training, "network_predictor", interrupted)
        result = Trainer(config_with_everything(pairs, tmp_path / "run")).run()
    assert (result.finished, result.step, result.validation) == (False, 3, {})
    assert not (tmp_path / "run" / "best.pt").exists()
    assert Trainer(config_with_everything(pairs, tmp_path / "run")).run().finished
    assert_same_end(tmp_path / "run", tmp_path / "reference")


def test_a_bad_validation_pair_does_not_cost_the_training_so_far(pairs: Path, tmp_path: Path) -> None:
    broken = write_pairs(tmp_path / "validation")
    (broken / "left" / "001.png").write_bytes(b"")
    changes = {"trainer__validate_every_steps": 5, "data__validation": DatasetConfig("pairs", str(broken))}
    with pytest.raises(InputError, match=r"001\.png"):
        Trainer(tiny_config(pairs, tmp_path / "run", **changes)).run()
    assert torch.load(tmp_path / "run" / "last.pt", weights_only=True)["step"] == 5


def test_a_lack_of_memory_in_validation_does_not_either(
    pairs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = Trainer(
        tiny_config(pairs, tmp_path, data__validation=DatasetConfig("pairs", str(pairs)), trainer__epochs=1)
    )

    def exhausted(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(fa_stereo.training, "evaluate", exhausted)
    with pytest.raises(
        InputError, match=r"in the validation after step 1: give data\.validation smaller.*up to step 1$"
    ):
        trainer.run()
    assert torch.load(tmp_path / "last.pt", weights_only=True)["step"] == 1
    # Before the first step there is nothing to save, and the next command may begin with other weights.
    fresh = tmp_path / "fresh"
    changes = {"data__validation": DatasetConfig("pairs", str(pairs)), "trainer__validate_at_start": True}
    with pytest.raises(InputError, match=r"out of memory in the validation after step 0.*; none is saved$"):
        Trainer(tiny_config(pairs, fresh, **changes)).run()
    assert not (fresh / "last.pt").exists()


@pytest.mark.parametrize(
    ("device", "message"),
    [("gpu", "trainer.device must be auto, cpu, cuda or cuda:N, got 'gpu'"), ("cuda:x", "got 'cuda:x'")],
)
def test_devices(pairs: Path, tmp_path: Path, device: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        tiny_config(pairs, tmp_path, trainer__device=device)
    absent = tiny_config(pairs, tmp_path, trainer__device="cuda:99")
    with pytest.raises(InputError, match=r"trainer\.device=cuda:99, but PyTorch finds no|'cuda:99' is not there"):
        Trainer(absent)


def test_a_run_that_went_on_from_elsewhere_goes_on_itself(
    pairs: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The same command again does not begin anew at the checkpoint it names; and the history is whole."""
    caplog.set_level(logging.INFO)
    old, new = tmp_path / "old", tmp_path / "new"
    validation = DatasetConfig("pairs", str(pairs))
    changes: dict[str, Any] = {"data__validation": validation, "trainer__validate_every_steps": 1}
    Trainer(tiny_config(pairs, old, trainer__epochs=2, **changes)).run()
    changes["trainer__resume"] = str(old / "last.pt")
    first = Trainer(tiny_config(pairs, new, trainer__epochs=4, **changes))
    assert first.best == {}  # its weights are not in the new folder
    assert first.run().step == 6
    assert [line["step"] for line in read_history(new / FILE_NAME)] == [1, 2, 3, 4, 5, 6]
    best = torch.load(new / "best.pt", weights_only=True)["best"]
    again = Trainer(tiny_config(pairs, new, trainer__epochs=6, **changes))
    assert (again.step, again.best) == (6, best)
    assert f"{new / 'last.pt'} is there already: going on from it, not from {old / 'last.pt'}" in caplog.text
    # What lies in the folder itself is gone back to.
    changes["trainer__resume"] = str(new / "best.pt")
    assert Trainer(tiny_config(pairs, new, trainer__epochs=6, **changes)).step == best["step"]


def test_the_best_so_far_is_of_the_same_validation_pairs(pairs: Path, tmp_path: Path) -> None:
    other = write_pairs(tmp_path / "other", count=2)
    folder = tmp_path / "run"
    Trainer(tiny_config(pairs, folder, data__validation=DatasetConfig("pairs", str(pairs)), trainer__epochs=1)).run()
    for root, kept in ((pairs, True), (pairs / "left" / "..", True), (other, False)):
        changed = tiny_config(pairs, folder, data__validation=DatasetConfig("pairs", str(root)), trainer__epochs=2)
        assert bool(Trainer(changed).best) == kept
    best = (folder / "best.pt").read_bytes()
    Trainer(changed).run()
    (kept_file,) = folder.glob("best_before_*.pt")
    assert kept_file.read_bytes() == best
    assert (folder / "best.pt").read_bytes() != best


def test_what_was_changed_on_the_way_is_on_record(pairs: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    Trainer(tiny_config(pairs, folder, trainer__epochs=1, optimizer__learning_rate=0.01)).run()
    assert read_record(folder / "weights.safetensors")["changes"] == []
    for epochs in (2, 3):
        Trainer(tiny_config(pairs, folder, trainer__epochs=epochs, trainer__log_every_steps=7)).run()
    record = read_record(folder / "weights.safetensors")
    assert record["training"]["optimizer.learning_rate"] == OptimizerConfig().learning_rate
    (steps,) = {change["step"] for change in record["changes"]}
    assert record["changes"] == [{"step": steps, "key": "optimizer.learning_rate", "before": 0.01}]
    Trainer(tiny_config(pairs, folder, trainer__epochs=4, schedule__kind="cosine")).run()  # over another time, too
    changes = read_record(folder / "weights.safetensors")["changes"][1:]
    assert [change["key"] for change in changes] == ["schedule.kind", "trainer.epochs"]


def test_the_best_of_other_validation_pairs_does_not_come_back(pairs: Path, tmp_path: Path) -> None:
    """Nor after a stretch without any validation, which no error of the time before can be compared with."""
    other, folder = write_pairs(tmp_path / "other", count=2), tmp_path / "run"
    first, second = DatasetConfig("pairs", str(pairs)), DatasetConfig("pairs", str(other))
    Trainer(tiny_config(pairs, folder, data__validation=first, trainer__epochs=1)).run()
    Trainer(tiny_config(pairs, folder, data__validation=None, trainer__epochs=2)).run()
    for validation, kept in ((first, True), (second, False)):
        assert bool(Trainer(tiny_config(pairs, folder, data__validation=validation, trainer__epochs=3)).best) == kept


def test_a_history_that_another_run_left_is_not_this_ones(pairs: Path, tmp_path: Path) -> None:
    old, new = tmp_path / "old", tmp_path / "new"
    changes: dict[str, Any] = {
        "data__validation": DatasetConfig("pairs", str(pairs)), "trainer__validate_every_steps": 1,
    }  # fmt: skip
    Trainer(tiny_config(pairs, old, trainer__epochs=2, **changes)).run()
    left = [{"step": step, "end_point_error": 99.0} for step in (1, 2)]  # by a run that was killed before it saved
    for folder, resume, steps in ((new, str(old / "last.pt"), [1, 2, 3, 4, 5, 6]), (tmp_path / "fresh", None, [1])):
        folder.mkdir()
        (folder / FILE_NAME).write_text("".join(json.dumps(line) + "\n" for line in left))
        epochs = 4 if resume else 1
        Trainer(tiny_config(pairs, folder, trainer__resume=resume, trainer__epochs=epochs, **changes)).run()
        lines = read_history(folder / FILE_NAME)
        assert [line["step"] for line in lines] == steps
        assert all(line["end_point_error"] != 99.0 for line in lines)


def test_a_bad_training_pair_does_not_cost_the_training_so_far(tmp_path: Path) -> None:
    pairs, folder = write_pairs(tmp_path / "pairs", count=12), tmp_path / "run"
    config = tiny_config(pairs, folder, trainer__checkpoint_every_steps=500)
    trainer = Trainer(config)
    picture = pairs / "left" / f"{trainer.stream[9]['name']}.png"  # of the third step
    whole = picture.read_bytes()
    picture.write_bytes(whole[:99])
    with pytest.raises(InputError, match=picture.name):
        trainer.run()
    assert torch.load(folder / "last.pt", weights_only=True)["step"] == 2
    picture.write_bytes(whole)
    assert Trainer(config).run().step == 12
    undisturbed = Trainer(dataclasses.replace(config, output_dir=str(tmp_path / "other"))).run()
    a, b = (torch.load(run / "last.pt", weights_only=True)["model"] for run in (folder, undisturbed.output_dir))
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_the_best_is_no_checkpoint_to_go_on_from(tmp_path: Path) -> None:
    pairs, folder = write_pairs(tmp_path / "pairs", count=12), tmp_path / "run"
    validation = DatasetConfig("pairs", str(write_pairs(tmp_path / "validation", count=2)))
    config = tiny_config(
        pairs, folder, trainer__checkpoint_every_steps=500, data__validation=validation, trainer__validate_every_steps=2
    )
    trainer = Trainer(config)
    (pairs / "left" / f"{trainer.stream[9]['name']}.png").write_bytes(b"")  # of the third step
    with pytest.raises(InputError):
        trainer.run()
    assert {torch.load(folder / name, weights_only=True)["step"] for name in ("best.pt", "last.pt")} == {2}


def test_fewer_steps_than_were_taken_end_the_run_where_it_is(
    pairs: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    changes: dict[str, Any] = {
        "data__validation": DatasetConfig("pairs", str(pairs)), "trainer__validate_every_steps": 100,
        "trainer__epochs": 40,
    }  # fmt: skip
    trainer = Trainer(tiny_config(pairs, tmp_path, **changes))
    batches = trainer._batches()
    for _ in range(3):
        trainer.train_step(next(batches))
        trainer.step += 1
    tmp_path.mkdir(exist_ok=True)
    trainer._save("last.pt")
    with caplog.at_level(logging.INFO):
        result = Trainer(tiny_config(pairs, tmp_path, trainer__max_steps=2, **changes)).run()
    assert "3 steps are taken already, more than the 2 asked for" in caplog.text
    assert (result.step, result.finished) == (3, True)
    assert torch.load(tmp_path / "last.pt", weights_only=True)["validated_step"] == 3
    assert (tmp_path / "weights.safetensors").is_file()


def test_pairs_without_ground_truth_are_told_before_the_first_step(pairs: Path, tmp_path: Path) -> None:
    bare = write_pairs(tmp_path / "bare")
    shutil.rmtree(bare / "disparity")
    source = DatasetConfig("pairs", str(bare))
    for key, changes in (
        ("data.validation", {"data__validation": source}),
        ("data.validation", {"data__validation": dataclasses.replace(source, limit=1)}),
        ("data.train", {"data__train__root": str(bare)}),
        ("data.also.0", {"data__also": [{"kind": "pairs", "root": str(bare)}]}),
    ):
        with pytest.raises(InputError, match=f"{key}: there are pictures, but no ground truth"):
            Trainer(tiny_config(pairs, tmp_path / "run", **changes))


@pytest.mark.skipif(sys.platform == "win32", reason="no locks there")
def test_two_runs_cannot_share_a_folder(pairs: Path, tmp_path: Path) -> None:
    program = (
        "import sys, time\nfrom pathlib import Path\nfrom fa_stereo.files import sole_use\n"
        "with sole_use(Path(sys.argv[1])):\n    print('held', flush=True)\n    time.sleep(100)\n"
    )
    holder = subprocess.Popen(
        [sys.executable, "-c", program, str(tmp_path)], stdout=subprocess.PIPE, text=True, env=environment()
    )
    assert holder.stdout is not None
    with holder.stdout:
        assert holder.stdout.readline() == "held\n"
        trainer = Trainer(tiny_config(pairs, tmp_path, trainer__epochs=1))
        with pytest.raises(InputError, match="another process writes to this folder"):
            trainer.run()
        assert not (tmp_path / "metrics.json").exists()
        holder.kill()
        holder.wait()
    late = Trainer(tiny_config(pairs, tmp_path, trainer__epochs=1))
    assert trainer.run().finished
    with pytest.raises(InputError, match="another process has just trained on here"):
        late.run()


def test_a_second_ctrl_c_ends_the_run_at_once(pairs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(self: Trainer, *arguments: Any) -> dict[str, float]:
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGINT)
        raise AssertionError("still here")

    monkeypatch.setattr(Trainer, "train_step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        Trainer(config_with_everything(pairs, tmp_path)).run()


def test_the_random_states_are_restored(pairs: Path, tmp_path: Path) -> None:
    trainer = Trainer(tiny_config(pairs, tmp_path))
    random.seed(11)
    np.random.seed(12)  # noqa: NPY002
    torch.manual_seed(13)
    np.random.standard_normal(3)  # noqa: NPY002 - leaves a half-used pair behind
    trainer._save("last.pt")

    def draw() -> list[Any]:
        return [random.random(), random.gauss(0, 1), *np.random.standard_normal(3), *torch.rand(3).tolist()]  # noqa: NPY002

    expected = draw()
    Trainer(tiny_config(pairs, tmp_path))
    assert draw() == expected


def test_a_finished_run_can_be_made_longer(pairs: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    Trainer(tiny_config(pairs, tmp_path / "once", trainer__epochs=6)).run()
    Trainer(tiny_config(pairs, tmp_path / "twice", trainer__epochs=3)).run()
    with caplog.at_level(logging.INFO, logger="fa_stereo"):
        result = Trainer(tiny_config(pairs, tmp_path / "twice", trainer__epochs=6)).run()
    assert result.step == 9
    assert "resuming with trainer.epochs = 6 (it was 3)" in caplog.text
    states = [torch.load(tmp_path / name / "last.pt", weights_only=True) for name in ("once", "twice")]
    assert_identical(states[0]["model"], states[1]["model"], "model")


class Clock:
    """Stands in for the module ``time``: steps take a minute, validations seven, and building a trainer fifty."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.minutes = 1000.0
        monkeypatch.setattr(fa_stereo.training, "time", self)
        for name, minutes in {"train_step": 1, "validate": 7, "__init__": 50}.items():
            monkeypatch.setattr(Trainer, name, self._taking(minutes, getattr(Trainer, name)))

    def _taking(self, minutes: float, function: Any) -> Any:
        def slow(*arguments: Any, **options: Any) -> Any:
            self.minutes += minutes
            return function(*arguments, **options)

        return slow

    def perf_counter(self) -> float:
        return 60 * self.minutes

    process_time = perf_counter


@pytest.mark.parametrize("schedule", ["cosine", "linear", "one_cycle"])
@pytest.mark.parametrize("stopped", [False, True])
def test_a_run_by_the_clock(
    stopped: bool, schedule: str, pairs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    """Ten minutes of a minute a step are ten steps, with the learning rates of a run of ten steps, resumed or not."""
    common = {
        "schedule__kind": schedule, "trainer__validate_every_steps": 3, "trainer__validate_at_start": True,
        "data__validation": DatasetConfig("pairs", str(pairs)),
    }  # fmt: skip
    Trainer(tiny_config(pairs, tmp_path / "steps", trainer__max_steps=10, trainer__epochs=99, **common)).run()
    Clock(monkeypatch)
    by_clock = tiny_config(pairs, tmp_path / "minutes", trainer__max_minutes=10, trainer__max_steps=5, **common)
    with caplog.at_level(logging.INFO, logger="fa_stereo"):
        if stopped:
            trainer = Trainer(by_clock)
            report = trainer._report

            def report_and_stop(*arguments: Any) -> None:
                report(*arguments)
                if trainer.step == 4:
                    os.kill(os.getpid(), signal.SIGTERM)

            monkeypatch.setattr(trainer, "_report", report_and_stop)
            assert not trainer.run().finished
        trainer = Trainer(by_clock)
        assert trainer.run().finished
    assert trainer.step == trainer.total_steps == trainer.validated_step == 10
    assert "10 minutes (0 of them used) of steps of 4, from step 0" in caplog.text
    assert ("10 minutes (4 of them used) of steps of 4, from step 4" in caplog.text) == stopped
    assert "step 10/10" in caplog.text
    states = [torch.load(tmp_path / name / "last.pt", weights_only=True) for name in ("steps", "minutes")]
    assert_identical(states[0]["model"], states[1]["model"], "model")
    assert [line["step"] for line in states[1]["history"]] == [0, 3, 6, 9, 10]
    assert Trainer(by_clock).run().step == 10  # there is nothing left to do


def test_a_validation_that_is_owed_when_the_time_is_over(
    pairs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Clock(monkeypatch)
    config = tiny_config(pairs, tmp_path, trainer__max_minutes=3, data__validation=DatasetConfig("pairs", str(pairs)))
    validate = Trainer.validate

    def stopped(trainer: Trainer, stop: Any) -> Any:
        os.kill(os.getpid(), signal.SIGTERM)
        return validate(trainer, stop)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "validate", stopped)
        patch.setattr(Trainer, "_due_or_epoch_ends", lambda trainer, every: trainer.step == trainer.total_steps)
        result = Trainer(config).run()
    assert (result.step, result.finished, result.validation) == (3, False, {})
    assert Trainer(config).run().finished
    state = torch.load(tmp_path / "last.pt", weights_only=True)
    assert state["validated_step"] == 3
    assert state["validation"]["end_point_error"] > 0


def test_a_clock_that_cannot_be(pairs: Path, tmp_path: Path) -> None:
    for minutes in (0, float("nan"), float("inf")):
        with pytest.raises(InputError, match=r"trainer\.max_minutes must be positive"):
            tiny_config(pairs, tmp_path, trainer__max_minutes=minutes)
    with pytest.raises(InputError, match=r"trainer\.max_minutes does not go with schedule=multi_step"):
        Trainer(tiny_config(pairs, tmp_path, trainer__max_minutes=1, schedule__kind="multi_step"))


def test_another_loss_may_be_larger_without_alarm(pairs: Path, tmp_path: Path) -> None:
    trainer = Trainer(tiny_config(pairs, tmp_path, trainer__max_steps=3))
    trainer.run()
    same = Trainer(tiny_config(pairs, tmp_path, trainer__max_steps=4))
    assert same.alarm.state_dict() == trainer.alarm.state_dict()
    other = Trainer(tiny_config(pairs, tmp_path, trainer__max_steps=4, loss__smooth_l1_beta=0.1))
    assert other.alarm.state_dict() != trainer.alarm.state_dict()
    with pytest.raises(InputError, match=r"loss\.smooth_l1_beta must be zero or more, got inf"):
        tiny_config(pairs, tmp_path, loss__smooth_l1_beta=float("inf"))


def test_other_sources_are_told(pairs: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    half = {"kind": "pairs", "root": str(pairs), "limit": 3}
    Trainer(tiny_config(pairs, tmp_path, data__train__limit=3, data__also=[half], trainer__epochs=1)).run()
    with caplog.at_level(logging.INFO, logger="fa_stereo"):
        Trainer(tiny_config(pairs, tmp_path, trainer__epochs=2))  # as many pairs
    assert "resuming with 0 sources in data.also (there were 1)" in caplog.text
    with pytest.raises(InputError, match=r"data\.train and data\.also have 9 pairs, but had 6 in the run to resume"):
        Trainer(tiny_config(pairs, tmp_path, data__also=[half], trainer__epochs=2))


def test_the_optimizers_settings_are_those_of_the_command(pairs: Path, tmp_path: Path) -> None:
    """Saved with the state are those of the run before; what is told to have changed must have."""
    Trainer(tiny_config(pairs, tmp_path, trainer__epochs=2)).run()
    changed = Trainer(
        tiny_config(
            pairs, tmp_path, trainer__epochs=4, optimizer__weight_decay=0.25, optimizer__betas=[0.5, 0.75],
            trainer__precision="fp16",
        )
    )  # fmt: skip
    (group,) = changed.optimizer.param_groups
    assert (group["weight_decay"], group["betas"]) == (0.25, (0.5, 0.75))
    assert all(state["step"] == 3 for state in changed.optimizer.state.values())  # the moments went on
    assert changed.scaler.is_enabled()
    assert changed.scaler.get_scale() == 2**16  # there was none to go on with


def test_a_signal_loses_no_checkpoint_that_is_to_be_kept(
    pairs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train_step = Trainer.train_step

    def interrupted(self: Trainer, *arguments: Any) -> dict[str, float]:
        if self.step == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return train_step(self, *arguments)

    monkeypatch.setattr(Trainer, "train_step", interrupted)
    result = Trainer(config_with_everything(pairs, tmp_path, trainer__keep_every_steps=2)).run()
    assert (result.finished, result.step) == (False, 4)
    for name in ("last.pt", "step_0000002.pt", "step_0000004.pt"):
        assert (tmp_path / name).is_file(), name


def test_the_best_of_a_branch_that_was_left_does_not_count(pairs: Path, tmp_path: Path) -> None:
    """Going back before it, ``best.pt`` is written anew; going back behind it, it stays."""
    validation = {"data__validation": {"kind": "pairs", "root": str(pairs)}, "trainer__validate_every_steps": 1}
    changes = {**validation, "trainer__epochs": 4, "trainer__keep_every_steps": 2}
    first = Trainer(tiny_config(pairs, tmp_path, **changes)).run()
    kept = [int(path.stem[5:]) for path in sorted(tmp_path.glob("step_*.pt"))]
    best = torch.load(tmp_path / "best.pt", weights_only=True)
    assert best["step"] == first.best["step"]
    for step in kept:
        file = tmp_path / f"step_{step:07d}.pt"
        recorded = torch.load(file, weights_only=True)["best"]
        trainer = Trainer(tiny_config(pairs, tmp_path, **changes, trainer__resume=str(file)))
        assert trainer.best == (recorded if recorded.get("step") == best["step"] else {})
    best["step"] = 1000  # as of a branch that went further
    torch.save(best, tmp_path / "best.pt")
    file = tmp_path / f"step_{kept[0]:07d}.pt"
    assert Trainer(tiny_config(pairs, tmp_path, **changes, trainer__resume=str(file))).best == {}


def test_the_micro_batch_may_change(pairs: Path, tmp_path: Path) -> None:
    Trainer(tiny_config(pairs, tmp_path, trainer__epochs=2)).run()
    assert Trainer(tiny_config(pairs, tmp_path, trainer__epochs=4, trainer__micro_batch_size=2)).run().step == 6


def test_how_it_predicts_may_change(pairs: Path, tmp_path: Path) -> None:
    """It is a matter of validation and prediction alone."""
    validation = {"data__validation": {"kind": "pairs", "root": str(pairs)}, "trainer__validate_every_steps": 3}
    first = Trainer(tiny_config(pairs, tmp_path, trainer__epochs=2, **validation)).run()
    assert first.best["step"] == 3
    changed = {"model__regression": "modal", "model__padding": "replicate", "trainer__epochs": 4}
    trainer = Trainer(tiny_config(pairs, tmp_path, **changed, **validation))
    assert trainer.best == {}  # an error of the other kind
    result = trainer.run()
    assert (result.step, result.best["step"]) == (6, 6)
    config = load_model(tmp_path / "weights.safetensors").config
    assert (config.regression, config.padding) == ("modal", "replicate")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"trainer__batch_size": 2}, r"trainer\.batch_size is 2, but 4 in the run to resume"),
        ({"trainer__seed": 1}, r"trainer\.seed is 1, but 0"),
        ({"optimizer__kind": "sgd"}, r"optimizer\.kind is sgd, but adam"),
        ({"model__attention__kind": "none"}, r"model\.attention\.kind is none, but factorized"),
        ({"data__train__limit": 5}, r"data\.train has 5 pairs, but had 6"),
        ({"trainer__resume": None}, r"there is a run already"),
    ],
)
def test_what_would_be_another_run_is_refused(
    pairs: Path, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    Trainer(tiny_config(pairs, tmp_path)).run()
    before = (tmp_path / "last.pt").read_bytes()
    with pytest.raises(InputError, match=message):
        Trainer(tiny_config(pairs, tmp_path, **changes))
    assert (tmp_path / "last.pt").read_bytes() == before


def test_a_damaged_or_foreign_checkpoint_is_refused(pairs: Path, tmp_path: Path) -> None:
    Trainer(tiny_config(pairs, tmp_path)).run()
    content = (tmp_path / "last.pt").read_bytes()
    (tmp_path / "last.pt").write_bytes(content[: len(content) // 2])
    with pytest.raises(InputError, match=r"last\.pt.*truncated"):
        Trainer(tiny_config(pairs, tmp_path))
    torch.save({"model": {}}, tmp_path / "other.pt")
    with pytest.raises(InputError, match=r"other\.pt: not a training checkpoint"):
        Trainer(tiny_config(pairs, tmp_path / "new", trainer__resume=str(tmp_path / "other.pt")))


@pytest.mark.skipif(sys.platform == "win32", reason="RLIMIT_FSIZE")
def test_a_full_disk_in_a_real_process(pairs: Path, tmp_path: Path) -> None:
    """No file may grow beyond 100 kB, as on a full disk: the checkpoint does not fit, the one before stays."""
    Trainer(tiny_config(pairs, tmp_path, trainer__epochs=2)).run()
    before = (tmp_path / "last.pt").read_bytes()
    assert len(before) > 200_000
    arguments = command_line(pairs, tmp_path, "trainer.epochs=4", "data.validation=null")
    process = subprocess.run(
        [sys.executable, "-m", "fa_stereo.cli.main", "train", *arguments], env=environment(), text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000)),
    )  # fmt: skip
    assert process.returncode == 1, process.stdout
    assert "last.pt: the checkpoint of step 6 could not be written" in process.stdout
    assert "Traceback" not in process.stdout
    assert (tmp_path / "last.pt").read_bytes() == before
    assert not list(tmp_path.glob(".last.pt*"))
