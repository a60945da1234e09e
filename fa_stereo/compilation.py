"""torch.compile for the two parts of the network that a compiler can take whole: features and aggregation.

The first convolution over the cost volume and the disparity regression are loops over disparities and rows with
backward passes of their own; they stay as they are. What is compiled computes the same to rounding, and its parameters
keep their names. PyTorch's ``freezing`` is never used: it gave wrong disparity for this network on the CPU.

On a CPU nearly all time is spent inside convolutions, which a compiler calls like everybody else, so there is next to
nothing to gain; on a GPU, where small operations between them count, there may be.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from functools import cache

import torch

from fa_stereo.errors import InputError
from fa_stereo.models.psmnet import PSMNet


def compile_network(model: PSMNet, backend: str = "inductor") -> PSMNet:
    """Compile a network's features and aggregation in place, for inference or training.

    Compilation happens when the network first runs and again for every other size of picture, up to PyTorch's limit of
    eight sizes; those after run uncompiled.

    Args:
        model: The network, on the device it will run on.
        backend: Of torch.compile.

    Returns:
        The same network. A deep copy of it is not compiled.

    Raises:
        InputError: There is no compiler, or it does not work.
    """
    check_compiler(next(model.parameters()).device, backend)
    for part in (model.features, model.aggregation):
        part.compile(backend=backend, dynamic=False)
    return model


def uncompiled() -> AbstractContextManager[object]:
    """Run compiled networks as they were written inside this context: with hooks, or at a size seen only once."""
    context: AbstractContextManager[object] = torch.compiler.set_stance("force_eager")
    return context


@cache
def check_compiler(device: torch.device, backend: str = "inductor") -> None:
    """Compile and run something small, which takes seconds the first time.

    Raises:
        InputError: It failed: a compiler or Python's headers are missing, say.
    """
    try:
        double = torch.compile(_double, backend=backend, dynamic=False)
        works = bool((double(torch.ones(8, device=device)) == 2).all())
        reason = "it computes wrong results"
    except Exception as error:  # whatever a compiler, a driver and Python come up with that do not fit each other
        works, reason = False, str(error).strip().split("\n")[0]
    if not works:
        raise InputError(
            f"torch.compile does not work here ({reason}): install a C++ compiler (g++ or clang) and Python's headers, "
            "or go without compile"
        )


def _double(x: torch.Tensor) -> torch.Tensor:
    return x + x
