"""Limits on a process's memory, and how a lack of it is told."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fa_stereo.memory import (
    MemoryLimit,
    available_memory,
    is_out_of_memory,
    left_in_control_groups,
    peak_memory,
    start_peak,
)

linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="limits on the CPU are Linux'")

LIMITED = """
import json, sys, torch
from fa_stereo import memory

memory.return_large_blocks()
before = memory.start_peak("cpu")
limit = memory.MemoryLimit("cpu", 50 * 10**6)
told = [limit.bytes, limit.by]
small = torch.ones(5 * 10**6)
try:
    torch.ones(20 * 10**6)
    failed = False
except RuntimeError as error:
    failed = memory.is_out_of_memory(error)
peak = memory.peak_memory("cpu") - before
limit.set(sys.maxsize)
whole = [limit.bytes, limit.by]
torch.ones(20 * 10**6)
limit.lift()
memory.keep_large_blocks()
print(json.dumps({"told": told, "failed": failed, "peak": peak, "whole": whole}))
"""


@linux
def test_allocations_beyond_the_limit_fail_and_can_be_caught() -> None:
    result = subprocess.run([sys.executable, "-c", LIMITED], capture_output=True, text=True, check=True)
    found = json.loads(result.stdout)
    assert found["told"] == [50 * 10**6, "budget"]
    assert found["failed"]
    assert 19 * 10**6 < found["peak"] < 50 * 10**6  # the tensor of 20 MB, and nothing of the one of 80 MB
    assert found["whole"][1] == "machine"
    assert found["whole"][0] > 50 * 10**6


@pytest.mark.parametrize(("device", "index"), [("cuda", 1), ("cuda:0", 0)])
def test_a_limit_on_a_gpu_names_it_by_its_number(device: str, index: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch refuses "cuda" there. 8 GB of which 2 are PyTorch's and 4 free."""
    fractions: list[tuple[float, int]] = []
    for name, stand_in in {
        "current_device": lambda: 1,
        "mem_get_info": lambda chosen: {index: (4 * 10**9, 8 * 10**9)}[chosen],
        "memory_reserved": lambda chosen: {index: 2 * 10**9}[chosen],
        "set_per_process_memory_fraction": lambda fraction, chosen: fractions.append((fraction, chosen)),
    }.items():
        monkeypatch.setattr(torch.cuda, name, stand_in)
    limit = MemoryLimit(device, 3 * 10**9)
    assert (limit.bytes, limit.by) == (3 * 10**9, "budget")
    limit.set(7 * 10**9)
    assert (limit.bytes, limit.by) == (6 * 10**9, "machine")
    limit.lift()
    assert fractions == [(3 / 8, index), (6 / 8, index), (1.0, index)]


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (MemoryError(), True),
        (torch.OutOfMemoryError("CUDA out of memory"), True),
        (
            RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes"),
            True,
        ),
        (RuntimeError("could not create a primitive"), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (ValueError("can't allocate memory"), False),
    ],
)
def test_want_of_memory_is_recognized(error: Exception, told: bool) -> None:
    assert is_out_of_memory(error) is told


KEPT = """
import ctypes, resource
from fa_stereo import memory

libc = ctypes.CDLL(None)
libc.malloc.argtypes, libc.malloc.restype = [ctypes.c_size_t], ctypes.c_void_p
libc.memset.argtypes, libc.free.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t], [ctypes.c_void_p]

def faults(repeats, size=10**8):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(repeats):
        block = libc.malloc(size)
        libc.memset(block, 1, size)
        libc.free(block)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

faults(1)
usual = faults(5)
assert memory.keep_freed_memory(whole=False)
faults(1, 2 * 10**7)
small, whole = faults(5, 2 * 10**7), faults(5)
assert memory.keep_freed_memory()
faults(1)
print(usual, small, whole, faults(5))
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="an option of glibc's malloc")
def test_freed_memory_is_kept_for_the_next_allocation() -> None:
    allocator = ("MALLOC_", "GLIBC_TUNABLES", "LD_PRELOAD")  # of whoever runs the tests
    environment = {key: value for key, value in os.environ.items() if not key.startswith(allocator)}
    result = subprocess.run([sys.executable, "-c", KEPT], env=environment, capture_output=True, text=True, check=True)
    usual, small, whole, kept = map(int, result.stdout.split())
    assert usual >= 5  # 100 MB each time, in pages of whatever size
    assert small < usual / 10  # blocks of 20 MB are kept for inference,
    assert whole > usual / 2  # those of 100 MB are given back,
    assert kept < usual / 10  # and for training they are kept too


HUGE = """
import os, sys
import torch
from fa_stereo import memory

def is_asked_for(tensor):
    for line in open("/proc/self/smaps"):
        words = line.split()
        if "-" in words[0] and not words[0].endswith(":"):
            first, last = (int(address, 16) for address in words[0].split("-"))
            inside = first <= tensor.data_ptr() + 2**21 < last
        elif words[0] == "VmFlags:" and inside:
            return "hg" in words

assert memory.keep_freed_memory(whole=sys.argv[1] == "whole")
assert os.environ.get("THP_MEM_ALLOC_ENABLE") == (sys.argv[2] or None)
torch.empty(1)
tensors = [torch.empty(10**7 * n, dtype=torch.uint8) for n in (1, 2, 5)]
print(memory.use_huge_pages(), *map(is_asked_for, tensors))
"""


@pytest.mark.skipif(
    platform.libc_ver()[0] != "glibc" or not Path("/sys/kernel/mm/transparent_hugepage").exists(),
    reason="an option of glibc's malloc, and a part of Linux that not every kernel has",
)
@pytest.mark.parametrize(("blocks", "setting"), [("slabs", ""), ("whole", ""), ("slabs", "0")])
def test_large_tensors_are_in_huge_pages(blocks: str, setting: str) -> None:
    """For inference, not for training, and unless the user has set it otherwise."""
    name = "THP_MEM_ALLOC_ENABLE"
    environment = {key: value for key, value in os.environ.items() if key != name} | (
        {name: setting} if setting else {}
    )
    command = [sys.executable, "-c", HUGE, blocks, setting]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    used = (blocks, setting) == ("slabs", "")
    assert result.stdout.split() == 4 * [str(used)]


@linux
def test_available_and_peak_memory() -> None:
    assert 0 < available_memory() < 2**50
    before = start_peak("cpu")
    assert torch.ones(10**7).sum() == 10**7
    assert peak_memory("cpu") >= before


def test_control_groups_of_both_versions(tmp_path: Path) -> None:
    def group(folder: str, **files: str) -> None:
        (tmp_path / folder).mkdir(parents=True, exist_ok=True)
        for name, text in files.items():
            (tmp_path / folder / name.replace("__", ".")).write_text(text)

    group("memory", memory__limit_in_bytes="9223372036854771712", memory__usage_in_bytes="5", memory__stat="cache 3")
    group(
        "memory/jobs/a",
        memory__limit_in_bytes="1000",
        memory__usage_in_bytes="700",
        memory__stat="inactive_file 1\ntotal_inactive_file 100",
    )
    group("jobs", memory__max="2000", memory__current="500", memory__stat="inactive_file 50")
    group("jobs/b", memory__max="max", memory__current="400", memory__stat="inactive_file 50")
    (tmp_path / "membership").write_text("4:memory:/jobs/a\n3:cpuset:/jobs\n0::/jobs/b\n")
    left = list(left_in_control_groups(tmp_path / "membership", tmp_path))
    assert left == [1000 - 700 + 100, 9223372036854771712 - 5, 2000 - 500 + 50]
