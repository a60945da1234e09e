"""Where results go: nothing in the way is overwritten, and the folder can be written before work begins."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from fa_stereo.errors import InputError

if TYPE_CHECKING:
    from fa_stereo.data.pairs import PicturePair


def check_outputs(pairs: list[PicturePair], outputs: dict[str, dict[Path, str]]) -> None:
    """Make sure that no result takes the place of a picture to be read, or of another result.

    Raises:
        InputError: One does.
    """
    taken = {path.resolve() for pair in pairs for path in (pair.left_path, pair.right_path)}
    for name, paths in outputs.items():
        for path in paths:
            if path.resolve() in taken:
                raise InputError(
                    f"{path}: the result of {name} would overwrite this picture or result; choose another folder "
                    "with -o, or leave out a format"
                )
            taken.add(path.resolve())


def prepare_output_folder(folder: Path) -> None:
    """Create the folder, and make sure that files can be written there before anything expensive begins.

    Raises:
        InputError: It cannot be created or written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        reason = "a file is in its place" if isinstance(error, FileExistsError | NotADirectoryError) else error.strerror
        raise InputError(f"{folder}: this folder cannot be written ({reason}); choose another with -o") from error


def check_output_file(path: Path) -> None:
    """Make sure, before anything expensive begins, that a file can be written in a folder that exists.

    Raises:
        InputError: It cannot.
    """
    if path.is_dir():
        raise InputError(f"{path}: cannot be written (a folder is in its place)")
    try:
        with tempfile.TemporaryFile(dir=path.absolute().parent):
            pass
    except OSError as error:
        raise InputError(f"{path}: cannot be written ({error.strerror})") from error
