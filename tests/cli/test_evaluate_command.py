"""``fa-stereo evaluate`` as a person calls it: processes, files, messages."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from random_networks import calibrated
from torch import Tensor

from fa_stereo.cli.evaluate import PictureWriter, deviations, repeat_in_full
from fa_stereo.cli.hydra_entry import run_hydra
from fa_stereo.cli.main import main
from fa_stereo.comparison import compare
from fa_stereo.config import DATASET_KINDS, DatasetConfig, EvaluateConfig, ModelConfig, ProtocolConfig, SceneFlowConfig
from fa_stereo.data.formats import read_picture, write_pfm
from fa_stereo.errors import InputError
from fa_stereo.evaluation import EvaluatedImage
from fa_stereo.metrics import ErrorSums, ImageErrors
from fa_stereo.models.checkpoint import save_weights
from fa_stereo.models.psmnet import build_model

FRAMES = 5


@pytest.fixture(scope="module")
def scene_flow(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five tiny test frames in both passes, in the official layout."""
    root = tmp_path_factory.mktemp("scene_flow")
    base = root / "FlyingThings3D"
    rng = np.random.default_rng(0)
    for frame in range(FRAMES):
        wide = rng.integers(0, 256, (32, 60, 3), np.uint8)
        shift = 2 + frame
        for pass_name, gain in (("clean", 1.0), ("final", 0.5)):
            for view, start in (("left", 0), ("right", shift)):
                folder = base / f"frames_{pass_name}pass" / "TEST" / "A" / f"{frame:04d}" / view
                folder.mkdir(parents=True)
                picture = (wide[:, start : start + 48] * gain).astype(np.uint8)
                Image.fromarray(picture).save(folder / "0006.png")
        disparity = base / "disparity" / "TEST" / "A" / f"{frame:04d}" / "left"
        disparity.mkdir(parents=True)
        write_pfm(disparity / "0006.pfm", np.full((32, 48), shift, np.float32))
    return root


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("weights") / "tiny.safetensors"
    save_weights(build_model(ModelConfig(base_channels=8, max_disparity=16)), path)
    return path


def run_command(repository: Path, *arguments: object, processes: int = 0) -> subprocess.CompletedProcess[str]:
    start = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"] if processes else []
    command = [sys.executable, *start, str(repository / "scripts" / "evaluate.py"), *map(str, arguments)]
    environment = {**os.environ, "PYTHONPATH": str(repository), "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment, check=False)


def test_what_is_not_finite_is_computed_again(capsys: pytest.CaptureFixture[str]) -> None:
    built: list[int] = []

    def build() -> Callable[[Tensor, Tensor], Tensor]:
        built.append(1)
        return lambda left, right: torch.full((1, 4, 4), 7.0)

    predict = repeat_in_full(lambda left, right: left / right, build)
    ones, zeros = torch.ones(1, 4, 4), torch.zeros(1, 4, 4)
    assert torch.equal(predict(ones, ones), ones)
    assert not built
    for _ in range(2):
        assert torch.equal(predict(ones, zeros), torch.full((1, 4, 4), 7.0))
    assert built == [1]
    assert capsys.readouterr().err.count("computed again in fp32") == 1


def data_of(scene_flow: Path) -> list[str]:
    return ["dataset=scene_flow", f"dataset.root={scene_flow}", "dataset.scene_flow.cache_index=false"]


def test_one_process_and_two_write_the_same_files(
    repository: Path, scene_flow: Path, weights: Path, tmp_path: Path
) -> None:
    arguments = [f"checkpoint={weights}", *data_of(scene_flow), "protocol=psmnet", "workers=0", "device=cpu"]
    arguments.append("confidence=true")
    alone = run_command(repository, *arguments, f"output_dir={tmp_path / 'one'}")
    assert alone.returncode == 0, alone.stderr
    assert "tiny.safetensors (fp32 on cpu) on scene_flow" in alone.stdout
    assert "(test split, clean pass)" in alone.stdout
    assert "protocol psmnet: d < 192 px, EPE and outliers averaged over batches of 8" in alone.stdout
    assert "departs from it: the data set has 5 images, the protocol's 4,370" in alone.stdout
    assert f"5 images, {5 * 32 * 48:,} valid pixels" in alone.stdout
    pictures = ["worst=2", "contact_sheet=3"]
    shared = run_command(repository, *arguments, *pictures, f"output_dir={tmp_path / 'two'}", processes=2)
    assert shared.returncode == 0, shared.stderr
    assert shared.stdout.count("protocol psmnet") == 1
    for name in ("metrics.json", "per_image.csv"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
    assert len(list((tmp_path / "two" / "worst").iterdir())) == 2
    assert read_picture(tmp_path / "two" / "contact_sheet.png").shape[0] > 3 * 213  # of both processes
    stored = json.loads((tmp_path / "one" / "metrics.json").read_text())
    assert stored["protocol"]["name"] == "psmnet"
    assert stored["source"]["checkpoint"] == str(weights)
    assert stored["source"]["dataset"]["scene_flow"]["passes"] == "clean"
    # fewer than 8 images: one batch, which is all pixels
    assert stored["metrics"] == stored["averages"]["all"]["pixel"]
    every = stored["confidence"]["thresholds"][0]
    assert every == pytest.approx({"from": 0, "kept": 100, **{name: stored["metrics"][name] for name in
                                   ("end_point_error", "bad_1", "bad_3")}})  # fmt: skip
    assert "\nconfidence       kept %     EPE px    bad-1 %    bad-3 %   over all pixels\nall " in alone.stdout
    assert "area under bad-3 over the share kept: " in alone.stdout


def test_another_regression(scene_flow: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    weights = tmp_path / "calibrated.safetensors"
    save_weights(calibrated(), weights)
    errors = {}
    for regression in ("null", "expectation", "modal"):
        options = [f"checkpoint={weights}", *data_of(scene_flow), "workers=0", "device=cpu", "max_images=1"]
        output = tmp_path / regression
        assert main(["evaluate", *options, f"regression={regression}", f"output_dir={output}"]) == 0
        stored = json.loads((output / "metrics.json").read_text())
        assert stored["source"]["regression"] == ("modal" if regression == "modal" else "expectation")
        errors[regression] = stored["metrics"]["end_point_error"]
    assert errors["null"] == errors["expectation"] != errors["modal"]
    assert "calibrated.safetensors (modal regression, fp32 on cpu) on scene_flow" in capsys.readouterr().out
    assert main(["evaluate", *options, "regression=mode", f"output_dir={tmp_path / 'no'}"]) == 2
    assert "regression must be one of None, expectation, modal, got 'mode'" in capsys.readouterr().err


def test_other_padding_and_sizes(scene_flow: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = calibrated()
    model.set_prediction(padding="replicate", halve_from_px=1000, enlarge_below_px=2000)
    weights = tmp_path / "small.safetensors"
    save_weights(model, weights)
    common = [f"checkpoint={weights}", *data_of(scene_flow), "workers=0", "device=cpu", "max_images=1"]
    cropped = "+protocol.crop=[30,40]"  # no multiple of 16
    said = {
        "own": (["protocol=default"], "replicate", 2000),
        "psmnet": (["protocol=psmnet"], "zeros", 2000),
        "zeros": (["protocol=default", "padding=zeros"], "zeros", 2000),
        "one_size": (["protocol=default", "enlarge_below_px=0"], "replicate", 0),
        "unhalved": (["protocol=default", "halve_from_px=0"], "replicate", 2000),
        "forced": (["protocol=psmnet", "padding=replicate"], "replicate", 2000),
    }
    errors = {}
    for name, (options, padding, limit) in said.items():
        options = [*options, cropped.removeprefix("+")]
        assert main(["evaluate", *common, *options, f"output_dir={tmp_path / name}"]) == 0
        stored = json.loads((tmp_path / name / "metrics.json").read_text())
        assert (stored["source"]["padding"], stored["source"]["enlarge_below_px"]) == (padding, limit)
        errors[name] = stored["averages"]["all"]["image"]["end_point_error"]
        out = capsys.readouterr().out
        assert ("padded with the border" in out) == (padding == "replicate")
        assert ("pictures below 0.002 megapixels at two sizes" in out) == (limit > 0)
        assert ("from 0.001 megapixels at half the size too" in out) == (name != "unhalved")
        assert ("departs from it: padding is replicate, not top_right_zeros" in out) == (name == "forced")
    assert errors["psmnet"] == errors["zeros"]
    assert errors["forced"] == errors["own"]
    assert len({errors[name] for name in ("own", "zeros", "one_size", "unhalved")}) == 4
    assert (
        main(["evaluate", *data_of(scene_flow), "method=sgbm", "padding=zeros", f"output_dir={tmp_path / 'no'}"]) == 2
    )
    assert "method=sgbm is no network, which padding=zeros is for: leave it out" in capsys.readouterr().err


def test_another_range_and_bands_of_rows(
    scene_flow: Path, weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    errors = {}
    for name, options in {"whole": [], "bands": ["tile=16"], "far": ["max_disparity=64"]}.items():
        common = [f"checkpoint={weights}", *data_of(scene_flow), "workers=0", "device=cpu", "max_images=1"]
        assert main(["evaluate", *common, *options, f"output_dir={tmp_path / name}"]) == 0
        stored = json.loads((tmp_path / name / "metrics.json").read_text())
        errors[name] = stored["metrics"]["end_point_error"]
        assert (stored["source"]["max_disparity"] == 64) == (name == "far")
        assert stored["source"].get("tile") == (16 if name == "bands" else None)
        how = {"whole": "", "bands": "bands of 16 rows, ", "far": "searching 64 px, "}[name]
        assert f"tiny.safetensors ({how}fp32 on cpu) on scene_flow" in capsys.readouterr().out
    # Of pictures this small each band sees all of it.
    assert errors["bands"] == pytest.approx(errors["whole"], abs=1e-4)
    assert abs(errors["far"] - errors["whole"]) > 0.1


def test_paths_may_begin_at_home(
    scene_flow: Path, weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(weights.parent))
    options = [f'checkpoint="~/{weights.name}"', *data_of(scene_flow), "workers=0", "device=cpu", "max_images=1"]
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert main(["evaluate", *options, 'output_dir="~/results"']) == 0
    assert (weights.parent / "results" / "metrics.json").is_file()
    assert not list((tmp_path / "elsewhere").iterdir())


def test_sgbm_pictures_and_comparison(repository: Path, scene_flow: Path, tmp_path: Path) -> None:
    runs = {}
    for protocol in ("default", "igev"):
        runs[protocol] = tmp_path / protocol
        done = run_command(
            repository, "method=sgbm", *data_of(scene_flow), f"protocol={protocol}", "error_maps=true", "worst=3",
            "contact_sheet=2",
            f"output_dir={runs[protocol]}", "protocol.min_disparity=null", "workers=0",
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
    assert "OpenCV's SGBM on scene_flow" in done.stdout
    assert "final pass" in done.stdout  # the protocol's
    stored = json.loads((runs["default"] / "metrics.json").read_text())
    assert stored["notes"][0] == "min_disparity is None, not 0.0"
    assert stored["source"]["method"] == "sgbm"
    assert stored["metrics"]["end_point_error"] < 1  # the frames are shifted noise
    names = {path.relative_to(runs["igev"]).as_posix() for path in runs["igev"].rglob("*.png")}
    assert {f"error_maps/TEST/A/{frame:04d}/left/0006.png" for frame in range(FRAMES)} <= names
    worst = sorted(name for name in names if name.startswith("worst/"))
    assert [name[6:10] for name in worst] == ["001_", "002_", "003_"]
    with (runs["igev"] / "per_image.csv").open() as file:
        rows = sorted(csv.DictReader(file), key=lambda row: -float(row["end_point_error"]))
    assert rows[0]["name"].replace("/", "_") in worst[0]
    with Image.open(runs["igev"] / "error_maps/TEST/A/0002/left/0006.png") as picture:
        assert picture.size == (48, 32)
    sheet = read_picture(runs["igev"] / "contact_sheet.png")
    assert sheet.shape[1] > 4 * 320  # left, ground truth, prediction, error
    assert 2 * 213 < sheet.shape[0] < 3 * 213 + 200  # two rows of 320x213, and the legend

    done = run_command(repository, "compare", runs["default"], runs["igev"], "--samples", 200, "--metric", "bad_1")
    assert done.returncode == 0, done.stderr
    assert "bad_1, mean over 5 images" in done.stdout
    assert "95 % interval" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["protocol=psmnett"], "psmnet"),
        (["protocol.averaging=median"], "protocol.averaging must be one of pixel, image, batch, got 'median'"),
        (["protocol.max_disparty=100"], "did you mean protocol.max_disparity?"),
        (["method=sgbm", "checkpoint=x"], "method=sgbm has no weights"),
        (["method=sgbm", "confidence=true"], "method=sgbm has no confidence"),
        (["method=sgbm", "tile=16"], "method=sgbm computes whole pictures"),
        (["method=sgbm", "regression=modal"], "method=sgbm is no network, which regression=modal is for: leave it out"),
        (["method=sgbm", "precision=bf16"], "method=sgbm computes in integers: leave out precision=bf16"),
        (["tile=20"], "tile must be a positive multiple of 16, got 20"),
        (["max_disparity=0"], "max_disparity must be a positive multiple of 16, got 0"),
        (["dataset=kitti2015", "dataset.root=/nowhere/kitti"], "/nowhere/kitti"),
        (["dataset=kitti2015"], "dataset.root"),
        (
            ["dataset=middlebury2006", "dataset.root=/data", "dataset.resolution=tiny"],
            "dataset.resolution must be one of None, quarter, third, half, full, got 'tiny'",
        ),
        (["dataset=rendered", "dataset.rendered.height=8"], "dataset.rendered.height must be at least 16 pixels"),
        (["checkpoint=/nowhere/best.pt", "dataset=rendered"], "/nowhere/best.pt: "),
        (["compare", "/nowhere/a", "/nowhere/b"], "/nowhere/a/metrics.json: no such file"),
    ],
)
def test_mistakes_are_answered_in_one_sentence(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, arguments: list[str], message: str
) -> None:
    if arguments[0] != "compare":
        arguments = [*arguments, f"output_dir={tmp_path}"]
    assert main(["evaluate", *arguments]) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert len(captured.err.strip().splitlines()) == 1


def test_an_output_folder_that_cannot_be_written(
    capsys: pytest.CaptureFixture[str], scene_flow: Path, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("in the way")
    folder = tmp_path / "file" / "run"
    assert main(["evaluate", "method=sgbm", *data_of(scene_flow), f"output_dir={folder}"]) == 2
    assert f"{folder}: cannot be written (" in capsys.readouterr().err


def test_help_tells_the_keys_and_groups(repository: Path) -> None:
    done = run_command(repository, "--help")
    assert done.returncode == 0
    for word in ("protocol", "selective_igev", "middlebury2006", "error_maps", "evaluate compare"):
        assert word in done.stdout
    for group in ("dataset", "protocol"):  # the others belong to training
        options = sorted(path.stem for path in (repository / "conf" / group).glob("*.yaml"))
        assert f"\n{group}: {', '.join(options)}\n" in done.stdout
    assert "optimizer" not in done.stdout
    assert " 95 % bootstrap" in " ".join(run_command(repository, "compare", "--help").stdout.split())


# --------------------------------------------------------------------------------------------------------- in process


def compose(tmp_path: Path, *overrides: str) -> EvaluateConfig:
    composed: list[EvaluateConfig] = []

    def keep(config: EvaluateConfig) -> int:
        composed.append(config)
        return 0

    assert run_hydra([*overrides, f"output_dir={tmp_path}"], "evaluate", EvaluateConfig, keep) == 0
    return composed[0]


@pytest.mark.parametrize("name", DATASET_KINDS)
def test_every_kind_of_data_set_can_be_named(tmp_path: Path, name: str) -> None:
    config = compose(tmp_path, f"dataset={name}", "dataset.root=/data")
    assert config.dataset.kind == name
    assert config.protocol.name == "default"
    assert config.output_dir == str(tmp_path)


@pytest.mark.parametrize(
    "name", ["psmnet", "gwcnet", "openstereo", "raft", "igev", "selective_igev", "igev_plus", "unimatch"]
)
def test_the_protocol_chooses_the_pass_unless_it_is_said(tmp_path: Path, name: str) -> None:
    arguments = ["dataset=scene_flow", "dataset.root=/data", f"protocol={name}"]
    config = compose(tmp_path, *arguments)
    assert config.protocol.name == name
    assert config.dataset.split == "test"
    assert config.dataset.scene_flow.passes == config.protocol.passes == ("clean" if name == "psmnet" else "final")
    assert deviations(config) == []
    other = "final" if name == "psmnet" else "clean"
    config = compose(tmp_path, *arguments, f"dataset.scene_flow.passes={other}")
    assert deviations(config) == [f"the pass is {other}, not {config.protocol.passes}"]


def config_of(**changes: object) -> EvaluateConfig:
    values: dict[str, object] = {
        "protocol": ProtocolConfig(
            name="psmnet",
            expected_images=4370,
            padding="top_right_zeros",
            min_disparity=None,
            averaging="batch",
            empty="zero",
        ),
        "dataset": DatasetConfig("scene_flow", "/data", "test"),
    }
    return EvaluateConfig(**(values | changes))  # type: ignore[arg-type]


def test_no_deviation() -> None:
    assert deviations(config_of()) == []


def test_every_deviation_is_told() -> None:
    data = DatasetConfig(
        "scene_flow", "/data", "train", limit=7, scene_flow=SceneFlowConfig(passes="final", unused_files="unused.txt")
    )
    assert deviations(config_of(dataset=data)) == [
        "the pass is final, not clean",
        "the frames are those of split train, not test",
        "the frames listed in unused.txt are left out",
        "the data set is limited to its first 7 images",
    ]
    notes = deviations(config_of(protocol=ProtocolConfig(name="psmnet", min_disparity=None, max_disparity=96)))
    assert "max_disparity is 96, not 192" in notes
    assert "averaging is image, not batch" in notes
    assert deviations(config_of(protocol=ProtocolConfig(name="my own"))) == []


@pytest.mark.skipif(sys.platform != "linux", reason="names of files are text there")
def test_names_that_are_no_text_and_pictures_of_before(tmp_path: Path) -> None:
    data = tmp_path / "data"
    rng = np.random.default_rng(0)
    for index in range(3):
        wide = rng.integers(0, 256, (32, 60 + index, 3), np.uint8)
        name = os.fsdecode(b"caf\xe9%d" % index)
        for folder, picture in (("left", wide[:, : 48 + index]), ("right", wide[:, 4 : 52 + index])):
            (data / folder).mkdir(parents=True, exist_ok=True)
            Image.fromarray(picture).save(data / folder / f"{name}.png")
        (data / "disparity").mkdir(exist_ok=True)
        write_pfm(data / "disparity" / f"{name}.pfm", np.full((32, 48 + index), 4, np.float32))
    out = tmp_path / "out"
    command = [sys.executable, "-m", "fa_stereo.cli.main", "evaluate", "dataset=pairs", f"dataset.root={data}",
               "method=sgbm", "workers=0", f"output_dir={out}"]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONIOENCODING": "utf-8:strict"}
    for worst in (3, 1):
        done = subprocess.run(
            [*command, f"worst={worst}"], capture_output=True, timeout=300, env=environment, check=False
        )
        assert done.returncode == 0, done.stderr
        assert len(list((out / "worst").iterdir())) == worst
    assert compare(out, out).images == 3


def test_names_do_not_lead_out_of_the_folder(tmp_path: Path) -> None:
    flat = np.zeros((4, 4), np.float32)
    picture = np.zeros((4, 4, 3), np.uint8)
    errors = ImageErrors(0, "/../../escape", 4, 4, {"all": ErrorSums()})
    PictureWriter(tmp_path / "out", error_maps=True, worst=0)(
        EvaluatedImage(picture, picture, flat, flat, flat == 0, errors)
    )
    assert [path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*.png")] == ["out/error_maps/escape.png"]


@pytest.mark.parametrize(
    "wrong", [{"method": "magic"}, {"precision": "int4"}, {"worst": -1}, {"contact_sheet": -1}, {"max_images": 0}]
)
def test_wrong_values_are_refused_by_key(wrong: dict[str, object]) -> None:
    with pytest.raises(InputError, match=next(iter(wrong))):
        EvaluateConfig(**wrong)  # type: ignore[arg-type]
