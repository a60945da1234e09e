"""A trained network at twice the width that computes the same function (Chen, Goodfellow, Shlens 2016, "Net2Net").

Every channel becomes two equal ones, and whoever reads them takes half of each. Left at that, both would get the same
gradients and stay equal for ever; so what is read of one is raised by a random number and what is read of the other is
lowered by it, which cancels as long as they are equal.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor, nn

from fa_stereo.models.psmnet import PSMNet, build_model


@torch.no_grad()
def widen(model: PSMNet, *, noise: float = 0.5, seed: int = 0) -> PSMNet:
    """Return a network of twice the ``base_channels`` that predicts what the given one does, for training to go on.

    Args:
        model: The network, on the CPU; it is left alone. Its attention keeps its key channels.
        noise: Standard deviation of the random numbers, in units of that of each layer's weights; with 0 the second
            half of the channels would never learn anything of its own.
        seed: Of the random numbers.
    """
    wide = build_model(dataclasses.replace(model.config, base_channels=2 * model.config.base_channels))
    generator = torch.Generator().manual_seed(seed)
    narrow_modules = dict(model.named_modules())
    for name, module in wide.named_modules():
        narrow = narrow_modules[name]
        transposed = isinstance(module, nn.ConvTranspose3d)  # whose weights are [inputs, outputs, ...]
        tensors = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
        for key, target in tensors:
            values: Tensor = getattr(narrow, key)
            is_kernel = values.dim() > 1
            if is_kernel and transposed:
                values, target = values.transpose(0, 1), target.transpose(0, 1)
            if values.dim() and target.shape[0] == 2 * values.shape[0]:
                values = values.repeat_interleave(2, dim=0)  # so that two maps, concatenated, lie pair by pair too
            if is_kernel and target.shape[1] == 2 * values.shape[1]:
                change = torch.randn(values.shape, generator=generator) * (noise / 2 * values.std())
                halves = torch.stack([values / 2 + change, values / 2 - change], dim=2)  # [outputs, inputs, 2, ...]
                values = halves.flatten(1, 2)
            target.copy_(values)
    return wide.train(model.training)
