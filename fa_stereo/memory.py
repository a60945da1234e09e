"""The memory of this process: how much it takes, how much it may take, and how a lack of it is told.

On the CPU memory is what is resident, by Linux' count; on a GPU what PyTorch has allocated there.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import torch

from fa_stereo.errors import InputError

# Part of the machine's free memory that a limited process may take: something is left for everybody else.
USABLE = 0.9


def memory_in_use(device: str) -> int:
    """Return the bytes in use now; on a CPU without Linux, the most that ever were."""
    if device != "cpu":
        torch.cuda.synchronize(device)
        return torch.cuda.memory_allocated(device)
    return _status("VmRSS") if sys.platform.startswith("linux") else peak_memory(device)


def start_peak(device: str) -> int:
    """Forget the peak so far; return the bytes in use now, or the peak where it cannot be forgotten."""
    if device != "cpu":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        try:
            Path("/proc/self/clear_refs").write_text("5")
        except OSError:  # not permitted: the peak stays, and what comes below it is not seen
            return peak_memory(device)
    return memory_in_use(device)


def peak_memory(device: str) -> int:
    """Return the largest number of bytes in use since ``start_peak``."""
    if device != "cpu":
        return torch.cuda.max_memory_allocated(device)
    if sys.platform.startswith("linux"):
        return _status("VmHWM")
    import resource  # not on Windows, where no peak is reported

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


class MemoryLimit:
    """A limit on what this process allocates from now on, beyond which allocations fail and can be caught.

    What the process has at construction (interpreter, libraries; on a GPU the context) is not counted. On a GPU the
    limit is on PyTorch's allocator; on the CPU on all private memory (``RLIMIT_DATA``), which counts what is allocated
    whether touched or not, so that the kernel need not kill anybody.

    Args:
        device: cpu, cuda or cuda:N.
        budget_bytes: Most that may be allocated.

    Attributes:
        bytes: The limit in force: the budget, or what the machine has free if that is less.
        by: ``budget`` or ``machine``, whichever it is.

    Raises:
        InputError: The system cannot limit a process's memory.
    """

    def __init__(self, device: str, budget_bytes: int) -> None:
        if device == "cpu" and not sys.platform.startswith("linux"):
            raise InputError("only Linux can limit the memory of a process on the CPU: use a GPU (--device cuda)")
        self.device = device
        self.own, self.index = 0, 0
        if device == "cpu":
            self.own = _status("VmData")
        else:  # PyTorch takes no limit for "cuda", only for one of its devices
            index = torch.device(device).index
            self.index = torch.cuda.current_device() if index is None else index
        self.set(budget_bytes)

    def set(self, budget_bytes: int) -> None:
        """Set another limit, or the same by what the machine has free now."""
        if self.device == "cpu":
            used = _status("VmData") - self.own
            machine = used + int(USABLE * available_memory())
        else:
            free, total = torch.cuda.mem_get_info(self.index)
            machine = torch.cuda.memory_reserved(self.index) + free
        self.bytes, self.by = min((budget_bytes, "budget"), (machine, "machine"))
        if self.device == "cpu":
            _set_data_limit(self.own + self.bytes)
        else:
            torch.cuda.set_per_process_memory_fraction(min(1.0, self.bytes / total), self.index)

    def lift(self) -> None:
        """Remove the limit."""
        if self.device == "cpu":
            _set_data_limit(None)
        else:
            torch.cuda.set_per_process_memory_fraction(1.0, self.index)


def return_large_blocks() -> bool:
    """Have glibc give every block of 1 MiB or more back to the system as soon as it is freed; tell whether it will.

    By default it keeps some, depending on what was allocated before, so that the resident memory of a process says
    little about what its tensors need.
    """
    return _set_malloc_option(_M_MMAP_THRESHOLD, 2**20)


def keep_large_blocks() -> bool:
    """Have glibc keep freed blocks of up to 32 MiB for the next allocation, as it comes to do by default."""
    return _set_malloc_option(_M_MMAP_THRESHOLD, 2**25) and _set_malloc_option(_M_TRIM_THRESHOLD, 2**26)


def keep_freed_memory(*, whole: bool = True) -> bool:
    """Have glibc keep freed memory (up to 2 GiB at the end of the heap) for the next allocation.

    For programs that allocate the same large blocks over and over, as a network does: what was given back to the system
    has to be cleared by it, page by page, when it is asked for again. It concerns the whole process, so that it is for
    commands to call and not for the library.

    Args:
        whole: Keep blocks of any size, which is fastest, but leaves holes between them: for training, whose blocks have
            the same sizes in every step. Otherwise those of up to 32 MiB, the slabs that inference works in, while
            whole volumes are given back, and cleared faster when asked for again: see ``use_huge_pages``.
    """
    if not whole:  # what is never given back is cleared once, and aligned to pages more of it would lie idle
        use_huge_pages()
    limited = _set_malloc_option(_M_MMAP_MAX, 0) if whole else _set_malloc_option(_M_MMAP_THRESHOLD, 2**25)
    return limited and _set_malloc_option(_M_TRIM_THRESHOLD, 2**31 - 1)


def use_huge_pages() -> bool:
    """Have PyTorch ask Linux for huge pages for blocks of 2 MiB or more of a CPU's memory; tell whether it does.

    Linux, where it is set up to listen (mode ``madvise``), clears 2 MiB at a time then instead of 4 KiB. For that
    PyTorch aligns blocks to pages, which leaves fewer holes among the slabs of inference, but more among the blocks of
    training. It looks at its environment variable for it only once, at the first tensor of a process. If
    ``THP_MEM_ALLOC_ENABLE`` is set already, it stays as it is.
    """
    name = "THP_MEM_ALLOC_ENABLE"
    ours = sys.platform.startswith("linux") and name not in os.environ
    if ours:
        os.environ[name] = "1"
    try:
        blocks = [torch.empty(2**21 + 1, dtype=torch.uint8) for _ in range(2)]
    finally:
        if ours:
            del os.environ[name]  # other processes decide for themselves
    # What Linux can be asked about has to begin with a page.
    return sys.platform.startswith("linux") and all(block.data_ptr() % mmap.PAGESIZE == 0 for block in blocks)


def return_freed_memory() -> bool:
    """Give the memory that was freed so far, and that glibc keeps, back to the system; tell whether there was any."""
    try:
        return bool(ctypes.CDLL(None).malloc_trim(0))
    except (AttributeError, OSError, TypeError):  # another C library
        return False


# From malloc.h.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_MMAP_MAX = -1, -3, -4


def _set_malloc_option(option: int, value: int) -> bool:
    try:
        return bool(ctypes.CDLL(None).mallopt(option, value))
    except (AttributeError, OSError, TypeError):  # another C library
        return False


def is_out_of_memory(error: BaseException) -> bool:
    """Tell whether an allocator gave up; those of the CPU have no exception type of their own."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    # The last is all that oneDNN says; it can have other causes, which a tiny input brings to light too.
    told = ("can't allocate memory", "Cannot allocate memory", "std::bad_alloc", "could not create a")
    return isinstance(error, RuntimeError) and any(words in str(error) for words in told)


def available_memory() -> int:
    """Return how many bytes can be allocated without swapping: the machine's, or the process's control group's."""
    meminfo = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
    return min([1024 * int(meminfo["MemAvailable"].split()[0]), *left_in_control_groups()])


def left_in_control_groups(
    membership: Path = Path("/proc/self/cgroup"), root: Path = Path("/sys/fs/cgroup")
) -> Iterator[int]:
    """Yield what each limited memory control group that holds this process has left, in both versions of Linux'."""
    version_1 = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
    version_2 = ("memory.max", "memory.current", "inactive_file")
    for line in membership.read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers not in ("", "memory"):
            continue
        top = root / controllers
        limit_file, usage_file, cache = version_1 if controllers else version_2
        group = top / path.strip("/")
        for folder in (group, *group.parents):
            with contextlib.suppress(OSError, ValueError):  # no such file, or "max": no limit here
                limit, usage = (int((folder / name).read_text()) for name in (limit_file, usage_file))
                statistics = dict(entry.split() for entry in (folder / "memory.stat").read_text().splitlines())
                yield limit - usage + int(statistics.get(cache, 0))  # cached files make room when it is needed
            if folder == top:
                break


def _set_data_limit(limit: int | None) -> None:
    import resource  # not on Windows

    _, hard = resource.getrlimit(resource.RLIMIT_DATA)
    unlimited = hard == resource.RLIM_INFINITY
    soft = hard if limit is None else limit if unlimited else min(limit, hard)
    resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))


def _status(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(dict(line.split(":", 1) for line in lines)[key].split()[0])
