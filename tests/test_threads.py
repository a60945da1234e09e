from __future__ import annotations

import os
import stat
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from fa_stereo.files import save_atomically
from fa_stereo.threads import Threads


@pytest.mark.parametrize("count", [1, 3])
def test_items_come_in_order_and_few_are_taken_ahead(count: int) -> None:
    taken: list[int] = []
    main = threading.get_ident()

    def items() -> Iterator[int]:
        for item in range(10):
            assert threading.get_ident() == main
            taken.append(item)
            yield item

    def work(item: int) -> int:
        assert threading.get_ident() != main
        return item * item

    with Threads(count) as threads:
        for position, (item, future) in enumerate(threads.run(work, items())):
            assert item == position
            assert future.result() == item * item
            assert len(taken) == min(position + 1 + count, 10)


def test_one_stage_feeds_the_next() -> None:
    with Threads(2) as threads:
        doubled = (future.result() for _, future in threads.run(lambda item: 2 * item, range(20)))
        assert [future.result() for _, future in threads.run(lambda item: item + 1, doubled)] == list(range(1, 41, 2))


def test_what_fails_says_so_where_its_result_is_asked_for() -> None:
    outcomes = []
    with Threads(2) as threads:
        for item, future in threads.run(lambda item: 1 / item, [2, 0, 4]):
            outcomes.append((item, type(future.exception())))
    assert outcomes == [(2, type(None)), (0, ZeroDivisionError), (4, type(None))]


def test_what_is_not_begun_is_not_done_after_a_failure() -> None:
    done: list[int] = []
    begun, release = threading.Event(), threading.Event()

    def work(item: int) -> None:
        begun.set()
        assert release.wait(10)
        done.append(item)

    def interrupted() -> None:
        with Threads(1) as threads:
            for _ in threads.run(work, range(5)):  # the first one, while the second waits
                assert begun.wait(10)
                threading.Timer(0.2, release.set).start()
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert done == [0]


def test_what_is_to_be_finished_is() -> None:
    done: list[int] = []

    def failing() -> None:
        with Threads(3, finish=True) as threads:
            for item, _ in threads.run(done.append, range(10)):
                if item == 2:
                    raise KeyError(item)

    with pytest.raises(KeyError):
        failing()
    assert sorted(done) == [0, 1, 2, 3, 4, 5]


@pytest.mark.parametrize("linux", [True, False])
def test_files_of_many_threads_get_the_permissions_of_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, linux: bool
) -> None:
    before = os.umask(0o027)

    def unhurried(mask: int, set_mask: Callable[[int], int] = os.umask) -> int:
        previous = set_mask(mask)
        time.sleep(0.001)  # another thread's turn
        return previous

    monkeypatch.setattr(os, "umask", unhurried)
    if not linux:  # as where the system does not tell the mask
        monkeypatch.setattr("re.search", lambda *_, **__: None)
    try:
        with Threads(8) as threads:
            paths = [tmp_path / f"{i}.bin" for i in range(40)]
            written = threads.run(
                lambda path: save_atomically(path, lambda file: file.write_bytes(b"1"), durable=False), paths
            )
            for _, future in written:
                future.result()
        assert {stat.S_IMODE(path.stat().st_mode) for path in paths} == {0o640}
    finally:
        assert os.umask(before) == 0o027
