"""Every schedule against its formula at its ends and in the middle."""

from __future__ import annotations

import math

import pytest

from fa_stereo.config import ScheduleConfig
from fa_stereo.schedules import learning_rate_factor


def factors(config: ScheduleConfig, total: int = 100, steps_per_epoch: int = 10) -> list[float]:
    return [learning_rate_factor(config, step, total, step / steps_per_epoch) for step in range(total)]


def test_constant_is_the_papers() -> None:
    assert factors(ScheduleConfig()) == [1.0] * 100


def test_warmup_grows_linearly_and_leaves_the_rest_alone() -> None:
    values = factors(ScheduleConfig(warmup_steps=10))
    assert values[:10] == pytest.approx([(step + 1) / 10 for step in range(10)])
    assert values[10:] == [1.0] * 90


def test_warmup_leads_to_where_one_cycle_begins() -> None:
    values = factors(ScheduleConfig("one_cycle", warmup_steps=10, rise_fraction=0.2))
    assert values[:10] == pytest.approx([(step + 1) / 250 for step in range(10)])
    assert values[:29] == sorted(values[:29])
    assert max(values) == values[28] == pytest.approx(1.0)


def test_cosine_ends_at_the_final_factor() -> None:
    config = ScheduleConfig("cosine", warmup_steps=20, final_factor=0.1)
    values = factors(config)
    assert values[20] == 1.0
    assert values[60] == pytest.approx(0.55)  # half way after the warm-up
    assert learning_rate_factor(config, 100, 100, 0.0) == pytest.approx(0.1)
    assert values[40] == pytest.approx(0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi / 4)))


def test_one_cycle_rises_and_falls() -> None:
    values = factors(ScheduleConfig("one_cycle", rise_fraction=0.2, final_factor=0.01))
    assert values[0] == pytest.approx(1 / 25)
    assert max(values) == values[20] == pytest.approx(1.0)
    assert values[:21] == sorted(values[:21])
    assert values[20:] == sorted(values[20:], reverse=True)


@pytest.mark.parametrize(("rise", "ends"), [(0.0, (1.0, 0.0)), (1.0, (1 / 25, 1.0))])
def test_one_cycle_that_only_falls_or_rises(rise: float, ends: tuple[float, float]) -> None:
    config = ScheduleConfig("one_cycle", rise_fraction=rise)
    assert learning_rate_factor(config, 0, 10, 0.0) == pytest.approx(ends[0])
    assert learning_rate_factor(config, 10, 10, 0.0) == pytest.approx(ends[1])


def test_multi_step_counts_epochs() -> None:
    values = factors(ScheduleConfig("multi_step", milestones=[3, 6], decay=0.1))
    assert values[29] == 1.0
    assert values[30] == pytest.approx(0.1)
    assert values[60] == pytest.approx(0.01)


@pytest.mark.parametrize("kind", ["constant", "cosine", "one_cycle", "linear", "multi_step"])
def test_every_schedule_stays_a_factor(kind: str) -> None:
    config = ScheduleConfig(kind, warmup_steps=5, milestones=[2], rise_fraction=0.0)
    assert all(0 <= value <= 1 for value in factors(config))
    assert 0 <= learning_rate_factor(config, 7, 7, 1.0) <= 1  # a run shorter than expected
