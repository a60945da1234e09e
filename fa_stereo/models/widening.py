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
    """Return a network of twice the width that predicts what the given one does, for training to go on.

    Args:
        model: The network, on the CPU; it is left alone.
        noise: Standard deviation of the random numbers, in units of that of each layer's weights; with 0 the second
            half of the channels would never learn anything of its own.
        seed: Of the random numbers.

    Returns:
        A network of twice the ``base_channels``, of the model's type and in its mode. Its attention keeps its key
        channels, and its value channels too where the configuration gives their number.
    """
    wide = build_model(dataclasses.replace(model.config, base_channels=2 * model.config.base_channels))
    wide.to(next(model.parameters()).dtype)
    generator = torch.Generator().manual_seed(seed)
    narrow_modules = dict(model.named_modules())
    for name, module in wide.named_modules():
        narrow = narrow_modules[name]
        transposed = isinstance(module, nn.ConvTranspose3d)  # whose weights are [inputs, outputs, ...]
        for key, target in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
            values: Tensor = getattr(narrow, key)
            if transposed:
                values, target = values.transpose(0, 1), target.transpose(0, 1)
            # Twins lie side by side, so that two maps, concatenated, lie pair by pair too.
            if values.dim() and target.shape[0] == 2 * values.shape[0]:
                values = values.repeat_interleave(2, dim=0)
            if values.dim() > 1 and target.shape[1] == 2 * values.shape[1]:
                if key == "weight":
                    deviation = noise / 2 * values.std(correction=0)
                    change = torch.randn(values.shape, generator=generator).to(values) * deviation
                    values = torch.stack([values / 2 + change, values / 2 - change], dim=2).flatten(1, 2)
                else:  # a table of vectors, one for each position
                    values = values.repeat_interleave(2, dim=1)
            target.copy_(values)
    return wide.train(model.training)
