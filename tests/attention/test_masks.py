"""Which masks matter and what rows are made of, against whole attention maps and terms written out."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from fa_stereo.attention import (
    AxialAttention,
    FactorizedAttention,
    NonLocalAttention,
    ResBlock,
    TransformerBlock,
)
from fa_stereo.attention.masks import (
    attention_of,
    effective_positions,
    mask_energies,
    mask_name,
    record_inputs,
    row_terms,
    strongest_masks,
)
from fa_stereo.errors import InputError


def random_weights(module: nn.Module) -> nn.Module:
    module.double()
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.5)
    return module


@pytest.fixture
def x() -> Tensor:
    return torch.randn(2, 12, 5, 7, dtype=torch.float64)


def whole_map(rows: Tensor, columns: Tensor, normalization: str, of: str) -> Tensor:
    """The N x N attention map of one head, from X C or X K [N, b] and X B or X Q [N, b]."""
    if normalization == "dot":
        return rows @ columns.T / rows.shape[1]
    if of == "factorized":
        return rows.softmax(1) @ columns.softmax(0).T
    return (rows @ columns.T).softmax(1)


@pytest.mark.parametrize("normalization", ["gaussian", "dot"])
@pytest.mark.parametrize("heads", [1, 4])
def test_rows_are_rows_of_the_whole_map(x: Tensor, heads: int, normalization: str) -> None:
    """For factorized attention the map that is never computed, C(X) B(X)^T, position by position and head by head."""
    factorized = random_weights(FactorizedAttention(12, 8, heads=heads, normalization=normalization))
    conventional = random_weights(NonLocalAttention(12, 8, heads=heads, normalization=normalization))
    for of, block, names in (
        ("factorized", factorized, ("to_coefficients", "to_basis")),
        ("non_local", conventional, ("to_keys", "to_queries")),
    ):
        for sample in range(2):
            X = x[sample].flatten(1).T
            first, second = ((X @ getattr(block, name).weight.T).chunk(heads, dim=1) for name in names)
            maps = torch.stack([whole_map(r, c, normalization, of) for r, c in zip(first, second, strict=True)])
            for position in ((0, 0), (3, 2), (4, 6)):
                row = block.attention_row(x, position)[sample].flatten(1)
                torch.testing.assert_close(row, maps[:, 7 * position[0] + position[1]], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("normalization", ["gaussian", "dot"])
@pytest.mark.parametrize(("heads", "value_channels"), [(1, None), (2, None), (2, 6)])
def test_energies_are_those_of_the_terms(x: Tensor, heads: int, value_channels: int | None, normalization: str) -> None:
    """The terms C_j B_j^T V R add up to what the block adds; the energy is their mean squared length."""
    attention = random_weights(FactorizedAttention(12, 4, value_channels, heads, normalization))
    coefficients, masks = (part(x).flatten(3) for part in (attention.coefficients, attention.basis_masks))
    values = attention.to_values(x.flatten(2).mT).chunk(heads, dim=-1)  # [B, N, m/h]
    energies, added = mask_energies(attention, x), torch.zeros(2, 35, 12, dtype=torch.float64)
    assert energies.shape == (2, heads, 4 // heads)
    for head in range(heads):
        for number in range(4 // heads):
            term = torch.zeros(2, 35, attention.to_values.out_features, dtype=torch.float64)
            width = values[head].shape[-1]
            context = masks[:, head, number, None] @ values[head]  # [B, 1, m/h]
            term[..., head * width : (head + 1) * width] = coefficients[:, head, number, :, None] * context
            term = attention.reprojection(term)
            if normalization == "dot":
                term = term / (4 // heads)
            torch.testing.assert_close(energies[:, head, number], term.square().sum(-1).mean(-1))
            added += term
    torch.testing.assert_close(attention(x), x + added.mT.unflatten(2, (5, 7)))


def test_strongest_masks_come_first_with_their_shares(x: Tensor) -> None:
    attention = random_weights(FactorizedAttention(12, 8, heads=2))
    energies = mask_energies(attention, x).mean(0)
    everything = strongest_masks(attention, x, 100)
    assert len(everything) == 8
    assert sum(mask.weight for mask in everything) == pytest.approx(1)
    assert [mask.weight for mask in everything] == sorted((mask.weight for mask in everything), reverse=True)
    strongest = everything[0]
    assert energies[strongest.head, strongest.number] == energies.max()
    assert torch.equal(strongest.mask, attention.basis_masks(x)[:, strongest.head, strongest.number])
    assert [mask[:3] for mask in strongest_masks(attention, x, 3)] == [mask[:3] for mask in everything[:3]]
    assert not everything[0].mask.requires_grad


def test_a_block_that_is_still_the_identity_has_no_energy() -> None:
    masks = strongest_masks(FactorizedAttention(12, 8), torch.randn(1, 12, 5, 7), 3)
    assert [(mask.number, mask.weight) for mask in masks] == [(0, 0.0), (1, 0.0), (2, 0.0)]


@pytest.mark.parametrize("normalization", ["gaussian", "dot"])
@pytest.mark.parametrize("heads", [1, 2])
def test_terms_add_up_to_the_row(x: Tensor, heads: int, normalization: str) -> None:
    attention = random_weights(FactorizedAttention(12, 8, heads=heads, normalization=normalization))
    row = attention.attention_row(x[:1], (3, 2))[0].mean(0)
    terms = row_terms(attention, x[:1], (3, 2), 8)
    torch.testing.assert_close(sum(term.weight * term.mask[0] for term in terms), row, rtol=1e-10, atol=1e-12)
    sizes = [abs(term.weight) * float(term.mask.abs().sum()) for term in terms]
    assert sizes == sorted(sizes, reverse=True)
    if normalization == "gaussian":
        assert sum(term.weight for term in terms) == pytest.approx(1)
    assert [term[:3] for term in row_terms(attention, x[:1], (3, 2), 2)] == [term[:3] for term in terms[:2]]
    with pytest.raises(InputError, match="not inside a map"):
        row_terms(attention, x[:1], (5, 0), 2)


def test_masks_of_a_volume_have_its_shape() -> None:
    attention = random_weights(FactorizedAttention(6, 4, heads=2))
    x = torch.randn(1, 6, 3, 4, 5, dtype=torch.float64)
    assert strongest_masks(attention, x, 1)[0].mask.shape == (1, 3, 4, 5)
    assert row_terms(attention, x, (2, 1, 0), 1)[0].mask.shape == (1, 3, 4, 5)


def test_inputs_are_recorded_inside_the_context_only() -> None:
    network = nn.Sequential(nn.Conv2d(3, 6, 3), FactorizedAttention(6, 4), nn.Conv2d(6, 6, 1))
    first, second = torch.rand(1, 3, 8, 8), torch.rand(1, 3, 8, 8)
    with record_inputs({"block": network[1], "last": network[2]}) as seen:
        network(first)
        network(second)  # of several calls the first counts: the left view's
    network(second)
    assert torch.equal(seen["block"], network[0](first))
    assert not seen["block"].requires_grad
    assert set(seen) == {"block", "last"}
    assert not network[1]._forward_pre_hooks
    with pytest.raises(RuntimeError), record_inputs({"block": network[1]}):
        network(torch.rand(1, 4, 8, 8))
    assert not network[1]._forward_pre_hooks


def test_attention_is_found_in_every_block() -> None:
    for attention in (FactorizedAttention(8, 4), NonLocalAttention(8, 4), AxialAttention(8, 8, heads=2)):
        assert attention_of(attention) is attention
        assert attention_of(TransformerBlock(attention, 8)) is attention
    assert attention_of(ResBlock(8)) is None
    assert attention_of(nn.Identity()) is None


def test_spread_of_weights() -> None:
    assert effective_positions(torch.ones(5, 8)) == pytest.approx(40)
    assert effective_positions(torch.tensor([0.0, 3.0, 0.0])) == pytest.approx(1)
    assert effective_positions(torch.tensor([1.0, -1.0, 0.0])) == pytest.approx(2)
    assert effective_positions(torch.zeros(3)) == 0


def test_names() -> None:
    assert mask_name(0, 12, 1) == "mask 12"
    assert mask_name(3, 5, 4) == "head 3 mask 5"
