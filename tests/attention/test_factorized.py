"""Factorized attention against its formulas (paper, section 3.2), and the properties the paper states."""

from __future__ import annotations

import sys

import pytest
import torch
from torch import Tensor, nn

from fa_stereo.attention import FactorizedAttention, NonLocalAttention
from fa_stereo.errors import InputError

SPATIAL = [(5, 7), (3, 4, 5)]


def random_weights(module: nn.Module) -> nn.Module:
    """Leave the identity start, in double precision."""
    module.double()
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.5)
    return module


def rows(x: Tensor) -> Tensor:
    """X of one map: [c, *spatial] -> [N, c]."""
    return x.reshape(x.shape[0], -1).T


def written_out(X: Tensor, C: Tensor, B: Tensor, V: Tensor, normalization: str) -> Tensor:
    """F(X) by equations 3 and 4 with the paper's matrices, through the whole attention map."""
    if normalization == "dot":
        return (X @ C) @ (X @ B).T @ (X @ V) / C.shape[1]
    return torch.softmax(X @ C, dim=1) @ torch.softmax(X @ B, dim=0).T @ (X @ V)


@pytest.mark.parametrize("spatial", SPATIAL)
@pytest.mark.parametrize("normalization", ["gaussian", "dot"])
def test_one_head_is_the_formula(normalization: str, spatial: tuple[int, ...]) -> None:
    attention = random_weights(FactorizedAttention(12, 8, normalization=normalization))
    x = torch.randn(3, 12, *spatial, dtype=torch.float64)
    C, B, V = (getattr(attention, f"to_{name}").weight.T for name in ("coefficients", "basis", "values"))
    result = attention(x)
    for sample in range(3):  # each sample by itself: nothing may leak between them
        X = rows(x[sample])
        torch.testing.assert_close(rows(result[sample]), X + written_out(X, C, B, V, normalization))


@pytest.mark.parametrize("normalization", ["gaussian", "dot"])
def test_heads_are_as_many_modules_with_a_value_bottleneck(normalization: str) -> None:
    heads, key_channels, value_channels = 4, 8, 20
    attention = random_weights(FactorizedAttention(12, key_channels, value_channels, heads, normalization))
    x = torch.randn(2, 12, 5, 7, dtype=torch.float64)
    result = attention(x)
    weights = [getattr(attention, f"to_{name}").weight for name in ("coefficients", "basis", "values")]
    for sample in range(2):
        X = rows(x[sample])
        modules = [  # head i has the i-th share of the channels of C, B and V
            written_out(X, *(weight.chunk(heads)[i].T for weight in weights), normalization) for i in range(heads)
        ]
        expected = X + torch.cat(modules, dim=1) @ attention.reprojection.weight.T
        torch.testing.assert_close(rows(result[sample]), expected)


def test_heads_without_a_bottleneck_are_concatenated_modules() -> None:
    """Equation 5 as it stands: the branch of h heads is the branches of h modules side by side."""
    x = torch.randn(2, 12, 5, 7, dtype=torch.float64)
    attention = random_weights(FactorizedAttention(12, 8, heads=2))
    parts = []
    for i in range(2):
        single = FactorizedAttention(12, 4, 6).double()
        with torch.no_grad():
            for name in ("to_coefficients", "to_basis", "to_values"):
                getattr(single, name).weight.copy_(getattr(attention, name).weight.chunk(2)[i])
            single.reprojection.weight.copy_(torch.eye(12, dtype=torch.float64)[:, 6 * i : 6 * i + 6])
        parts.append(single(x) - x)  # the module's 6 channels, put where the concatenation has them
    torch.testing.assert_close(attention(x), x + parts[0] + parts[1])


@pytest.mark.parametrize("heads", [1, 4])
@pytest.mark.parametrize("value_channels", [None, 8])
def test_dot_equals_conventional_attention(value_channels: int | None, heads: int) -> None:
    """Section 3.3.1: FA-dot and CA-dot are one function, in values and in all gradients."""
    factorized = random_weights(FactorizedAttention(12, 8, value_channels, heads, "dot"))
    conventional = NonLocalAttention(12, 8, value_channels, heads, "dot").double()
    renamed = {
        name.replace("to_coefficients", "to_keys").replace("to_basis", "to_queries"): weight
        for name, weight in factorized.state_dict().items()
    }
    conventional.load_state_dict(renamed)
    x = torch.randn(2, 12, 5, 7, dtype=torch.float64, requires_grad=True)
    weighting = torch.randn(2, 12, 5, 7, dtype=torch.float64)

    results = [module(x) for module in (factorized, conventional)]
    torch.testing.assert_close(results[0], results[1], rtol=1e-11, atol=1e-11)
    gradients = [
        torch.autograd.grad((result * weighting).sum(), [x, *module.parameters()])
        for result, module in zip(results, (factorized, conventional), strict=True)
    ]
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("spatial", SPATIAL)
def test_gaussian_rows_sum_to_one(spatial: tuple[int, ...]) -> None:
    attention = random_weights(FactorizedAttention(12, 8, heads=2))
    x = 3 * torch.randn(2, 12, *spatial, dtype=torch.float64)
    coefficients, masks = attention.coefficients(x), attention.basis_masks(x)
    assert coefficients.shape == masks.shape == (2, 2, 4, *spatial)
    ones = torch.ones(2, 2, 4, dtype=torch.float64)
    torch.testing.assert_close(masks.flatten(3).sum(-1), ones)
    attention_map = torch.einsum("zhbn,zhbm->zhnm", coefficients.flatten(3), masks.flatten(3))
    torch.testing.assert_close(attention_map.sum(-1), torch.ones_like(attention_map[..., 0]))
    assert (attention_map >= 0).all()


@pytest.mark.parametrize("normalization", ["gaussian", "dot"])
def test_attention_row_is_what_the_forward_pass_uses(normalization: str) -> None:
    attention = random_weights(FactorizedAttention(12, 8, 6, heads=2, normalization=normalization))
    x = torch.randn(2, 12, 5, 7, dtype=torch.float64)
    weights = attention.attention_row(x, (3, 2))
    assert weights.shape == (2, 2, 5, 7)
    values = attention.to_values(x.flatten(2).mT).unflatten(-1, (2, 3))  # [B, N, h, m/h]
    attended = torch.einsum("zhn,znhm->zhm", weights.flatten(2), values).flatten(1)
    expected = x[:, :, 3, 2] + attended @ attention.reprojection.weight.T
    torch.testing.assert_close(attention(x)[:, :, 3, 2], expected)
    with pytest.raises(InputError, match="not inside a map"):
        attention.attention_row(x, (5, 0))


@pytest.mark.parametrize("normalization", ["gaussian", "dot"])
def test_permuting_positions_permutes_the_result(normalization: str) -> None:
    """Attention knows no order of positions; a module that mixes up its axes does."""
    attention = random_weights(FactorizedAttention(12, 8, 8, heads=2, normalization=normalization))
    x = torch.randn(3, 12, 35, dtype=torch.float64)
    order = torch.randperm(35)
    direct = attention(x[..., order].reshape(3, 12, 5, 7)).flatten(2)
    torch.testing.assert_close(direct, attention(x.reshape(3, 12, 5, 7)).flatten(2)[..., order])


@pytest.mark.parametrize("kind", [FactorizedAttention, NonLocalAttention])
def test_a_mixed_up_axis_would_be_noticed(kind: type[nn.Module], monkeypatch: pytest.MonkeyPatch) -> None:
    """The test above fails a module whose rows are not positions: here the map is cut up in memory order."""
    module = sys.modules[kind.__module__]
    monkeypatch.setattr(module, "to_positions", lambda x: x.reshape(len(x), -1, x.shape[1]))
    monkeypatch.setattr(module, "from_positions", lambda rows, size: rows.reshape(len(rows), rows.shape[2], *size))
    attention = random_weights(kind(12, 8, 8, heads=2))
    x = torch.randn(3, 12, 35, dtype=torch.float64)
    order = torch.randperm(35)
    direct = attention(x[..., order].reshape(3, 12, 5, 7)).flatten(2)
    assert (direct - attention(x.reshape(3, 12, 5, 7)).flatten(2)[..., order]).abs().max() > 0.1


def test_gradients_are_right() -> None:
    for normalization in ("gaussian", "dot"):
        attention = random_weights(FactorizedAttention(4, 4, 2, heads=2, normalization=normalization))
        x = torch.randn(2, 4, 3, 3, dtype=torch.float64, requires_grad=True)
        assert torch.autograd.gradcheck(lambda x, *_, a=attention: a(x), (x, *attention.parameters()))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gaussian_holds_at_a_million_positions_in_half_precision(dtype: torch.dtype) -> None:
    """A mask over 10^6 positions has values of 10^-6, which half precision rounds to 0 or by several percent.

    A constant value comes back from weights that sum to 1, whatever they are.
    """
    attention = FactorizedAttention(2, 4)
    with torch.no_grad():
        attention.to_values.weight.copy_(torch.eye(2))
    x = torch.randn(1, 2, 1000, 1000)
    x[:, 1] = 0.75
    x = x.to(dtype)
    with torch.no_grad():
        reference = attention(x.float())
        pure = attention.to(dtype)(x)
        with torch.autocast("cpu", dtype):
            mixed = attention.float()(x.float())
    epsilon = torch.finfo(dtype).eps
    for result in (pure.float(), mixed.float()):
        assert torch.isfinite(result).all()
        torch.testing.assert_close(result, reference, rtol=2 * epsilon, atol=2 * epsilon)
        torch.testing.assert_close(result[:, 1], torch.full_like(result[:, 1], 1.5), rtol=2 * epsilon, atol=0)


def test_dot_sums_over_positions_beyond_half_precision() -> None:
    """The sum over 2^17 positions is more than float16 can hold; divided by b it is not."""
    attention = FactorizedAttention(1, 4, normalization="dot")
    with torch.no_grad():
        attention.to_coefficients.weight.fill_(2.0**-10)
        attention.to_basis.weight.fill_(1.0)
        attention.to_values.weight.fill_(1.0)
    x = torch.ones(1, 1, 512, 256, dtype=torch.float16)
    assert attention.half()(x)[0, 0, 0, 0] == 1 + 4 * 2.0**-10 * (2.0**17 / 4)


def test_masks_keep_full_precision_under_autocast() -> None:
    attention = FactorizedAttention(8, 4, heads=2)
    x = torch.randn(2, 8, 64, 64)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        masks = attention.basis_masks(x)
    assert masks.dtype == torch.float32
    torch.testing.assert_close(masks.flatten(3).sum(-1), torch.ones(2, 2, 2))


def test_channels_that_cannot_be_divided_are_refused() -> None:
    with pytest.raises(InputError, match=r"key_channels \(6\) must be divisible by attention.heads \(4\)"):
        FactorizedAttention(8, 6, heads=4)
    with pytest.raises(InputError, match=r"value_channels \(9\) must be divisible"):
        FactorizedAttention(9, 8, heads=4)
