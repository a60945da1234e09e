"""The fused kernels against the formula: on a GPU as they are, elsewhere in Triton's interpreter."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from torch import Tensor

from fa_stereo.models import cost_volume
from fa_stereo.models.cost_volume import _triton_assemble, convolve_cost_volume, convolve_cost_volume_reference
from tests.gpu import compile_kernel, needs_gpu

CHECK = """
import torch
from fa_stereo.models import cost_volume
from fa_stereo.models.cost_volume import _Assemble, convolve_cost_volume, convolve_cost_volume_reference
from fa_stereo.models.cost_volume_triton import TritonAssemble

torch.manual_seed(0)
for size in [(2, 4, 5, 3, 9), (1, 3, 8, 2, 5), (1, 8, 2, 2, 40), (2, 2, 12, 1, 3), (1, 2, 4, 2, 1), (1, 4, 36, 1, 35)]:
    batch, channels, disparities, height, width = size
    left, right = (torch.randn(batch, channels, height, width).requires_grad_() for _ in range(2))
    weight = torch.randn(channels, 2 * channels, 3, 3, 3).requires_grad_()
    bias = torch.randn(channels) if channels % 2 else None
    cost_volume._Assemble = TritonAssemble
    result = convolve_cost_volume(left, right, weight, disparities, bias)
    cost_volume._Assemble = _Assemble
    exact = [x.detach().double().requires_grad_() for x in (left, right, weight)]
    expected = convolve_cost_volume_reference(*exact, disparities, None if bias is None else bias.double())
    torch.testing.assert_close(result.double(), expected, atol=1e-4, rtol=0)
    for upstream in (torch.randn_like(result), torch.randn(result.shape)):  # channels_last_3d, contiguous
        gradients = torch.autograd.grad(result, (left, right, weight), upstream, retain_graph=True)
        expected_gradients = torch.autograd.grad(expected, exact, upstream.double(), retain_graph=True)
        for gradient, expected_gradient in zip(gradients, expected_gradients):
            torch.testing.assert_close(gradient.double(), expected_gradient, atol=1e-3, rtol=1e-4)
print("equal")
"""

# Beside PyTorch's own additions, which add the same two numbers in the same type: the volume is the same to the bit.
PARTS_CHECK = """
import sys
import torch
from fa_stereo.models.cost_volume import _Assemble
from fa_stereo.models.cost_volume_triton import TritonAssemble

torch.manual_seed(0)
device = sys.argv[1]
shapes = (2, 4, 5, 3, 9), (1, 3, 12, 2, 5), (1, 8, 2, 2, 33)
smaller = (2, 3, 4, 2, 7), (1, 2, 8, 1, 5), (1, 4, 2, 1, 33)  # the interpreter takes its time
checks = (torch.float32, 1e-6, shapes), (torch.bfloat16, 2e-2, smaller), (torch.float16, 2e-3, smaller)
for dtype, tolerance, shapes in checks:
    for batch, channels, disparities, height, width in shapes:
        columns = min(disparities + 1, width), min(disparities, width + 2)
        sizes = (3, width), (12, columns[0]), (3, width + 2), (3, columns[1])
        for memory_format in (torch.contiguous_format, torch.channels_last):
            parts = [torch.randn(batch, n * channels, height, m + 1, device=device).to(dtype) for n, m in sizes]
            parts = [part.contiguous(memory_format=memory_format)[..., 1:].requires_grad_() for part in parts]
            for bias in (None, torch.randn(channels, device=device).to(dtype)):
                with torch.no_grad():
                    expected = _Assemble.apply(*parts, bias, disparities)
                    volume = TritonAssemble.apply(*parts, bias, disparities)
                if device == "cpu" and dtype == torch.bfloat16:  # which the interpreter cuts off, not rounds
                    torch.testing.assert_close(volume, expected, atol=1e-6, rtol=2**-7)
                else:
                    assert torch.equal(volume, expected)
            volume = TritonAssemble.apply(*parts, None, disparities)
            expected = _Assemble.apply(*parts, None, disparities)
            spread = torch.randn(batch, channels, 1, height, 1, device=device).to(dtype).expand(volume.shape)
            for upstream in (torch.randn_like(volume), torch.randn(volume.shape, device=device).to(dtype), spread):
                gradients = torch.autograd.grad(volume, parts, upstream, retain_graph=True)
                again = torch.autograd.grad(volume, parts, upstream, retain_graph=True)
                assert all(map(torch.equal, gradients, again))
                for ours, plain in zip(gradients, torch.autograd.grad(expected, parts, upstream, retain_graph=True)):
                    torch.testing.assert_close(ours, plain, atol=tolerance * float(plain.abs().max()), rtol=0)
print("equal")
"""


@pytest.mark.parametrize("check", [CHECK, PARTS_CHECK], ids=["convolution", "parts"])
def test_kernels_in_the_interpreter(check: str) -> None:
    pytest.importorskip("triton")
    environment = os.environ | {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-c", check, "cpu"]
    run = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert run.stdout.strip() == "equal", run.stderr


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("dtype", ["*fp32", "*bf16", "*fp16"])
@pytest.mark.parametrize(
    "name", ["_assemble", "_full_backward", "_edge_backward", "_sheared_backward", "_last_backward"]
)
def test_kernels_compile_for_gpus(name: str, dtype: str, capability: int) -> None:
    pytest.importorskip("triton")
    from fa_stereo.models import cost_volume_triton

    kernel = getattr(cost_volume_triton, name)
    tensors = {"out", "full", "edge", "sheared", "last", "bias", "result", "grad"} & set(kernel.arg_names)
    biases: list[dict[str, bool]] = [{"HAS_BIAS": True}, {"HAS_BIAS": False}] if name == "_assemble" else [{}]
    for bias in biases:
        options = {"BLOCK": cost_volume_triton._BLOCK_COLUMNS, "CHANNELS": 32} | bias
        assert f".entry {name}" in compile_kernel(kernel, capability, dict.fromkeys(tensors, dtype), **options)


@needs_gpu
def test_the_same_additions_on_the_gpu() -> None:
    pytest.importorskip("triton")
    run = subprocess.run([sys.executable, "-c", PARTS_CHECK, "cuda"], capture_output=True, text=True, check=False)
    assert run.stdout.strip() == "equal", run.stderr


@needs_gpu
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-2), (torch.bfloat16, 0.3), (torch.float16, 3e-2)])
@pytest.mark.parametrize("bias", [False, True])
def test_kernels_on_the_gpu(dtype: torch.dtype, tolerance: float, bias: bool) -> None:
    pytest.importorskip("triton")
    device = torch.device("cuda", 0)
    assert _triton_assemble(device, dtype) is not None
    size = (2, 32, 34, 60)
    left, right = (torch.randn(size, device=device, dtype=dtype).requires_grad_() for _ in range(2))
    weight = (0.05 * torch.randn(32, 64, 3, 3, 3, device=device, dtype=dtype)).requires_grad_()
    offset = torch.randn(32, device=device, dtype=dtype) if bias else None

    def exact(x: Tensor) -> Tensor:
        return x.detach().double().requires_grad_()

    inputs = (left, right, weight)
    references = [exact(x) for x in inputs]
    expected = convolve_cost_volume_reference(*references, 48, None if offset is None else offset.double())
    with torch.no_grad():
        result = convolve_cost_volume(*inputs, 48, offset)
    torch.testing.assert_close(result.double(), expected, atol=tolerance, rtol=tolerance)
    if bias:
        return
    result = convolve_cost_volume(*inputs, 48)
    upstream = torch.randn_like(result)
    gradients = torch.autograd.grad(result, inputs, upstream, retain_graph=True)
    again = torch.autograd.grad(result, inputs, upstream)
    for gradient, repeated, reference in zip(
        gradients, again, torch.autograd.grad(expected, references, upstream.double()), strict=True
    ):
        scale = reference.abs().max()
        torch.testing.assert_close(gradient.double() / scale, reference / scale, atol=tolerance / 3, rtol=0)
        torch.testing.assert_close(repeated, gradient, atol=float(tolerance / 3 * scale), rtol=0)


def test_the_cpu_does_without(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(device: torch.device, dtype: torch.dtype) -> None:
        raise AssertionError(f"asked for a kernel on {device}")

    monkeypatch.setattr(cost_volume, "_triton_assemble", refuse)
    left, right, weight = torch.randn(1, 4, 4, 9), torch.randn(1, 4, 4, 9), torch.randn(4, 8, 3, 3, 3)
    expected = convolve_cost_volume_reference(left, right, weight, 5)
    torch.testing.assert_close(convolve_cost_volume(left, right, weight, 5), expected, atol=1e-4, rtol=0)


def test_a_triton_that_does_not_work_is_reported_once_and_done_without(recwarn: pytest.WarningsRecorder) -> None:
    pytest.importorskip("triton")
    _triton_assemble.cache_clear()
    for _ in range(2):
        assert _triton_assemble(torch.device("cpu"), torch.float32) is None  # kernels do not run there
    _triton_assemble.cache_clear()
    assert [str(w.message)[:20] for w in recwarn if "Triton" in str(w.message)] == ["Triton does not work"]
