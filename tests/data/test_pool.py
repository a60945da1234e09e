"""Pairs rendered beside the training: what is drawn is what would be rendered, from the first pair on."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from torch.utils.data import ConcatDataset
from training_runs import environment, write_pairs

from fa_stereo.config import DataConfig, DatasetConfig, RenderConfig
from fa_stereo.data import open_training_pairs, pool
from fa_stereo.data.pool import RenderedPool
from fa_stereo.data.rendered import RenderedPairs, render_pair
from fa_stereo.errors import InputError

EASY = RenderConfig(height=32, width=64, samples=4, seed=5, max_disparity=32, max_shapes=12)
HARD = RenderConfig(height=32, width=64, samples=2, seed=6, max_disparity=32, max_shapes=12, plain=0.5)


@pytest.fixture(scope="module")
def pairs() -> Iterator[RenderedPool]:
    pairs = RenderedPool([RenderedPairs(EASY), RenderedPairs(HARD)], workers=2)
    yield pairs
    pairs.close()


def wait_for_all(pairs: RenderedPool) -> None:
    until = time.monotonic() + 120
    while pairs.rendered < len(pairs) and time.monotonic() < until:
        time.sleep(0.1)
    assert pairs.rendered == len(pairs)


def test_every_pair_is_there_in_the_end(pairs: RenderedPool) -> None:
    """Those of a kind in order, the kinds in turn; seen from another process's copy too."""
    pairs[5]  # the first that is there, whichever it is
    wait_for_all(pairs)
    turns = [(EASY, 0), (HARD, 0), (EASY, 1), (EASY, 2), (HARD, 1), (EASY, 3)]
    copy = pickle.loads(pickle.dumps(pairs))
    assert len(pairs) == len(copy) == len(turns)
    for place, (config, number) in enumerate(turns):
        expected = render_pair(config, number)
        for sample in (pairs[place], copy[place]):
            assert sample.name == expected.name
            for name in ("left", "right", "disparity", "right_disparity"):
                assert np.array_equal(getattr(sample, name), getattr(expected, name))


def test_a_sample_may_be_changed(pairs: RenderedPool) -> None:
    wait_for_all(pairs)
    before = pairs[0].left.copy()
    pairs[0].left[:] = 0
    assert np.array_equal(pairs[0].left, before)


def test_until_then_those_that_are_there_are_drawn() -> None:
    pairs = RenderedPool([RenderedPairs(EASY)], workers=0)
    pairs._ready[1] = pairs._ready[3] = 1
    pairs._pictures[1], pairs._pictures[3] = 10, 30
    assert [int(pairs[i].left[0, 0, 0]) for i in range(4)] == [10, 10, 10, 30]
    with pytest.raises(IndexError):
        pairs[4]
    pairs.close()


def test_pairs_that_arrive_while_one_is_drawn_do_not_matter() -> None:
    """NumPy raises an error where it counts entries that change under its hands."""
    many = RenderConfig(height=16, width=16, samples=100_000)
    pairs = RenderedPool([RenderedPairs(many)], workers=0)
    pairs._ready[-1], stop = 1, threading.Event()

    def arrive() -> None:
        while not stop.is_set():
            for value in (1, 0):
                pairs._ready[: len(pairs) // 2] = value

    thread = threading.Thread(target=arrive)
    thread.start()
    try:
        assert all(0 <= pairs._any_ready(index) < len(pairs) for index in range(3000))
    finally:
        stop.set()
        thread.join()
        pairs.close()


def test_processes_end_with_the_pool_and_not_before() -> None:
    others = set(multiprocessing.active_children())
    pairs = RenderedPool([RenderedPairs(EASY)], workers=1)
    (process,) = set(multiprocessing.active_children()) - others
    pairs[0]
    assert process.pid is not None
    for number in (signal.SIGINT, signal.SIGTERM):  # to a whole process group: the trainer's business alone
        os.kill(process.pid, number)
    wait_for_all(pairs)
    pairs.close()
    assert not process.is_alive()
    assert process.exitcode in (0, -signal.SIGKILL)
    with pytest.raises(ValueError, match="is closed"):
        pairs[0]

    pairs = RenderedPool([RenderedPairs(EASY)], workers=1)
    (process,) = set(multiprocessing.active_children()) - others
    del pairs
    assert not process.is_alive()


def test_a_killed_run_leaves_nothing_behind(tmp_path: Path) -> None:
    program = (
        "import time\n"
        "from fa_stereo.config import RenderConfig\n"
        "from fa_stereo.data.pool import RenderedPool\n"
        "from fa_stereo.data.rendered import RenderedPairs\n"
        "if __name__ == '__main__':\n"
        "    config = RenderConfig(height=32, width=64, samples=2000, max_disparity=32, max_shapes=12)\n"
        "    pairs = RenderedPool([RenderedPairs(config)], workers=1)\n"
        "    pairs[0]\n"
        "    print('drawn', flush=True)\n"
        "    time.sleep(100)\n"
    )
    file = tmp_path / "program.py"
    file.write_text(program)
    run = subprocess.Popen([sys.executable, str(file)], stdout=subprocess.PIPE, text=True, env=environment())
    assert run.stdout is not None
    with run.stdout:
        assert run.stdout.readline() == "drawn\n"
        run.kill()
        # The process that renders has its end of the pipe as well: with the last process the file without a name goes.
        readable, _, _ = select.select([run.stdout], [], [], 60)
        assert readable
        assert run.stdout.read() == ""
    run.wait()


def test_a_pool_that_is_left_open_ends_with_the_program(tmp_path: Path) -> None:
    """Whatever registered its own clean-up first."""
    program = (
        "import weakref\n"
        "class Thing: pass\n"
        "thing = Thing()\n"
        "weakref.finalize(thing, print)\n"
        "from fa_stereo.config import RenderConfig\n"
        "from fa_stereo.data.pool import RenderedPool\n"
        "from fa_stereo.data.rendered import RenderedPairs\n"
        "if __name__ == '__main__':\n"
        "    config = RenderConfig(height=32, width=64, samples=5000, max_disparity=32, max_shapes=12)\n"
        "    pairs = RenderedPool([RenderedPairs(config)], workers=1)\n"
        "    pairs[0]\n"
    )
    file = tmp_path / "program.py"
    file.write_text(program)
    subprocess.run([sys.executable, str(file)], env=environment(), check=True, timeout=90)


def test_processes_that_fail_are_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    pairs = RenderedPool([RenderedPairs(EASY)], workers=0)
    pairs._failed = np.ones(2, np.uint8)
    with pytest.raises(InputError, match=r"data\.render_workers: no pair was rendered.*render_workers=0"):
        pairs[0]
    monkeypatch.setattr(pool, "render_pair", lambda *_: 1 / 0)
    pairs._failed, pairs.workers = np.zeros(2, np.uint8), 2
    monkeypatch.setattr(pool, "start_renderer", lambda: None)
    monkeypatch.setattr(os, "nice", lambda _: None)
    with pytest.raises(ZeroDivisionError):
        pool._render(pairs, 1, ["cpu"])
    assert pairs._failed.tolist() == [0, 1]
    pairs.close()


def test_a_process_that_the_system_ends_is_told_of(caplog: pytest.LogCaptureFixture) -> None:
    others = set(multiprocessing.active_children())
    many = RenderConfig(height=32, width=64, samples=2000, max_disparity=32, max_shapes=12)
    pairs = RenderedPool([RenderedPairs(many)], workers=1)
    try:
        (process,) = set(multiprocessing.active_children()) - others
        process.kill()
        until = time.monotonic() + 60
        while not pairs._failed.all() and time.monotonic() < until:
            time.sleep(0.05)
        assert pairs._failed.all()
        assert "a process that renders pairs was ended by signal 9" in caplog.text
        assert "still rendering: 0" in caplog.text
        pairs._ready[:] = 0  # as if it had been ended before its first pair
        with pytest.raises(InputError, match=r"data\.render_workers: no pair was rendered"):
            pairs[0]
    finally:
        pairs.close()


def test_nothing_rendered_in_time_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool, "_PATIENCE_SECONDS", 0.1)
    pairs = RenderedPool([RenderedPairs(EASY)], workers=0)
    pairs._failed = np.zeros(1, np.uint8)
    with pytest.raises(InputError, match=r"data\.render_workers: no pair was rendered"):
        pairs[0]
    pairs.close()


def test_no_room_is_an_error() -> None:
    large = RenderConfig(height=4096, width=4096, samples=10**9)
    with pytest.raises(InputError, match="GB, which /dev/shm and the folder for temporary files"):
        RenderedPool([RenderedPairs(large)], workers=1)


def test_kinds_of_different_sizes_are_an_error() -> None:
    small = RenderConfig(height=16, width=64, samples=1)
    with pytest.raises(InputError, match="needs rendered pairs of one size"):
        RenderedPool([RenderedPairs(EASY), RenderedPairs(small)], workers=1)


def test_the_rendered_sources_of_a_training_share_one(tmp_path: Path) -> None:
    root = str(write_pairs(tmp_path / "pairs"))
    rendered = [DatasetConfig(kind="rendered", rendered=config) for config in (EASY, HARD)]
    files = DatasetConfig(kind="pairs", root=root)
    joined = open_training_pairs(DataConfig(rendered[0], [files, rendered[1]], render_workers=1))
    assert isinstance(joined, ConcatDataset)
    assert [type(part).__name__ for part in joined.datasets] == ["RenderedPool", "OwnPairs"]
    assert len(joined.datasets[0]) == 6  # type: ignore[arg-type]
    with pytest.raises(InputError, match=r"data\.render_workers is for rendered pairs"):
        open_training_pairs(DataConfig(files, render_workers=1))
