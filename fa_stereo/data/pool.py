"""Rendered pairs kept in memory: rendered once, beside the training, and drawn as often as it likes.

Rendering a pair takes a core as long as training on it takes a GPU some hundred times. So processes of their own render
while the training goes on, and it draws from what is there, few pairs at first, all of them in the end.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import shutil
import signal
import tempfile
import threading
import time
from collections.abc import Sequence
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from multiprocessing.reduction import DupFd
from multiprocessing.util import Finalize
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import ConcatDataset, Dataset

from fa_stereo.config import RenderConfig
from fa_stereo.data.loading import interrupts_ignored, start_renderer
from fa_stereo.data.rendered import RenderedPairs, pair_name, render_pair
from fa_stereo.data.sample import StereoSample
from fa_stereo.errors import InputError

logger = logging.getLogger(__name__)

_PATIENCE_SECONDS = 120.0  # for the first pair


class RenderedPool(Dataset[StereoSample]):
    """Pairs of one or several kinds that processes render into shared memory, in turn by how many there are of each.

    ``pool[i]`` is pair i if it is there, else one of those that are, of any kind; so what a training run sees first
    depends on the clock. The memory for all pairs, 14 bytes for each pixel of one, is taken at the start: of
    ``/dev/shm`` if it holds them, else as a file without a name where temporary files are. It is given back, and the
    processes end, with ``close``, with the object, and whatever kills this process.

    Args:
        sources: The kinds, of one size.
        workers: Processes that render, at low priority.

    Attributes:
        workers: Ditto.

    Raises:
        InputError: The sources differ in size, or there is no room for their pairs.
    """

    def __init__(self, sources: Sequence[RenderedPairs], workers: int) -> None:
        if len({(source.config.height, source.config.width) for source in sources}) > 1:
            raise InputError("data.render_workers needs rendered pairs of one size: give all the same height and width")
        counts = [len(source) for source in sources]
        self._configs = [source.config for source in sources]
        self.workers = workers
        self._file = _reserve(_bytes_each(self._configs[0]) * sum(counts) + workers)
        self._pairs = _in_turn(counts)
        self._map()
        context = multiprocessing.get_context("spawn")  # forking a process that has run PyTorch may hang
        processes: list[BaseProcess] = []
        # Unlike weakref's, before multiprocessing waits for its daemons at exit: these ignore what it sends them.
        closing = threading.Event()
        watcher = threading.Thread(target=_watch, args=(processes, self._failed, closing), daemon=True)
        self._finalize: Finalize[None] | None = Finalize(self, _end, (processes, closing, watcher), exitpriority=10)
        self._failed[len(self._pairs) :] = 1  # they have nothing to render
        # By the processes, which inherit it: Ctrl-C and a scheduler's SIGTERM to all are this one's business.
        with interrupts_ignored(signal.SIGINT, signal.SIGTERM):
            for worker in range(workers):
                arguments = self, worker, [source.device for source in sources]
                process = context.Process(target=_render, args=arguments, daemon=True)
                process.start()
                processes.append(process)
        watcher.start()

    def __len__(self) -> int:
        return len(self._pairs)

    def __getitem__(self, index: int) -> StereoSample:
        """Return a pair without the occlusion mask, its arrays in memory of its own.

        Raises:
            InputError: There is none yet, and the processes failed or take too long.
            ValueError: The pool is closed.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"pair {index} of {len(self)}")
        if self._file.closed:
            raise ValueError("the pool of rendered pairs is closed")
        if not self._ready[index]:
            index = self._any_ready(index)
        kind, number = self._pairs[index]
        left, right = self._pictures[index].copy()
        disparity, right_disparity = self._disparities[index].copy()
        return StereoSample(pair_name(self._configs[kind], number), left, right, disparity, right_disparity)

    @property
    def rendered(self) -> int:
        """How many pairs are there."""
        return int(np.count_nonzero(self._ready.copy()))

    def close(self) -> None:
        """End the processes and give the memory back; no pair can be drawn any more."""
        if self._finalize is not None:
            self._finalize()
        self._pictures, self._disparities, self._ready, self._failed = (np.empty(0) for _ in range(4))
        self._file.close()

    def _any_ready(self, index: int) -> int:
        until = time.monotonic() + _PATIENCE_SECONDS
        while True:
            ready = np.flatnonzero(self._ready.copy())  # the processes go on, and NumPy refuses what changes
            if len(ready):
                return int(ready[index % len(ready)])
            if self._failed.all():
                raise InputError(
                    "data.render_workers: no pair was rendered; what the processes say above is why. "
                    "data.render_workers=0 renders in those of the loader"
                )
            if time.monotonic() > until:
                raise InputError(
                    f"data.render_workers: no pair was rendered in {_PATIENCE_SECONDS:g} seconds: the processors are "
                    "too busy, or the processes were ended; data.render_workers=0 renders in those of the loader"
                )
            time.sleep(0.05)

    def _map(self) -> None:
        """Map disparities [N, 2, H, W], pictures [N, 2, H, W, 3], which pairs are there [N], and who failed [P]."""
        pairs, config = len(self._pairs), self._configs[0]
        size = pairs, 2, config.height, config.width
        shapes = (np.float32, size), (np.uint8, (*size, 3)), (np.uint8, (pairs,)), (np.uint8, (self.workers,))
        arrays: list[NDArray[Any]] = []
        offset = 0
        for dtype, shape in shapes:
            arrays.append(_mapped(self._file, dtype, offset, shape))
            offset += arrays[-1].nbytes
        self._disparities, self._pictures, self._ready, self._failed = arrays

    def __getstate__(self) -> dict[str, Any]:
        """For other processes: they open the same memory."""
        kept = "_configs", "_pairs", "workers"
        return {name: self.__dict__[name] for name in kept} | {"descriptor": DupFd(self._file.fileno())}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._file = os.fdopen(state.pop("descriptor").detach(), "r+b")
        self.__dict__.update(state)
        self._finalize = None  # the processes are another's
        self._map()


def pools_of(dataset: Dataset[Any]) -> list[RenderedPool]:
    """Return the pools that a data set is, or is made of."""
    parts = dataset.datasets if isinstance(dataset, ConcatDataset) else [dataset]
    return [part for part in parts if isinstance(part, RenderedPool)]


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


def _reserve(size: int) -> IO[bytes]:
    """Return a file of so many bytes without a name, in memory if it fits there."""
    reason = "no folder for it"
    for name in ("/dev/shm", None):
        try:
            folder = name or tempfile.gettempdir()
            if shutil.disk_usage(folder).free < size:
                reason = f"{folder}: not enough room"
                continue
            file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 - for as long as the pool
            try:
                if hasattr(os, "posix_fallocate"):
                    os.posix_fallocate(file.fileno(), 0, size)
                else:
                    file.truncate(size)
            except OSError:
                file.close()
                raise
        except OSError as error:  # the next may do
            reason = f"{name or 'the folder for temporary files'}: {error.strerror or error}"
            continue
        return file
    raise InputError(
        f"data.render_workers: the pairs take {size / 1e9:.1f} GB, which /dev/shm and the folder for temporary files "
        f"cannot give ({reason}): lower rendered.samples, name a larger folder in TMPDIR, or set data.render_workers=0"
    )


def _mapped(file: IO[bytes], dtype: Any, offset: int, shape: tuple[int, ...]) -> NDArray[Any]:
    if 0 in shape:
        return np.empty(shape, dtype)
    return np.memmap(file, dtype, "r+", offset, shape)


def _render(pool: RenderedPool, worker: int, devices: list[str]) -> None:
    """Render a process's share of the pairs, in their order."""
    start_renderer()
    os.nice(10)
    try:
        for place in range(worker, len(pool), pool.workers):
            kind, number = pool._pairs[place]
            sample = render_pair(pool._configs[kind], number, devices[kind])
            assert sample.disparity is not None
            assert sample.right_disparity is not None
            pool._pictures[place] = sample.left, sample.right
            pool._disparities[place] = sample.disparity, sample.right_disparity
            pool._ready[place] = 1
    except BaseException:
        pool._failed[worker] = 1
        raise


def _watch(processes: Sequence[BaseProcess], failed: NDArray[np.uint8], closing: threading.Event) -> None:
    """Tell of a process that ends before it should, and count it as failed: the system's out-of-memory killer may."""
    running = {process.sentinel: worker for worker, process in enumerate(processes)}
    while running:
        for sentinel in wait(list(running)):
            assert isinstance(sentinel, int)
            worker = running.pop(sentinel)
            if closing.is_set():
                return
            processes[worker].join()
            code = processes[worker].exitcode
            if code:
                how = f"was ended by signal {-code}, for want of memory perhaps" if code < 0 else "failed, see above"
                logger.warning("a process that renders pairs %s; still rendering: %d", how, len(running))
                failed[worker] = 1


def _end(processes: Sequence[BaseProcess], closing: threading.Event, watcher: threading.Thread) -> None:
    closing.set()
    for process in processes:
        process.kill()
    if watcher.is_alive() and watcher is not threading.current_thread():
        watcher.join()  # else both might wait for the same process
    for process in processes:
        process.join()
