"""Bands of rows: seam-free, exact with enough overlap, within a memory budget."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from fa_stereo.config import AttentionConfig, ModelConfig
from fa_stereo.data.formats import read_picture_pair
from fa_stereo.errors import InputError
from fa_stereo.inference import load_predictor
from fa_stereo.models.psmnet import PSMNet, build_model
from fa_stereo.tiling import (
    DEFAULT_OVERLAP_PX,
    EXACT_OVERLAP_PX,
    choose_band_height,
    estimate_memory,
    predict_in_bands,
)


def tiny(**changes) -> PSMNet:
    torch.manual_seed(1)
    settings = {"base_channels": 4, "max_disparity": 16, "attention": AttentionConfig(key_channels=4)} | changes
    model = build_model(ModelConfig(**settings)).eval()
    for name, tensor in model.state_dict().items():
        if "attention" in name and tensor.is_floating_point() and not name.endswith("running_var"):
            tensor.normal_(0, 0.2)
        elif name.endswith(".norm.weight"):
            tensor.uniform_(0.3, 0.6)
    return model


@pytest.mark.parametrize("aggregation", ["stacked_hourglass", "basic"])
def test_enough_overlap_is_exact(aggregation: str) -> None:
    model = tiny(aggregation=aggregation).double()
    left, right = torch.randn(2, 1, 3, 1200, 20, dtype=torch.float64)
    with torch.inference_mode():
        expected = model(left, right)
        result = predict_in_bands(model, left, right, 304, EXACT_OVERLAP_PX)
    torch.testing.assert_close(result, expected, atol=1e-9, rtol=0)


@pytest.mark.parametrize("band_height", [16, 48, 64, 400])
def test_no_seams(band_height: int) -> None:
    """What bands change is small everywhere, and no larger at the borders between them than elsewhere."""
    model = tiny()
    left, right = torch.randn(2, 2, 3, 200, 50)
    with torch.inference_mode():
        expected = model(left, right)
        result = predict_in_bands(model, left, right, band_height)
    assert result.shape == expected.shape == (2, 200, 50)
    jump = (result.diff(dim=1) - expected.diff(dim=1)).abs()
    assert (result - expected).abs().max() < 0.02
    assert jump.max() < 0.02
    if band_height < 200:  # without overlap this test would see seams
        with torch.inference_mode():
            hard = predict_in_bands(model, left, right, band_height, overlap=0)
        assert (hard.diff(dim=1) - expected.diff(dim=1)).abs().max() > 0.02


def test_blending_leaves_nearly_all_of_the_overlap_as_context(shared_data: Path) -> None:
    """Bands of any height are as good as low ones: what is blended does not reach far into the overlap."""
    (folder,) = (shared_data / "middlebury2014/trainingQ").iterdir()
    views = [view[:, :240] for view in read_picture_pair(folder / "im0.png", folder / "im1.png")]
    expected = load_predictor("small", "cpu", "fp32")(*views).disparity
    for band_height in (64, 240):
        result = load_predictor("small", "cpu", "fp32", band_height=band_height)(*views).disparity
        assert np.abs(result - expected).max() < 0.05
        assert np.abs(result - expected).mean() < 2e-5


def test_hard_borders_without_overlap() -> None:
    model = tiny()
    left, right = torch.randn(2, 1, 3, 64, 48)
    with torch.inference_mode():
        result = predict_in_bands(model, left, right, 32, overlap=0)
        assert torch.isfinite(result).all()
        # The features still come from the whole picture: the first band is not what a picture of its rows gives.
        alone = model(left[:, :, :32], right[:, :, :32])
    assert (result[:, :32] - alone).abs().max() > 1e-3


def test_unusable_bands() -> None:
    model = tiny()
    left, right = torch.randn(2, 1, 3, 32, 32)
    for band_height, overlap in ((0, 16), (-16, 16), (20, 16), (16, 10), (16, -16)):
        with pytest.raises(InputError, match="multiple of 16"):
            predict_in_bands(model, left, right, band_height, overlap)
    with pytest.raises(ValueError, match="training mode"):
        predict_in_bands(model.train(), left, right, 16)


def test_band_height_for_a_budget() -> None:
    config = ModelConfig()
    whole = estimate_memory(config, 1080, 1920)
    assert whole < 6e9
    assert choose_band_height(config, 1080, 1920, whole) is None
    band = choose_band_height(config, 1080, 1920, int(0.7 * whole))
    assert band is not None
    assert band % 16 == 0
    assert estimate_memory(config, 1080, 1920, band) <= 0.7 * whole < estimate_memory(config, 1080, 1920, band + 16)
    assert estimate_memory(config, 1080, 1920, precision="bf16") < whole
    assert estimate_memory(config, 1080, 1920, precision="mixed") < whole
    with pytest.raises(InputError, match="even in the smallest bands"):
        choose_band_height(config, 1080, 1920, 10**8)
    assert 0 < DEFAULT_OVERLAP_PX < EXACT_OVERLAP_PX


PEAK = """
import sys, torch
from fa_stereo.config import AttentionConfig, ModelConfig
from fa_stereo.memory import keep_freed_memory
from fa_stereo.models.optimized import optimize_for_inference
from fa_stereo.models.psmnet import build_model
from fa_stereo.tiling import estimate_memory, predict_in_bands
torch.set_num_threads(1)
keep_freed_memory(whole=False)  # as the commands do

def peak_bytes():
    status = dict(line.split(":", 1) for line in open("/proc/self/status"))
    return int(status["VmHWM"].split()[0]) * 1024

config = ModelConfig(base_channels=16, attention=AttentionConfig(kind="none"))
model = optimize_for_inference(build_model(config))
band = int(sys.argv[1]) or None
with torch.inference_mode():
    model(*torch.zeros(2, 1, 3, 32, 32))
    before = peak_bytes()
    height, width = map(int, sys.argv[2:])
    pair = torch.zeros(2, 1, 3, height, width)
    predict_in_bands(model, *pair, band) if band else model(*pair)
print(peak_bytes() - before, estimate_memory(config, height, width, band))
"""


def test_attention_that_stores_a_map_is_counted() -> None:
    sizes = {}
    for kind in ("none", "factorized", "non_local"):
        config = ModelConfig(attention=AttentionConfig(kind=kind))
        sizes[kind] = estimate_memory(config, 544, 960)
    assert sizes["none"] == sizes["factorized"]
    assert sizes["non_local"] > 2 * 4 * (136 * 240) ** 2


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads the peak from /proc")
def test_memory_is_as_estimated() -> None:
    peaks = []
    for band, *size in ((0, 1280, 256), (64, 1280, 256), (16, 320, 480)):
        command = [sys.executable, "-c", PEAK, str(band), *map(str, size)]
        run = subprocess.run(command, capture_output=True, text=True, check=True)
        peak, estimate = map(int, run.stdout.split())
        assert peak < 1.1 * estimate  # the last without trimming: twice as much
        peaks.append(peak)
    assert peaks[1] < 0.9 * peaks[0]
