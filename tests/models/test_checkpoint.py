"""Self-describing weights: round trips, and every way a file can be wrong."""

from __future__ import annotations

import errno
import io
import pickle
import tarfile
from pathlib import Path

import pytest
import torch
from random_networks import randomize, tiny
from safetensors.torch import save_file

from fa_stereo.config import AttentionConfig, to_plain
from fa_stereo.errors import InputError
from fa_stereo.files import save_atomically
from fa_stereo.models.checkpoint import (
    load_matching_weights,
    load_model,
    read_record,
    read_torch_file,
    save_weights,
)
from fa_stereo.models.psmnet import PSMNet, build_model


def disparity(model: PSMNet) -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    left, right = torch.randn(2, 1, 3, 32, 48, generator=generator)
    with torch.inference_mode():
        return model.eval()(left, right)


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    save_weights(build_model(tiny()), tmp_path / "tiny.safetensors")
    return tmp_path / "tiny.safetensors"


def test_round_trip_needs_no_flags(tmp_path: Path) -> None:
    config = tiny(aggregation="basic", align_corners=True, attention_slots=["res2", "pyramid"])
    model = build_model(config)
    save_weights(model, tmp_path / "w.safetensors", {"steps": 12, "data": "rendered"})
    loaded = load_model(tmp_path / "w.safetensors")
    assert loaded.config == config
    assert not loaded.training
    assert torch.equal(disparity(loaded), disparity(model))
    assert read_record(tmp_path / "w.safetensors") == {"steps": 12, "data": "rendered"}
    assert [path.name for path in tmp_path.iterdir()] == ["w.safetensors"]  # no temporary file is left


def test_weights_whose_first_byte_is_that_of_a_pickle(tmp_path: Path) -> None:
    model = build_model(tiny())
    path = tmp_path / "w.safetensors"
    for length in range(0, 256, 8):  # one of these makes the header's length end in 0x80
        save_weights(model, path, {"padding": "x" * length})
        if path.read_bytes()[0] == 0x80:
            break
    assert path.read_bytes()[0] == 0x80
    assert torch.equal(disparity(load_model(path)), disparity(model))


def test_half_precision_file(tmp_path: Path) -> None:
    model = randomize(build_model(tiny()))
    save_weights(model, tmp_path / "full.safetensors")
    save_weights(model, tmp_path / "half.safetensors", dtype=torch.float16)
    loaded = load_model(tmp_path / "half.safetensors")
    assert next(loaded.parameters()).dtype == torch.float32
    assert torch.equal(loaded.features.stem[0].norm.running_var, model.features.stem[0].norm.running_var)
    assert (disparity(loaded) - disparity(model)).abs().max() < 0.5
    assert (tmp_path / "half.safetensors").stat().st_size < 0.65 * (tmp_path / "full.safetensors").stat().st_size


def test_training_checkpoint_gives_averaged_weights(tmp_path: Path) -> None:
    model, average = build_model(tiny()), build_model(tiny())
    content = {"model_config": to_plain(model.config), "model": model.state_dict(), "ema": average.state_dict()}
    torch.save(content, tmp_path / "last.pt")
    assert torch.equal(disparity(load_model(tmp_path / "last.pt")), disparity(average))
    torch.save(content | {"ema": None}, tmp_path / "last.pt")
    assert torch.equal(disparity(load_model(tmp_path / "last.pt")), disparity(model))


def test_start_from_weights_without_attention(tmp_path: Path) -> None:
    plain = build_model(tiny(attention=AttentionConfig(kind="none")))
    save_weights(plain, tmp_path / "psmnet.safetensors")
    model = build_model(tiny())
    report = load_matching_weights(model, tmp_path / "psmnet.safetensors")
    assert report.missing
    assert all(key.startswith("features.attention.res4") for key in report.missing)
    assert not report.unexpected
    assert not report.mismatched
    assert "features.attention.res4" in report.summary()
    torch.testing.assert_close(disparity(model), disparity(plain), atol=1e-4, rtol=0)


def test_nothing_fits(weights: Path) -> None:
    wide = build_model(tiny(base_channels=12, aggregation="basic"))
    with pytest.raises(InputError, match=r"no weight fits this network \(base_channels is 8 there, 12 here\): choose"):
        load_matching_weights(wide, weights)  # though batch norm's counters fit whatever the width


def test_start_from_weights_of_the_other_alignment(weights: Path) -> None:
    report = load_matching_weights(build_model(tiny(align_corners=True)), weights)
    assert "these weights need model.align_corners=false, which is true here" in report.summary()
    assert not load_matching_weights(build_model(tiny()), weights).notes


class Hostile:
    def __reduce__(self):
        return (Path("executed").write_text, ("by the loader",))


def write_hostile(path: Path) -> None:
    torch.save({"model_config": to_plain(tiny()), "model": Hostile()}, path)


def write_hostile_legacy(path: Path) -> None:
    path.write_bytes(pickle.dumps(Hostile(), protocol=2))


@pytest.mark.parametrize("write", [write_hostile, write_hostile_legacy])
def test_hostile_pickle_is_not_executed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "hostile.pt")
    with pytest.raises(InputError, match=r"hostile\.pt"):
        load_model(tmp_path / "hostile.pt")
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("content", [b"", b"not a checkpoint at all, just some text", b"\x89PNG\r\n\x1a\n" + bytes(64)])
@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_not_a_checkpoint(tmp_path: Path, content: bytes, suffix: str) -> None:
    path = tmp_path / f"thing{suffix}"
    path.write_bytes(content)
    with pytest.raises(InputError, match="thing"):
        load_model(path)


def test_truncated(weights: Path, tmp_path: Path) -> None:
    weights.write_bytes(weights.read_bytes()[:-1000])
    with pytest.raises(InputError, match="truncated"):
        load_model(weights)
    torch.save({"model": torch.zeros(1000)}, tmp_path / "last.pt")
    (tmp_path / "last.pt").write_bytes((tmp_path / "last.pt").read_bytes()[:-2000])
    with pytest.raises(InputError, match="truncated"):
        load_model(tmp_path / "last.pt")


@pytest.mark.parametrize("kept", [100, 4_000, 10_000, 30_000, 66_000, 100_000])
def test_cut_anywhere(tmp_path: Path, kept: int) -> None:
    torch.save({"model": torch.rand(32_000)}, tmp_path / "last.pt")
    (tmp_path / "last.pt").write_bytes((tmp_path / "last.pt").read_bytes()[:kept])
    with pytest.raises(InputError, match=r"last\.pt: cannot be loaded as a checkpoint: it is truncated"):
        read_torch_file(tmp_path / "last.pt")


def test_what_is_no_checkpoint_is_called_what_it_is(tmp_path: Path) -> None:
    objects = io.BytesIO()
    torch.save({"model": Hostile()}, objects)
    for name, content, reason in (
        ("pretrained.tar", b"<!DOCTYPE html><html>Quota exceeded</html>", "it is a web page"),
        ("picture.pt", b"\x89PNG\r\n\x1a\n" + bytes(64), "it is truncated or not a PyTorch file"),
        ("foreign.pt", objects.getvalue(), "it holds objects other than tensors and plain data"),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(InputError, match=f"{name}: cannot be loaded as a checkpoint: {reason}"):
            read_torch_file(tmp_path / name)


def test_missing_and_folder(tmp_path: Path) -> None:
    for path in (tmp_path / "none.safetensors", tmp_path):
        with pytest.raises(InputError, match="no such checkpoint file"):
            load_model(path)


def test_another_model(tmp_path: Path, weights: Path) -> None:
    save_file({"conv.weight": torch.zeros(3)}, tmp_path / "other.safetensors")
    with pytest.raises(InputError, match="another model"):
        load_model(tmp_path / "other.safetensors")
    torch.save({"resnet": torch.zeros(3)}, tmp_path / "other.pt")
    with pytest.raises(InputError, match="not a checkpoint of this project"):
        load_model(tmp_path / "other.pt")
    torch.save([1, 2], tmp_path / "list.pt")
    with pytest.raises(InputError, match="holds a list"):
        read_torch_file(tmp_path / "list.pt")


def test_tensors_that_contradict_the_configuration(tmp_path: Path) -> None:
    model = build_model(tiny())
    model.config = tiny(base_channels=12)
    save_weights(model, tmp_path / "w.safetensors")
    with pytest.raises(InputError, match="not those of the model it describes"):
        load_model(tmp_path / "w.safetensors")


@pytest.mark.parametrize(
    "changes",
    [
        {"model_config": 5},
        {"model_config": {"base_channels": "8"}},
        {"model_config": {"base_channels": 8, "nonsense": 1}},
        {"model_config": {"base_channels": 8.0}},
        {"model_config": {"attention": None}},
        {"model_config": {"base_channels": 10**9}},
        {"model_config": {"base_channels": 10**5}},  # refused before memory is taken for it
        {"model": 5},
        {"model": {"features.stem.0.conv.weight": "text"}},
        {"ema": 5},
    ],
)
def test_altered_checkpoint_is_refused_in_one_sentence(tmp_path: Path, changes: dict[str, object]) -> None:
    model = build_model(tiny())
    content = {"model_config": to_plain(model.config), "model": model.state_dict(), "ema": None}
    torch.save(content | changes, tmp_path / "altered.pt")
    with pytest.raises(InputError, match=r"altered\.pt: .*export it again|altered\.pt: .*export the file again"):
        load_model(tmp_path / "altered.pt")


def test_altered_metadata_is_refused(tmp_path: Path) -> None:
    metadata = {"format": "fa_stereo weights", "model": "[1, 2]"}
    save_file({"weight": torch.zeros(3)}, tmp_path / "w.safetensors", metadata)
    with pytest.raises(InputError, match=r"w\.safetensors: its model configuration cannot be used"):
        load_model(tmp_path / "w.safetensors")


def test_a_damaged_record_is_refused(tmp_path: Path) -> None:
    save_file({"weight": torch.zeros(3)}, tmp_path / "w.safetensors", {"record": "{"})
    with pytest.raises(InputError, match=r"w\.safetensors: its record is damaged"):
        read_record(tmp_path / "w.safetensors")


def test_archive_that_is_really_a_tar(tmp_path: Path, weights: Path) -> None:
    with tarfile.open(tmp_path / "pretrained.tar", "w") as archive:
        archive.add(weights, "tiny.safetensors")
    with pytest.raises(InputError, match=r"pretrained\.tar: a tar archive.*unpack"):
        read_torch_file(tmp_path / "pretrained.tar")


def test_foreign_pickle_is_refused_without_remarks(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    (tmp_path / "foreign.pt").write_bytes(pickle.dumps(Hostile(), protocol=4))
    with pytest.raises(InputError, match=r"foreign\.pt"):
        load_model(tmp_path / "foreign.pt")
    assert not recwarn.list


def test_full_disk_keeps_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "last.pt"
    path.write_text("before")

    def write(temporary: Path) -> None:
        temporary.write_text("half")
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    with pytest.raises(OSError, match="No space left"):
        save_atomically(path, write)
    assert path.read_text() == "before"
    assert list(tmp_path.iterdir()) == [path]


def test_names_as_long_as_they_may_be_and_files_that_cannot_be_written(tmp_path: Path) -> None:
    path = tmp_path / ("深" * 83 + ".png")  # 253 bytes
    save_atomically(path, lambda temporary: temporary.write_bytes(b"1"))
    assert path.read_bytes() == b"1"
    with pytest.raises(FileNotFoundError) as caught:
        save_atomically(tmp_path / "none" / "a.png", lambda temporary: temporary.write_bytes(b"1"))
    assert caught.value.filename == str(tmp_path / "none" / "a.png")

    def refuse(_: Path) -> None:
        raise OSError("a sentence without a number")

    with pytest.raises(OSError, match=r"^a sentence without a number$"):
        save_atomically(tmp_path / "a.png", refuse)
