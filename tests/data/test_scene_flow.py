"""Scene Flow in its three layouts: the same frames under the same names, and everything that can be half there."""

from __future__ import annotations

import os
import pickle
import shutil
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fa_stereo.config import DatasetConfig, SceneFlowConfig
from fa_stereo.data import StereoSample, open_dataset, scene_flow
from fa_stereo.data.formats import write_pfm
from fa_stereo.data.scene_flow import SceneFlow, available_sets, detect_layout, list_scene_flow
from fa_stereo.errors import InputError

HEIGHT, WIDTH = 6, 8
FRAMES = (
    [("flyingthings3d", f"TRAIN/{part}/000{n}", stem) for part in "AB" for n in (0, 1) for stem in ("0006", "0007")]
    + [("flyingthings3d", f"TEST/{part}/0000", "0006") for part in "ABC"]
    + [("monkaa", "eating_x2", stem) for stem in ("0000", "0001", "0002")]
    + [
        ("driving", f"{mm}mm_focallength/scene_{way}/fast", "0001")
        for mm in (15, 35)
        for way in ("forwards", "backwards")
    ]
)
TRAIN_NAMES = [
    "TRAIN/A/0000/left/0006",
    "TRAIN/A/0000/left/0007",
    "TRAIN/A/0001/left/0006",
    "TRAIN/A/0001/left/0007",
    "TRAIN/B/0000/left/0006",
    "TRAIN/B/0000/left/0007",
    "TRAIN/B/0001/left/0006",
    "TRAIN/B/0001/left/0007",
    "monkaa/eating_x2/left/0000",
    "monkaa/eating_x2/left/0001",
    "monkaa/eating_x2/left/0002",
    "driving/15mm_focallength/scene_backwards/fast/left/0001",
    "driving/15mm_focallength/scene_forwards/fast/left/0001",
    "driving/35mm_focallength/scene_backwards/fast/left/0001",
    "driving/35mm_focallength/scene_forwards/fast/left/0001",
]
TEST_NAMES = ["TEST/A/0000/left/0006", "TEST/B/0000/left/0006", "TEST/C/0000/left/0006"]


def folders(layout: str, set_name: str, pass_name: str) -> tuple[str, str]:
    """The folders of one set's pictures and disparities."""
    if layout == "official":
        base = {"flyingthings3d": "FlyingThings3D", "monkaa": "Monkaa", "driving": "Driving"}[set_name]
        return f"{base}/frames_{pass_name}pass", f"{base}/disparity"
    if layout == "psmnet":
        if set_name == "flyingthings3d":
            return f"frames_{pass_name}pass", "frames_disparity"
        return f"{set_name}_frames_{pass_name}pass", f"{set_name}_disparity"
    split = "" if set_name == "flyingthings3d" else "/TRAIN"
    return f"frames_{pass_name}pass{split}", f"disparity{split}"


def make_tree(root: Path, layout: str, passes: tuple[str, ...] = ("clean",), extension: str = ".png") -> Path:
    """Write a small Scene Flow; a frame's number is in its pictures and its disparity."""
    for number, (set_name, scene, stem) in enumerate(FRAMES):
        for view_number, view in enumerate(("left", "right")):
            for pass_number, pass_name in enumerate(passes):
                pictures, disparities = folders(layout, set_name, pass_name)
                picture = root / pictures / scene / view / f"{stem}{extension}"
                picture.parent.mkdir(parents=True, exist_ok=True)
                color = (number * 4, view_number * 100, pass_number * 100)
                options = {"lossless": True} if extension == ".webp" else {}
                Image.new("RGB", (WIDTH, HEIGHT), color).save(picture, **options)
                disparity = root / disparities / scene / view / f"{stem}.pfm"
                disparity.parent.mkdir(parents=True, exist_ok=True)
                write_pfm(disparity, np.full((HEIGHT, WIDTH), number + 0.25 + 0.5 * view_number, np.float32))
    return root


def age(root: Path) -> None:
    """Let the folders look as if they had last changed an hour ago."""
    for folder, _, _ in os.walk(root):
        os.utime(folder, (time.time() - 3600, time.time() - 3600))


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))


def _name(sample: StereoSample) -> str:
    return sample.name


def names(dataset: SceneFlow) -> list[str]:
    return [frame.name for frame in dataset.frames]


@pytest.mark.parametrize("layout", ["official", "psmnet", "merged"])
@pytest.mark.parametrize("extension", [".png", ".webp"])
def test_every_layout_gives_the_same_frames(tmp_path: Path, layout: str, extension: str) -> None:
    make_tree(tmp_path, layout, extension=extension)
    assert detect_layout(tmp_path) == layout
    assert available_sets(tmp_path) == ["flyingthings3d", "monkaa", "driving"]
    dataset = SceneFlow(tmp_path, "train", SceneFlowConfig(right_disparity=True))
    assert names(dataset) == TRAIN_NAMES
    assert names(SceneFlow(tmp_path, "test")) == TEST_NAMES
    for sample in (dataset[i] for i in range(len(dataset))):
        number = int(sample.left[0, 0, 0]) // 4
        _, scene, stem = FRAMES[number]
        assert sample.name.endswith(f"{scene}/left/{stem}")  # the very file, not its neighbour in a listing
        assert sample.left[0, 0, 1] == 0
        assert sample.right[0, 0].tolist() == [number * 4, 100, 0]
        assert sample.disparity is not None
        assert sample.right_disparity is not None
        assert sample.disparity[0, 0] == number + 0.25
        assert sample.right_disparity[0, 0] == number + 0.75


def test_a_frame_lacking_in_one_listing_does_not_shift_the_others(tmp_path: Path) -> None:
    make_tree(tmp_path, "official")
    for folder in ("frames_cleanpass", "disparity"):
        for file in (tmp_path / "FlyingThings3D" / folder / "TRAIN/A/0000").glob("*/0006.*"):
            file.unlink()
    dataset = SceneFlow(tmp_path)
    assert names(dataset) == TRAIN_NAMES[1:]
    assert dataset[0].disparity is not None
    assert dataset[0].disparity[0, 0] == 1.25


def test_passes(tmp_path: Path) -> None:
    make_tree(tmp_path, "official", passes=("clean", "final"))
    final = SceneFlow(tmp_path, "test", SceneFlowConfig(passes="final"))
    assert names(final) == TEST_NAMES
    assert final[0].left[0, 0, 2] == 100
    both = SceneFlow(tmp_path, "test", SceneFlowConfig(passes="both"))
    assert names(both) == [f"clean/{n}" for n in TEST_NAMES] + [f"final/{n}" for n in TEST_NAMES]
    assert [both[i].left[0, 0, 2] for i in range(6)] == [0, 0, 0, 100, 100, 100]


def test_a_missing_pass_says_which_is_there(tmp_path: Path) -> None:
    make_tree(tmp_path, "psmnet")
    with pytest.raises(InputError, match=r"frames_finalpass is missing.*other pass.*scene_flow\.passes=clean"):
        SceneFlow(tmp_path, "train", SceneFlowConfig(passes="final"))


def test_choice_of_sets(tmp_path: Path) -> None:
    make_tree(tmp_path, "merged")
    assert names(SceneFlow(tmp_path, "train", SceneFlowConfig(sets=["driving"]))) == TRAIN_NAMES[11:]
    assert names(SceneFlow(tmp_path, "train", SceneFlowConfig(sets=["monkaa", "flyingthings3d"]))) == TRAIN_NAMES[:11]
    with pytest.raises(InputError, match="test split has flyingthings3d only"):
        SceneFlow(tmp_path, "test", SceneFlowConfig(sets=["monkaa"]))
    with pytest.raises(InputError, match="not 'validation'"):
        SceneFlow(tmp_path, "validation")


def test_right_disparity_is_not_read_unless_asked_for(tmp_path: Path) -> None:
    make_tree(tmp_path, "official")
    for folder in list(tmp_path.glob("*/disparity/**/right")):
        shutil.rmtree(folder)
    assert SceneFlow(tmp_path)[0].right_disparity is None
    with pytest.raises(InputError, match=r"lacks 15 files.*right/0006\.pfm"):
        SceneFlow(tmp_path, "train", SceneFlowConfig(right_disparity=True))


def test_unused_files_are_left_out(tmp_path: Path) -> None:
    make_tree(tmp_path / "data", "official")
    unused = tmp_path / "all_unused_files.txt"
    unused.write_text("TRAIN/A/0000/left/0007.png\nTRAIN/B/0001/right/0006.png\n\nTEST/C/0000/left/0006.png\n")
    config = SceneFlowConfig(unused_files=str(unused))
    assert names(SceneFlow(tmp_path / "data", "train", config)) == [
        n for n in TRAIN_NAMES if n not in ("TRAIN/A/0000/left/0007", "TRAIN/B/0001/left/0006")
    ]
    assert names(SceneFlow(tmp_path / "data", "test", config)) == TEST_NAMES[:2]
    unused.write_text("nothing of use\n")
    with pytest.raises(InputError, match="no line names a FlyingThings3D frame"):
        SceneFlow(tmp_path / "data", "train", config)


def test_names_of_folders_as_archives_and_people_write_them(tmp_path: Path) -> None:
    make_tree(tmp_path, "psmnet", extension=".webp")
    (tmp_path / "monkaa_frames_cleanpass").rename(tmp_path / "monkaa__frames_cleanpass")
    (tmp_path / "frames_cleanpass").rename(tmp_path / "frames_cleanpass_webp")
    assert names(SceneFlow(tmp_path)) == TRAIN_NAMES
    lower = make_tree(tmp_path / "lower", "official")
    (lower / "FlyingThings3D").rename(lower / "flyingthings3d")
    assert names(SceneFlow(lower)) == TRAIN_NAMES


def test_png_is_taken_where_webp_lies_beside_it(tmp_path: Path) -> None:
    make_tree(tmp_path, "official", extension=".webp")
    make_tree(tmp_path, "official", extension=".png")
    dataset = SceneFlow(tmp_path)
    assert names(dataset) == TRAIN_NAMES
    assert all(frame.left.endswith(".png") and frame.right.endswith(".png") for frame in dataset.frames)


def test_negative_disparities_of_the_dispnet_subset_become_positive(tmp_path: Path) -> None:
    make_tree(tmp_path, "official")
    write_pfm(tmp_path / "FlyingThings3D/disparity/TEST/A/0000/left/0006.pfm", np.full((HEIGHT, WIDTH), -7, np.float32))
    sample = SceneFlow(tmp_path, "test")[0]
    assert sample.disparity is not None
    assert (sample.disparity == 7).all()


def test_both_splits_of_sets_without_a_test_split_are_the_one_there_is(tmp_path: Path) -> None:
    make_tree(tmp_path, "official")
    config = DatasetConfig("scene_flow", str(tmp_path), "all", scene_flow=SceneFlowConfig(sets=["driving"]))
    assert len(open_dataset(config)) == len(TRAIN_NAMES[11:])  # type: ignore[arg-type]


def test_a_user_without_a_home_needs_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_tree(tmp_path / "data", "official")
    (tmp_path / "data").chmod(0o555)
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr("os.path.expanduser", lambda path: path)
    monkeypatch.chdir(tmp_path)
    assert names(SceneFlow(tmp_path / "data")) == TRAIN_NAMES
    (tmp_path / "data").chmod(0o755)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data"]
    assert not (tmp_path / "data/.fa_stereo").exists()


# --- half there


@pytest.mark.parametrize(
    ("lost", "named"),
    [
        ("frames_cleanpass/TRAIN/A/0000/left/0006.png", r"lacks 1 files.*left/0006\.png"),
        ("frames_cleanpass/TRAIN/A/0000/right/0006.png", r"lacks 1 files.*right/0006\.png"),
        ("disparity/TRAIN/A/0000/left/0006.pfm", r"lacks 1 files.*left/0006\.pfm"),
    ],
)
def test_a_missing_file_is_named_at_once(tmp_path: Path, lost: str, named: str) -> None:
    make_tree(tmp_path, "official")
    (tmp_path / "FlyingThings3D" / lost).unlink()
    with pytest.raises(InputError, match=named):
        SceneFlow(tmp_path)


@pytest.mark.parametrize(
    ("layout", "lost", "named"),
    [
        ("official", "Monkaa", "Monkaa is missing .official layout."),
        ("official", "Driving/disparity", "Driving/disparity is missing"),
        ("official", "FlyingThings3D/frames_cleanpass/TRAIN", "frames_cleanpass/TRAIN is missing"),
        ("psmnet", "driving_disparity", "driving_disparity is missing .psmnet layout."),
        ("psmnet", "frames_disparity", "frames_disparity is missing"),
        ("psmnet", "monkaa_frames_cleanpass", "monkaa_frames_cleanpass is missing"),
        ("merged", "disparity", "frames_cleanpass but no disparities"),
        ("merged", "frames_cleanpass", "has disparity but no frames_cleanpass"),
        ("merged", "disparity/TRAIN", "disparity/TRAIN is missing"),
    ],
)
def test_a_layout_half_there_says_what_is_missing(tmp_path: Path, layout: str, lost: str, named: str) -> None:
    make_tree(tmp_path, layout)
    shutil.rmtree(tmp_path / lost)
    with pytest.raises(InputError, match=named):
        SceneFlow(tmp_path)


def test_a_set_missing_from_the_merged_layout_is_named(tmp_path: Path) -> None:
    make_tree(tmp_path, "merged")
    for folder in ("frames_cleanpass", "disparity"):
        shutil.rmtree(tmp_path / folder / "TRAIN/eating_x2")
    with pytest.raises(InputError, match="no frames of monkaa there"):
        SceneFlow(tmp_path)


def test_unusable_roots(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"is empty; data/README\.md"):
        open_dataset(DatasetConfig(kind="scene_flow", root=str(tmp_path)))
    with pytest.raises(InputError, match="no such folder"):
        SceneFlow(tmp_path / "none")
    (tmp_path / "holiday").mkdir()
    with pytest.raises(InputError, match="nothing of Scene Flow there"):
        SceneFlow(tmp_path)


def test_two_layouts_in_one_root_must_be_told_apart(tmp_path: Path) -> None:
    make_tree(tmp_path, "official")
    make_tree(tmp_path, "merged")
    with pytest.raises(InputError, match="layouts official and merged: say which"):
        SceneFlow(tmp_path)
    for layout in ("official", "merged"):
        assert names(SceneFlow(tmp_path, "train", SceneFlowConfig(layout=layout))) == TRAIN_NAMES


def test_truncated_and_mismatching_files_are_named_when_read(tmp_path: Path) -> None:
    make_tree(tmp_path, "official")
    dataset = SceneFlow(tmp_path, "test")
    base = tmp_path / "FlyingThings3D"
    disparity = base / "disparity/TEST/A/0000/left/0006.pfm"
    disparity.write_bytes(disparity.read_bytes()[:-5])
    with pytest.raises(InputError, match=r"TEST/A/0000/left/0006\.pfm: the PFM file is truncated"):
        dataset[0]
    write_pfm(base / "disparity/TEST/B/0000/left/0006.pfm", np.ones((HEIGHT + 1, WIDTH), np.float32))
    with pytest.raises(InputError, match=r"TEST/B/0000/left/0006\.pfm is 8x7 but .*left/0006\.png is 8x6"):
        dataset[1]
    (base / "frames_cleanpass/TEST/C/0000/right/0006.png").unlink()
    with pytest.raises(InputError, match=r"TEST/C/0000/right/0006\.png: no such file"):
        dataset[2]


# --- the index


def test_index_is_kept_beside_the_data_and_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_tree(tmp_path, "official")
    age(tmp_path)
    first = SceneFlow(tmp_path, "train", SceneFlowConfig(right_disparity=True))
    assert len(list((tmp_path / ".fa_stereo").glob("*.json"))) == 1
    monkeypatch.setattr(scene_flow, "list_scene_flow", lambda *_: pytest.fail("the index was not used"))
    again = SceneFlow(tmp_path, "train", SceneFlowConfig(right_disparity=True))
    assert again.frames == first.frames
    with pytest.raises(pytest.fail.Exception):  # another configuration has another index
        SceneFlow(tmp_path, "train", SceneFlowConfig())


def test_index_moves_with_the_data(tmp_path: Path) -> None:
    make_tree(tmp_path / "old", "psmnet")
    age(tmp_path)
    SceneFlow(tmp_path / "old")
    (tmp_path / "old").rename(tmp_path / "new")
    dataset = SceneFlow(tmp_path / "new")
    assert len(dataset) == len(TRAIN_NAMES)
    assert dataset[3].left.shape == (HEIGHT, WIDTH, 3)


def test_index_notices_added_and_removed_files(tmp_path: Path) -> None:
    make_tree(tmp_path, "official")
    age(tmp_path)
    SceneFlow(tmp_path)
    base = tmp_path / "Monkaa"
    for old in [*base.glob("frames_cleanpass/eating_x2/*/0002.png"), *base.glob("disparity/eating_x2/*/0002.pfm")]:
        shutil.copy(old, old.with_stem("0003"))
    assert "monkaa/eating_x2/left/0003" in names(SceneFlow(tmp_path))
    (base / "disparity/eating_x2/left/0003.pfm").unlink()
    with pytest.raises(InputError, match=r"eating_x2/left/0003\.pfm"):
        SceneFlow(tmp_path)


def test_index_is_not_kept_of_folders_that_have_just_changed(tmp_path: Path) -> None:
    make_tree(tmp_path, "official")
    SceneFlow(tmp_path)
    assert not list(tmp_path.glob(".fa_stereo/*.json"))


def test_damaged_index_is_made_anew(tmp_path: Path) -> None:
    make_tree(tmp_path, "official")
    age(tmp_path)
    SceneFlow(tmp_path)
    index = next((tmp_path / ".fa_stereo").glob("*.json"))
    whole = index.read_bytes()
    for damage in (b"", b"{", b"[]", b'{"frames": []}', whole[: len(whole) // 2]):
        index.write_bytes(damage)
        assert names(SceneFlow(tmp_path)) == TRAIN_NAMES


def test_write_protected_data_keep_their_index_in_the_users_cache(tmp_path: Path) -> None:
    make_tree(tmp_path, "official")
    age(tmp_path)
    tmp_path.chmod(0o555)
    try:
        SceneFlow(tmp_path)
        assert not (tmp_path / ".fa_stereo").exists()
        assert len(list(Path(os.environ["XDG_CACHE_HOME"], "fa_stereo").glob("*.json"))) == 1
        assert names(SceneFlow(tmp_path)) == TRAIN_NAMES
    finally:
        tmp_path.chmod(0o755)


def test_index_can_be_switched_off(tmp_path: Path) -> None:
    make_tree(tmp_path, "official")
    age(tmp_path)
    SceneFlow(tmp_path, "train", SceneFlowConfig(cache_index=False))
    assert not (tmp_path / ".fa_stereo").exists()


# --- in use


def test_data_set_travels_to_loader_processes(tmp_path: Path) -> None:
    from torch.utils.data import DataLoader

    make_tree(tmp_path, "official")
    dataset = SceneFlow(tmp_path)
    assert pickle.loads(pickle.dumps(dataset)).frames == dataset.frames
    loader = DataLoader(dataset, batch_size=None, num_workers=1, collate_fn=_name)
    assert list(loader) == TRAIN_NAMES


def test_links_to_folders_are_followed(tmp_path: Path) -> None:
    make_tree(tmp_path / "data", "official")
    (tmp_path / "links/FlyingThings3D").mkdir(parents=True)
    for name in ("frames_cleanpass", "disparity"):
        (tmp_path / "links/FlyingThings3D" / name).symlink_to(tmp_path / "data/FlyingThings3D" / name)
    assert names(SceneFlow(tmp_path / "links", "test")) == TEST_NAMES


def test_real_frames(shared_data: Path) -> None:
    config = SceneFlowConfig(sets=["flyingthings3d"], right_disparity=True, cache_index=False)
    dataset = open_dataset(DatasetConfig("scene_flow", str(shared_data / "scene_flow"), "test", scene_flow=config))
    assert [dataset[i].name for i in range(len(dataset))] == ["TEST/A/0032/left/0006", "TEST/B/0004/left/0006"]
    sample = dataset[0]  # its pictures have an alpha channel
    assert sample.left.shape == sample.right.shape == (540, 960, 3)
    assert sample.disparity is not None
    assert np.isfinite(sample.disparity).all()
    listing = list_scene_flow(shared_data / "scene_flow", "train", config)
    assert [frame.name for frame in listing.frames] == ["TRAIN/A/0000/left/0006"]
    assert not listing.missing


def test_both_splits_at_once(tmp_path: Path) -> None:
    make_tree(tmp_path, "official")
    sizes = {
        split: len(open_dataset(DatasetConfig(kind="scene_flow", root=str(tmp_path), split=split)))
        for split in ("train", "test", "all")
    }
    assert sizes["all"] == sizes["train"] + sizes["test"] > sizes["test"] > 0
