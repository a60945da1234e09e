"""CUDA graphs: which sizes are recorded and kept, and on a GPU that they compute the same."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor, nn

from fa_stereo.config import ModelConfig
from fa_stereo.cuda_graph import GraphedNetwork, GraphedPass, Network, Passes, record_cuda_graph
from fa_stereo.errors import InputError
from fa_stereo.models.optimized import optimize_for_inference
from fa_stereo.models.psmnet import build_model
from tests.gpu import needs_gpu
from tests.random_networks import calibrated


class Recorder:
    """Stands for the recording of graphs, which only a GPU can; tells the sizes recorded and replayed."""

    def __init__(self) -> None:
        self.recorded: list[int] = []
        self.replayed: list[int] = []

    def __call__(self, network: Network, left: Tensor, right: Tensor) -> Network:
        self.recorded.append(left.shape[-1])

        def replay(left: Tensor, right: Tensor) -> Tensor:
            self.replayed.append(left.shape[-1])
            return network(left, right)

        return replay


def views(width: int) -> tuple[Tensor, Tensor]:
    return torch.full((1, 3, 4, width), 3.0), torch.full((1, 3, 4, width), 1.0)


def difference(left: Tensor, right: Tensor) -> Tensor:
    return (left - right).mean(1)


def test_a_graph_from_the_second_pair_of_a_size_in_a_row_on() -> None:
    recorder = Recorder()
    network = GraphedNetwork(difference, record=recorder)
    for width in (4, 8, 4, 8, 8, 8, 4, 4):
        assert torch.equal(network(*views(width)), torch.full((1, 4, width), 2.0))
    assert recorder.recorded == [8, 4]
    assert recorder.replayed == [8, 8, 4]


def test_the_sizes_used_last_are_kept() -> None:
    recorder = Recorder()
    network = GraphedNetwork(difference, most_graphs=2, record=recorder)
    for width in (4, 4, 8, 8, 4, 12, 12, 4, 8, 8):
        network(*views(width))
    assert recorder.recorded == [4, 8, 12, 8]  # 12 took the place of 8, and 8 that of 12


def test_several_results_are_passed_on() -> None:
    network = GraphedNetwork(lambda left, right: (left, right), record=Recorder())
    for _ in range(2):
        assert all(map(torch.equal, network(*views(4)), views(4)))


def test_without_a_gpu_the_network_is_only_called() -> None:
    network = GraphedNetwork(difference)
    for _ in range(3):
        assert torch.equal(network(*views(4)), torch.full((1, 4, 4), 2.0))


def test_the_network_neither_waits_for_a_value_nor_copies_one_to_the_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Recording allows neither; here on the CPU, up to the regression, which has its own kernel on a GPU."""

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("recording as a CUDA graph would fail here")

    torch.manual_seed(0)
    model = optimize_for_inference(build_model(ModelConfig(base_channels=8, max_disparity=32)))
    pair = torch.randn(2, 1, 3, 64, 96)
    for owner, name in ((torch, "tensor"), (torch, "as_tensor"), (Tensor, "item"), (Tensor, "tolist")):
        monkeypatch.setattr(owner, name, refuse)
    with torch.inference_mode():
        (scores,) = model.score(*model.extract_features(*pair))
    assert scores.shape == (1, 8, 16, 24)


@needs_gpu
@pytest.mark.parametrize("confidence", [False, True])
@pytest.mark.parametrize("regression", ["expectation", "modal"])
def test_a_recorded_network_computes_the_same(regression: str, confidence: bool) -> None:
    model = calibrated()
    model.set_prediction(regression=regression)
    network = partial(optimize_for_inference(model.cuda()), confidence=confidence)
    pairs = [torch.randn(2, 1, 3, 64, 96, device="cuda") for _ in range(3)]
    with torch.inference_mode():
        replay = record_cuda_graph(network, *pairs[0])
        results = [replay(*pair) for pair in pairs]
        for pair, result in zip(pairs, results, strict=True):
            torch.testing.assert_close(result, network(*pair), atol=0.01, rtol=0)


@needs_gpu
def test_what_cannot_be_recorded_is_an_input_error() -> None:
    def waits(left: Tensor, right: Tensor) -> Tensor:
        return left * float(right.max())

    pair = torch.randn(2, 1, 3, 16, 16, device="cuda")
    with torch.inference_mode(), pytest.raises(InputError, match="cannot be recorded as a CUDA graph"):
        record_cuda_graph(waits, *pair)


# --------------------------------------------------------------------------------------------------------------------
# passes of training


def passes_of(weight: nn.Parameter) -> Passes:
    """Return passes forward and backward of a loss whose gradient for ``weight`` is the sum of the input."""

    def passes(x: Tensor) -> tuple[Tensor, ...]:
        loss = (weight * x).sum()
        loss.backward()
        return (loss.detach(),)

    return passes


def test_passes_are_recorded_at_the_fourth_call_of_the_first_size() -> None:
    weight, recorded, replayed = nn.Parameter(torch.tensor(2.0)), [], []

    def record(passes: Passes, inputs: tuple[Tensor, ...]) -> Passes:
        assert weight.grad is not None
        recorded.append([len(x) for x in inputs])

        def replay(*inputs: Tensor) -> tuple[Tensor, ...]:
            replayed.append(len(inputs[0]))
            return passes(*inputs)

        return replay

    graphed = GraphedPass(passes_of(weight), [weight], record)
    for count, length in enumerate((5, 7, 5, 7, 7, 5, 5, 7, 5), start=1):
        weight.grad = None if count == 7 else weight.grad  # as though no gradient had ever been asked for
        assert graphed(torch.ones(length))[0] == 2 * length
    assert recorded == [[5]]
    assert replayed == [5, 5]
    assert weight.grad == 5 + 7 + 5


@needs_gpu
def test_recorded_passes_add_to_gradients() -> None:
    weight = nn.Parameter(torch.tensor(2.0, device="cuda"))
    graphed, expected = GraphedPass(passes_of(weight), [weight]), 0.0
    for call in range(6):
        x = torch.arange(call, call + 4, device="cuda", dtype=torch.float32)
        (loss,) = graphed(x)
        expected += float(x.sum())
        assert weight.grad == expected
        assert loss == 2 * x.sum()


@needs_gpu
def test_passes_that_cannot_be_recorded_are_an_input_error() -> None:
    weight = nn.Parameter(torch.tensor(2.0, device="cuda"))

    def waits(x: Tensor) -> tuple[Tensor, ...]:
        return passes_of(weight)(x * float(x.max()))

    graphed = GraphedPass(waits, [weight])
    x = torch.ones(4, device="cuda")
    for _ in range(3):
        graphed(x)
    with pytest.raises(InputError, match="this training step cannot be recorded as a CUDA graph"):
        graphed(x)
