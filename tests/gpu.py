"""Tests that need a GPU (``python -m pytest -m gpu`` runs these alone), and Triton kernels compiled without a GPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch


def needs_gpu(test: Callable[..., Any]) -> Any:
    """Mark a test, and skip it where there is none."""
    skip = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
    return pytest.mark.gpu(skip(test))


def compile_kernel(kernel: Any, capability: int, types: dict[str, str], **constants: Any) -> str:
    """Compile a Triton kernel for NVIDIA GPUs, whether there is one or not, and return its PTX.

    Args:
        kernel: What ``triton.jit`` returned.
        capability: Of the GPU: 80 for 8.0, for instance.
        types: Of arguments, by name; those not named are int32.
        constants: Values of the compile-time arguments.
    """
    pytest.importorskip("triton", minversion="3.3")
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = [parameter.name for parameter in kernel.params]
    assert types.keys() | constants.keys() <= set(names)
    signature = {name: "constexpr" if name in constants else types.get(name, "i32") for name in names}
    compiled = triton.compile(ASTSource(kernel, signature, constants), target=GPUTarget("cuda", capability, 32))
    assert compiled.asm["cubin"]  # down to what the GPU executes
    text: str = compiled.asm["ptx"]
    return text
