"""ETH3D's two-view benchmark (Schoeps et al., CVPR 2017): grey pairs with ground truth from a laser scanner."""

from __future__ import annotations

from pathlib import Path

from fa_stereo.data.pairs import FileDataset, FrameFiles, scene_folders
from fa_stereo.errors import InputError, MissingFilesError


class Eth3d(FileDataset):
    """``two_view_training/<scene>/im0.png, im1.png, disp0GT.pfm, mask0nocc.png``.

    The ground truth may also lie in ``two_view_training_gt`` beside the pictures' folder, as its archive unpacks.
    Pixels with ground truth that the mask does not hold as seen in both views (255) are ``occluded``.

    Args:
        root: The folder that holds ``two_view_training`` and ``two_view_test``, or the folder of scenes itself.
        split: ``train`` or ``all``, or ``test`` (without ground truth).

    Raises:
        InputError: A folder or a file is missing, or the split is empty.
    """

    def __init__(self, root: str | Path, split: str = "train") -> None:
        if split == "validation":
            raise InputError("ETH3D has the splits train and test, not 'validation'")
        root = Path(root)
        folder = root / ("two_view_test" if split == "test" else "two_view_training")
        if not folder.is_dir() and split != "test":
            folder = root
        truth = folder.parent / "two_view_training_gt"
        scenes = scene_folders(folder, "im0.png")
        if not scenes:
            raise InputError(f"{folder}: no scenes (<scene>/im0.png) there; see data/README.md for ETH3D's layout")
        frames = []
        for scene in scenes:
            beside = scene if (scene / "disp0GT.pfm").is_file() else truth / scene.name
            disparity, mask = beside / "disp0GT.pfm", beside / "mask0nocc.png"
            for file in (scene / "im1.png", *([disparity] if split != "test" else [])):
                if not file.is_file():
                    raise MissingFilesError(f"{file}: no such file, but {scene / 'im0.png'} is there; fetch it again")
            with_truth = split != "test"
            frames.append(
                FrameFiles(
                    scene.name,
                    str(scene / "im0.png"),
                    str(scene / "im1.png"),
                    disparity=str(disparity) if with_truth else None,
                    mask=str(mask) if with_truth and mask.is_file() else None,
                )
            )
        super().__init__(frames)
