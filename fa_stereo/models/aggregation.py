"""3-D convolutions over the cost volume: PSMNet's stacked hourglass and its basic variant (PSMNet, section 3.4).

Both map features of the two views (at quarter resolution) to scores [B, D, H, W], higher meaning a better match. Their
``entry`` is the first two convolutions over the volume [B, 2c, D, H, W]; ``forward`` is the rest.

Where no gradient is asked for, the last convolution of each part is done a slab of disparities at a time, and each slab
is used up at once or written over a volume that is not needed any more: two volumes [B, c, D, H, W] exist at once
instead of four, and in the hourglasses one. The functions that overwrite say so. ``plain`` turns all this off.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fa_stereo.config import ModelConfig
from fa_stereo.models.cost_volume import convolve_cost_volume, convolve_cost_volume_reference
from fa_stereo.models.layers import (
    ONEDNN_ELEMENTS,
    ConvNorm3d,
    DeconvNorm3d,
    add_convolved,
    finished,
    initialize_like_psmnet,
    normalize,
)
from fa_stereo.models.recomputation import Run, call

_SLAB_ELEMENTS = 1 << 23
"""Values in one slab, about: few enough for a cache and to be allocated without new pages from the system each time."""


class VolumeEntry(nn.Module):
    """The two convolutions that reduce the concatenated volume from 2c to c channels (PSMNet's ``dres0``).

    The volume itself is stored only by the plain path: see ``fa_stereo.models.cost_volume``.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = ConvNorm3d(2 * channels, channels)
        self.conv2 = ConvNorm3d(channels, channels)

    def forward(self, left: Tensor, right: Tensor, disparities: int, *, plain: bool = False) -> Tensor:
        """Map the features of both views, [B, c, H, W] each, to [B, c, D, H, W]; ``plain`` stores the volume."""
        convolve = convolve_cost_volume_reference if plain else convolve_cost_volume
        conv = self.conv1.conv
        x = convolve(left, right, conv.weight, disparities, conv.bias)
        x = normalize(self.conv1.norm, x, plain=plain)
        x = F.relu(x, inplace=True)
        out: Tensor = finished(self.conv2, x, relu=True)
        return out


class ResidualConv3d(nn.Module):
    """Two 3-D convolutions with a ReLU between, and no ReLU after the residual sum."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = ConvNorm3d(channels, channels)
        self.conv2 = ConvNorm3d(channels, channels)

    def forward(self, x: Tensor, *, plain: bool = False) -> Tensor:
        """Map [B, c, D, H, W], overwritten, to the same shape."""
        hidden = finished(self.conv1, x, relu=True)
        if not _is_lean(self, plain):
            out: Tensor = finished(self.conv2, hidden, addend=x)
            return out
        for start, stop in _slabs(x):
            add_convolved_slab(x, self.conv2, hidden, start, stop)
        return x


class Hourglass(nn.Module):
    """One encoder-decoder over half and quarter of the volume's resolution, added to the volume that all start from."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = ConvNorm3d(channels, 2 * channels, stride=2)
        self.conv2 = ConvNorm3d(2 * channels, 2 * channels)
        self.conv3 = ConvNorm3d(2 * channels, 2 * channels, stride=2)
        self.conv4 = ConvNorm3d(2 * channels, 2 * channels)
        self.conv5 = DeconvNorm3d(2 * channels, 2 * channels)
        self.conv6 = DeconvNorm3d(2 * channels, channels)

    def forward(
        self, x: Tensor, cost0: Tensor, first_pre: Tensor | None, post: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Refine a volume.

        Args:
            x: [B, c, D, H, W], ``cost0`` itself in the first hourglass, in the others the previous output.
            cost0: [B, c, D, H, W], added to the output.
            first_pre: [B, 2c, D/2, H/2, W/2], what the first hourglass returned; None in the first.
            post: [B, 2c, D/2, H/2, W/2], what the previous hourglass returned; None in the first.

        Returns:
            The output [B, c, D, H, W], ``first_pre`` and ``post`` for the following hourglasses.
        """
        first_pre, post = self.refine(finished(self.conv1, x, relu=True), first_pre, post)
        return self.conv6(post).add_(cost0), first_pre, post

    def refine(self, hidden: Tensor, first_pre: Tensor | None, post: Tensor | None) -> tuple[Tensor, Tensor]:
        """Do what lies between the first and the last convolution, [B, 2c, D/2, H/2, W/2] each; ``post`` is used up."""
        pre = finished(self.conv2, hidden, relu=True, addend=post)
        hidden = finished(self.conv3, pre, relu=True)  # [B, 2c, D/4, H/4, W/4]
        hidden = finished(self.conv4, hidden, relu=True)
        first_pre = pre if first_pre is None else first_pre
        del pre
        return first_pre, F.relu(self.conv5(hidden).add_(first_pre), inplace=True)


class ScoreHead(nn.Module):
    """Scores from features: [B, c, D, H, W] -> [B, D, H, W]."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = ConvNorm3d(channels, channels)
        self.conv2 = nn.Conv3d(channels, 1, 3, padding=1, bias=False)

    def forward(self, x: Tensor, *, plain: bool = False) -> Tensor:
        """Map [B, c, D, H, W] to [B, D, H, W]; ``plain`` computes the last convolution in 3-D."""
        if plain:
            scores: Tensor = self.conv2(finished(self.conv1, x, relu=True))
            return scores.squeeze(1)
        scores = new_scores(x)
        if not _is_lean(self, plain):
            return add_score_taps(scores, score_taps(finished(self.conv1, x, relu=True), self.conv2.weight))
        for start, stop in _slabs(x):
            hidden = convolve_slab(self.conv1, x, start, stop, relu=True)
            add_score_taps(scores, score_taps(hidden, self.conv2.weight), start)
        return scores


class StackedHourglass(nn.Module):
    """Three hourglasses, each with a score head that adds to the one before: three outputs, the last the best."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        c = config.base_channels
        self.entry = VolumeEntry(c)
        self.residual = ResidualConv3d(c)
        self.hourglasses = nn.ModuleList(Hourglass(c) for _ in range(3))
        self.heads = nn.ModuleList(ScoreHead(c) for _ in range(3))
        self.apply(initialize_like_psmnet)

    def forward(self, x: Tensor, *, plain: bool = False, run: Run = call) -> list[Tensor]:
        """Map the entry's output [B, c, D, H, W], overwritten, to three scores [B, D, H, W], in eval mode the last."""
        cost0: Tensor = run(self.residual, x, plain=plain)
        del x
        if _is_lean(self, plain):
            return [self._score_in_slabs(cost0)]
        out, first_pre, post = cost0, None, None
        scores: list[Tensor] = []
        for hourglass, head in zip(self.hourglasses, self.heads, strict=True):
            out, first_pre, post = run(hourglass, out, cost0, first_pre, post)
            score = run(head, out, plain=plain)
            scores.append(score.add_(scores[-1]) if scores else score)
        return scores if self.training else scores[-1:]

    def _score_in_slabs(self, cost0: Tensor) -> Tensor:
        """Map ``cost0`` to the last score without storing what the hourglasses put out.

        Each slab of an hourglass's output goes through its head and into the next hourglass as soon as it is there.
        """
        first, *_ = hourglasses = [hourglass for hourglass in self.hourglasses if isinstance(hourglass, Hourglass)]
        hidden = finished(first.conv1, cost0, relu=True)  # [B, 2c, D/2, H/2, W/2]
        first_pre, post, scores = None, None, new_scores(cost0)
        for hourglass, head, following in zip(hourglasses, self.heads, [*hourglasses[1:], None], strict=True):
            assert isinstance(head, ScoreHead)
            first_pre, post = hourglass.refine(hidden, first_pre, post)
            hidden = hidden.new_empty(0) if following is None else torch.empty_like(hidden)
            scored, entered = 0, 0
            for around, before in upsampled_slabs(hourglass.conv6, post, cost0):
                slab = finished(head.conv1, around, padding=0, relu=True)
                add_score_taps(scores, score_taps(slab, head.conv2.weight), scored)  # to those of the heads before
                scored += slab.shape[2]
                if following is not None:
                    slab = finished(following.conv1, before, padding=0, relu=True)
                    hidden[:, :, entered : entered + slab.shape[2]] = slab
                    entered += slab.shape[2]
        return scores


class BasicAggregation(nn.Module):
    """PSMNet's plain variant: four residual pairs of 3-D convolutions and one score head; one output."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        c = config.base_channels
        self.entry = VolumeEntry(c)
        self.residuals = nn.ModuleList(ResidualConv3d(c) for _ in range(4))
        self.head = ScoreHead(c)
        self.apply(initialize_like_psmnet)

    def forward(self, x: Tensor, *, plain: bool = False, run: Run = call) -> list[Tensor]:
        """Map the entry's output [B, c, D, H, W], overwritten, to one score [B, D, H, W]."""
        for residual in self.residuals:
            x = run(residual, x, plain=plain)
        return [run(self.head, x, plain=plain)]


# --------------------------------------------------------------------------------------------------------------------
# convolutions in pieces


def score_taps(x: Tensor, weight: Tensor) -> Tensor:
    """Convolve over rows and columns with each of the kernel's three taps over disparity: part of a score convolution.

    A convolution library computes 16 channels or so at a time, so ``F.conv3d(x, weight, padding=1)`` with its single
    output channel wastes most of them. Here the taps over disparity become channels, to be added up shifted.

    Args:
        x: [B, c, d, H, W].
        weight: [1, c, 3, 3, 3]. Where it has a finer type than ``x`` (low-precision inference), it decides.

    Returns:
        [B, d, 3, H, W], at least float32.
    """
    kernel = weight[0].transpose(0, 1)  # [3, c, 3, 3]
    slices = x.transpose(1, 2).flatten(0, 1)  # [B d, c, H, W]; no copy in channels_last_3d memory
    if slices.dtype != weight.dtype and not torch.is_autocast_enabled(x.device.type):
        slices = slices.to(weight.dtype)
    taps = F.conv2d(slices, kernel, padding=1)
    return taps.to(torch.promote_types(taps.dtype, torch.float32)).view(x.shape[0], -1, *taps.shape[1:])


def add_score_taps(scores: Tensor, taps: Tensor, start: int = 0) -> Tensor:
    """Add what ``score_taps`` returned for disparities from ``start`` on, [B, d, 3, H, W], to scores [B, D, H, W].

    The scores are overwritten, and returned.
    """
    stop, depths = start + taps.shape[1], scores.shape[1]
    scores[:, start:stop] += taps[:, :, 1]
    last, first = min(stop + 1, depths), max(start - 1, 0)
    scores[:, start + 1 : last] += taps[:, : last - start - 1, 0]
    scores[:, first : stop - 1] += taps[:, first + 1 - start :, 2]
    return scores


def new_scores(x: Tensor) -> Tensor:
    """Return zeros [B, D, H, W] for the scores of a volume [B, c, D, H, W], at least float32."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    return torch.zeros(x.shape[0], *x.shape[2:], dtype=dtype, device=x.device)


def convolve_slab(layer: ConvNorm3d, x: Tensor, start: int, stop: int, *, relu: bool = False) -> Tensor:
    """Return disparities start to stop of ``layer(x)`` (stride 1), reading only those of ``x`` that they depend on."""
    first, last = max(start - 1, 0), min(stop + 1, x.shape[2])
    at_end = start == 0 or stop == x.shape[2]  # where zeros are needed on one side at least
    out = finished(layer, x[:, :, first:last], padding=int(at_end), relu=relu)
    return out.narrow(2, start - first, stop - start) if at_end else out


def add_convolved_slab(total: Tensor, layer: ConvNorm3d, x: Tensor, start: int, stop: int) -> None:
    """Add ``convolve_slab(layer, x, start, stop)`` to those disparities of ``total``, which are overwritten."""
    if start == 0 or stop == x.shape[2]:
        total[:, :, start:stop] += convolve_slab(layer, x, start, stop)
    else:
        add_convolved(total[:, :, start:stop], layer, x[:, :, start - 1 : stop + 1], padding=0)


def upsample_slab(layer: DeconvNorm3d, x: Tensor, start: int, stop: int) -> Tensor:
    """Return disparities start to stop (both even) of ``layer(x)``, reading only those of ``x`` that they depend on.

    Disparity 2 i depends on i alone, 2 i + 1 on i and i + 1.
    """
    out: Tensor = layer(x[:, :, start // 2 : stop // 2 + 1])
    return out.narrow(2, 0, stop - start)


def upsampled_slabs(layer: DeconvNorm3d, x: Tensor, addend: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield ``layer(x) + addend`` in slabs of disparities, each with those around it that a convolution reads.

    Args:
        layer: 2c -> c channels.
        x: [B, 2c, D/2, H/2, W/2], D even.
        addend: [B, c, D, H, W].

    Yields:
        Two views [B, c, n, H, W] of memory that the next slab overwrites. Convolved without padding along disparity,
        the first ones give one after the other the convolution of the whole with stride 1 and padding 1, the second
        ones that with stride 2.
    """
    slabs = list(_slabs(addend))
    batch, channels, depths, height, width = addend.shape
    window = torch.empty(  # two disparities from before the slab, the slab, a zero after the last
        (batch, channels, 2 + slabs[0][1] + 1, height, width), dtype=addend.dtype, device=addend.device,
        memory_format=torch.channels_last_3d,
    )  # fmt: skip
    window[:, :, 1] = 0
    for start, stop in slabs:
        end = 2 + stop - start
        torch.add(upsample_slab(layer, x, start, stop), addend[:, :, start:stop], out=window[:, :, 2:end])
        if stop == depths:
            window[:, :, end] = 0
        # With stride 1 each slab waits for the disparity after it: what it gives ends one before it does.
        yield window[:, :, int(start == 0) : end + int(stop == depths)], window[:, :, 1:end]
        window[:, :, :2] = window[:, :, end - 2 : end]


def _slabs(x: Tensor) -> Iterator[tuple[int, int]]:
    """Return the disparities of [B, c, D, H, W] in slabs, as start and stop; all but the last stop are even."""
    batch, channels, depths, height, width = x.shape
    fitting = _SLAB_ELEMENTS // (batch * channels * height * width)
    least = ONEDNN_ELEMENTS // (channels * height) + 1  # for oneDNN
    step = 2 * max(fitting // 2, -(-least // 2), 1)
    return ((start, min(start + step, depths)) for start in range(0, depths, step))


def _is_lean(module: nn.Module, plain: bool) -> bool:
    """Tell whether slabs will do and volumes may be overwritten.

    Not if a gradient will ask for the volumes, if batch norm needs the statistics of the whole, or on the plain path.
    """
    return not plain and not module.training and not torch.is_grad_enabled()
