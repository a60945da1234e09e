"""The fused kernels against the formula: on a GPU as they are, elsewhere in Triton's interpreter."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from fa_stereo.models import regression
from fa_stereo.models.regression import _triton_regression, regress_disparity, regress_disparity_reference
from tests.gpu import needs_gpu

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


def test_kernels_in_the_interpreter() -> None:
    pytest.importorskip("triton")
    environment = os.environ | {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    run = subprocess.run([sys.executable, "-c", CHECK], capture_output=True, text=True, env=environment, check=False)
    assert run.stdout.strip() == "equal", run.stderr


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


def test_the_cpu_does_without(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(device: torch.device) -> None:
        raise AssertionError(f"asked for a kernel on {device}")

    monkeypatch.setattr(regression, "_triton_regression", refuse)
    logits = torch.randn(1, 4, 4, 4)
    expected = regress_disparity_reference(logits, 16, 16, 16, align_corners=False)
    torch.testing.assert_close(regress_disparity(logits, 16, 16, 16, align_corners=False), expected, atol=1e-4, rtol=0)


def test_a_triton_that_does_not_work_is_reported_once_and_done_without(recwarn: pytest.WarningsRecorder) -> None:
    pytest.importorskip("triton")
    _triton_regression.cache_clear()
    for _ in range(2):
        assert _triton_regression(torch.device("cpu")) is None  # kernels do not run there
    _triton_regression.cache_clear()
    assert [str(w.message)[:20] for w in recwarn if "Triton" in str(w.message)] == ["Triton does not work"]
