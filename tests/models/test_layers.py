"""The convolution with batch norm that the network is made of."""

from __future__ import annotations

import copy
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fa_stereo.models import layers
from fa_stereo.models.layers import ConvNorm2d, ConvNorm3d, DeconvNorm3d, convolve, fold, upsample
from fa_stereo.models.psmnet import build_model
from tests.random_networks import randomize, tiny


@pytest.mark.parametrize(("kernel_size", "stride", "dilation"), [(3, 1, 1), (3, 2, 1), (3, 1, 2), (1, 1, 1), (1, 2, 1)])
@pytest.mark.parametrize("size", [(8, 12), (7, 11)])
def test_convolution_and_norm(kernel_size: int, stride: int, dilation: int, size: tuple[int, int]) -> None:
    """Values and gradients against PyTorch's own strided convolution."""
    torch.manual_seed(0)
    layer = ConvNorm2d(4, 6, kernel_size, stride=stride, dilation=dilation).double()
    x = torch.randn(2, 4, *size, dtype=torch.float64, requires_grad=True)
    result = layer(x)
    convolved = F.conv2d(x, layer.conv.weight, None, stride, dilation * (kernel_size // 2), dilation)
    expected = F.batch_norm(convolved, None, None, layer.norm.weight, layer.norm.bias, training=True)
    torch.testing.assert_close(result, expected, atol=1e-12, rtol=0)
    inputs = (x, layer.conv.weight)
    upstream = torch.randn_like(result)
    for ours, plain in zip(
        torch.autograd.grad(result, inputs, upstream), torch.autograd.grad(expected, inputs, upstream), strict=True
    ):
        torch.testing.assert_close(ours, plain, atol=1e-11, rtol=0)


@pytest.mark.parametrize("channels", [2, 4, 7, 8, 16])
def test_narrow_layers_train_in_channels_last(channels: int) -> None:
    """With a stride of its own, the 1x1 convolution of fewer than 8 channels would corrupt memory on some CPUs."""
    torch.manual_seed(0)
    layer = ConvNorm2d(channels, 2 * channels, 1, stride=2).to(memory_format=torch.channels_last)
    x = torch.randn(2, channels, 16, 24).contiguous(memory_format=torch.channels_last)
    exact = ConvNorm2d(channels, 2 * channels, 1, stride=2).double()
    exact.load_state_dict(layer.state_dict())
    for _ in range(3):
        layer.zero_grad()
        layer(x).square().mean().backward()
    exact(x.double()).square().mean().backward()
    for ours, double in zip(layer.parameters(), exact.parameters(), strict=True):
        torch.testing.assert_close(ours.grad.double(), double.grad, atol=1e-5, rtol=1e-3)


FROZEN_LAYERS = {
    "2d": (lambda: ConvNorm2d(3, 5, dilation=2), (2, 3, 6, 7)),
    "2d, stride": (lambda: ConvNorm2d(3, 5, stride=2), (2, 3, 6, 7)),
    "2d, 1x1, stride": (lambda: ConvNorm2d(3, 5, 1, stride=2), (2, 3, 6, 7)),
    "3d": (lambda: ConvNorm3d(3, 5), (2, 3, 4, 5, 6)),
    "3d, stride": (lambda: ConvNorm3d(3, 5, stride=2), (2, 3, 4, 5, 7)),
    "transposed": (lambda: DeconvNorm3d(3, 5), (1, 3, 2, 3, 4)),
}


@pytest.fixture
def folded(monkeypatch: pytest.MonkeyPatch) -> list[nn.Module]:
    """What was folded so far."""
    seen: list[nn.Module] = []
    monkeypatch.setattr(layers, "fold", lambda conv, norm: seen.append(conv) or fold(conv, norm))
    return seen


@pytest.mark.parametrize("kind", FROZEN_LAYERS)
def test_frozen_batch_norm_is_folded_in_training(kind: str, folded: list[nn.Module]) -> None:
    """Values and gradients of the input and of all three parameters are those of the two layers one after the other."""
    torch.manual_seed(0)
    build, shape = FROZEN_LAYERS[kind]
    layer = randomize(build()).double().eval()
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    result = layer(x)
    assert folded == [layer.conv]
    step = getattr(layer, "step", 1)
    expected = layer.norm(layer.conv(x[..., ::step, ::step]))
    torch.testing.assert_close(result, expected, atol=1e-12, rtol=0)
    inputs, upstream = (x, *layer.parameters()), torch.randn_like(expected)
    for ours, plain in zip(
        torch.autograd.grad(result, inputs, upstream), torch.autograd.grad(expected, inputs, upstream), strict=True
    ):
        torch.testing.assert_close(ours, plain, atol=1e-11, rtol=0)


@pytest.mark.parametrize("kind", FROZEN_LAYERS)
def test_folding_in_float32_with_a_large_mean(kind: str) -> None:
    """The gradient of the norm's weight is a difference of larger numbers then, and not as exact as unfolded."""
    torch.manual_seed(0)
    build, shape = FROZEN_LAYERS[kind]
    layer = randomize(build()).eval()
    layer.norm.running_mean += 9
    exact = copy.deepcopy(layer).double()
    x = torch.randn(shape)
    result, expected = layer(x), exact.norm(exact.conv(x.double()[..., :: (s := getattr(layer, "step", 1)), ::s]))
    torch.testing.assert_close(result.double(), expected, atol=1e-5, rtol=0)
    upstream = torch.randn_like(result)
    for ours, plain in zip(
        torch.autograd.grad(result, tuple(layer.parameters()), upstream),
        torch.autograd.grad(expected, tuple(exact.parameters()), upstream.double()),
        strict=True,
    ):
        torch.testing.assert_close(ours.double(), plain, atol=1e-3 * float(plain.abs().max()), rtol=0)


def test_what_is_not_folded(folded: list[nn.Module]) -> None:
    """With statistics of the batch, without gradients, under autocast, and where somebody listens."""
    layer = randomize(ConvNorm3d(4, 4))
    x = torch.randn(2, 4, 6, 8, 8)
    layer.train()(x)
    layer.eval()
    with torch.no_grad():
        layer(x)
    with torch.autocast("cpu", torch.bfloat16):
        layer(x)
    for child in (layer.conv, layer.norm):
        for register in ("forward_hook", "forward_pre_hook", "full_backward_hook", "full_backward_pre_hook"):
            hook = getattr(child, f"register_{register}")(lambda *_: None)
            layer(x)
            hook.remove()
    copy.deepcopy(layer).to("meta")(x.to("meta"))
    assert not folded
    layer(x)
    assert folded == [layer.conv]


def test_less_is_kept_for_the_backward_pass() -> None:
    """Of a frozen layer its input alone, besides what is as small as its parameters."""
    layer = randomize(ConvNorm3d(4, 4)).eval()
    x = torch.randn(2, 4, 6, 8, 8)
    sizes: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.numel()) or t, lambda t: t):
        layer(x)
    assert sizes.count(x.numel()) == 1
    assert sum(sizes) - x.numel() <= 3 * layer.conv.weight.numel()


def test_a_frozen_network_trains_as_its_plain_path_which_folds_nothing(folded: list[nn.Module]) -> None:
    torch.manual_seed(0)
    model = randomize(build_model(tiny())).double().train()
    norms = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    for norm in norms:
        norm.eval()
    views = torch.randn(2, 1, 3, 32, 48, dtype=torch.float64)

    def run(plain: bool) -> tuple[tuple[torch.Tensor, ...], dict[str, torch.Tensor]]:
        model.plain = plain
        model.zero_grad()
        output = model(*views)
        sum(d.square().mean() for d in output.disparities).backward()
        return output.logits, {name: p.grad.clone() for name, p in model.named_parameters()}

    expected_logits, expected_gradients = run(plain=True)
    assert not folded
    logits, gradients = run(plain=False)
    assert len({*folded}) == len(norms) - 1  # all but that of the cost volume's first convolution
    torch.testing.assert_close(logits, expected_logits, atol=1e-9, rtol=1e-9)
    for name, expected in expected_gradients.items():
        scale = expected.abs().max().clamp(min=1e-9)
        torch.testing.assert_close(gradients[name] / scale, expected / scale, atol=1e-8, rtol=0, msg=name)


@pytest.mark.parametrize("depths", [3, 4, 9])
@pytest.mark.parametrize("appended", [0, 1, 5])
@pytest.mark.parametrize(("stride", "padding"), [(1, 1), (2, 1), (1, 0), (2, 0), ("transposed", 1)])
def test_zeros_appended_along_disparity(
    stride: int | str, padding: int, appended: int, depths: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Values and gradients are those of the convolution without them."""
    torch.manual_seed(0)
    x = torch.randn(1, 3, depths, 5, 6, dtype=torch.float64).requires_grad_()
    conv: nn.Conv3d | nn.ConvTranspose3d
    if stride == "transposed":
        conv = nn.ConvTranspose3d(3, 4, 3, 2, 1, output_padding=1).double()
        expected, run = conv(x), upsample
    else:
        conv = nn.Conv3d(3, 4, 3, stride, 1).double()
        expected, run = F.conv3d(x, conv.weight, conv.bias, stride, (padding, 1, 1)), partial(convolve, padding=padding)
    monkeypatch.setattr(layers, "_missing_disparities", lambda x: appended)
    result = run(conv, x)
    torch.testing.assert_close(result, expected, atol=1e-12, rtol=0)
    inputs, upstream = (x, conv.weight, conv.bias), torch.randn_like(expected)
    for ours, plain in zip(
        torch.autograd.grad(result, inputs, upstream), torch.autograd.grad(expected, inputs, upstream), strict=True
    ):
        torch.testing.assert_close(ours, plain, atol=1e-11, rtol=0)


@torch.no_grad()
def test_which_volumes_get_zeros() -> None:
    """Small single ones of float32 on the CPU, with which oneDNN computes what PyTorch does."""
    least = 20480 // (16 * 20) + 1
    small = torch.randn(1, 16, least // 2, 20, 12)
    with_onednn = torch.backends.mkldnn.is_available()
    assert layers._missing_disparities(small) == (least - least // 2 if with_onednn else 0)
    assert layers._missing_disparities(torch.randn(1, 16, least, 20, 12)) == 0
    assert layers._missing_disparities(torch.randn(1, 16, least // 5, 20, 12)) == 0  # too small
    for other in (small.double(), small.bfloat16(), small.expand(2, -1, -1, -1, -1), small.to("meta")):
        assert layers._missing_disparities(other) == 0
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert layers._missing_disparities(small) == 0
    with layers.convolved_as_written():
        assert layers._missing_disparities(small) == 0
    with torch.enable_grad():
        assert layers._missing_disparities(small) == 0
    for conv, run in ((nn.Conv3d(16, 8, 3, 2, 1), convolve), (nn.ConvTranspose3d(16, 8, 3, 2, 1, 1), upsample)):
        exact = copy.deepcopy(conv).double()(small.double())
        torch.testing.assert_close(run(conv, small).double(), exact, atol=1e-5, rtol=0)
