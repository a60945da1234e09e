"""Conventional attention against its formulas (paper, equations 6 and 9), and its three computations alike."""

from __future__ import annotations

import pytest
import torch
from largest_tensor import LargestTensor
from torch import Tensor, nn

from fa_stereo.attention import NonLocalAttention
from fa_stereo.errors import InputError


def random_weights(module: nn.Module) -> nn.Module:
    module.double()
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.5)
    return module


def written_out(X: Tensor, K: Tensor, Q: Tensor, V: Tensor, normalization: str) -> Tensor:
    """S(X) by equations 6 and 9 with the paper's matrices."""
    scores = (X @ K) @ (X @ Q).T
    attention_map = scores / K.shape[1] if normalization == "dot" else scores.softmax(dim=1)
    return attention_map @ (X @ V)


@pytest.mark.parametrize("spatial", [(5, 7), (3, 4, 5)])
@pytest.mark.parametrize("normalization", ["gaussian", "dot"])
def test_one_head_is_the_formula(normalization: str, spatial: tuple[int, ...]) -> None:
    attention = random_weights(NonLocalAttention(12, 8, normalization=normalization))
    x = torch.randn(3, 12, *spatial, dtype=torch.float64)
    K, Q, V = (getattr(attention, f"to_{name}").weight.T for name in ("keys", "queries", "values"))
    result = attention(x)
    for sample in range(3):
        X = x[sample].flatten(1).T
        expected = X + written_out(X, K, Q, V, normalization)
        torch.testing.assert_close(result[sample].flatten(1).T, expected)


@pytest.mark.parametrize("normalization", ["gaussian", "dot"])
def test_heads_are_as_many_modules(normalization: str) -> None:
    heads = 4
    attention = random_weights(NonLocalAttention(12, 8, 20, heads, normalization))
    x = torch.randn(2, 12, 5, 7, dtype=torch.float64)
    result = attention(x)
    weights = [getattr(attention, f"to_{name}").weight for name in ("keys", "queries", "values")]
    for sample in range(2):
        X = x[sample].flatten(1).T
        modules = [written_out(X, *(w.chunk(heads)[i].T for w in weights), normalization) for i in range(heads)]
        expected = X + torch.cat(modules, dim=1) @ attention.reprojection.weight.T
        torch.testing.assert_close(result[sample].flatten(1).T, expected)


@pytest.mark.parametrize("heads", [1, 4])
@pytest.mark.parametrize(("key_channels", "value_channels"), [(8, None), (8, 8), (16, 8), (8, 24)])
def test_three_computations_agree(key_channels: int, value_channels: int | None, heads: int) -> None:
    """In values and gradients; chunks of 3 rows do not divide 35, fused heads are padded where k and m differ."""
    x = torch.randn(2, 12, 5, 7, dtype=torch.float64, requires_grad=True)
    weighting = torch.randn(2, 12, 5, 7, dtype=torch.float64)
    plain = random_weights(NonLocalAttention(12, key_channels, value_channels, heads))
    outcomes = []
    for computation in ("materialized", "chunked", "fused"):
        attention = NonLocalAttention(
            12, key_channels, value_channels, heads, computation=computation, chunk_entries=3 * 2 * 35
        ).double()
        attention.load_state_dict(plain.state_dict())
        result = attention(x)
        gradients = torch.autograd.grad((result * weighting).sum(), [x, *attention.parameters()])
        with torch.no_grad():
            torch.testing.assert_close(attention(x), result)
        outcomes.append([result, *gradients])
    for other in outcomes[1:]:
        for ours, theirs in zip(outcomes[0], other, strict=True):
            torch.testing.assert_close(ours, theirs)


def test_chunked_dot_agrees_too() -> None:
    x = torch.randn(2, 12, 5, 7, dtype=torch.float64)
    plain = random_weights(NonLocalAttention(12, 8, 4, 2, "dot"))
    chunked = NonLocalAttention(12, 8, 4, 2, "dot", "chunked", chunk_entries=1).double()  # one row at a time
    chunked.load_state_dict(plain.state_dict())
    torch.testing.assert_close(chunked(x), plain(x))


@pytest.mark.parametrize(("key_channels", "value_channels"), [(8, None), (16, 8)])
def test_only_materialized_stores_the_map(key_channels: int, value_channels: int | None) -> None:
    """Forward and backward; a kernel behind ``fused`` that fell back to storing it would show here."""
    x = torch.randn(1, 16, 16, 16, requires_grad=True)
    positions = 16 * 16
    largest = {}
    for computation in ("materialized", "chunked", "fused"):
        attention = NonLocalAttention(
            16, key_channels, value_channels, computation=computation, chunk_entries=8 * positions
        )
        with LargestTensor() as mode:
            attention(x).sum().backward()
        largest[computation] = mode.elements
    assert largest["materialized"] == positions**2
    assert largest["chunked"] < positions**2 // 8
    assert largest["fused"] < positions**2 // 8


@pytest.mark.parametrize(
    ("computation", "normalization"),
    [("materialized", "gaussian"), ("chunked", "gaussian"), ("fused", "gaussian"), ("materialized", "dot"),
     ("chunked", "dot")],
)  # fmt: skip
def test_permuting_positions_permutes_the_result(computation: str, normalization: str) -> None:
    attention = random_weights(
        NonLocalAttention(12, 8, 8, heads=2, normalization=normalization, computation=computation)
    )
    x = torch.randn(3, 12, 35, dtype=torch.float64)
    order = torch.randperm(35)
    direct = attention(x[..., order].reshape(3, 12, 5, 7)).flatten(2)
    torch.testing.assert_close(direct, attention(x.reshape(3, 12, 5, 7)).flatten(2)[..., order])


@pytest.mark.parametrize("normalization", ["gaussian", "dot"])
def test_attention_row_is_what_the_forward_pass_uses(normalization: str) -> None:
    attention = random_weights(NonLocalAttention(12, 8, 6, heads=2, normalization=normalization))
    x = torch.randn(2, 12, 3, 4, 5, dtype=torch.float64)
    weights = attention.attention_row(x, (2, 1, 3))
    assert weights.shape == (2, 2, 3, 4, 5)
    if normalization == "gaussian":
        torch.testing.assert_close(weights.flatten(2).sum(-1), torch.ones(2, 2, dtype=torch.float64))
    values = attention.to_values(x.flatten(2).mT).unflatten(-1, (2, 3))  # [B, N, h, m/h]
    attended = torch.einsum("zhn,znhm->zhm", weights.flatten(2), values).flatten(1)
    expected = x[:, :, 2, 1, 3] + attended @ attention.reprojection.weight.T
    torch.testing.assert_close(attention(x)[:, :, 2, 1, 3], expected)
    with pytest.raises(InputError, match="not inside a map"):
        attention.attention_row(x, (2, 1))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("computation", ["materialized", "chunked", "fused"])
def test_half_precision_stays_near(computation: str, dtype: torch.dtype) -> None:
    attention = NonLocalAttention(16, 8, computation=computation)
    nn.init.normal_(attention.to_values.weight, std=0.25)
    x = torch.randn(2, 16, 12, 12)
    with torch.no_grad():
        reference = attention(x)
        with torch.autocast("cpu", dtype):
            mixed = attention(x)
        pure = attention.to(dtype)(x.to(dtype))
    assert mixed.dtype == torch.float32
    assert pure.dtype == dtype
    tolerance = 10 * torch.finfo(dtype).eps
    torch.testing.assert_close(mixed, reference, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(pure.float(), reference, rtol=tolerance, atol=tolerance)


def test_fused_dot_is_refused() -> None:
    with pytest.raises(InputError, match=r"use attention\.kind=factorized"):
        NonLocalAttention(8, 4, normalization="dot", computation="fused")
