"""That however a network predicts, it is the same network: plain, fast, in bands of rows, as it runs, on a GPU."""

from __future__ import annotations

from typing import Any

import torch
from random_networks import calibrated, randomize, tiny

from fa_stereo.models.optimized import optimize_for_inference
from fa_stereo.models.psmnet import build_model
from fa_stereo.tiling import EXACT_OVERLAP_PX, predict_in_bands


def assert_every_way_agrees(**settings: Any) -> None:
    """Plain, fast and in bands of rows; in float64, as what is as sure as the other may fall to either."""
    model = randomize(build_model(tiny(**settings)).double()).eval()
    left, right = torch.randn(2, 1, 3, 45, 70, dtype=torch.float64)
    upstream = torch.randn(1, 45, 70, dtype=torch.float64)
    results = []
    for plain in (True, False):
        model.plain = plain
        model.zero_grad()
        disparity = model(left, right)
        (upstream * disparity).sum().backward()
        results.append((disparity.detach(), {name: p.grad for name, p in model.named_parameters()}))
    (reference, gradients_of_reference), (disparity, gradients) = results
    torch.testing.assert_close(disparity, reference, atol=1e-9, rtol=0)
    for name, gradient in gradients_of_reference.items():
        if gradient is None:
            assert gradients[name] is None
        else:
            scale = gradient.abs().max().clamp(min=1e-9)
            torch.testing.assert_close(gradients[name] / scale, gradient / scale, atol=1e-7, rtol=0, msg=name)
    with torch.no_grad():
        in_bands = predict_in_bands(model, left, right, 16, EXACT_OVERLAP_PX)
    torch.testing.assert_close(in_bands, reference, atol=1e-9, rtol=0)


def assert_the_network_that_runs_agrees(**settings: Any) -> None:
    """With batch norm folded in and its convolutions fused, in float32."""
    model = calibrated()
    model.set_prediction(**settings)
    left, right = torch.randn(2, 1, 3, 40, 60)
    with torch.inference_mode():
        expected = model(left, right, confidence=True)
        found = optimize_for_inference(model)(left, right, confidence=True)
    assert (found[0] - expected[0]).abs().median() < 1e-4
    assert (found[1] - expected[1]).abs().median() < 1e-4


def assert_a_gpu_agrees(**settings: Any) -> None:
    """In float64."""
    model = randomize(build_model(tiny(**settings)).double()).eval()
    left, right = torch.randn(2, 2, 3, 45, 70, dtype=torch.float64)
    with torch.no_grad():
        expected = model(left, right)
        found = model.to("cuda")(left.to("cuda"), right.to("cuda"))
    torch.testing.assert_close(found.cpu(), expected, atol=1e-9, rtol=0)
