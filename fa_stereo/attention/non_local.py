"""Conventional (non-local) attention, the paper's comparison, computed in three ways (sections 3.1 and 3.3).

Symbols as in ``factorized.py``; k is the number of key channels, and K, Q [B, N, k] stand where C and B stood. As in
the paper's equations 6 and 9, the rows of the attention map belong to K(X), its columns to Q(X): renaming K to C and
Q to B turns equation 6 into equation 3.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from fa_stereo.attention.heads import by_head, linear_maps
from fa_stereo.attention.positions import flat_position, from_positions, to_positions
from fa_stereo.errors import InputError

# A chunk's part of the attention map has at most this many entries (64 MiB in float32), or one row.
CHUNK_ENTRIES = 2**24


class NonLocalAttention(nn.Module):
    """Residual conventional attention on a map or volume [B, c, *spatial]: X + S(X).

    One head is, with K, Q, V linear maps of X,

        gaussian:  S(X) = softmax_rows(X K (X Q)^T) X V      (paper, equation 9)
        dot:       S(X) = X K (X Q)^T X V / k                (paper, equation 6)

    and h heads are h such modules with k/h and m/h channels, concatenated. ``dot`` is the same function as factorized
    attention with C = K and B = Q (section 3.3.1). The block starts as the identity, as factorized attention does.

    Args:
        channels: c.
        key_channels: k of all heads together.
        value_channels: m of the value bottleneck (CA-bot), reprojected to c; None is V of c channels, not reprojected.
        heads: h, a divisor of k and m.
        normalization: ``gaussian`` or ``dot``.
        computation: ``materialized`` stores the N x N map of every head, the paper's quadratic memory. ``chunked``
            stores a few rows of it at a time and computes them again for the backward pass: linear memory, the same
            computation. ``fused`` (gaussian only) leaves it to PyTorch's scaled_dot_product_attention, whose flash and
            memory-efficient kernels never store the map.
        chunk_entries: Largest part of one head's map that ``chunked`` holds, in entries over the batch.

    Raises:
        InputError: k or m is not divisible by h, or ``fused`` is asked for with ``dot``.
    """

    def __init__(
        self,
        channels: int,
        key_channels: int = 64,
        value_channels: int | None = None,
        heads: int = 1,
        normalization: str = "gaussian",
        computation: str = "materialized",
        chunk_entries: int = CHUNK_ENTRIES,
    ) -> None:
        super().__init__()
        if computation == "fused" and normalization == "dot":
            raise InputError(
                "attention.computation=fused computes a softmax and cannot be combined with "
                "attention.normalization=dot; use attention.kind=factorized, the same function at linear cost"
            )
        self.heads = heads
        self.normalization = normalization
        self.computation = computation
        self.chunk_entries = chunk_entries
        maps = linear_maps(channels, key_channels, value_channels, heads)
        self.to_keys, self.to_queries, self.to_values, self.reprojection = maps

    def forward(self, x: Tensor) -> Tensor:
        """Attend over all positions.

        Args:
            x: Map or volume [B, c, *spatial].

        Returns:
            X + S(X) as [B, c, *spatial], in the memory layout of ``x``.
        """
        X = to_positions(x)  # [B, N, c]
        K, Q, V = self.to_keys(X), self.to_queries(X), self.to_values(X)  # [B, N, k], [B, N, k], [B, N, m]
        if self.computation == "fused":
            attended = fused(K, Q, V, self.heads)  # [B, N, m]
        else:
            head = self._chunked if self.computation == "chunked" else self._materialized
            attended = by_head(head, self.heads, K, Q, V)  # [B, N, m]
        return from_positions(X + self.reprojection(attended), x.shape[2:])  # [B, c, *spatial]

    def _map(self, K: Tensor, Q: Tensor) -> Tensor:
        """Return the rows of one head's attention map [B, rows, N] for K [B, rows, k/h] and Q [B, N, k/h]."""
        if self.normalization == "dot":
            return torch.bmm(K / K.shape[-1], Q.mT)  # [B, rows, N]; dividing the map would need a second one
        scores = torch.bmm(K, Q.mT)  # [B, rows, N]
        # The explicit dtype keeps autocast from doubling the map; inside, the softmax is computed in float32 anyway.
        return scores.softmax(dim=-1, dtype=scores.dtype)  # [B, rows, N], every row sums to 1

    def _materialized(self, K: Tensor, Q: Tensor, V: Tensor) -> Tensor:
        """Return one head's result [B, N, m/h] by its whole map [B, N, N]."""
        return torch.bmm(self._map(K, Q), V)  # [B, N, m/h]

    def _chunked(self, K: Tensor, Q: Tensor, V: Tensor) -> Tensor:
        """Return one head's result [B, N, m/h] a few rows at a time."""
        batch, positions, _ = K.shape
        rows = max(1, self.chunk_entries // (batch * positions))
        chunks = torch.split(K, rows, dim=1)  # of [B, rows, k/h]
        if torch.is_grad_enabled():  # kept for the backward pass, the chunks' maps would add up to the whole one
            attended = [checkpoint(self._materialized, K_r, Q, V, use_reentrant=False) for K_r in chunks]
        else:
            attended = [self._materialized(K_r, Q, V) for K_r in chunks]
        return torch.cat(attended, dim=1)  # [B, N, m/h]

    def attention_row(self, x: Tensor, position: Sequence[int]) -> Tensor:
        """Return what one position attends to: its row of the attention map.

        Args:
            x: Map or volume [B, c, *spatial].
            position: Indices such as (y, x).

        Returns:
            Weights [B, h, *spatial]; gaussian ones sum to 1.

        Raises:
            InputError: The position is outside the map.
        """
        row = flat_position(position, x.shape[2:])
        X = to_positions(x)  # [B, N, c]
        K, Q = self.to_keys(X[:, row : row + 1]), self.to_queries(X)  # [B, 1, k], [B, N, k]
        heads = zip(K.chunk(self.heads, -1), Q.chunk(self.heads, -1), strict=True)
        weights = torch.cat([self._map(K_i, Q_i) for K_i, Q_i in heads], dim=1)  # [B, h, N]
        return torch.unflatten(weights, -1, x.shape[2:])  # [B, h, *spatial]


def fused(K: Tensor, Q: Tensor, V: Tensor, heads: int) -> Tensor:
    """Return softmax_rows(K Q^T) V of every head by scaled_dot_product_attention.

    What the paper calls K, rows of the map, is that function's query. Its kernels that store no map want heads with as
    many value as key channels, and fall back to one that does otherwise: the fewer are filled up with zeros, which
    changes neither the scores nor the values.

    Args:
        K: Rows [B, N, k].
        Q: Columns [B, N, k].
        V: Values [B, N, m].
        heads: h.

    Returns:
        [B, N, m].
    """
    value_channels = V.shape[-1] // heads
    by_head = [torch.unflatten(t, -1, (heads, -1)).transpose(1, 2) for t in (K, Q, V)]  # [B, h, N, k/h or m/h]
    width = max(t.shape[-1] for t in by_head)
    padded = [t if t.shape[-1] == width else F.pad(t, (0, width - t.shape[-1])) for t in by_head]
    attended = F.scaled_dot_product_attention(padded[0], padded[1], padded[2], scale=1.0)  # [B, h, N, width]
    return attended[..., :value_channels].transpose(1, 2).flatten(2)  # [B, N, m]
