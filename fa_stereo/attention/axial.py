"""Axial attention, position-sensitive: 1-D attention along the height, then along the width.

Source: Wang et al., "Axial-DeepLab: Stand-Alone Axial-Attention for Panoptic Segmentation" (2020). For a position o of
a row or column, with the window M(o) of ``span`` positions around it,

    y_o = sum_{p in M(o)} softmax_p(q_o . k_p + q_o . r^q_{p-o} + k_p . r^k_{p-o}) (v_p + r^v_{p-o})

where q, k, v are linear maps of the input and r^q, r^k, r^v learned vectors, one for each offset p - o, shared by the
heads.

Symbols:

    B  batch                                      G  lines (rows or columns) of all heads and samples
    N  positions of the map, H*W                  S  positions of a block of a line
    L  positions of a line, H or W                T  positions that the windows of a block reach, S + span - 1
    h  heads                                      n  blocks of a line
    c, m  channels of the input and the value     d, e  key and value channels of a head, k/h and m/h
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fa_stereo.attention.convolutional import by_plane
from fa_stereo.attention.heads import check_heads
from fa_stereo.attention.positions import Pointwise, flat_position, from_positions, to_positions
from fa_stereo.errors import InputError

# Narrower windows are handled in blocks of this many positions all the same: fewer, larger products.
SHORTEST_BLOCK = 16


class AxialAttention(nn.Module):
    """Residual position-sensitive axial attention on a map [B, c, H, W]: X + width(height(X)) R.

    The height layer maps c to m channels, the width layer m to m, and a reprojection R back to c, which starts at zero
    and so the block as the identity. Two things differ from the original's block, which first reduces c to m channels
    by a convolution of its own (here the height layer's maps do so), and which normalizes queries, keys, values, scores
    and results over the batch (here nothing does, as in the modules this one is compared with). A volume
    [B, c, D, H, W] is treated plane by plane.

    Args:
        channels: c.
        key_channels: Query and key channels of each layer, all heads together.
        value_channels: m; None is c.
        heads: h, a divisor of both (8 in the original).
        span: Window in positions, odd: memory is proportional to it. None attends to whole columns and rows.
        reach: For ``span`` None, the largest offset with position vectors of its own; farther ones share its vectors,
            so that maps of any size can be attended to.

    Raises:
        InputError: The channels are not divisible by the heads, or the span is even.
    """

    def __init__(
        self,
        channels: int,
        key_channels: int = 64,
        value_channels: int | None = None,
        heads: int = 8,
        span: int | None = None,
        reach: int = 64,
    ) -> None:
        super().__init__()
        values = channels if value_channels is None else value_channels
        self.height = AxisAttention(0, channels, key_channels, values, heads, span, reach)
        self.width = AxisAttention(1, values, key_channels, values, heads, span, reach)
        self.reprojection = Pointwise(values, channels, zero=True)

    def forward(self, x: Tensor) -> Tensor:
        """Map [B, c, H, W] or [B, c, D, H, W] to the same shape."""
        return by_plane(self._plane, x)

    def _plane(self, x: Tensor) -> Tensor:
        size = x.shape[2:]
        X = to_positions(x)  # [B, N, c]
        attended = self.width(self.height(X, size), size)  # [B, N, m]
        return from_positions(X + self.reprojection(attended), size)  # [B, c, H, W]

    def attention_row(self, x: Tensor, position: Sequence[int]) -> Tensor:
        """Return what one position attends to through both layers.

        Position (y, x) attends to the positions (y, x') of its row, each of which has attended to the positions
        (y', x') of its column: the weight of (y', x') is the product of the two, the height layer's averaged over its
        heads (the width layer's values mix them).

        Args:
            x: Map [B, c, H, W], or volume [B, c, D, H, W].
            position: Indices (y, x), or (d, y, x).

        Returns:
            Weights [B, h, H, W] that sum to 1; of a volume [B, h, D, H, W], zero outside the position's plane.

        Raises:
            InputError: The position is outside the map.
        """
        flat_position(position, x.shape[2:])  # refuses what is outside
        if x.dim() == 5:
            plane = self.attention_row(x[:, :, position[0]], position[1:])  # [B, h, H, W]
            volume = plane.new_zeros(*plane.shape[:2], *x.shape[2:])  # [B, h, D, H, W]
            volume[:, :, position[0]] = plane
            return volume
        size, X, (row, column) = x.shape[2:], to_positions(x), position
        columns = self.height.attention_map(X, size)[:, :, :, row].mean(2).mT  # [B, H, W]
        rows = self.width.attention_map(self.height(X, size), size)[:, row, :, column]  # [B, h, W]
        return rows[:, :, None, :] * columns[:, None]  # [B, h, H, W]


class AxisAttention(nn.Module):
    """Position-sensitive attention along the lines of one axis of a map; no residual connection.

    Windows are handled a block of S positions at a time, which together reach T = S + span - 1 positions: a few large
    products instead of many small ones, one table of relative positions for all blocks, and memory proportional to T.
    Where windows reach over whole lines, a line is a single block.

    Args:
        axis: 0 attends along the height, 1 along the width.
        channels: c.
        key_channels: Query and key channels, all heads together.
        value_channels: m, channels of the result.
        heads: h, a divisor of both.
        span: Window in positions, odd; None is the whole line.
        reach: For ``span`` None, the largest offset with position vectors of its own.

    Raises:
        InputError: The channels are not divisible by the heads, or the span is even.
    """

    def __init__(
        self,
        axis: int,
        channels: int,
        key_channels: int,
        value_channels: int,
        heads: int,
        span: int | None = None,
        reach: int = 64,
    ) -> None:
        super().__init__()
        check_heads(heads, key_channels=key_channels, value_channels=value_channels)
        if span is not None and span % 2 == 0:
            raise InputError(f"attention.span must be odd (a window around its position), got {span}")
        self.axis = axis
        self.heads = heads
        self.span = span
        self.reach = reach if span is None else span // 2
        self.to_queries = Pointwise(channels, key_channels)
        self.to_keys = Pointwise(channels, key_channels)
        self.to_values = Pointwise(channels, value_channels)
        offsets = 2 * self.reach + 1
        self.query_positions = nn.Parameter(torch.empty(offsets, key_channels // heads))  # r^q
        self.key_positions = nn.Parameter(torch.empty(offsets, key_channels // heads))  # r^k
        self.value_positions = nn.Parameter(torch.empty(offsets, value_channels // heads))  # r^v
        for table in (self.query_positions, self.key_positions, self.value_positions):
            if not table.is_meta:  # as in initialize_like_psmnet
                nn.init.normal_(table, std=table.shape[1] ** -0.5)

    def forward(self, X: Tensor, size: Sequence[int]) -> Tensor:
        """Attend along the axis.

        Args:
            X: Positions of a map [B, N, c].
            size: (H, W) of the map.

        Returns:
            [B, N, m].
        """
        length = size[self.axis]
        block = block_length(length, self.span)
        margin = 0 if block == length else self.reach  # a single block reaches the whole line as it is
        queries = in_blocks(self._lines(self.to_queries(X), size), block, 0)  # [G, n, S, d]
        keys = in_blocks(self._lines(self.to_keys(X), size), block, margin)  # [G, n, T, d]
        values = in_blocks(self._lines(self.to_values(X), size), block, margin)  # [G, n, T, e]
        offsets = self._offsets(block, margin)  # [S, T]
        weights = self._weights(queries, keys, offsets, length)  # [G, n, S, T]
        r_v = self._relative(self.value_positions, offsets)  # [S, T, e]
        attended = weights @ values  # [G, n, S, e]
        attended += torch.einsum("gnst,ste->gnse", weights, r_v)
        return self._positions(attended.flatten(1, 2)[:, :length], size)  # [B, N, m]

    def attention_map(self, X: Tensor, size: Sequence[int]) -> Tensor:
        """Return the weights of whole lines [B, lines, h, L, L] for the positions X [B, N, c] of a map (H, W)."""
        queries = self._lines(self.to_queries(X), size)[:, None]  # [G, 1, L, d]
        keys = self._lines(self.to_keys(X), size)[:, None]  # [G, 1, L, d]
        length = size[self.axis]
        weights = self._weights(queries, keys, self._offsets(length, 0), length)[:, 0]  # [G, L, L]
        return torch.unflatten(weights, 0, (X.shape[0], size[1 - self.axis], self.heads))  # [B, lines, h, L, L]

    def _weights(self, queries: Tensor, keys: Tensor, offsets: Tensor, length: int) -> Tensor:
        """Return the attention weights [G, n, S, T] of queries [G, n, S, d] over keys [G, n, T, d]."""
        r_q, r_k = (self._relative(table, offsets) for table in (self.query_positions, self.key_positions))  # [S, T, d]
        scores = queries @ keys.mT  # [G, n, S, T]; what follows is done in place, as this is the largest tensor
        scores += torch.einsum("gnsd,std->gnst", queries, r_q)
        scores += torch.einsum("gntd,std->gnst", keys, r_k)
        if self.span is not None:
            starts = queries.shape[2] * torch.arange(queries.shape[1], device=offsets.device)  # [n]
            reached = starts[:, None] + offsets[0]  # [n, T], the positions p
            padding = (reached < 0) | (reached >= length)  # [n, T]
            outside = (offsets.abs() > self.reach) | padding[:, None]  # [n, S, T]
            # The lowest number, not -inf: rows that are padding themselves may have nothing left to attend to.
            scores.masked_fill_(outside, torch.finfo(scores.dtype).min)
        return scores.softmax(dim=-1, dtype=scores.dtype)  # [G, n, S, T]

    def _offsets(self, block: int, margin: int) -> Tensor:
        """Return p - o [S, T] for the positions o of a block and the positions p it reaches."""
        positions = torch.arange(-margin, block + margin, device=self.query_positions.device)  # [T]
        return positions - positions[margin : margin + block, None]  # [S, T]

    def _relative(self, table: Tensor, offsets: Tensor) -> Tensor:
        """Return the position vectors [S, T, d] of offsets [S, T] from their table."""
        return table[offsets.clamp(-self.reach, self.reach) + self.reach]

    def _lines(self, rows: Tensor, size: Sequence[int]) -> Tensor:
        """Return positions [B, N, channels] as the lines of every head [G, L, channels/h]."""
        by_head = torch.unflatten(torch.unflatten(rows, -1, (self.heads, -1)), 1, tuple(size))  # [B, H, W, h, d]
        order = (0, 2, 3, 1, 4) if self.axis == 0 else (0, 1, 3, 2, 4)
        return by_head.permute(order).flatten(0, 2)  # [G, L, d]

    def _positions(self, lines: Tensor, size: Sequence[int]) -> Tensor:
        """Return the lines of every head [G, L, e] as positions [B, N, m]."""
        by_head = torch.unflatten(lines, 0, (-1, size[1 - self.axis], self.heads))  # [B, lines, h, L, e]
        order = (0, 3, 1, 2, 4) if self.axis == 0 else (0, 1, 3, 2, 4)
        return by_head.permute(order).flatten(3).flatten(1, 2)  # [B, N, m]


def block_length(length: int, span: int | None) -> int:
    """Return how many positions of a line are handled at a time; all of them where the windows of blocks reach as far.

    Args:
        length: L, of the line.
        span: Of the windows; None is the whole line.
    """
    if span is None:
        return length
    block = min(length, max(span, SHORTEST_BLOCK))
    blocks = -(-length // block)
    return length if blocks * block * (block + span - 1) >= length * length else block


def in_blocks(lines: Tensor, block: int, margin: int) -> Tensor:
    """Return lines [G, L, d] as blocks with ``margin`` more positions at either side [G, n, block + 2 margin, d].

    Beyond the ends of a line there are zeros.
    """
    length = lines.shape[1]
    if block == length:
        return lines[:, None]  # [G, 1, L, d]
    missing = -length % block
    padded = F.pad(lines, (0, 0, margin, margin + missing))  # [G, n*block + 2 margin, d]
    blocks = padded.unfold(1, block + 2 * margin, block).mT  # [G, n, block + 2 margin, d], overlapping
    return blocks.contiguous()  # one copy here, or each product that uses them makes its own
