"""Training losses: smooth L1 on every output (PSMNet, eq. 4), and an optional cross-entropy on the scores.

Every term is a sum over the pixels that have ground truth, divided by a *given* number of them. Who trains with
gradient accumulation or on several processes passes the count of the whole batch, so that the gradients of the parts
add up to the gradient of the batch: a mean of means would weigh a pixel by how few neighbours it has in its part.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fa_stereo.config import LossConfig, ModelConfig
from fa_stereo.errors import InputError
from fa_stereo.models.psmnet import StereoOutput


class LossTerms(NamedTuple):
    """The loss and its parts, each a scalar tensor.

    Attributes:
        total: What is minimised: the weighted sum of all terms.
        outputs: Mean smooth L1 of each output, first to last, not weighted.
        cross_entropy: Cross-entropy of the scores over all outputs, by the outputs' weights; zero if it is off.
    """

    total: Tensor
    outputs: tuple[Tensor, ...]
    cross_entropy: Tensor


class StereoLoss:
    """The training loss of PSMNet and FA-PSMNet.

    ``sum_o w_o * mean_valid smooth_l1(d_o - d)`` with weights 0.5, 0.7 and 1.0 (and beta 1) and, if configured,
    ``+ lambda * sum_o w_o * cross_entropy_o``. A pixel is valid if its ground truth is below the maximum disparity
    (and, as an option, above zero); "no ground truth" is infinite and thereby left out.

    Args:
        config: Weights and options.
        model: Configuration of the network whose outputs are judged.
    """

    def __init__(self, config: LossConfig, model: ModelConfig) -> None:
        self.config = config
        self.max_disparity = model.max_disparity
        self.align_corners = model.align_corners
        outputs = 3 if model.aggregation == "stacked_hourglass" else 1
        if len(config.output_weights) < outputs:
            raise InputError(
                f"loss.output_weights has {len(config.output_weights)} entries, the network has {outputs} outputs: "
                f"give {outputs}"
            )
        self.output_weights = config.output_weights[-outputs:]

    def valid(self, disparity: Tensor) -> Tensor:
        """Return which pixels count: bool, of the shape of the ground truth [..., H, W]."""
        mask = disparity < self.max_disparity  # False for inf and NaN
        return mask & (disparity > 0) if self.config.mask_zero else mask

    def count(self, disparity: Tensor) -> Tensor:
        """Return how many pixels, and how many quarter-resolution cells, count.

        Args:
            disparity: Ground truth in pixels [B, H, W].

        Returns:
            float64 [2]; add up those of all parts of a batch and pass the sum to every part's call.
        """
        pixels = self.valid(disparity).sum()
        cells = pixels.new_zeros(())
        if self.config.cross_entropy_weight:
            cells = self.valid(downsample_disparity(disparity, self.valid(disparity))).sum()
        return torch.stack([pixels, cells]).double()

    def __call__(self, output: StereoOutput, disparity: Tensor, counts: Tensor | None = None) -> LossTerms:
        """Return the loss of a batch, or of a part of one.

        Args:
            output: The network's outputs in training mode, disparities [B, H, W] and logits [B, D/4, H/4, W/4].
            disparity: Ground truth in pixels [B, H, W]; inf where there is none.
            counts: ``count`` of the whole batch that this is a part of; None if this is all of it.

        Returns:
            Scalars; zero, with zero gradient, where nothing is valid.
        """
        counts = self.count(disparity) if counts is None else counts
        pixels, cells = counts.clamp(min=1).float()
        valid = self.valid(disparity)
        # Where nothing is known the target is replaced before the difference is taken: inf times zero is NaN.
        target = torch.where(valid, disparity, 0.0)

        beta = self.config.smooth_l1_beta
        outputs = tuple(
            torch.where(valid, F.smooth_l1_loss(prediction.float(), target, reduction="none", beta=beta), 0.0).sum()
            / pixels
            for prediction in output.disparities
        )
        total = torch.stack([w * term for w, term in zip(self.output_weights, outputs, strict=True)]).sum()

        cross_entropy = total.new_zeros(())
        if self.config.cross_entropy_weight:
            coarse = downsample_disparity(disparity, valid)  # [B, H/4, W/4]
            for weight, logits in zip(self.output_weights, output.logits, strict=True):
                cross_entropy = cross_entropy + weight * self._cross_entropy_sum(logits, coarse) / cells
            total = total + self.config.cross_entropy_weight * cross_entropy
        return LossTerms(total, outputs, cross_entropy)

    def _cross_entropy_sum(self, logits: Tensor, coarse: Tensor) -> Tensor:
        """Cross-entropy, summed over valid cells, with the target split between the two nearest bins."""
        bins = logits.shape[1]
        valid = self.valid(coarse)
        position = score_position(
            torch.where(valid, coarse, 0.0), self.max_disparity, bins, align_corners=self.align_corners
        )
        lower = position.floor().clamp(max=bins - 2)
        upper_share = (position - lower).unsqueeze(1)  # [B, 1, H/4, W/4]
        index = lower.long().unsqueeze(1)
        log_probabilities = F.log_softmax(logits.float(), dim=1)  # [B, D/4, H/4, W/4]
        log_likelihood = (1 - upper_share) * log_probabilities.gather(1, index) + upper_share * (
            log_probabilities.gather(1, index + 1)
        )
        return -torch.where(valid, log_likelihood.squeeze(1), 0.0).sum()


def score_position(disparity: Tensor, max_disparity: int, bins: int, *, align_corners: bool) -> Tensor:
    """Return where on the coarse disparity axis the network's upsampling puts a disparity.

    The network reads its answer off the scores *after* upsampling them from ``bins`` to ``max_disparity`` entries, so
    a coarse bin stands for the disparity at its centre in that upsampling, not for 4 times its index.

    Args:
        disparity: In pixels, any shape.
        max_disparity: D.
        bins: D/4.
        align_corners: The network's upsampling convention.

    Returns:
        Fractional bin from 0 to ``bins - 1``.

    Examples:
        >>> score_position(torch.tensor([0.0, 1.5, 5.5, 63.0]), 64, 16, align_corners=False)
        tensor([ 0.,  0.,  1., 15.])
        >>> score_position(torch.tensor([0.0, 63.0]), 64, 16, align_corners=True)
        tensor([ 0., 15.])
    """
    if align_corners:
        position = disparity * ((bins - 1) / (max_disparity - 1))
    else:
        position = (disparity + 0.5) * (bins / max_disparity) - 0.5
    return position.clamp(0, bins - 1)


def downsample_disparity(disparity: Tensor, valid: Tensor) -> Tensor:
    """Return the median of the valid disparities of each 4x4 cell: one that occurs there, so surfaces do not mix.

    Args:
        disparity: In pixels [B, H, W]; H and W multiples of 4.
        valid: Bool [B, H, W].

    Returns:
        In pixels of the full resolution [B, H/4, W/4]; inf where a cell has no valid pixel. Of an even number of
        valid pixels the lower of the two middle ones.
    """
    batch, height, width = disparity.shape
    known = torch.where(valid, disparity, torch.inf)
    cells = known.view(batch, height // 4, 4, width // 4, 4).transpose(2, 3).flatten(3)  # [B, H/4, W/4, 16]
    middle = ((cells < torch.inf).sum(-1, keepdim=True) - 1).clamp(min=0) // 2
    return cells.sort(dim=-1).values.gather(-1, middle).squeeze(-1)
