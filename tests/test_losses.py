"""The training loss: by hand, in parts, and where nothing is known."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from fa_stereo.config import LossConfig, ModelConfig
from fa_stereo.errors import InputError
from fa_stereo.losses import StereoLoss, downsample_disparity, score_position
from fa_stereo.models.psmnet import StereoOutput
from fa_stereo.models.regression import regress_disparity

MODEL = ModelConfig(max_disparity=32)


def make_output(batch: int = 2, height: int = 16, width: int = 24) -> StereoOutput:
    disparities = tuple((torch.rand(batch, height, width) * 31).requires_grad_() for _ in range(3))
    logits = tuple(torch.randn(batch, 8, height // 4, width // 4, requires_grad=True) for _ in range(3))
    return StereoOutput(disparities, logits)


def make_truth(batch: int = 2, height: int = 16, width: int = 24) -> torch.Tensor:
    truth = torch.rand(batch, height, width) * 40  # some beyond the maximum
    truth[torch.rand_like(truth) < 0.3] = torch.inf
    return truth


def part(output: StereoOutput, rows: slice) -> StereoOutput:
    return StereoOutput(tuple(d[rows] for d in output.disparities), tuple(s[rows] for s in output.logits))


def test_smooth_l1_by_hand() -> None:
    truth = torch.tensor([[[1.0, 2.0, torch.inf, 32.0]]])
    prediction = torch.tensor([[[1.5, 5.0, 7.0, 0.0]]])
    output = StereoOutput((prediction, prediction, prediction), ())
    terms = StereoLoss(LossConfig(), MODEL)(output, truth)
    # 0.5 px: 0.5 * 0.5² = 0.125; 3 px: 3 - 0.5 = 2.5; infinite and 32 (exclusive) do not count
    mean = (0.125 + 2.5) / 2
    assert [float(term) for term in terms.outputs] == pytest.approx([mean] * 3)
    assert float(terms.total.detach()) == pytest.approx((0.5 + 0.7 + 1.0) * mean)
    assert float(terms.cross_entropy) == 0


@pytest.mark.parametrize("beta", [0.0, 0.25, 2.0])
def test_where_smooth_l1_turns_into_a_line(beta: float) -> None:
    error = torch.tensor([[[0.125, -0.5, 1.0, 3.0]]], dtype=torch.float64, requires_grad=True)
    output = StereoOutput((error.float() + 4,) * 3, ())
    loss = StereoLoss(LossConfig(output_weights=[0, 0, 1], smooth_l1_beta=beta), MODEL)
    terms = loss(output, torch.full((1, 1, 4), 4.0))
    size = error.detach().abs()
    expected = torch.where(size < beta, size**2 / (2 * max(beta, 1e-9)), size - beta / 2)
    assert float(terms.outputs[-1].detach()) == pytest.approx(float(expected.mean()))
    (gradient,) = torch.autograd.grad(terms.total, error)
    torch.testing.assert_close(4 * gradient, error.detach().sign() * (size / max(beta, 1e-9)).clamp(max=1))


def test_the_mask_of_zero_disparity_is_an_option() -> None:
    truth = torch.tensor([[[0.0, 4.0]]])
    output = StereoOutput((torch.tensor([[[9.0, 4.0]]]),) * 3, ())
    assert float(StereoLoss(LossConfig(), MODEL)(output, truth).outputs[-1]) == pytest.approx(8.5 / 2)
    assert float(StereoLoss(LossConfig(mask_zero=True), MODEL)(output, truth).outputs[-1]) == 0


def test_the_basic_network_takes_the_last_weight() -> None:
    loss = StereoLoss(LossConfig(output_weights=[0.5, 0.7, 2.0]), ModelConfig(aggregation="basic", max_disparity=32))
    terms = loss(StereoOutput((torch.tensor([[[3.0]]]),), ()), torch.tensor([[[1.0]]]))
    assert float(terms.total.detach()) == pytest.approx(2.0 * 1.5)


def test_too_few_weights_are_refused() -> None:
    for weights in ([], [1, math.nan, 1], [1, math.inf, 1], [1, -1, 1], [0, 0, 0]):
        with pytest.raises(InputError, match=r"loss\.output_weights must be numbers of zero or more, and not all zero"):
            LossConfig(output_weights=weights)
    with pytest.raises(InputError, match=r"loss\.output_weights has 2 entries, the network has 3 outputs"):
        StereoLoss(LossConfig(output_weights=[0.5, 1.0]), MODEL)


@pytest.mark.parametrize("cross_entropy_weight", [0.0, 0.3])
@pytest.mark.parametrize("value", [torch.inf, 100.0, torch.nan])
def test_no_ground_truth_gives_no_loss_and_no_gradient(cross_entropy_weight: float, value: float) -> None:
    output = make_output()
    loss = StereoLoss(LossConfig(cross_entropy_weight=cross_entropy_weight), MODEL)
    terms = loss(output, torch.full((2, 16, 24), value))
    terms.total.backward()
    assert float(terms.total.detach()) == 0
    for tensor in (*output.disparities, *(output.logits if cross_entropy_weight else ())):
        assert tensor.grad is not None
        assert torch.equal(tensor.grad, torch.zeros_like(tensor))


@pytest.mark.parametrize("cross_entropy_weight", [0.0, 0.3])
def test_parts_with_the_whole_count_add_up_to_the_whole(cross_entropy_weight: float) -> None:
    loss = StereoLoss(LossConfig(cross_entropy_weight=cross_entropy_weight), MODEL)
    output, truth = make_output(batch=4), make_truth(batch=4)
    truth[1:3] = torch.inf  # one part without any ground truth
    parameters = [*output.disparities, *output.logits] if cross_entropy_weight else list(output.disparities)
    whole = loss(output, truth)
    expected = torch.autograd.grad(whole.total, parameters)
    rows = [slice(0, 1), slice(1, 3), slice(3, 4)]
    counts = torch.stack([loss.count(truth[part_rows]) for part_rows in rows]).sum(0)
    parts = [loss(part(output, part_rows), truth[part_rows], counts) for part_rows in rows]
    total = torch.stack([terms.total for terms in parts]).sum()
    torch.testing.assert_close(total, whole.total)
    torch.testing.assert_close(torch.autograd.grad(total, parameters), expected)


def test_means_of_parts_would_not_add_up() -> None:
    """The reason for the count: with as many pixels missing as in real data, the mean of means is another loss."""
    loss = StereoLoss(LossConfig(), MODEL)
    output, truth = make_output(), make_truth()
    truth[1, 2:] = torch.inf
    means = [float(loss(part(output, slice(i, i + 1)), truth[i : i + 1]).total.detach()) for i in range(2)]
    assert sum(means) / 2 != pytest.approx(float(loss(output, truth).total.detach()), rel=1e-3)


def test_cross_entropy_against_soft_targets() -> None:
    torch.manual_seed(3)
    logits = torch.randn(1, 8, 2, 2)
    truth = torch.tensor([[2.7, 13.1], [29.9, torch.inf]]).repeat_interleave(4, 0).repeat_interleave(4, 1)[None]
    loss = StereoLoss(LossConfig(cross_entropy_weight=1.0), ModelConfig(aggregation="basic", max_disparity=32))
    terms = loss(StereoOutput((truth.nan_to_num(posinf=0.0),), (logits,)), truth)
    expected = 0.0
    for (y, x), d in {(0, 0): 2.7, (0, 1): 13.1, (1, 0): 29.9}.items():
        position = min((d + 0.5) / 4 - 0.5, 7)  # the last bin takes all beyond its centre
        target = (1 - (torch.arange(8.0) - position).abs()).clamp(min=0)  # a tent of width one
        assert float(target.sum()) == pytest.approx(1)
        expected += float(F.cross_entropy(logits[:, :, y, x], target[None])) / 3
    assert float(terms.cross_entropy) == pytest.approx(expected, rel=1e-5)
    assert float(terms.total.detach()) == pytest.approx(expected, rel=1e-5)  # the prediction itself is exact


@pytest.mark.parametrize("align_corners", [False, True])
@pytest.mark.parametrize("peak", range(1, 7))
def test_the_target_is_where_the_network_reads_its_answer(align_corners: bool, peak: int) -> None:
    """A sharp peak in bin k is regressed to the disparity whose target is bin k."""
    logits = torch.full((1, 8, 1, 1), -30.0)
    logits[0, peak] = 0.0
    regressed = regress_disparity(logits, 32, 4, 4, align_corners=align_corners).mean()
    position = score_position(regressed, 32, 8, align_corners=align_corners)
    assert float(position) == pytest.approx(peak, abs=0.1)


def test_downsampling_takes_a_disparity_that_is_there() -> None:
    truth = torch.full((1, 8, 8), torch.inf)
    truth[0, :4, :4] = torch.tensor([5.0] * 7 + [30.0] * 9).view(4, 4)  # two surfaces
    truth[0, 1, 6] = 7.0  # a single known pixel
    truth[0, 4, :2] = torch.tensor([2.0, 9.0])
    coarse = downsample_disparity(truth, truth < 32)
    assert coarse.tolist() == [[[30.0, 7.0], [2.0, torch.inf]]]
