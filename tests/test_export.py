"""From training checkpoints to weights that travel: their values, their size, their record, and what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from training_runs import tiny_config, write_pairs

from fa_stereo.cli.main import main
from fa_stereo.config import DataConfig, ModelConfig, from_plain
from fa_stereo.data import open_training_pairs
from fa_stereo.errors import InputError
from fa_stereo.export import export_weights, find_record, samples_seen, training_batches, without_paths
from fa_stereo.models.batch_norm import reestimate_batch_norm
from fa_stereo.models.checkpoint import load_model, read_record, read_torch_file, save_weights
from fa_stereo.models.psmnet import build_model
from fa_stereo.training import Trainer

STATISTICS = ("running_mean", "running_var")


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pairs(tmp_path_factory.mktemp("export") / "pairs")


@pytest.fixture(scope="module")
def run(pairs: Path) -> Path:
    """The folder of a run of six steps that averaged its weights and was resumed once."""
    folder = pairs.parent / "run"
    for steps in (3, 6):
        config = tiny_config(
            pairs, folder, trainer__ema_decay=0.5, trainer__max_steps=steps, trainer__validate_every_steps=2,
            trainer__init_from=None, data__validation={"kind": "pairs", "root": str(pairs)},
        )  # fmt: skip
        Trainer(config).run()
    return folder


def test_the_averaged_weights_in_half_precision(run: Path, tmp_path: Path) -> None:
    export_weights(run, tmp_path / "half.safetensors")
    state = read_torch_file(run / "last.pt")
    assert any(not torch.equal(state["model"][name], state["ema"][name]) for name in state["ema"])
    with safe_open(tmp_path / "half.safetensors", framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    assert tensors.keys() == state["ema"].keys()
    for name, tensor in tensors.items():
        assert torch.equal(tensor, state["ema"][name].to(tensor.dtype)), name
        kind = (
            (torch.int64, torch.float32)[tensor.dim()] if tensor.dim() < 2 else torch.float16
        )  # the first: batch norm
        assert tensor.dtype == kind, name
    export_weights(run / "last.pt", tmp_path / "single.safetensors", dtype=torch.float32)
    assert all(
        torch.equal(tensor, state["ema"][name])
        for name, tensor in load_model(tmp_path / "single.safetensors").state_dict().items()
    )
    assert (tmp_path / "half.safetensors").stat().st_size < (tmp_path / "single.safetensors").stat().st_size


def test_how_the_weights_predict_is_chosen_at_export(run: Path, tmp_path: Path) -> None:
    for chosen, regression in ((None, "expectation"), ("modal", "modal")):
        export_weights(run, tmp_path / "w.safetensors", regression=chosen)
        assert load_model(tmp_path / "w.safetensors").config.regression == regression
    options = ["--regression", "modal", "--padding", "replicate", "--halve-from", "90000", "--enlarge-below", "300000"]
    assert main(["export-weights", str(run), "-o", str(tmp_path / "v.safetensors"), *options]) == 0
    chosen = load_model(tmp_path / "v.safetensors").config
    assert (chosen.regression, chosen.padding, chosen.enlarge_below_px) == ("modal", "replicate", 300_000)
    assert chosen.halve_from_px == 90_000
    record = export_weights(tmp_path / "v.safetensors", tmp_path / "u.safetensors", enlarge_below_px=0)
    assert (record["regression"], record["padding"], record["enlarge_below_px"]) == ("modal", "replicate", 0)
    again = load_model(tmp_path / "u.safetensors").config
    assert (again.regression, again.padding, again.enlarge_below_px) == ("modal", "replicate", 0)
    assert again.halve_from_px == 90_000
    # however they predict, they are the same network, and can be averaged
    export_weights(run, tmp_path / "t.safetensors", average_with=[tmp_path / "v.safetensors"])
    assert load_model(tmp_path / "t.safetensors").config.padding == "zeros"


def test_the_mean_with_other_weights(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    single = {"dtype": torch.float32}
    export_weights(run / "last.pt", tmp_path / "a.safetensors", **single)
    other = load_model(tmp_path / "a.safetensors")
    for parameter in other.parameters():
        parameter.data += 2.0
    save_weights(other, tmp_path / "b.safetensors", {"steps": 9, "samples_seen_in_all": 70, "validation": {"d1": 3}})
    record = export_weights(run, tmp_path / "c.safetensors", average_with=[tmp_path / "b.safetensors"], **single)
    assert record["averaged_with"] == [{"steps": 9, "samples_seen_in_all": 70}]
    files = [str(tmp_path / f"{name}.safetensors") for name in "abc"]
    assert main(["export-weights", str(run), "-o", files[2].replace("c.", "e."), "--precision", "fp32",
                 "--average-with", str(run), "--average-with", files[1], "--average-with", files[1]]) == 0  # fmt: skip
    assert len(read_record(tmp_path / "e.safetensors")["averaged_with"]) == 3
    first, mean, of_four = (dict(load_model(tmp_path / f"{name}.safetensors").named_parameters()) for name in "ace")
    for name, parameter in first.items():
        torch.testing.assert_close(mean[name], parameter + 1.0, msg=name)
        torch.testing.assert_close(of_four[name], parameter + 1.0, msg=name)
    # weights are averaged as runs are, and keep their record
    record = export_weights(files[1], tmp_path / "f.safetensors", average_with=[files[0]], **single)
    assert (record["steps"], record["averaged_with"][0]["steps"]) == (9, 6)
    again = dict(load_model(tmp_path / "f.safetensors").named_parameters())
    assert record["validation"] == {}  # it was the run's
    record = export_weights(tmp_path / "f.safetensors", tmp_path / "g.safetensors", average_with=[files[2]], **single)
    assert record["averaged_before"]["averaged_with"][0]["steps"] == 6  # nothing that is in it is forgotten
    assert record["averaged_with"][0]["averaged_with"][0]["steps"] == 9
    assert all(torch.equal(again[name], parameter) for name, parameter in mean.items())
    save_weights(build_model(ModelConfig(base_channels=8, max_disparity=16)), tmp_path / "wide.safetensors")
    for wrong in (str(tmp_path / "wide.safetensors"), "small"):
        assert main(["export-weights", str(run), "-o", str(tmp_path / "d.safetensors"), "--average-with", wrong]) == 2
        assert f"{wrong}: cannot be averaged with these weights" in capsys.readouterr().err
    (tmp_path / "no_run").mkdir()
    with pytest.raises(InputError, match=r"no_run/last\.pt: no such checkpoint: name the folder of a run"):
        export_weights(run, tmp_path / "d.safetensors", average_with=[tmp_path / "no_run"])
    assert not (tmp_path / "d.safetensors").exists()


def test_the_file_describes_itself(run: Path, pairs: Path, tmp_path: Path) -> None:
    returned = export_weights(run, tmp_path / "w.safetensors", notes={"licence": "MIT"})
    record = read_record(tmp_path / "w.safetensors")
    assert record == json.loads(json.dumps(returned))
    assert load_model(tmp_path / "w.safetensors").config.base_channels == 4
    assert (record["steps"], record["samples_seen"], record["training_pairs"], record["epochs"]) == (6, 24, 6, 4)
    assert (record["precision"], record["averaged"], record["licence"]) == ("fp32", True, "MIT")
    assert record["hours"] > 0
    assert len(record["machines"]) == 1  # the same before and after it was resumed
    assert [line[0] for line in record["validation_curve"]] == [2, 3, 4, 6]
    assert record["validation_curve"][-1][1] == record["validation"]["end_point_error"]
    assert record["training"]["optimizer.learning_rate"] == 2e-3
    assert not [key for key in record["training"] if ".rendered." in key]  # the pairs are on disk
    assert (record["samples_seen_in_all"], record["rendered_pairs"], record["started_from"]) == (24, None, None)
    assert str(pairs.parent) not in json.dumps(record)  # folders are nobody's business
    # the run's own last weights have the same record
    assert {**read_record(run / "weights.safetensors"), "hours": 0} == {**find_record(run / "last.pt"), "hours": 0}


def test_what_the_weights_started_from_is_on_record(run: Path, pairs: Path, tmp_path: Path) -> None:
    for number, start in enumerate((run / "weights.safetensors", run / "last.pt")):
        folder = tmp_path / str(number)
        Trainer(tiny_config(pairs, folder, trainer__max_steps=1, trainer__init_from=str(start))).run()
        record = export_weights(folder, tmp_path / "w.safetensors")
        assert record["steps"] == 1
        assert record["started_from"]["steps"] == 6
        assert record["samples_seen_in_all"] == 24 + record["samples_seen"]
        assert record["started_from"]["validation"] == find_record(start)["validation"]


def test_how_pairs_on_disk_were_rendered_is_on_record(tmp_path: Path) -> None:
    assert main(["render", str(tmp_path), "--samples", "2", "--height", "32", "--width", "64", "--seed", "5",
                 "--max-disparity", "16", "--option", "thin=0.5"]) == 0  # fmt: skip
    config = tiny_config(tmp_path, tmp_path / "run", data__train={"kind": "scene_flow", "root": str(tmp_path), "split":
                         "train", "scene_flow": {"sets": ["flyingthings3d"]}}, trainer__max_steps=1)  # fmt: skip
    Trainer(config).run()
    (tmp_path / "rendered_train.json").unlink()  # what lies there later is another matter
    rendered = find_record(tmp_path / "run" / "last.pt")["rendered_pairs"]
    assert (rendered["seed"], rendered["thin"], rendered["height"]) == (5, 0.5, 32)
    (tmp_path / "rendered_train.json").write_text("{")
    with pytest.raises(InputError, match=r"rendered_train\.json: not the record of a rendered set"):
        Trainer(config)
    rendered_on_the_fly = {"data": {"train": {"kind": "rendered", "rendered": {"seed": 3}, "scene_flow": {"sets": []}}}}
    assert without_paths(rendered_on_the_fly) == {"data.train.kind": "rendered", "data.train.rendered.seed": 3}


def test_a_run_trains_on_several_sources(pairs: Path, tmp_path: Path) -> None:
    rendered = tmp_path / "rendered"
    assert main(["render", str(rendered), "--samples", "3", "--height", "32", "--width", "64", "--max-disparity",
                 "16"]) == 0  # fmt: skip
    also = [
        {"kind": "scene_flow", "root": str(rendered), "scene_flow": {"sets": ["flyingthings3d"]}},
        {"kind": "rendered", "rendered": {"height": 32, "width": 64, "samples": 2, "seed": 9, "max_disparity": 16}},
    ]
    config = tiny_config(pairs, tmp_path / "run", data__also=also, trainer__max_steps=3)
    trainer = Trainer(config)
    names = [sample.name for sample in open_training_pairs(config.data)]
    assert len(names) == trainer.stream.samples == 6 + 3 + 2
    assert names[-2:] == ["rendered/9/000000", "rendered/9/000001"]
    trained = set()
    transform = trainer.stream.transform
    trainer.stream.transform = lambda sample, rng: trained.add(sample.name) or transform(sample, rng)
    trainer.run()  # 12 samples
    assert trained == set(names)
    record = export_weights(tmp_path / "run", tmp_path / "w.safetensors", batch_norm_pairs=11)
    assert record["training_pairs"] == 11
    assert [settings and settings["height"] for settings in record["rendered_pairs"]] == [None, 32, None]
    assert record["training"]["data.also.1.rendered.seed"] == 9
    assert not [key for key in record["training"] if key.endswith("root") or key.startswith("data.also.0.rendered")]
    with pytest.raises(InputError, match=r"the run had several sources \(data\.also\)"):
        export_weights(tmp_path / "run", tmp_path / "w.safetensors", batch_norm_pairs=1, data_root=str(pairs))
    flipped = tiny_config(pairs, tmp_path / "run", data__also=also, data__augmentation__horizontal_flip=0.5)
    flipped.data.train = flipped.data.also[1]
    with pytest.raises(InputError, match=r"data\.also\.0: .*horizontal_flip.*data\.also\.0\.scene_flow\.right_disp"):
        Trainer(flipped)
    with pytest.raises(InputError, match=r"data\.also\.0: .*nowhere: no such folder"):
        Trainer(tiny_config(pairs, tmp_path / "run", data__also=[{"kind": "pairs", "root": str(tmp_path / "nowhere")}]))


def test_samples_seen_in_all() -> None:
    first = {"samples_seen": 5, "started_from": None}
    assert samples_seen(None) == 0
    assert samples_seen({"samples_seen": 7, "started_from": first}) == 12
    assert samples_seen({"samples_seen": 7, "started_from": {}}) is None  # from a file that says nothing


def test_batch_norm_is_estimated_anew_over_the_runs_own_data(run: Path, tmp_path: Path) -> None:
    record = export_weights(run, tmp_path / "w.safetensors", batch_norm_pairs=5, batch_size=3)
    assert record["batch_norm_pairs"] == 6  # whole batches
    before, after = load_model(run / "last.pt"), load_model(tmp_path / "w.safetensors").state_dict()
    config = read_torch_file(run / "last.pt")["config"]
    data = from_plain(DataConfig, config["data"])
    assert data.augmentation.color == 1  # pairs are augmented as in training
    expected = load_model(run / "last.pt")
    reestimate_batch_norm(expected, training_batches(data, config["trainer"]["seed"], 5, 3))
    for name, tensor in expected.state_dict().items():
        if name.endswith(STATISTICS):
            assert not torch.equal(after[name], before.state_dict()[name]), name
            torch.testing.assert_close(after[name], tensor, rtol=1e-4, atol=1e-5)


def test_data_that_has_moved(run: Path, pairs: Path, tmp_path: Path) -> None:
    moved = tmp_path / "moved"
    state = read_torch_file(run / "last.pt")
    state["config"]["data"]["train"]["root"] = str(tmp_path / "gone")
    torch.save(state, tmp_path / "last.pt")
    with pytest.raises(InputError, match="gone: no such folder"):
        export_weights(tmp_path, tmp_path / "w.safetensors", batch_norm_pairs=2, batch_size=2)
    moved.symlink_to(pairs)
    export_weights(tmp_path, tmp_path / "w.safetensors", batch_norm_pairs=2, batch_size=2, data_root=str(moved))


def test_the_command(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "w.safetensors"
    arguments = ["--reestimate-batch-norm", "2", "--batch-size", "2", "--workers", "0", "--device", "cpu"]
    notes = ["--note", "hours=9.5", "--note", "data=pairs rendered here"]
    assert main(["export-weights", str(run), "-o", str(out), *arguments, *notes]) == 0
    printed = capsys.readouterr().out
    for line in ("samples_seen: 24", "hours: 9.5", "validation_curve: 4 validations", "started_from: not known"):
        assert line in printed
    record = read_record(out)
    assert (record["hours"], record["data"], record["batch_norm_pairs"]) == (9.5, "pairs rendered here", 2)


def test_what_cannot_be_exported_is_refused_in_one_sentence(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    state = read_torch_file(run / "last.pt")
    torch.save({"model_config": state["model_config"], "model": state["model"]}, tmp_path / "bare.pt")
    torch.save({**state, "ema": {name: 1e6 * tensor for name, tensor in state["ema"].items()}}, tmp_path / "large.pt")
    torch.save({**state, "config": {**state["config"], "data": {"train": {"kin": "pairs"}}}}, tmp_path / "other.pt")
    (tmp_path / "file").write_text("in the way")
    data = {"train": {"kind": "rendered"}}
    torch.save({**state, "config": {**state["config"], "data": data}}, tmp_path / "rendered.pt")
    out = str(tmp_path / "w.safetensors")
    for arguments, said in (
        ([str(run), "-o", str(tmp_path / "w.pt")], "w.pt: name the output *.safetensors"),
        ([str(tmp_path), "-o", out], f"{tmp_path / 'last.pt'}: no such checkpoint: name the folder of a run"),
        ([str(tmp_path / "nowhere.pt"), "-o", out], "nowhere.pt: no such checkpoint file"),
        (
            [str(run / "weights.safetensors"), "-o", out, "--reestimate-batch-norm", "1"],
            "weights.safetensors: weights alone, which do not know their training data: ",
        ),
        ([str(tmp_path / "bare.pt"), "-o", out], "bare.pt: not a training checkpoint (no 'config')"),
        ([str(tmp_path / "large.pt"), "-o", out], "is not finite in torch.float16; choose another precision"),
        (
            [str(tmp_path / "other.pt"), "-o", out, "--reestimate-batch-norm", "1"],
            "other.pt: data.train.kin'; known here: ",
        ),
        ([str(run), "-o", str(tmp_path / "file" / "w.safetensors")], "w.safetensors: cannot be written ("),
        ([str(run), "-o", out, "--note", "hours"], "--note hours: write it as KEY=VALUE"),
        ([str(run), "-o", out, "--reestimate-batch-norm", "-1"], "--reestimate-batch-norm must be zero or more"),
        ([str(run), "-o", out, "--batch-size", "0"], "--batch-size must be positive"),
        (
            [str(run), "-o", out, "--data-root", "x"],
            "x: the data is needed for --reestimate-batch-norm alone",
        ),
        (
            [str(tmp_path / "rendered.pt"), "-o", out, "--data-root", "x", "--reestimate-batch-norm", "1"],
            "--data-root x: the run's pairs are rendered",
        ),
    ):
        assert main(["export-weights", *arguments]) == 2, arguments
        message = capsys.readouterr().err.strip()
        assert said in message, message
        assert len(message.splitlines()) == 1
        assert not Path(out).exists()


@pytest.mark.parametrize(
    "note", ["validation=3", 'validation={"d1": "good"}', "training=hi", "validation_curve=none", "started_from=[1]"]
)
def test_notes_may_say_anything_of_what_the_record_has(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], note: str
) -> None:
    assert main(["export-weights", str(run), "-o", str(tmp_path / "w.safetensors"), "--note", note]) == 0
    key, _, value = note.partition("=")
    told = {"started_from": "1 entries", "validation": "d1 good" if "good" in note else value}.get(key, value)
    assert f"  {key}: {told}\n" in capsys.readouterr().out


def test_a_run_may_be_called_as_bundled_weights(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert export_weights("small", tmp_path / "w.safetensors")["steps"] > 6  # the bundled ones
    shutil.copytree(run, tmp_path / "small")
    assert export_weights("small", tmp_path / "w.safetensors")["steps"] == 6
