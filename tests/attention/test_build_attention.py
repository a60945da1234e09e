"""What holds for every block that a configuration can ask for."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch import nn

from fa_stereo.attention import (
    AxialAttention,
    FactorizedAttention,
    NonLocalAttention,
    ResBlock,
    ResBlockBottleneck,
    TransformerBlock,
    build_attention,
)
from fa_stereo.config import AttentionConfig
from fa_stereo.errors import InputError

CHANNELS = 16

CONFIGURATIONS = {
    "fa": {},
    "fa-dot": {"normalization": "dot"},
    "fa-bot": {"value_channels": 8},
    "fa-heads": {"heads": 4},
    "fa-multi": {"value_channels": 8, "heads": 4},
    "fa-tfm": {"value_channels": 8, "heads": 4, "transformer": True},
    "fa-tfm-wide": {"heads": 2, "transformer": True, "feed_forward_channels": 64},
    "ca": {"kind": "non_local"},
    "ca-dot": {"kind": "non_local", "normalization": "dot"},
    "ca-chunked": {"kind": "non_local", "computation": "chunked", "value_channels": 8},
    "ca-fused": {"kind": "non_local", "computation": "fused", "heads": 2},
    "ca-tfm": {"kind": "non_local", "value_channels": 8, "heads": 4, "transformer": True},
    "axial": {"kind": "axial", "heads": 4},
    "axial-span": {"kind": "axial", "heads": 4, "span": 5, "value_channels": 8},
    "axial-tfm": {"kind": "axial", "heads": 4, "span": 3, "transformer": True},
    "resblock": {"kind": "resblock"},
    "resblock-bot": {"kind": "resblock_bottleneck"},
}


@pytest.fixture(params=CONFIGURATIONS.values(), ids=CONFIGURATIONS.keys())
def block(request: pytest.FixtureRequest) -> nn.Module:
    return build_attention(AttentionConfig(key_channels=8, **{k: v for k, v in request.param.items()}), CHANNELS)


@pytest.mark.parametrize("spatial", [(6, 9), (1, 1), (17, 2), (3, 5, 4)])
def test_starts_as_the_identity(block: nn.Module, spatial: tuple[int, ...]) -> None:
    x = torch.randn(2, CHANNELS, *spatial)
    assert torch.equal(block.eval()(x), x)
    if x[:, 0].numel() > 2:  # batch normalization has no statistics of fewer
        assert torch.equal(block.train()(x), x)


@pytest.mark.parametrize("channels", [32, 64, 128])
def test_starts_as_the_identity_at_the_networks_widths(channels: int) -> None:
    x = torch.randn(1, channels, 8, 12)
    for overrides in CONFIGURATIONS.values():
        assert torch.equal(build_attention(AttentionConfig(**overrides), channels)(x), x)


@pytest.mark.parametrize("spatial", [(6, 9), (3, 5, 4)])
def test_gradients_reach_every_parameter_after_one_step(block: nn.Module, spatial: tuple[int, ...]) -> None:
    """The zero start blocks what lies before the last layer for one step, and no longer."""
    x, target = torch.randn(2, CHANNELS, *spatial), torch.randn(2, CHANNELS, *spatial)
    optimizer = torch.optim.SGD(block.parameters(), lr=0.1)
    for step in range(3):  # a transformer has two zeros in a row
        optimizer.zero_grad()
        ((block(x) - target) ** 2).mean().backward()
        if step < 2:
            optimizer.step()
    for name, parameter in block.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() > 0, name


def awaken(block: nn.Module) -> nn.Module:
    for parameter in block.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.3)
    return block.eval()


def test_keeps_memory_layout_and_takes_any_stride(block: nn.Module) -> None:
    awaken(block)
    x = torch.randn(2, CHANNELS, 6, 9)
    expected = block(x)
    assert expected.is_contiguous()
    last = block(x.to(memory_format=torch.channels_last))
    assert last.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(last, expected, rtol=1e-4, atol=1e-5)
    strided = torch.randn(2, CHANNELS, 12, 9)
    strided[:, :, ::2] = x
    torch.testing.assert_close(block(strided[:, :, ::2]), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(block(x.mT.contiguous().mT), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(block(x.expand(2, -1, -1, -1)[:1]), expected[:1], rtol=1e-4, atol=1e-5)


def test_volume_in_channels_last(block: nn.Module) -> None:
    awaken(block)
    x = torch.randn(2, CHANNELS, 3, 5, 4)
    last = block(x.to(memory_format=torch.channels_last_3d))
    torch.testing.assert_close(last, block(x), rtol=1e-4, atol=1e-5)


def test_samples_of_a_batch_do_not_mix(block: nn.Module) -> None:
    awaken(block)
    x = torch.randn(3, CHANNELS, 6, 9)
    torch.testing.assert_close(block(x)[1:2], block(x[1:2]), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_runs_in_mixed_and_pure_half_precision(block: nn.Module, dtype: torch.dtype) -> None:
    awaken(block)
    x = 0.5 * torch.randn(2, CHANNELS, 6, 9)
    with torch.no_grad():
        expected = block(x)
        scale = expected.abs().max().item()
        with torch.autocast("cpu", dtype):
            mixed = block(x)
        pure = block.to(dtype)(x.to(dtype))
    assert pure.dtype == dtype
    for result in (mixed.float(), pure.float()):
        torch.testing.assert_close(result, expected, rtol=0, atol=16 * torch.finfo(dtype).eps * max(1.0, scale))


def test_training_step_under_autocast(block: nn.Module) -> None:
    awaken(block).train()
    x = torch.randn(2, CHANNELS, 6, 9, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        block(x).float().square().mean().backward()
    assert x.grad is not None
    assert torch.isfinite(x.grad).all()
    for name, parameter in block.named_parameters():
        assert parameter.grad is not None, name
        assert torch.isfinite(parameter.grad).all(), name


def test_state_dict_travels(block: nn.Module) -> None:
    awaken(block)
    x = torch.randn(2, CHANNELS, 6, 9)
    expected = block(x)
    stored = {name: tensor.clone() for name, tensor in block.state_dict().items()}
    for parameter in block.parameters():
        nn.init.normal_(parameter)
    block.load_state_dict(stored)
    assert torch.equal(block(x), expected)


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ({"kind": "none"}, nn.Identity),
        ({"kind": "factorized"}, FactorizedAttention),
        ({"kind": "non_local"}, NonLocalAttention),
        ({"kind": "axial", "heads": 8}, AxialAttention),
        ({"kind": "resblock"}, ResBlock),
        ({"kind": "resblock_bottleneck"}, ResBlockBottleneck),
        ({"kind": "axial", "transformer": True}, TransformerBlock),
    ],
)
def test_kinds(overrides: dict[str, object], expected: type[nn.Module]) -> None:
    assert type(build_attention(AttentionConfig(**overrides), CHANNELS)) is expected


def parameters(overrides: dict[str, object]) -> int:
    block = build_attention(AttentionConfig(**overrides), CHANNELS)
    return sum(parameter.numel() for parameter in block.parameters())


def test_parameters_are_the_formulas() -> None:
    c, b, m = CHANNELS, 8, 4
    for kind in ("factorized", "non_local"):
        assert parameters({"kind": kind, "key_channels": b}) == 2 * b * c + c * c
        assert parameters({"kind": kind, "key_channels": b, "heads": 4}) == 2 * b * c + c * c
        bottleneck = {"kind": kind, "key_channels": b, "value_channels": m}
        assert parameters(bottleneck) == 2 * b * c + 2 * m * c
        assert parameters({**bottleneck, "heads": 4}) == 2 * b * c + 2 * m * c
        assert parameters({**bottleneck, "transformer": True}) == 2 * b * c + 2 * m * c + 2 * c * c + 2 * c
        assert parameters({"kind": kind, "key_channels": b, "transformer": True}) == (
            2 * b * c + 2 * c * c + 2 * c * c + 2 * c
        )
    assert parameters({"kind": "resblock"}) == 18 * c * c + 4 * c
    assert parameters({"kind": "resblock_bottleneck", "value_channels": m}) == 2 * m * c + 9 * m * m + 4 * m + 2 * c
    vectors = 5 * (2 * b // 4 + m // 4)
    axial = {"kind": "axial", "key_channels": b, "value_channels": m, "heads": 4, "span": 5}
    assert parameters(axial) == (2 * b * c + c * m) + (2 * b * m + m * m) + m * c + 2 * vectors


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"kind": "non_local", "normalization": "dot", "computation": "fused"}, "attention.kind=factorized"),
        ({"kind": "axial", "normalization": "dot"}, "attention.normalization=gaussian"),
        ({"kind": "resblock", "transformer": True}, "attention.transformer"),
        ({"feed_forward_channels": 0}, "attention.feed_forward_channels must be positive"),
        ({"reach": 0}, "attention.reach must be positive"),
        ({"span": 4}, "attention.span must be odd"),
        ({"key_channels": 6, "heads": 4}, "must be divisible by attention.heads"),
    ],
)
def test_what_excludes_itself_is_refused(overrides: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        AttentionConfig(**overrides)


def test_channels_that_heads_do_not_divide_are_refused() -> None:
    with pytest.raises(InputError, match=r"value_channels \(18\) must be divisible by attention.heads \(4\)"):
        build_attention(AttentionConfig(heads=4), 18)


def test_attention_stands_alone() -> None:
    """``fa_stereo.attention`` works without the rest of the application, in anybody's network."""
    program = (
        "import sys, fa_stereo.attention\n"
        "rest = {'fa_stereo.models', 'fa_stereo.data', 'hydra', 'omegaconf', 'cv2', 'matplotlib', 'torchvision'}\n"
        "print(*sorted(rest & set(sys.modules)))"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == ""
