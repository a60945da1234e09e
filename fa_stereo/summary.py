"""Comparing training runs: which belong together, what each variant costs, and what the spread allows to say.

Runs that differ in their seed alone are repetitions of one variant. Two variants are compared seed by seed: runs of one
seed see the same pairs in the same order and start from the same weights outside the attention, so that part of the
chance is common to both and leaves their difference.

    >>> student_t_factor(2)                                                # doctest: +ELLIPSIS
    4.302...
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from fa_stereo.config import AttentionConfig, DatasetConfig, ModelConfig, RenderConfig, TrainConfig, flatten, to_plain
from fa_stereo.data.datasets import comparable_settings
from fa_stereo.errors import InputError
from fa_stereo.export import WATCHING
from fa_stereo.files import LOCK_FILE
from fa_stereo.history import FILE_NAME, read_history
from fa_stereo.models.batch_norm import set_batch_norm_to_eval
from fa_stereo.models.checkpoint import load_model, read_record
from fa_stereo.models.layers import convolved_as_written
from fa_stereo.models.psmnet import PSMNet, build_model

CONFIDENCE = 0.95

_FEW = 3  # crops at once whose kept bytes are counted one by one

# The keys of an attention that its kind looks at.
_RELEVANT_ATTENTION = {
    "none": (),
    "resblock": (),
    "resblock_bottleneck": ("value_channels",),
    "factorized": ("normalization", "key_channels", "value_channels", "heads", "transformer"),
    "non_local": ("normalization", "key_channels", "value_channels", "heads", "transformer", "computation"),
    "axial": ("key_channels", "value_channels", "heads", "transformer", "span"),
}


@dataclass
class Run:
    """One finished run.

    Attributes:
        folder: Where it is.
        seed: ``trainer.seed``.
        model: Its network.
        settings: All that makes its variant: configuration keys in full, those without an effect left out.
        history: Its validations, see ``fa_stereo.history``.
    """

    folder: Path
    seed: int
    model: ModelConfig
    settings: dict[str, Any]
    history: list[dict[str, Any]]

    @property
    def final(self) -> dict[str, Any]:
        """The last validation, that of the last step: not the best one, whose choice would flatter."""
        return self.history[-1]


@dataclass
class Variant:
    """Runs that differ in their seed alone.

    Attributes:
        label: What distinguishes it from the others, in the words of the command line.
        runs: By seed.
    """

    label: str
    runs: dict[int, Run] = field(default_factory=dict)

    @property
    def model(self) -> ModelConfig:
        """The network of its runs."""
        return next(iter(self.runs.values())).model

    def finals(self, metric: str) -> list[float]:
        """Return a metric of the last validation for every seed."""
        return [run.final[metric] for run in self.runs.values()]

    def mean_and_deviation(self, metric: str) -> tuple[float, float | None]:
        """Return mean and standard deviation (of the sample, n - 1) over seeds; of one seed there is none."""
        values = self.finals(metric)
        return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None

    def recorded(self, key: str) -> float | None:
        """Return the median over runs of what their training steps were recorded to take, if they recorded it."""
        medians = []
        for run in self.runs.values():
            values = [line[key] for line in run.history if line.get(key) is not None]
            if values:
                medians.append(max(values) if key == "peak_memory_bytes" else statistics.median(values))
        return statistics.median(medians) if medians else None

    @property
    def last_steps(self) -> tuple[int, int]:
        """Return the fewest and the most steps after which its runs were validated last."""
        steps = [run.final["step"] for run in self.runs.values()]
        return min(steps), max(steps)

    def curve(self, metric: str) -> tuple[list[int], list[list[float]]]:
        """Return the steps at which all runs were validated, and the metric there: one list of seeds for each step."""
        by_step = [{line["step"]: line[metric] for line in run.history} for run in self.runs.values()]
        steps = sorted(set.intersection(*(set(curve) for curve in by_step)))
        return steps, [[curve[step] for curve in by_step] for step in steps]


# --------------------------------------------------------------------------------------------------------------------
# reading


def find_runs(paths: Sequence[str | Path]) -> tuple[list[Run], list[Path]]:
    """Read the runs in some folders: each a run itself, or a folder of them, as a sweep leaves.

    Args:
        paths: The folders.

    Returns:
        The finished runs, in the order of the folders and their names; the folders of those that are not finished, or
        have no validation.

    Raises:
        InputError: A folder is missing or holds no run, or a file of a run is damaged.
    """
    folders: list[Path] = []
    for path in map(Path, paths):
        if not path.is_dir():
            raise InputError(f"{path}: there is no such folder of runs")
        found = [folder for folder, names in _walk(path) if FILE_NAME in names or LOCK_FILE in names]
        if not any((folder / FILE_NAME).exists() for folder in found):
            raise InputError(
                f"{path}: no run in it has a {FILE_NAME}: runs of 'fa-stereo train' with validation write one"
            )
        folders += sorted(found, key=lambda folder: _natural_order(str(folder)))
    runs, unfinished = [], []
    for folder in dict.fromkeys(folder.resolve() for folder in folders):
        run = _read_run(folder)
        if run is None:
            unfinished.append(folder)
        else:
            runs.append(run)
    return runs, unfinished


def _walk(path: Path) -> Iterator[tuple[Path, list[str]]]:
    """Yield every folder, linked ones too, each once, with the names of its files."""
    seen = set()
    for folder, inner, names in os.walk(path, followlinks=True):
        place = os.path.realpath(folder)
        if place in seen:
            inner.clear()  # a link to where we have been
            continue
        seen.add(place)
        yield Path(folder), names


def _natural_order(text: str) -> list[tuple[int, str]]:
    """Return a key that sorts 10 after 9."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", text)]


def _read_run(folder: Path) -> Run | None:
    """Return a run, or None if it has no validation or is not finished: no weights, or it went on after them."""
    weights = folder / "weights.safetensors"
    if not weights.exists() or not (folder / FILE_NAME).exists():
        return None
    record, history = read_record(weights), read_history(folder / FILE_NAME)
    if not isinstance(record.get("training"), dict) or "trainer.seed" not in record["training"]:
        raise InputError(f"{weights}: it does not say how it was trained: it is not what a training run wrote")
    if record["steps"] != history[-1]["step"]:
        return None
    for metric in ("end_point_error", "bad_3"):
        if not all(isinstance(line.get(metric), (int, float)) for line in history):
            raise InputError(f"{folder / FILE_NAME}: a line has no {metric}: restore the file, or leave the run out")
    model = load_model(weights).config
    training = _with_later_settings(record["training"])
    settings = {key: value for key, value in training.items() if not key.startswith("model.attention")}
    settings = {key: value for key, value in settings.items() if key not in {"trainer.seed", *WATCHING}}
    if settings.get("trainer.max_minutes") is not None:  # these do not count then
        settings = {key: value for key, value in settings.items() if key not in ("trainer.epochs", "trainer.max_steps")}
    settings |= {f"model.{key}": value for key, value in attention_settings(model).items()}
    settings = {key: value for key, value in settings.items() if not key.startswith("data.also")}
    settings["data.also"] = _describe_also(training)
    settings |= _pairs_of(record)  # not their folders: those are not on record, and may differ between machines
    changes = [
        f"{change['key']}={change['before']} up to step {change['step']}" for change in record.get("changes", [])
    ]
    settings["processes"] = record.get("processes") or 1
    settings["changes"] = ", ".join(changes) or "none"
    start = json.dumps(record.get("started_from"), sort_keys=True)  # the record of the weights given as init_from
    settings["started_from"] = "fresh weights" if start == "null" else hashlib.sha256(start.encode()).hexdigest()[:8]
    return Run(folder, training["trainer.seed"], model, settings, history)


def _pairs_of(record: dict[str, Any]) -> dict[str, Any]:
    """Return what a record says of the training pairs on disk: how many, and how they were rendered."""
    rendered = record.get("rendered_pairs")
    pairs: dict[str, Any] = {"training_pairs": record.get("training_pairs")}
    for number, source in enumerate(rendered if isinstance(rendered, list) else [rendered]):
        settings = comparable_settings(source) if source else {}
        pairs |= {f"pairs{number or ''}.{key}": value for key, value in settings.items()}
    return pairs


def _with_later_settings(training: dict[str, Any]) -> dict[str, Any]:
    """Return the settings of a run with defaults for those that the version it was trained by did not have yet."""
    defaults = flatten(to_plain(TrainConfig()))
    rendered = flatten(to_plain(RenderConfig()))
    sections = {key.rpartition(".")[0] for key in training}
    for section in sections:
        if section.endswith(".rendered"):
            defaults |= {f"{section}.{key}": value for key, value in rendered.items()}
    return {key: value for key, value in defaults.items() if key.rpartition(".")[0] in sections} | training


def _describe_also(training: dict[str, Any]) -> str:
    """Return the sources of ``data.also``, each as its kind and what is not as by default."""
    parts: dict[int, dict[str, Any]] = {}
    for key, value in training.items():
        if key.startswith("data.also."):
            number, _, name = key.removeprefix("data.also.").partition(".")
            parts.setdefault(int(number), {})[name] = value
    defaults = flatten(to_plain(DatasetConfig()))
    texts = []
    for _, part in sorted(parts.items()):
        kind = part.pop("kind")
        special = {name.removeprefix(f"{kind}."): x for name, x in part.items() if x != defaults.get(name)}
        texts.append(f"{kind}({', '.join(f'{name}={x}' for name, x in special.items())})" if special else kind)
    return " + ".join(texts) or "none"


def attention_settings(model: ModelConfig) -> dict[str, Any]:
    """Return the keys below ``model`` that describe its attention, without those that its kind does not look at."""
    attention: AttentionConfig = model.attention
    plain = to_plain(attention)
    settings: dict[str, Any] = {"attention.kind": attention.kind}
    settings |= {f"attention.{key}": plain[key] for key in _RELEVANT_ATTENTION[attention.kind]}
    if attention.transformer:
        settings["attention.feed_forward_channels"] = attention.feed_forward_channels
    if attention.kind == "axial" and attention.span is None:
        settings["attention.reach"] = attention.reach
    if attention.kind != "none":
        settings["attention_slots"] = ",".join(sorted(model.attention_slots))
    return settings


def group_runs(runs: Sequence[Run]) -> list[Variant]:
    """Group runs that differ in their seed alone, and name each group by what distinguishes it.

    Returns:
        The variants: kinds of attention in the order of their first run, those of one kind by their labels.

    Raises:
        InputError: Two runs are the same, seed included.
    """
    groups: dict[str, list[Run]] = {}
    for run in runs:
        groups.setdefault(repr(sorted(run.settings.items())), []).append(run)
    variants = []
    for group in groups.values():
        by_seed: dict[int, Run] = {}
        for run in sorted(group, key=lambda run: run.seed):
            if run.seed in by_seed:
                raise InputError(
                    f"{by_seed[run.seed].folder} and {run.folder} are the same run twice (seed {run.seed}), or differ "
                    "in their folders of data alone, which runs do not record: name one"
                )
            by_seed[run.seed] = run
        variants.append(Variant(_label(group[0], [other[0] for other in groups.values()]), by_seed))
    kinds = list(dict.fromkeys(variant.model.attention.kind for variant in variants))
    variants.sort(key=lambda variant: (kinds.index(variant.model.attention.kind), _natural_order(variant.label)))
    return variants


def _label(run: Run, others: Sequence[Run]) -> str:
    """Return the kind of attention, and what others differ in (for the keys of attention: others of that kind)."""
    kind = run.model.attention.kind
    parts = []
    for key, value in run.settings.items():
        of_attention = key.startswith("model.attention")
        peers = [other for other in others if not of_attention or other.model.attention.kind == kind]
        if key != "model.attention.kind" and any(other.settings.get(key, value) != value for other in peers):
            short = key.removeprefix("model.attention.").removeprefix("model.attention_")
            parts.append(f"{short}={'whole lines' if key.endswith('.span') and value is None else value}")
    return ", ".join([kind, *parts])


# --------------------------------------------------------------------------------------------------------------------
# cost


def count_parameters(config: ModelConfig) -> int:
    """Return how many numbers a network learns."""
    return sum(parameter.numel() for parameter in _network(config).parameters())


def count_multiply_adds(config: ModelConfig, height: int, width: int) -> int:
    """Return the multiplications, each with an addition, of the inference of one pair of pictures.

    Those of convolutions and matrix products, as computed here: part of the first convolution over the cost volume is
    avoided, see ``fa_stereo.models.cost_volume``. The pair is run through the network on the CPU.
    """
    model = _network(config).eval()
    # The CPU's fused attention, which not every version's counter knows.
    fused = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _fused_attention_flops}
    counting = FlopCounterMode(display=False, custom_mapping=fused)
    with torch.no_grad(), convolved_as_written(), counting as counter:
        model(*torch.zeros(2, 1, 3, height, width))
    return int(counter.get_total_flops()) // 2


def _fused_attention_flops(query: Sequence[int], key: Sequence[int], value: Sequence[int], *_: Any, **__: Any) -> int:
    """Return the FLOPs of fused attention from the shapes [B, h, N, width] of its inputs."""
    return int(sdpa_flop_count(query, key, value))  # type: ignore[no-untyped-call]


def count_kept_bytes(
    config: ModelConfig,
    height: int,
    width: int,
    batch: int = 1,
    precision: str = "fp32",
    *,
    freeze_batch_norm: bool = False,
    activation_checkpointing: bool = False,
) -> int:
    """Return the bytes that a training step keeps from the forward pass for the backward pass, weights left out.

    Args:
        config: The network.
        height: Of the crops, in pixels.
        width: Likewise.
        batch: Crops at once; a few are run through the network on the CPU, as each more keeps as much.
        precision: fp32, bf16 or fp16.
        freeze_batch_norm: With batch norm in eval mode, which is folded into the convolutions on the CPU.
        activation_checkpointing: With parts of the network computed again in the backward pass.
    """
    if batch > _FEW:
        of_two, of_three = (
            count_kept_bytes(
                config, height, width, few, precision,
                freeze_batch_norm=freeze_batch_norm, activation_checkpointing=activation_checkpointing,
            )
            for few in (2, 3)
        )  # fmt: skip
        return of_two + (batch - 2) * (of_three - of_two)
    model = _network(config).train()
    model.activation_checkpointing = activation_checkpointing
    model.features.pyramid.freeze_lonely_values(batch, height // 4, width // 4)
    if freeze_batch_norm:
        set_batch_norm_to_eval(model)
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    autocast = torch.autocast("cpu", dtype=torch.bfloat16, enabled=precision != "fp32")  # fp16 takes as many bytes
    with autocast, torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = model(*torch.zeros(2, batch, 3, height, width))
    del output  # not before: what is kept must stay alive, or its address might stand for two tensors
    return sum(size for address, size in kept.items() if address not in weights)


def _network(config: ModelConfig) -> PSMNet:
    with torch.random.fork_rng(devices=[]):
        return build_model(config)


# --------------------------------------------------------------------------------------------------------------------
# what the spread allows to say


@dataclass(frozen=True)
class Comparison:
    """A variant against the baseline, paired by seed.

    Attributes:
        differences: Variant less baseline, for each seed that both have; below zero is better.
        mean: Of the differences; None without a common seed.
        interval: Student's t interval of the mean at ``CONFIDENCE``; None for fewer than two seeds.
        joint_interval: The same, wide enough for all comparisons made beside it to hold together (Bonferroni).
        comparisons: How many are made, this one included.
    """

    differences: dict[int, float]
    mean: float | None
    interval: tuple[float, float] | None
    joint_interval: tuple[float, float] | None
    comparisons: int

    @property
    def verdict(self) -> str:
        """What the differences allow to say, in words."""
        count = len(self.differences)
        if self.mean is None:
            return "no seed in common"
        if self.interval is None or self.joint_interval is None:
            return "one seed: nothing to tell chance by"
        if self.interval[0] <= 0 <= self.interval[1]:
            return f"not distinguishable with {count} seeds"
        word = "better" if self.mean < 0 else "worse"
        if self.joint_interval[0] <= 0 <= self.joint_interval[1]:
            return f"{word} by itself, not as one of {self.comparisons} comparisons with {count} seeds"
        return f"{word}, with {count} seeds"


def compare(
    variant: Variant, baseline: Variant, metric: str = "end_point_error", *, comparisons: int = 1
) -> Comparison:
    """Compare the last validations of two variants, seed by seed, as one of so many comparisons."""
    seeds = common_seeds(variant, baseline)
    differences = {seed: variant.runs[seed].final[metric] - baseline.runs[seed].final[metric] for seed in seeds}
    values = list(differences.values())
    mean = statistics.fmean(values) if values else None
    if mean is None or len(values) == 1:
        return Comparison(differences, mean, None, None, comparisons)
    error = statistics.stdev(values) / math.sqrt(len(values))
    margins = [
        student_t_factor(len(values) - 1, confidence) * error
        for confidence in (CONFIDENCE, 1 - (1 - CONFIDENCE) / comparisons)
    ]
    interval, joint_interval = ((mean - margin, mean + margin) for margin in margins)
    return Comparison(differences, mean, interval, joint_interval, comparisons)


def common_seeds(variant: Variant, baseline: Variant) -> list[int]:
    """Return the seeds that both have a run of."""
    return [seed for seed in variant.runs if seed in baseline.runs]


def student_t_factor(degrees: int, confidence: float = CONFIDENCE) -> float:
    """Return t with P(|T| < t) = confidence for Student's distribution of so many degrees of freedom.

    With T = sqrt(n) tan(a), the density in a is proportional to cos(a)^(n - 1) on (-pi/2, pi/2), which is summed up.
    """
    edges = np.linspace(0, math.pi / 2, 200_001)
    middles = (edges[:-1] + edges[1:]) / 2
    share = np.concatenate([[0.0], np.cumsum(np.cos(middles) ** (degrees - 1))])
    return math.sqrt(degrees) * math.tan(float(np.interp(confidence, share / share[-1], edges)))


def choose_baseline(variants: Sequence[Variant], label: str | None = None) -> Variant:
    """Return the variant all others are compared with: the one named, else the one without attention, else the first.

    Raises:
        InputError: No variant has that label.
    """
    if label is not None:
        for variant in variants:
            if variant.label == label:
                return variant
        known = "; ".join(variant.label for variant in variants)
        raise InputError(f"--baseline {label!r}: there is no such variant; there are: {known}")
    plain = [variant for variant in variants if variant.model.attention.kind == "none"]
    return plain[0] if plain else variants[0]
