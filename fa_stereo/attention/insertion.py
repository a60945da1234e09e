"""Attention blocks in anybody's network: behind modules that are named, without touching the network's code."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from fa_stereo.attention import build_attention
from fa_stereo.config import AttentionConfig
from fa_stereo.errors import InputError


def insert_attention(
    network: nn.Module, positions: Mapping[str, AttentionConfig], *example: Any
) -> dict[str, nn.Module]:
    """Put attention blocks behind modules of a network, in place.

    Each block starts as the identity: the network computes what it did until it is trained. A block becomes the child
    ``attention`` (or ``attention_KEY``) of the module it follows, so that it is trained, moved and saved with the
    network; all names there were before stay, and a checkpoint of the network without attention still loads into it
    with ``strict=False``.

    Args:
        network: Any network of maps [B, c, H, W] or volumes [B, c, D, H, W].
        positions: The block by the name of the module that it follows, as ``named_modules`` has it. Of a module that
            returns several maps in a dictionary or list, one is named by its key: ``fpn:pool``, ``neck:0``.
        *example: What the network can be called with: it is run once, to learn the maps' channels.

    Returns:
        The blocks by the names in ``positions``.

    Raises:
        InputError: A module is not there, is not used by the example, returns no map, has a block already, or runs its
            children in a way of its own, which would include the block.

    Examples:
        >>> network = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3))
        >>> picture = torch.rand(1, 3, 9, 9)
        >>> before = network(picture)
        >>> blocks = insert_attention(network, {"1": AttentionConfig(key_channels=4)}, picture)
        >>> blocks["1"].to_values.weight.shape, torch.equal(network(picture), before)
        (torch.Size([8, 8]), True)
    """
    places = {name: _find(network, name) for name in positions}
    outputs = _record_outputs(network, {name: module for name, (module, _) in places.items()}, example)
    blocks = {}
    for name, (module, key) in places.items():
        if name not in outputs:
            raise InputError(f"{name}: the network does not use this module, so no attention can follow it")
        features = _pick(name, outputs[name], key)
        block = build_attention(positions[name], features.shape[1])
        blocks[name] = block.to(features.device, features.dtype).train(module.training)
    for name, (module, key) in places.items():
        child = _child_name(key)
        module.add_module(child, blocks[name])
        if not isinstance(module, nn.Sequential):  # which runs a child that is added after the others anyway
            module.register_forward_hook(partial(_attend, child, key))
    return blocks


def _attend(child: str, key: str | None, module: nn.Module, _: tuple[Any, ...], output: Any) -> Any:
    """Forward hook: apply the module's block to its output, or to one of its outputs."""
    block = module.get_submodule(child)
    if key is None:
        return block(output)
    place = _place(output, key)
    output[place] = block(output[place])
    return output


def _place(output: Any, key: str) -> Any:
    """Return the index or the key, of whatever type, that a position's key means in a list or a dict of maps."""
    places = range(len(output)) if isinstance(output, list) else output
    return next((place for place in places if str(place) == key), None)


def _child_name(key: str | None) -> str:
    return "attention" if key is None else f"attention_{key}".replace(".", "_")


def _find(network: nn.Module, name: str) -> tuple[nn.Module, str | None]:
    """Return the module and the key that a position names."""
    path, _, key = name.partition(":")
    modules = dict(network.named_modules())
    if path not in modules:
        close = difflib.get_close_matches(path, modules, n=3) or [child for child, _ in network.named_children()][:8]
        raise InputError(f"{name}: the network has no module {path!r}; there are {', '.join(close)}")
    module = modules[path]
    if hasattr(module, _child_name(key or None)):
        raise InputError(f"{name}: this module has {_child_name(key or None)!r} already")
    in_turn = isinstance(module, nn.Sequential) and not key and type(module).forward is nn.Sequential.forward
    if isinstance(module, nn.Sequential | nn.ModuleDict | nn.ModuleList) and not in_turn:
        raise InputError(f"{name}: this module runs its children in a way of its own; name one of them instead")
    return module, key or None


def _record_outputs(network: nn.Module, modules: Mapping[str, nn.Module], example: tuple[Any, ...]) -> dict[str, Any]:
    """Run the network once, without leaving a trace in it, and return what the modules return."""
    outputs: dict[str, Any] = {}

    def record(name: str, _module: nn.Module, _inputs: tuple[Any, ...], output: Any) -> None:
        outputs.setdefault(name, output)

    hooks = [module.register_forward_hook(partial(record, name)) for name, module in modules.items()]
    training = [module for module in network.modules() if module.training]
    try:
        with torch.no_grad():
            network.eval()(*example)
    finally:
        for module in training:
            module.training = True
        for hook in hooks:
            hook.remove()
    return outputs


def _pick(name: str, output: Any, key: str | None) -> Tensor:
    """Return the map that a position names among the outputs of its module."""
    if key is not None and isinstance(output, dict | list):
        place = _place(output, key)
        if place is None:
            keys = output if isinstance(output, dict) else range(len(output))
            raise InputError(f"{name}: this module returns maps by the keys {', '.join(map(str, keys))}")
        output = output[place]
    elif isinstance(output, tuple):
        raise InputError(f"{name}: this module returns a tuple: name a module inside it that returns a map")
    elif key is not None or isinstance(output, dict | list):
        kind = type(output).__name__
        remedy = "leave out the key" if key is not None else "name one of its maps, as in NAME:KEY"
        raise InputError(f"{name}: this module returns a {kind}: {remedy}")
    if not isinstance(output, Tensor) or output.dim() not in (4, 5) or not output.is_floating_point():
        what = f"a tensor {list(output.shape)}" if isinstance(output, Tensor) else f"a {type(output).__name__}"
        raise InputError(f"{name}: attention needs a map [B, c, H, W] or [B, c, D, H, W], this module returns {what}")
    return output
