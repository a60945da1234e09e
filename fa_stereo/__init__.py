"""FA-PSMNet: disparity from rectified picture pairs, with pyramid stereo matching and factorized attention.

The names below are loaded when first used, so that ``import fa_stereo`` is quick and needs no PyTorch yet.

Examples:
    >>> import fa_stereo
    >>> fa_stereo.ModelConfig(base_channels=16).attention.kind
    'factorized'
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fa_stereo.config import AttentionConfig, ModelConfig
    from fa_stereo.data.formats import read_picture_pair
    from fa_stereo.errors import InputError
    from fa_stereo.inference import DisparityPredictor, Prediction, load_predictor
    from fa_stereo.models.checkpoint import load_model
    from fa_stereo.models.psmnet import build_model
    from fa_stereo.weights import list_weights

__version__ = "0.1.0"

__all__ = [
    "AttentionConfig",
    "DisparityPredictor",
    "InputError",
    "ModelConfig",
    "Prediction",
    "__version__",
    "build_model",
    "list_weights",
    "load_model",
    "load_predictor",
    "read_picture_pair",
]

# public name -> module that defines it
_HOMES = {
    "AttentionConfig": "fa_stereo.config",
    "DisparityPredictor": "fa_stereo.inference",
    "InputError": "fa_stereo.errors",
    "ModelConfig": "fa_stereo.config",
    "Prediction": "fa_stereo.inference",
    "build_model": "fa_stereo.models.psmnet",
    "list_weights": "fa_stereo.weights",
    "load_model": "fa_stereo.models.checkpoint",
    "load_predictor": "fa_stereo.inference",
    "read_picture_pair": "fa_stereo.data.formats",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'fa_stereo' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
