"""Scores of smaller sizes: the sum is the formula, and the network predicts what its parts would."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from agreement import assert_a_gpu_agrees, assert_every_way_agrees, assert_the_network_that_runs_agrees
from random_networks import calibrated, randomize, tiny
from torch import Tensor

from fa_stereo.config import ModelConfig
from fa_stereo.errors import InputError
from fa_stereo.models import halving
from fa_stereo.models.halving import add_scores, enlarge_scores, half_range, score_with_halvings
from fa_stereo.models.psmnet import build_model
from fa_stereo.models.regression import regress_modal_disparity
from tests.gpu import needs_gpu


def random_scores(*size: int) -> Tensor:
    return 3 * torch.randn(*size, dtype=torch.float64)


@pytest.mark.parametrize("size", [(1, 4, 6, 7), (2, 12, 8, 10)])
def test_the_sum_is_the_formula(size: tuple[int, int, int, int]) -> None:
    """Pixel by pixel, the window's border going on outside."""
    own, half = random_scores(*size), random_scores(*size)
    found = add_scores(own, half)
    batch, depths, height, width = size

    def doubt(scores: Tensor, sample: int, y: int, x: int) -> float:
        radius, total = halving.WINDOW // 2, 0.0
        for row in range(y - radius, y + radius + 1):
            for column in range(x - radius, x + radius + 1):
                pixel = scores[sample, :, min(max(row, 0), height - 1), min(max(column, 0), width - 1)]
                exponentials = [math.exp(value) for value in pixel.tolist()]
                p = [value / sum(exponentials) for value in exponentials]
                total += 1 - max(p[d - 1] + p[d] + p[d + 1] for d in range(1, depths - 1))
        return total / halving.WINDOW**2

    for sample, y, x in ((0, 0, 0), (0, height - 1, 2), (batch - 1, 3, width - 1), (batch - 1, 3, 3)):
        u, u_half = doubt(own, sample, y, x), doubt(half, sample, y, x)
        weight = u / (u + u_half + halving.DOUBTLESS)
        expected = own[sample, :, y, x] + weight * half[sample, :, y, x]
        torch.testing.assert_close(found[sample, :, y, x], expected, atol=1e-12, rtol=0)


def test_what_is_sure_stays_and_where_there_is_a_doubt_the_other_decides() -> None:
    here, there = 2, 9
    sure, unsure, other = (torch.zeros(1, 12, 6, 6) for _ in range(3))
    sure[:, here] = 20
    unsure[:, [here, there]] = 8
    other[:, there] = 8
    assert torch.allclose(add_scores(sure, other).softmax(1), sure.softmax(1), atol=1e-4)
    assert (add_scores(unsure, other).softmax(1)[:, there] > 0.99).all()
    assert torch.equal(add_scores(unsure, torch.zeros_like(unsure)), unsure)  # that says nothing
    hopeless = torch.full((1, 12, 6, 6), 1e4)
    assert add_scores(sure, hopeless).isfinite().all()


@pytest.mark.parametrize("align_corners", [False, True])
@pytest.mark.parametrize("max_disparity", [16, 48, 64, 192])
def test_scores_come_to_the_disparities_and_pixels_that_they_are_of(max_disparity: int, align_corners: bool) -> None:
    """Scores that are a linear function of row, column and disparity in the picture stay that function."""
    height, width = 64, 96

    def positions(count: int, size: int) -> Tensor:
        """Where scores are, in pixels of a picture of this size: what upsampling them to it makes of their indices."""
        if align_corners:
            return torch.arange(count, dtype=torch.float64) * (size - 1) / (count - 1)
        return (torch.arange(count, dtype=torch.float64) + 0.5) * size / count - 0.5

    d, y, x = (positions(size // 4, size) for size in (max_disparity, height, width))
    half_sizes = half_range(max_disparity), height // 2, width // 2
    d_half, y_half, x_half = (positions(size // 4, size) for size in half_sizes)
    # A pixel of the half picture covers two by two of the other; its disparity is half of theirs.
    linear = 2 * d_half[:, None, None] + 0.3 * (2 * y_half + 0.5)[:, None] - 0.2 * (2 * x_half + 0.5)
    found = enlarge_scores(
        linear[None], torch.empty(1, len(d), len(y), len(x)), max_disparity, align_corners=align_corners
    )
    expected = d[:, None, None] + 0.3 * y[:, None] - 0.2 * x
    inside = (slice(1, -1),) * 3  # beyond the last of half the size, the last goes on
    shift = 0.3 if align_corners else 0  # corners of both pictures are no more than half a pixel apart
    torch.testing.assert_close(found[0][inside], expected[inside], atol=1e-9 + shift, rtol=0)


def test_half_of_a_range() -> None:
    assert [half_range(d) for d in (16, 32, 48, 64, 192, 208)] == [16, 16, 32, 32, 96, 112]


def test_surfaces_keep_their_disparity() -> None:
    """Scores that are right at half the size are right where they come to."""
    disparity = 37.5
    d_half = 4 * torch.arange(half_range(192) // 4, dtype=torch.float64) + 1.5
    half = -((d_half - disparity / 2) ** 2)[None, :, None, None].expand(1, -1, 8, 12) / 8
    scores = enlarge_scores(half, torch.empty(1, 48, 16, 24), 192, align_corners=False)
    found, _ = regress_modal_disparity(scores, 192, 64, 96, align_corners=False)
    torch.testing.assert_close(found, torch.full_like(found, disparity), atol=0.1, rtol=0)


def test_pictures_are_averaged_and_half_the_range_is_searched() -> None:
    left, right = torch.rand(2, 2, 3, 48, 64, dtype=torch.float64)
    asked = []

    def score(left: Tensor, right: Tensor, max_disparity: int) -> Tensor:
        asked.append((left, right, max_disparity))
        height, width = left.shape[-2:]
        return torch.zeros(len(left), max_disparity // 4, height // 4, width // 4, dtype=left.dtype)

    def pad(left: Tensor, right: Tensor) -> tuple[Tensor, Tensor, int]:
        top, margin = (-side % 16 for side in left.shape[-2:])
        return F.pad(left, (0, margin, top, 0), value=7), F.pad(right, (0, margin, top, 0), value=7), top

    scores = score_with_halvings(score, pad, left, right, 96, 768, align_corners=False)
    assert scores.shape == (2, 24, 12, 16)
    assert [disparity for *_, disparity in asked] == [32, 48, 96]  # the smallest first
    quarter, half, own = asked
    assert torch.equal(own[0], left)
    assert torch.equal(own[1], right)
    for view in (0, 1):
        assert half[view].shape == (2, 3, 32, 32)
        assert (half[view][:, :, :8] == 7).all()
        means = own[view].view(2, 3, 24, 2, 32, 2).mean((3, 5))
        np.testing.assert_allclose(half[view][:, :, 8:], means, atol=1e-12)
        assert quarter[view].shape == (2, 3, 16, 16)
        means = half[view].view(2, 3, 16, 2, 16, 2).mean((3, 5))
        np.testing.assert_allclose(quarter[view], means, atol=1e-12)


@pytest.mark.parametrize("padding", ["zeros", "replicate"])
@pytest.mark.parametrize("regression", ["expectation", "modal"])
@pytest.mark.parametrize("align_corners", [False, True])
def test_the_network_adds_them(align_corners: bool, regression: str, padding: str) -> None:
    """Each size by itself: 48x64 of the padded picture, 24x32 of half of it, 16x16 of a quarter."""
    height, width = 37, 51
    settings = {"regression": regression, "padding": padding, "align_corners": align_corners, "max_disparity": 48}
    model = randomize(build_model(tiny(**settings)).double()).eval()
    left, right = torch.randn(2, 2, 3, height, width, dtype=torch.float64)
    mode = "constant" if padding == "zeros" else "replicate"

    def scores_of(views: list[Tensor], max_disparity: int) -> Tensor:
        model.set_max_disparity(max_disparity)
        (scores,) = model.score(*model.extract_features(*views))
        return scores

    with torch.no_grad():
        alone = model(left, right, confidence=True)
        views = [F.pad(view, (0, 13, 11, 0), mode=mode) for view in (left, right)]
        half_views = [F.pad(F.avg_pool2d(view, 2), (0, 0, 8, 0), mode=mode) for view in views]
        quarter_views = [F.avg_pool2d(view, 2) for view in half_views]
        quarter, half, own = (scores_of(*asked) for asked in ((quarter_views, 16), (half_views, 32), (views, 48)))
        half = add_scores(half, enlarge_scores(quarter, half, 32, align_corners=align_corners))[:, :, 2:]
        scores = add_scores(own, enlarge_scores(half, own, 48, align_corners=align_corners))
        expected = [*model.mode(scores, 48, 64)]
        if regression == "expectation":
            expected[0] = model.expectation(scores, 48, 64)
        model.set_prediction(halve_from_px=768)
        found = model(left, right, confidence=True)
        assert torch.equal(model(left, right), found[0])
        for ours, theirs in zip(found, expected, strict=True):
            torch.testing.assert_close(ours, theirs[:, 11:, :51], atol=1e-9, rtol=0)
        assert (found[0] - alone[0]).abs().max() > 1e-3
        model.set_prediction(halve_from_px=0)
        assert all(map(torch.equal, model(left, right, confidence=True), alone))
        training = model.train()(left, right)
        model.set_prediction(halve_from_px=768)
        assert all(map(torch.equal, training.disparities, model(left, right).disparities))


def test_small_pictures_do_not_become_large_by_being_enlarged() -> None:
    height, width = 32, 48  # 1536 pixels, 3456 enlarged
    model = randomize(build_model(tiny(enlarge_below_px=10**6)).double()).eval()
    left, right = torch.randn(2, 1, 3, height, width, dtype=torch.float64)
    sizes: list[tuple[int, ...]] = []
    model.aggregation.register_forward_hook(lambda _, volumes, __: sizes.append(tuple(volumes[0].shape[3:])))
    with torch.no_grad():
        model.set_prediction(halve_from_px=1537)
        model(left, right)
        assert sizes == [(8, 12), (12, 20)]
        sizes.clear()
        model.set_prediction(halve_from_px=1536)
        model(left, right)
    assert sizes == [(4, 8), (8, 12), (8, 12), (12, 20)]


@pytest.mark.parametrize("limit", [0, 10**6])
def test_every_way_of_computing_agrees(limit: int) -> None:
    """At one size, and at two."""
    assert_every_way_agrees(regression="modal", padding="replicate", halve_from_px=768, enlarge_below_px=limit)


def test_the_networks_that_run_do_so_too() -> None:
    assert_the_network_that_runs_agrees(regression="modal", padding="replicate", halve_from_px=768)


def test_they_are_added_in_float32_whatever_the_network_computes_in() -> None:
    model = calibrated()
    model.set_prediction(regression="modal", halve_from_px=768)
    left, right = torch.randn(2, 1, 3, 32, 64)
    scores = []
    model.aggregation.register_forward_hook(lambda _, __, found: scores.append(found[-1].float()))
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        found = model(left, right)
    half, own = scores
    expected, _ = model.mode(add_scores(own, enlarge_scores(half, own, 32, align_corners=False)), 32, 64)
    assert torch.equal(found, expected)


@needs_gpu
def test_a_gpu_predicts_the_same() -> None:
    assert_a_gpu_agrees(halve_from_px=768, padding="replicate")


def test_wrong_values() -> None:
    with pytest.raises(InputError, match=r"halve_from_px must be zero or more, got -1"):
        ModelConfig(halve_from_px=-1)
