"""The memory order in which convolutions are fast: the channels of a position side by side."""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import Tensor, nn

Module = TypeVar("Module", bound=nn.Module)


def channels_last_format(x: Tensor) -> torch.memory_format:
    """Return the memory order in which the channels of a map [B, C, H, W] or [B, C, D, H, W] lie together."""
    return torch.channels_last if x.dim() == 4 else torch.channels_last_3d


def to_channels_last(model: Module) -> Module:
    """Put the weights of all convolutions into channels_last(_3d) order, in place, and return the network.

    Activations follow the weights, in training too. Values, names and shapes of parameters stay the same, and so does
    the function.
    """
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            module.to(memory_format=torch.channels_last)
        elif isinstance(module, nn.Conv3d | nn.ConvTranspose3d):
            module.to(memory_format=torch.channels_last_3d)
    return model
