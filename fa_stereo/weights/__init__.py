"""The weights that come with the package: files ``small.safetensors`` and ``full.safetensors`` of this folder."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from fa_stereo.errors import InputError
from fa_stereo.files import expand_user

if TYPE_CHECKING:
    import torch

WEIGHT_NAMES = ("small", "full")


def list_weights() -> list[str]:
    """Return the names of the weights bundled with this installation, e.g. ``["small"]``.

    Each name is accepted by ``fa_stereo.load_predictor`` and ``load_model``, and by ``--weights`` on the command line.
    """
    return [name for name in WEIGHT_NAMES if _file_of(name).is_file()]


def default_weights(device_type: str) -> str:
    """Return the name of the weights to use where none are asked for.

    Args:
        device_type: ``cpu`` or ``cuda``. A GPU takes the full model if it is there, a CPU the small one.

    Raises:
        InputError: No weights are bundled.
    """
    preferred = ("full", "small") if device_type == "cuda" else ("small", "full")
    bundled = list_weights()
    for name in preferred:
        if name in bundled:
            return name
    raise InputError(
        f"no weights come with this installation (looked in {_folder()}): name a checkpoint of your own, e.g. "
        "--checkpoint runs/train/weights.safetensors"
    )


def find_weights(name: str) -> Path:
    """Return the file of bundled weights.

    Args:
        name: One of ``list_weights()``.

    Raises:
        InputError: There are no weights of that name; those that exist are listed.
    """
    if name not in list_weights():
        bundled = ", ".join(list_weights()) or "none"
        raise InputError(f"no bundled weights are called {name!r}; bundled: {bundled}")
    return _file_of(name)


def find_checkpoint(weights: str | os.PathLike[str] | None, device: torch.device) -> Path:
    """Return the file meant by ``weights``: the name of bundled weights, a path, or None for the default.

    A bundled name wins over a file of that name (``./small`` means the file).

    Raises:
        InputError: Nothing is bundled under that name, and there is no such file.
    """
    if weights is None:
        return find_weights(default_weights(device.type))
    if isinstance(weights, str) and weights in WEIGHT_NAMES:
        return find_weights(weights)
    if os.fspath(weights).startswith("~"):
        weights = str(expand_user(os.fspath(weights)))
    if not isinstance(weights, str) and not os.path.exists(weights):
        raise InputError(f"{os.fspath(weights)}: no such checkpoint file (bundled weights are named by --weights)")
    if not os.path.exists(weights):
        bundled = ", ".join(list_weights()) or "none"
        raise InputError(
            f"{os.fspath(weights) or repr(weights)}: neither a checkpoint file nor bundled weights (bundled: {bundled})"
        )
    return Path(weights)


def _folder() -> Path:
    return Path(__file__).resolve().parent


def _file_of(name: str) -> Path:
    return _folder() / f"{name}.safetensors"
