"""Small networks with random weights."""

from __future__ import annotations

from typing import Any, TypeVar

import torch
from torch import nn

from fa_stereo.config import AttentionConfig, ModelConfig
from fa_stereo.models.psmnet import PSMNet, build_model

Module = TypeVar("Module", bound=nn.Module)


def tiny(**changes: Any) -> ModelConfig:
    settings = {"base_channels": 8, "max_disparity": 32, "attention": AttentionConfig(key_channels=8)} | changes
    return ModelConfig(**settings)


def calibrated() -> PSMNet:
    """Return random weights with one batch's statistics: scores of ordinary size, disparity from 0 to 31 px."""
    torch.manual_seed(0)
    model = build_model(ModelConfig(base_channels=8, max_disparity=32))
    for module in model.modules():
        if isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
            module.momentum = 1.0
    with torch.no_grad():
        model.train()(torch.randn(2, 3, 64, 96), torch.randn(2, 3, 64, 96))
    return model.eval()


def randomize(module: Module) -> Module:
    """Give every weight and statistic a value that matters, the zero-initialised ones too."""
    for name, tensor in module.state_dict().items():
        if name.endswith("running_var"):
            tensor.uniform_(0.5, 1.5)
        elif tensor.is_floating_point() and tensor.dim() <= 1:
            tensor.normal_(0.5, 0.2)
        elif tensor.is_floating_point() and "attention" in name:
            tensor.normal_(0, 0.1)
    return module
