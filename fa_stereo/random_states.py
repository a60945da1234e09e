"""The random numbers that whatever draws from global states gets: Python's, NumPy's and PyTorch's."""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch


def seed_everything(seed: int) -> None:
    """Begin all of them anew."""
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002 - whatever draws from the global state shall be repeatable
    torch.manual_seed(seed)


def random_state() -> dict[str, Any]:
    """Return all global random states as tensors and plain data, which is what checkpoints may hold."""
    kind, keys, *rest = np.random.get_state()  # noqa: NPY002
    return {
        "python": random.getstate(),
        "numpy": (str(kind), np.asarray(keys).tolist(), *(x.item() if isinstance(x, np.generic) else x for x in rest)),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
    }


def set_random_state(state: Mapping[str, Any]) -> None:
    """Go on from what ``random_state`` returned; without CUDA's where there is none."""
    random.setstate(state["python"])
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, np.array(keys, np.uint32), *rest))  # noqa: NPY002
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
