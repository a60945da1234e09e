"""Attention in networks that know nothing of it."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
from collections import OrderedDict
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fa_stereo.attention import FactorizedAttention, TransformerBlock
from fa_stereo.attention.insertion import insert_attention
from fa_stereo.config import AttentionConfig
from fa_stereo.errors import InputError

SMALL = AttentionConfig(key_channels=4)


class Pyramid(nn.Module):
    """A network whose parts return a map, a dictionary, a list and a vector."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, stride=2, padding=1), nn.BatchNorm2d(8), nn.ReLU())
        self.deep = nn.Conv2d(8, 6, 3, stride=2, padding=1)
        self.levels = Levels()
        self.listed = Listed()
        self.unused = nn.Conv2d(8, 8, 1)
        self.head = nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        levels = self.levels(x, self.deep(x))
        small, large = self.listed(levels["deep"], levels["high"])
        vector: Tensor = self.head(small.mean((2, 3)) + large[:, :6].mean((2, 3)))
        return vector


class Levels(nn.Module):
    def forward(self, high: Tensor, deep: Tensor) -> dict[str, Tensor]:
        return OrderedDict(high=high * 2, deep=deep + 1)


class Listed(nn.Module):
    def forward(self, *maps: Tensor) -> list[Tensor]:
        return list(maps)


class InTurn(nn.ModuleDict):
    def forward(self, x: Tensor) -> Tensor:
        for child in self.values():
            x = child(x)
        return x


@pytest.fixture
def network() -> Pyramid:
    return Pyramid().eval()


@pytest.fixture
def picture() -> Tensor:
    return torch.rand(2, 3, 16, 20)


POSITIONS = {"stem": 8, "deep": 6, "levels:high": 8, "levels:deep": 6, "listed:0": 6, "stem.0": 8}


def test_blocks_start_as_the_identity_and_learn(network: Pyramid, picture: Tensor) -> None:
    before = network(picture)
    names = list(network.state_dict())
    blocks = insert_attention(network, dict.fromkeys(POSITIONS, SMALL), picture)
    assert {name: block.to_values.out_features for name, block in blocks.items()} == POSITIONS
    assert torch.equal(network(picture), before)
    assert [name for name in network.state_dict() if "attention" not in name] == names
    assert network.levels.attention_deep is blocks["levels:deep"]
    optimizer = torch.optim.SGD(network.parameters(), 1.0)
    for _ in range(2):
        optimizer.zero_grad()
        network(picture).square().sum().backward()
        optimizer.step()
    assert not torch.allclose(network(picture), before)
    for name, block in blocks.items():
        assert all(parameter.grad is not None and parameter.grad.any() for parameter in block.parameters()), name


def test_the_block_follows_its_module(network: Pyramid, picture: Tensor) -> None:
    """With weights in the block, what comes out of the position is the block applied to what came out before."""
    plain, outputs = copy.deepcopy(network), dict[str, Any]()
    for name in ("stem", "deep", "levels"):
        network.get_submodule(name).register_forward_hook(lambda m, i, out, name=name: outputs.update({name: out}))
    blocks = insert_attention(network, {"stem": SMALL, "levels:high": SMALL}, picture)
    for block in blocks.values():
        nn.init.normal_(block.to_values.weight)
    network(picture)
    stem = plain.stem(picture)
    torch.testing.assert_close(outputs["stem"], blocks["stem"](stem))
    after_stem = outputs["stem"]
    torch.testing.assert_close(outputs["levels"]["high"], blocks["levels:high"](2 * after_stem))
    torch.testing.assert_close(outputs["deep"], plain.deep(after_stem))


def test_networks_with_attention_are_copied_pickled_saved_and_loaded(network: Pyramid, picture: Tensor) -> None:
    checkpoint = copy.deepcopy(network.state_dict())
    blocks = insert_attention(network, dict.fromkeys(POSITIONS, SMALL), picture)
    for block in blocks.values():
        nn.init.normal_(block.to_values.weight)
    expected = network(picture)
    assert torch.equal(copy.deepcopy(network)(picture), expected)
    assert torch.equal(pickle.loads(pickle.dumps(network))(picture), expected)
    twin = copy.deepcopy(network)
    nn.init.zeros_(twin.deep.attention.to_values.weight)  # a block of its own, not this network's
    assert torch.equal(network(picture), expected)
    again = Pyramid().eval()
    insert_attention(again, dict.fromkeys(POSITIONS, SMALL), picture)
    again.load_state_dict(network.state_dict())
    assert torch.equal(again(picture), expected)
    assert not again.load_state_dict(checkpoint, strict=False).unexpected_keys


def test_the_network_is_otherwise_left_alone(picture: Tensor) -> None:
    network = Pyramid().double().train()
    network.deep.eval()
    statistics = network.stem[1].running_mean.clone()
    blocks = insert_attention(network, {"stem": SMALL, "deep": SMALL}, picture.double())
    assert torch.equal(network.stem[1].running_mean, statistics)
    assert network.training
    assert network.stem[1].training
    assert not network.deep.training
    assert blocks["stem"].training
    assert not blocks["deep"].training
    assert blocks["stem"].to_values.weight.dtype == torch.float64


def test_volumes_and_every_kind_of_block() -> None:
    video = nn.Sequential(nn.Conv3d(1, 8, 3, padding=1), nn.ReLU())
    clip = torch.rand(1, 1, 3, 6, 6)
    blocks = insert_attention(video, {"0": AttentionConfig(key_channels=4, transformer=True, heads=2)}, clip)
    assert isinstance(blocks["0"], TransformerBlock)
    assert video(clip).shape == (1, 8, 3, 6, 6)
    assert isinstance(insert_attention(video, {"": SMALL}, clip)[""], FactorizedAttention)  # after all of it


@pytest.mark.parametrize(
    ("position", "message"),
    [
        ("stemm", "no module 'stemm'; there are stem"),
        ("unused", "does not use this module"),
        ("head", r"needs a map \[B, c, H, W\].*returns a tensor \[2, 2\]"),
        ("levels", "returns a OrderedDict: name one of its maps"),
        ("levels:low", "by the keys high, deep"),
        ("listed:2", "by the keys 0, 1"),
        ("deep:0", "returns a Tensor: leave out the key"),
    ],
)
def test_positions_that_cannot_have_a_block(network: Pyramid, picture: Tensor, position: str, message: str) -> None:
    before = list(network.state_dict())
    with pytest.raises(InputError, match=message):
        insert_attention(network, {"deep": SMALL, position: SMALL}, picture)
    assert list(network.state_dict()) == before  # all or nothing


class OtherReturns(nn.Module):
    """Maps by numbers, and in a tuple."""

    def __init__(self) -> None:
        super().__init__()
        self.numbered = Numbered()
        self.paired = Paired()

    def forward(self, x: Tensor) -> Tensor:
        return self.numbered(x)[3] + self.paired(x)[0]


class Numbered(nn.Module):
    def forward(self, x: Tensor) -> dict[int, Tensor]:
        return {3: x + 1}


class Paired(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x, x


def test_keys_that_are_numbers_and_maps_in_tuples(picture: Tensor) -> None:
    network = OtherReturns()
    before = network(picture)
    block = insert_attention(network, {"numbered:3": SMALL}, picture)["numbered:3"]
    assert torch.equal(network(picture), before)
    nn.init.ones_(next(iter(list(block.parameters())[::-1])))  # no longer the identity
    assert not torch.equal(network(picture), before)
    for position in ("paired", "paired:0"):
        with pytest.raises(InputError, match="returns a tuple: name a module inside it"):
            insert_attention(network, {position: SMALL}, picture)


def test_a_place_is_taken_once_and_containers_are_refused(network: Pyramid, picture: Tensor) -> None:
    insert_attention(network, {"deep": SMALL}, picture)
    with pytest.raises(InputError, match="has 'attention' already"):
        insert_attention(network, {"deep": SMALL}, picture)
    in_turn = nn.Sequential(InTurn({"a": nn.Conv2d(3, 4, 1)}))
    with pytest.raises(InputError, match="runs its children in a way of its own"):
        insert_attention(in_turn, {"0": SMALL}, picture)
    assert set(insert_attention(in_turn, {"0.a": SMALL}, picture)) == {"0.a"}


def test_attention_works_without_the_rest() -> None:
    """Importing it, with what is for other networks, loads neither this network nor anything for pictures."""
    program = (
        "import sys, fa_stereo.attention, fa_stereo.attention.insertion, fa_stereo.attention.masks; "
        "print(*(name for name in sys.modules if name.partition('.')[0] in "
        "('fa_stereo', 'hydra', 'omegaconf', 'cv2', 'PIL', 'torchvision', 'matplotlib', 'tensorboard')))"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    loaded = {name for name in result.stdout.split() if name.startswith("fa_stereo")}
    assert {name for name in loaded if not name.startswith("fa_stereo.attention")} == {
        "fa_stereo", "fa_stereo.config", "fa_stereo.errors",
    }  # fmt: skip
    assert not {"hydra", "omegaconf", "cv2", "PIL", "torchvision", "matplotlib", "tensorboard"} & set(
        result.stdout.split()
    )
