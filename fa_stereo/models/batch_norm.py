"""Batch norm's running statistics: frozen for training, and estimated anew for finished weights."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from fa_stereo.models.psmnet import PSMNet


def set_batch_norm_to_eval(model: nn.Module) -> None:
    """Have every batch norm of a network normalise by its running statistics, and leave them as they are."""
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.eval()


def reestimate_batch_norm(model: PSMNet, batches: Iterable[tuple[Tensor, Tensor]]) -> int:
    """Replace batch norm's running statistics by those of the weights as they are now.

    In training the statistics trail behind the weights, and those of tiny batches are noisy. Here every batch passes
    through the network in training mode, normalised by its own statistics, and the running mean and variance of each
    layer become the plain means over the batches (features: over the views). The weights do not change.

    Args:
        model: The network; its mode and its batch norm's momentum are left as they were.
        batches: Normalised left and right pictures, float [B, 3, H, W] each, on the network's device.

    Returns:
        Number of pairs seen.

    Raises:
        ValueError: There was no batch; the statistics are as they were.
    """
    norms = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    before = [(norm.momentum, {name: buffer.clone() for name, buffer in norm.named_buffers()}) for norm in norms]
    training, pairs = model.training, 0
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # a cumulative average
    try:
        model.train()
        with torch.no_grad():
            for left, right in batches:
                model(left, right)
                pairs += len(left)
    finally:
        model.train(training)
        for norm, (momentum, buffers) in zip(norms, before, strict=True):
            norm.momentum = momentum
            if pairs == 0:
                norm.load_state_dict(buffers, strict=False)
    if pairs == 0:
        raise ValueError("batch norm cannot be estimated from no pairs")
    return pairs
