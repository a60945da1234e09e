"""What a confidence is worth: counts, thresholds and the sparsification curve, by hand and by brute force."""

from __future__ import annotations

import math

import numpy as np
import pytest

from fa_stereo.confidence import EDGES, THRESHOLDS, ConfidenceCounts
from fa_stereo.errors import InputError


def counts_of(confidence: list[float], error: list[float]) -> ConfidenceCounts:
    counts = ConfidenceCounts()
    target = np.full(len(error), 10, np.float32)
    prediction = target + np.array(error, np.float32)
    counts.update(0, "one", np.array(confidence, np.float32), prediction, target, np.ones(len(error), bool))
    return counts


def test_thresholds_by_hand() -> None:
    counts = counts_of([1.0, 0.9, 0.9, 0.8999, 0.2], [0.0, 2.0, 4.0, -1.0, 8.0])
    assert counts.kept(0.0) == pytest.approx({"kept": 100, "end_point_error": 3, "bad_1": 60, "bad_3": 40})
    # 0.9 is kept from 0.9 on, as fa-stereo predict --min-confidence 0.9 keeps it; an error of exactly 1 px is not bad
    assert counts.kept(0.9) == pytest.approx({"kept": 60, "end_point_error": 2, "bad_1": 200 / 3, "bad_3": 100 / 3})
    assert counts.kept(0.99) == pytest.approx({"kept": 20, "end_point_error": 0, "bad_1": 0, "bad_3": 0})
    none = counts_of([0.5], [1.0]).kept(0.99)
    assert none["kept"] == 0
    assert all(math.isnan(none[name]) for name in ("end_point_error", "bad_1", "bad_3"))


def test_every_threshold_is_counted_from_and_compares_as_float32() -> None:
    for threshold in THRESHOLDS[1:]:
        at, below = np.float32(threshold), np.nextafter(np.float32(threshold), np.float32(0))
        assert counts_of([at, below], [0, 0]).kept(threshold)["kept"] == 50
    assert (np.diff(EDGES) >= 0).all()
    with pytest.raises(ValueError, match=r"not counted from 0\.555 on"):
        counts_of([0.5], [0]).kept(0.555)


@pytest.mark.parametrize("value", [math.nan, -0.1, 1.1])
def test_what_is_no_confidence_is_refused(value: float) -> None:
    with pytest.raises(InputError, match="one: the predicted confidence is not from 0 to 1"):
        counts_of([0.5, value], [0, 0])


def test_invalid_pixels_do_not_count_and_images_add_up() -> None:
    rng = np.random.default_rng(4)
    images = []
    for _ in range(3):
        confidence, prediction, target = rng.random((3, 8, 9), np.float32)
        images.append((confidence, 9 * prediction, 9 * target, rng.random((8, 9)) < 0.7))
    together = ConfidenceCounts()
    for index, image in enumerate(images):
        together.update(index, "image", *image)
    parts = [ConfidenceCounts() for _ in range(2)]
    for index in (2, 0, 1):
        parts[index % 2].update(index, "image", *images[index])
    merged = ConfidenceCounts.merge(parts)
    assert merged.to_plain() == together.to_plain()  # to the last bit
    confidence, prediction, target, valid = (np.stack(part) for part in zip(*images, strict=True))
    error = np.abs(prediction.astype(float) - target)
    for threshold in THRESHOLDS:
        kept = valid & (confidence >= np.float32(threshold))
        assert merged.kept(threshold) == pytest.approx({
            "kept": 100 * kept.sum() / valid.sum(), "end_point_error": error[kept].mean(),
            "bad_1": 100 * (error[kept] > 1).mean(), "bad_3": 100 * (error[kept] > 3).mean(),
        })  # fmt: skip


@pytest.mark.parametrize("sure", [0.5, 0.05, 1e-4])
def test_sparsification_by_brute_force(sure: float) -> None:
    """The area is the mean, over how many are kept, of the share of wrong ones: of sure networks as of unsure ones."""
    rng = np.random.default_rng(5)
    confidence = (1 - sure * rng.random(40000) ** 2).astype(np.float32)
    wrong = rng.random(len(confidence)) < (1 - confidence) / sure
    curve = counts_of(confidence.tolist(), (4.0 * wrong).tolist()).sparsification()
    kept = np.arange(1, len(wrong) + 1)
    assert curve["own"] == pytest.approx(100 * (np.cumsum(wrong[np.argsort(-confidence)]) / kept).mean(), rel=0.03)
    assert curve["by_chance"] == pytest.approx(100 * wrong.mean())
    assert curve["at_best"] == pytest.approx(100 * (np.cumsum(np.sort(wrong)) / kept).mean(), rel=1e-3)
    assert curve["at_best"] < curve["own"] < 0.7 * curve["by_chance"]


def test_bounds_of_the_curve() -> None:
    perfect = counts_of([0.9] * 75 + [0.1] * 25, [0.0] * 75 + [5.0] * 25).sparsification()
    assert perfect["own"] == pytest.approx(perfect["at_best"])
    useless = counts_of([0.5] * 4, [0.0, 5.0, 0.0, 5.0]).sparsification()
    assert useless["own"] == pytest.approx(useless["by_chance"]) == pytest.approx(50)
    assert counts_of([0.9, 0.2], [5.0, 5.0]).sparsification() == pytest.approx(
        {"own": 100, "by_chance": 100, "at_best": 100}
    )
    nothing = ConfidenceCounts()
    nothing.update(0, "one", *np.zeros((3, 2, 2), np.float32), np.zeros((2, 2), bool))
    assert all(math.isnan(value) for value in nothing.sparsification().values())
    assert "nan" not in nothing.table()


def test_the_table() -> None:
    lines = counts_of([1.0, 0.95, 0.6, 0.2], [0.5, 1.5, 3.5, 9.0]).table().splitlines()
    titles = ["confidence", "kept", "%", "EPE", "px", "bad-1", "%", "bad-3", "%", "over", "all", "pixels"]
    assert lines[0].split() == titles
    assert lines[1].split() == ["all", "100.00", "3.625", "75.00", "50.00"]
    assert lines[3].split() == ["from", "0.5", "75.00", "1.833", "66.67", "33.33"]
    assert lines[-1].startswith("area under bad-3 over the share kept: ")
    assert len(lines) == len(THRESHOLDS) + 2
