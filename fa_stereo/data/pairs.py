"""Picture pairs on people's own disks: matching files of two views, and what all data sets of files have in common."""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import Dataset

from fa_stereo.data.formats import (
    DISPARITY_EXTENSIONS,
    PICTURE_EXTENSIONS,
    read_disparity,
    read_mask,
    read_picture_pair,
)
from fa_stereo.data.sample import StereoSample
from fa_stereo.errors import InputError, MissingFilesError

# --------------------------------------------------------------------------------------------------------------------
# data sets of files


@dataclass(frozen=True)
class FrameFiles:
    """The files of one stereo pair.

    Attributes:
        name: Unique within its data set, path-like.
        left: Left picture.
        right: Right picture.
        disparity: The left view's disparity.
        right_disparity: The right view's disparity.
        mask: What tells occluded pixels; its meaning is the data set's.
    """

    name: str
    left: str
    right: str
    disparity: str | None = None
    right_disparity: str | None = None
    mask: str | None = None


class FileDataset(Dataset[StereoSample]):
    """Stereo pairs in files; reading happens on access, so that constructing and pickling are cheap.

    The base reads pictures and disparities of the formats that say themselves what they are. Data sets with their own
    conventions override ``read_disparity`` and ``read_occluded``.
    """

    def __init__(self, frames: list[FrameFiles]) -> None:
        self.frames = frames

    def __len__(self) -> int:
        return len(self.frames)

    def __getitem__(self, index: int) -> StereoSample:
        """Read one pair.

        Raises:
            InputError: A file is missing or unusable, or sizes differ; the message names the file.
        """
        frame = self.frames[index]
        left, right = read_picture_pair(frame.left, frame.right)
        size = left.shape[:2]
        sample = StereoSample(frame.name, left, right)
        if frame.disparity is not None:
            sample.disparity = _of_size(self.read_disparity(frame.disparity), frame.disparity, size, frame.left)
            if frame.mask is not None:
                occluded = self.read_occluded(frame.mask, sample.disparity)
                sample.occluded = _of_size(occluded, frame.mask, size, frame.left)
        if frame.right_disparity is not None:
            values = self.read_disparity(frame.right_disparity)
            sample.right_disparity = _of_size(values, frame.right_disparity, size, frame.right)
        return sample

    def read_disparity(self, path: str) -> NDArray[np.float32]:
        """Return a disparity map, float32 [H, W], inf = no ground truth."""
        return read_disparity(path)

    def read_occluded(self, path: str, disparity: NDArray[np.float32]) -> NDArray[np.bool_]:
        """Return the occluded pixels, bool [H, W], from a mask that is 255 where a pixel is seen in both views."""
        mask = read_mask(path)
        _of_size(mask, path, disparity.shape, "the disparity")
        return np.asarray(np.isfinite(disparity) & (mask != 255))


def _of_size(array: NDArray[Any], path: str, size: tuple[int, ...], beside: str) -> NDArray[Any]:
    if array.shape != size:
        raise InputError(
            f"{path} is {array.shape[1]}x{array.shape[0]} but {beside} is {size[1]}x{size[0]}: "
            "they do not belong together"
        )
    return array


def few(names: Iterable[str]) -> str:
    """Return the first three names for a message, and how many more there are."""
    listed = list(names)
    more = f" and {len(listed) - 3} more" if len(listed) > 3 else ""
    return ", ".join(listed[:3]) + more


def files_below(folder: Path) -> list[Path]:
    """Return all files in a folder and in those below it, links followed.

    Raises:
        InputError: One of the folders cannot be read.
    """

    def refuse(error: OSError) -> None:
        raise InputError(f"{error.filename}: this folder cannot be read ({error.strerror})") from error

    walk = os.walk(folder, followlinks=True, onerror=refuse)
    return [Path(where) / name for where, _, names in walk for name in names]


def scene_folders(folder: Path, *signs: str) -> list[Path]:
    """Return the folders in a folder that hold one of the files named, in order.

    Raises:
        InputError: The folder is not there, or it or one in it cannot be read.
    """
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder; see data/README.md")
    scenes = []
    try:
        for path in sorted(folder.iterdir()):
            if path.is_dir() and path.name != "lost+found" and not set(signs).isdisjoint(os.listdir(path)):
                scenes.append(path)
    except OSError as error:
        raise InputError(f"{error.filename}: this folder cannot be read ({error.strerror})") from error
    return scenes


# --------------------------------------------------------------------------------------------------------------------
# matching the files of two views


@dataclass(frozen=True)
class PicturePair:
    """Two pictures of one scene.

    Attributes:
        name: What the two file names have in common, path-like and without extension.
        left_path: The left view's file.
        right_path: The right view's file.
    """

    name: str
    left_path: Path
    right_path: Path


def _numbered(number: int) -> re.Pattern[str]:
    return re.compile(
        rf"(?<![A-Za-z])(?:im|img|image|view|cam|camera|colored|frame)[_-]?0*{number}(?!\d)", re.IGNORECASE
    )


# The signs by which names tell the views apart, (left, right). A view's sign is replaced by "*"; then the names of two
# pictures that belong together are equal.
_VIEW_SIGNS: tuple[tuple[re.Pattern[str], re.Pattern[str]], ...] = (
    (
        re.compile(r"(?<![A-Za-z])(?:left|LEFT)|Left|(?<![A-Za-z])[lL](?![A-Za-z])|(?<=[a-z])L(?![a-z])"),
        re.compile(r"(?<![A-Za-z])(?:right|RIGHT)|Right|(?<![A-Za-z])[rR](?![A-Za-z])|(?<=[a-z])R(?![a-z])"),
    ),
    (_numbered(0), _numbered(1)),
    (_numbered(1), _numbered(2)),
    (_numbered(2), _numbered(3)),
    (_numbered(1), _numbered(5)),
    (_numbered(2), _numbered(6)),
)

# Signs that a name may do without, as no sequence of frames counts by them.
_LETTERS = _VIEW_SIGNS[0]


def pair_pictures(left: str, right: str) -> list[PicturePair]:
    """Pair two files, two folders or two glob patterns: by name, never by position.

    Two files are a pair whatever their names. In folders (with all their sub-folders) and patterns, pictures belong
    together when their paths below the folder, or below the part of the pattern before its first wildcard, are equal
    without extension; or else when they are equal but for the sign of the view: left/right, L/R, or, if all names
    have one, im0/im1, image_2/image_3, view1/view5 and the like. Every picture must have exactly one partner.

    Args:
        left: Path of a picture, of a folder, or a pattern (``**`` crosses folders).
        right: The same of the right view.

    Returns:
        The pairs in the order of their names.

    Raises:
        InputError: Nothing is there, or some pictures have no partner or several.
    """
    if Path(left).is_file() and Path(right).is_file():
        return [PicturePair(_common_name(Path(left).stem, Path(right).stem), Path(left), Path(right))]
    for one, other in ((left, right), (right, left)):
        if Path(one).is_file() and Path(other).is_dir():
            raise InputError(f"{one} is a file but {other} is a folder: give two files, two folders or two patterns")
    left_files, right_files = _list_pictures(left), _list_pictures(right)
    shared = {path.resolve() for path in left_files} & {path.resolve() for path in right_files}
    if shared:
        raise InputError(f"{min(shared)} is named both as a left and as a right picture by {left} and {right}")
    pairs = _match(left_files, right_files)
    if pairs is None:
        raise MissingFilesError(_describe_mismatch(left, left_files, right, right_files))
    return pairs


def _list_pictures(where: str) -> dict[Path, str]:
    """Return, for every picture, its path below the folder or the pattern's fixed part, without extension."""
    if Path(where).is_dir():
        base = Path(where)
        found = files_below(base)
    elif glob.has_magic(where):
        fixed: list[str] = []
        for part in Path(where).parts:
            if glob.has_magic(part):
                break
            fixed.append(part)
        base = Path(*fixed)
        found = [Path(name) for name in glob.glob(where, recursive=True) if not Path(name).is_dir()]
    else:
        base = Path(where).parent
        if not Path(where).is_file():
            raise InputError(f"{where}: no such file or folder")
        found = [Path(where)]
    pictures = [path for path in found if path.suffix.lower() in PICTURE_EXTENSIONS and not path.name.startswith(".")]
    if not pictures:
        raise InputError(f"{where}: no pictures there (looked for {', '.join(PICTURE_EXTENSIONS)})")
    return {path: path.relative_to(base).with_suffix("").as_posix() for path in sorted(pictures)}


def _normalizations() -> Iterable[tuple[Callable[[str], str], Callable[[str], str]]]:
    """Yield (of the left name, of the right name), the strictest first."""
    yield (lambda name: name), (lambda name: name)
    for left_sign, right_sign in _VIEW_SIGNS:
        for which in (slice(None), slice(-1, None), slice(1)):  # all; or the last or first one, as in R2_left, R2_right
            yield (
                partial(_without_signs, sign=left_sign, which=which, unsigned="left"),
                partial(_without_signs, sign=right_sign, which=which, unsigned="right"),
            )


def _without_signs(name: str, sign: re.Pattern[str], which: slice, unsigned: str) -> str:
    """Return a name with "*" for the signs of the view.

    A name without any is as it is; but where signs are numbers it becomes a key that no name of the other view can
    have: in a sequence, in which one frame is missing on each side, these would be taken for the views of one.
    """
    signs = list(sign.finditer(name))[which]
    if not signs and sign not in _LETTERS:
        return f"{unsigned}:{name}"
    for found in reversed(signs):
        name = f"{name[: found.start()]}*{name[found.end() :]}"
    return name


def _by_key(files: dict[Path, str], normalize: Callable[[str], str]) -> dict[str, list[Path]]:
    groups: dict[str, list[Path]] = {}
    for path, name in files.items():
        groups.setdefault(normalize(name), []).append(path)
    return groups


def _match(left: dict[Path, str], right: dict[Path, str]) -> list[PicturePair] | None:
    """Return the pairs of the first normalization under which every picture has exactly one partner."""
    if len(left) != len(right):
        return None
    for normalize_left, normalize_right in _normalizations():
        left_groups, right_groups = _by_key(left, normalize_left), _by_key(right, normalize_right)
        if (
            len(left_groups) == len(left)
            and len(right_groups) == len(right)
            and left_groups.keys() == right_groups.keys()
        ):
            names = {key: _tidy(key) for key in left_groups}
            if len(set(names.values())) < len(names) or not all(names.values()):
                names = {key: left[paths[0]] for key, paths in left_groups.items()}
            return [
                PicturePair(names[key], left_groups[key][0], right_groups[key][0])
                for key in sorted(names, key=names.__getitem__)
            ]
    return None


def _tidy(key: str) -> str:
    """Return a key without the sign of the view: ``desk_*`` -> ``desk``, ``a/*/0001`` -> ``a/0001``."""
    parts = [re.sub(r"[_\-. ]*\*[_\-. ]*", "_", part).strip("_") if "*" in part else part for part in key.split("/")]
    return "/".join(part for part in parts if part)


def _common_name(left: str, right: str) -> str:
    for normalize_left, normalize_right in _normalizations():
        if normalize_left(left) == normalize_right(right):
            return _tidy(normalize_left(left)) or left
    return left


def _describe_mismatch(left: str, left_files: dict[Path, str], right: str, right_files: dict[Path, str]) -> str:
    """Return the sentence for two sets that do not pair up, by the normalization that pairs the most."""
    groups = [(_by_key(left_files, one), _by_key(right_files, other)) for one, other in _normalizations()]
    left_groups, right_groups = max(groups, key=lambda both: len(both[0].keys() & both[1].keys()))
    problems = []
    for groups_of_one, groups_of_other, view in (
        (left_groups, right_groups, "left"),
        (right_groups, left_groups, "right"),
    ):
        several = [str(paths[1]) for paths in groups_of_one.values() if len(paths) > 1]
        alone = [str(path) for key, paths in groups_of_one.items() if key not in groups_of_other for path in paths]
        if several:
            problems.append(f"{view} names that mean the same picture twice: {few(several)}")
        if alone:
            problems.append(f"{view} without a partner: {few(alone)}")
    return f"{left} ({len(left_files)} pictures) and {right} ({len(right_files)}) do not pair up by name; " + "; ".join(
        problems or ["the names have nothing in common"]
    )


# --------------------------------------------------------------------------------------------------------------------
# a data set of one's own


class OwnPairs(FileDataset):
    """``ROOT/left``, ``ROOT/right`` and, where known, ``ROOT/disparity`` and ``ROOT/right_disparity``.

    Pictures are paired as in ``pair_pictures``. Disparities (.pfm, KITTI's .png, .npy) have the path of their view's
    picture below the folder. A folder of disparities must be complete.

    Args:
        root: The folder that holds them.

    Raises:
        InputError: A folder or a file is missing.
    """

    def __init__(self, root: str | Path) -> None:
        root = Path(root)
        for view in ("left", "right"):
            if not (root / view).is_dir():
                raise InputError(f"{root / view}: no such folder; own pairs lie in {root}/left and {root}/right")
        pairs = pair_pictures(str(root / "left"), str(root / "right"))
        disparities = _list_disparities(root / "disparity")
        right_disparities = _list_disparities(root / "right_disparity")
        super().__init__(
            [
                FrameFiles(
                    pair.name,
                    str(pair.left_path),
                    str(pair.right_path),
                    _disparity_of(pair.left_path.relative_to(root / "left"), root / "disparity", disparities),
                    _disparity_of(
                        pair.right_path.relative_to(root / "right"), root / "right_disparity", right_disparities
                    ),
                )
                for pair in pairs
            ]
        )


def _list_disparities(folder: Path) -> dict[str, Path] | None:
    if not folder.is_dir():
        return None
    found: dict[str, Path] = {}
    for path in sorted(files_below(folder)):
        if path.suffix.lower() not in DISPARITY_EXTENSIONS or path.name.startswith("."):
            continue
        key = path.relative_to(folder).with_suffix("").as_posix()
        if key in found:
            raise InputError(f"{found[key]} and {path} are two disparities of one picture: keep one")
        found[key] = path
    return found


def _disparity_of(picture: Path, folder: Path, disparities: dict[str, Path] | None) -> str | None:
    if disparities is None:
        return None
    key = picture.with_suffix("").as_posix()
    if key not in disparities:
        wanted = "/".join((folder.as_posix(), key))
        raise MissingFilesError(
            f"{wanted}: no disparity ({', '.join(DISPARITY_EXTENSIONS)}) for {picture}; add it or remove {folder}"
        )
    return str(disparities[key])
