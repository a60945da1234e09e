"""Rendered pairs kept in memory: rendered once, beside the training, and drawn as often as it likes.

Rendering a pair takes a core as long as training on it takes a GPU some hundred times. So processes of their own render
while the training goes on, and it draws from what is there, few pairs at first, all of them in the end.
"""

from __future__ import annotations

import multiprocessing
import os
import shutil
import tempfile
import threading
import time
import weakref
from collections.abc import Sequence
from functools import partial
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import Dataset

from fa_stereo.config import RenderConfig
from fa_stereo.data.loading import start_renderer
from fa_stereo.data.rendered import RenderedPairs, render_pair
from fa_stereo.data.sample import StereoSample
from fa_stereo.errors import InputError

_PATIENCE_SECONDS = 300.0  # for the first pair


class RenderedPool(Dataset[StereoSample]):
    """Pairs of one or several kinds that processes render into shared memory, in turn by how many there are of each.

    ``pool[i]`` is pair i if it is there, else one of those that are, of any kind; so what a training run sees first
    depends on the clock. The memory, 14 bytes for each pixel of a pair, is taken as pairs arrive, from ``/dev/shm`` if
    it holds all of them, else from the folder for temporary files. It is given back, and the processes end, with the
    object or with ``close``.

    Args:
        sources: The kinds, of one size.
        workers: Processes that render, at low priority.

    Raises:
        InputError: The sources differ in size, or there is no room for their pairs.
    """

    def __init__(self, sources: Sequence[RenderedPairs], workers: int) -> None:
        if len({(source.config.height, source.config.width) for source in sources}) > 1:
            raise InputError("data.render_workers needs rendered pairs of one size: give all the same height and width")
        self._configs = [source.config for source in sources]
        counts = [len(source) for source in sources]
        self._folder = _make_room(_bytes_each(self._configs[0]) * sum(counts))
        self._pairs = _in_turn(counts)
        self._open(create=True)
        context = multiprocessing.get_context("spawn")  # forking a process that has run PyTorch may hang
        self._processes: list[BaseProcess] = []
        self.close = weakref.finalize(self, _close, self._folder, self._processes, os.getpid())
        devices = [source.device for source in sources]
        for worker in range(workers):
            share = range(worker, len(self._pairs), workers)
            arguments = self._folder, self._configs, devices, self._pairs, share
            process = context.Process(target=_render, args=arguments, daemon=True)
            process.start()
            self._processes.append(process)

    def __len__(self) -> int:
        return len(self._pairs)

    def __getitem__(self, index: int) -> StereoSample:
        """Return a pair without the occlusion mask, its arrays in memory of its own.

        Raises:
            InputError: None was rendered in all the time that is given to the first.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"pair {index} of {len(self)}")
        if not self._ready[index]:
            index = self._any_ready(index)
        kind, number = self._pairs[index]
        left, right = self._pictures[index].copy()
        disparity, right_disparity = self._disparities[index].copy()
        return StereoSample(
            f"rendered/{self._configs[kind].seed}/{number:06d}", left, right, disparity, right_disparity
        )

    @property
    def rendered(self) -> int:
        """How many pairs are there."""
        return int(np.count_nonzero(self._ready))

    def _any_ready(self, index: int) -> int:
        until = time.monotonic() + _PATIENCE_SECONDS
        while True:
            ready = np.flatnonzero(self._ready.copy())  # the processes go on, and NumPy refuses what changes
            if len(ready):
                return int(ready[index % len(ready)])
            if time.monotonic() > until:
                raise InputError(
                    f"data.render_workers: no pair was rendered in {_PATIENCE_SECONDS:.0f} seconds; what the "
                    "processes say above is why"
                )
            time.sleep(0.05)

    def _open(self, *, create: bool = False) -> None:
        self._pictures, self._disparities, self._ready = _arrays(
            self._folder, self._configs[0], len(self._pairs), create=create
        )

    def __getstate__(self) -> dict[str, Any]:
        """For loader processes: they open the same memory, and leave the rendering alone."""
        return {"_folder": self._folder, "_configs": self._configs, "_pairs": self._pairs}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._open()


def _in_turn(counts: Sequence[int]) -> list[tuple[int, int]]:
    """Return (kind, number) of all pairs, mixed so that any first part of them has each kind's share.

    Examples:
        >>> _in_turn([4, 2])
        [(0, 0), (1, 0), (0, 1), (0, 2), (1, 1), (0, 3)]
    """
    places = [((i + 0.5) / count, kind, i) for kind, count in enumerate(counts) for i in range(count)]
    return [(kind, i) for _, kind, i in sorted(places)]


def _bytes_each(config: RenderConfig) -> int:
    return config.height * config.width * (2 * 3 + 2 * 4) + 1


def _arrays(
    folder: Path, config: RenderConfig, pairs: int, *, create: bool = False
) -> tuple[NDArray[np.uint8], NDArray[np.float32], NDArray[np.uint8]]:
    """Map pictures [N, 2, H, W, 3], disparities [N, 2, H, W], left and right each, and which pairs are there [N]."""
    size = pairs, 2, config.height, config.width
    mode: Any = "w+" if create else "r+"
    return (
        np.memmap(folder / "pictures", np.uint8, mode, shape=(*size, 3)),
        np.memmap(folder / "disparities", np.float32, mode, shape=size),
        np.memmap(folder / "ready", np.uint8, mode, shape=(pairs,)),
    )


def _make_room(needed: int) -> Path:
    """Make a folder where so many bytes fit."""
    for parent in (Path("/dev/shm"), Path(tempfile.gettempdir())):
        if parent.is_dir() and shutil.disk_usage(parent).free > needed:
            return Path(tempfile.mkdtemp(prefix="fa_stereo_pairs_", dir=parent))
    raise InputError(
        f"the rendered pairs take {needed / 1e9:.1f} GB, more than is free in /dev/shm or {tempfile.gettempdir()}: "
        "lower rendered.samples, or name a larger folder in TMPDIR"
    )


def _render(
    folder: Path, configs: list[RenderConfig], devices: list[str], pairs: list[tuple[int, int]], share: range
) -> None:
    """Render a process's share of the pairs, in their order; the first process then waits, to clear up after a kill."""
    start_renderer(partial(shutil.rmtree, folder, ignore_errors=True))
    os.nice(10)
    pictures, disparities, ready = _arrays(folder, configs[0], len(pairs))
    for place in share:
        kind, number = pairs[place]
        sample = render_pair(configs[kind], number, devices[kind])
        assert sample.disparity is not None
        assert sample.right_disparity is not None
        pictures[place] = sample.left, sample.right
        disparities[place] = sample.disparity, sample.right_disparity
        ready[place] = 1
    parent = multiprocessing.parent_process()
    if share.start == 0 and parent is not None:
        parent.join()
        threading.Event().wait()  # for the thread that clears up, and ends the process


def _close(folder: Path, processes: list[BaseProcess], owner: int) -> None:
    if os.getpid() != owner:  # a forked loader process
        return
    for process in processes:
        process.terminate()
    for process in processes:
        process.join()
    shutil.rmtree(folder, ignore_errors=True)
