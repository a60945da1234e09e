"""Scene Flow (Mayer et al., CVPR 2016): FlyingThings3D, Monkaa and Driving, in any of the three layouts people have.

The files are paired by their paths, never by position in two sorted listings. Listing 40,000 files takes a while on a
network disk, so the result is kept in a file, together with the modification time of every folder it was read from: a
file added or removed anywhere makes it be read anew.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fa_stereo.config import SceneFlowConfig
from fa_stereo.data.formats import read_disparity
from fa_stereo.data.pairs import FileDataset, FrameFiles, few
from fa_stereo.errors import InputError
from fa_stereo.files import expand_user, read_bytes, write_bytes

# Frames of the full download by set and split, per pass.
EXPECTED_FRAMES: dict[tuple[str, str], int] = {
    ("flyingthings3d", "train"): 22390,
    ("monkaa", "train"): 8664,
    ("driving", "train"): 4400,
    ("flyingthings3d", "test"): 4370,
}
# The same by part. The total alone would not notice one focal length listed twice and the other never.
EXPECTED_FRAMES_OF_PART: dict[tuple[str, str], int] = {
    ("train", "driving/15mm_focallength"): 2200,
    ("train", "driving/35mm_focallength"): 2200,
    ("test", "TEST/A"): 1440,
    ("test", "TEST/B"): 1470,
    ("test", "TEST/C"): 1460,
}
_OFFICIAL_FOLDERS = {"flyingthings3d": "FlyingThings3D", "monkaa": "Monkaa", "driving": "Driving"}
_PICTURE_EXTENSIONS = (".png", ".webp")  # the first is taken where both are there
_INDEX_VERSION = 1
_RACY_SECONDS = 3  # a folder changed this shortly before it was listed may change again within the same time stamp
_README = "see data/README.md for the layouts"


class AbsentSplitError(InputError):
    """A set is there, but of this split neither pictures nor disparities."""


@dataclass
class SceneFlowListing:
    """What was found on the disk.

    Attributes:
        frames: Complete frames, sorted by set and path.
        missing: Path of every file whose counterparts are there but which is not.
        folder_times_ns: Modification time of every folder that was listed.
    """

    frames: list[FrameFiles] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    folder_times_ns: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class _Source:
    """Where one set's pictures of one pass, and their disparities, lie."""

    set_name: str
    pictures: Path
    disparities: Path
    name_prefix: str
    key_prefix: str = ""  # between the pictures' and the disparities' folders and the keys, as "TRAIN"


class SceneFlowFrames(FileDataset):
    """Any frames of Scene Flow, whose DispNet subset has negative disparities."""

    def read_disparity(self, path: str) -> NDArray[np.float32]:
        """Return the disparity of a view, float32 [H, W], with positive sign, inf = no ground truth."""
        return read_disparity(path, either_sign=True)


class SceneFlow(SceneFlowFrames):
    """Scene Flow's frames; names are the same in every layout.

    Names are ``TRAIN/A/0000/left/0006``, ``monkaa/<scene>/left/0048`` and ``driving/15mm_focallength/.../left/0400``;
    with ``passes=both``, ``clean/`` or ``final/`` stands before them.

    Args:
        root: The folder of the layout.
        split: ``train`` or ``test``.
        config: Which frames to read.

    Raises:
        InputError: The root is empty or its layout incomplete, or files are missing (they are named).
    """

    def __init__(self, root: str | Path, split: str = "train", config: SceneFlowConfig | None = None) -> None:
        config = config or SceneFlowConfig()
        frames = _read_index(Path(root), split, config) if config.cache_index else None
        if frames is None:
            started = time.time()
            listing = list_scene_flow(root, split, config)
            if listing.missing:
                raise InputError(
                    f"Scene Flow at {root} lacks {len(listing.missing)} files whose counterparts are there: "
                    f"{few(listing.missing)}; fetch them, or run 'fa-stereo check-data {root}' for the whole list"
                )
            if not listing.frames:
                raise InputError(f"{root}: no Scene Flow frames of split {split!r} left to read; {_README}")
            frames = listing.frames
            if config.cache_index:
                _write_index(Path(root), split, config, listing, started)
        super().__init__(frames)


def list_scene_flow(root: str | Path, split: str, config: SceneFlowConfig) -> SceneFlowListing:
    """List the frames and the missing files, without reading any.

    Args:
        root: The folder of the layout.
        split: ``train`` or ``test``.
        config: Which frames to list.

    Raises:
        InputError: The root is empty, or whole folders of its layout are missing (``AbsentSplitError`` if those of
            the split are, and nothing else).
    """
    root = Path(root)
    unused = _read_unused_files(config.unused_files)
    listing = SceneFlowListing()
    for source in _locate(root, split, config, listing.folder_times_ns):
        _list_source(source, config.right_disparity, unused, listing)
    return listing


# --------------------------------------------------------------------------------------------------------------------
# layouts


def detect_layout(root: str | Path) -> str:
    """Return ``official``, ``psmnet`` or ``merged`` by the folders directly in ``root``.

    Raises:
        InputError: There is no such folder, or nothing of Scene Flow in it, or more than one layout.
    """
    root = Path(root)
    names = set(_folders(root))
    pictures = {"frames_cleanpass", "frames_finalpass"} & names
    found = [
        layout
        for layout, is_there in (
            ("official", bool(_OFFICIAL_FOLDERS.keys() & names)),
            (
                "psmnet",
                any(re.fullmatch(r"frames_disparity|(monkaa|driving)_(frames_\w+pass|disparity)", n) for n in names),
            ),
            ("merged", bool(pictures) and "disparity" in names),
        )
        if is_there
    ]
    if len(found) > 1:
        raise InputError(
            f"{root} holds the layouts {' and '.join(found)}: say which by scene_flow.layout (check-data: --layout)"
        )
    if found:
        return found[0]
    if pictures:
        raise InputError(
            f"{root} has {min(pictures)} but no disparities: 'disparity' (merged layout) or 'frames_disparity' "
            f"(PSMNet's) is missing; {_README}"
        )
    if "disparity" in names:
        raise InputError(f"{root} has disparity but no frames_cleanpass or frames_finalpass beside it; {_README}")
    raise InputError(f"{root}: nothing of Scene Flow there; {_README}")


def available_sets(root: str | Path, layout: str = "auto") -> list[str]:
    """Return the sets of which ``root`` has at least one folder, in their usual order."""
    root = Path(root)
    layout = detect_layout(root) if layout == "auto" else layout
    folders = _folders(root)
    if layout == "official":
        return [name for name in _OFFICIAL_FOLDERS if name in folders]
    if layout == "psmnet":
        return [
            name
            for name in _OFFICIAL_FOLDERS
            if any(
                _psmnet_folder(name, kind) in folders for kind in ("frames_cleanpass", "frames_finalpass", "disparity")
            )
        ]
    found = set()
    for kind in ("frames_cleanpass", "frames_finalpass", "disparity"):
        for split in ("TRAIN", "TEST"):
            folder = folders.get(kind, root) / split
            found |= (
                {_set_of(entry.name) for entry in os.scandir(folder) if entry.is_dir()} if folder.is_dir() else set()
            )
    return [name for name in _OFFICIAL_FOLDERS if name in found]


def _folders(root: Path) -> dict[str, Path]:
    """Return the folders in ``root`` by a plain form of their names.

    People write FlyingThings3D and flyingthings3d, monkaa_disparity and monkaa__disparity; archives of .webp pictures
    unpack to frames_cleanpass_webp.
    """
    if not root.is_dir():
        raise InputError(f"{root}: no such folder; {_README}")
    folders: dict[str, Path] = {}
    for path in sorted(root.iterdir(), key=lambda p: (p.name.lower().endswith("_webp"), p.name)):
        if path.is_dir():
            plain = re.sub(r"_+", "_", path.name.lower()).removesuffix("_webp")
            folders.setdefault(plain, path)
    return folders


def _psmnet_folder(set_name: str, kind: str) -> str:
    if set_name == "flyingthings3d":
        return "frames_disparity" if kind == "disparity" else kind
    return f"{set_name}_{kind}"


def _set_of(scene: str) -> str:
    """Return the set a folder of the merged layout's TRAIN comes from."""
    if scene in ("A", "B", "C"):
        return "flyingthings3d"
    return "driving" if scene.endswith("_focallength") else "monkaa"


def _locate(root: Path, split: str, config: SceneFlowConfig, times_ns: dict[str, int]) -> list[_Source]:
    """Return the folders to read; a missing one is an ``InputError``."""
    if split not in ("train", "test"):
        raise InputError(f"Scene Flow has the splits train and test, not {split!r}")
    sets = [name for name in _OFFICIAL_FOLDERS if name in config.sets]
    if split == "test":
        sets = [name for name in sets if name == "flyingthings3d"]
        if not sets:
            raise InputError("scene_flow.sets: the test split has flyingthings3d only")
    layout = detect_layout(root) if config.layout == "auto" else config.layout
    folders = _folders(root)
    _note_time(root, times_ns)
    sources = []
    for pass_name in ("clean", "final") if config.passes == "both" else (config.passes,):
        for set_name in sets:
            pictures, disparities = _folders_of(root, folders, layout, set_name, f"frames_{pass_name}pass", times_ns)
            key_prefix = split.upper() if set_name == "flyingthings3d" or layout == "merged" else ""
            name_prefix = split.upper() if set_name == "flyingthings3d" else set_name
            if config.passes == "both":
                name_prefix = f"{pass_name}/{name_prefix}"
            absent = [folder for base in (pictures, disparities) if not (folder := base / key_prefix).is_dir()]
            if absent:
                kind = AbsentSplitError if len(absent) == 2 else InputError
                raise kind(f"{absent[0]} is missing ({layout} layout, {set_name}, {split}); {_README}")
            sources.append(_Source(set_name, pictures, disparities, name_prefix, key_prefix))
    return sources


def _folders_of(
    root: Path, folders: dict[str, Path], layout: str, set_name: str, pass_folder: str, times_ns: dict[str, int]
) -> tuple[Path, Path]:
    """Return the folders of one set's pictures and disparities."""
    remedy = f"or leave {set_name} out of scene_flow.sets; {_README}"
    if layout == "official":
        if set_name not in folders:
            raise InputError(f"{root / _OFFICIAL_FOLDERS[set_name]} is missing (official layout): fetch it, {remedy}")
        parent = folders[set_name]
        _note_time(parent, times_ns)
        inside, wanted = _folders(parent), (pass_folder, "disparity")
    elif layout == "psmnet":
        parent, inside = root, folders
        wanted = (_psmnet_folder(set_name, pass_folder), _psmnet_folder(set_name, "disparity"))
    else:
        parent, inside, wanted = root, folders, (pass_folder, "disparity")
    for name in wanted:
        if name not in inside:
            other_pass = {"frames_cleanpass": "final", "frames_finalpass": "clean"}
            hint = next(
                (
                    f"take the other pass, which is there (scene_flow.passes={value}; check-data: --passes {value}), "
                    for key, value in other_pass.items()
                    if name.endswith(key) and name.replace(key, f"frames_{value}pass") in inside
                ),
                "",
            )
            raise InputError(f"{parent / name} is missing ({layout} layout): fetch it, {hint}{remedy}")
    return inside[wanted[0]], inside[wanted[1]]


# --------------------------------------------------------------------------------------------------------------------
# files


def _list_source(source: _Source, right_disparity: bool, unused: set[str], listing: SceneFlowListing) -> None:
    """Add one source's frames, and what is missing, to the listing."""
    picture_base, disparity_base = source.pictures / source.key_prefix, source.disparities / source.key_prefix
    views = ("left", "right")
    pictures = _list_files(picture_base, source, views, _PICTURE_EXTENSIONS, listing.folder_times_ns)
    disparity_views = views if right_disparity else ("left",)
    disparities = _list_files(disparity_base, source, disparity_views, (".pfm",), listing.folder_times_ns)
    if not pictures and not disparities:
        raise InputError(f"{picture_base}: no frames of {source.set_name} there; {_README}")
    extension = Path(next(iter(pictures.values()), ".png")).suffix
    keys = {_as_view(key, "left") for key in (*pictures, *disparities)}
    for key in sorted(keys):
        name = f"{source.name_prefix}/{key}"
        if unused and _scene_key(name) in unused:
            continue
        right_key = _as_view(key, "right")
        files: list[str | None] = []
        for found, base, wanted, suffix in (
            (pictures, picture_base, key, extension),
            (pictures, picture_base, right_key, extension),
            (disparities, disparity_base, key, ".pfm"),
            *([(disparities, disparity_base, right_key, ".pfm")] if right_disparity else []),
        ):
            if wanted not in found:
                listing.missing.append(str(base / f"{wanted}{suffix}"))
            files.append(found.get(wanted))
        left, right, disparity = files[:3]
        if left is not None and right is not None and all(file is not None for file in files):
            listing.frames.append(FrameFiles(name, left, right, disparity, files[3] if right_disparity else None))


def _list_files(
    base: Path, source: _Source, views: tuple[str, ...], extensions: tuple[str, ...], times_ns: dict[str, int]
) -> dict[str, str]:
    """Return path by key, e.g. ``A/0000/left/0006``, of the files in folders named after the views."""
    ranks = {extension: rank for rank, extension in enumerate(extensions)}
    best: dict[str, tuple[int, str]] = {}
    for folder, names in _walk(base, "", times_ns):
        parts = folder.split("/")
        if parts[-1] not in views or (source.key_prefix and _set_of(parts[0]) != source.set_name):
            continue
        for name in names:
            stem, extension = os.path.splitext(name)
            rank = ranks.get(extension.lower())
            if rank is None or stem.startswith("."):
                continue
            key = f"{folder}/{stem}"
            if key not in best or rank < best[key][0]:
                best[key] = (rank, os.path.join(base, folder, name))
    return {key: path for key, (_, path) in best.items()}


def _walk(base: Path, relative: str, times_ns: dict[str, int]) -> Iterator[tuple[str, list[str]]]:
    """Yield (folder below the base, its files), following links, and note when each folder last changed."""
    folder = base / relative
    _note_time(folder, times_ns)
    names: list[str] = []
    inside: list[str] = []
    with os.scandir(folder) as entries:
        for entry in entries:
            (inside if entry.is_dir() else names).append(entry.name)
    if names:
        yield relative, names
    for name in sorted(inside):
        yield from _walk(base, f"{relative}/{name}" if relative else name, times_ns)


def _note_time(folder: Path, times_ns: dict[str, int]) -> None:
    times_ns[str(folder)] = folder.stat().st_mtime_ns


def _as_view(key: str, view: str) -> str:
    folder, _, stem = key.rpartition("/")
    return f"{folder.rpartition('/')[0]}/{view}/{stem}".lstrip("/")


def _scene_key(name: str) -> str:
    """Return ``TRAIN/A/0000/0006`` for any path that holds a FlyingThings3D frame, else nothing."""
    found = re.search(r"(TRAIN|TEST)/([ABC])/(\d+)/(?:left|right)/(\d+)", name)
    return "/".join(found.groups()) if found else ""


def _read_unused_files(path: str | None) -> set[str]:
    if path is None:
        return set()
    text = read_bytes(expand_user(path)).decode("utf-8", errors="replace").replace("\\", "/")
    unused = {_scene_key(line) for line in text.splitlines()} - {""}
    if not unused:
        raise InputError(f"{path}: no line names a FlyingThings3D frame such as TRAIN/A/0000/left/0006.png")
    return unused


# --------------------------------------------------------------------------------------------------------------------
# the index on the disk


def _index_paths(root: Path, split: str, config: SceneFlowConfig) -> list[Path]:
    """Return the index's place beside the data, and the one in the user's cache folder, if the user has one."""
    what: dict[str, Any] = {
        "version": _INDEX_VERSION,
        "split": split,
        "layout": config.layout,
        "passes": config.passes,
        "sets": sorted(config.sets),
        "right_disparity": config.right_disparity,
        "unused": sorted(_read_unused_files(config.unused_files)),
    }
    places = [root / ".fa_stereo" / f"scene_flow-{_digest(what)}.json"]
    cache = expand_user(os.environ.get("XDG_CACHE_HOME") or "~/.cache")
    if cache.is_absolute():
        places.append(cache / "fa_stereo" / f"scene_flow-{_digest({**what, 'root': str(root.resolve())})}.json")
    return places


def _digest(what: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:16]


def _read_index(root: Path, split: str, config: SceneFlowConfig) -> list[FrameFiles] | None:
    """Return the kept frames if no folder has changed since, else None."""
    for path in _index_paths(root, split, config):
        try:
            index = json.loads(path.read_bytes())
            for folder, changed_ns in index["folder_times_ns"].items():
                if os.stat(root / folder).st_mtime_ns != changed_ns:
                    raise ValueError(f"{folder} has changed")
            return [
                FrameFiles(name, *(None if file is None else os.path.join(root, file) for file in files))  # type: ignore[arg-type]
                for name, *files in index["frames"]
            ]
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            continue  # none there, from other times, or damaged: the folders are listed anew
    return None


def _write_index(root: Path, split: str, config: SceneFlowConfig, listing: SceneFlowListing, started: float) -> None:
    """Keep the listing where it can be written; where nothing can be written, it is listed anew each time."""
    if max(listing.folder_times_ns.values()) > (started - _RACY_SECONDS) * 1e9:
        return
    times_ns = {os.path.relpath(path, root): time_ns for path, time_ns in listing.folder_times_ns.items()}
    del times_ns["."]  # the root's own time changes when the index's folder is made in it
    frames = [
        (frame.name, *(None if file is None else os.path.relpath(file, root) for file in files))
        for frame in listing.frames
        for files in [(frame.left, frame.right, frame.disparity, frame.right_disparity)]
    ]
    index = {"folder_times_ns": times_ns, "frames": frames}
    content = json.dumps(index, separators=(",", ":")).encode()
    protected = not root.stat().st_mode & 0o222  # even where the superuser could write all the same
    for path in _index_paths(root, split, config)[1 if protected else 0 :]:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_bytes(path, content)
            return
        except (OSError, InputError):
            continue
