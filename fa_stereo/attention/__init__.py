"""Attention on feature maps: the paper's factorized attention and everything it is compared with.

Every block maps [B, c, H, W] or [B, c, D, H, W] to the same shape, contains its residual connection, keeps the memory
layout and starts as the identity, so that it can be put anywhere into a network, a trained one too.
``fa_stereo.attention.insertion`` does so for anybody's network, ``fa_stereo.attention.masks`` looks into the blocks.

Examples:
    >>> import torch
    >>> from fa_stereo.config import AttentionConfig
    >>> block = build_attention(AttentionConfig(key_channels=8), channels=32)
    >>> x = torch.randn(2, 32, 10, 12)
    >>> torch.equal(block(x), x)
    True
    >>> block.basis_masks(x).shape
    torch.Size([2, 1, 8, 10, 12])
"""

from __future__ import annotations

from torch import nn

from fa_stereo.attention.axial import AxialAttention
from fa_stereo.attention.convolutional import ResBlock, ResBlockBottleneck
from fa_stereo.attention.factorized import FactorizedAttention
from fa_stereo.attention.non_local import NonLocalAttention
from fa_stereo.attention.transformer import TransformerBlock
from fa_stereo.config import AttentionConfig

__all__ = [
    "AxialAttention",
    "FactorizedAttention",
    "NonLocalAttention",
    "ResBlock",
    "ResBlockBottleneck",
    "TransformerBlock",
    "build_attention",
]


def build_attention(config: AttentionConfig, channels: int) -> nn.Module:
    """Build the attention block that a configuration describes.

    Args:
        config: Mechanism and sizes.
        channels: c of the maps it is put on.

    Returns:
        A module from [B, c, H, W] to [B, c, H, W] (or [B, c, D, H, W]), with the residual connection inside, that
        starts as the identity; ``kind="none"`` stays the identity.

    Raises:
        InputError: The channels cannot be divided among the heads.
    """
    if config.kind == "none":
        return nn.Identity()
    if config.kind == "resblock":
        return ResBlock(channels)
    if config.kind == "resblock_bottleneck":
        return ResBlockBottleneck(channels, config.value_channels or max(1, channels // 2))
    # A transformer block's values are always reprojected (table 8), though it need not have fewer of them.
    value_channels = channels if config.transformer and config.value_channels is None else config.value_channels
    attention: nn.Module
    if config.kind == "axial":
        attention = AxialAttention(
            channels, config.key_channels, value_channels, config.heads, config.span, config.reach
        )
    elif config.kind == "non_local":
        attention = NonLocalAttention(
            channels, config.key_channels, value_channels, config.heads, config.normalization, config.computation
        )
    else:
        attention = FactorizedAttention(
            channels, config.key_channels, value_channels, config.heads, config.normalization
        )
    if not config.transformer:
        return attention
    return TransformerBlock(attention, channels, config.feed_forward_channels)
