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
    """A few threads, to be used in a ``with`` statement.

    Args:
        count: Of the threads, and of the items that each ``run`` has in work beyond the one it yields.
        finish: When the statement is left, by an error for instance, do what was not begun; else leave it.
    """

    def __init__(self, count: int, *, finish: bool = False) -> None:
        self.count, self.finish = count, finish
        self._pool = ThreadPoolExecutor(count)

    def __enter__(self) -> Threads:
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self._pool.shutdown(cancel_futures=not self.finish)

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
