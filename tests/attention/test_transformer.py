"""The transformer block against its formula."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fa_stereo.attention import FactorizedAttention, NonLocalAttention, TransformerBlock


@pytest.mark.parametrize("kind", [FactorizedAttention, NonLocalAttention])
@pytest.mark.parametrize(("hidden", "expected_hidden"), [(None, 12), (48, 48)])
def test_block_is_its_formula(kind: type[nn.Module], hidden: int | None, expected_hidden: int) -> None:
    block = TransformerBlock(kind(12, 8, 8, heads=2), 12, hidden).double()
    for parameter in block.parameters():
        nn.init.normal_(parameter, std=0.5)
    assert block.expand.weight.shape == (expected_hidden, 12)
    x = torch.randn(2, 12, 5, 7, dtype=torch.float64)
    Y = block.attention(x).flatten(2).transpose(1, 2)  # [B, N, c], the residual inside
    W1, b1, W2, b2 = block.expand.weight.T, block.expand.bias, block.contract.weight.T, block.contract.bias
    Z = Y + torch.clamp(Y @ W1 + b1, min=0) @ W2 + b2
    torch.testing.assert_close(block(x).flatten(2).transpose(1, 2), Z)


def test_block_works_on_volumes_and_permutes_with_positions() -> None:
    block = TransformerBlock(FactorizedAttention(12, 8, 8, heads=2), 12).double()
    for parameter in block.parameters():
        nn.init.normal_(parameter, std=0.5)
    x = torch.randn(2, 12, 60, dtype=torch.float64)
    order = torch.randperm(60)
    direct = block(x[..., order].reshape(2, 12, 3, 4, 5)).flatten(2)
    torch.testing.assert_close(direct, block(x.reshape(2, 12, 3, 4, 5)).flatten(2)[..., order])
