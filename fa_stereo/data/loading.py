"""How the processes that load or render pairs are started, in training and in evaluation alike."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import cv2
import torch
from torch.utils.data import Dataset


def process_options(dataset: Dataset[Any], workers: int) -> dict[str, Any]:
    """Return the options of a ``DataLoader`` that concern its processes.

    Args:
        dataset: What they read.
        workers: How many there are; 0 reads in the process itself.
    """
    return {
        "num_workers": workers,
        # A forked process cannot use CUDA.
        "multiprocessing_context": "spawn" if workers and renders_on_gpu(dataset) else None,
        "worker_init_fn": _prepare,
        # A generator of its own: the default would draw a number from PyTorch's global random state.
        "generator": torch.Generator(),
    }


def renders_on_gpu(dataset: Dataset[Any]) -> bool:
    """Return whether a data set, or one that it is made of, renders its pairs on a GPU."""
    inner = [getattr(dataset, "dataset", None), *getattr(dataset, "datasets", [])]
    return getattr(dataset, "device", "cpu") == "cuda" or any(
        isinstance(part, Dataset) and renders_on_gpu(part) for part in inner
    )


def _prepare(worker: int) -> None:
    """Make a loader process work alone, and outlive Ctrl-C and a scheduler's SIGTERM to the whole process group.

    The trainer still needs it then, to finish its step; when the trainer itself dies, its workers notice and leave.
    """
    cv2.setNumThreads(0)  # the processes share the cores already
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


@contextmanager
def interrupts_ignored(*signals: signal.Signals) -> Iterator[None]:
    """Ignore Ctrl-C inside, or the signals given, as do processes that are started there."""
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread may change signals, and only it receives them
        return
    before = [(number, signal.signal(number, signal.SIG_IGN)) for number in signals or (signal.SIGINT,)]
    try:
        yield
    finally:
        for number, handler in before:
            signal.signal(number, handler)


def start_renderer() -> None:
    """Have a process that renders use one thread, and not outlive its parent: a killed one cannot tell it to stop."""
    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
