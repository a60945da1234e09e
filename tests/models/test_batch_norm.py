"""Batch norm's statistics, estimated anew."""

from __future__ import annotations

import copy

import pytest
import torch
from random_networks import randomize, tiny
from torch import Tensor, nn

from fa_stereo.models.batch_norm import reestimate_batch_norm
from fa_stereo.models.psmnet import build_model


def test_the_statistics_are_the_means_over_the_batches() -> None:
    model = randomize(build_model(tiny())).eval()
    before = copy.deepcopy(model.state_dict())
    batches = [(torch.randn(count, 3, 32, 48), torch.randn(count, 3, 32, 48)) for count in (2, 2, 4)]
    assert reestimate_batch_norm(model, iter(batches)) == 8
    assert not model.training

    seen: dict[nn.Module, list[Tensor]] = {}
    kinds = (nn.BatchNorm2d, nn.BatchNorm3d)
    norms = {name: module for name, module in model.named_modules() if isinstance(module, kinds)}
    for norm in norms.values():
        assert norm.momentum == 0.1
        norm.register_forward_pre_hook(lambda norm, inputs: seen.setdefault(norm, []).append(inputs[0]))
    after = copy.deepcopy(model.state_dict())
    with torch.no_grad():
        for left, right in batches:
            model.train()(left, right)
    for name, norm in norms.items():
        rows = [x.transpose(0, 1).flatten(1) for x in seen[norm]]  # [C, values of a channel]
        assert len(rows) == (6 if name.startswith("features") else 3)  # the features see both views
        means, variances = (torch.stack([f(x, dim=1) for x in rows]) for f in (torch.mean, torch.var))
        torch.testing.assert_close(after[f"{name}.running_mean"], means.mean(0), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(after[f"{name}.running_var"], variances.mean(0), rtol=1e-4, atol=1e-5)
    for name, tensor in before.items():
        if name.rpartition(".")[2] in ("weight", "bias"):
            assert torch.equal(after[name], tensor)


def test_no_pairs_change_nothing() -> None:
    model = randomize(build_model(tiny()))
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match="no pairs"):
        reestimate_batch_norm(model, [])
    assert model.training
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]), name
