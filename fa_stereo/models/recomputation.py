"""Activation checkpointing: parts of the network that keep their inputs only and run again in the backward pass.

Running a part twice must not count its batch twice in the running statistics of batch norm; see ``recompute``.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from types import TracebackType
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

Run = Callable[..., Any]
"""How to run a part: ``run(module, *inputs, **options)``."""


def call(module: nn.Module, *inputs: Any, **options: Any) -> Any:
    """Run a module as usual."""
    return module(*inputs, **options)


def recompute(module: nn.Module, *inputs: Any, **options: Any) -> Any:
    """Run a module and keep nothing but its inputs; the backward pass runs it again.

    Values, gradients and running statistics are those of ``call``: the second run normalises by the statistics of
    its batch as the first did, but does not record them. The module must not draw random numbers.
    """
    return checkpoint(
        module,
        *inputs,
        use_reentrant=False,
        preserve_rng_state=False,
        context_fn=partial(_contexts, module),
        **options,
    )


def _contexts(module: nn.Module) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    return nullcontext(), _ScratchStatistics(module)


class _ScratchStatistics(AbstractContextManager[None]):
    """Inside, batch norm records into copies of its running statistics, which are dropped; may be entered again."""

    def __init__(self, module: nn.Module) -> None:
        self.norms = [norm for norm in module.modules() if isinstance(norm, _BatchNorm)]
        self.originals: list[dict[str, Tensor | None]] = []

    def __enter__(self) -> None:
        self.originals = [norm._buffers for norm in self.norms]
        for norm in self.norms:
            norm._buffers = {name: None if b is None else b.clone() for name, b in norm._buffers.items()}

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for norm, originals in zip(self.norms, self.originals, strict=True):
            norm._buffers = originals
