"""The paper's transformer block: attention, then a pointwise feed-forward layer, both residual (FA-Tfm, CA-Tfm)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fa_stereo.attention.positions import Pointwise, from_positions, to_positions


class TransformerBlock(nn.Module):
    """Residual attention followed by a residual feed-forward layer on a map or volume [B, c, *spatial].

        Y = X + attention(X)
        Z = Y + max(0, Y W1 + b1) W2 + b2          (Vaswani et al., equation 2)

    The paper gives the block by its costs only (table 9): 4c floats a position beside the attention's, that is hidden,
    rectified, result and sum of c channels each. So the hidden layer has c channels by default (Transformers for text
    have 4c), and there is no layer normalization, which those costs do not hold. The block starts as the identity.

    Args:
        attention: Residual attention module from [B, c, *spatial] to the same, such as ``FactorizedAttention``.
        channels: c.
        hidden_channels: Of the feed-forward layer; None is c.
    """

    def __init__(self, attention: nn.Module, channels: int, hidden_channels: int | None = None) -> None:
        super().__init__()
        hidden = channels if hidden_channels is None else hidden_channels
        self.attention = attention
        self.expand = Pointwise(channels, hidden, bias=True)
        self.contract = Pointwise(hidden, channels, bias=True, zero=True)

    def forward(self, x: Tensor) -> Tensor:
        """Map [B, c, *spatial] to the same shape, in the memory layout of ``x``."""
        Y = to_positions(self.attention(x))  # [B, N, c]
        hidden = torch.relu(self.expand(Y))  # [B, N, hidden]
        return from_positions(Y + self.contract(hidden), x.shape[2:])  # [B, c, *spatial]
