"""Files that are there whole or not at all."""

from __future__ import annotations

import os
import re
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from fa_stereo.errors import InputError

LOCK_FILE = ".lock"
_UMASK_LOCK = threading.Lock()


def expand_user(path: str | Path) -> Path:
    """Return a path whose leading ``~`` is made the home folder; as it is if the user has none."""
    try:
        return Path(path).expanduser()
    except RuntimeError:
        return Path(path)


def save_atomically(path: str | Path, write: Callable[[Path], object], *, durable: bool = True) -> None:
    """Let ``write`` fill a temporary file beside ``path``, then rename it: whole or not at all.

    Args:
        path: Of the file, in a folder that exists.
        write: Gets the path of the temporary file.
        durable: Wait until the disk has it, so that not even a power cut leaves half of it.

    Raises:
        OSError: Writing failed, on a full disk for instance; what was at ``path`` is still there.
    """
    path = Path(path)
    temporary: Path | None = None
    try:
        handle, name = tempfile.mkstemp(prefix=f".{path.name[:32]}.", suffix=".tmp", dir=path.parent)
        os.close(handle)
        temporary = Path(name)
        write(temporary)
        if durable:
            with temporary.open("rb+") as file:
                os.fsync(file.fileno())
        temporary.chmod(0o666 & ~_umask())
        os.replace(temporary, path)
    except OSError as error:
        if error.errno is not None:  # else it is a sentence
            error.filename = str(path)  # not the temporary file, which nobody knows
        raise
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


def read_bytes(path: str | Path) -> bytes:
    """Return a file's content.

    Raises:
        InputError: The file is missing, unreadable, a folder, or empty.
    """
    try:
        content = Path(path).read_bytes()
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror or error})") from error
    if not content:
        raise InputError(f"{path}: the file is empty (0 bytes); fetch it again")
    return content


def write_bytes(path: str | Path, content: bytes) -> None:
    """Write a file whole or not at all: under a temporary name in the same folder, then renamed.

    Raises:
        InputError: The folder is missing or cannot be written.
    """
    try:
        save_atomically(path, lambda temporary: temporary.write_bytes(content), durable=False)
    except OSError as error:
        raise InputError(f"{path}: cannot be written ({error.strerror or error})") from error


def _umask() -> int:
    """Return the process' mask of permissions; where Linux does not tell it, by setting it for a moment."""
    with suppress(OSError):
        told = re.search(r"^Umask:\s*([0-7]+)$", Path("/proc/self/status").read_text(), flags=re.MULTILINE)
        if told:
            return int(told[1], 8)
    with _UMASK_LOCK:
        umask = os.umask(0)
        os.umask(umask)
    return umask


@contextmanager
def sole_use(folder: Path) -> Iterator[None]:
    """Keep other processes out of a folder that exists, as far as they ask for it in this way too.

    A lock on its file ``.lock``, which ends with this process at the latest. Where the system or the file system knows
    no locks, nobody is kept out.

    Raises:
        InputError: Another process is there.
    """
    try:
        import fcntl
    except ImportError:  # Windows
        yield
        return
    with (folder / LOCK_FILE).open("w") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError) as error:
            raise InputError(
                f"{folder}: another process writes to this folder: wait for it to end, or choose another"
            ) from error
        except OSError:
            pass
        yield
