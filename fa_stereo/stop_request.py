"""Being asked to stop, and stopping at a moment that suits."""

from __future__ import annotations

import logging
import signal
import threading
from contextlib import AbstractContextManager
from types import FrameType
from typing import Any

logger = logging.getLogger(__name__)


class StopRequest(AbstractContextManager["StopRequest"]):
    """Notes SIGTERM and the first SIGINT (Ctrl-C) instead of ending the process; a second SIGINT ends it as usual.

    Attributes:
        requested: Whether one of them came.
    """

    _SIGNALS = (signal.SIGTERM, signal.SIGINT)

    def __init__(self) -> None:
        self.requested = False
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():  # Python allows handlers there alone
            self._previous = {number: signal.signal(number, self._note) for number in self._SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.requested = True
        logger.info("%s: finishing the step and saving", signal.Signals(number).name)
        signal.signal(signal.SIGINT, signal.default_int_handler)
