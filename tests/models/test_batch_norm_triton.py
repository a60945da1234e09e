"""Batch norm's fused kernels against the formula: on a GPU as they are, elsewhere in Triton's interpreter."""

from __future__ import annotations

import copy
import os
import subprocess
import sys

import pytest
import torch
from torch import nn

from fa_stereo.models import layers
from fa_stereo.models.layers import ConvNorm3d, normalize
from tests.gpu import compile_kernel, needs_gpu

CHECK = """
import torch
import torch.nn.functional as F
from fa_stereo.models import batch_norm_triton
from fa_stereo.models.batch_norm_triton import TritonBatchNorm

torch.manual_seed(0)
batch_norm_triton._TILE, batch_norm_triton._PROGRAMS = 256, 3  # so that small maps are shared by several programs
shapes = (2, 4, 3, 5, 7), (3, 16, 9, 11), (1, 8, 40, 6), (2, 128, 5, 3), (1, 256, 5, 1, 3)
for dtype in (torch.float32, torch.bfloat16, torch.float16):
    unit = max(torch.finfo(dtype).eps, 2e-6)
    for shape in shapes:
        channels = shape[1]
        memory_format = torch.channels_last if len(shape) == 4 else torch.channels_last_3d
        # Far from zero beside their deviation, by channel, as where sums of squares lose all digits.
        center = torch.linspace(-300, 300, channels).view(-1, *[1] * (len(shape) - 2))
        x = center + torch.randn(shape)
        x[0, :, 0, 0] += 100  # and what comes first is like nothing else
        x = x.to(dtype).contiguous(memory_format=memory_format).requires_grad_()
        parameters = [torch.randn(channels).requires_grad_() for _ in range(2)]
        running = torch.randn(channels), torch.rand(channels)
        exact = [t.detach().double().requires_grad_() for t in (x, *parameters)]
        exact_running = [t.double() for t in running]
        result = TritonBatchNorm.apply(x, *parameters, *running, 0.3, 1e-5)
        expected = F.batch_norm(exact[0], *exact_running, *exact[1:], training=True, momentum=0.3, eps=1e-5)
        assert result.dtype == dtype and result.is_contiguous(memory_format=memory_format)
        torch.testing.assert_close(result.double(), expected, atol=4 * unit * float(expected.abs().max()), rtol=0)
        for ours, plain in zip(running, exact_running):
            torch.testing.assert_close(ours.double(), plain, atol=1e-5, rtol=1e-4)
        for upstream in (torch.randn_like(result), torch.randn(shape).to(dtype)):  # channels last, contiguous
            gradients = torch.autograd.grad(result, (x, *parameters), upstream, retain_graph=True)
            plain = torch.autograd.grad(expected, exact, upstream.double(), retain_graph=True)
            for ours, theirs, bound in zip(gradients, plain, (4 * unit, 1e-4, 1e-4)):
                torch.testing.assert_close(ours.double(), theirs, atol=bound * float(theirs.abs().max()), rtol=0)
            if dtype == torch.bfloat16:
                break  # the interpreter takes its time

x = torch.randn(2, 4, 3, 5).contiguous(memory_format=torch.channels_last)
x[1, 2, 1, 1] = torch.inf
result = TritonBatchNorm.apply(x, *torch.ones(4, 4).unbind(), 0.1, 1e-5)
assert result[:, 2].isnan().all()  # as PyTorch's
assert result[:, [0, 1, 3]].isfinite().all()
print("equal")
"""


# A part of the network, in training, by the kernels and plainly; and computed again in the backward pass, where the
# kernels are tried out for the first time, which must leave no trace.
PART_CHECK = """
import copy
import torch
from torch import nn
from fa_stereo.models import layers
from fa_stereo.models.aggregation import Hourglass
from fa_stereo.models.recomputation import call, recompute

torch.manual_seed(0)
layers._suits_kernels = lambda norm, x: norm.training and x.is_contiguous(memory_format=torch.channels_last_3d)
part = Hourglass(4).to(memory_format=torch.channels_last_3d).train()
x = torch.randn(2, 4, 4, 8, 8).contiguous(memory_format=torch.channels_last_3d)
results = []
for run in (recompute, call, "plain"):
    mine, mine_x = copy.deepcopy(part), x.clone().requires_grad_()
    for layer in mine.modules():
        layer.plain = run == "plain"
    out, *_ = (call if run == "plain" else run)(mine, mine_x, mine_x, None, None)
    uses = 0 if run == "plain" else layers._triton_batch_norm.cache_info().currsize
    assert uses == (run != "plain")
    out.square().sum().backward()
    values = [out, mine_x.grad, *(p.grad for p in mine.parameters()), *mine.buffers()]
    results.append([value.detach().double() for value in values])
for found in results[:2]:
    for value, expected in zip(found, results[2]):
        torch.testing.assert_close(value, expected, atol=1e-4 * max(float(expected.abs().max()), 1e-3), rtol=0)
print("equal")
"""


@pytest.mark.parametrize("check", [CHECK, PART_CHECK], ids=["maps", "part"])
def test_kernels_in_the_interpreter(check: str) -> None:
    pytest.importorskip("triton")
    environment = os.environ | {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-W", "error:Triton", "-c", check]
    run = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert run.stdout.strip() == "equal", run.stderr


def test_all_kernels_pass_the_trial_they_are_given_before_use() -> None:
    """A trial that expects the wrong thing turns a kernel off where it works."""
    pytest.importorskip("triton")
    check = (
        "import torch\n"
        "from fa_stereo.models.cost_volume import _triton_assemble\n"
        "from fa_stereo.models.layers import _triton_batch_norm\n"
        "from fa_stereo.models.regression import _triton_modal_regression, _triton_regression\n"
        "cpu = torch.device('cpu')\n"
        "assert _triton_regression(cpu) and _triton_modal_regression(cpu)\n"
        "for dtype in (torch.float32, torch.bfloat16, torch.float16):\n"
        "    assert _triton_assemble(cpu, dtype) and _triton_batch_norm(cpu, dtype)\n"
    )
    environment = os.environ | {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-W", "error", "-c", check]
    run = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert run.returncode == 0, run.stderr


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("dtype", ["*fp32", "*bf16", "*fp16"])
@pytest.mark.parametrize("name", ["_sums", "_normalize", "_sums_backward", "_normalize_backward"])
def test_kernels_compile_for_gpus(name: str, dtype: str, capability: int) -> None:
    pytest.importorskip("triton")
    from fa_stereo.models import batch_norm_triton

    kernel = getattr(batch_norm_triton, name)
    maps, vectors = {"x", "grad", "out", "x_grad"}, {"sums", "statistics", "weight", "bias", "totals"}
    types = {n: dtype if n in maps else "*fp32" for n in kernel.arg_names if n in maps | vectors}
    assert f".entry {name}" in compile_kernel(kernel, capability, types, CHANNELS=32, TILE=128)


@pytest.mark.parametrize("capability", [80, 90])
def test_the_kernels_of_the_statistics_compile_for_gpus(capability: int) -> None:
    pytest.importorskip("triton")
    from fa_stereo.models.batch_norm_triton import _statistics, _totals

    vectors = {"statistics", "running_mean", "running_var", "sums", "totals"}
    for kernel, numbers in ((_statistics, {"momentum": "fp32", "eps": "fp32"}), (_totals, {})):
        types = {name: "*fp32" for name in kernel.arg_names if name in vectors} | numbers
        assert ".entry" in compile_kernel(kernel, capability, types, CHANNELS=32, PROGRAMS=512)


def test_only_training_on_a_gpu_uses_them() -> None:
    norm = nn.BatchNorm2d(4)
    x = torch.randn(2, 4, 3, 3).contiguous(memory_format=torch.channels_last)
    assert not layers._suits_kernels(norm, x)
    assert torch.equal(normalize(norm, x), copy.deepcopy(norm).train()(x))


@needs_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", [(2, 32, 12, 64, 96), (3, 64, 130, 140), (2, 16, 5, 201, 131)])
def test_the_same_batch_norm_on_the_gpu(size: tuple[int, ...], dtype: torch.dtype) -> None:
    assert layers._triton_batch_norm(torch.device("cuda", 0), dtype) is not None
    kind = nn.BatchNorm2d if len(size) == 4 else nn.BatchNorm3d
    memory_format = torch.channels_last if len(size) == 4 else torch.channels_last_3d
    norm = kind(size[1]).cuda()
    with torch.no_grad():
        norm.weight.uniform_(0.5, 2)
        norm.bias.normal_()
    exact = copy.deepcopy(norm).double()
    x = (5 + 2 * torch.randn(size, device="cuda")).to(dtype).contiguous(memory_format=memory_format).requires_grad_()
    x_exact = x.detach().double().requires_grad_()
    assert layers._suits_kernels(norm, x)
    upstream = torch.randn(size, device="cuda").to(dtype)
    normalize(norm, x).backward(upstream)
    exact(x_exact).backward(upstream.double())
    unit = torch.finfo(dtype).eps
    found = {"x": x.grad, "weight": norm.weight.grad, "bias": norm.bias.grad, **dict(norm.named_buffers())}
    expected = {"x": x_exact.grad, "weight": exact.weight.grad, "bias": exact.bias.grad, **dict(exact.named_buffers())}
    for name, value in expected.items():
        assert value is not None
        bound = (4 * unit if name == "x" else 1e-5) * float(value.abs().max())
        torch.testing.assert_close(found[name].double(), value.double(), atol=bound, rtol=0, msg=name)


@needs_gpu
def test_a_layer_uses_them_unless_it_is_plain_or_listened_to(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layers, "_LARGE_MAP", 1)
    layer = ConvNorm3d(4, 8).cuda().to(memory_format=torch.channels_last_3d)
    x = torch.randn(2, 4, 4, 6, 6, device="cuda").contiguous(memory_format=torch.channels_last_3d)
    uses = []
    for change in ("nothing", "plain", "hook"):
        layer.plain = change == "plain"
        handle = layer.norm.register_forward_hook(lambda *_: None) if change == "hook" else None
        uses.append("TritonBatchNorm" in type(layer(x).grad_fn).__name__)
        if handle:
            handle.remove()
    assert uses == [True, False, False]
