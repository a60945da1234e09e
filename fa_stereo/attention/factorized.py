"""Factorized attention: self-attention with linear memory and computation (the paper's section 3.2).

Symbols, as in the paper (there s is what is called N here):

    B  batch                      X  [B, N, c]  the input, one row per position
    N  positions, h*w or h*w*d    C  [B, N, b]  coefficients of the basis masks at every position
    c  channels                   B  [B, N, b]  the basis: one mask over all positions per channel
    b  basis masks                V  [B, N, m]  the value
    m  value channels             h  heads, each with b/h masks and m/h value channels
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from fa_stereo.attention.heads import by_head, linear_maps
from fa_stereo.attention.positions import flat_position, from_positions, to_positions, without_autocast


class FactorizedAttention(nn.Module):
    """Residual factorized attention on a map or volume [B, c, *spatial]: X + F(X).

    One head is, with C, B, V linear maps of X (matrices c x b, c x b, c x m),

        gaussian:  F(X) = softmax_channels(X C) (softmax_positions(X B)^T X V)     (paper, equation 4)
        dot:       F(X) = X C ((X B)^T X V) / b                                    (paper, equation 3)

    and h heads are h such modules with b/h and m/h channels whose results are concatenated (equation 5). As printed,
    equation 4 puts the softmax over positions around the whole product (X B)^T X V; the paper's text normalizes the
    basis, so that the rows of the attention map sum to 1, and so does this module.

    The block starts as the identity: its last linear layer, the reprojection or, without a value bottleneck, V itself,
    starts at zero. C(X) and B(X) do not, so that layer learns in the first step and all others from the second on.

    Both sums over positions, softmax and context, are taken in float32 at least: over 10^6 positions a mask's values
    are about 10^-6, out of reach of half precision. All else has the precision of the input or of autocast. ``dot``
    does not normalize over the positions, so that its result grows with them and can leave float16's range.

    Args:
        channels: c.
        key_channels: b, basis masks of all heads together.
        value_channels: m of the value bottleneck (FA-bot), reprojected to c; None is V of c channels, not reprojected.
        heads: h, a divisor of b and m.
        normalization: ``gaussian`` or ``dot``.

    Raises:
        InputError: b or m is not divisible by h.
    """

    def __init__(
        self,
        channels: int,
        key_channels: int = 64,
        value_channels: int | None = None,
        heads: int = 1,
        normalization: str = "gaussian",
    ) -> None:
        super().__init__()
        self.heads = heads
        self.normalization = normalization
        maps = linear_maps(channels, key_channels, value_channels, heads)
        self.to_coefficients, self.to_basis, self.to_values, self.reprojection = maps

    def forward(self, x: Tensor) -> Tensor:
        """Attend over all positions.

        Args:
            x: Map or volume [B, c, *spatial].

        Returns:
            X + F(X) as [B, c, *spatial], in the memory layout of ``x``.
        """
        X = to_positions(x)  # [B, N, c]
        C = self._coefficients(X)  # [B, N, b]
        B = self._basis(X)  # [B, N, b]
        V = self.to_values(X)  # [B, N, m]
        attended = by_head(self._head, self.heads, C, B, V)  # [B, N, m]
        return from_positions(X + self.reprojection(attended), x.shape[2:])  # [B, c, *spatial]

    def _head(self, C: Tensor, B: Tensor, V: Tensor) -> Tensor:
        """Return C N(B, V) [B, N, m/h] of one head (paper, equation 2)."""
        with without_autocast(V.device.type):
            context = torch.bmm(B.mT, V.to(B.dtype))  # [B, b/h, m/h]
        if self.normalization == "dot":
            context = context / B.shape[-1]
        return torch.bmm(C, context.to(C.dtype))  # [B, N, m/h]

    def _coefficients(self, X: Tensor) -> Tensor:
        scores: Tensor = self.to_coefficients(X)  # [B, N, b]
        if self.normalization == "dot":
            return scores
        by_head = torch.unflatten(scores, -1, (self.heads, -1))  # [B, N, h, b/h]
        # The explicit dtype keeps autocast from returning float32; inside, the softmax is computed in float32 anyway.
        return by_head.softmax(dim=-1, dtype=scores.dtype).flatten(-2)  # [B, N, b]

    def _basis(self, X: Tensor) -> Tensor:
        scores: Tensor = self.to_basis(X)  # [B, N, b]
        sum_dtype = torch.promote_types(scores.dtype, torch.float32)
        if self.normalization == "dot":
            return scores.to(sum_dtype)
        return scores.softmax(dim=1, dtype=sum_dtype)  # [B, N, b], every column sums to 1

    def coefficients(self, x: Tensor) -> Tensor:
        """Return the coefficients C(X) of map or volume ``x`` [B, c, *spatial] as [B, h, b/h, *spatial]."""
        C = from_positions(self._coefficients(to_positions(x)), x.shape[2:])  # [B, b, *spatial]
        return torch.unflatten(C, 1, (self.heads, -1))  # [B, h, b/h, *spatial]

    def basis_masks(self, x: Tensor) -> Tensor:
        """Return the basis masks B(X) of map or volume ``x`` [B, c, *spatial] as [B, h, b/h, *spatial] (figure 7).

        A gaussian mask sums to 1 over the positions; a dot-product mask is X B itself.
        """
        B = from_positions(self._basis(to_positions(x)), x.shape[2:])  # [B, b, *spatial]
        return torch.unflatten(B, 1, (self.heads, -1))  # [B, h, b/h, *spatial]

    def attention_row(self, x: Tensor, position: Sequence[int]) -> Tensor:
        """Return what one position attends to: its row of the attention map C(X) B(X)^T, which is never computed.

        Args:
            x: Map or volume [B, c, *spatial].
            position: Indices such as (y, x).

        Returns:
            Weights [B, h, *spatial]; gaussian ones sum to 1 (figure 1 of the paper: masks scaled by coefficients).

        Raises:
            InputError: The position is outside the map.
        """
        row = flat_position(position, x.shape[2:])
        masks = self.basis_masks(x)  # [B, h, b/h, *spatial]
        scale = 1 / masks.shape[2] if self.normalization == "dot" else 1.0
        coefficients = self.coefficients(x).flatten(3)[..., row]  # [B, h, b/h]
        weights = torch.einsum("zhb,zhbn->zhn", coefficients.to(masks.dtype) * scale, masks.flatten(3))
        return torch.unflatten(weights, -1, x.shape[2:])  # [B, h, *spatial]
