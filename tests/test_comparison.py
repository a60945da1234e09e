"""Comparisons of two evaluations of the same images."""

from __future__ import annotations

import csv
import dataclasses
import math
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fa_stereo.comparison import Comparison, compare
from fa_stereo.config import DatasetConfig, ProtocolConfig, RenderConfig, to_plain
from fa_stereo.errors import InputError
from fa_stereo.evaluation import EvaluationResult, evaluate
from tests.evaluated_samples import Samples, brightness


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
    with pytest.raises(InputError, match=r"metrics\.json: a file; name the folder"):
        compare(a / "metrics.json", b)
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
