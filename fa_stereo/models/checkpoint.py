"""Self-describing weights, training checkpoints, and the original PSMNet's files.

Weights for use are safetensors files whose metadata holds the model configuration and a record of how they came about,
so that loading needs no flags. Training checkpoints are ``.pt`` files of tensors and plain data, read with PyTorch's
``weights_only`` loader: no file executes code.
"""

from __future__ import annotations

import json
import re
import tarfile
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from fa_stereo.config import PREDICTION_SETTINGS, AttentionConfig, ModelConfig, from_plain, to_plain
from fa_stereo.errors import InputError
from fa_stereo.files import save_atomically
from fa_stereo.models.psmnet import PSMNet, build_model
from fa_stereo.weights import WEIGHT_NAMES, find_weights

FORMAT = "fa_stereo weights"


# --------------------------------------------------------------------------------------------------------------------
# weights for use


def save_weights(
    model: PSMNet, path: str | Path, record: Mapping[str, Any] | None = None, dtype: torch.dtype | None = None
) -> None:
    """Write weights, model configuration and a record of their making as one safetensors file.

    Args:
        model: The network.
        path: Where to; ends in ``.safetensors``.
        record: How the weights came about (data, steps, ...), plain data for JSON.
        dtype: Convert weights of convolutions to this type (``torch.float16`` halves the file); batch norm keeps
            float32, whose variances float16 may not hold.

    Raises:
        OSError: The file cannot be written.
        InputError: A weight is not finite in ``dtype``.
    """
    norms = {name for name, module in model.named_modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)}
    tensors = {}
    for key, tensor in model.state_dict().items():
        tensor = tensor.detach().cpu().contiguous()
        if dtype is not None and tensor.is_floating_point() and key.rpartition(".")[0] not in norms:
            tensor = tensor.to(dtype)
            if not torch.isfinite(tensor).all():
                raise InputError(f"{path}: cannot be written: {key} is not finite in {dtype}; choose another precision")
        tensors[key] = tensor
    metadata = {"format": FORMAT, "model": json.dumps(to_plain(model.config)), "record": json.dumps(dict(record or {}))}

    def write(temporary: Path) -> None:
        try:
            save_file(tensors, temporary, metadata)
        except SafetensorError as error:  # safetensors reports a full disk in its own type
            raise OSError(f"{path}: could not be written: {error}") from error

    Path(path).parent.mkdir(parents=True, exist_ok=True)
    save_atomically(path, write)


def read_record(path: str | Path) -> dict[str, Any]:
    """Return the record stored with weights: how they were trained; empty if there is none.

    Raises:
        InputError: The file cannot be read, or its record is damaged.
    """
    metadata, _ = _read_safetensors(Path(path))
    try:
        record = json.loads(metadata.get("record", "{}"))
    except json.JSONDecodeError as error:
        raise InputError(f"{path}: its record is damaged ({error}); export the file again") from error
    return record if isinstance(record, dict) else {}


def load_model(path: str | Path, device: torch.device | str = "cpu") -> PSMNet:
    """Load a network from weights (``.safetensors``) or a training checkpoint (``.pt``; its averaged weights if any).

    Args:
        path: The file, or as a string the name of bundled weights, ``small`` for example (``./small`` means the file).
        device: Where to put the network.

    Returns:
        The network in eval mode, float32: normalised pictures [B, 3, H, W] in, disparity in pixels [B, H, W] out.

    Raises:
        InputError: The file is missing, damaged, or not a checkpoint of this project; it is never executed.
    """
    path = find_weights(path) if isinstance(path, str) and path in WEIGHT_NAMES else Path(path)
    config, state = _read_model(path)
    try:
        with torch.device("meta"):  # compare the shapes before memory is taken: a file can claim any size
            own = build_model(config).state_dict()
    except (RuntimeError, TypeError, AttributeError) as error:  # of an altered file: it can hold anything
        raise InputError(f"{path}: its model configuration cannot be used ({error}); export the file again") from error
    wrong = [key for key in own if key not in state or state[key].shape != own[key].shape]
    wrong += [key for key in state if key not in own]
    if wrong:
        raise InputError(
            f"{path}: its tensors are not those of the model it describes ({len(wrong)} differ, first {wrong[0]!r}); "
            "the file was made by another version or altered: export it again"
        )
    model = build_model(config)
    model.load_state_dict(state)
    return model.to(device).eval()


def _read_model(path: Path) -> tuple[ModelConfig, dict[str, Tensor]]:
    check_is_file(path)
    if is_torch_file(path):
        content = read_torch_file(path)
        if "model_config" not in content or "model" not in content:
            hint = ""
            if _is_official(_unwrap_official(content)):
                hint = "; it is an original PSMNet file: convert it with 'fa-stereo import-weights'"
            raise InputError(f"{path}: a PyTorch file, but not a checkpoint of this project{hint}")
        return _model_config(content["model_config"], path), _state_dict(content.get("ema") or content["model"], path)
    metadata, state = _read_safetensors(path)
    if metadata.get("format") != FORMAT or "model" not in metadata:
        raise InputError(f"{path}: a safetensors file of another model, without this project's model configuration")
    try:
        plain = json.loads(metadata["model"])
    except json.JSONDecodeError as error:
        raise InputError(f"{path}: its model configuration is damaged ({error}); export the file again") from error
    return _model_config(plain, path), state


def _model_config(plain: Any, path: Path) -> ModelConfig:
    try:
        return from_plain(ModelConfig, plain, where="model")
    except (TypeError, AttributeError, ValueError) as error:  # of an altered file: it can hold anything
        raise InputError(f"{path}: its model configuration cannot be used ({error}); export the file again") from error


def _state_dict(content: Any, path: Path) -> dict[str, Tensor]:
    if not isinstance(content, dict) or not all(isinstance(value, Tensor) for value in content.values()):
        raise InputError(f"{path}: where its weights should be there is something else; export the file again")
    return content


def _read_safetensors(path: Path) -> tuple[dict[str, str], dict[str, Tensor]]:
    try:
        with safe_open(path, framework="pt") as file:
            return file.metadata() or {}, {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except FileNotFoundError as error:
        raise InputError(f"{path}: no such checkpoint file") from error
    except SafetensorError as error:
        raise InputError(f"{path}: not a checkpoint, or a truncated one ({error})") from error


def is_torch_file(path: str | Path) -> bool:
    """Return whether a file looks as if ``torch.save`` had written it, rather than safetensors."""
    with open(path, "rb") as file:
        head = file.read(16)
    # A zip archive, or the older format: a bare pickle (protocol 2 and up). A safetensors file begins with the length
    # of its header, which can look like either, and then the header, which is JSON.
    return head.startswith((b"PK\x03\x04", b"\x80")) and head[8:9] != b"{"


def check_is_file(path: Path) -> None:
    """Make sure that a checkpoint is there.

    Raises:
        InputError: It is not, or is a folder.
    """
    if path.is_dir():
        raise InputError(f"{path}: no such checkpoint file, but a folder: name a file in it, such as last.pt")
    if not path.is_file():
        raise InputError(f"{path}: no such checkpoint file")


def read_torch_file(path: str | Path) -> dict[str, Any]:
    """Read a dict that ``torch.save`` wrote, of tensors and plain data only; nothing in it is executed.

    Raises:
        InputError: Missing, truncated, not such a file, or holding anything but tensors and plain data.
    """
    path = Path(path)
    check_is_file(path)
    if tarfile.is_tarfile(path):
        raise InputError(f"{path}: a tar archive, not a file of torch.save: unpack it and name the file in it")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # remarks on foreign pickles would blur the sentence below
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged archive raises nearly anything: EOFError, KeyError, RuntimeError, ...
        if isinstance(error, OSError) and error.filename is not None:  # of the system, not of what the file says
            raise
        reason = "it is truncated or not a PyTorch file: fetch or save it again"
        if re.search(r"Unsupported (global|class)", str(error)):
            reason = "it holds objects other than tensors and plain data, which are refused"
        elif path.read_bytes()[:256].lstrip()[:1] == b"<":
            reason = "it is a web page, not the file that was asked for"
        raise InputError(f"{path}: cannot be loaded as a checkpoint: {reason}") from error
    if not isinstance(content, dict):
        raise InputError(f"{path}: holds a {type(content).__name__}, not a checkpoint")
    return content


# --------------------------------------------------------------------------------------------------------------------
# starting from other weights


@dataclass
class MatchReport:
    """What ``load_matching_weights`` did, by tensor name.

    Attributes:
        loaded: Taken from the file.
        missing: In the network only; kept as they were.
        unexpected: In the file only; left out.
        mismatched: In both, with different shapes; kept as they were.
        notes: What else to know, one sentence each.
    """

    loaded: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    mismatched: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def summary(self) -> str:
        """Return the report as lines for a person: counts, and the modules that were not loaded."""
        lines = [f"loaded {len(self.loaded)} tensors"]
        for title, keys in (
            ("not in the file, kept as initialised", self.missing),
            ("of another shape, kept as initialised", self.mismatched),
            ("in the file only, left out", self.unexpected),
        ):
            if keys:
                modules = list(dict.fromkeys(key.rpartition(".")[0] for key in keys))
                shown = ", ".join(modules[:6]) + (f", ... {len(modules) - 6} more" if len(modules) > 6 else "")
                lines.append(f"{len(keys)} {title}: {shown}")
        return "\n".join([*lines, *self.notes])


def load_matching_weights(model: PSMNet, path: str | Path) -> MatchReport:
    """Load what fits from another checkpoint: PSMNet weights into FA-PSMNet, for instance.

    Raises:
        InputError: The file cannot be read, or no weight in it fits.
    """
    path = Path(path)
    config, state = _read_model(path)
    own = model.state_dict()
    report = MatchReport()
    for key in own:
        if key not in state:
            report.missing.append(key)
        elif state[key].shape != own[key].shape:
            report.mismatched.append(key)
        else:
            report.loaded.append(key)
    report.unexpected = [key for key in state if key not in own]
    if all(key.endswith("num_batches_tracked") for key in report.loaded):  # batch norm's counters fit any width
        raise InputError(
            f"{path}: no weight fits this network (base_channels is {config.base_channels} there, "
            f"{model.config.base_channels} here): choose the model that the weights were made for, or other weights"
        )
    if config.align_corners != model.config.align_corners:
        report.notes.append(
            f"these weights need model.align_corners={str(config.align_corners).lower()}, which is "
            f"{str(model.config.align_corners).lower()} here: disparity will be off until training has made up for it"
        )
    for key in PREDICTION_SETTINGS:
        theirs, ours = getattr(config, key), getattr(model.config, key)
        if theirs != ours:
            report.notes.append(f"these weights predict by model.{key}={theirs}, which is {ours} here")
    model.load_state_dict({key: state[key] for key in report.loaded}, strict=False)
    return report


# --------------------------------------------------------------------------------------------------------------------
# the original PSMNet's files

_Replacement = str | Callable[[re.Match[str]], str]

# The original's module names -> ours, applied in order to whole keys.
_OFFICIAL_NAMES: list[tuple[str, _Replacement]] = [
    # features
    (r"^feature_extraction\.firstconv\.(\d)\.", lambda m: f"features.stem.{int(m[1]) // 2}."),
    (r"^feature_extraction\.layer(\d)\.(\d+)\.conv1\.0\.", r"features.res\1.\2.conv1."),
    (r"^feature_extraction\.layer(\d)\.(\d+)\.downsample\.", r"features.res\1.\2.shortcut."),
    (r"^feature_extraction\.layer(\d)\.", r"features.res\1."),
    (r"^feature_extraction\.branch(\d)\.1\.", lambda m: f"features.pyramid.branches.{int(m[1]) - 1}."),
    (r"^feature_extraction\.lastconv\.0\.", r"features.fusion."),
    (r"^feature_extraction\.lastconv\.2\.", r"features.projection."),
    # aggregation
    (r"^dres0\.0\.", r"aggregation.entry.conv1."),
    (r"^dres0\.2\.", r"aggregation.entry.conv2."),
    (r"^classif(\d)\.0\.", lambda m: f"aggregation.heads.{int(m[1]) - 1}.conv1."),
    (r"^classif(\d)\.2\.", lambda m: f"aggregation.heads.{int(m[1]) - 1}.conv2."),
    (r"^classify\.0\.", r"aggregation.head.conv1."),
    (r"^classify\.2\.", r"aggregation.head.conv2."),
]  # fmt: skip
_STACKED_HOURGLASS_NAMES: list[tuple[str, _Replacement]] = [
    (r"^dres1\.0\.", r"aggregation.residual.conv1."),
    (r"^dres1\.2\.", r"aggregation.residual.conv2."),
    (r"^dres([234])\.(conv[134])\.0\.", lambda m: f"aggregation.hourglasses.{int(m[1]) - 2}.{m[2]}."),
    (r"^dres([234])\.(conv[256])\.", lambda m: f"aggregation.hourglasses.{int(m[1]) - 2}.{m[2]}."),
]
_BASIC_NAMES: list[tuple[str, _Replacement]] = [
    (r"^dres([1-4])\.0\.", lambda m: f"aggregation.residuals.{int(m[1]) - 1}.conv1."),
    (r"^dres([1-4])\.2\.", lambda m: f"aggregation.residuals.{int(m[1]) - 1}.conv2."),
]


def _unwrap_official(content: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return the state dict inside an original file, without ``module.`` prefixes and constant buffers."""
    state = content.get("state_dict", content)
    if not isinstance(state, Mapping):
        return {}
    tensors = {str(key).removeprefix("module."): value for key, value in state.items() if isinstance(value, Tensor)}
    return {key: value for key, value in tensors.items() if not key.startswith("disparityregression")}


def _is_official(state: Mapping[str, Tensor]) -> bool:
    first = state.get("feature_extraction.firstconv.0.0.weight")
    return first is not None and first.ndim == 4


def _translate_official_key(key: str, names: list[tuple[str, _Replacement]]) -> str:
    for pattern, replacement in names:
        translated, count = re.subn(pattern, replacement, key)
        if count:
            # What is left of the path ends in "0.weight" for a convolution and "1.*" for its batch norm.
            return re.sub(r"\.0\.(weight)$", r".conv.\1", re.sub(r"\.1\.(\w+)$", r".norm.\1", translated))
    return key


def import_official_weights(path: str | Path, *, align_corners: bool, max_disparity: int = 192) -> PSMNet:
    """Build the baseline PSMNet from a file of the original repository (JiaRenChang/PSMNet).

    Args:
        path: A ``.tar`` that is a plain PyTorch file, with or without ``module.`` prefixes.
        align_corners: What the weights were trained with: True for those published before 2021, False for later.
        max_disparity: D; the original's 192.

    Returns:
        The network in eval mode; stacked hourglass or basic, as the file has it.

    Raises:
        InputError: The file is no original PSMNet checkpoint.
    """
    state = _unwrap_official(read_torch_file(path))
    if not _is_official(state):
        raise InputError(
            f"{path}: not an original PSMNet checkpoint (no key 'feature_extraction.firstconv.0.0.weight')"
        )
    stacked = "classif1.0.0.weight" in state
    names = _OFFICIAL_NAMES + (_STACKED_HOURGLASS_NAMES if stacked else _BASIC_NAMES)
    model = build_model(
        ModelConfig(
            aggregation="stacked_hourglass" if stacked else "basic",
            base_channels=state["feature_extraction.firstconv.0.0.weight"].shape[0],
            max_disparity=max_disparity,
            align_corners=align_corners,
            attention=AttentionConfig(kind="none"),
            attention_slots=[],
        )
    )
    translated = {_translate_official_key(key, names): value for key, value in state.items()}
    own = model.state_dict()
    for key, tensor in own.items():  # files older than PyTorch 0.4.1 lack the counters
        if key.endswith("num_batches_tracked"):
            translated.setdefault(key, tensor)
    wrong = sorted(
        {key for key in own if key not in translated or translated[key].shape != own[key].shape}
        | {key for key in translated if key not in own}
    )
    if wrong:
        raise InputError(
            f"{path}: {len(wrong)} tensors do not fit PSMNet, first {wrong[0]!r}; "
            "only files of the unmodified network can be imported"
        )
    model.load_state_dict(translated)
    return model.eval()
