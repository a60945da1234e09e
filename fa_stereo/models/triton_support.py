"""Fused GPU kernels where Triton works, and the plain PyTorch form everywhere else."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch

Kernel = Callable[..., Any]


def checked_kernel(load: Callable[[], Kernel], what: str) -> Kernel | None:
    """Return a kernel that was tried out, or None where there is no Triton or it does not work, with a warning.

    Args:
        load: Imports the kernel, runs it on something small (both ways, if it has two), and returns it; raises
            ``RuntimeError`` if the result is wrong. It runs with gradients on, whatever the caller's mode.
        what: What is slower without it, for the warning.
    """
    try:
        with (
            torch.inference_mode(False),
            torch.enable_grad(),
            # Under activation checkpointing, what the trial saves for its backward pass is none of the caller's.
            torch.autograd.graph.saved_tensors_hooks(lambda x: x, lambda x: x),
        ):
            return load()
    except ImportError:
        return None
    except Exception as error:  # whatever a compiler and a driver that do not fit each other come up with
        warnings.warn(f"Triton does not work here, {what} is slower without it: {error}", stacklevel=4)
        return None
