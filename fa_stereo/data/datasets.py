"""From a configuration to a data set."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch.utils.data import ConcatDataset, Dataset

from fa_stereo.config import DataConfig, DatasetConfig, RenderConfig, flatten, to_plain
from fa_stereo.data.eth3d import Eth3d
from fa_stereo.data.kitti import Kitti
from fa_stereo.data.middlebury import Middlebury2006, Middlebury2014, MiddleburyV2
from fa_stereo.data.pairs import FileDataset, OwnPairs
from fa_stereo.data.rendered import RenderedPairs, read_settings
from fa_stereo.data.sample import StereoSample
from fa_stereo.data.scene_flow import SceneFlow
from fa_stereo.errors import InputError
from fa_stereo.files import expand_user


def open_dataset(config: DatasetConfig) -> Dataset[StereoSample]:
    """Return the pairs that a configuration names: ``len(dataset)`` and ``dataset[i]``, a ``StereoSample``.

    Opening lists files and reads none; a data set can be sent to loader processes.

    Raises:
        InputError: The root is not given, missing, empty or incomplete.
    """
    if config.kind == "rendered":
        samples = min(config.rendered.samples, config.limit or config.rendered.samples)
        return RenderedPairs(dataclasses.replace(config.rendered, samples=samples))
    dataset = _open(config)
    if config.limit is not None:
        return LimitedDataset(dataset, config.limit)
    return dataset


def open_training_pairs(config: DataConfig) -> Dataset[StereoSample]:
    """Return all pairs that a configuration trains on: those of ``train``, then those of every part of ``also``.

    Where horizontal flips are asked for, the first pair of every source is read, to see whether it can be flipped.

    Raises:
        InputError: As for ``open_dataset``, with the key of one of several sources; or a source has no ground truth, or
            cannot be flipped.
    """
    parts: list[Dataset[StereoSample]] = []
    for name, source in config.sources.items():
        try:
            parts.append(open_dataset(source))
        except InputError as error:
            raise InputError(f"{name}: {error}" if config.also else str(error)) from error
    for name, pairs in zip(config.sources, parts, strict=True):
        check_truth(pairs, name)
    if config.augmentation.horizontal_flip > 0:
        for (name, source), pairs in zip(config.sources.items(), parts, strict=True):
            if source.kind != "rendered" and len(pairs) and pairs[0].right_disparity is None:  # type: ignore[arg-type]
                remedy = f"{name}.scene_flow.right_disparity=true" if source.kind == "scene_flow" else "another source"
                raise InputError(
                    f"{name}: data.augmentation.horizontal_flip needs the right view's disparity, which "
                    f"{pairs[0].name} does not have: use {remedy}, or data.augmentation.horizontal_flip=0"
                )
    if config.render_workers:
        parts = _pool_rendered(parts, config.render_workers)
    return parts[0] if len(parts) == 1 else ConcatDataset(parts)


def check_truth(dataset: Dataset[StereoSample], name: str) -> None:
    """Make sure, without reading a pair, that a data set has disparities to train or validate by.

    Raises:
        InputError: It has none.
    """
    parts = [dataset]
    while parts:
        part = parts.pop()
        if isinstance(part, ConcatDataset):
            parts += part.datasets
        elif isinstance(part, LimitedDataset):
            parts.append(part.dataset)
        elif not isinstance(part, FileDataset) or any(frame.disparity is not None for frame in part.frames):
            return
    raise InputError(f"{name}: there are pictures, but no ground truth: see data/README.md for where it should lie")


def rendered_settings(config: DatasetConfig) -> dict[str, Any] | None:
    """Return how the pairs of a folder were rendered (see ``read_settings``), None for what was not.

    Raises:
        InputError: The file that should say so is damaged.
    """
    if config.kind != "scene_flow" or not config.root:
        return None
    found = {split: read_settings(expand_user(config.root), split) for split in scene_flow_splits(config)}
    known = {split: settings for split, settings in found.items() if settings is not None}
    return next(iter(known.values())) if len(found) == 1 and known else known or None


def comparable_settings(rendered: Mapping[str, Any]) -> dict[str, Any]:
    """Return by full key what makes rendered pairs, of one split or of several, with defaults for what came later.

    Args:
        rendered: As ``rendered_settings`` returns it, perhaps of another version. How many pairs were rendered and on
            which device is left out, as neither makes another pair.
    """
    beside = ("samples", "device")
    defaults = to_plain(RenderConfig())

    def complete(settings: Mapping[str, Any]) -> dict[str, Any]:
        return {key: value for key, value in {**defaults, **settings}.items() if key not in beside}

    if all(isinstance(settings, Mapping) for settings in rendered.values()):
        return flatten({split: complete(settings) for split, settings in rendered.items()})
    return flatten(complete(rendered))


def _pool_rendered(parts: list[Dataset[StereoSample]], workers: int) -> list[Dataset[StereoSample]]:
    """Replace the rendered ones of several sources by a pool of all their pairs."""
    from fa_stereo.data.pool import RenderedPool

    rendered = [part for part in parts if isinstance(part, RenderedPairs)]
    if not rendered:
        raise InputError("data.render_workers is for rendered pairs, and no source renders any: leave it out")
    return [RenderedPool(rendered, workers), *(part for part in parts if not isinstance(part, RenderedPairs))]


class LimitedDataset(Dataset[StereoSample]):
    """The first pairs of another data set.

    Args:
        dataset: The data set.
        limit: How many of its pairs to use at most.
    """

    def __init__(self, dataset: Dataset[StereoSample], limit: int) -> None:
        self.dataset = dataset
        self.limit = limit

    def __len__(self) -> int:
        return min(self.limit, len(self.dataset))  # type: ignore[arg-type]

    def __getitem__(self, index: int) -> StereoSample:
        if not 0 <= index < len(self):
            raise IndexError(f"pair {index} of {len(self)}")
        return self.dataset[index]


def _open(config: DatasetConfig) -> Dataset[StereoSample]:
    root = checked_root(config.root, config.kind)
    if config.kind == "scene_flow":
        splits = scene_flow_splits(config)
        parts = [SceneFlow(root, split, config.scene_flow) for split in splits]
        return parts[0] if len(parts) == 1 else ConcatDataset(parts)
    if config.kind in ("kitti2012", "kitti2015"):
        return Kitti(root, int(config.kind[-4:]), config.split)
    if config.kind == "middlebury2014":
        return Middlebury2014(root, config.split, config.resolution)
    if config.kind == "middlebury2006":
        return Middlebury2006(root, config.resolution)
    if config.kind == "middlebury_v2":
        return MiddleburyV2(root)
    if config.kind == "eth3d":
        return Eth3d(root, config.split)
    return OwnPairs(root)


def scene_flow_splits(config: DatasetConfig) -> tuple[str, ...]:
    """Return the splits of Scene Flow that are read; ``test`` has FlyingThings3D only."""
    if config.split != "all":
        return (config.split,)
    return ("train", "test") if "flyingthings3d" in config.scene_flow.sets else ("train",)


def checked_root(root: str | None, kind: str) -> Path:
    """Return the folder of a data set.

    Raises:
        InputError: It is not given, missing, no folder, or empty.
    """
    if not root:
        raise InputError(f"root is not given: name the folder of {kind} (data/README.md says how it is laid out)")
    folder = expand_user(root)
    if not folder.is_dir():
        raise InputError(
            f"{folder}: no such folder; data/README.md says where {kind} comes from and how it is laid out"
        )
    if not any(folder.iterdir()):
        raise InputError(f"{folder} is empty; data/README.md says where {kind} comes from and how it is laid out")
    return folder
