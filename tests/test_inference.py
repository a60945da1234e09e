"""The predictor's contract: what arrays it takes, what it returns, and what it refuses."""

from __future__ import annotations

import copy
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from random_networks import calibrated

from fa_stereo.cli.demo import read_demo_pair
from fa_stereo.config import ModelConfig
from fa_stereo.data.transforms import normalize_images
from fa_stereo.errors import InputError
from fa_stereo.geometry import warp_right_to_left
from fa_stereo.inference import DisparityPredictor, choose_device, choose_precision, load_predictor
from fa_stereo.machine import compute_float32_in_full
from fa_stereo.models.checkpoint import save_weights
from fa_stereo.models.optimized import cpu_computes_bfloat16, cpu_computes_float16
from fa_stereo.models.psmnet import PSMNet, build_model
from fa_stereo.tiling import estimate_memory
from fa_stereo.weights import find_checkpoint
from tests.gpu import needs_gpu


@pytest.fixture(scope="module")
def model() -> PSMNet:
    return calibrated()


@pytest.fixture(scope="module")
def predictor(model: PSMNet) -> DisparityPredictor:
    return DisparityPredictor(model, device="cpu", precision="fp32")


def random_pair(height: int = 40, width: int = 56, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    left, right = rng.integers(0, 256, (2, height, width, 3), dtype=np.uint8)
    return left, right


def test_prediction_is_the_networks_own_answer(predictor: DisparityPredictor, model: PSMNet) -> None:
    left, right = random_pair()
    prediction = predictor(left, right)
    tensors = [normalize_images(torch.from_numpy(view).permute(2, 0, 1)[None]) for view in (left, right)]
    with torch.no_grad():
        expected = model(*tensors)[0].numpy()
    assert prediction.disparity.dtype == np.float32
    assert prediction.disparity.shape == (40, 56)
    np.testing.assert_allclose(prediction.disparity, expected, atol=5e-3)  # batch norm is folded in float32
    assert (prediction.device, prediction.precision) == ("cpu", "fp32")
    assert prediction.seconds > 0
    assert 0 <= prediction.disparity.min() <= prediction.disparity.max() < 32


def test_the_callers_autocast_changes_nothing(predictor: DisparityPredictor) -> None:
    expected = predictor(*random_pair()).disparity
    with torch.autocast("cpu", dtype=torch.bfloat16):
        np.testing.assert_array_equal(predictor(*random_pair()).disparity, expected)


@pytest.mark.parametrize("precision", ["fp16", "bf16", "mixed", "fp32"])
def test_a_precision_without_hardware_is_reported(
    model: PSMNet, precision: str, caplog: pytest.LogCaptureFixture
) -> None:
    DisparityPredictor(copy.deepcopy(model), device="cpu", precision=precision)
    slow = precision != "fp32" and not (cpu_computes_float16() if precision == "fp16" else cpu_computes_bfloat16())
    assert (f"{precision} is far slower than fp32 on this CPU" in caplog.text) == slow


def test_a_cuda_graph_is_of_whole_pictures(model: PSMNet) -> None:
    with pytest.raises(InputError, match="a CUDA graph is of whole pictures"):
        DisparityPredictor(model, device="cpu", cuda_graph=True, band_height=32)


def test_channel_order_matters_and_views_are_not_swapped(predictor: DisparityPredictor) -> None:
    left, right = random_pair()
    result = predictor(left, right).disparity
    assert not np.allclose(result, predictor(right, left).disparity)
    assert not np.allclose(result, predictor(left[..., ::-1], right[..., ::-1]).disparity)


@pytest.mark.parametrize("size", [(16, 16), (17, 31), (48, 33), (16, 100)])
def test_any_size_from_16_up(predictor: DisparityPredictor, size: tuple[int, int]) -> None:
    disparity = predictor(*random_pair(*size)).disparity
    assert disparity.shape == size
    assert np.isfinite(disparity).all()


def test_the_right_view_is_a_left_one_in_the_mirror(model: PSMNet) -> None:
    left, right = random_pair()
    predictor = DisparityPredictor(model, device="cpu", precision="fp32", confidence=True)
    prediction = predictor.predict_right(left, right)
    mirrored = predictor(right[:, ::-1], left[:, ::-1])
    np.testing.assert_array_equal(prediction.disparity, mirrored.disparity[:, ::-1])
    pair = read_demo_pair()
    disparity = torch.from_numpy(load_predictor("small", "cpu").predict_right(pair.left, pair.right).disparity)[None]
    left_view, right_view = (torch.from_numpy(view).movedim(-1, 0)[None].float() for view in (pair.left, pair.right))
    differences = []
    for sign in (1, -1):  # x_left = x_right + d
        warped, mask = warp_right_to_left(left_view, -sign * disparity)
        differences.append(float((warped - right_view).abs().mean(1)[mask].mean()))
    assert differences[0] < 0.5 * differences[1]
    np.testing.assert_array_equal(prediction.confidence, mirrored.confidence[:, ::-1])
    with pytest.raises(InputError, match="right must be uint8"):
        predictor.predict_right(left, right.astype(np.float32))


def test_memory_order_does_not_matter_and_inputs_stay_as_they_are(predictor: DisparityPredictor) -> None:
    left, right = random_pair()
    expected = predictor(left, right).disparity
    columns_first = [np.asfortranarray(view) for view in (left, right)]
    mirrored_views = [np.ascontiguousarray(view[:, ::-1])[:, ::-1] for view in (left, right)]  # negative strides
    read_only = [view.copy() for view in (left, right)]
    for view in read_only:
        view.flags.writeable = False
    for pair in (columns_first, mirrored_views, read_only):
        np.testing.assert_array_equal(predictor(*pair).disparity, expected)
    np.testing.assert_array_equal(left, random_pair()[0])


def test_grey_counts_as_equal_channels(predictor: DisparityPredictor) -> None:
    left, right = (view[..., 0] for view in random_pair())
    colour = [np.repeat(view[..., None], 3, axis=2) for view in (left, right)]
    np.testing.assert_array_equal(predictor(left, right).disparity, predictor(*colour).disparity)


@pytest.mark.parametrize(
    ("left", "right", "message"),
    [
        (np.zeros((32, 32, 3)), np.zeros((32, 32, 3)), "left must be uint8 with values 0 to 255, got float64"),
        (np.zeros((32, 32, 3), np.uint8), np.zeros((32, 32, 3), np.uint16), "right must be uint8"),
        (np.zeros((32, 32, 4), np.uint8), np.zeros((32, 32, 4), np.uint8), r"left must be RGB.*\[32, 32, 4\]"),
        (np.zeros((3, 32, 32), np.uint8), np.zeros((3, 32, 32), np.uint8), "left must be RGB"),
        (np.zeros((1, 32, 32, 3), np.uint8), np.zeros((1, 32, 32, 3), np.uint8), "left must be RGB"),
        (np.zeros((32, 32, 3), np.uint8), np.zeros((32, 33, 3), np.uint8), "one size, got 32x32 and 33x32"),
        (np.zeros((15, 32, 3), np.uint8), np.zeros((15, 32, 3), np.uint8), "at least 16x16, got 32x15"),
        (np.zeros((0, 0, 3), np.uint8), np.zeros((0, 0, 3), np.uint8), "at least 16x16, got 0x0"),
        ([[0]], [[0]], "left must be a numpy array, got list"),
        (None, None, "left must be a numpy array, got NoneType"),
    ],
)
def test_other_arrays_are_refused(predictor: DisparityPredictor, left: object, right: object, message: str) -> None:
    with pytest.raises(InputError, match=message):
        predictor(left, right)  # type: ignore[arg-type]


def test_threads_may_share_a_predictor(predictor: DisparityPredictor) -> None:
    pairs = [random_pair(seed=seed) for seed in range(6)]
    expected = [predictor(*pair).disparity for pair in pairs]
    with ThreadPoolExecutor(3) as pool:
        results = list(pool.map(lambda pair: predictor(*pair).disparity, pairs))
    for result, reference in zip(results, expected, strict=True):
        np.testing.assert_allclose(result, reference, atol=1e-5)


def test_low_precision_is_near_and_its_regression_is_not_rounded(model: PSMNet) -> None:
    left, right = random_pair(64, 96)
    full = DisparityPredictor(model, device="cpu", precision="fp32")(left, right).disparity
    low = DisparityPredictor(model, device="cpu", precision="bf16")(left, right)
    assert low.precision == "bf16"
    assert low.disparity.dtype == np.float32
    # An expectation computed in bfloat16 could only take the values that bfloat16 has: steps of 1/16 px at 10 px.
    rounded = torch.from_numpy(low.disparity).bfloat16().float().numpy()
    assert np.mean(rounded == low.disparity) < 0.1
    assert np.median(np.abs(low.disparity - full)) < 1
    mixed = DisparityPredictor(model, device="cpu", precision="mixed")(left, right)
    assert mixed.precision == "mixed"
    assert 0 < np.abs(mixed.disparity - full).mean() < np.abs(low.disparity - full).mean()


def test_a_result_that_is_not_finite_is_computed_again_in_fp32(model: PSMNet) -> None:
    overflowing = copy.deepcopy(model)
    overflowing.features.stem[2].norm.weight.data *= 1e6  # float16 ends at 65504
    left, right = random_pair()
    expected = DisparityPredictor(overflowing, device="cpu", precision="fp32")(left, right)
    prediction = DisparityPredictor(overflowing, device="cpu", precision="fp16")(left, right)
    np.testing.assert_array_equal(prediction.disparity, expected.disparity)
    assert prediction.precision == "fp32"


@pytest.mark.parametrize("scale", [0.5, 0.7, 2.0])
def test_scale(model: PSMNet, scale: float) -> None:
    left, right = random_pair(48, 96)
    disparity = DisparityPredictor(model, device="cpu", precision="fp32", scale=scale)(left, right).disparity
    height, width = round(48 * scale), round(96 * scale)
    method = cv2.INTER_AREA if scale < 1 else cv2.INTER_CUBIC
    small = [cv2.resize(view, (width, height), interpolation=method) for view in (left, right)]
    expected = DisparityPredictor(model, device="cpu", precision="fp32")(*small).disparity
    assert disparity.shape == (48, 96)
    np.testing.assert_allclose(disparity.mean(), expected.mean() * 96 / width, rtol=0.02)
    assert disparity.dtype == np.float32


def test_a_scale_is_the_only_one() -> None:
    """What belongs to the weights is two sizes for small pictures; asked for one, it is that one."""
    pair = random_pair(48, 96)
    found = {}
    for name, limit, scale in (
        ("alone", 0, None),
        ("both", 10_000, None),
        ("asked", 10_000, 1.0),
        ("half", 10_000, 0.5),
    ):
        network = calibrated()
        network.set_prediction(enlarge_below_px=limit)
        found[name] = DisparityPredictor(network, device="cpu", precision="fp32", scale=scale)(*pair).disparity
    half = DisparityPredictor(calibrated(), device="cpu", precision="fp32", scale=0.5)(*pair).disparity
    np.testing.assert_array_equal(found["asked"], found["alone"])
    np.testing.assert_array_equal(found["half"], half)
    assert np.abs(found["both"] - found["alone"]).max() > 0.1


@pytest.mark.parametrize("options", [{}, {"scale": 0.5}, {"band_height": 16}, {"cuda_graph": True}])
def test_confidence_beside_disparity(model: PSMNet, options: dict) -> None:
    left, right = random_pair(48, 96)
    predictor = DisparityPredictor(model, device="cpu", precision="fp32", confidence=True, **options)
    prediction = predictor(left, right)
    alone = DisparityPredictor(model, device="cpu", precision="fp32", **options)(left, right)
    assert alone.confidence is None
    np.testing.assert_array_equal(prediction.disparity, alone.disparity)
    assert prediction.confidence is not None
    assert (prediction.confidence.shape, prediction.confidence.dtype) == ((48, 96), np.float32)
    assert 0 < prediction.confidence.min() < prediction.confidence.max() <= 1


def test_bands_change_nothing_visible(model: PSMNet) -> None:
    left, right = random_pair(600, 64)
    expected = DisparityPredictor(model, device="cpu", precision="fp32")(left, right).disparity
    budget_gb = estimate_memory(model.config, 608, 64, band_height=96) / 1e9
    assert budget_gb < estimate_memory(model.config, 608, 64) / 1e9
    for options in ({"band_height": 64}, {"memory_gb": budget_gb}):
        disparity = DisparityPredictor(model, device="cpu", precision="fp32", **options)(left, right).disparity
        difference = np.abs(disparity - expected)
        assert np.quantile(difference, 0.999) < 0.5
        assert difference.mean() < 0.02


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scale": 0.0}, "scale must be positive"),
        ({"scale": float("nan")}, "scale must be positive"),
        ({"scale": 0.1}, "at scale 0.1 the pictures are 6x4, too small"),
        ({"band_height": 50}, "multiple of 16, got 50"),
        ({"band_height": 16.0}, "multiple of 16, got 16.0"),
        ({"memory_gb": 0}, "positive number of GB"),
        ({"memory_gb": 1e-6}, "even in the smallest bands"),
        ({"memory_gb": float("inf")}, "positive number of GB, got inf"),
        ({"memory_gb": 4, "band_height": 64}, "either the memory or the rows of a tile"),
    ],
)
def test_unusable_scales_and_bands(model: PSMNet, options: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        DisparityPredictor(model, device="cpu", **options)(*random_pair())


def test_more_memory_than_there_is_means_whole_pictures(model: PSMNet) -> None:
    pair = random_pair()
    whole = DisparityPredictor(model, device="cpu", precision="fp32")(*pair)
    within = DisparityPredictor(model, device="cpu", precision="fp32", memory_gb=1e300)(*pair)
    np.testing.assert_array_equal(within.disparity, whole.disparity)


@pytest.mark.parametrize("size", [(40, 56), (50, 75), (16, 16)])
def test_results_are_whole_arrays_of_their_own(model: PSMNet, size: tuple[int, int]) -> None:
    predictor = DisparityPredictor(model, device="cpu", precision="fp32", confidence=True)
    for predict in (predictor, predictor.predict_right):
        prediction = predict(*random_pair(*size))
        for values in (prediction.disparity, prediction.confidence):
            assert values is not None
            assert values.shape == size
            assert values.flags.c_contiguous


@pytest.mark.parametrize("name", ["device", "precision", "confidence", "compile", "cuda_graph"])
def test_what_the_networks_were_built_for_cannot_be_changed(predictor: DisparityPredictor, name: str) -> None:
    with pytest.raises(AttributeError):
        setattr(predictor, name, getattr(predictor, name))


def test_the_model_is_used_in_eval_mode() -> None:
    model = build_model(ModelConfig(base_channels=8, max_disparity=32)).train()
    left, right = random_pair()
    predictor = DisparityPredictor(model, device="cpu", precision="fp32")
    np.testing.assert_array_equal(predictor(left, right).disparity, predictor(left, right).disparity)
    assert not model.training


def test_devices_and_precisions_are_checked() -> None:
    cpu = torch.device("cpu")
    assert choose_device("cpu") == cpu
    assert choose_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")
    for wrong in ("gpu", "mps", "cuda:99", "meta"):
        with pytest.raises(InputError, match="device"):
            choose_device(wrong)
    assert choose_precision("auto", cpu) == (
        "fp16" if cpu_computes_float16() else "mixed" if cpu_computes_bfloat16() else "fp32"
    )
    assert choose_precision("auto", torch.device("cuda")) == "fp16"
    assert choose_precision("bf16", cpu) == "bf16"
    with pytest.raises(InputError, match="precision must be one of auto, fp32, bf16, fp16, mixed, got 'int8'"):
        choose_precision("int8", cpu)


def test_out_of_memory_is_an_input_error_and_other_failures_are_not(monkeypatch: pytest.MonkeyPatch) -> None:
    class Failing(torch.nn.Module):
        error: Exception = RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes")

        def forward(self, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
            raise self.error

    predictor = DisparityPredictor(Failing(), device="cpu", precision="fp32")  # type: ignore[arg-type]
    for error in (Failing.error, RuntimeError("could not create a primitive"), MemoryError()):
        monkeypatch.setattr(Failing, "error", error)
        with pytest.raises(InputError, match=r"not enough memory on cpu for 56x40 pictures: .*--memory"):
            predictor(*random_pair())
    monkeypatch.setattr(Failing, "error", RuntimeError("shapes cannot be multiplied"))
    with pytest.raises(RuntimeError, match="multiplied"):
        predictor(*random_pair())


@needs_gpu
@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 0.01), ("fp16", 0.5), ("auto", 0.5)])
def test_cuda_agrees_with_the_cpu(model: PSMNet, precision: str, tolerance: float) -> None:
    left, right = random_pair(64, 96)
    expected = DisparityPredictor(model, device="cpu", precision="fp32")(left, right).disparity
    compute_float32_in_full()
    prediction = DisparityPredictor(copy.deepcopy(model), device="cuda", precision=precision)(left, right)
    assert prediction.device.startswith("cuda")
    assert np.median(np.abs(prediction.disparity - expected)) < tolerance


# --------------------------------------------------------------------------------------------------------------------
# loading


def test_load_predictor_from_a_file(model: PSMNet, tmp_path: Path) -> None:
    path = tmp_path / "tiny.safetensors"
    save_weights(model, path)
    left, right = random_pair()
    expected = DisparityPredictor(model, device="cpu", precision="fp32")(left, right).disparity
    for weights in (path, str(path)):
        result = load_predictor(weights, device="cpu", precision="fp32")(left, right).disparity
        np.testing.assert_allclose(result, expected, atol=1e-5)


def test_another_regression(model: PSMNet, tmp_path: Path) -> None:
    save_weights(model, tmp_path / "w.safetensors")
    pair = random_pair()
    first, expectation, modal = (
        load_predictor(tmp_path / "w.safetensors", "cpu", "fp32", regression=kind)(*pair).disparity
        for kind in (None, "expectation", "modal")
    )
    np.testing.assert_array_equal(first, expectation)
    assert np.abs(modal - expectation).max() > 0.01
    with pytest.raises(InputError, match="regression must be one of"):
        load_predictor(tmp_path / "w.safetensors", "cpu", regression="mean")


def test_another_search_range(model: PSMNet, tmp_path: Path) -> None:
    path = tmp_path / "tiny.safetensors"
    save_weights(model, path)
    left, right = random_pair()
    assert load_predictor(path, device="cpu", max_disparity=64)(left, right).disparity.max() < 64
    same = load_predictor(path, device="cpu", max_disparity=32)(left, right).disparity
    np.testing.assert_array_equal(same, load_predictor(path, device="cpu")(left, right).disparity)
    with pytest.raises(InputError, match="max_disparity must be a positive multiple of 16, got 50"):
        load_predictor(path, device="cpu", max_disparity=50)


def test_bundled_weights_by_name_and_by_device(model: PSMNet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fa_stereo.weights._folder", lambda: tmp_path)
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    with pytest.raises(InputError, match="no weights come with this installation"):
        find_checkpoint(None, cpu)
    with pytest.raises(InputError, match="no bundled weights are called 'full'; bundled: none"):
        find_checkpoint("full", cpu)
    save_weights(model, tmp_path / "small.safetensors")
    assert find_checkpoint(None, cpu) == find_checkpoint(None, cuda) == tmp_path / "small.safetensors"
    save_weights(model, tmp_path / "full.safetensors")
    assert find_checkpoint(None, cpu).name == "small.safetensors"
    assert find_checkpoint(None, cuda).name == "full.safetensors"
    assert find_checkpoint("full", cpu).name == "full.safetensors"
    monkeypatch.chdir(tmp_path)
    Path("full").touch()
    assert find_checkpoint("./full", cpu) == Path("full")
    with pytest.raises(InputError, match="huge: neither a checkpoint file nor bundled weights"):
        find_checkpoint("huge", cpu)
    assert load_predictor(device="cpu").model.config.base_channels == 8


def test_a_missing_checkpoint_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"nowhere\.safetensors"):
        load_predictor(tmp_path / "nowhere.safetensors", device="cpu")


def test_damaged_weights_are_named() -> None:
    model = build_model(ModelConfig(base_channels=8, max_disparity=32))
    with torch.no_grad():
        model.features.projection.weight.fill_(torch.nan)
    picture = np.zeros((32, 48, 3), np.uint8)
    with pytest.raises(InputError, match="weights are damaged"):
        DisparityPredictor(model, device="cpu", precision="fp32")(picture, picture)
