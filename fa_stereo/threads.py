"""Threads that work ahead of the one that uses their results, or after it."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Any, TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


class Threads:
    """A few threads, to be used in a ``with`` statement; what they have not begun when it is left is not done.

    Args:
        count: Of the threads, and of the items that each ``run`` has in work beyond the one it yields.
    """

    def __init__(self, count: int) -> None:
        self.count = count
        self._pool = ThreadPoolExecutor(count)

    def __enter__(self) -> Threads:
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self._pool.shutdown(cancel_futures=True)

    def run(self, function: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[tuple[Item, Future[Result]]]:
        """Yield every item, in order, with what ``function`` makes of it in a thread.

        Items are taken ``count`` ahead of the one that is yielded, by the thread that iterates.
        """
        pending: deque[tuple[Item, Future[Any]]] = deque()
        for item in items:
            pending.append((item, self._pool.submit(function, item)))
            if len(pending) > self.count:
                yield pending.popleft()
        yield from pending
