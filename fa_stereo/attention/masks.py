"""Looking into attention blocks: which basis masks matter, and of which masks an attention row is made (figures 1, 7).

Symbols as in ``factorized.py``. The masks, coefficients and rows themselves are methods of the blocks
(``FactorizedAttention.basis_masks``, ``coefficients``, ``attention_row``; the other mechanisms have ``attention_row``).

Examples:
    What a block inside a network sees, and its four strongest masks:

    >>> import torch
    >>> from fa_stereo.attention import FactorizedAttention
    >>> network = nn.Sequential(nn.Conv2d(3, 16, 3), FactorizedAttention(16, key_channels=8))
    >>> with record_inputs({"block": network[1]}) as seen:
    ...     _ = network(torch.rand(1, 3, 12, 12))
    >>> [mask.mask.shape for mask in strongest_masks(network[1], seen["block"], 4)][0]
    torch.Size([1, 10, 10])
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fa_stereo.attention.axial import AxialAttention
from fa_stereo.attention.factorized import FactorizedAttention
from fa_stereo.attention.non_local import NonLocalAttention
from fa_stereo.attention.positions import flat_position, to_positions
from fa_stereo.attention.transformer import TransformerBlock

Attention = FactorizedAttention | NonLocalAttention | AxialAttention


class WeightedMask(NamedTuple):
    """A basis mask and what it counts for.

    Attributes:
        head: Its head, from 0.
        number: Its number within the head, from 0.
        weight: Its share of the energy, or its coefficient in a row.
        mask: B's channel [B, *spatial].
    """

    head: int
    number: int
    weight: float
    mask: Tensor


def attention_of(block: nn.Module) -> Attention | None:
    """Return the attention in a block, be it the block itself or a transformer block's first half; None without any."""
    inner = block.attention if isinstance(block, TransformerBlock) else block
    return inner if isinstance(inner, FactorizedAttention | NonLocalAttention | AxialAttention) else None


def mask_name(head: int, number: int, heads: int) -> str:
    """Return what a mask is called in pictures: both are counted from 0, a single head is not named."""
    return f"mask {number}" if heads == 1 else f"head {head} mask {number}"


@contextmanager
def record_inputs(blocks: Mapping[str, nn.Module]) -> Iterator[dict[str, Tensor]]:
    """Record what modules are given while the network they belong to runs inside this context.

    Args:
        blocks: Modules by any name.

    Yields:
        A dictionary that fills as the network runs: the first argument of each module's first call, detached.
    """
    inputs: dict[str, Tensor] = {}

    def record(name: str, _: nn.Module, arguments: tuple[Any, ...]) -> None:
        inputs.setdefault(name, arguments[0].detach())

    hooks = [block.register_forward_pre_hook(partial(record, name)) for name, block in blocks.items()]
    try:
        yield inputs
    finally:
        for hook in hooks:
            hook.remove()


@torch.no_grad()
def mask_energies(attention: FactorizedAttention, x: Tensor) -> Tensor:
    """Return how much each basis mask adds to the map: the energy of its term of equation 2.

    The block adds F(X) = sum_j C_j (B_j^T V R) to X, one product of a column and a row for each mask j, where R is the
    reprojection (or the head's place in the concatenation). The energy of a mask is the mean over the positions of the
    squared length of the vector that its term adds there. All are zero where the block is still the identity.

    Args:
        attention: The block.
        x: What it is given, [B, c, *spatial].

    Returns:
        [B, h, b/h].
    """
    masks, coefficients = attention.basis_masks(x).flatten(3), attention.coefficients(x).flatten(3)  # [B, h, b/h, N]
    values = torch.unflatten(attention.to_values(to_positions(x)), -1, (attention.heads, -1))  # [B, N, h, m/h]
    context = torch.einsum("zhbn,znhm->zhbm", masks, values.to(masks.dtype))  # [B, h, b/h, m/h]
    if attention.normalization == "dot":
        context = context / masks.shape[2]
    if isinstance(attention.reprojection, nn.Linear):
        weight = torch.unflatten(attention.reprojection.weight, 1, (attention.heads, -1))  # [c, h, m/h]
        context = torch.einsum("zhbm,chm->zhbc", context, weight.to(context.dtype))  # [B, h, b/h, c]
    return coefficients.to(context.dtype).square().mean(-1) * context.square().sum(-1)  # [B, h, b/h]


@torch.no_grad()
def strongest_masks(attention: FactorizedAttention, x: Tensor, count: int) -> list[WeightedMask]:
    """Return the basis masks of most energy over the whole batch, the strongest first (figure 7).

    Args:
        attention: The block.
        x: What it is given, [B, c, *spatial].
        count: How many; fewer if the block has fewer.

    Returns:
        Masks whose ``weight`` is their share of all masks' energy.
    """
    energies = mask_energies(attention, x).mean(0)  # [h, b/h]
    shares = energies / energies.sum().clamp(min=torch.finfo(energies.dtype).tiny)
    return _largest(shares, shares, attention.basis_masks(x), count)


@torch.no_grad()
def row_terms(attention: FactorizedAttention, x: Tensor, position: Sequence[int], count: int) -> list[WeightedMask]:
    """Return the largest terms of an attention row: the masks that it is composed of (figure 1).

    The row averaged over the heads, ``attention_row(x, position).mean(1)``, is the sum over all masks of all heads of
    ``weight * mask``. With gaussian normalization the weights sum to 1.

    Args:
        attention: The block.
        x: What it is given, a single map or volume [1, c, *spatial].
        position: Indices such as (y, x).
        count: How many; fewer if the block has fewer.

    Returns:
        Masks with their coefficients, the largest product of coefficient and sum of the mask first.

    Raises:
        InputError: The position is outside the map.
    """
    row = flat_position(position, x.shape[2:])
    masks = attention.basis_masks(x)  # [1, h, b/h, *spatial]
    weights = attention.coefficients(x)[0].flatten(2)[..., row].to(masks.dtype) / attention.heads  # [h, b/h]
    if attention.normalization == "dot":
        weights = weights / masks.shape[2]
    return _largest(weights.abs() * masks[0].abs().flatten(2).sum(-1), weights, masks, count)


def _largest(ranks: Tensor, weights: Tensor, masks: Tensor, count: int) -> list[WeightedMask]:
    """Return the masks [B, h, b/h, *spatial] of the largest ranks [h, b/h] with their weights [h, b/h]."""
    per_head = ranks.shape[1]
    order = ranks.flatten().argsort(descending=True, stable=True)[:count].tolist()
    places = [divmod(place, per_head) for place in order]
    return [WeightedMask(head, number, float(weights[head, number]), masks[:, head, number]) for head, number in places]


def effective_positions(weights: Tensor) -> float:
    """Return over how many positions weights are spread: N if all are equal, 1 if a single one is not zero.

    It is (sum |w|)^2 / sum w^2, the participation ratio.

    Args:
        weights: Of one mask or row, any shape.
    """
    magnitudes = weights.abs().double()
    return float(magnitudes.sum().square() / magnitudes.square().sum().clamp(min=torch.finfo(torch.float64).tiny))
