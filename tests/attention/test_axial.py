"""Axial attention against its formula written out position by position."""

from __future__ import annotations

import pytest
import torch
from largest_tensor import LargestTensor
from torch import Tensor, nn

from fa_stereo.attention import AxialAttention
from fa_stereo.attention.axial import AxisAttention, block_length
from fa_stereo.errors import InputError


def random_weights(module: nn.Module) -> nn.Module:
    module.double()
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.5)
    return module


def attend_plainly(layer: AxisAttention, line: Tensor) -> Tensor:
    """One line [L, c] -> [L, m]: y_o = sum_p softmax_p(q_o.k_p + q_o.r^q + k_p.r^k) (v_p + r^v), head by head."""
    length, heads = len(line), layer.heads
    q, k, v = (
        (line @ weights.weight.T).chunk(heads, dim=1) for weights in (layer.to_queries, layer.to_keys, layer.to_values)
    )
    results = []
    for head in range(heads):
        rows = []
        for o in range(length):
            window = [p for p in range(length) if layer.span is None or abs(p - o) <= layer.span // 2]
            places = [min(max(p - o, -layer.reach), layer.reach) + layer.reach for p in window]
            r_q, r_k, r_v = (
                table[places] for table in (layer.query_positions, layer.key_positions, layer.value_positions)
            )
            key = k[head][window]
            weights = (key @ q[head][o] + r_q @ q[head][o] + (key * r_k).sum(1)).softmax(0)
            rows.append(weights @ (v[head][window] + r_v))
        results.append(torch.stack(rows))
    return torch.cat(results, dim=1)


@pytest.mark.parametrize("reach", [64, 6])
def test_whole_single_row_is_1d_attention_with_relative_positions(reach: int) -> None:
    """``reach`` 6 is shorter than the row: farther offsets share the outermost vectors."""
    row = torch.randn(11, 12, dtype=torch.float64)
    layer = random_weights(AxisAttention(1, 12, 8, 4, heads=2, reach=reach))
    torch.testing.assert_close(layer(row[None], (1, 11))[0], attend_plainly(layer, row))


def test_window_as_wide_as_the_row_is_the_whole_row() -> None:
    """A span of 2 L - 1 reaches every position from every other: with the same vectors, the same function."""
    row = torch.randn(2, 11, 12, dtype=torch.float64)
    whole = random_weights(AxisAttention(1, 12, 8, 4, heads=2, reach=10))
    windowed = AxisAttention(1, 12, 8, 4, heads=2, span=21).double()
    windowed.load_state_dict(whole.state_dict())
    torch.testing.assert_close(windowed(row, (1, 11)), whole(row, (1, 11)))


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("span", [None, 1, 5, 17, 33, 65])
def test_every_span_is_the_formula(axis: int, span: int | None) -> None:
    """Lines of 37: several blocks with a last one that is not full, blocks longer than the line, and whole lines."""
    size = (37, 3) if axis == 0 else (3, 37)
    x = torch.randn(2, *size, 6, dtype=torch.float64)
    layer = random_weights(AxisAttention(axis, 6, 8, 4, heads=2, span=span, reach=5))
    result = layer(x.flatten(1, 2), size).unflatten(1, size)
    for sample in range(2):
        for line in range(3):
            place = (sample, slice(None), line) if axis == 0 else (sample, line)
            torch.testing.assert_close(result[place], attend_plainly(layer, x[place]))


@pytest.mark.parametrize("span", [5, 17, 33])
def test_windows_equal_masked_full_attention(span: int) -> None:
    """Values and gradients of the blockwise computation against the whole masked map of every line."""
    size, half = (3, 50), span // 2
    layer = random_weights(AxisAttention(1, 6, 8, 4, heads=2, span=span))
    X = torch.randn(2, 150, 6, dtype=torch.float64, requires_grad=True)
    offsets = torch.arange(50) - torch.arange(50)[:, None]
    weights = layer.attention_map(X, size)  # [B, lines, h, L, L]
    assert (weights[..., offsets.abs() > half] == 0).all()
    torch.testing.assert_close(weights.sum(-1), torch.ones_like(weights[..., 0]))
    values = layer.to_values(X).unflatten(-1, (2, 2)).unflatten(1, size).transpose(2, 3)  # [B, lines, h, L, e]
    positions = layer.value_positions[offsets.clamp(-half, half) + half]  # [L, L, e]
    full = weights @ values + torch.einsum("zlhop,ope->zlhoe", weights, positions)
    expected = full.transpose(2, 3).flatten(3).flatten(1, 2)  # [B, N, m]
    result = layer(X, size)
    torch.testing.assert_close(result, expected)
    weighting = torch.randn_like(result)
    inputs = [X, *layer.parameters()]
    for ours, theirs in zip(
        torch.autograd.grad((result * weighting).sum(), inputs),
        torch.autograd.grad((expected * weighting).sum(), inputs),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs)


def test_block_is_height_then_width_with_a_residual() -> None:
    attention = random_weights(AxialAttention(6, 8, 4, heads=2, span=5))
    x = torch.randn(2, 6, 7, 9, dtype=torch.float64)
    for sample in range(2):
        columns = torch.stack([attend_plainly(attention.height, x[sample, :, :, w].T) for w in range(9)], dim=1)
        rows = torch.stack([attend_plainly(attention.width, columns[y]) for y in range(7)])  # [H, W, m]
        expected = x[sample] + (rows @ attention.reprojection.weight.T).permute(2, 0, 1)
        torch.testing.assert_close(attention(x)[sample], expected)


def test_volumes_are_treated_plane_by_plane() -> None:
    attention = random_weights(AxialAttention(6, 8, 4, heads=2))
    x = torch.randn(2, 6, 3, 7, 9, dtype=torch.float64)
    expected = torch.stack([attention(x[:, :, d]) for d in range(3)], dim=2)
    torch.testing.assert_close(attention(x), expected)


@pytest.mark.parametrize("span", [None, 5])
def test_attention_row_is_what_reaches_the_position(span: int | None) -> None:
    """One head, values that pass through: the output is the input weighted by the row (plus position terms, zero)."""
    attention = random_weights(AxialAttention(4, 8, 4, heads=1, span=span))
    with torch.no_grad():
        for layer in (attention.height, attention.width):
            layer.to_values.weight.copy_(torch.eye(4))
            layer.value_positions.zero_()
        attention.reprojection.weight.copy_(torch.eye(4))
    x = torch.randn(2, 4, 7, 9, dtype=torch.float64)
    weights = attention.attention_row(x, (2, 5))
    assert weights.shape == (2, 1, 7, 9)
    torch.testing.assert_close(weights.sum((2, 3)), torch.ones(2, 1, dtype=torch.float64))
    expected = x[:, :, 2, 5] + (weights * x).sum((2, 3))
    torch.testing.assert_close(attention(x)[:, :, 2, 5], expected)


def test_attention_row_of_a_volume_stays_in_its_plane() -> None:
    attention = random_weights(AxialAttention(4, 8, heads=4, span=5))
    x = torch.randn(1, 4, 3, 7, 9, dtype=torch.float64)
    weights = attention.attention_row(x, (1, 2, 5))
    assert weights.shape == (1, 4, 3, 7, 9)
    torch.testing.assert_close(weights[:, :, 1].sum((2, 3)), torch.ones(1, 4, dtype=torch.float64))
    assert (weights[:, :, [0, 2]] == 0).all()
    with pytest.raises(InputError, match="not inside a map"):
        attention.attention_row(x, (1, 7, 5))


def test_blocks_never_cost_more_than_the_whole_line() -> None:
    for length in (1, 7, 16, 40, 64, 136, 240):
        costs = []
        for span in (1, 5, 9, 17, 33, 65, 129):
            block = block_length(length, span)
            reach = length if block == length else block + span - 1
            costs.append(-(-length // block) * block * reach)
            assert costs[-1] <= length * length
        assert block_length(length, None) == length
    assert costs == sorted(costs)  # a wider window costs more, on lines that are long enough
    assert costs[0] < costs[-1] / 10


def test_memory_is_linear_in_the_span() -> None:
    """No tensor is larger than a block's windows, S + span - 1 places for each position and head."""
    x = torch.randn(1, 4, 4, 400, requires_grad=True)
    largest = []
    for span in (17, 33, 65):
        with LargestTensor() as mode:
            AxialAttention(4, 8, heads=2, span=span)(x).sum().backward()
        largest.append(mode.elements)
        positions = 4 * -(-400 // span) * span  # the last block is filled up
        assert mode.elements <= 2 * positions * (2 * span - 1)
    assert largest[2] < 2.3 * largest[1] < 2.3**2 * largest[0]


def test_half_precision_stays_near() -> None:
    for span in (None, 5):
        attention = AxialAttention(16, 16, heads=4, span=span)
        nn.init.normal_(attention.reprojection.weight, std=0.25)
        x = torch.randn(2, 16, 20, 20)
        with torch.no_grad():
            reference = attention(x)
            with torch.autocast("cpu", torch.bfloat16):
                mixed = attention(x)
            pure = attention.bfloat16()(x.bfloat16())
        torch.testing.assert_close(mixed, reference, rtol=0.05, atol=0.05)
        torch.testing.assert_close(pure.float(), reference, rtol=0.05, atol=0.05)


def test_even_span_and_indivisible_channels_are_refused() -> None:
    with pytest.raises(InputError, match="span must be odd"):
        AxialAttention(8, 8, heads=2, span=4)
    with pytest.raises(InputError, match=r"must be divisible by attention\.heads"):
        AxialAttention(12, 16, heads=8)
