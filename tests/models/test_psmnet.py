"""The assembled network."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from random_networks import randomize, tiny
from torch import nn

from fa_stereo.config import ATTENTION_SLOTS, AttentionConfig, ModelConfig
from fa_stereo.errors import InputError
from fa_stereo.models import features
from fa_stereo.models.layers import initialize_like_psmnet
from fa_stereo.models.psmnet import PSMNet, StereoOutput, build_model


def count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def test_parameter_counts() -> None:
    none = AttentionConfig(kind="none")
    assert count(build_model(ModelConfig(attention=none))) == 5_224_768
    # b = 64 on 128 channels: basis masks and coefficients 128 -> 64 each, value 128 -> 128 (paper, eq. 4)
    attention = build_model().features.attention["res4"]
    assert count(build_model()) == 5_224_768 + count(attention)
    assert attention is not None
    assert 30_000 < count(attention) < 35_000


def test_initialisation_is_psmnets() -> None:
    torch.manual_seed(0)
    conv = nn.Conv3d(32, 64, 3)
    initialize_like_psmnet(conv)
    assert conv.weight.std().item() == pytest.approx((2 / (27 * 64)) ** 0.5, rel=0.02)
    model = build_model(tiny())
    for name, module in model.named_modules():
        if isinstance(module, nn.BatchNorm3d):
            assert torch.all(module.weight == 1), name
            assert torch.all(module.bias == 0), name


@pytest.mark.parametrize("aggregation", ["stacked_hourglass", "basic"])
def test_outputs(aggregation: str) -> None:
    model = build_model(tiny(aggregation=aggregation))
    left, right = torch.randn(2, 2, 3, 32, 48)
    output = model.train()(left, right)
    assert isinstance(output, StereoOutput)
    assert len(output.disparities) == len(output.logits) == (3 if aggregation == "stacked_hourglass" else 1)
    assert all(d.shape == (2, 32, 48) and d.dtype == torch.float32 for d in output.disparities)
    assert all(s.shape == (2, 8, 8, 12) for s in output.logits)
    disparity = model.eval()(left, right)
    assert disparity.shape == (2, 32, 48)
    assert 0 <= disparity.min() <= disparity.max() <= 31


@pytest.mark.parametrize(("padding", "mode"), [("zeros", "constant"), ("replicate", "replicate")])
@pytest.mark.parametrize("size", [(16, 16), (17, 31), (50, 37), (33, 129)])
def test_any_size_equals_psmnets_padding(size: tuple[int, int], padding: str, mode: str) -> None:
    model = build_model(tiny(padding=padding)).eval()
    height, width = size
    left, right = torch.randn(2, 1, 3, height, width)
    with torch.inference_mode():
        disparity = model(left, right)
        top, margin = -height % 16, -width % 16
        padded = [nn.functional.pad(view, (0, margin, top, 0), mode=mode) for view in (left, right)]
        expected = model(*padded)[:, top:, :width]
    assert disparity.shape == (1, height, width)
    assert torch.equal(disparity, expected)


def test_unusable_inputs() -> None:
    model = build_model(tiny()).eval()
    with pytest.raises(InputError, match="at least 16x16"):
        model(torch.randn(1, 3, 15, 40), torch.randn(1, 3, 15, 40))
    with pytest.raises(InputError, match="of one size"):
        model(torch.randn(1, 3, 16, 40), torch.randn(1, 3, 16, 48))
    with pytest.raises(InputError, match="too few for batch norm"):
        model.train()(torch.randn(1, 3, 64, 64), torch.randn(1, 3, 64, 64))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    ("changes", "size"),
    [
        ({}, (32, 64)),
        ({}, (37, 51)),
        ({"max_disparity": 96}, (32, 64)),
        ({"max_disparity": 16, "align_corners": True}, (40, 33)),
        ({"align_corners": True}, (32, 64)),
        ({"padding": "replicate"}, (37, 51)),
        ({"aggregation": "basic"}, (32, 64)),
        ({"attention_slots": list(ATTENTION_SLOTS)}, (32, 64)),
    ],
)
def test_default_path_equals_the_plain_one(changes: dict, size: tuple[int, int], training: bool, device: str) -> None:
    """The cost volume and the score volume are never stored, and nothing changes: values and gradients in float64."""
    model = build_model(tiny(**changes)).double().train(training)
    randomize(model).to(device)
    # views as of pictures [H, W, 3], cut out of wider ones
    wider = torch.randn(2, 2, size[0], size[1] + 5, 3, dtype=torch.float64, device=device)
    left, right = wider[..., 5:, :].movedim(-1, -3)
    upstream = torch.randn(2, *size, dtype=torch.float64, device=device)
    results = []
    for plain in (True, False):
        model.plain = plain
        model.zero_grad()
        output = model(left, right)
        disparities = output.disparities if training else (output,)
        sum((upstream * disparity).sum() for disparity in disparities).backward()
        results.append((disparities, {name: p.grad for name, p in model.named_parameters()}))
    (plain_disparities, plain_gradients), (disparities, gradients) = results
    for ours, reference in zip(disparities, plain_disparities, strict=True):
        torch.testing.assert_close(ours, reference, atol=1e-9, rtol=0)
    for name, reference in plain_gradients.items():
        if reference is None:  # the first two heads' last layers, say, do take part: only eval mode leaves some out
            assert gradients[name] is None
            continue
        scale = reference.abs().max().clamp(min=1e-9)
        torch.testing.assert_close(gradients[name] / scale, reference / scale, atol=1e-7, rtol=0, msg=name)


@pytest.mark.parametrize("size", [(32, 64), (37, 51)])
def test_regression_and_confidence_are_a_matter_of_prediction(size: tuple[int, int]) -> None:
    model = randomize(build_model(tiny()).double()).eval()
    left, right = torch.randn(2, 2, 3, *size, dtype=torch.float64)
    with torch.no_grad():
        expectation, confidence = model(left, right, confidence=True)
        assert torch.equal(model(left, right), expectation)
        model.set_prediction(regression="modal")
        modal, same = model(left, right, confidence=True)
        model.plain = True
        plain = model(left, right, confidence=True)
        training = model.train()(left, right)
        model.set_prediction(regression="expectation")
        again = model(left, right)
    assert modal.shape == confidence.shape == (2, *size)
    assert torch.equal(confidence, same)
    assert 0 < confidence.min() < confidence.max() <= 1
    assert (modal - expectation).abs().max() > 0.01
    torch.testing.assert_close(plain, (modal, confidence), atol=1e-9, rtol=0)
    assert all(map(torch.equal, training.disparities, again.disparities))
    with pytest.raises(InputError, match="regression must be one of expectation, modal, got 'mode'"):
        model.set_prediction(regression="mode")


@pytest.mark.parametrize("rows", [1, 2, 5, 8])
def test_features_fused_in_bands_are_those_of_the_whole(
    rows: int, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = randomize(build_model(tiny(attention_slots=["res4", "pyramid"])).double().eval()).to(device)
    pictures = torch.randn(2, 3, 64, 80, dtype=torch.float64, device=device)
    whole = model.features(pictures)  # with a gradient
    monkeypatch.setattr(features, "_FUSION_ELEMENTS", rows * 2 * 20 * 10 * model.config.base_channels)
    calls = []
    model.features.fusion.register_forward_hook(lambda *_: calls.append(1))
    with torch.no_grad():
        plain = model.features(pictures, plain=True)
        assert len(calls) == 1
        found = model.features(pictures)
    assert len(calls) == 1 - (-16 // rows)
    torch.testing.assert_close(plain, whole, atol=1e-12, rtol=0)
    torch.testing.assert_close(found, plain, atol=1e-12, rtol=0)


@pytest.mark.parametrize(
    "options",
    [
        {"kind": "factorized"},
        {"kind": "factorized", "normalization": "dot"},
        {"kind": "factorized", "value_channels": 4},
        {"kind": "factorized", "transformer": True},
        {"kind": "non_local"},
        {"kind": "non_local", "computation": "chunked"},
        {"kind": "non_local", "computation": "fused"},
        {"kind": "non_local", "normalization": "dot"},
        {"kind": "non_local", "transformer": True},
        {"kind": "axial"},
        {"kind": "axial", "span": 5, "transformer": True},
        {"kind": "resblock"},
        {"kind": "resblock_bottleneck"},
    ],
    ids=lambda options: "-".join(map(str, options.values())),
)
def test_attention_starts_as_the_identity(options: dict[str, Any]) -> None:
    """In every slot at once, the network with blocks computes what the network without them does."""
    plain = build_model(tiny(attention=AttentionConfig(kind="none"))).double().eval()
    attention = AttentionConfig(key_channels=8, heads=2, **options)
    model = build_model(tiny(attention=attention, attention_slots=list(ATTENTION_SLOTS))).double().eval()
    missing = model.load_state_dict(plain.state_dict(), strict=False)
    assert missing.missing_keys
    assert all(".attention." in key for key in missing.missing_keys)
    left, right = torch.randn(2, 1, 3, 48, 64, dtype=torch.float64)
    with torch.inference_mode():
        torch.testing.assert_close(model(left, right), plain(left, right), atol=1e-9, rtol=0)


def test_views_matter_and_shift_is_seen() -> None:
    """The volume pairs left x with right x - d: a plain correlation of its two halves finds the shift."""
    from fa_stereo.models.cost_volume import build_cost_volume

    right = torch.randn(1, 8, 6, 40)
    left = torch.roll(right, 5, dims=3)
    volume = build_cost_volume(left, right, 12)
    score = (volume[:, :8] * volume[:, 8:]).sum(1)[..., 12:].sum((0, 2, 3))
    assert score.argmax() == 5


def test_model_is_what_build_model_builds() -> None:
    assert isinstance(build_model(), PSMNet)
    assert build_model().config.attention.key_channels == 64
