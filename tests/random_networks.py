"""Small networks with random weights."""

from __future__ import annotations

from typing import Any, TypeVar

from torch import nn

from fa_stereo.config import AttentionConfig, ModelConfig

Module = TypeVar("Module", bound=nn.Module)


def tiny(**changes: Any) -> ModelConfig:
    settings = {"base_channels": 8, "max_disparity": 32, "attention": AttentionConfig(key_channels=8)} | changes
    return ModelConfig(**settings)


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
