"""The evaluation loop on data sets made up here, its files and its sharing among processes."""

from __future__ import annotations

import csv
import json
import math
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from fa_stereo.config import ModelConfig, ProtocolConfig
from fa_stereo.data.sample import StereoSample
from fa_stereo.data.transforms import normalize_images
from fa_stereo.errors import InputError
from fa_stereo.evaluation import (
    EvaluatedImage,
    describe_protocol,
    evaluate,
    network_predictor,
    predict_padded,
    select_images,
)
from fa_stereo.models.psmnet import build_model
from tests.evaluated_samples import Samples, brightness
from tests.random_networks import calibrated


def by_hand(samples: Dataset[StereoSample], index: int) -> float:
    sample = samples[index]
    assert sample.disparity is not None
    prediction = (sample.left.astype(np.float64).mean(-1) + sample.right.astype(np.float64).mean(-1)) / 3
    valid = (sample.disparity > 0) & (sample.disparity < 192)
    return float(np.abs(prediction - sample.disparity)[valid].mean()) if valid.any() else math.nan


# ----------------------------------------------------------------------------------------------------------- the loop


def test_images_of_different_sizes_are_measured_one_by_one() -> None:
    samples = Samples()
    result = evaluate(brightness, samples)
    assert [image.name for image in result.per_image] == [f"scene/{index:04d}" for index in range(11)]
    for index, image in enumerate(result.per_image):
        assert image.mean("end_point_error") == pytest.approx(by_hand(samples, index), rel=1e-5, nan_ok=True)
        assert (image.height, image.width) == (16 + index, 40 - index)
    expected = np.nanmean([by_hand(samples, index) for index in range(11)])
    assert result.metrics["end_point_error"] == pytest.approx(expected, rel=1e-5)
    assert set(result.averages) == {"all", "noc", "occ"}
    assert result.notes == []


def test_loader_processes_change_nothing() -> None:
    assert evaluate(brightness, Samples(), workers=2).to_plain() == evaluate(brightness, Samples()).to_plain()


def test_the_callers_random_state_is_left_alone() -> None:
    before = torch.get_rng_state()
    evaluate(brightness, Samples(2), workers=2)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_network_sees_normalised_pictures_in_eval_mode_and_gets_its_mode_back() -> None:
    class Probe(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(()))
            self.seen: list[bool] = []

        def forward(self, left: Tensor, right: Tensor) -> Tensor:
            self.seen.append(self.training)
            assert not torch.is_grad_enabled()
            return (left.mean(dim=1) + right.mean(dim=1)) * self.weight

    samples = Samples(2)
    network = Probe().train()
    result = evaluate(network, samples)
    assert network.seen == [False, False]
    assert network.training

    def expected(left: Tensor, right: Tensor) -> Tensor:
        return normalize_images(left).mean(dim=1) + normalize_images(right).mean(dim=1)

    assert result.metrics == evaluate(expected, samples).metrics


def test_the_real_network_is_evaluated_in_every_precision() -> None:
    network = build_model(ModelConfig(base_channels=8, max_disparity=16)).eval()
    full = evaluate(network, Samples(2), precision="fp32").metrics["end_point_error"]
    low = evaluate(network_predictor(network, precision="bf16"), Samples(2)).metrics["end_point_error"]
    assert full == pytest.approx(low, rel=0.05)
    with pytest.raises(InputError, match="precision must be one of fp32, bf16, fp16, got 'int8'"):
        evaluate(network, Samples(2), precision="int8")


@pytest.mark.parametrize("padding", ["top_right_zeros", "top_right_replicate", "symmetric_replicate"])
def test_confidence_is_measured_where_there_is_one(padding: str) -> None:
    """It belongs to its pixel whatever is padded, and only pixels of images that count do."""

    def predict(left: Tensor, right: Tensor) -> Tensor:
        disparity = brightness(left, right)
        return torch.cat([disparity, (disparity / 400).clamp(0, 1)])

    samples = Samples()
    protocol = ProtocolConfig(padding=padding, averaging="pixel", min_valid_fraction=0.01)
    plain, result = (evaluate(function, samples, protocol) for function in (brightness, predict))
    assert plain.confidence is None
    assert "confidence" not in plain.to_plain()
    assert result.metrics == plain.metrics
    assert result.confidence is not None
    assert [index for index, counts in result.confidence.by_image.items() if not counts.any()] == [5]
    errors, kept = [], 0
    for sample in (samples[index] for index in range(11)):
        assert sample.disparity is not None
        prediction = (sample.left.astype(np.float32).mean(-1) + sample.right.astype(np.float32).mean(-1)) / 3
        valid = (sample.disparity > 0) & (sample.disparity < 192)
        sure = valid & (prediction / 400 >= 0.3)
        errors += np.abs(prediction - sample.disparity)[sure].tolist()
        kept += int(valid.sum())
    row = result.confidence.kept(0.3)
    assert row["kept"] == pytest.approx(100 * len(errors) / kept)
    assert row["end_point_error"] == pytest.approx(np.mean(errors), rel=1e-5)


def test_a_networks_confidence_is_its_own() -> None:
    network = calibrated()
    samples = Samples(2)
    result = evaluate(network_predictor(network, confidence=True), samples)
    assert result.metrics == evaluate(network, samples).metrics
    views = [torch.from_numpy(view).permute(2, 0, 1)[None] for view in (samples[1].left, samples[1].right)]
    with torch.no_grad():
        _, confidence = network(*map(normalize_images, views), confidence=True)
    truth = torch.from_numpy(samples[1].disparity)
    valid = (truth > 0) & (truth < 192)
    assert result.confidence is not None
    assert result.confidence.by_image[1][0, 50:].sum() == (confidence[0][valid] >= 0.5).sum()


def test_confidence_without_a_pixel_and_other_maps() -> None:
    nothing = evaluate(lambda left, right: brightness(left, right).expand(2, -1, -1) / 1000, [Samples()[5]])
    assert nothing.to_plain()["confidence"]["thresholds"][0]["kept"] is None
    with pytest.raises(ValueError, match="scene/0000: predicted 3 maps"):
        evaluate(lambda left, right: brightness(left, right).expand(3, -1, -1), Samples(1))


def test_pictures_are_handed_on_as_they_come() -> None:
    seen: list[EvaluatedImage] = []
    samples = Samples(2)
    evaluate(brightness, samples, on_image=seen.append)
    assert [image.errors.index for image in seen] == [0, 1]
    np.testing.assert_array_equal(seen[1].left, samples[1].left)
    assert seen[0].valid[0, :3].tolist() == [False, False, False]
    assert seen[0].prediction.shape == seen[0].target.shape


def test_what_cannot_be_evaluated_is_named() -> None:
    with pytest.raises(InputError, match=r"^frame3\.png: truncated; fetch it again$"):
        evaluate(brightness, Samples(5, broken=3), workers=2)
    with pytest.raises(InputError, match="data set is empty"):
        evaluate(brightness, Samples(0))
    with pytest.raises(InputError, match=r"scene/0000: 640 of 640 predicted disparities are NaN"):
        evaluate(lambda left, right: brightness(left, right) * math.nan, Samples())
    with pytest.raises(ValueError, match="scene/0000"):
        evaluate(lambda left, right: brightness(left, right)[..., 1:], Samples())

    class Unknown(Samples):
        def __getitem__(self, index: int) -> StereoSample:
            sample = super().__getitem__(index)
            sample.disparity = None
            return sample

    with pytest.raises(InputError, match="scene/0000: there is no ground truth"):
        evaluate(brightness, Unknown())


def test_a_pair_that_cannot_be_predicted_is_named() -> None:
    def too_small(left: Tensor, right: Tensor) -> Tensor:
        raise InputError("pictures must be at least 16x16 pixels")

    with pytest.raises(InputError, match="scene/0000: pictures must be at least 16x16 pixels"):
        evaluate(too_small, Samples(1))


def test_fewer_images_than_the_protocol_has_are_noted() -> None:
    result = evaluate(brightness, Samples(), ProtocolConfig(expected_images=4370), max_images=4)
    assert [image.index for image in result.per_image] == [0, 1, 2, 3]
    assert result.notes == [
        "the data set has 11 images, the protocol's 4,370",
        "only the first 4 of its 11 images were evaluated",
    ]
    assert "departs from it: only the first 4" in result.table()


def test_rafts_subset_is_the_one_its_code_draws() -> None:
    protocol = ProtocolConfig(images=400, image_seed=1000)
    state = np.random.get_state()  # noqa: NPY002
    np.random.seed(1000)  # noqa: NPY002
    drawn = set(np.random.permutation(4370)[:400].tolist())  # noqa: NPY002
    np.random.set_state(state)  # noqa: NPY002
    chosen = select_images(4370, protocol)
    assert chosen == sorted(drawn)
    assert len(chosen) == 400
    assert select_images(300, protocol) == list(range(300))


def test_batches_are_counted_among_the_evaluated_images() -> None:
    protocol = ProtocolConfig(images=4, averaging="batch", batch_size=2, max_disparity=None)
    chosen = select_images(11, protocol)
    result = evaluate(brightness, Samples(), protocol)
    assert [image.name for image in result.per_image] == [f"scene/{index:04d}" for index in chosen]
    sums = [image.regions["all"] for image in result.per_image]
    batches = [
        (a.absolute_error + b.absolute_error) / (a.pixels + b.pixels)
        for a, b in ((sums[0], sums[1]), (sums[2], sums[3]))
    ]
    assert result.metrics["end_point_error"] == pytest.approx(sum(batches) / 2)


# ------------------------------------------------------------------------------------------------- padding and cropping


@pytest.mark.parametrize(
    ("padding", "top", "left"),
    [("top_right_zeros", 0, 0), ("top_right_replicate", 27, 0), ("symmetric_replicate", 13, 11)],
)
def test_padding_of_each_kind_is_taken_off_again(padding: str, top: int, left: int) -> None:
    picture = torch.randint(0, 256, (1, 3, 37, 41), dtype=torch.uint8)
    sizes: list[Sequence[int]] = []

    def predict(one: Tensor, other: Tensor) -> Tensor:
        sizes.append(one.shape)
        if padding != "top_right_zeros":
            expected = np.pad(picture[0].numpy(), ((0, 0), (top, 27 - top), (left, 23 - left)), mode="edge")
            np.testing.assert_array_equal(one[0].numpy(), expected)
        assert torch.equal(one, other)
        return one[:, 0].float()

    disparity = predict_padded(predict, picture, picture, ProtocolConfig(padding=padding, padding_multiple=32))
    assert torch.equal(disparity, picture[:, 0].float())
    assert sizes[0][-2:] == ((37, 41) if padding == "top_right_zeros" else (64, 64))


def test_the_network_pads_zeros_at_top_and_right_after_normalisation() -> None:
    network = build_model(ModelConfig(base_channels=8, max_disparity=16)).eval()
    views = torch.randint(0, 256, (2, 1, 3, 20, 27), dtype=torch.uint8)
    with torch.no_grad():
        got = predict_padded(network_predictor(network), views[0], views[1], ProtocolConfig())
        padded = [nn.functional.pad(normalize_images(view), (0, 5, 12, 0)) for view in views]
        expected = network(*padded)[:, 12:, :27]
    torch.testing.assert_close(got, expected)


def test_gwcnets_crop_keeps_the_bottom_right() -> None:
    seen: list[EvaluatedImage] = []
    samples = Samples(2)
    result = evaluate(brightness, samples, ProtocolConfig(crop=[16, 20]), on_image=seen.append)
    assert [(image.height, image.width) for image in result.per_image] == [(16, 20), (16, 20)]
    np.testing.assert_array_equal(seen[1].right, samples[1].right[-16:, -20:])
    np.testing.assert_array_equal(seen[1].target, samples[1].disparity[-16:, -20:])  # type: ignore[index]
    assert result.per_image[0].regions["occ"].pixels <= samples[0].occluded[-16:, -20:].sum()  # type: ignore[index]
    # an image smaller than the crop stays whole
    assert evaluate(brightness, samples, ProtocolConfig(crop=[512, 960])).per_image[0].height == 16


# -------------------------------------------------------------------------------------------------------------- results


def test_files_hold_everything(tmp_path: Path) -> None:
    result = evaluate(brightness, Samples(), ProtocolConfig(name="mine", averaging="batch"))
    result.source = {"method": "brightness"}
    result.save(tmp_path / "new" / "folder")
    stored = json.loads((tmp_path / "new" / "folder" / "metrics.json").read_text())
    assert stored["metrics"] == result.metrics
    assert stored["averages"]["noc"]["pixel"]["d1"] == result.averages["noc"]["pixel"]["d1"]
    assert stored["protocol"]["name"] == "mine"
    assert (stored["images"], stored["empty_images"], stored["skipped_images"]) == (11, 1, 0)
    assert stored["pixels"] == sum(image.regions["all"].pixels for image in result.per_image)
    with (tmp_path / "new" / "folder" / "per_image.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["name"] for row in rows] == [image.name for image in result.per_image]
    assert float(rows[3]["end_point_error"]) == result.per_image[3].mean("end_point_error")
    assert float(rows[3]["occ_bad_3"]) == result.per_image[3].mean("bad_3", "occ")
    assert rows[1]["occ_bad_3"] == ""  # no mask
    assert rows[5]["end_point_error"] == ""  # no valid pixel
    assert {path.name for path in (tmp_path / "new" / "folder").iterdir()} == {"metrics.json", "per_image.csv"}


def test_results_without_a_valid_pixel_are_still_json(tmp_path: Path) -> None:
    result = evaluate(brightness, Samples(2), ProtocolConfig(min_disparity=249.9999, max_disparity=None))
    result.save(tmp_path)
    assert json.loads((tmp_path / "metrics.json").read_text())["metrics"]["end_point_error"] is None


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(InputError, match="file"):
        evaluate(brightness, Samples(1)).save(tmp_path / "file" / "folder")


def test_worst_images() -> None:
    result = evaluate(brightness, Samples())
    errors = [image.mean("end_point_error") for image in result.worst(11)]
    assert len(errors) == 10  # one has no valid pixel
    assert errors == sorted(errors, reverse=True)
    assert len(result.worst(3)) == 3
    kept = evaluate(brightness, Samples(), ProtocolConfig(name="gwcnet", min_valid_fraction=0.77))
    skipped = {image.index for image in kept.per_image if image.skipped}
    assert 1 < len(skipped) < 11
    assert {image.index for image in kept.worst(11)} == set(range(11)) - skipped


def test_the_table_names_protocol_counts_and_its_own_average() -> None:
    protocol = ProtocolConfig(name="raft", min_disparity=None, averaging="image", outlier_averaging="pixel")
    result = evaluate(brightness, Samples(), protocol)
    lines = result.table().splitlines()
    assert lines[0].startswith("protocol raft: d < 192 px, EPE averaged over images, outliers over pixels")
    assert "11 images" in lines[1]
    assert f"{result.pixels:,} valid pixels" in lines[1]
    by_unit = {line[13:24].strip(): line for line in lines[4:7]}
    assert by_unit["images"].count("*") == 1
    assert by_unit["pixels"].count("*") == 4
    assert f"{result.metrics['end_point_error']:.3f}*" in by_unit["images"]
    assert sum(line.startswith(("non-occluded", "occluded")) for line in lines) == 2


def test_describing_every_rule() -> None:
    text = describe_protocol(
        ProtocolConfig(
            images=400, crop=[512, 960], min_valid_fraction=0.1, empty="zero", averaging="batch",
            padding="symmetric_replicate", max_disparity=None, min_disparity=None,
        )
    )  # fmt: skip
    for part in (
        "all known pixels",
        "batches of 8",
        "counted as 0",
        "10%",
        "400 images (seed 1000)",
        "960x512",
        "symm",
    ):
        assert part in text


# ------------------------------------------------------------------------------------------------------- many processes

SHARED = """
import sys
sys.path.insert(0, {repository!r})
import torch.distributed as dist
from fa_stereo.config import ProtocolConfig
from fa_stereo.distributed import process_group, rank
from fa_stereo.errors import InputError
from fa_stereo.evaluation import evaluate
from tests.evaluated_samples import Samples, brightness

with process_group():
    seen = []
    protocol = ProtocolConfig(averaging="batch")
    result = evaluate(brightness, Samples(), protocol, on_image=lambda image: seen.append(image.errors.index))
    assert seen == list(range(rank(), 11, dist.get_world_size())), seen
    result.save({out!r} + f"/rank{{rank()}}")
    try:
        evaluate(brightness, Samples(5, broken=3), protocol)
    except InputError as error:
        assert "frame3.png" in str(error)
    else:
        raise AssertionError("a broken image went unnoticed")
    few = evaluate(brightness, Samples(1), protocol)
    assert len(few.per_image) == 1
"""


def run_processes(script: Path, count: int) -> None:
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        str(count),
        str(script),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr


def test_two_processes_find_exactly_what_one_does(tmp_path: Path, repository: Path) -> None:
    script = tmp_path / "shared.py"
    script.write_text(SHARED.format(repository=str(repository), out=str(tmp_path)))
    run_processes(script, 2)
    evaluate(brightness, Samples(), ProtocolConfig(averaging="batch")).save(tmp_path / "alone")
    for name in ("metrics.json", "per_image.csv"):
        alone = (tmp_path / "alone" / name).read_bytes()
        assert (tmp_path / "rank0" / name).read_bytes() == alone
        assert (tmp_path / "rank1" / name).read_bytes() == alone
