"""Recomputed activations: the same values, gradients and statistics, less memory."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from fa_stereo.config import AttentionConfig, ModelConfig
from fa_stereo.models.psmnet import build_model
from fa_stereo.models.recomputation import recompute


def step(aggregation: str, checkpointing: bool, frozen: bool, device: str) -> tuple[list[Tensor], dict, dict]:
    torch.manual_seed(0)
    attention = AttentionConfig(key_channels=8)
    model = build_model(
        ModelConfig(base_channels=8, max_disparity=32, attention=attention, aggregation=aggregation)
    ).double()
    model.train().to(device)
    left, right = torch.randn(2, 2, 3, 32, 64, dtype=torch.float64).to(device)
    if frozen:
        norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d | nn.BatchNorm3d)]
        for norm in norms:
            norm.momentum = None  # statistics of one batch, as they are
        with torch.no_grad():
            model(left, right)
        for norm in norms:
            norm.eval()
            assert norm.num_batches_tracked is not None
            norm.num_batches_tracked.zero_()
    model.activation_checkpointing = checkpointing
    output = model(left, right)
    sum(disparity.square().mean() for disparity in output.disparities).backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    return [*output.disparities, *output.logits], gradients, model.state_dict()


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("aggregation", ["stacked_hourglass", "basic"])
def test_the_same_step(aggregation: str, frozen: bool, device: str) -> None:
    """Statistics above all: each batch counts once, although it is normalised twice."""
    outputs, gradients, state = step(aggregation, False, frozen, device)
    checkpointed_outputs, checkpointed_gradients, checkpointed_state = step(aggregation, True, frozen, device)
    for ours, expected in zip(checkpointed_outputs, outputs, strict=True):
        largest = float(expected.detach().abs().max())
        torch.testing.assert_close(ours, expected, atol=1e-12 * max(largest, 1), rtol=0)
    assert max(float(gradient.abs().max()) for gradient in gradients.values()) > 1e-3
    for name, expected in gradients.items():
        torch.testing.assert_close(checkpointed_gradients[name], expected, atol=1e-9, rtol=1e-9, msg=name)
    for name, expected in state.items():
        torch.testing.assert_close(checkpointed_state[name], expected, atol=1e-12, rtol=0, msg=name)
    counters = [tensor.item() for name, tensor in checkpointed_state.items() if name.endswith("num_batches_tracked")]
    features = 2 * sum(name.startswith("features") and name.endswith("num_batches_tracked") for name in state)
    others = sum(name.startswith("aggregation") and name.endswith("num_batches_tracked") for name in state)
    assert sum(counters) == (0 if frozen else features + others)


def test_statistics_are_recorded_again_afterwards() -> None:
    norm = nn.BatchNorm1d(3)
    x = torch.randn(5, 3, requires_grad=True)
    out = recompute(norm, x)
    out.sum().backward(retain_graph=True)
    out.sum().backward()
    assert norm.track_running_stats
    assert norm.num_batches_tracked == 1
    recompute(norm, x).sum().backward()
    assert norm.num_batches_tracked == 2


def test_less_is_kept_for_the_backward_pass() -> None:
    def kept(checkpointing: bool) -> int:
        model = build_model(ModelConfig(base_channels=8, max_disparity=32, attention=AttentionConfig(kind="none")))
        model.train().activation_checkpointing = checkpointing
        storages: dict[int, int] = {}

        def pack(tensor: Tensor) -> Tensor:
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        left, right = torch.randn(2, 2, 3, 32, 64)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            output = model(left, right)
        assert output.disparities[-1].requires_grad
        return sum(storages.values())

    assert kept(True) < 0.5 * kept(False)


def test_no_effect_without_gradients() -> None:
    model = build_model(ModelConfig(base_channels=8, max_disparity=32)).eval()
    left, right = torch.randn(2, 1, 3, 32, 64)
    with torch.inference_mode():
        expected = model(left, right)
        model.activation_checkpointing = True
        assert torch.equal(model(left, right), expected)
