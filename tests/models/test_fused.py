"""Convolutions fused with what follows them, beside PyTorch's own, which the trial of the former is about too."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fa_stereo.config import ModelConfig
from fa_stereo.models import aggregation, fused, layers
from fa_stereo.models.layers import ConvNorm2d, ConvNorm3d, DeconvNorm3d, finished
from fa_stereo.models.memory_format import channels_last_format, to_channels_last
from fa_stereo.models.optimized import fold_batch_norm, optimize_for_inference
from fa_stereo.models.psmnet import build_model

needs_fusion = pytest.mark.skipif(not fused.works(torch.float32), reason="oneDNN does not fuse here")


def folded(layer: ConvNorm2d | ConvNorm3d | DeconvNorm3d) -> nn.Module:
    torch.manual_seed(0)
    for values in layer.norm.parameters():
        nn.init.normal_(values, 0.5)
    assert layer.norm.running_mean is not None
    nn.init.normal_(layer.norm.running_mean)
    fold_batch_norm(layer.eval())
    for module in layer.modules():
        if isinstance(module, nn.Conv2d):
            module.to(memory_format=torch.channels_last)
    return layer


def channels_last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=channels_last_format(x))


@needs_fusion
@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("with_addend", [False, True])
@pytest.mark.parametrize(
    ("make", "shape"),
    [
        (lambda: ConvNorm2d(5, 8), (2, 5, 7, 11)),
        (lambda: ConvNorm2d(5, 8, stride=2), (1, 5, 8, 9)),
        (lambda: ConvNorm2d(16, 8, dilation=2), (1, 16, 9, 6)),
        (lambda: ConvNorm2d(16, 8, 1), (2, 16, 5, 5)),
        (lambda: ConvNorm3d(4, 6), (1, 4, 3, 5, 7)),
        (lambda: ConvNorm3d(4, 6), (2, 4, 1, 5, 7)),
        (lambda: ConvNorm3d(4, 6, stride=2), (1, 4, 5, 6, 7)),
    ],
)
@torch.no_grad()
def test_sum_and_relu_are_part_of_the_convolution(
    make: Callable[[], ConvNorm2d | ConvNorm3d], shape: tuple[int, ...], with_addend: bool, relu: bool
) -> None:
    layer = folded(make())
    x = channels_last(torch.randn(shape))
    with layers.convolved_as_written():
        plain = layer(x)
    addend = channels_last(torch.randn_like(plain)) if with_addend else None
    kept = None if addend is None else addend.clone()
    expected = plain if kept is None else plain + kept
    expected = F.relu(expected) if relu else expected
    with layers.convolved_as_written():
        torch.testing.assert_close(finished(layer, x, relu=relu, addend=addend), expected, atol=1e-5, rtol=1e-5)
    assert layers.fuses(layer, x, addend)
    found = finished(layer, x, relu=relu, addend=addend)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    assert found.is_contiguous(memory_format=channels_last_format(found))
    if kept is not None:  # in another order of memory: as written
        torch.testing.assert_close(
            finished(layer, x, relu=relu, addend=kept.contiguous()), expected, atol=1e-5, rtol=1e-5
        )


@pytest.mark.skipif(not fused.works(torch.bfloat16), reason="oneDNN does not fuse in bf16 here")
@pytest.mark.parametrize("make", [lambda: ConvNorm2d(16, 8), lambda: ConvNorm3d(16, 8)])
@torch.no_grad()
def test_sums_in_low_precision_are_rounded_once(make: Callable[[], ConvNorm2d | ConvNorm3d]) -> None:
    layer = folded(make())
    layer.conv.to(torch.bfloat16)
    shape = (1, 16, 9, 9) if isinstance(layer, ConvNorm2d) else (1, 16, 5, 9, 9)
    x = channels_last(torch.randn(shape)).bfloat16()
    addend = channels_last(torch.randn_like(layer(x)))
    exact = copy.deepcopy(layer)
    exact.conv.double()
    expected = F.relu(exact(x.double()) + addend.double())
    with layers.convolved_as_written():
        twice = finished(layer, x, relu=True, addend=addend.clone()).double()
    assert layers.fuses(layer, x, addend)
    once = finished(layer, x, relu=True, addend=addend).double()
    assert (once - expected).abs().mean() < (twice - expected).abs().mean()
    torch.testing.assert_close(once, expected, atol=1e-3, rtol=2**-8)


@needs_fusion
@pytest.mark.parametrize("depths", [1, 2, 5])
@torch.no_grad()
def test_slabs_of_volumes(depths: int) -> None:
    """Parts of larger volumes are read and added to where they lie."""
    layer, deconv = folded(ConvNorm3d(4, 4)), folded(DeconvNorm3d(4, 3))
    volume, total = (channels_last(torch.randn(1, 4, 9, 5, 6)) for _ in range(2))
    x = volume[:, :, 2 : 4 + depths]
    expected = total.clone()
    with layers.convolved_as_written():
        unpadded, upsampled = layer(x, padding=0), deconv(x)
        expected[:, :, 3 : 3 + depths] += unpadded
    assert layers.fuses(layer, x)
    assert layers.fuses(deconv, x)
    torch.testing.assert_close(finished(layer, x, padding=0), unpadded, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(deconv(x), upsampled, atol=1e-5, rtol=1e-5)
    layers.add_convolved(total[:, :, 3 : 3 + depths], layer, x, padding=0)
    torch.testing.assert_close(total, expected, atol=1e-5, rtol=1e-5)
    # where the total's memory is in another order, too
    other = torch.zeros(1, 4, depths, 5, 6)
    layers.add_convolved(other, layer, x, padding=0)
    torch.testing.assert_close(other, unpadded.contiguous(), atol=1e-5, rtol=1e-5)


@needs_fusion
@pytest.mark.parametrize("kind", ["stacked_hourglass", "basic"])
@pytest.mark.parametrize("size", [(32, 64), (37, 51)])
def test_the_network_is_the_same_function(kind: str, size: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model = build_model(ModelConfig(base_channels=4, max_disparity=32, aggregation=kind)).eval()
    fast = optimize_for_inference(model)
    monkeypatch.setattr(aggregation, "_SLAB_ELEMENTS", 1)
    monkeypatch.setattr(aggregation, "ONEDNN_ELEMENTS", 0)
    left, right = torch.randn(2, 2, 3, *size)
    with torch.inference_mode():
        found = fast(left, right)
        with layers.convolved_as_written():
            expected = fast(left, right)
    torch.testing.assert_close(found, expected, atol=2e-4, rtol=0)


def test_where_nothing_is_fused(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, x = folded(ConvNorm3d(4, 4)), channels_last(torch.randn(1, 4, 3, 5, 6))
    monkeypatch.setattr(fused, "works", lambda dtype: dtype == torch.float32)
    with torch.no_grad():
        assert layers.fuses(layer, x)
        assert not layers.fuses(layer, x.contiguous())  # channels first
        assert not layers.fuses(layer, x.double())
        assert not layers.fuses(layer, x.to("meta"))
        assert not layers.fuses(ConvNorm3d(4, 4).eval(), x)  # with its batch norm
        with layers.convolved_as_written():
            assert not layers.fuses(layer, x)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert not layers.fuses(layer, x)
        for module in (layer, layer.conv, layer.norm):
            handle = module.register_forward_hook(lambda *_: None)
            assert not layers.fuses(layer, x)
            handle.remove()
        layer.plain = True
        assert not layers.fuses(layer, x)
        layer.plain = False
        assert layers.fuses(layer, x)
    assert not layers.fuses(layer, x)  # a gradient may be asked for


@torch.inference_mode()
@pytest.mark.parametrize("place", ["features.stem.0.conv.weight", "aggregation.hourglasses.1.conv4.norm.bias"])
def test_what_is_not_a_number_comes_out_as_such(place: str) -> None:
    model = build_model(ModelConfig(base_channels=4, max_disparity=32)).eval()
    views = torch.randn(2, 1, 3, 32, 64)
    assert optimize_for_inference(model)(*views).isfinite().all()
    model.get_parameter(place).flatten()[0] = torch.nan
    assert not optimize_for_inference(model)(*views).isfinite().all()


@torch.no_grad()
def test_overflows_of_float16_are_not_made_zeros(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whose result is computed again in float32 where it is not finite."""

    def convolve(conv: nn.Conv2d, x: Tensor, padding: tuple[int, ...], *, relu: bool = False) -> Tensor:
        assert not relu
        assert conv.bias is not None
        return F.conv2d(x.float(), conv.weight.float(), conv.bias.float(), padding=padding).half() * torch.inf

    layer = folded(ConvNorm2d(4, 4))
    layer.conv.half()
    monkeypatch.setattr(fused, "works", lambda dtype: True)
    monkeypatch.setattr(fused, "convolve", convolve)
    x = channels_last(torch.randn(1, 4, 5, 6).half())
    assert layers.fuses(layer, x)
    found = finished(layer, x, relu=True)
    assert found.isposinf().any()
    assert (found >= 0).all()


def test_what_is_missing_or_wrong_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not fused.works(torch.float64)  # which oneDNN does not know
    right = fused.convolve

    def forgetful(conv: nn.Conv2d | nn.Conv3d, x: Tensor, padding: tuple[int, ...], *, relu: bool = False) -> Tensor:
        return right(conv, x, padding)  # whether there is to be a ReLU or not

    def absent(*_: object, **__: object) -> Tensor:
        raise AttributeError("'_OpNamespace' 'mkldnn' object has no attribute '_convolution_pointwise'")

    state = torch.get_rng_state()
    for function in (forgetful, absent):
        fused.works.cache_clear()
        monkeypatch.setattr(fused, "convolve", function)
        assert not fused.works(torch.float32)
    monkeypatch.undo()
    fused.works.cache_clear()
    fused.works(torch.float32)
    assert torch.equal(torch.get_rng_state(), state)  # the caller's random numbers are the caller's


@torch.no_grad()
def test_who_listens_hears_what_a_layer_alone_computes() -> None:
    """Neither the sum nor the ReLU that follow it."""
    block = build_model(ModelConfig(base_channels=8)).eval().features.res1[1]
    fold_batch_norm(block.conv1)
    fold_batch_norm(block.conv2)
    heard = {}
    for name in ("conv1", "conv2"):
        block.get_submodule(name).register_forward_hook(lambda _, __, out, key=name: heard.update({key: out.clone()}))
    x = channels_last(torch.randn(1, 8, 6, 7))
    out = block(x.clone(memory_format=torch.preserve_format))
    torch.testing.assert_close(heard["conv1"], block.conv1.conv(x))
    torch.testing.assert_close(out, heard["conv2"] + x)


@needs_fusion
@torch.no_grad()
def test_folded_networks_fuse_everything_there_is_to_fuse() -> None:
    fast = to_channels_last(optimize_for_inference(build_model(ModelConfig(base_channels=16)).eval()))
    fusable: list[bool] = []
    fuses = layers.fuses

    def counted(layer: ConvNorm2d | ConvNorm3d | DeconvNorm3d, x: Tensor, addend: Tensor | None = None) -> bool:
        fusable.append(fuses(layer, x, addend))
        return fusable[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(layers, "fuses", counted)
        fast(*torch.randn(2, 1, 3, 64, 96))
    assert len(fusable) > 60
    assert all(fusable)
