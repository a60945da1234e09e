"""The order in which a training run sees its samples: a pure function of the seed and the position.

A run reads one endless stream: every pass ("epoch") over the n training pairs is a permutation drawn from (seed,
epoch), and the passes follow each other without a gap, so every batch is full and no pair is left out. Step k of a run
with batch size B takes positions kB .. (k + 1)B - 1. Crop and augmentation of a sample are drawn from (seed, epoch,
index). Nothing of it depends on the number of loader workers, processes or restarts: resuming is counting.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import DataLoader, Dataset, Sampler, default_collate

from fa_stereo.data.loading import process_options
from fa_stereo.data.sample import StereoSample, to_batch_item
from fa_stereo.errors import InputError

Batch = dict[str, Any]
Transform = Callable[[StereoSample, np.random.Generator], StereoSample]

_BATCH_KEYS = ("name", "left", "right", "disparity")


class TrainingStream(Dataset[Batch | Exception]):
    """The endless sequence of training samples, by position.

    Args:
        dataset: Training pairs, with ``len`` and ``[index]``.
        transform: Crop and augmentation, given a sample and a random generator.
        seed: Of the order and of the augmentation.
    """

    def __init__(self, dataset: Dataset[StereoSample], transform: Transform, seed: int) -> None:
        self.dataset = dataset
        self.transform = transform
        self.seed = seed
        self.samples = len(dataset)  # type: ignore[arg-type]
        if self.samples == 0:
            raise InputError("data.train has no pairs to train on")

    def locate(self, position: int) -> tuple[int, int]:
        """Return the epoch a position falls in, and the index of its pair in the data set."""
        epoch, place = divmod(position, self.samples)
        return epoch, int(_permutation(self.seed, epoch, self.samples)[place])

    def __getitem__(self, position: int) -> Batch | Exception:
        """Return the sample at a position, ready for collation.

        A bad file is returned as the exception that names it: raised in a loader worker, its one sentence would reach
        the user wrapped in the worker's traceback.
        """
        epoch, index = self.locate(position)
        try:
            sample = self.dataset[index]
            if sample.disparity is None:
                raise InputError(f"{sample.name}: has no ground truth, so it cannot be trained on")
            sample = self.transform(sample, np.random.default_rng([self.seed, epoch, index]))
        except (InputError, OSError) as error:
            return error
        item = to_batch_item(sample)
        return {key: item[key] for key in _BATCH_KEYS}


@lru_cache(maxsize=2)
def _permutation(seed: int, epoch: int, samples: int) -> NDArray[np.int64]:
    return np.random.default_rng([seed, epoch]).permutation(samples)


class StepSampler(Sampler[list[int]]):
    """The stream positions that one process reads in each step.

    Process r of W takes the r-th of W equal runs of the step's batch: whatever W is, the batch is the same.

    Args:
        first_step: Where to begin: the number of steps already taken.
        total_steps: Where to end.
        batch_size: Samples per step over all processes.
        rank: This process.
        world_size: Number of processes.

    Raises:
        InputError: The batch cannot be dealt out evenly.

    Examples:
        >>> list(StepSampler(2, 4, batch_size=4, rank=1, world_size=2))
        [[10, 11], [14, 15]]
    """

    def __init__(self, first_step: int, total_steps: int, batch_size: int, rank: int = 0, world_size: int = 1) -> None:
        if batch_size % world_size:
            raise InputError(
                f"trainer.batch_size ({batch_size}) must be a multiple of the number of processes ({world_size})"
            )
        self.first_step, self.total_steps = first_step, total_steps
        self.batch_size, self.rank, self.world_size = batch_size, rank, world_size

    def __len__(self) -> int:
        return max(self.total_steps - self.first_step, 0)

    def __iter__(self) -> Iterator[list[int]]:
        share = self.batch_size // self.world_size
        for step in range(self.first_step, self.total_steps):
            start = step * self.batch_size + self.rank * share
            yield list(range(start, start + share))


def make_loader(stream: TrainingStream, sampler: StepSampler, workers: int, *, pin_memory: bool) -> DataLoader[Any]:
    """Return a loader of this process's share of each step's batch, ``left``, ``right`` uint8 [B, 3, H, W] and so on.

    A batch with an unreadable sample is that sample's exception instead.
    """
    return DataLoader(
        stream,
        batch_sampler=sampler,
        collate_fn=_collate,
        pin_memory=pin_memory,
        **process_options(stream, workers),
    )


def _collate(items: Sequence[Batch | Exception]) -> Batch | Exception:
    for item in items:
        if isinstance(item, Exception):
            return item
    batch: Batch = default_collate(list(items))
    return batch
