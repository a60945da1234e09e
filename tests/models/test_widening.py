import copy
from pathlib import Path
from typing import Any

import pytest
import torch

from fa_stereo.cli.main import main
from fa_stereo.config import AttentionConfig, ModelConfig
from fa_stereo.export import find_record, samples_seen
from fa_stereo.models.checkpoint import load_model, save_weights
from fa_stereo.models.psmnet import PSMNet, StereoOutput, build_model
from fa_stereo.models.widening import widen
from tests.random_networks import randomize


def trained(aggregation: str = "stacked_hourglass", **attention: Any) -> PSMNet:
    """Return a network of 4 channels whose attention and batch norms have learnt something."""
    config = ModelConfig(
        base_channels=4, max_disparity=32, aggregation=aggregation,
        attention=AttentionConfig(**({"key_channels": 6} | attention)),
    )  # fmt: skip
    return randomize(build_model(config))


@pytest.fixture(params=["stacked_hourglass", "basic"])
def narrow(request: pytest.FixtureRequest) -> PSMNet:
    return trained(request.param).double()


def views() -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(2, 3, 64, 96, dtype=torch.float64), torch.randn(2, 3, 64, 96, dtype=torch.float64)


@pytest.mark.parametrize(
    "options",
    [
        {}, {"aggregation": "basic"}, {"heads": 2, "normalization": "dot"}, {"value_channels": 10},
        {"transformer": True}, {"kind": "non_local"}, {"kind": "axial", "heads": 2}, {"kind": "axial", "span": 5},
        {"kind": "resblock"}, {"kind": "resblock", "value_channels": 6}, {"kind": "none"},
    ],
)  # fmt: skip
def test_the_wide_network_is_the_same_function(options: dict[str, Any]) -> None:
    narrow = trained(**options).double()
    wide = widen(narrow)
    assert wide.config.base_channels == 8
    left, right = views()
    for training in (False, True):
        with torch.no_grad():
            expected, result = narrow.train(training)(left, right), wide.train(training)(left, right)
        if not training:
            assert isinstance(expected, torch.Tensor)
            assert expected.std() > 0.1
            torch.testing.assert_close(result, expected, atol=1e-9, rtol=0)
            continue
        assert isinstance(expected, StereoOutput)
        for a, b in zip(result.disparities, expected.disparities, strict=True):
            torch.testing.assert_close(a, b, atol=1e-9, rtol=0)


def test_its_halves_learn_different_things(narrow: PSMNet) -> None:
    left, right = views()
    weights = {}
    for noise in (0.0, 0.5):
        wide = widen(narrow, noise=noise).train()
        optimizer = torch.optim.SGD(wide.parameters(), 1e-3)
        for _ in range(2):
            optimizer.zero_grad()
            wide(left, right).disparities[-1].square().mean().backward()
            optimizer.step()
        first = wide.features.res2[0].conv1.conv.weight.detach()  # [16, 8, 3, 3]
        weights[noise] = (first[0::2].sum(1) - first[1::2].sum(1)).abs().max()  # of what both twins make of one input
    assert weights[0.0] < 1e-12
    assert weights[0.5] > 1e-9


def test_it_leaves_the_given_network_alone(narrow: PSMNet) -> None:
    before = copy.deepcopy(narrow.state_dict())
    first, second, other = widen(narrow, seed=1), widen(narrow, seed=1), widen(narrow, seed=2)
    for key, value in narrow.state_dict().items():
        assert torch.equal(value, before[key])
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(first.parameters(), other.parameters(), strict=True))


def test_the_command(narrow: PSMNet, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, out = tmp_path / "narrow.safetensors", tmp_path / "wide.safetensors"
    save_weights(narrow.float(), file, {"steps": 5, "samples_seen": 20})
    assert main(["widen-weights", str(file), "-o", str(out), "--seed", "3"]) == 0
    assert "base_channels 8 instead of 4" in capsys.readouterr().out
    expected = widen(narrow, seed=3).state_dict()
    assert all(torch.equal(tensor, expected[key]) for key, tensor in load_model(out).state_dict().items())
    assert samples_seen(find_record(out)) == 20  # training that goes on from here counts those before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["none.safetensors", "-o", "wide.safetensors"], "none.safetensors"),
        (["small", "-o", "wide.pt"], r"wide.pt: name the output *.safetensors"),
        (["small", "-o", "wide.safetensors", "--noise", "-1"], "--noise must be zero or more, got -1"),
        (["small", "-o", "wide.safetensors", "--seed", "4294967296"], "--seed must be from 0 to 4294967295"),
    ],
)
def test_unusable_options(
    options: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["widen-weights", *options]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error
    assert not list(tmp_path.iterdir())
