"""torch.compile: the same function, in values and gradients, for the two parts that it takes."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from training_runs import tiny_config, write_pairs

from fa_stereo import compilation, inference, training
from fa_stereo.compilation import check_compiler, compile_network, uncompiled
from fa_stereo.config import AttentionConfig, ModelConfig
from fa_stereo.errors import InputError
from fa_stereo.inference import DisparityPredictor
from fa_stereo.models import fused
from fa_stereo.models.batch_norm import set_batch_norm_to_eval
from fa_stereo.models.checkpoint import load_model
from fa_stereo.models.optimized import optimize_for_inference
from fa_stereo.models.psmnet import PSMNet, build_model
from fa_stereo.training import Trainer


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    """Forget what earlier tests compiled and found out."""
    torch.compiler.reset()
    check_compiler.cache_clear()
    yield
    check_compiler.cache_clear()


def tiny(**changes: Any) -> PSMNet:
    torch.manual_seed(0)
    attention = AttentionConfig(key_channels=4)
    return build_model(ModelConfig(base_channels=4, max_disparity=16, attention=attention, **changes))


def counting_backend(calls: list[int]) -> Callable[..., Any]:
    """Return a backend that runs graphs as they are and records how many operations each has."""

    def backend(graph: torch.fx.GraphModule, _: list[torch.Tensor]) -> Callable[..., Any]:
        calls.append(len(graph.graph.nodes))
        return graph.forward

    return backend


@pytest.mark.parametrize("aggregation", ["stacked_hourglass", "basic"])
def test_same_disparity(aggregation: str) -> None:
    # In float64: fresh weights give peaked scores, which lift float32's rounding to 1e-4 px and above.
    model = optimize_for_inference(tiny(aggregation=aggregation).double().eval())
    compiled = compile_network(copy.deepcopy(model), backend="aot_eager")
    views = torch.randn(2, 1, 3, 32, 64, dtype=torch.float64)
    torch.testing.assert_close(compiled(*views), model(*views), atol=1e-9, rtol=0)
    wider = torch.randn(2, 2, 3, 48, 80, dtype=torch.float64)  # other sizes are compiled anew
    torch.testing.assert_close(compiled(*wider), model(*wider), atol=1e-9, rtol=0)


@pytest.mark.parametrize("precision", ["fp32", "mixed"])
def test_same_disparity_as_predicted(precision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without gradients the network works in slabs: what is compiled then is other code."""
    model = tiny().eval()
    monkeypatch.setattr(
        fused, "works", lambda dtype: False
    )  # which rounds bfloat16 once where compiled code does twice
    monkeypatch.setattr(inference, "compile_network", functools.partial(compile_network, backend="aot_eager"))
    pair = np.random.default_rng(0).integers(0, 256, (2, 32, 64, 3), np.uint8)
    plain, compiled = (
        DisparityPredictor(model, device="cpu", precision=precision, compile=wanted)(*pair).disparity
        for wanted in (False, True)
    )
    np.testing.assert_allclose(compiled, plain, atol=1e-3 if precision == "fp32" else 0.2)


def test_same_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "compile_network", functools.partial(compile_network, backend="aot_eager"))
    pairs = write_pairs(tmp_path / "pairs")
    weights = []
    for name, wanted in (("plain", False), ("compiled", True)):
        config = tiny_config(pairs, tmp_path / name, trainer__compile=wanted, trainer__max_steps=2)
        Trainer(config).run()
        weights.append(load_model(tmp_path / name / "weights.safetensors").state_dict())
    assert weights[0].keys() == weights[1].keys()
    for key, value in weights[0].items():
        torch.testing.assert_close(weights[1][key], value, atol=1e-4, rtol=1e-3, msg=lambda m, k=key: f"{k}: {m}")


@pytest.mark.parametrize("frozen", [False, True])
def test_same_gradients(frozen: bool) -> None:
    model = tiny().double().train()
    if frozen:
        set_batch_norm_to_eval(model)
    compiled = compile_network(copy.deepcopy(model), backend="aot_eager")
    views = torch.randn(2, 2, 3, 64, 64, dtype=torch.float64)
    gradients = []
    for network in (model, compiled):
        outputs = network(*views).disparities
        sum(disparity.square().mean() for disparity in outputs).backward()
        gradients.append({name: parameter.grad for name, parameter in network.named_parameters()})
    assert gradients[0].keys() == gradients[1].keys()  # compiled parameters keep their names
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(
            gradients[1][name], gradient, atol=1e-8, rtol=1e-6, msg=lambda m, n=name: f"{n}: {m}"
        )


def test_whole_parts_are_compiled_and_copies_are_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compilation, "check_compiler", lambda *_: None)
    calls: list[int] = []
    model = tiny().eval()
    plain = copy.deepcopy(model)
    compile_network(model, backend=counting_backend(calls))  # type: ignore[arg-type]
    views = torch.randn(2, 1, 3, 32, 32)
    with torch.inference_mode():
        plain(*views)
        copy.deepcopy(model)(*views)
        with uncompiled():
            model(*views)
        assert calls == []
        model(*views)
    assert sum(calls) > 100
    found = len(calls)
    with torch.inference_mode():
        model(*views)
    assert len(calls) == found  # the same size again


def test_inductor_computes_the_same_disparity() -> None:
    """The real compiler, in inference and on the variant with fewer convolutions: it takes its time."""
    try:
        check_compiler(torch.device("cpu"))
    except InputError as error:
        pytest.skip(str(error))
    model = optimize_for_inference(tiny(aggregation="basic").eval())
    compiled = compile_network(copy.deepcopy(model))
    views = torch.randn(2, 1, 3, 32, 32)
    with torch.inference_mode():
        torch.testing.assert_close(compiled(*views), model(*views), atol=1e-3, rtol=0)
        for found, expected in zip(compiled.extract_features(*views), model.extract_features(*views), strict=True):
            torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


def test_a_missing_compiler_is_an_input_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object, **__: object) -> None:
        raise RuntimeError("InvalidCxxCompiler: no working C++ compiler found\nand a long story")

    monkeypatch.setattr(torch, "compile", fails)
    with pytest.raises(InputError, match=r"does not work here \(InvalidCxxCompiler.*found\): install a C\+\+ compiler"):
        compile_network(tiny())


def test_a_compiler_that_is_wrong_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", lambda *_, **__: lambda x: x)
    with pytest.raises(InputError, match="it computes wrong results"):
        check_compiler(torch.device("cpu"))
