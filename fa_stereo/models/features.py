"""The monocular feature extractor of PSMNet, with slots for attention blocks (paper, section 4: "after res_4").

Sizes in the comments are for base width c = ``base_channels`` (PSMNet: 32) and a picture of H x W.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fa_stereo import distributed
from fa_stereo.attention import build_attention
from fa_stereo.config import ModelConfig
from fa_stereo.errors import InputError
from fa_stereo.models.layers import ConvNorm2d, finished, initialize_like_psmnet
from fa_stereo.models.recomputation import Run, call

_FUSION_ELEMENTS = 1 << 22
"""Values of the maps in one band of rows, about, where they are fused in bands."""

SLOT_MAPS = {"res1": (1, 2), "res2": (2, 4), "res3": (4, 4), "res4": (4, 4), "pyramid": (1, 4)}
"""What an attention block is given in each slot: channels in units of c, and by how much smaller than the picture."""


class ResidualBlock(nn.Module):
    """PSMNet's basic block: two 3x3 convolutions, the first with ReLU, and no ReLU after the residual sum."""

    def __init__(self, in_channels: int, out_channels: int, *, stride: int = 1, dilation: int = 1) -> None:
        super().__init__()
        self.conv1 = ConvNorm2d(in_channels, out_channels, stride=stride, dilation=dilation)
        self.conv2 = ConvNorm2d(out_channels, out_channels, dilation=dilation)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or in_channels != out_channels:
            self.shortcut = ConvNorm2d(in_channels, out_channels, 1, stride=stride)

    def forward(self, x: Tensor) -> Tensor:
        """Map [B, C_in, H, W], in prediction by a folded network overwritten, to [B, C_out, H', W']."""
        out: Tensor = finished(self.conv2, finished(self.conv1, x, relu=True), addend=self.shortcut(x))
        return out


def _residual_stage(
    in_channels: int, out_channels: int, blocks: int, *, stride: int = 1, dilation: int = 1
) -> nn.Module:
    first = ResidualBlock(in_channels, out_channels, stride=stride, dilation=dilation)
    rest = [ResidualBlock(out_channels, out_channels, dilation=dilation) for _ in range(blocks - 1)]
    return nn.Sequential(first, *rest)


class SpatialPyramidPooling(nn.Module):
    """Context at four scales: average pools, 1x1 convolutions, bilinear upsampling (PSMNet, section 3.2).

    The pools are given in cells of the quarter-resolution map, coarsest first. On a map smaller than a pool, the pool
    shrinks to the map (a global average), so that small pictures work too; PSMNet itself fails there.
    """

    POOL_SIZES = (64, 32, 16, 8)

    def __init__(self, in_channels: int, branch_channels: int, *, align_corners: bool) -> None:
        super().__init__()
        self.align_corners = align_corners
        self.branches = nn.ModuleList(ConvNorm2d(in_channels, branch_channels, 1) for _ in self.POOL_SIZES)

    def freeze_lonely_values(self, batch: int, height: int, width: int) -> None:
        """Put batch norm into eval mode where a pool of so many maps h x w leaves one value, without a statistic."""
        for size, branch in zip(self.POOL_SIZES, self.branches, strict=True):
            if batch * (height // min(size, height)) * (width // min(size, width)) == 1:
                branch.eval()

    def forward(self, x: Tensor) -> list[Tensor]:
        """Map [B, C, h, w] to four [B, C_branch, h, w], coarsest pool first.

        Raises:
            InputError: In training, a pool leaves a single value per channel, of which there is no batch statistic.
        """
        height, width = x.shape[-2:]
        maps = []
        for size, branch in zip(self.POOL_SIZES, self.branches, strict=True):
            assert isinstance(branch, ConvNorm2d)
            pooled = F.avg_pool2d(x, (min(size, height), min(size, width)))  # [B, C, h/size, w/size]
            together = distributed.world_size() if distributed.is_synchronized(branch.norm) else 1
            if branch.norm.training and together * pooled.shape[0] * pooled.shape[2] * pooled.shape[3] == 1:
                raise InputError(
                    f"a training batch of one {4 * height}x{4 * width} crop leaves a single value in the {size}-cell "
                    "pool, too few for batch norm: use a micro-batch of 2 or more, a larger crop, or "
                    "trainer.freeze_batch_norm=true"
                )
            context = finished(branch, pooled, relu=True)
            maps.append(F.interpolate(context, (height, width), mode="bilinear", align_corners=self.align_corners))
        return maps


class FeatureExtractor(nn.Module):
    """Picture [B, 3, H, W] -> matching features [B, c, H/4, W/4]. Both views share it.

    | stage | output | what |
    |---|---|---|
    | stem | c, H/2 | three 3x3, the first with stride 2 |
    | res1 | c, H/2 | 3 blocks |
    | res2 | 2c, H/4 | 16 blocks, the first with stride 2 |
    | res3 | 4c, H/4 | 3 blocks |
    | res4 | 4c, H/4 | 3 blocks, dilation 2; the paper's factorized attention follows |
    | pyramid | 4 x c, H/4 | pools of 64, 32, 16, 8 cells |
    | fusion | c, H/4 | concatenate res2, res4 and the pools (10c), 3x3 to 4c, 1x1 to c |
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        c = config.base_channels
        self.stem = nn.ModuleList([ConvNorm2d(3, c, stride=2), ConvNorm2d(c, c), ConvNorm2d(c, c)])
        self.res1 = _residual_stage(c, c, 3)
        self.res2 = _residual_stage(c, 2 * c, 16, stride=2)
        self.res3 = _residual_stage(2 * c, 4 * c, 3)
        self.res4 = _residual_stage(4 * c, 4 * c, 3, dilation=2)
        self.pyramid = SpatialPyramidPooling(4 * c, c, align_corners=config.align_corners)
        self.fusion = ConvNorm2d(10 * c, 4 * c)
        self.projection = nn.Conv2d(4 * c, c, 1, bias=False)
        self.apply(initialize_like_psmnet)

        # Attention blocks come after the initialisation above: each starts as the identity by its own means. The random
        # numbers they draw are given back, so that from one seed the rest starts alike whatever is in the slots.
        slots: Sequence[str] = config.attention_slots if config.attention.kind != "none" else ()
        with torch.random.fork_rng(devices=[]):
            blocks = {slot: build_attention(config.attention, SLOT_MAPS[slot][0] * c) for slot in slots}
        self.attention = nn.ModuleDict(blocks)

    def _attend(self, slot: str, x: Tensor) -> Tensor:
        return self.attention[slot](x) if slot in self.attention else x

    def forward(self, image: Tensor, *, plain: bool = False, run: Run = call) -> Tensor:
        """Map pictures [B, 3, H, W] to features [B, c, H/4, W/4].

        ``run`` runs each residual stage; ``plain`` stores the maps to be fused, concatenated.
        """
        first = self.stem[0]
        assert isinstance(first, ConvNorm2d)
        x = image
        if first.conv.weight.is_contiguous(memory_format=torch.channels_last):
            x = image.contiguous(memory_format=torch.channels_last)
        for layer in self.stem:
            assert isinstance(layer, ConvNorm2d)
            x = finished(layer, x, relu=True)  # [B, c, H/2, W/2]
        x = self._attend("res1", run(self.res1, x))
        res2 = self._attend("res2", run(self.res2, x))  # [B, 2c, H/4, W/4]
        x = self._attend("res3", run(self.res3, res2))  # [B, 4c, H/4, W/4]
        res4 = self._attend("res4", run(self.res4, x))
        pools = self.pyramid(res4)
        features = self._fuse([res2, res4, *reversed(pools)], plain=plain)  # [B, c, H/4, W/4], finest pool first
        return self._attend("pyramid", features)

    def _fuse(self, maps: list[Tensor], *, plain: bool) -> Tensor:
        """Concatenate maps [B, *, h, w] of 10c channels together, and reduce them to [B, c, h, w].

        Where no gradient is asked for, a band of rows at a time: their concatenation, the largest map of all, is never
        whole, and the result is the same. ``plain`` has it whole.
        """

        def fuse(first: int, last: int) -> Tensor:
            context = torch.cat([part[:, :, first:last] for part in maps], dim=1)  # [B, 10c, rows, w]
            reduced: Tensor = self.projection(finished(self.fusion, context, relu=True))
            return reduced

        batch, _, height, width = maps[0].shape
        rows = max(1, _FUSION_ELEMENTS // (batch * width * sum(part.shape[1] for part in maps)))
        if plain or self.training or torch.is_grad_enabled() or rows >= height:
            return fuse(0, height)
        bands = []
        for start in range(0, height, rows):
            stop = min(start + rows, height)
            first, last = max(start - 1, 0), min(stop + 1, height)  # with the rows beside it that the 3x3 kernel reads
            bands.append(fuse(first, last)[:, :, start - first : stop - first])  # [B, c, rows, w]
        return torch.cat(bands, dim=2)
