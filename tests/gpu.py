"""What needs a GPU: ``python -m pytest -m gpu`` runs these tests alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch


def needs_gpu(test: Callable[..., Any]) -> Any:
    """Mark a test, and skip it where there is none."""
    skip = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
    return pytest.mark.gpu(skip(test))
