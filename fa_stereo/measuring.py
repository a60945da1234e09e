"""A process that measures on request, so that what it has in memory and in caches concerns nobody else."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

Process = TypeVar("Process", bound="MeasuringProcess")


class MeasuringProcess:
    """``python -m MODULE TASK RESULT``: runs once for every line it reads and answers by a line, after one when ready.

    As a context manager it ends the process, whatever that is doing.

    Args:
        module: Serves the requests.
        task: What to measure, as text.
        folder: Empty; for the process's error messages, and for the file RESULT, an array it may leave.
        environment: Variables to set besides this process's own.
    """

    def __init__(self, module: str, task: str, folder: Path, environment: Mapping[str, str] | None = None) -> None:
        self._result_path = folder / "result.npy"
        self._log = folder / "stderr.txt"
        with self._log.open("w") as log:
            self._popen = subprocess.Popen(
                [sys.executable, "-m", module, task, str(self._result_path)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env={**os.environ, **(environment or {})},
            )

    def __enter__(self: Process) -> Process:
        """Return the process."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """End the process."""
        self._popen.kill()
        self._popen.wait()

    def request(self) -> None:
        """Ask for a run."""
        assert self._popen.stdin is not None
        with suppress(BrokenPipeError):  # its end is told by what is read
            self._popen.stdin.write("run\n")
            self._popen.stdin.flush()

    def request_end(self) -> None:
        """Ask for no more runs."""
        assert self._popen.stdin is not None
        self._popen.stdin.close()

    def read(self, time_limit: float | None = None) -> str | None:
        """Return the next answer, or None if the process ended instead.

        Args:
            time_limit: Seconds after which the process is ended; None waits for ever.

        Raises:
            TimeoutError: It was ended for that.
        """
        assert self._popen.stdout is not None
        late = threading.Event()

        def give_up() -> None:
            late.set()
            self._popen.kill()

        timer = threading.Timer(time_limit, give_up) if time_limit is not None else None
        if timer is not None:
            timer.start()
        line = self._popen.stdout.readline()
        if timer is not None:
            timer.cancel()
        if line.endswith("\n"):
            return line
        self._popen.wait()
        if late.is_set():
            raise TimeoutError(f"more than {time_limit:g} s")
        return None

    def last_words(self) -> str:
        """Return the last line of the error messages of a process that has ended, or how it ended."""
        code = self._popen.wait()
        words = [text for text in self._log.read_text().splitlines() if text.strip()]
        return words[-1] if words else f"ended by signal {-code}" if code < 0 else f"exit code {code}"

    def result(self) -> NDArray[Any] | None:
        """Return the array that a process left at its end, if any."""
        self._popen.wait()
        return np.load(self._result_path) if self._result_path.exists() else None
