"""The learning rate as a pure function of the step: nothing to save, nothing to restore."""

from __future__ import annotations

import math

from fa_stereo.config import ScheduleConfig


def learning_rate_factor(config: ScheduleConfig, step: int, total_steps: int, epoch: float) -> float:
    """Return the factor by which the peak learning rate is multiplied in one step.

    Args:
        config: The schedule.
        step: Optimizer steps already taken: 0 in the first.
        total_steps: Steps of the whole run, or as many as are expected by now.
        epoch: Passes over the training pairs already made, for ``multi_step``.

    Returns:
        A factor from 0 to 1.

    Examples:
        >>> [learning_rate_factor(ScheduleConfig("linear", warmup_steps=2), s, 6, 0.0) for s in range(6)]
        [0.5, 1.0, 1.0, 0.75, 0.5, 0.25]
    """
    rise = config.rise_fraction if config.kind == "one_cycle" else 0.0
    first = 1 / 25 if rise else 1.0  # to which the warm-up leads
    if step < config.warmup_steps:
        return (step + 1) / config.warmup_steps * first
    progress = min((step - config.warmup_steps) / max(total_steps - config.warmup_steps, 1), 1.0)
    if config.kind == "constant":
        return 1.0
    if config.kind == "multi_step":
        passed = sum(epoch >= milestone for milestone in config.milestones)
        return float(config.decay**passed)
    if config.kind == "linear":
        return _blend(1.0, config.final_factor, progress)
    if config.kind == "cosine":
        return _blend(1.0, config.final_factor, _half_cosine(progress))
    # one_cycle: up along half a cosine from 1/25, then down along another (Smith and Topin, "Super-convergence").
    if progress < rise or rise == 1:
        return _blend(first, 1.0, _half_cosine(progress / rise))
    return _blend(1.0, config.final_factor, _half_cosine((progress - rise) / (1 - rise)))


def _blend(start: float, end: float, share: float) -> float:
    return start + (end - start) * share


def _half_cosine(progress: float) -> float:
    """Grow from 0 to 1, slowly at both ends."""
    return (1 - math.cos(math.pi * progress)) / 2
