"""Disparity regression: the expectation by hand, and without the score volume."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from fa_stereo.models import regression
from fa_stereo.models.regression import (
    interpolation_matrix,
    regress_disparity,
    regress_disparity_reference,
    regress_modal_disparity,
    regress_modal_disparity_reference,
)


@pytest.mark.parametrize("regress", [regress_disparity, regress_disparity_reference])
def test_peak_by_hand(regress) -> None:
    # One sharp peak at coarse cell 2 of 4: with align_corners cells sit at 0, 5, 10 and 15 of 16 disparities.
    logits = torch.full((1, 4, 4, 4), -1e4, dtype=torch.float64)
    logits[:, 2] = 0
    assert torch.allclose(regress(logits, 16, 16, 16, align_corners=True), torch.tensor(10.0, dtype=torch.float64))
    # Without, they sit at 1.5, 5.5, 9.5 and 13.5: the two disparities beside 9.5 tie.
    assert torch.allclose(regress(logits, 16, 16, 16, align_corners=False), torch.tensor(9.5, dtype=torch.float64))


# batch, depths, rows, columns, height, width, disparities
SIZES = [
    (2, 4, 4, 5, 16, 20, 16),
    (1, 12, 9, 7, 36, 28, 48),
    (1, 5, 3, 4, 10, 17, 23),
    (3, 4, 4, 4, 16, 16, 16),
    (2, 1, 3, 2, 12, 8, 4),
    (1, 2, 5, 3, 13, 11, 8),
    (1, 3, 1, 1, 4, 4, 12),
]


@pytest.mark.parametrize("band_elements", [1, 200, 1 << 18])
@pytest.mark.parametrize("align_corners", [True, False])
@pytest.mark.parametrize("size", SIZES)
def test_bands_equal_the_volume(
    size: tuple[int, ...], align_corners: bool, band_elements: int, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(regression._BAND_ELEMENTS, device, band_elements)
    batch, depths, rows, columns, height, width, disparities = size
    logits = 5 * torch.randn(batch, columns, depths, rows, dtype=torch.float64, device=device)
    logits = logits.permute(0, 2, 3, 1).requires_grad_()
    expected = regress_disparity_reference(logits, disparities, height, width, align_corners=align_corners)
    result = regress_disparity(logits, disparities, height, width, align_corners=align_corners)
    torch.testing.assert_close(result, expected, atol=1e-11, rtol=0)

    upstream = torch.randn_like(expected)
    (gradient,) = torch.autograd.grad(result, logits, upstream)
    (expected_gradient,) = torch.autograd.grad(expected, logits, upstream)
    torch.testing.assert_close(gradient, expected_gradient, atol=1e-10, rtol=0)


@pytest.mark.parametrize("regress", [regress_modal_disparity, regress_modal_disparity_reference])
def test_mode_of_two_peaks_by_hand(regress) -> None:
    # Probabilities of 16 disparities: 0.6 at 3 and 4, 0.4 at 12; groups 0-1, 2-5, 6-9, 10-13 and 14-15.
    probabilities = torch.full((16,), 1e-30, dtype=torch.float64)
    probabilities[[3, 4, 12]] = torch.tensor([0.45, 0.15, 0.4], dtype=torch.float64)
    # Coarse scores that the interpolation takes to these: with align_corners and as many scores there is none.
    disparity, confidence = regress(probabilities.log().view(1, 16, 1, 1), 16, 1, 1, align_corners=True)
    # Windows 0-9 and 2-13 hold 0.6 and 1, window 6-15 holds 0.4.
    first, both, last = 0.6**8, 1.0, 0.4**8
    expected = (first * 3.25 + both * (0.6 * 3.25 + 0.4 * 12) + last * 12) / (first + both + last)
    torch.testing.assert_close(disparity.item(), expected, atol=1e-9, rtol=0)
    torch.testing.assert_close(confidence.item(), 1.0, atol=1e-9, rtol=0)

    # Further apart no window holds both: 0.6 against 0.4, three windows each.
    apart = torch.full((32,), 1e-30, dtype=torch.float64)
    apart[[7, 8, 24]] = torch.tensor([0.45, 0.15, 0.4], dtype=torch.float64)
    disparity, confidence = regress(apart.log().view(1, 32, 1, 1), 32, 1, 1, align_corners=True)
    expected = (0.6**8 * 7.25 + 0.4**8 * 24) / (0.6**8 + 0.4**8)
    torch.testing.assert_close(disparity.item(), expected, atol=1e-9, rtol=0)
    torch.testing.assert_close(confidence.item(), 0.6, atol=1e-9, rtol=0)


@pytest.mark.parametrize("band_elements", [1, 200, 1 << 18])
@pytest.mark.parametrize("align_corners", [True, False])
@pytest.mark.parametrize("size", SIZES)
def test_modal_bands_equal_the_volume(
    size: tuple[int, ...], align_corners: bool, band_elements: int, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(regression._BAND_ELEMENTS, device, band_elements)
    batch, depths, rows, columns, height, width, disparities = size
    logits = 5 * torch.randn(batch, columns, depths, rows, dtype=torch.float64, device=device)
    logits = logits.permute(0, 2, 3, 1)
    arguments = disparities, height, width
    expected = regress_modal_disparity_reference(logits, *arguments, align_corners=align_corners)
    result = regress_modal_disparity(logits, *arguments, align_corners=align_corners)
    torch.testing.assert_close(result, expected, atol=1e-10, rtol=0)
    # One that needs gradients gets them.
    leaf = logits.clone().requires_grad_()
    disparity, _ = regress_modal_disparity(leaf, *arguments, align_corners=align_corners)
    torch.testing.assert_close(disparity, expected[0], atol=1e-10, rtol=0)
    assert torch.autograd.grad(disparity.sum(), leaf)[0].isfinite().all()


@pytest.mark.parametrize("scale", [0.0, 1.0, 12.0, 1e3])
def test_modal_regression_in_float32(scale: float) -> None:
    logits = (scale * torch.randn(1, 24, 6, 8, dtype=torch.float64) + 50).float()
    exact = regress_modal_disparity_reference(logits.double(), 96, 24, 32, align_corners=False)
    results = regress_modal_disparity(logits, 96, 24, 32, align_corners=False)
    # The eighth power multiplies the rounding of the scores (1e3 * 6e-8) where two windows hold the same.
    for result, truth, atol in zip(results, exact, (1e-3 if scale < 100 else 0.2, 1e-4), strict=True):
        assert result.dtype == torch.float32
        torch.testing.assert_close(result.double(), truth, atol=atol, rtol=0)


def test_one_peak_is_the_same_to_both_regressions() -> None:
    centers = torch.tensor([10.0, 37.5, 61.3])
    coarse = torch.arange(24) * 4 + 1.5
    logits = -((coarse[:, None] - centers) ** 2 / 8).view(1, 24, 1, 3).double()
    expectation = regress_disparity_reference(logits, 96, 1, 3, align_corners=False)
    disparity, confidence = regress_modal_disparity(logits, 96, 1, 3, align_corners=False)
    torch.testing.assert_close(disparity, expectation, atol=0.05, rtol=0)
    assert (confidence > 0.95).all()


@pytest.mark.parametrize("scale", [0.0, 1.0, 12.0])
def test_float32_is_as_accurate_as_the_volume(scale: float) -> None:
    # The largest scale spans about 80 in a pixel, whose exponentials cover most of the range of float32.
    logits = scale * torch.randn(1, 24, 6, 8, dtype=torch.float64) + 50
    upstream = torch.randn(1, 24, 32, dtype=torch.float64)

    def run(function, logits):
        logits = logits.detach().requires_grad_()
        disparity = function(logits, 96, 24, 32, align_corners=False)
        return disparity, torch.autograd.grad(disparity, logits, upstream.to(disparity.dtype))[0]

    rounded = logits.float()
    exact = run(regress_disparity_reference, rounded.double())
    for result, truth in zip(run(regress_disparity, rounded), exact, strict=True):
        assert result.dtype == torch.float32
        torch.testing.assert_close(result.double(), truth, atol=2e-4, rtol=0)


def test_scores_too_far_apart_for_roots_take_the_matrix(monkeypatch: pytest.MonkeyPatch) -> None:
    # One pixel of one sample is out of range: its rows go the general way, all others the short one.
    used = []
    choose = regression._Bands.depths
    monkeypatch.setattr(regression._Bands, "depths", lambda *a: used.append(choose(*a)) or used[-1])
    monkeypatch.setitem(regression._BAND_ELEMENTS, "cpu", 1)
    logits = torch.randn(2, 6, 5, 4, dtype=torch.float64)
    logits[1, 2, 3, 1] = 300
    logits.requires_grad_()
    results = [f(logits, 24, 20, 16, align_corners=False) for f in (regress_disparity, regress_disparity_reference)]
    assert {type(depths).__name__ for depths in used} == {"_AnyDepths", "_QuarterDepths"}
    torch.testing.assert_close(*results, atol=1e-11, rtol=0)
    upstream = torch.randn_like(results[0])
    gradients = [torch.autograd.grad(result, logits, upstream)[0] for result in results]
    torch.testing.assert_close(*gradients, atol=1e-10, rtol=0)
    used.clear()
    modal, reference = (
        f(logits.detach(), 24, 20, 16, align_corners=False)
        for f in (regress_modal_disparity, regress_modal_disparity_reference)
    )
    assert {type(depths).__name__ for depths in used} == {"_AnyDepths", "_QuarterDepths"}
    torch.testing.assert_close(modal, reference, atol=1e-10, rtol=0)


def test_there_is_no_second_derivative() -> None:
    logits = torch.randn(1, 4, 4, 4, requires_grad=True)
    disparity = regress_disparity(logits, 16, 16, 16, align_corners=False)
    (gradient,) = torch.autograd.grad(disparity.sum(), logits, create_graph=True, retain_graph=True)
    assert not gradient.requires_grad
    upstream = torch.ones(1, 16, 16, requires_grad=True)
    (gradient,) = torch.autograd.grad(disparity, logits, upstream, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        gradient.sum().backward()


def test_not_a_number_is_passed_on() -> None:
    logits = torch.randn(1, 4, 4, 4)
    logits[0, 1, 0, 0] = float("nan")
    for result in (
        regress_disparity(logits, 16, 16, 16, align_corners=False),
        *regress_modal_disparity(logits, 16, 16, 16, align_corners=False),
    ):
        assert result[0, :2, :2].isnan().all()


def test_extreme_scores_stay_finite() -> None:
    logits = torch.randn(1, 4, 4, 4) * 1e4
    result = regress_disparity(logits, 16, 16, 16, align_corners=False)
    expected = regress_disparity_reference(logits, 16, 16, 16, align_corners=False)
    assert torch.isfinite(result).all()
    assert ((result - expected).abs() < 1e-3).float().mean() > 0.99  # a tie may fall either way in float32
    modal, confidence = regress_modal_disparity(logits, 16, 16, 16, align_corners=False)
    expected, _ = regress_modal_disparity_reference(logits, 16, 16, 16, align_corners=False)
    assert ((modal - expected).abs() < 1e-3).float().mean() > 0.99
    assert 0 < confidence.min() <= confidence.max() <= 1


def test_autocast_leaves_the_regression_in_float32() -> None:
    logits = torch.randn(1, 8, 4, 6)
    expected = regress_disparity(logits, 32, 16, 24, align_corners=False)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        result = regress_disparity(logits, 32, 16, 24, align_corners=False)
        modal, _ = regress_modal_disparity(logits, 32, 16, 24, align_corners=False)
    assert result.dtype == modal.dtype == torch.float32
    assert torch.equal(result, expected)
    assert torch.equal(modal, regress_modal_disparity(logits, 32, 16, 24, align_corners=False)[0])


@pytest.mark.parametrize("align_corners", [True, False])
def test_interpolation_matrix_is_interpolation(align_corners: bool) -> None:
    values = torch.randn(1, 1, 5, dtype=torch.float64)
    expected = F.interpolate(values, 13, mode="linear", align_corners=align_corners)[0, 0]
    matrix = interpolation_matrix(5, 13, values, align_corners=align_corners)
    torch.testing.assert_close(matrix @ values[0, 0], expected)
