"""KITTI 2012 (Geiger et al.) and KITTI 2015 (Menze and Geiger): driving scenes with sparse laser ground truth."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fa_stereo.data.formats import read_kitti_disparity
from fa_stereo.data.pairs import FileDataset, FrameFiles, few
from fa_stereo.errors import InputError, MissingFilesError

# Of the training frames, number 160 and above validate: 40 of 200 in KITTI 2015, 34 of 194 in KITTI 2012. These are the
# sizes of PSMNet's paper; PSMNet's code takes the last ones of an unsorted listing, this one goes by the number.
FIRST_VALIDATION_FRAME = 160


@dataclass(frozen=True)
class _Folders:
    left: str
    right: str
    all_pixels: str
    non_occluded: str


_FOLDERS = {
    2012: _Folders("colored_0", "colored_1", "disp_occ", "disp_noc"),
    2015: _Folders("image_2", "image_3", "disp_occ_0", "disp_noc_0"),
}


class Kitti(FileDataset):
    """KITTI's frames with ground truth, the ones numbered ``_10``; the ``_11`` frames have none.

    ``occluded`` is known where the folder of non-occluded disparities is there too: pixels that have ground truth among
    all pixels but not among the non-occluded ones.

    Args:
        root: The folder that holds ``training`` and ``testing``, or ``training`` itself.
        year: 2012 or 2015.
        split: ``train`` (frames 0 to 159), ``validation`` (160 and above), ``all`` (both), or ``test`` (the benchmark's
            frames, without ground truth).

    Raises:
        InputError: A folder or a file is missing, or the split is empty.
    """

    def __init__(self, root: str | Path, year: int, split: str = "train") -> None:
        root, names = Path(root), _FOLDERS[year]
        name = "testing" if split == "test" else "training"
        part = root / name
        if not part.is_dir() and split != "test" and (root / names.left).is_dir():
            part = root
        needed = [names.left, names.right] + ([names.all_pixels] if split != "test" else [])
        for folder in needed:
            if not (part / folder).is_dir():
                raise InputError(f"{part / folder}: no such folder; see data/README.md for KITTI {year}'s layout")
        if split != "test" and (part / names.non_occluded).is_dir():
            needed.append(names.non_occluded)
        frames: list[FrameFiles] = []
        missing: list[str] = []
        stems = {path.stem for folder in needed for path in (part / folder).glob("[!.]*_10.png")}
        for stem in sorted(stems):
            if not _is_of_split(stem, split):
                continue
            files = {folder: str(part / folder / f"{stem}.png") for folder in needed}
            missing += [file for file in files.values() if not Path(file).is_file()]
            frames.append(
                FrameFiles(
                    f"{name}/{stem}",
                    files[names.left],
                    files[names.right],
                    disparity=files.get(names.all_pixels),
                    mask=files.get(names.non_occluded),
                )
            )
        if missing:
            raise MissingFilesError(
                f"KITTI {year} at {root} lacks {len(missing)} files: {few(missing)}; fetch them again"
            )
        if not frames:
            raise InputError(f"{part}: no frames of split {split!r} there ({names.left}/*_10.png); see data/README.md")
        super().__init__(frames)

    def read_disparity(self, path: str) -> NDArray[np.float32]:
        """Return KITTI's disparity, float32 [H, W], inf = no ground truth."""
        return read_kitti_disparity(path)

    def read_occluded(self, path: str, disparity: NDArray[np.float32]) -> NDArray[np.bool_]:
        """Return where ``disparity`` is known and the non-occluded disparity at ``path`` is not."""
        non_occluded = read_kitti_disparity(path)
        if non_occluded.shape != disparity.shape:
            raise InputError(f"{path} and the disparity of all pixels differ in size: they do not belong together")
        return np.asarray(np.isfinite(disparity) & ~np.isfinite(non_occluded))


def _is_of_split(stem: str, split: str) -> bool:
    if split in ("all", "test"):
        return True
    number = stem.split("_")[0]
    validates = number.isdigit() and int(number) >= FIRST_VALIDATION_FRAME
    return validates == (split == "validation")
