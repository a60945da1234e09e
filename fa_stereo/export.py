"""From a training checkpoint to weights that travel: averaged, in half precision, with the record of their making.

The record answers what a model card is asked: on what, for how long, where, how exactly and how well the weights were
trained, and from what they started. A checkpoint holds all of it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from fa_stereo.config import PREDICTION_SETTINGS, DataConfig, flatten_used, from_plain, to_plain
from fa_stereo.data import open_training_pairs
from fa_stereo.data.transforms import TrainingTransform, normalize_images
from fa_stereo.errors import InputError
from fa_stereo.machine import available_cores
from fa_stereo.models.batch_norm import reestimate_batch_norm
from fa_stereo.models.checkpoint import is_torch_file, load_model, read_record, read_torch_file, save_weights
from fa_stereo.models.psmnet import PSMNet
from fa_stereo.sampling import StepSampler, TrainingStream, make_loader
from fa_stereo.weights import WEIGHT_NAMES, find_weights

_NEEDED = {"model_config", "model", "config", "step", "samples", "validation"}
_CURVE = ("step", "end_point_error", "bad_1", "bad_3")
WATCHING = {
    "trainer.device", "trainer.log_every_steps", "trainer.picture_every_steps", "trainer.checkpoint_every_steps",
    "trainer.keep_every_steps", "trainer.validate_every_steps", "trainer.validate_at_start",
    "trainer.plateau_alarm_steps", "data.workers",
}  # fmt: skip
"""Keys of what a run is watched by, not made of."""

_PATHS = ("output_dir", "root", "init_from", "resume", "unused_files")


def training_record(state: Mapping[str, Any]) -> dict[str, Any]:
    """Return how the weights of a training checkpoint came about, as plain data.

    Args:
        state: What a checkpoint holds besides tensors: ``config``, ``step``, ``samples``, ``validation``, and, where
            it is known, ``history``, ``seconds``, ``machines``, ``processes``, ``rendered_pairs``, ``changes`` and
            ``started_from``.

    Returns:
        Optimizer ``steps``, ``samples_seen`` and ``epochs``; ``samples_seen_in_all``, those of the weights it started
        from included; the number of ``training_pairs`` and, of pairs that ``fa-stereo render`` wrote, how they were
        rendered (``rendered_pairs``; with ``data.also`` a list, None where a source is another); ``precision``; whether
        the weights are ``averaged``; ``hours``, ``machines`` and on how many ``processes`` at last; the settings that
        were changed on the way (``changes``: ``key``, and its value ``before`` the ``step``); the last ``validation``
        and all of them (``validation_curve``: step, EPE in px, bad-1 and bad-3 in %); every setting used, as it was at
        last, by its full key (``training``); and the same of the weights it ``started_from``. What is not known is
        None; folders are left out.
    """
    trainer, steps, seconds = state["config"]["trainer"], state["step"], state.get("seconds")
    earlier = state.get("started_from")
    before = samples_seen(earlier)
    samples = steps * trainer["batch_size"]
    return {
        "steps": steps,
        "samples_seen": samples,
        "samples_seen_in_all": None if before is None else samples + before,
        "epochs": samples / state["samples"],
        "training_pairs": state["samples"],
        "rendered_pairs": state.get("rendered_pairs"),
        "precision": trainer["precision"],
        "averaged": trainer["ema_decay"] > 0,
        "hours": None if seconds is None else float(f"{seconds / 3600:.3g}"),
        "machines": state.get("machines"),
        "processes": state.get("processes"),
        "changes": [change for change in state.get("changes", []) if not _is_path(change["key"])],
        "validation": state["validation"],
        "validation_curve": [[line.get(key) for key in _CURVE] for line in state.get("history", [])],
        "training": without_paths(state["config"]),
        "started_from": earlier,
    }


def samples_seen(record: Mapping[str, Any] | None) -> int | None:
    """Return the samples that weights with this record have seen, those they started from included.

    Fresh weights, without a record (None), have seen 0; None if one record on the way does not say.
    """
    if record is None:
        return 0
    earlier = samples_seen(record.get("started_from"))
    return None if earlier is None or "samples_seen" not in record else int(record["samples_seen"]) + earlier


def find_record(path: str | Path) -> dict[str, Any]:
    """Return the record of weights or of a training checkpoint; empty if there is none, as in a foreign file.

    Raises:
        InputError: The file cannot be read.
    """
    if not is_torch_file(path):
        return read_record(path)
    state = read_torch_file(path)
    return training_record(state) if state.keys() >= _NEEDED else {}


def without_paths(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings used by full key, without the folders of somebody's machine: weights travel."""
    return {key: value for key, value in flatten_used(config).items() if not _is_path(key)}


def _is_path(key: str) -> bool:
    return key.rpartition(".")[2] in _PATHS


def export_weights(
    checkpoint: str | Path,
    output: str | Path,
    *,
    dtype: torch.dtype = torch.float16,
    regression: str | None = None,
    padding: str | None = None,
    halve_from_px: int | None = None,
    enlarge_below_px: int | None = None,
    average_with: Sequence[str | Path] = (),
    batch_norm_pairs: int = 0,
    batch_size: int = 8,
    data_root: str | None = None,
    device: torch.device | str = "cpu",
    workers: int = 0,
    notes: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Write the weights of a training checkpoint, the averaged ones if there are any, as a file for use.

    Args:
        checkpoint: A ``.pt`` file of a run, or the run's folder, for its ``last.pt``; or weights that were exported,
            a bundled name or a file, whose record is kept.
        output: Where to; ends in ``.safetensors``.
        dtype: Of all but batch norm, which stays float32.
        regression: How these weights predict from now on, ``expectation`` or ``modal``; None leaves it as it was. The
            record's validation figures stay those of the run; of a mean, or with other statistics of batch norm, it
            has none but the run's curve.
        padding: Likewise, ``zeros`` or ``replicate``; see ``ModelConfig``.
        halve_from_px: Likewise, the number of pixels from which pictures count at half their size too.
        enlarge_below_px: Likewise, the number of pixels below which pictures are predicted at two sizes.
        average_with: Other weights of the same network, each a bundled name, a file or a run's folder, those that the
            run started from for example, or those of other runs from the same start: the mean of all is written
            (Wortsman et al. 2022, "Model soups"), of batch norm's statistics too.
        batch_norm_pairs: Estimate batch norm's statistics anew over so many samples of the run's own training data,
            cropped and augmented as it was (rounded up to whole batches); 0 keeps those of the training. Only of a
            training checkpoint.
        batch_size: Samples of a batch for that.
        data_root: Where the run's training data is now; None is where it was. For runs with one source of files.
        device: Where to do that.
        workers: Loader processes for that.
        notes: What else the record should say, or say otherwise.

    Returns:
        The record, which the file holds too.

    Raises:
        InputError: The checkpoint, its data or the output cannot be used, or a weight is not finite in ``dtype``.
    """
    output = Path(output)
    bundled = checkpoint in WEIGHT_NAMES and not Path(checkpoint).exists()  # a run's folder may be called so
    checkpoint = find_weights(str(checkpoint)) if bundled else _file_in(Path(checkpoint))
    if output.suffix != ".safetensors":
        raise InputError(f"{output}: name the output *.safetensors")
    if data_root is not None and not batch_norm_pairs:
        raise InputError(f"--data-root {data_root}: the data is needed for --reestimate-batch-norm alone: leave it out")
    model = load_model(checkpoint, device)
    if is_torch_file(checkpoint):
        state = read_torch_file(checkpoint)
        if missing := sorted(_NEEDED - state.keys()):
            raise InputError(f"{checkpoint}: not a training checkpoint (no {missing[0]!r}): name the last.pt of a run")
        record = training_record(state)
    elif batch_norm_pairs:
        raise InputError(
            f"{checkpoint}: weights alone, which do not know their training data: for --reestimate-batch-norm name the "
            "last.pt of their run"
        )
    else:
        record = read_record(checkpoint)
    if average_with:
        files = [find_weights(str(name)) if name in WEIGHT_NAMES else _file_in(Path(name)) for name in average_with]
        average_weights(
            model, [(str(name), load_model(file, device)) for name, file in zip(average_with, files, strict=True)]
        )
        record = _record_of_mean(record, [find_record(file) for file in files])
    if (average_with or batch_norm_pairs) and "validation" in record:
        record["validation"] = {}  # of other weights than these
    if batch_norm_pairs:
        data = from_plain(DataConfig, state["config"]["data"], where=f"{checkpoint}: data")
        if data_root is not None:
            if any(part.root for part in data.also):
                raise InputError(
                    f"--data-root {data_root}: the run had several sources (data.also): put them back where they were"
                )
            if data.train.kind == "rendered":
                raise InputError(f"--data-root {data_root}: the run's pairs are rendered, in no folder: leave it out")
            data.train.root = data_root
        data.render_workers = 0  # the first pairs of the run, not the first that are there
        for part in data.sources.values():
            part.rendered.device = "auto"  # not that of the machine it was trained on
        batches = training_batches(data, state["config"]["trainer"]["seed"], batch_norm_pairs, batch_size, workers)
        record["batch_norm_pairs"] = reestimate_batch_norm(
            model, ((left.to(device), right.to(device)) for left, right in batches)
        )
    settings: dict[str, Any] = {
        "regression": regression,
        "padding": padding,
        "halve_from_px": halve_from_px,
        "enlarge_below_px": enlarge_below_px,
    }
    model.set_prediction(**settings)
    record |= {key: value for key, value in settings.items() if value is not None}
    record |= notes or {}
    try:
        save_weights(model, output, record, dtype)
    except OSError as error:
        raise InputError(f"{output}: cannot be written ({error.strerror or error}); choose another place") from error
    return record


def _file_in(path: Path) -> Path:
    """Return a file, or the newest checkpoint of a run's folder."""
    if not path.is_dir():
        return path
    if not (path / "last.pt").is_file():
        raise InputError(f"{path / 'last.pt'}: no such checkpoint: name the folder of a run, or one of its .pt files")
    return path / "last.pt"


def _record_of_mean(record: Mapping[str, Any], others: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the record of the mean of weights with this record and of others, which forgets no mean before."""
    mean = {key: value for key, value in record.items() if key != "batch_norm_pairs"}  # its statistics are means now
    if "averaged_with" in record:
        mean["averaged_before"] = _averagings(record)
    mean["averaged_with"] = [
        {**{key: other.get(key) for key in ("steps", "samples_seen_in_all")}, **_averagings(other)} for other in others
    ]
    return mean


def _averagings(record: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a record says of the means that its weights are."""
    return {key: record[key] for key in ("averaged_with", "averaged_before") if key in record}


@torch.no_grad()
def average_weights(model: PSMNet, others: Sequence[tuple[str, PSMNet]]) -> None:
    """Replace the weights of a network by the mean of its own and those of others.

    Args:
        model: The network.
        others: The other networks, of the same configuration but for the disparities searched and how they predict;
            each with its name for the error message.

    Raises:
        InputError: One is another network.
    """
    own = to_plain(model.config)
    for name, other in others:
        theirs = to_plain(other.config)
        different = [
            key for key in own if key not in ("max_disparity", *PREDICTION_SETTINGS) and own[key] != theirs[key]
        ]
        if different:
            raise InputError(
                f"{name}: cannot be averaged with these weights: its model.{different[0]} is another; leave it out"
            )
    states = [other.state_dict() for _, other in others]
    for key, tensor in model.state_dict().items():
        if tensor.is_floating_point():  # not batch norm's counters
            tensor.copy_(torch.stack([tensor, *(state[key] for state in states)]).double().mean(0))


def training_batches(
    data: DataConfig, seed: int, pairs: int, batch_size: int, workers: int = 0
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the samples that a training run begins with, without their ground truth.

    Args:
        data: The run's data.
        seed: ``trainer.seed`` of the run.
        pairs: How many; rounded up to whole batches.
        batch_size: Samples of a batch.
        workers: Loader processes, at most one for each core.

    Yields:
        Normalised left and right pictures, float [B, 3, H, W] each, on the CPU.

    Raises:
        InputError: A pair cannot be read.
    """
    stream = TrainingStream(open_training_pairs(data), TrainingTransform(data.augmentation), seed)
    sampler = StepSampler(0, -(-pairs // batch_size), batch_size)
    loader = make_loader(stream, sampler, min(workers, available_cores()), pin_memory=False)
    for batch in tqdm(loader, desc="batch norm", unit="batch", disable=None, leave=False):
        if isinstance(batch, Exception):
            raise batch
        yield normalize_images(batch["left"]), normalize_images(batch["right"])
