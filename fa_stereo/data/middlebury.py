"""Middlebury's pairs: 2014 (and the third evaluation), 2005 and 2006, and the second evaluation with 2001 and 2003."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fa_stereo.data.formats import read_scaled_disparity
from fa_stereo.data.pairs import FileDataset, FrameFiles, few, scene_folders
from fa_stereo.errors import InputError, MissingFilesError
from fa_stereo.files import read_bytes

_RESOLUTION_LETTERS = {"quarter": "Q", "half": "H", "full": "F"}
_RESOLUTION_FOLDERS_2006 = {"third": "ThirdSize", "half": "HalfSize", "full": "FullSize"}
# 2005 and 2006 pictures have one height per size, and disparities are stored in pixels of the full size
_DIVISORS_2006 = {370: 3.0, 555: 2.0, 1110: 1.0}
# the scale of scenes that come without info.txt, in the size that the second evaluation uses
_DIVISORS_V2 = {
    "tsukuba": 16.0,
    "map": 8.0,
    "venus": 8.0,
    "sawtooth": 8.0,
    "bull": 8.0,
    "poster": 8.0,
    "barn1": 8.0,
    "barn2": 8.0,
    "cones": 4.0,
    "teddy": 4.0,
}


class Middlebury2014(FileDataset):
    """``trainingQ|H|F/<scene>/im0.png, im1.png, disp0GT.pfm, mask0nocc.png, calib.txt``, or the 2014 scenes' own names.

    The archives of single 2014 scenes hold ``disp0.pfm`` and no mask. In a mask, 255 is seen in both views and 128 in
    the left one only.

    Args:
        root: The folder that holds ``trainingQ``, ``trainingH`` or ``trainingF``, or a folder of scenes.
        split: ``train`` or ``all``, or ``test`` (without ground truth).
        resolution: ``quarter``, ``half`` or ``full``; None takes the only one there.

    Raises:
        InputError: A folder or a file is missing, the resolution is open, or the split is empty.
    """

    def __init__(self, root: str | Path, split: str = "train", resolution: str | None = None) -> None:
        if split == "validation":
            raise InputError("Middlebury 2014 has the splits train and test, not 'validation'")
        root = Path(root)
        kind = "test" if split == "test" else "training"
        choices = {name: root / f"{kind}{letter}" for name, letter in _RESOLUTION_LETTERS.items()}
        folder = _choose(root, choices, resolution)
        if folder is root and split == "test":
            raise InputError(f"{root}: no {kind}Q, {kind}H or {kind}F there; see data/README.md")
        frames = []
        for scene in _scenes(folder, "im0.png"):
            disparity = _first_file(scene, "disp0GT.pfm", "disp0.pfm") if split != "test" else None
            right_disparity = _optional_file(scene, "disp1GT.pfm", "disp1.pfm") if split != "test" else None
            mask = _optional_file(scene, "mask0nocc.png") if split != "test" else None
            right = _first_file(scene, "im1.png")
            frames.append(FrameFiles(scene.name, str(scene / "im0.png"), right, disparity, right_disparity, mask))
        super().__init__(frames)


class Middlebury2006(FileDataset):
    """The 2005 and 2006 scenes: ``<scene>/view1.png`` (left), ``view5.png`` (right), ``disp1.png``, ``disp5.png``.

    Disparities are stored in pixels of the full size: the height of the pictures tells the divisor.

    Args:
        root: A folder of scenes, or the one that holds ``ThirdSize``, ``HalfSize`` or ``FullSize``.
        resolution: ``third``, ``half`` or ``full``; None takes the only one there.

    Raises:
        InputError: A folder or a file is missing, or the resolution is open.
    """

    def __init__(self, root: str | Path, resolution: str | None = None) -> None:
        root = Path(root)
        folder = _choose(root, {name: root / path for name, path in _RESOLUTION_FOLDERS_2006.items()}, resolution)
        super().__init__(
            [
                FrameFiles(
                    scene.name,
                    str(scene / "view1.png"),
                    _first_file(scene, "view5.png"),
                    _first_file(scene, "disp1.png"),
                    _optional_file(scene, "disp5.png"),
                )
                for scene in _scenes(folder, "view1.png")
            ]
        )

    def read_disparity(self, path: str) -> NDArray[np.float32]:
        """Return the disparity in pixels of its own size, float32 [H, W], inf = no ground truth."""
        full_size = read_scaled_disparity(path, 1.0)
        height = full_size.shape[0]
        if height not in _DIVISORS_2006:
            raise InputError(
                f"{path} is {height} rows high; Middlebury 2005 and 2006 come with "
                f"{', '.join(map(str, _DIVISORS_2006))} rows: the divisor of a resized disparity is unknown"
            )
        return np.asarray(full_size / np.float32(_DIVISORS_2006[height]))


class MiddleburyV2(FileDataset):
    """The second evaluation's scenes: ``imL.png, imR.png, groundtruth.png, nonocc.png, info.txt``.

    Non-occluded are the pixels of ``nonocc.png``, as in the benchmark. Which of the others it left out altogether, such
    as a border, ``all.png`` would say; where there is ground truth they count as occluded here.

    The first line of ``info.txt`` is the divisor. The original archives' names (2001: ``im2.ppm, im6.ppm, disp2.pgm``;
    2003: the same as ``.png``) are read too; the well-known scenes' divisors are built in.

    Args:
        root: A folder of scenes.

    Raises:
        InputError: A folder or a file is missing, or a scene's divisor is unknown.
    """

    def __init__(self, root: str | Path) -> None:
        frames, self.divisors = [], dict[str, float]()
        for scene in _scenes(Path(root), "imL.png", "im2.png", "im2.ppm"):
            left = _first_file(scene, "imL.png", "im2.png", "im2.ppm")
            right = _first_file(scene, "imR.png", "im6.png", "im6.ppm")
            disparity = _first_file(scene, "groundtruth.png", "disp2.png", "disp2.pgm")
            right_disparity = _optional_file(scene, "disp6.png", "disp6.pgm")
            mask = _optional_file(scene, "nonocc.png")
            divisor = _divisor(scene)
            self.divisors |= {path: divisor for path in (disparity, right_disparity) if path is not None}
            frames.append(FrameFiles(scene.name, left, right, disparity, right_disparity, mask))
        super().__init__(frames)

    def read_disparity(self, path: str) -> NDArray[np.float32]:
        """Return the disparity, float32 [H, W], inf = no ground truth."""
        return read_scaled_disparity(path, self.divisors[path])


def _choose(root: Path, choices: dict[str, Path], resolution: str | None) -> Path:
    """Return the folder of the resolution asked for or the only one there, or the root as a folder of scenes."""
    if not root.is_dir():
        raise InputError(f"{root}: no such folder; see data/README.md")
    if resolution is not None and resolution not in choices:
        raise InputError(f"resolution must be one of {', '.join(choices)} here, got {resolution!r}")
    there = {name: folder for name, folder in choices.items() if folder.is_dir()}
    if resolution is not None:
        if resolution in there:
            return there[resolution]
        raise InputError(f"{choices[resolution]}: no such folder; there is {few(there) or 'none of the resolutions'}")
    if len(there) > 1:
        raise InputError(f"{root} holds {', '.join(there)} resolution: say which one is to be read (option resolution)")
    return next(iter(there.values()), root)


def _scenes(folder: Path, *signs: str) -> list[Path]:
    """Return the folders that hold one of the files named."""
    scenes = scene_folders(folder, *signs)
    if not scenes:
        raise InputError(f"{folder}: no scenes (<scene>/{signs[0]}) there; see data/README.md")
    return scenes


def _optional_file(scene: Path, *names: str) -> str | None:
    return next((str(scene / name) for name in names if (scene / name).is_file()), None)


def _first_file(scene: Path, *names: str) -> str:
    found = _optional_file(scene, *names)
    if found is None:
        raise MissingFilesError(
            f"{scene / names[0]}: no such file, but the scene's other files are there; fetch it again"
        )
    return found


def _divisor(scene: Path) -> float:
    info = scene / "info.txt"
    if info.is_file():
        words = read_bytes(info).split()
        try:
            divisor = float(words[0]) if words else 0.0
        except ValueError:
            divisor = 0.0
        if not divisor > 0:
            raise InputError(f"{info}: its first line is not the divisor of the disparities")
        return divisor
    if scene.name.lower() not in _DIVISORS_V2:
        raise InputError(
            f"{info}: no such file, and the divisor of scene {scene.name} is unknown: write it into that file"
        )
    return _DIVISORS_V2[scene.name.lower()]
