"""The fused kernels against the formula: on a GPU as they are, elsewhere in Triton's interpreter."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from fa_stereo.models import regression
from fa_stereo.models.regression import (
    _triton_modal_regression,
    _triton_regression,
    regress_disparity,
    regress_disparity_reference,
    regress_modal_disparity,
    regress_modal_disparity_reference,
)
from tests.gpu import compile_kernel, needs_gpu

CHECK = """
import torch
from fa_stereo.models.regression import interpolation_matrix, regress_disparity_reference
from fa_stereo.models.regression_triton import TritonRegression

torch.manual_seed(0)
for align_corners in (True, False):
    for size in [(2, 4, 4, 5, 16, 20, 16), (1, 5, 3, 4, 10, 17, 23), (1, 4, 2, 35, 8, 140, 16), (1, 1, 1, 1, 3, 2, 4)]:
        batch, depths, rows, columns, height, width, disparities = size
        logits = (5 * torch.randn(batch, columns, depths, rows)).permute(0, 2, 3, 1).requires_grad_()
        sizes = zip(logits.shape[1:], (disparities, height, width))
        matrices = [interpolation_matrix(*size, logits, align_corners=align_corners) for size in sizes]
        result = TritonRegression.apply(logits, *matrices)
        exact = logits.detach().double().requires_grad_()
        expected = regress_disparity_reference(exact, disparities, height, width, align_corners=align_corners)
        torch.testing.assert_close(result.double(), expected, atol=1e-4, rtol=0)
        upstream = torch.randn_like(result)
        (gradient,) = torch.autograd.grad(result, logits, upstream)
        (expected_gradient,) = torch.autograd.grad(expected, exact, upstream.double())
        torch.testing.assert_close(gradient.double(), expected_gradient, atol=1e-3, rtol=1e-4)
print("equal")
"""

MODAL_CHECK = """
import torch
from fa_stereo.models.regression import interpolation_matrix, regress_modal_disparity_reference
from fa_stereo.models.regression_triton import regress_modal

torch.manual_seed(0)
for align_corners in (True, False):
    for size in [(2, 3, 2, 4, 8, 16, 12), (1, 5, 3, 4, 10, 17, 23), (1, 12, 1, 33, 3, 130, 48), (1, 1, 1, 1, 3, 2, 4)]:
        batch, depths, rows, columns, height, width, disparities = size
        logits = (5 * torch.randn(batch, columns, depths, rows)).permute(0, 2, 3, 1)
        if depths == 12:
            logits *= 40  # far from what float32 can take to the 8th power
        sizes = zip(logits.shape[1:], (disparities, height, width))
        matrices = [interpolation_matrix(*size, logits, align_corners=align_corners) for size in sizes]
        results = regress_modal(logits, *matrices)
        expected = regress_modal_disparity_reference(
            logits.double(), disparities, height, width, align_corners=align_corners
        )
        for result, exact in zip(results, expected):
            torch.testing.assert_close(result.double(), exact, atol=2e-3 if depths == 12 else 1e-4, rtol=0)
logits[0, 0, 0, 0] = float("nan")
for result, exact in zip(
    regress_modal(logits, *matrices),
    regress_modal_disparity_reference(logits, disparities, height, width, align_corners=align_corners),
):
    assert exact.isnan().any() and torch.equal(result.isnan(), exact.isnan())
print("equal")
"""

POINTERS = dict.fromkeys(
    ("logits", "disparity", "log_sum", "confidence", "grad", "grad_columns", "depth_weight", "row_weight",
     "column_weight"), "*fp32",
) | dict.fromkeys(("depth_begin", "row_first", "column_first", "row_begin", "row_end"), "*i32")  # fmt: skip


@pytest.mark.parametrize("check", [CHECK, MODAL_CHECK], ids=["expectation", "modal"])
def test_kernels_in_the_interpreter(check: str) -> None:
    pytest.importorskip("triton")
    environment = os.environ | {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    run = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, env=environment, check=False)
    assert run.stdout.strip() == "equal", run.stderr


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("name", ["_regress", "_regress_backward", "_regress_modal"])
def test_kernels_compile_for_gpus(name: str, capability: int) -> None:
    pytest.importorskip("triton")
    from fa_stereo.models import regression_triton

    kernel = getattr(regression_triton, name)
    types = {key: value for key, value in POINTERS.items() if key in kernel.arg_names}
    assert f".entry {name}" in compile_kernel(kernel, capability, types, BLOCK=regression_triton._BLOCK_COLUMNS)


@needs_gpu
@pytest.mark.parametrize("align_corners", [True, False])
def test_kernels_on_the_gpu(align_corners: bool) -> None:
    pytest.importorskip("triton")
    assert _triton_regression(torch.device("cuda", 0)) is not None
    logits = (5 * torch.randn(2, 48, 34, 60, device="cuda")).requires_grad_()
    result = regress_disparity(logits, 192, 136, 240, align_corners=align_corners)
    exact = logits.detach().double().requires_grad_()
    expected = regress_disparity_reference(exact, 192, 136, 240, align_corners=align_corners)
    torch.testing.assert_close(result.double(), expected, atol=1e-3, rtol=0)
    upstream = torch.randn_like(result)
    (gradient,) = torch.autograd.grad(result, logits, upstream)
    (expected_gradient,) = torch.autograd.grad(expected, exact, upstream.double())
    torch.testing.assert_close(gradient.double(), expected_gradient, atol=1e-2, rtol=1e-3)
    (again,) = torch.autograd.grad(
        regress_disparity(logits, 192, 136, 240, align_corners=align_corners), logits, upstream
    )
    assert torch.equal(gradient, again)


@needs_gpu
@pytest.mark.parametrize("align_corners", [True, False])
def test_the_modal_kernel_on_the_gpu(align_corners: bool) -> None:
    pytest.importorskip("triton")
    assert _triton_modal_regression(torch.device("cuda", 0)) is not None
    logits = 5 * torch.randn(2, 48, 34, 60, device="cuda")
    results = regress_modal_disparity(logits, 192, 136, 240, align_corners=align_corners)
    expected = regress_modal_disparity_reference(logits.double(), 192, 136, 240, align_corners=align_corners)
    for result, exact, tolerance in zip(results, expected, (1e-2, 1e-5), strict=True):
        torch.testing.assert_close(result.double(), exact, atol=tolerance, rtol=0)


def test_the_cpu_does_without(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(device: torch.device) -> None:
        raise AssertionError(f"asked for a kernel on {device}")

    monkeypatch.setattr(regression, "_triton_regression", refuse)
    monkeypatch.setattr(regression, "_triton_modal_regression", refuse)
    logits = torch.randn(1, 4, 4, 4)
    expected = regress_disparity_reference(logits, 16, 16, 16, align_corners=False)
    torch.testing.assert_close(regress_disparity(logits, 16, 16, 16, align_corners=False), expected, atol=1e-4, rtol=0)
    modal = regress_modal_disparity(logits, 16, 16, 16, align_corners=False)
    expected_modal = regress_modal_disparity_reference(logits, 16, 16, 16, align_corners=False)
    torch.testing.assert_close(modal, expected_modal, atol=1e-4, rtol=0)


def test_a_triton_that_does_not_work_is_reported_once_and_done_without(recwarn: pytest.WarningsRecorder) -> None:
    pytest.importorskip("triton")
    for kernel in (_triton_regression, _triton_modal_regression):
        kernel.cache_clear()
        for _ in range(2):
            assert kernel(torch.device("cpu")) is None  # kernels do not run there
        kernel.cache_clear()
    assert [str(w.message)[:20] for w in recwarn if "Triton" in str(w.message)] == 2 * ["Triton does not work"]
