"""Every metric, mask and average against figures computed by hand."""

from __future__ import annotations

import itertools
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from omegaconf import OmegaConf

from fa_stereo.config import ProtocolConfig, from_plain
from fa_stereo.errors import InputError
from fa_stereo.metrics import (
    METRICS,
    ErrorSums,
    StreamingMetrics,
    bad_n,
    d1,
    end_point_error,
    headline_averaging,
    valid_mask,
)

INF = math.inf
PROTOCOLS = (
    "default", "psmnet", "gwcnet", "openstereo", "raft", "igev", "selective_igev", "igev_plus", "unimatch", "kitti",
    "middlebury",
)  # fmt: skip


def row(*values: float) -> NDArray[np.float32]:
    return np.array([values], np.float32)


def load_protocol(repository: Path, name: str) -> ProtocolConfig:
    plain = OmegaConf.to_container(OmegaConf.load(repository / "conf" / "protocol" / f"{name}.yaml"))
    assert isinstance(plain, dict)
    return from_plain(ProtocolConfig, plain)  # type: ignore[arg-type]


# ---------------------------------------------------------------------------------------------------------- one map


def test_end_point_error_by_hand() -> None:
    prediction, target = row(10, 22.5, 3, 7), row(11, 20, 3, INF)
    assert end_point_error(prediction, target) == (1 + 2.5 + 0) / 3
    assert end_point_error(prediction, target, row(1, 0, 1, 1) > 0) == 0.5  # the pixel without truth never counts


def test_bad_n_by_hand() -> None:
    target = row(10, 10, 10, 10, 10, 10)
    prediction = row(10, 11, 11.5, 12.5, 13, 6)  # errors 0, 1, 1.5, 2.5, 3, 4
    assert bad_n(prediction, target, None, 1) == pytest.approx(100 * 4 / 6)  # an error of exactly 1 is not above 1
    assert bad_n(prediction, target, None, 2) == pytest.approx(100 * 3 / 6)
    assert bad_n(prediction, target, None, 3) == pytest.approx(100 * 1 / 6)
    assert bad_n(prediction, target, None, 0.5) == pytest.approx(100 * 5 / 6)


def test_d1_needs_both_limits_and_is_not_bad_3() -> None:
    #                 4 of 10   4 of 100   3 of 20   5 of 100   5.5 of 100   3.5 of 60
    target = row(10, 100, 20, 100, 100, 60)
    prediction = row(14, 104, 23, 95, 105.5, 63.5)
    # above 3 px: all but the third; above 5 %: 40, 4, 15, exactly 5, 5.5, 5.83 %
    assert d1(prediction, target) == pytest.approx(100 * 3 / 6)
    assert bad_n(prediction, target, None, 3) == pytest.approx(100 * 5 / 6)


@pytest.mark.parametrize("target", [60.0, 80.0, 100.0, 140.0, 180.0])
def test_exactly_five_percent_is_no_outlier(target: float) -> None:
    assert d1(row(target + target / 20), row(target)) == 0
    assert d1(np.nextafter(row(target + target / 20), np.float32(INF)), row(target)) == 100


def test_no_valid_pixel_gives_nan_not_zero() -> None:
    nothing = row(INF, INF)
    for value in (end_point_error(row(1, 2), nothing), d1(row(1, 2), nothing), bad_n(row(1, 2), nothing, None, 1)):
        assert math.isnan(value)


def test_tensors_and_arrays_agree() -> None:
    prediction, target = torch.rand(5, 7) * 40, torch.rand(5, 7) * 40
    valid = torch.rand(5, 7) > 0.5
    for metric in (end_point_error, d1):
        assert metric(prediction, target, valid) == metric(prediction.numpy(), target.numpy(), valid.numpy())
    expected = (prediction.double() - target.double()).abs()[valid].mean()
    assert end_point_error(prediction, target, valid) == pytest.approx(float(expected), rel=1e-12)


def test_shapes_must_agree() -> None:
    with pytest.raises(ValueError, match=r"\(1, 2\)"):
        end_point_error(row(1, 2), row(1, 2, 3))


def test_a_nan_counts_as_wrong_in_every_outlier_rate() -> None:
    prediction, target = row(math.nan, 10), row(10, 10)
    assert bad_n(prediction, target, None, 3) == 50
    assert d1(prediction, target) == 50


# ------------------------------------------------------------------------------------------------------------- masks


def test_valid_mask_bounds() -> None:
    target = row(0, 0.5, 191.99, 192, INF, math.nan)
    assert valid_mask(target, 0, 192).tolist() == [[False, True, True, False, False, False]]
    assert valid_mask(target, None, 192).tolist() == [[True, True, True, False, False, False]]
    assert valid_mask(target, None, None).tolist() == [[True, True, True, True, False, False]]


@pytest.mark.parametrize(
    ("name", "valid"),
    [
        # of the disparities 0, 100, 192, 399, 400, 767, 768, unknown
        ("default", [0, 1, 0, 0, 0, 0, 0, 0]),
        ("psmnet", [1, 1, 0, 0, 0, 0, 0, 0]),
        ("gwcnet", [0, 1, 0, 0, 0, 0, 0, 0]),
        ("openstereo", [0, 1, 0, 0, 0, 0, 0, 0]),
        ("raft", [1, 1, 0, 0, 0, 0, 0, 0]),
        ("igev", [1, 1, 0, 0, 0, 0, 0, 0]),
        ("selective_igev", [1, 1, 0, 0, 0, 0, 0, 0]),
        ("igev_plus", [1, 1, 1, 1, 1, 1, 0, 0]),
        ("unimatch", [0, 1, 1, 1, 0, 0, 0, 0]),
        ("kitti", [0, 1, 1, 1, 1, 1, 1, 0]),
        ("middlebury", [1, 1, 1, 1, 1, 1, 1, 0]),
    ],
)
def test_the_mask_of_each_protocol(repository: Path, name: str, valid: list[int]) -> None:
    protocol = load_protocol(repository, name)
    target = row(0, 100, 192, 399, 400, 767, 768, INF)
    streaming = StreamingMetrics(protocol)
    streaming.update(0, "image", np.zeros_like(target), target)
    assert valid_mask(target, protocol.min_disparity, protocol.max_disparity).astype(int).tolist() == [valid]
    assert streaming.images[0].regions["all"].pixels == sum(valid)


@pytest.mark.parametrize(
    ("name", "passes", "averaging", "outliers", "empty", "images"),
    [
        ("psmnet", "clean", "batch", "batch", "zero", None),
        ("gwcnet", "final", "image", "image", "skip", None),
        ("openstereo", "final", "image", "image", "zero", None),
        ("raft", "final", "image", "pixel", "skip", 400),
        ("igev", "final", "image", "pixel", "skip", None),
        ("selective_igev", "final", "batch", "batch", "skip", None),
        ("igev_plus", "final", "batch", "pixel", "skip", None),
        ("unimatch", "final", "image", "image", "skip", None),
        ("kitti", "clean", "image", "pixel", "skip", None),
        ("middlebury", "clean", "image", "image", "skip", None),
        ("default", "clean", "image", "image", "skip", None),
    ],
)
def test_the_rules_of_each_protocol(
    repository: Path, name: str, passes: str, averaging: str, outliers: str, empty: str, images: int | None
) -> None:
    protocol = load_protocol(repository, name)
    assert protocol.name == name
    assert (protocol.passes, protocol.images, protocol.empty) == (passes, images, empty)
    assert headline_averaging(protocol, "end_point_error") == averaging
    assert headline_averaging(protocol, "d1") == outliers
    assert protocol.batch_size == 8
    assert protocol.image_seed == 1000


def test_every_protocol_file_is_tested(repository: Path) -> None:
    assert {path.stem for path in (repository / "conf" / "protocol").glob("*.yaml")} == set(PROTOCOLS)


# ---------------------------------------------------------------------------------------------------------- averages

# Ten images: the first has 4 pixels with an error of 1 px, the second 2 of 4 px; image 4 has nothing valid; the others
# have one pixel without error. Batches of 8: images 0 to 7, then 8 and 9.
TARGETS = [row(10, 10, 10, 10), row(10, 10, INF, INF), *[row(10, INF, INF, INF)] * 2, row(INF, INF, INF, INF)]
TARGETS += [row(10, INF, INF, INF)] * 3 + [row(20, 20, INF, INF), row(20, INF, INF, INF)]
PREDICTIONS = [row(11, 11, 11, 11), row(14, 14, 0, 0), *[row(10, 0, 0, 0)] * 6, row(26, 20, 0, 0), row(20, 0, 0, 0)]
# sums of errors: 4, 8, 0 ..., 6, 0; pixels: 4, 2, 1, 1, 0, 1, 1, 1, 2, 1 (14 in all)


def collect(protocol: ProtocolConfig) -> StreamingMetrics:
    streaming = StreamingMetrics(protocol)
    for index, (prediction, target) in enumerate(zip(PREDICTIONS, TARGETS, strict=True)):
        streaming.update(index, f"image{index}", prediction, target)
    return streaming


PIXEL = 18 / 14
IMAGE_SKIPPING = (1 + 4 + 3) / 9
IMAGE_ZERO = (1 + 4 + 3) / 10
BATCH = (12 / 11 + 6 / 3) / 2


def test_all_three_averages_by_hand() -> None:
    averages = collect(ProtocolConfig()).averages()["all"]
    assert averages["pixel"]["end_point_error"] == pytest.approx(PIXEL)
    assert averages["image"]["end_point_error"] == pytest.approx(IMAGE_SKIPPING)
    assert averages["batch"]["end_point_error"] == pytest.approx(BATCH)
    # bad_3: 2 pixels of image 1, 1 of image 8; the same are above 5 %
    assert averages["pixel"]["bad_3"] == averages["pixel"]["d1"] == pytest.approx(100 * 3 / 14)
    assert averages["image"]["bad_3"] == pytest.approx((100 + 50) / 9)
    assert averages["batch"]["bad_3"] == pytest.approx(100 * (2 / 11 + 1 / 3) / 2)
    # bad_1: errors of exactly 1 px are not above
    assert averages["pixel"]["bad_1"] == pytest.approx(100 * 3 / 14)


@pytest.mark.parametrize(
    ("name", "end_point", "bad_3"),
    [
        ("psmnet", BATCH, 100 * (2 / 11 + 1 / 3) / 2),
        ("gwcnet", IMAGE_SKIPPING, 150 / 9),
        ("openstereo", IMAGE_ZERO, 150 / 10),
        ("raft", IMAGE_SKIPPING, 100 * 3 / 14),
        ("igev", IMAGE_SKIPPING, 100 * 3 / 14),
        ("selective_igev", BATCH, 100 * (2 / 11 + 1 / 3) / 2),
        ("igev_plus", BATCH, 100 * 3 / 14),
        ("unimatch", IMAGE_SKIPPING, 150 / 9),
        ("kitti", IMAGE_SKIPPING, 100 * 3 / 14),
        ("middlebury", IMAGE_SKIPPING, 150 / 9),
        ("default", IMAGE_SKIPPING, 150 / 9),
    ],
)
def test_the_headline_of_each_protocol(repository: Path, name: str, end_point: float, bad_3: float) -> None:
    headline = collect(load_protocol(repository, name)).headline()
    assert headline["end_point_error"] == pytest.approx(end_point)
    assert headline["bad_3"] == pytest.approx(bad_3)
    assert set(headline) == set(METRICS)


@pytest.mark.parametrize(("empty", "expected"), [("skip", 2.0), ("zero", 1.0)])
def test_a_batch_without_valid_pixels(empty: str, expected: float) -> None:
    streaming = StreamingMetrics(ProtocolConfig(averaging="batch", batch_size=1, empty=empty))
    streaming.update(0, "good", row(12), row(10))
    streaming.update(1, "empty", row(12), row(200))  # all beyond the upper bound: TEST/A/0149/left/0015 is such a one
    assert streaming.headline()["end_point_error"] == expected
    assert streaming.averages()["all"]["pixel"]["end_point_error"] == 2.0


def test_nothing_valid_anywhere_is_nan() -> None:
    streaming = StreamingMetrics(ProtocolConfig())
    streaming.update(0, "empty", row(12), row(200))
    assert all(math.isnan(value) for value in streaming.headline().values())


def test_gwcnet_leaves_out_images_with_less_than_ten_percent_of_the_known_pixels(repository: Path) -> None:
    streaming = StreamingMetrics(load_protocol(repository, "gwcnet"))
    beyond = [300.0] * 10
    tenth = streaming.update(0, "exactly 10 %", row(12, *beyond[:9], 0), row(10, *beyond[:9], INF))
    fewer = streaming.update(1, "1 of 11", row(18, *beyond), row(10, *beyond))
    unknown = streaming.update(2, "unknown", row(0, 0), row(INF, INF))
    assert (tenth.skipped, fewer.skipped, unknown.skipped) == (False, True, True)
    averages = streaming.averages()["all"]
    assert {averages[kind]["end_point_error"] for kind in averages} == {2.0}


def test_regions_by_hand() -> None:
    streaming = StreamingMetrics(ProtocolConfig(batch_size=2))
    occluded = row(0, 0, 1, 1) > 0
    streaming.update(0, "a", row(11, 12, 14, 9), row(10, 10, 10, INF), occluded)  # noc 1, 2; occ 4
    streaming.update(1, "b", row(10, 10, 10, 10), row(13, 10, 10, 10), row(0, 0, 0, 0) > 0)  # noc 3, 0, 0, 0
    streaming.update(2, "no mask", row(20), row(10))
    averages = streaming.averages()
    assert list(averages) == ["all", "noc", "occ"]
    assert averages["noc"]["pixel"]["end_point_error"] == 6 / 6
    assert averages["noc"]["image"]["end_point_error"] == (1.5 + 0.75) / 2
    assert averages["occ"]["image"]["end_point_error"] == 4  # b has no occluded pixel, the third no mask
    assert averages["all"]["pixel"]["end_point_error"] == (7 + 3 + 10) / 8
    assert averages["occ"]["pixel"]["bad_3"] == 100


def test_an_image_without_occluded_pixels_is_no_perfect_one() -> None:
    streaming = StreamingMetrics(ProtocolConfig(empty="zero"))
    streaming.update(0, "a", row(14), row(10), row(1) > 0)
    streaming.update(1, "b", row(14), row(10), row(0) > 0)
    assert streaming.averages()["occ"]["image"]["end_point_error"] == 4


def test_regions_are_absent_without_masks() -> None:
    assert list(collect(ProtocolConfig()).averages()) == ["all"]


# --------------------------------------------------------------------------------------------------------- streaming


def test_result_is_the_same_to_the_last_bit_for_any_order_and_sharing() -> None:
    rng = np.random.default_rng(0)
    protocol = ProtocolConfig(batch_size=3)
    pairs = [(rng.random((9, 11), np.float32) * 50, rng.random((9, 11), np.float32) * 250) for _ in range(10)]
    alone = StreamingMetrics(protocol)
    for index, (prediction, target) in enumerate(pairs):
        alone.update(index, str(index), prediction, target)
    parts = [StreamingMetrics(protocol) for _ in range(3)]
    for index in rng.permutation(10):
        parts[int(index) % 3].update(int(index), str(index), *pairs[index])
    for order in itertools.permutations(parts):
        merged = StreamingMetrics.merge(order)
        assert merged.averages() == alone.averages()
        assert merged.images == alone.images


def test_an_image_may_not_count_twice() -> None:
    streaming = collect(ProtocolConfig())
    with pytest.raises(ValueError, match=r"image0.* twice"):
        StreamingMetrics.merge([streaming, streaming])


def test_sums_are_exact() -> None:
    small = ErrorSums(pixels=1, absolute_error=1e-9)
    huge = ErrorSums(pixels=1, absolute_error=1e9)
    parts = [huge, *[small] * 1000]
    assert ErrorSums.total(parts) == ErrorSums.total(reversed(parts))
    assert ErrorSums.total(parts).absolute_error == math.fsum([1e9, *[1e-9] * 1000])


@pytest.mark.parametrize("value", [math.nan, INF, -INF])
def test_predictions_that_are_not_finite_are_named(value: float) -> None:
    with pytest.raises(InputError, match=r"TEST/A/0001: 1 of 3 predicted disparities are NaN or infinite"):
        StreamingMetrics(ProtocolConfig()).update(0, "TEST/A/0001", row(1, value, 2), row(1, INF, 2))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"averaging": "median"}, "protocol.averaging"),
        ({"outlier_averaging": "all"}, "protocol.outlier_averaging"),
        ({"empty": "nan"}, "protocol.empty"),
        ({"padding": "left"}, "protocol.padding"),
        ({"passes": "dirty"}, "protocol.passes"),
        ({"max_disparity": 0}, "protocol.max_disparity"),
        ({"min_disparity": 200.0}, "protocol.min_disparity"),
        ({"crop": [512]}, "protocol.crop"),
        ({"images": 0}, "protocol.images"),
        ({"min_valid_fraction": 10}, "protocol.min_valid_fraction"),
    ],
)
def test_wrong_protocols_are_refused_by_key(wrong: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        ProtocolConfig(**wrong)  # type: ignore[arg-type]
