"""The rearranged network computes what the trained one does."""

from __future__ import annotations

import copy

import pytest
import random_networks
import torch
import torch.nn.functional as F
from random_networks import randomize
from torch import nn
from torch.profiler import ProfilerActivity, profile

from fa_stereo.config import ATTENTION_SLOTS, AttentionConfig, ModelConfig
from fa_stereo.errors import InputError
from fa_stereo.models import aggregation, fused, layers
from fa_stereo.models.aggregation import add_score_taps, convolve_slab, new_scores, score_taps, upsample_slab
from fa_stereo.models.layers import ConvNorm2d, ConvNorm3d, DeconvNorm3d
from fa_stereo.models.memory_format import to_channels_last
from fa_stereo.models.optimized import fold_batch_norm, optimize_for_inference
from fa_stereo.models.psmnet import PSMNet, build_model


def tiny(**changes) -> PSMNet:
    return randomize(build_model(random_networks.tiny(**changes))).eval()


def plain_result(model: PSMNet, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    model.plain = True
    with torch.inference_mode():
        result = model(left, right)
    model.plain = False
    return result


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"align_corners": True},
        {"aggregation": "basic"},
        {"max_disparity": 16},
        {"max_disparity": 96},  # more than the pictures are wide
        {"attention_slots": list(ATTENTION_SLOTS)},
        {"attention": AttentionConfig(kind="resblock"), "attention_slots": ["res2", "pyramid"]},
        {"attention": AttentionConfig(kind="none")},
    ],
)
@pytest.mark.parametrize("size", [(32, 64), (37, 51)])
def test_same_function(changes: dict, size: tuple[int, int]) -> None:
    model = tiny(**changes).double()
    left, right = torch.randn(2, 2, 3, *size, dtype=torch.float64)
    expected = plain_result(model, left, right)
    fast = optimize_for_inference(model)
    with torch.inference_mode():
        torch.testing.assert_close(fast(left, right), expected, atol=1e-9, rtol=0)
        torch.testing.assert_close(model(left, right), expected, atol=1e-9, rtol=0)  # the original is as it was
    assert not any(isinstance(m, ConvNorm2d) and isinstance(m.norm, nn.BatchNorm2d) for m in fast.modules())
    assert not any(parameter.requires_grad for parameter in fast.parameters())


def test_inputs_in_any_memory_and_left_alone() -> None:
    fast = optimize_for_inference(tiny().double())
    left, right = torch.randn(2, 2, 32, 48, 3, dtype=torch.float64).permute(0, 1, 4, 2, 3)
    before = left.clone(), right.clone()
    with torch.inference_mode():
        result = fast(left, right)
        torch.testing.assert_close(result, fast(left.contiguous(), right.contiguous()), atol=1e-9, rtol=0)
    assert torch.equal(left, before[0])
    assert torch.equal(right, before[1])


@pytest.mark.parametrize(("precision", "tolerance"), [("bf16", 0.3), ("fp16", 0.05), ("mixed", 0.3)])
def test_low_precision_stays_close(precision: str, tolerance: float) -> None:
    torch.manual_seed(0)
    model = tiny(attention_slots=["res4", "pyramid"])
    fast = optimize_for_inference(model, precision)
    left, right = torch.randn(2, 1, 3, 32, 64)
    with torch.inference_mode():
        result = fast(left, right)
    assert result.dtype == torch.float32
    assert (result - plain_result(model, left, right)).abs().mean() < tolerance
    types = {"bf16": [torch.bfloat16] * 2, "fp16": [torch.float16] * 2, "mixed": [torch.float32, torch.bfloat16]}
    weights = [fast.features.stem[0].conv.weight, fast.aggregation.heads[0].conv1.conv.weight]
    assert [weight.dtype for weight in weights] == types[precision]
    assert fast.aggregation.heads[0].conv2.weight.dtype == torch.float32
    assert all(parameter.dtype == torch.float32 for parameter in fast.features.attention.parameters())


def test_another_range_of_disparities() -> None:
    model = tiny()
    left, right = torch.randn(2, 1, 3, 32, 64)
    wide = tiny(max_disparity=64)
    wide.load_state_dict(model.state_dict())
    with torch.inference_mode():
        network = copy.deepcopy(model)
        network.set_max_disparity(64)
        result = optimize_for_inference(network)(left, right)
        torch.testing.assert_close(result, wide(left, right), atol=1e-3, rtol=0)
    assert model.config.max_disparity == 32
    with pytest.raises(InputError, match="multiple of 16"):
        model.set_max_disparity(50)
    with pytest.raises(InputError, match="precision must be one of"):
        optimize_for_inference(model, "int8")


def test_preparation_for_training_changes_nothing_but_the_order_in_memory() -> None:
    model = tiny().train().double()
    state = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    left, right = torch.randn(2, 2, 3, 32, 64, dtype=torch.float64)
    results = []
    for prepare in (False, True):
        model.load_state_dict(state)
        if prepare:
            assert to_channels_last(model) is model
            assert model.aggregation.residual.conv1.conv.weight.is_contiguous(memory_format=torch.channels_last_3d)
        model.zero_grad()
        output = model(left, right)
        sum(d.square().mean() for d in output.disparities).backward()
        results.append((output.disparities, {name: p.grad.clone() for name, p in model.named_parameters()}))
    for ours, expected in zip(results[1][0], results[0][0], strict=True):
        torch.testing.assert_close(ours, expected, atol=1e-9, rtol=0)
    for name, expected in results[0][1].items():
        scale = expected.abs().max().clamp(min=1e-9)
        torch.testing.assert_close(results[1][1][name] / scale, expected / scale, atol=1e-8, rtol=0, msg=name)


@pytest.mark.parametrize("kind", ["2d", "3d", "deconv"])
def test_folded_batch_norm(kind: str) -> None:
    layer = {
        "2d": lambda: ConvNorm2d(3, 5, stride=2, dilation=2),
        "3d": lambda: ConvNorm3d(3, 5),
        "deconv": lambda: DeconvNorm3d(3, 5),
    }[kind]()
    randomize(layer).double().eval()
    x = torch.randn(2, 3, 6, 7, dtype=torch.float64) if kind == "2d" else torch.randn(2, 3, 4, 5, 6).double()
    expected = layer.norm(layer.conv(x))
    fold_batch_norm(layer)
    torch.testing.assert_close(layer(x), expected, atol=1e-12, rtol=0)
    assert layer.conv.bias is not None


@pytest.mark.parametrize("depths", [1, 2, 5, 8])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last_3d])
def test_scores_without_a_3d_convolution(depths: int, memory_format: torch.memory_format) -> None:
    x = torch.randn(2, 4, depths, 5, 7, dtype=torch.float64).contiguous(memory_format=memory_format).requires_grad_()
    weight = torch.randn(1, 4, 3, 3, 3, dtype=torch.float64, requires_grad=True)
    expected = F.conv3d(x, weight, padding=1).squeeze(1)
    scores = add_score_taps(new_scores(x), score_taps(x, weight))
    torch.testing.assert_close(scores, expected, atol=1e-12, rtol=0)
    upstream = torch.randn_like(expected)
    for ours, plain in zip(
        torch.autograd.grad(scores, (x, weight), upstream), torch.autograd.grad(expected, (x, weight), upstream),
        strict=True,
    ):  # fmt: skip
        torch.testing.assert_close(ours, plain, atol=1e-11, rtol=0)
    for step in (1, 2, 3):
        pieces = new_scores(x)
        for start in range(0, depths, step):
            add_score_taps(pieces, score_taps(x[:, :, start : start + step], weight), start)
        torch.testing.assert_close(pieces, expected, atol=1e-12, rtol=0)


@pytest.fixture
def small_slabs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cut even tiny volumes into many slabs, of two disparities each."""
    monkeypatch.setattr(aggregation, "_SLAB_ELEMENTS", 1)
    monkeypatch.setattr(aggregation, "ONEDNN_ELEMENTS", 0)


@pytest.mark.parametrize("depths", [1, 2, 3, 6, 7, 13])
@pytest.mark.usefixtures("small_slabs")
def test_slabs_are_pieces_of_the_whole(depths: int) -> None:
    conv = randomize(ConvNorm3d(3, 4)).double().eval()
    deconv = randomize(DeconvNorm3d(3, 2)).double().eval()
    x = torch.randn(2, 3, depths, 4, 5, dtype=torch.float64)
    with torch.no_grad():
        expected = conv(x)
        slabs = list(aggregation._slabs(x))
        assert len(slabs) == (depths + 1) // 2
        pieces = torch.cat([convolve_slab(conv, x, *slab) for slab in slabs], dim=2)
        torch.testing.assert_close(pieces, expected, atol=1e-12, rtol=0)
        expected = deconv(x)
        pieces = torch.cat([upsample_slab(deconv, x, *slab) for slab in aggregation._slabs(expected)], dim=2)
        torch.testing.assert_close(pieces, expected, atol=1e-12, rtol=0)


@pytest.mark.usefixtures("small_slabs")
@pytest.mark.parametrize("aggregation_kind", ["stacked_hourglass", "basic"])
def test_same_function_in_many_slabs(aggregation_kind: str) -> None:
    model = tiny(aggregation=aggregation_kind).double()
    left, right = torch.randn(2, 2, 3, 32, 64, dtype=torch.float64)
    expected = plain_result(model, left, right)
    with torch.inference_mode():
        torch.testing.assert_close(optimize_for_inference(model)(left, right), expected, atol=1e-9, rtol=0)


@pytest.mark.usefixtures("small_slabs")
@pytest.mark.parametrize("aggregation_kind", ["stacked_hourglass", "basic"])
def test_same_function_with_zeros_appended_to_every_volume(
    aggregation_kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny(aggregation=aggregation_kind).double()
    left, right = torch.randn(2, 2, 3, 37, 51, dtype=torch.float64)
    expected = plain_result(model, left, right)
    monkeypatch.setattr(layers, "_missing_disparities", lambda x: 3)
    with torch.inference_mode():
        torch.testing.assert_close(optimize_for_inference(model)(left, right), expected, atol=1e-9, rtol=0)
        torch.testing.assert_close(model(left, right), expected, atol=1e-9, rtol=0)


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this PyTorch has no oneDNN")
def test_every_volume_is_convolved_by_onednn(monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch's own 3-D convolutions, which it prefers for small volumes, are several times as slow."""
    fast = optimize_for_inference(build_model(ModelConfig(base_channels=16)).eval())
    views = torch.randn(2, 1, 3, 256, 384)
    fusing = {f"mkldnn::_convolution_{kind}" for kind in ("pointwise", "transpose_pointwise")}
    plain = {"aten::conv3d", "aten::conv_transpose3d", "aten::mkldnn_convolution"}
    for works, expected in ((fused.works(torch.float32), fusing), (False, plain)):
        monkeypatch.setattr(fused, "works", lambda _, answer=works: answer)
        with torch.inference_mode(), profile(activities=[ProfilerActivity.CPU]) as profiled:
            fast(*views)
        names = {event.key for event in profiled.key_averages()}
        assert names >= (expected if works else plain)
        assert not [name for name in names if name.startswith(("aten::slow_conv3d", "aten::slow_conv_transpose3d"))]


def test_slabs_are_large_enough_for_the_fast_convolutions() -> None:
    for shape in ((1, 32, 48, 136, 240), (1, 16, 24, 68, 120), (1, 16, 48, 200, 480), (1, 32, 48, 540, 960)):
        volume = torch.empty(shape, device="meta")
        first, *_ = aggregation._slabs(volume)
        assert shape[1] * (first[1] - first[0]) * shape[3] > 20480 or first[1] == shape[2]
        # At half resolution, which the slab is computed from, no more than half of it has to be appended.
        assert 1.5 * (2 * shape[1]) * (first[1] // 2 + 1) * (shape[3] // 2) > 20480
