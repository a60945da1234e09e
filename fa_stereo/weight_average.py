"""Averaged weights, which are better than those of any one step."""

from __future__ import annotations

import copy

import torch
from torch.optim.swa_utils import get_ema_multi_avg_fn

from fa_stereo.models.psmnet import PSMNet


class WeightAverage:
    """An exponential moving average of a network's weights and of batch norm's statistics.

    ``average += (1 - decay) * (weights - average)``; in the first steps the decay is at most
    (1 + step) / (10 + step), so that the average forgets the initial weights.

    Args:
        model: The network; the average starts as a copy of it.
        decay: From 0 to below 1.
    """

    def __init__(self, model: PSMNet, decay: float) -> None:
        self.model = copy.deepcopy(model).eval().requires_grad_(False)
        self.decay = decay

    @torch.no_grad()
    def update(self, model: PSMNet, step: int) -> None:
        """Move the average towards the weights after a step (counted from 0)."""
        decay = min(self.decay, (1 + step) / (10 + step))
        averaged, current = self.model.state_dict(), model.state_dict()
        floating = [name for name, tensor in averaged.items() if tensor.is_floating_point()]
        counters = [name for name in averaged if name not in set(floating)]  # batch norm's
        # All at once, which a GPU does in a few kernels instead of one for each tensor.
        update = get_ema_multi_avg_fn(decay)  # type: ignore[no-untyped-call]
        update([averaged[name] for name in floating], [current[name] for name in floating], step)
        torch._foreach_copy_([averaged[name] for name in counters], [current[name] for name in counters])
