"""``fa-stereo train`` as people type it: results, typos, sweeps."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from training_runs import command_line, environment, write_pairs

from fa_stereo.cli.hydra_entry import find_conf_dir
from fa_stereo.cli.main import main
from fa_stereo.config import RenderConfig
from fa_stereo.data.formats import write_pfm, write_picture
from fa_stereo.data.rendered import render_pair
from fa_stereo.history import read_history
from fa_stereo.models.checkpoint import load_model
from fa_stereo.weights import find_weights


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pairs(tmp_path_factory.mktemp("train_command") / "pairs")


def run(*arguments: str, folder: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "fa_stereo.cli.main", "train", *arguments]
    return subprocess.run(command, cwd=folder, env=environment(), text=True, capture_output=True, timeout=300)


def test_a_run_from_the_command_line(pairs: Path, tmp_path: Path) -> None:
    weights = tmp_path / "first" / "weights.safetensors"
    first = run(*command_line(pairs, tmp_path / "first", "trainer.epochs=2"), folder=tmp_path)
    assert first.returncode == 0, first.stderr
    assert "step 3/3" in first.stdout  # without a terminal, a plain line
    assert "validation at step 3: end_point_error" in first.stdout
    assert json.loads((weights.parent / "metrics.json").read_text())["step"] == 3
    assert load_model(weights).config.base_channels == 4
    saved = yaml.safe_load((weights.parent / ".hydra" / "config.yaml").read_text())
    assert saved["trainer"]["epochs"] == 2
    assert (weights.parent / "train.log").read_text()

    second = run(
        *command_line(pairs, tmp_path / "second", "trainer.epochs=2", "attention=none", f"init_from={weights}"),
        folder=tmp_path,
    )
    assert second.returncode == 0, second.stderr
    assert "in the file only, left out: features.attention.res4" in second.stdout


@pytest.mark.timeout(1200)
def test_the_first_look_shows_a_falling_error(tmp_path: Path) -> None:
    """The experiment as README has it, whole: fresh weights, pairs rendered on the fly."""
    command = [sys.executable, "-m", "fa_stereo.cli.main", "train", "experiment=quick", "trainer.device=cpu"]
    done = subprocess.run(
        [*command, f"output_dir={tmp_path}"], cwd=tmp_path, env=environment(), text=True,
        capture_output=True, timeout=1100,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    errors = [line["end_point_error"] for line in read_history(tmp_path / "history.jsonl")]
    assert len(errors) == 5
    assert errors[-1] < 0.5 * errors[0]


def test_fine_tuning_from_bundled_weights_on_peoples_own_pairs(tmp_path: Path) -> None:
    rendering = RenderConfig(height=64, width=128, max_disparity=40)
    for index in range(4):
        sample = render_pair(rendering, index)
        for folder, picture in (("left", sample.left), ("right", sample.right)):
            (tmp_path / "pairs" / folder).mkdir(parents=True, exist_ok=True)
            write_picture(tmp_path / "pairs" / folder / f"{index}.png", picture)
        assert sample.disparity is not None
        (tmp_path / "pairs" / "disparity").mkdir(exist_ok=True)
        write_pfm(tmp_path / "pairs" / "disparity" / f"{index}.pfm", sample.disparity)
    arguments = [
        "experiment=finetune", "data.train.root=pairs", "data.validation.root=pairs", "data.workers=0",
        "data.augmentation.crop_height=64", "data.augmentation.crop_width=128", "model.max_disparity=64",
        "trainer.max_steps=2", "trainer.batch_size=2", "trainer.device=cpu", "output_dir=run",
    ]  # fmt: skip
    result = run(*arguments, folder=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "from small: loaded " in result.stdout
    assert "kept as initialised" not in result.stdout
    before = re.search(r"validation at step 0: end_point_error ([\d.]+)", result.stdout)
    assert before is not None
    assert float(before[1]) < 8  # a network that has learnt nothing is off by more than ten
    bundled, tuned = (
        load_model(path).state_dict() for path in (find_weights("small"), tmp_path / "run" / "weights.safetensors")
    )
    for name, tensor in bundled.items():
        if name.endswith(("running_mean", "running_var", "num_batches_tracked")):
            assert torch.equal(tuned[name], tensor), name  # batch norm is frozen
    assert any(not torch.equal(tuned[name], tensor) for name, tensor in bundled.items())


def test_results_go_to_a_folder_of_the_runs_own(pairs: Path, tmp_path: Path) -> None:
    arguments = [
        argument for argument in command_line(pairs, tmp_path, "trainer.max_steps=1") if "output_dir" not in argument
    ]
    result = run(*arguments, folder=tmp_path)
    assert result.returncode == 0, result.stderr
    folders = list((tmp_path / "runs" / "train").iterdir())
    assert len(folders) == 1
    assert {"last.pt", "metrics.json", "weights.safetensors"} <= {path.name for path in folders[0].iterdir()}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["runs"]


def test_a_sweep_trains_each(pairs: Path, tmp_path: Path) -> None:
    arguments = command_line(pairs, tmp_path / "sweep", "trainer.max_steps=1", "data.validation=null")
    result = run(*arguments, "-m", "attention=none,factorized", folder=tmp_path)
    assert result.returncode == 0, result.stderr
    kinds = [load_model(tmp_path / "sweep" / str(job) / "weights.safetensors").config.attention.kind for job in (0, 1)]
    assert kinds == ["none", "factorized"]


def test_peoples_own_experiments(pairs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "mine" / "experiment").mkdir(parents=True)
    experiment = tmp_path / "mine" / "experiment" / "short.yaml"
    experiment.write_text("# @package _global_\ntrainer:\n  max_steps: 1\n  ema_decay: 0.5\n")
    arguments = ["--config-dir", str(tmp_path / "mine"), "experiment=short", "--cfg", "job"]
    assert main(["train", *arguments]) == 0
    composed = yaml.safe_load(capsys.readouterr().out)
    assert (composed["trainer"]["max_steps"], composed["trainer"]["ema_decay"]) == (1, 0.5)

    experiment.write_text("# @package _global_\ntrainer:\n  maxsteps: 1\n")
    assert main(["train", *arguments]) == 2
    assert "'trainer.maxsteps': did you mean trainer.max_steps?" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["trainer.epoch=3"], "unknown configuration key 'trainer.epoch': did you mean trainer.epochs?"),
        (["model.atention.kind=none"], "unknown configuration key 'model.atention.kind'"),
        (["+data.train.rot=/x"], "unknown configuration key 'data.train.rot'"),
        (["batch=3"], "unknown configuration key 'batch'"),
        (["trainer.epochs=many"], "trainer.epochs: value 'many' of type 'str' could not be converted to Integer"),
        (["data.train.limit=[1,2]"], "data.train.limit: "),
        (["optimizer.kind=adan"], "optimizer.kind must be one of adam, adamw, sgd, got 'adan'"),
        (["trainer.batch_size=0"], "trainer.batch_size must be positive, got 0"),
        (["data.validation.resolution=tiny"], "data.validation.resolution must be one of None, quarter, "),
        (["model.attention.heads=0"], "model.attention.heads must be positive, got 0"),
        (["model.max_disparity=100"], "max_disparity must be a positive multiple of 16, got 100"),
        (["trainer.epochs=[1"], "'trainer.epochs=[1' cannot be read"),
        (["experiment"], "'experiment' is not of the form key=value"),
        (["experiment=qick"], "experiment=qick: there is no such option; experiment can be "),
        (
            ["model=psmnett"],
            "model=psmnett: there is no such option; model can be fa_psmnet, full, nonlocal, psmnet, small",
        ),
        (["optimizer=adan"], "optimizer=adan: there is no such option"),
        (["data.validation=null", "data.validation.kind=pairs"], "is null"),
        (["--config-dir", "/no/such/folder"], "/no/such/folder"),
        (["data=scene_flow"], "data.train.root must be given"),
        (["data=rendered", "data.also=[{kind: pairs}]"], "data.also.0.root must be given"),
        (["data.also=[{kind: pears}]"], "data.also.0.kind must be one of scene_flow, rendered, "),
        (["data.also=[{knd: pairs}]"], "unknown configuration key 'knd' in data.also: did you mean kind?"),
        (["data.also=[{limit: few}]"], "data.also: value 'few' of type 'str' could not be converted to Integer"),
        (["data.also=[pairs]"], "data.also must be a list of groups of keys, as [{kind: pairs, root: FOLDER}]"),
        (["data.also={kind: pairs}"], "data.also must be a list of groups of keys, as [{kind: pairs, root: FOLDER}]"),
        (["data=pairs", "data.train.root=/no/such/folder"], "/no/such/folder"),
        (
            ["data=rendered", "init_from=nothing.safetensors"],
            "nothing.safetensors: neither a checkpoint file nor bundled weights",
        ),
        (["-m", "trainer.seed=1,2", "trainer.epoch=3"], "unknown configuration key 'trainer.epoch'"),
        (["-m", "data=pairs", "seed=1,2"], "data.train.root must be given"),
    ],
)
def test_a_mistake_ends_in_one_sentence(
    arguments: list[str],
    sentence: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["train", *arguments]) == 2
    errors = capfd.readouterr().err.strip()
    assert sentence in errors
    assert errors.startswith("fa-stereo train: ")
    assert len(errors.splitlines()) == 1


def test_an_output_folder_that_cannot_be_written(
    pairs: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("in the way")
    (tmp_path / "run" / "train.log").mkdir(parents=True)  # where the log should go
    for folder, named in (("file/run", "file/run"), ("run", "run/train.log")):
        assert main(["train", *command_line(pairs, tmp_path / folder)]) == 2
        errors = capfd.readouterr().err.strip()
        assert f"{tmp_path / named}: cannot be written (" in errors
        assert errors.endswith("choose another folder with output_dir=FOLDER")
        assert len(errors.splitlines()) == 1


def test_training_that_cannot_go_on_is_exit_code_1(pairs: Path, tmp_path: Path) -> None:
    arguments = command_line(pairs, tmp_path / "run", "optimizer=sgd", "optimizer.learning_rate=1e38")
    result = run(*arguments, folder=tmp_path)
    assert result.returncode == 1, result.stdout
    assert "is not finite" in result.stderr
    assert "000" in result.stderr  # a pair's name
    assert "Traceback" not in result.stderr


def test_help_shows_groups_and_keys(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        main(["train", "--help"])
    assert left.value.code == 0
    text = capfd.readouterr().out
    assert "batch_size: 24" in text
    for group in ("model", "attention", "data", "optimizer", "schedule", "trainer", "experiment"):
        options = sorted(path.stem for path in (find_conf_dir() / group).glob("*.yaml"))
        assert f"\n{group}: {', '.join(options)}\n" in text
