"""The evaluation loop on data sets made up here, its files, its sharing among processes, and comparisons."""

from __future__ import annotations

import csv
import dataclasses
import json
import math
import subprocess
import sys
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from fa_stereo.config import DatasetConfig, ModelConfig, ProtocolConfig, RenderConfig, to_plain
from fa_stereo.data.sample import StereoSample
from fa_stereo.data.transforms import normalize_images
from fa_stereo.errors import InputError
from fa_stereo.evaluation import (
    Comparison,
    EvaluatedImage,
    EvaluationResult,
    compare,
    describe_protocol,
    evaluate,
    network_predictor,
    predict_padded,
    select_images,
)
from fa_stereo.models.psmnet import build_model
from tests.random_networks import calibrated


class Samples(Dataset[StereoSample]):
    """Random pairs of different sizes; every third has an occlusion mask, the fifth nothing below 192 px."""

    def __init__(self, count: int = 11, broken: int | None = None) -> None:
        self.count = count
        self.broken = broken

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> StereoSample:
        if index == self.broken:
            raise InputError(f"frame{index}.png: truncated; fetch it again")
        rng = np.random.default_rng(index)
        height, width = 16 + index, 40 - index
        left, right = rng.integers(0, 256, (2, height, width, 3), np.uint8)
        disparity = rng.uniform(0 if index != 5 else 192, 250, (height, width)).astype(np.float32)
        disparity[0, :3] = (0, math.inf, 192)
        return StereoSample(
            name=f"scene/{index:04d}",
            left=left,
            right=right,
            disparity=disparity,
            occluded=rng.random((height, width)) < 0.2 if index % 3 == 0 else None,
        )


def brightness(left: Tensor, right: Tensor) -> Tensor:
    """Stand in for a network: any function of the two views."""
    return (left.float().mean(dim=1) + right.float().mean(dim=1)) / 3


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
sys.path[:0] = [{tests!r}, {repository!r}]
import torch.distributed as dist
from fa_stereo.config import ProtocolConfig
from fa_stereo.distributed import process_group, rank
from fa_stereo.errors import InputError
from fa_stereo.evaluation import evaluate
from test_evaluation import Samples, brightness

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
    tests = str(Path(__file__).parent)
    script.write_text(SHARED.format(tests=tests, repository=str(repository), out=str(tmp_path)))
    run_processes(script, 2)
    evaluate(brightness, Samples(), ProtocolConfig(averaging="batch")).save(tmp_path / "alone")
    for name in ("metrics.json", "per_image.csv"):
        alone = (tmp_path / "alone" / name).read_bytes()
        assert (tmp_path / "rank0" / name).read_bytes() == alone
        assert (tmp_path / "rank1" / name).read_bytes() == alone


# ----------------------------------------------------------------------------------------------------------- comparing


def saved(folder: Path, result: EvaluationResult) -> Path:
    result.save(folder)
    return folder


@pytest.fixture
def two_runs(tmp_path: Path) -> tuple[Path, Path]:
    a = saved(tmp_path / "a", evaluate(brightness, Samples()))
    b = saved(tmp_path / "b", evaluate(lambda left, right: brightness(left, right) * 1.1, Samples()))
    return a, b


def test_comparison_by_hand(two_runs: tuple[Path, Path]) -> None:
    result = compare(*two_runs, samples=2000)
    values = []
    for folder in two_runs:
        with (folder / "per_image.csv").open() as file:
            values.append([float(row["end_point_error"]) for row in csv.DictReader(file) if row["end_point_error"]])
    difference = np.array(values[1]) - np.array(values[0])
    assert (result.images, result.left_out) == (10, 1)
    assert result.mean_a == pytest.approx(np.mean(values[0]))
    assert result.difference == pytest.approx(difference.mean())
    assert result.low < result.difference < result.high
    # the interval of a mean of 10 is about +- 2 standard errors
    assert result.high - result.low == pytest.approx(3.92 * difference.std() / math.sqrt(10), rel=0.1)
    assert (result.better, result.worse) == ((difference < 0).sum(), (difference > 0).sum())
    assert result == compare(*two_runs, samples=2000)
    assert result != compare(*two_runs, samples=2000, seed=1)


def test_an_evaluation_does_not_differ_from_itself(two_runs: tuple[Path, Path]) -> None:
    result = compare(two_runs[0], two_runs[0], metric="occ_bad_3", samples=100)
    assert (result.difference, result.low, result.high) == (0, 0, 0)
    assert "no difference shown" in result.table()
    assert "equal on 4" in result.table()  # the images with a mask


def test_pictures_of_one_name_are_not_always_the_same(tmp_path: Path) -> None:
    def run(name: str, **source: Any) -> Path:
        result = evaluate(brightness, Samples())
        result.source = {"dataset": to_plain(DatasetConfig(**source))}
        return saved(tmp_path / name, result)

    hard = run("hard", kind="rendered", rendered=RenderConfig(samples=20))
    easy = run("easy", kind="rendered", rendered=RenderConfig(difficulty=0.0))
    with pytest.raises(InputError, match=r"different images: dataset\.rendered\.difficulty is 1\.0 in one and 0\.0 in"):
        compare(hard, easy)
    assert compare(hard, run("more", kind="rendered", rendered=RenderConfig(samples=30))).difference == 0
    kitti = [run(kind, kind=kind, root="/data") for kind in ("kitti2012", "kitti2015")]
    with pytest.raises(InputError, match=r"dataset\.kind is kitti2012 in one and kitti2015"):
        compare(*kitti)


def test_files_of_one_name_may_be_rendered_otherwise(tmp_path: Path) -> None:
    """All folders that fa-stereo render writes have the same names in them."""

    def run(name: str, seed: int | None) -> Path:
        result = evaluate(brightness, Samples())
        result.source = {"dataset": to_plain(DatasetConfig("scene_flow", f"/data/{name}"))}
        if seed is not None:
            result.source["rendered_pairs"] = {"seed": seed, "plain": 0.1}
        return saved(tmp_path / name, result)

    first = run("first", 7)
    with pytest.raises(InputError, match="different images: they were rendered with seed 7 for one and 8 for the"):
        compare(first, run("second", 8))
    assert compare(first, run("again", 7)).difference == 0
    metrics = first / "metrics.json"  # by a version that knew one option more
    metrics.write_text(metrics.read_text().replace('"plain": 0.1', '"plain": 0.1, "haze": 0.15'))
    assert compare(first, run("before", 7)).difference == 0
    assert compare(first, run("unknown", None)).difference == 0


def test_pictures_of_one_name_and_another_size(two_runs: tuple[Path, Path]) -> None:
    path = two_runs[1] / "per_image.csv"
    lines = path.read_text().splitlines(keepends=True)
    first = lines[1].split(",")
    first[2] = str(2 * int(first[2]))
    path.write_text("".join([lines[0], ",".join(first), *lines[2:]]))
    with pytest.raises(InputError, match="different images: height, width and pixels that count of 'scene/0000'"):
        compare(*two_runs)


def test_pictures_of_one_name_size_and_number_of_pixels(two_runs: tuple[Path, Path]) -> None:
    rows = list(csv.reader((two_runs[1] / "per_image.csv").read_text().splitlines()))
    assert rows[0][-1] == "truth"
    assert rows[1][-1] == f"{zlib.crc32(np.asarray(Samples()[0].disparity, np.float32).tobytes()):08x}"
    for truth in ("0badf00d", ""):  # another; as versions before wrote it
        rows[1][-1] = truth
        (two_runs[1] / "per_image.csv").write_text("".join(",".join(row) + "\n" for row in rows))
        if truth:
            with pytest.raises(InputError, match="different images: the ground truth of 'scene/0000' is not the same"):
                compare(*two_runs)
        else:
            assert compare(*two_runs, samples=10).images == 10


def test_pairs_rendered_alike_may_differ_in_the_last_bit(tmp_path: Path) -> None:
    """As on a GPU and on a CPU."""
    for name, device in (("a", "cpu"), ("b", "cuda")):
        result = evaluate(brightness, Samples())
        result.source = {"dataset": to_plain(DatasetConfig("rendered", rendered=RenderConfig(device=device)))}
        result.per_image[0] = dataclasses.replace(result.per_image[0], truth=name * 8)
        saved(tmp_path / name, result)
    assert compare(tmp_path / "a", tmp_path / "b", samples=10).difference == 0


def test_few_images_bear_no_verdict() -> None:
    def verdict(images: int, low: float) -> str:
        return Comparison("bad_3", images, 0, 1.0, 3.0, 2.0, low, 4.0, 0, images).table().splitlines()[-1]

    assert verdict(1, 2.0) == verdict(5, 0.1) == "no verdict: so few images can agree by chance, it takes 6"
    assert verdict(6, 0.1) == "B is worse: the interval does not contain 0"
    assert verdict(5, -0.1) == verdict(6, -0.1) == "no difference shown: the interval contains 0"


def test_what_cannot_be_compared_is_refused(two_runs: tuple[Path, Path], tmp_path: Path) -> None:
    a, b = two_runs
    fewer = saved(tmp_path / "fewer", evaluate(brightness, Samples(), max_images=9))
    with pytest.raises(InputError, match=r"fewer.per_image\.csv: 2 images of the other.*first 'scene/0009'"):
        compare(a, fewer)
    with pytest.raises(InputError, match=r"different pixels: min_disparity is 0\.0 by protocol default and None by"):
        compare(a, saved(tmp_path / "other", evaluate(brightness, Samples(), ProtocolConfig(min_disparity=None))))
    with pytest.raises(InputError, match="no metric 'epe'; known there: end_point_error, bad_1"):
        compare(a, b, metric="epe")
    for column in ("pixels", "height", "index"):
        with pytest.raises(InputError, match=f"no metric '{column}'"):
            compare(a, b, metric=column)
    with pytest.raises(InputError, match=r"nowhere.metrics\.json: no such file"):
        compare(a, tmp_path / "nowhere")
    with pytest.raises(InputError, match="samples must be positive"):
        compare(a, b, samples=0)
    with pytest.raises(InputError, match="seed must be zero or more"):
        compare(a, b, seed=-1)
    (b / "per_image.csv").write_text("name,skipped,end_point_error\nscene/0000,0,1.5\nscene/0000,0,2\n")
    with pytest.raises(InputError, match="'scene/0000' is there twice"):
        compare(a, b)
    (b / "per_image.csv").write_text("name,skipped,end_point_error\nscene/0000,0,much\n")
    with pytest.raises(InputError, match="'much' is no number"):
        compare(a, b)
    (b / "metrics.json").write_text("{}")
    with pytest.raises(InputError, match="not a result of"):
        compare(a, b)
