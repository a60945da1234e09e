"""Matching the files of two views by name, and people's own pairs as a data set."""

from __future__ import annotations

import os
import pickle
from pathlib import Path

import numpy as np
import pytest

from fa_stereo.config import DatasetConfig
from fa_stereo.data import open_dataset
from fa_stereo.data.formats import write_kitti_disparity, write_pfm, write_picture
from fa_stereo.data.pairs import OwnPairs, pair_pictures
from fa_stereo.errors import InputError


def make(folder: Path, *names: str) -> None:
    for number, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        write_picture(folder / name, np.full((4, 6, 3), number, np.uint8))


def paired(root: Path, left: str, right: str) -> list[tuple[str, str, str]]:
    pairs = pair_pictures(str(root / left), str(root / right))
    return [
        (p.name, p.left_path.relative_to(root).as_posix(), p.right_path.relative_to(root).as_posix()) for p in pairs
    ]


def test_two_files_are_a_pair_whatever_their_names(tmp_path: Path) -> None:
    make(tmp_path, "holiday.png", "other.jpg")
    assert paired(tmp_path, "holiday.png", "other.jpg") == [("holiday", "holiday.png", "other.jpg")]


def test_the_name_of_two_files_is_what_they_share(tmp_path: Path) -> None:
    make(tmp_path, "desk_left.png", "desk_right.png", "im0.png", "im1.png")
    assert paired(tmp_path, "desk_left.png", "desk_right.png")[0][0] == "desk"
    assert paired(tmp_path, "im0.png", "im1.png")[0][0] == "im0"


def test_folders_pair_by_path_with_sub_folders_and_other_extensions(tmp_path: Path) -> None:
    make(tmp_path, "l/b/1.png", "l/a/1.png", "l/a/2.png", "r/a/2.jpg", "r/a/1.jpg", "r/b/1.jpg")
    assert paired(tmp_path, "l", "r") == [
        ("a/1", "l/a/1.png", "r/a/1.jpg"),
        ("a/2", "l/a/2.png", "r/a/2.jpg"),
        ("b/1", "l/b/1.png", "r/b/1.jpg"),
    ]


@pytest.mark.parametrize(
    ("left", "right", "name"),
    [
        ("{}_left", "{}_right", "{}"),
        ("left_{}", "right_{}", "{}"),
        ("Left{}", "Right{}", "{}"),
        ("{}-L", "{}-R", "{}"),
        ("{}_l", "{}_r", "{}"),
        ("imL_{}", "imR_{}", "im_{}"),
        ("imgLeft{}", "imgRight{}", "img_{}"),
        ("{}_leftImg8bit", "{}_rightImg8bit", "{}_Img8bit"),
        ("{}/im0", "{}/im1", "{}"),
        ("{}/view1", "{}/view5", "{}"),
        ("{}/im2", "{}/im6", "{}"),
        ("image_2/{}", "image_3/{}", "{}"),
        ("image_02/{}", "image_03/{}", "{}"),
        ("cam1_{}", "cam2_{}", "{}"),
    ],
)
def test_signs_of_the_views(tmp_path: Path, left: str, right: str, name: str) -> None:
    numbers = ("00007", "00012")
    make(tmp_path, *(f"one/{left.format(n)}.png" for n in numbers), *(f"two/{right.format(n)}.png" for n in numbers))
    assert paired(tmp_path, "one", "two") == [
        (name.format(n), f"one/{left.format(n)}.png", f"two/{right.format(n)}.png") for n in numbers
    ]


def test_the_letters_of_a_sign_inside_a_word_are_no_sign(tmp_path: Path) -> None:
    make(tmp_path, "bright_left.png", "bright_right.png", "leftover_left.png", "leftover_right.png")
    assert [p[0] for p in paired(tmp_path, "bright_le*.png", "bright_ri*.png")] == ["bright"]


@pytest.mark.parametrize(
    ("left", "right", "names"),
    [
        ("{}_left.png", "{}_right.png", ("R2", "S1", "left_turn")),  # the sign is the last
        ("room-{}/left.png", "room-{}/right.png", ("L", "R")),
        ("left_corridor/{}_left.png", "left_corridor/{}_right.png", ("im", "in")),
        ("left_{}.png", "right_{}.png", ("R2", "turn_left")),  # the first
    ],
)
def test_names_with_letters_like_a_sign(tmp_path: Path, left: str, right: str, names: tuple[str, ...]) -> None:
    make(tmp_path, *(f"one/{left.format(n)}" for n in names), *(f"two/{right.format(n)}" for n in names))
    pairs = paired(tmp_path, "one", "two")
    assert sorted(p[1:] for p in pairs) == [(f"one/{left.format(n)}", f"two/{right.format(n)}") for n in sorted(names)]
    assert len({p[0] for p in pairs}) == len(names)


def test_frames_that_are_numbered_like_views_are_no_pair(tmp_path: Path) -> None:
    """One frame is missing on each side: what is left must not be taken for the two views of one."""
    make(tmp_path, *(f"one/frame_{n:06}.png" for n in (1, 3)), *(f"two/frame_{n:06}.png" for n in (2, 3)))
    with pytest.raises(InputError, match=r"left without a partner: .*one/frame_000001\.png; right without .*000002"):
        paired(tmp_path, "one", "two")


def test_names_with_and_without_a_sign(tmp_path: Path) -> None:
    make(tmp_path, "one/desk_left.png", "one/shelf.png", "two/desk_right.png", "two/shelf.png")
    assert [p[0] for p in paired(tmp_path, "one", "two")] == ["desk", "shelf"]


def test_globs_pair_below_their_fixed_part(tmp_path: Path) -> None:
    make(tmp_path, *(f"{s}/{v}/{n}.png" for s in ("s1", "s2") for v in ("left", "right") for n in ("01", "02")))
    assert [p[0] for p in paired(tmp_path, "*/left/*.png", "*/right/*.png")] == ["s1/01", "s1/02", "s2/01", "s2/02"]
    assert len(paired(tmp_path, "**/left/*.png", "**/right/*.png")) == 4


def test_a_sequence_numbered_like_views_pairs_by_equal_names(tmp_path: Path) -> None:
    make(tmp_path, *(f"{view}/im{n}.png" for view in ("a", "b") for n in range(3)))
    assert [(p[1], p[2]) for p in paired(tmp_path, "a", "b")] == [(f"a/im{n}.png", f"b/im{n}.png") for n in range(3)]


def test_a_missing_partner_is_named(tmp_path: Path) -> None:
    make(tmp_path, "l/1.png", "l/2.png", "l/3.png", "r/1.png", "r/3.png")
    with pytest.raises(
        InputError, match=r"\(3 pictures\).*\(2\) do not pair up by name; left without a partner: .*2\.png$"
    ):
        paired(tmp_path, "l", "r")


def test_equal_counts_do_not_make_pairs(tmp_path: Path) -> None:
    make(tmp_path, "l/1.png", "l/2.png", "r/2.png", "r/3.png")
    with pytest.raises(InputError, match=r"left without a partner: .*1\.png; right without a partner: .*3\.png"):
        paired(tmp_path, "l", "r")


def test_many_missing_partners_are_counted(tmp_path: Path) -> None:
    make(tmp_path, *(f"l/{n}.png" for n in range(9)), "r/0.png")
    with pytest.raises(InputError, match="and 5 more"):
        paired(tmp_path, "l", "r")


def test_two_pictures_of_one_name_are_ambiguous(tmp_path: Path) -> None:
    make(tmp_path, "l/1.png", "l/1.jpg", "r/1.png")
    with pytest.raises(InputError, match="left names that mean the same picture twice"):
        paired(tmp_path, "l", "r")


def test_unusable_arguments(tmp_path: Path) -> None:
    make(tmp_path, "l/1.png", "r/1.png", "one.png")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="no pictures there"):
        paired(tmp_path, "l", "empty")
    with pytest.raises(InputError, match="no such file or folder"):
        paired(tmp_path, "l", "none")
    with pytest.raises(InputError, match="no pictures there"):
        paired(tmp_path, "l", "r/*.webp")
    with pytest.raises(InputError, match="is a file but"):
        paired(tmp_path, "one.png", "r")
    with pytest.raises(InputError, match="both as a left and as a right"):
        paired(tmp_path, "l", "l")


def test_real_pairs_by_globs(shared_data: Path) -> None:
    cameras = pair_pictures(str(shared_data / "oak_d/*_left.png"), str(shared_data / "oak_d/*_right.png"))
    assert [pair.name for pair in cameras] == ["corridor", "cycles", "desk", "kid_bedroom", "living_room", "toy"]
    scenes = pair_pictures(
        str(shared_data / "middlebury2006_third/*/view1.png"), str(shared_data / "middlebury2006_third/*/view5.png")
    )
    assert len(scenes) == 11
    assert all(pair.left_path.parent == pair.right_path.parent for pair in scenes)


# --- as a data set


def test_own_pairs_with_disparities_of_every_format(tmp_path: Path) -> None:
    make(tmp_path, "left/a.png", "left/s/b.png", "left/c.png", "right/a.png", "right/s/b.png", "right/c.png")
    (tmp_path / "disparity/s").mkdir(parents=True)
    truth = np.full((4, 6), 2.5, np.float32)
    write_pfm(tmp_path / "disparity/a.pfm", truth)
    write_kitti_disparity(tmp_path / "disparity/s/b.png", truth)
    np.save(tmp_path / "disparity/c.npy", truth)
    dataset = open_dataset(DatasetConfig(kind="pairs", root=str(tmp_path)))
    dataset = pickle.loads(pickle.dumps(dataset))
    assert [dataset[i].name for i in range(len(dataset))] == ["a", "c", "s/b"]
    for i in range(3):
        np.testing.assert_array_equal(dataset[i].disparity, truth)
        assert dataset[i].right_disparity is None


def test_own_pairs_without_disparity(tmp_path: Path) -> None:
    make(tmp_path, "left/a.png", "right/a.png")
    sample = OwnPairs(tmp_path)[0]
    assert sample.disparity is None
    assert sample.left.shape == (4, 6, 3)


def test_limit(tmp_path: Path) -> None:
    make(tmp_path, *(f"{view}/{n}.png" for view in ("left", "right") for n in range(4)))
    dataset = open_dataset(DatasetConfig(kind="pairs", root=str(tmp_path), limit=2))
    assert len(dataset) == 2
    assert [sample.name for sample in dataset] == ["0", "1"]
    with pytest.raises(IndexError):
        dataset[2]


def test_incomplete_own_pairs_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"is empty; data/README\.md"):
        open_dataset(DatasetConfig(kind="pairs", root=str(tmp_path)))
    with pytest.raises(InputError, match=r"no such folder; data/README\.md"):
        open_dataset(DatasetConfig(kind="pairs", root=str(tmp_path / "none")))
    with pytest.raises(InputError, match="root is not given"):
        open_dataset(DatasetConfig(kind="pairs"))
    make(tmp_path, "left/a.png", "left/b.png")
    with pytest.raises(InputError, match="right: no such folder"):
        OwnPairs(tmp_path)
    make(tmp_path, "right/a.png", "right/b.png")
    (tmp_path / "disparity").mkdir()
    write_pfm(tmp_path / "disparity/a.pfm", np.ones((4, 6), np.float32))
    with pytest.raises(InputError, match=r"disparity/b: no disparity"):
        OwnPairs(tmp_path)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read every folder")
@pytest.mark.parametrize("folder", ["left/b", "right/b", "disparity/b", "left"])
def test_a_folder_that_cannot_be_read_is_not_left_out(tmp_path: Path, folder: str) -> None:
    make(tmp_path, "left/a/0.png", "left/b/0.png", "right/a/0.png", "right/b/0.png")
    for name in "ab":
        (tmp_path / "disparity" / name).mkdir(parents=True)
        write_pfm(tmp_path / "disparity" / name / "0.pfm", np.ones((4, 6), np.float32))
    (tmp_path / folder).chmod(0)
    try:
        with pytest.raises(InputError, match=rf"{folder}: this folder cannot be read \(Permission denied\)"):
            OwnPairs(tmp_path)
    finally:
        (tmp_path / folder).chmod(0o755)


def test_a_broken_link_is_not_left_out(tmp_path: Path) -> None:
    """By a pattern as little as in a folder: reading it says what is wrong."""
    make(tmp_path, "l/0.png", "r/0.png")
    for view in "lr":
        (tmp_path / view / "1.png").symlink_to(tmp_path / f"lost/{view}.png")
    expected = [("0", "l/0.png", "r/0.png"), ("1", "l/1.png", "r/1.png")]
    assert paired(tmp_path, "l", "r") == paired(tmp_path, "l/*.png", "r/*.png") == expected


def test_linked_folders_are_followed_for_disparities_too(tmp_path: Path) -> None:
    make(tmp_path / "elsewhere", "left/a.png", "right/a.png")
    (tmp_path / "elsewhere/disparity").mkdir()
    write_pfm(tmp_path / "elsewhere/disparity/a.pfm", np.ones((4, 6), np.float32))
    for name in ("left", "right", "disparity"):
        (tmp_path / "root" / name).mkdir(parents=True)
        (tmp_path / "root" / name / "kitchen").symlink_to(tmp_path / "elsewhere" / name, target_is_directory=True)
    (sample,) = OwnPairs(tmp_path / "root")
    assert sample.name == "kitchen/a"
    np.testing.assert_array_equal(sample.disparity, 1)


def test_disparity_of_another_size_is_named(tmp_path: Path) -> None:
    make(tmp_path, "left/a.png", "right/a.png")
    (tmp_path / "disparity").mkdir()
    write_pfm(tmp_path / "disparity/a.pfm", np.ones((4, 7), np.float32))
    with pytest.raises(InputError, match=r"a\.pfm is 7x4 but .*left/a\.png is 6x4"):
        OwnPairs(tmp_path)[0]
