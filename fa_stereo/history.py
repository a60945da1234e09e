"""The learning curve of a run as a file: ``history.jsonl`` in its folder, one JSON object a line, one a validation.

TensorBoard's files are for looking at; this one is for computing with. Every line has

    step                  optimizer steps taken
    epoch                 passes over the training pairs
    end_point_error, ...  the validation's metrics
    step_seconds          median time of a training step since the line before; null before the first step
    step_cpu_seconds      the same in processor time of all threads, which other programs disturb less
    peak_memory_bytes     most memory that PyTorch allocated on the GPU so far; null without one
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fa_stereo.errors import InputError
from fa_stereo.files import read_bytes, write_bytes

FILE_NAME = "history.jsonl"


class History:
    """Writes a run's history, and goes on with it when the run is resumed.

    Args:
        folder: The run's.
        last_step: Step of the last validation that the run remembers: what an interrupted one wrote beyond is dropped,
            since those steps are taken again.
        lines: The history so far, as the run remembers it; a file that is there is another run's, then. None is for
            runs that do not (older ones): theirs is what the file says.

    Raises:
        InputError: The file is asked, and cannot be read or is not a history.
    """

    def __init__(self, folder: Path, last_step: int, lines: Sequence[dict[str, Any]] | None = ()) -> None:
        self.path = folder / FILE_NAME
        if lines is None:
            lines = read_history(self.path) if self.path.exists() else ()
        self.lines: list[dict[str, Any]] = [line for line in lines if line["step"] <= last_step]

    def add(self, values: Mapping[str, Any]) -> None:
        """Add a line.

        Raises:
            InputError: It cannot be written; the file is as it was.
        """
        self.lines.append(dict(values))
        write_bytes(self.path, "".join(json.dumps(line) + "\n" for line in self.lines).encode())


def read_history(path: str | Path) -> list[dict[str, Any]]:
    """Return the lines of a history, whose steps grow.

    Raises:
        InputError: The file is missing, empty or not a history; the message names file and line.
    """
    lines: list[dict[str, Any]] = []
    for number, text in enumerate(read_bytes(path).decode(errors="replace").splitlines(), start=1):
        try:
            line = json.loads(text)
        except json.JSONDecodeError:
            line = None
        before = lines[-1]["step"] if lines else -1
        if not isinstance(line, dict) or not isinstance(line.get("step"), int) or line["step"] <= before:
            raise InputError(
                f"{path}, line {number}: not a line of a run's history (a JSON object with a growing step); "
                "restore the file, or remove it: a resumed run has it in its checkpoint"
            )
        lines.append(line)
    return lines
