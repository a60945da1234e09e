"""Measuring attention: what runs, what is compared, how a lack of memory or time is told."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from test_configs import make

from fa_stereo import attention_profiling
from fa_stereo.attention_profiling import (
    MODES,
    SAME_FUNCTION,
    VARIANTS,
    Case,
    Outcome,
    build_run,
    compare,
    find_largest,
    fit_batches,
    growth,
    measure,
    variant_config,
)
from fa_stereo.errors import InputError

SMALL: dict[str, Any] = {"height": 48, "width": 64, "base_channels": 8, "max_disparity": 32, "threads": 1}

linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="limits on the CPU are Linux'")


def case(variant: str, **changes: Any) -> Case:
    return Case(variant, variant_config(variant, key_channels=16), **{**SMALL, **changes})


# --------------------------------------------------------------------------------------------------------------------
# what runs


@pytest.mark.parametrize(
    ("slot", "channels", "scale"), [("res1", 8, 2), ("res2", 16, 4), ("res4", 32, 4), ("pyramid", 8, 4)]
)
def test_the_block_gets_the_map_of_its_slot(slot: str, channels: int, scale: int) -> None:
    one = case("factorized", slots=(slot,))
    assert (one.channels, one.map_size, one.positions) == (channels, (48 // scale, 64 // scale), 48 * 64 // scale**2)
    output = build_run(one).compute()
    assert output is not None
    assert output.shape == (1, channels, 48 // scale, 64 // scale)
    several = case("factorized", slots=("res4", "res1"), scope="features")
    assert several.positions == 48 * 64 // 4


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("variant", [*VARIANTS, "axial_5"])
def test_the_block_alone(variant: str, mode: str) -> None:
    run = build_run(case(variant, mode=mode, batch=2))
    result = run.compute()
    assert result is not None
    assert run.passed is not None
    assert result.shape == run.passed.shape == (2, 32, 12, 16)
    added = result.detach() - run.passed.detach()
    assert (added.abs().max() > 1e-3) == (variant != "none")  # what starts as the identity has been drawn anew
    torch.testing.assert_close(run.compute(), result)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("variants", SAME_FUNCTION)
def test_variants_of_one_function_have_the_same_weights_and_inputs(variants: Sequence[str], mode: str) -> None:
    expected, *others = (build_run(case(variant, mode=mode)).compute() for variant in variants)
    for other in others:
        torch.testing.assert_close(other, expected)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("variant", ["none", "factorized", "resblock"])
@pytest.mark.parametrize(("scope", "shape"), [("features", (2, 8, 12, 16)), ("network", (2, 48, 64))])
def test_inside_the_network(scope: str, shape: tuple[int, ...], variant: str, mode: str) -> None:
    run = build_run(case(variant, scope=scope, mode=mode, batch=2, activation_checkpointing=True))
    result = run.compute()
    assert (result is None) == (mode == "training")
    assert result is None or result.shape == shape


def test_low_precision_is_autocast() -> None:
    exact, coarse = (build_run(case("factorized", scope="features", precision=p)).compute() for p in ("fp32", "bf16"))
    assert exact is not None
    assert coarse is not None
    assert coarse.dtype == torch.bfloat16
    assert not torch.equal(coarse.float(), exact)


@pytest.mark.parametrize("name", sorted(set(VARIANTS) - {"non_local_materialized"}))
def test_variants_are_called_what_they_are_called_in_the_configuration(name: str) -> None:
    configured = make(f"attention={name}").model.attention
    if name.endswith("bottleneck"):  # half of the channels of another map
        configured.value_channels = None if name == "resblock_bottleneck" else 64
    assert variant_config(name) == configured


def test_variant_names() -> None:
    assert variant_config("axial_5").span == 5
    assert variant_config("axial_5").heads == 8
    assert variant_config("axial_whole", heads=2).span is None
    assert variant_config("axial_whole", heads=2).heads == 2
    assert variant_config("factorized").heads == 1
    assert variant_config("non_local_fused", 32, value_channels=8).value_channels == 8
    assert variant_config("factorized_bottleneck", 32).value_channels == 32
    assert variant_config("factorized_bottleneck", 32, value_channels=8).value_channels == 8
    with pytest.raises(InputError, match="there is no variant 'linear': choose from none, "):
        variant_config("linear")
    with pytest.raises(InputError, match="span must be odd"):
        variant_config("axial_4")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"scope": "everything"}, "scope must be one of block, features, network"),
        ({"mode": "testing"}, "mode must be one of inference, training"),
        ({"precision": "int8"}, "precision must be one of"),
        ({"height": 40}, "height must be a positive multiple of 16, got 40"),
        ({"batch": 0}, "batch must be positive, got 0"),
        ({"budget_bytes": 0}, "budget must be positive, got 0"),
        ({"max_disparity": 20}, "multiple of 16"),
        ({"slots": ("res9",)}, "res9"),
    ],
)
def test_unusable_cases(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        case("factorized", **changes)


def test_cases_travel_as_text() -> None:
    one = case("axial_5", scope="features", slots=("res3", "res4"))
    assert Case.from_json(one.to_json()) == one
    assert one.positions == 12 * 16
    assert one.channels == 32


# --------------------------------------------------------------------------------------------------------------------
# in processes


@linux
def test_a_budget_ends_in_a_clean_outcome() -> None:
    # 4096 positions: an attention map of 67 MB, of which the softmax briefly needs two
    turns: list[int] = []
    cases = [
        case(variant, height=256, width=256, budget_bytes=100 * 10**6)
        for variant in ("non_local_fused", "non_local_materialized")
    ]
    fits, fails = measure(cases, repeats=2, progress=lambda: turns.append(1))
    assert len(turns) == 2 * (2 + 1)
    assert fits.status == "measured"
    assert len(fits.seconds) == 2
    assert fits.result is not None
    assert fits.result.shape == (1, 32, 64, 64)
    assert fits.extra_bytes is not None
    assert fits.used_bytes is not None
    assert fits.peak_bytes is not None
    assert 10**6 < fits.extra_bytes < fits.used_bytes < 100 * 10**6 < fits.peak_bytes
    assert fits.extra_bytes == pytest.approx(cases[0].formula_bytes(), rel=0.3)
    assert (fits.limit_bytes, fits.limited_by) == (100 * 10**6, "budget")
    assert fails.status == "out_of_memory"
    assert "allocate" in fails.reason
    assert (fails.limit_bytes, fails.limited_by) == (100 * 10**6, "budget")
    rows = compare(cases, [fits, fails])
    assert json.loads(json.dumps(rows)) == rows
    assert "deviation" not in rows[0]  # the reference of its function ran out of memory
    assert rows[1]["formula_bytes"] > 2 * 4 * 4096**2


@linux
def test_a_run_that_takes_too_long_is_given_up() -> None:
    slow = case("non_local_chunked", height=512, width=512)
    (outcome,) = measure([slow], repeats=3, time_limit=0.002)
    assert outcome.status == "too_slow"
    assert outcome.reason == "more than 0.002 s"


def test_a_failing_process_says_why() -> None:
    (outcome,) = measure([case("factorized", device="cuda:99")], repeats=1)
    assert outcome.status == "failed"
    assert outcome.reason


# --------------------------------------------------------------------------------------------------------------------
# what is made of it


def measured(seconds: float, extra: int, result: float | None = None, used: int | None = None) -> Outcome:
    array = None if result is None else np.asarray([result, 2.0], np.float32)
    return Outcome("measured", "", [seconds], 1000 + extra, extra, used or 10 + extra, 500, "budget", array)


def test_rows_compare_with_the_baseline_and_the_reference() -> None:
    names = ["none", "factorized", "non_local_fused", "non_local_chunked", "non_local_materialized"]
    cases = [case(name) for name in names] + [case("non_local_fused", precision="bf16")]
    outcomes = [
        measured(1.0, 100, 0.0),
        measured(3.0, 150, 1.0),
        measured(9.0, 170, 1.25),
        Outcome("out_of_memory", "no more", limit_bytes=500, limited_by="budget"),
        measured(8.0, 400, 1.5),
        measured(7.0, 120, 0.5),
    ]
    rows = compare(cases, outcomes)
    assert [row["status"] for row in rows] == ["measured"] * 3 + ["out_of_memory"] + ["measured"] * 2
    assert rows[1]["attention_seconds"] == 2.0
    assert rows[1]["attention_bytes"] == 50
    assert "deviation" not in rows[1]
    assert rows[2]["deviation"] == pytest.approx(0.25 / 2)
    assert rows[2]["deviation_from"] == "non_local_materialized fp32"
    assert "deviation" not in rows[4]
    assert rows[5]["deviation"] == pytest.approx(1.0 / 2)  # from the most trusted precision
    assert "attention_bytes" not in rows[5]  # no baseline in bf16
    assert rows[3]["formula_bytes"] > 0
    assert rows[0]["formula_bytes"] is None


def test_growth_is_the_slope_of_the_logarithms() -> None:
    rows = [
        {
            "variant": variant, "mode": "inference", "precision": "fp32", "positions": positions, "batch": 2,
            "seconds": 1e-6 * positions**power, "extra_bytes": 0 if positions == 64 else 3 * positions,
        }
        for variant, power in (("factorized", 1), ("non_local_fused", 2))
        for positions in (16, 64, 100, 900)
    ]  # fmt: skip
    rows[0].pop("seconds")  # as in a row that ran out of memory
    linear, quadratic = growth(rows)
    assert linear["time_exponent"] == pytest.approx(1)
    assert linear["time_points"] == 3
    assert quadratic["time_exponent"] == pytest.approx(2)
    assert quadratic["memory_exponent"] == pytest.approx(1)
    assert quadratic["memory_points"] == 3
    assert growth(rows[1:3])[0]["time_exponent"] is None


def test_batches_are_fitted_by_a_line() -> None:
    cases = [case("factorized", scope="network", mode="training", batch=batch) for batch in (1, 2, 4, 8)]
    outcomes = [measured(1.0, 0, used=500 + 1000 * batch) for batch in (1, 2, 4)]
    outcomes.append(Outcome("out_of_memory", "no more", limit_bytes=500, limited_by="budget"))
    rows = [row for one, outcome in zip(cases, outcomes, strict=True) for row in compare([one], [outcome])]
    (fit,) = fit_batches(rows, batch=24, budget_bytes=7499)
    assert fit["fixed_bytes"] == pytest.approx(500, abs=1)
    assert fit["bytes_per_sample"] == pytest.approx(1000, abs=1)
    assert fit["largest_error_bytes"] <= 1
    assert fit["used_bytes"] == pytest.approx(24500, abs=1)
    assert fit["largest_batch"] == 6
    assert fit["measured_batches"] == [1, 2, 4]
    assert fit_batches(rows[:1], 24, 7499) == []


Fake = Callable[[Case], Outcome]


@pytest.fixture
def measure_by(monkeypatch: pytest.MonkeyPatch) -> Callable[[Fake], list[Case]]:
    """Replace measuring by a function of the case; returns the list of cases asked for."""

    def replace(fake: Fake) -> list[Case]:
        asked: list[Case] = []

        def measure(cases: Sequence[Case], repeats: int, time_limit: float, progress: Any = None) -> list[Outcome]:
            asked.extend(cases)
            return [fake(one) for one in cases]

        monkeypatch.setattr(attention_profiling, "measure", measure)
        return asked

    return replace


OOM = Outcome("out_of_memory", "no more", limit_bytes=500, limited_by="budget")


@pytest.mark.parametrize("limit", [300, 1000, 50_000])
def test_the_search_brackets_the_largest_that_fits(limit: int, measure_by: Callable[[Fake], list[Case]]) -> None:
    asked = measure_by(lambda one: measured(1.0, 0) if one.positions <= limit else OOM)
    found = find_largest(case("factorized", height=128, width=224), precision=1.05)
    height, width = found["fits"]
    fails_height, fails_width = found["fails"]
    assert height * width // 16 == found["positions"] <= limit < fails_height * fails_width // 16
    assert found["status"] == "out_of_memory"
    assert len(asked) < 20
    assert len({(one.height, one.width) for one in asked}) == len(asked)  # none twice
    assert width / height == pytest.approx(224 / 128, rel=0.35)


def test_the_search_ends_where_time_runs_out_or_nothing_fits(measure_by: Callable[[Fake], list[Case]]) -> None:
    slow = Outcome("too_slow", "more than 1 s")
    measure_by(lambda one: measured(1.0, 0) if one.positions <= 9999 else slow)
    found = find_largest(case("factorized", height=128, width=224))
    assert found["status"] == "too_slow"
    assert found["positions"] <= 9999
    measure_by(lambda one: OOM)
    found = find_largest(case("factorized", height=128, width=224))
    assert found["fits"] is None
    assert found["fails"] == [16, 16]


def test_the_search_keeps_the_case(measure_by: Callable[[Fake], list[Case]]) -> None:
    start = case("axial_5", scope="network", mode="training", batch=3, height=64, width=64)
    asked = measure_by(lambda one: measured(1.0, 0) if one.height < 200 else OOM)
    found = find_largest(start)
    assert all(dataclasses.replace(one, height=64, width=64) == start for one in asked)
    assert [found[key] for key in ("variant", "scope", "mode", "batch")] == ["axial_5", "network", "training", 3]
