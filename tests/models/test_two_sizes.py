"""Small pictures at two sizes: the merge is the formula, and the network predicts what its parts would."""

from __future__ import annotations

import cv2
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from agreement import assert_a_gpu_agrees, assert_every_way_agrees, assert_the_network_that_runs_agrees
from random_networks import randomize, tiny
from torch import Tensor

from fa_stereo.config import ModelConfig
from fa_stereo.errors import InputError
from fa_stereo.models import two_sizes
from fa_stereo.models.psmnet import build_model
from fa_stereo.models.two_sizes import enlarged_size, merge_by_confidence, predict_at_two_sizes
from fa_stereo.tiling import choose_band_height, estimate_memory
from tests.gpu import needs_gpu


def random_maps(*size: int) -> tuple[Tensor, Tensor]:
    return 30 * torch.rand(*size, dtype=torch.float64), 0.05 + 0.95 * torch.rand(*size, dtype=torch.float64)


@pytest.mark.parametrize("size", [(1, 16, 16), (2, 21, 33)])
def test_the_merge_is_the_formula(size: tuple[int, int, int]) -> None:
    """Pixel by pixel, the window's border going on outside."""
    own, larger = random_maps(*size), random_maps(*size)
    reach = 20.0
    disparity, confidence = merge_by_confidence(own, larger, reach)
    radius = two_sizes.WINDOW_PX // 2
    for sample, y, x in ((0, 0, 0), (0, 15, 3), (size[0] - 1, 8, size[2] - 1), (size[0] - 1, 11, 11)):
        rows = np.clip(np.arange(y - radius, y + radius + 1), 0, size[1] - 1)
        columns = np.clip(np.arange(x - radius, x + radius + 1), 0, size[2] - 1)
        mean, mean_of_larger = (float(maps[1][sample][rows][:, columns].mean()) for maps in (own, larger))
        weight = 1 / (1 + (mean / (two_sizes.ADVANTAGE * mean_of_larger)) ** two_sizes.POWER)
        if own[0][sample, y, x] > reach:
            weight = 0.0
        for found, a, b in ((disparity, own[0], larger[0]), (confidence, own[1], larger[1])):
            expected = (1 - weight) * a[sample, y, x] + weight * b[sample, y, x]
            torch.testing.assert_close(found[sample, y, x], expected, atol=1e-12, rtol=0)


def test_the_surer_one_counts_and_the_larger_one_is_not_asked_beyond_its_range() -> None:
    near, far, sure, unsure = (torch.full((1, 20, 20), value) for value in (3.0, 9.0, 0.9, 0.6))
    assert torch.allclose(merge_by_confidence((far, unsure), (near, sure), 99)[0], near, atol=1e-4)
    assert torch.allclose(merge_by_confidence((far, sure), (near, unsure), 99)[0], far, atol=1e-2)
    assert (merge_by_confidence((far, sure), (near, sure), 99)[0] < 4).all()  # between equals, the one with more detail
    assert torch.equal(merge_by_confidence((far, unsure), (near, sure), 8.9)[0], far)
    hopeless = torch.full((1, 20, 20), 1e-30)
    assert merge_by_confidence((far, sure), (near, hopeless), 99)[0].isfinite().all()


@pytest.mark.parametrize("size", [(40, 56), (33, 17)])
def test_what_is_predicted_larger_comes_back_in_pixels_of_the_picture(size: tuple[int, int]) -> None:
    height, width = size
    seen = []

    def predict(left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
        assert left.shape == right.shape
        seen.append((left, right))
        share = left.shape[-1] / width  # as a right network would: twice as large, twice the disparity
        confidence = 0.2 if share == 1 else 0.8
        return torch.full_like(left[:, 0], 7.0 * share), torch.full_like(left[:, 0], confidence)

    left, right = torch.rand(2, 2, 3, height, width)
    disparity, confidence = predict_at_two_sizes(predict, left, right, 192)
    assert disparity.shape == confidence.shape == (2, height, width)
    torch.testing.assert_close(disparity, torch.full_like(disparity, 7.0))
    torch.testing.assert_close(confidence, torch.full_like(confidence, 0.8))
    assert torch.equal(seen[0][0], left)
    assert torch.equal(seen[0][1], right)
    larger = enlarged_size(height, width)
    assert larger == (round(1.5 * height), round(1.5 * width))
    for given, picture in zip(seen[1], (left, right), strict=True):
        expected = cv2.resize(picture[0, 1].numpy(), larger[::-1], interpolation=cv2.INTER_CUBIC)
        np.testing.assert_allclose(given[0, 1].numpy(), expected, atol=1e-5)


@pytest.mark.parametrize("padding", ["zeros", "replicate"])
@pytest.mark.parametrize("regression", ["expectation", "modal"])
def test_the_network_predicts_small_pictures_so(regression: str, padding: str) -> None:
    height, width = 37, 51
    model = randomize(build_model(tiny(regression=regression, padding=padding)).double()).eval()
    left, right = torch.randn(2, 2, 3, height, width, dtype=torch.float64)
    with torch.no_grad():
        alone = model(left, right, confidence=True)
        larger = model(
            *(F.interpolate(x, (56, 76), mode="bicubic", align_corners=False) for x in (left, right)), confidence=True
        )
        back = [F.interpolate(x[:, None], (height, width), mode="bilinear", align_corners=False)[:, 0] for x in larger]
        expected = merge_by_confidence(alone, (back[0] * (width / 76), back[1]), (32 - two_sizes.MARGIN_PX) / 1.5)
        model.set_prediction(enlarge_below_px=height * width)  # it does not have fewer pixels than that
        assert all(map(torch.equal, model(left, right, confidence=True), alone))
        model.set_prediction(enlarge_below_px=height * width + 1)
        found = model(left, right, confidence=True)
        assert torch.equal(model(left, right), found[0])
        torch.testing.assert_close(found, expected, atol=1e-9, rtol=0)
        assert (found[0] - alone[0]).abs().max() > 1e-3
        training = model.train()(left, right)
        model.set_prediction(enlarge_below_px=0)
        assert all(map(torch.equal, training.disparities, model(left, right).disparities))


def test_every_way_of_computing_agrees() -> None:
    assert_every_way_agrees(regression="modal", padding="replicate", enlarge_below_px=10**6)


def test_the_networks_that_run_do_so_too() -> None:
    assert_the_network_that_runs_agrees(regression="modal", padding="replicate", enlarge_below_px=10**6)


@needs_gpu
def test_a_gpu_predicts_the_same() -> None:
    assert_a_gpu_agrees(enlarge_below_px=10**6, padding="replicate")


def test_memory_is_that_of_the_larger_size() -> None:
    alone, both = ModelConfig(), ModelConfig(enlarge_below_px=400_000)
    assert estimate_memory(both, 480, 640) == estimate_memory(alone, 720, 960)
    assert estimate_memory(both, 540, 960) == estimate_memory(alone, 540, 960)
    budget = 3 * estimate_memory(alone, 720, 960) // 4
    band = choose_band_height(both, 480, 640, budget)
    assert band == choose_band_height(alone, 720, 960, budget)
    assert estimate_memory(both, 480, 640, band) <= budget


def test_wrong_values() -> None:
    with pytest.raises(InputError, match=r"enlarge_below_px must be .*, got -1"):
        ModelConfig(enlarge_below_px=-1)
    with pytest.raises(InputError, match="padding must be one of zeros, replicate, got 'reflect'"):
        build_model(tiny()).set_prediction(padding="reflect")
