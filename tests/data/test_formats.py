"""Pictures and disparities of every kind people have, and everything that can be wrong with a file."""

from __future__ import annotations

import stat
import struct
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image

from fa_stereo.data.formats import (
    clean_disparity,
    read_disparity,
    read_kitti_disparity,
    read_mask,
    read_pfm,
    read_picture,
    read_picture_pair,
    read_scaled_disparity,
    write_bytes,
    write_depth_mm,
    write_kitti_disparity,
    write_pfm,
    write_picture,
    write_ply,
)
from fa_stereo.errors import InputError


def picture_of(seed: int = 0, shape: tuple[int, ...] = (20, 30, 3)) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


# --- pictures


def test_colour_picture_round_trip_is_rgb(tmp_path: Path) -> None:
    picture = picture_of()
    write_picture(tmp_path / "a.png", picture)
    np.testing.assert_array_equal(read_picture(tmp_path / "a.png"), picture)
    assert cv2.imread(str(tmp_path / "a.png"))[0, 0, 2] == picture[0, 0, 0]  # OpenCV's last channel is red


def test_grey_is_repeated(tmp_path: Path) -> None:
    grey = picture_of(shape=(20, 30))
    write_picture(tmp_path / "grey.png", grey)
    read = read_picture(tmp_path / "grey.png")
    assert read.shape == (20, 30, 3)
    for channel in range(3):
        np.testing.assert_array_equal(read[..., channel], grey)


def test_one_bit_picture_is_black_and_white(tmp_path: Path) -> None:
    Image.fromarray(np.eye(8, dtype=bool)).save(tmp_path / "bits.png")
    np.testing.assert_array_equal(read_picture(tmp_path / "bits.png")[..., 1], np.eye(8, dtype=np.uint8) * 255)


@pytest.mark.parametrize("alpha", [0, 128, 255])
def test_alpha_is_dropped_and_colours_are_kept(tmp_path: Path, alpha: int) -> None:
    rgba = np.dstack([picture_of(), np.full((20, 30), alpha, np.uint8)])
    Image.fromarray(rgba).save(tmp_path / "rgba.png")
    np.testing.assert_array_equal(read_picture(tmp_path / "rgba.png"), rgba[..., :3])


def test_palette_is_looked_up(tmp_path: Path) -> None:
    image = Image.fromarray((picture_of() // 128) * 255).quantize(colors=8)
    assert image.mode == "P"
    image.save(tmp_path / "palette.png")
    np.testing.assert_array_equal(read_picture(tmp_path / "palette.png"), np.asarray(image.convert("RGB")))


def test_grey_with_alpha(tmp_path: Path) -> None:
    grey = picture_of(shape=(20, 30))
    Image.fromarray(np.dstack([grey, grey // 2])).save(tmp_path / "la.png")
    np.testing.assert_array_equal(read_picture(tmp_path / "la.png")[..., 2], grey)


@pytest.mark.parametrize("name", ["deep.png", "deep.tiff", "deep.ppm"])
@pytest.mark.parametrize("bits", [8, 10, 12, 14, 16])
def test_16_bit_colour_fills_the_8_bit_range(tmp_path: Path, name: str, bits: int) -> None:
    white = (1 << bits) - 1
    values = np.linspace(0, white, 20 * 30 * 3).astype(np.uint16).reshape(20, 30, 3)
    cv2.imwrite(str(tmp_path / name), values[..., ::-1])
    read = read_picture(tmp_path / name)
    assert read.max() == 255
    np.testing.assert_allclose(read, values.astype(np.float64) * 255 / white, atol=0.51)


@pytest.mark.parametrize("name", ["deep.png", "deep.tiff", "deep.pgm"])
@pytest.mark.parametrize("bits", [12, 16])
def test_16_bit_grey_fills_the_8_bit_range(tmp_path: Path, name: str, bits: int) -> None:
    white = (1 << bits) - 1
    values = np.linspace(0, white, 600).astype(np.uint16).reshape(20, 30)
    cv2.imwrite(str(tmp_path / name), values)
    read = read_picture(tmp_path / name)
    assert read.shape == (20, 30, 3)
    np.testing.assert_allclose(read[..., 0], values.astype(np.float64) * 255 / white, atol=0.51)


def test_16_bit_rgba_keeps_its_colours(tmp_path: Path) -> None:
    values = (picture_of(shape=(20, 30, 4)).astype(np.uint16) * 257)[..., [2, 1, 0, 3]]
    cv2.imwrite(str(tmp_path / "rgba16.png"), values)
    np.testing.assert_array_equal(read_picture(tmp_path / "rgba16.png"), values[..., 2::-1] // 257)


def test_16_bit_views_of_a_pair_are_scaled_alike(tmp_path: Path) -> None:
    dark = np.full((20, 30), 900, np.uint16)
    bright = dark.copy()
    bright[0, 0] = 4095  # a 12-bit highlight that only one view sees
    cv2.imwrite(str(tmp_path / "left.png"), dark)
    cv2.imwrite(str(tmp_path / "right.png"), bright)
    left, right = read_picture_pair(tmp_path / "left.png", tmp_path / "right.png")
    assert left[5, 5, 0] == right[5, 5, 0] == round(900 * 255 / 4095)
    assert right[0, 0, 0] == 255


@pytest.mark.parametrize("orientation", range(1, 9))
def test_camera_orientation_is_applied_at_8_and_16_bit(tmp_path: Path, orientation: int) -> None:
    from PIL import ImageOps

    from fa_stereo.data import formats

    picture = picture_of(shape=(4, 6, 3))
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(picture).save(tmp_path / "turned.png", exif=exif)
    with Image.open(tmp_path / "turned.png") as image:
        expected = np.asarray(ImageOps.exif_transpose(image))
    np.testing.assert_array_equal(read_picture(tmp_path / "turned.png"), expected)
    np.testing.assert_array_equal(formats._turn(picture, orientation), expected)

    deep = picture[..., 0].astype(np.uint16) * 257
    Image.fromarray(deep).save(tmp_path / "deep.png", exif=exif)
    with Image.open(tmp_path / "deep.png") as image:
        assert image.mode.startswith("I")
    np.testing.assert_array_equal(read_picture(tmp_path / "deep.png")[..., 1], expected[..., 0])


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["grey 16", "colour 16", "colour 8"])
def test_a_tiff_is_turned_once(tmp_path: Path, kind: str, orientation: int) -> None:
    from fa_stereo.data import formats

    picture = picture_of(shape=(4, 6, 3))
    stored = {"grey 16": picture[..., :1].astype(np.uint16) * 257, "colour 16": picture.astype(np.uint16) * 257,
              "colour 8": picture}[kind]  # fmt: skip
    write_tiff(tmp_path / "turned.tif", stored, orientation)
    expected = formats._turn(picture, orientation)
    if kind == "grey 16":
        expected = np.repeat(expected[..., :1], 3, axis=2)
    np.testing.assert_array_equal(read_picture(tmp_path / "turned.tif"), expected)


def test_channels_one_after_another_are_read_right_or_refused(tmp_path: Path) -> None:
    picture = picture_of()
    write_tiff(tmp_path / "planes.tif", picture, 1, planes=True)
    np.testing.assert_array_equal(read_picture(tmp_path / "planes.tif"), picture)
    write_tiff(tmp_path / "deep.tif", picture.astype(np.uint16) * 257, 1, planes=True)
    with pytest.raises(InputError, match=r"deep\.tif: a TIFF with 16 bits and planes one after another; save it inter"):
        read_picture(tmp_path / "deep.tif")


def test_a_picture_beyond_what_is_decoded_is_not_called_damaged(tmp_path: Path) -> None:
    Image.new("1", (16000, 12000)).save(tmp_path / "huge.png")
    with pytest.raises(InputError, match=r"huge\.png: too large a picture \(.*192000000 pixels.*\): reduce it first"):
        read_picture(tmp_path / "huge.png")


def test_plain_text_pictures_leave_the_screen_alone(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.ppm").write_text("P3\n2 1\n255\n1 2 3 250 0 9\n")
    assert read_picture(tmp_path / "a.ppm").tolist() == [[[1, 2, 3], [250, 0, 9]]]
    assert capfd.readouterr().err == ""


def write_tiff(path: Path, values: np.ndarray, orientation: int, *, planes: bool = False) -> None:
    """Write uint8 or uint16 [H, W, C] uncompressed (TIFF 6.0), which Pillow does not for 16-bit colour.

    In one strip of whole pixels, or one for each channel.
    """
    height, width, channels = values.shape
    ordered = np.moveaxis(values, 2, 0) if planes else values
    bits, data = 8 * values.itemsize, ordered.astype(values.dtype.newbyteorder("<")).tobytes()
    strips = channels if planes else 1
    size = len(data) // strips
    short, long = 3, 4
    entries = [
        (256, short, [width]), (257, short, [height]), (258, short, [bits] * channels), (259, short, [1]),
        (262, short, [2 if channels == 3 else 1]), (273, long, [8 + n * size for n in range(strips)]),
        (274, short, [orientation]), (277, short, [channels]), (278, short, [height]), (279, long, [size] * strips),
        (284, short, [1 + planes]),
    ]  # fmt: skip
    data += b"\0" * (len(data) % 2)
    directory = 8 + len(data)
    behind = directory + 2 + 12 * len(entries) + 4
    table, longer = struct.pack("<H", len(entries)), b""
    for tag, kind, numbers in entries:
        field = struct.pack(f"<{len(numbers)}{'H' if kind == short else 'I'}", *numbers)
        if len(field) > 4:
            field, longer = struct.pack("<I", behind + len(longer)), longer + field
        table += struct.pack("<HHI", tag, kind, len(numbers)) + field.ljust(4, b"\0")
    path.write_bytes(struct.pack("<2sHI", b"II", 42, directory) + data + table + struct.pack("<I", 0) + longer)


@pytest.mark.parametrize("name", ["a.webp", "a.bmp", "a.ppm", "a.tif"])
def test_other_lossless_formats(tmp_path: Path, name: str) -> None:
    picture = picture_of()
    Image.fromarray(picture).save(tmp_path / name, **({"lossless": True} if name.endswith("webp") else {}))
    np.testing.assert_array_equal(read_picture(tmp_path / name), picture)


def test_jpeg_and_cmyk(tmp_path: Path) -> None:
    Image.new("CMYK", (30, 20), (0, 255, 255, 0)).save(tmp_path / "red.jpg")
    red = read_picture(tmp_path / "red.jpg")
    assert red.shape == (20, 30, 3)
    assert red[10, 10, 0] > 180
    assert red[10, 10, 1] < 90


def test_floating_point_picture_is_refused(tmp_path: Path) -> None:
    Image.fromarray(np.ones((4, 4), np.float32)).save(tmp_path / "float.tif")
    with pytest.raises(InputError, match=r"float\.tif.*8 or 16 bits"):
        read_picture(tmp_path / "float.tif")


def test_views_of_different_sizes_are_refused(tmp_path: Path) -> None:
    write_picture(tmp_path / "l.png", picture_of())
    write_picture(tmp_path / "r.png", picture_of(shape=(20, 31, 3)))
    with pytest.raises(InputError, match=r"l\.png is 30x20 but .*r\.png is 31x20"):
        read_picture_pair(tmp_path / "l.png", tmp_path / "r.png")


def test_missing_empty_and_foreign_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"none\.png: no such file"):
        read_picture(tmp_path / "none.png")
    with pytest.raises(InputError, match="cannot be read"):
        read_picture(tmp_path)
    (tmp_path / "empty.png").touch()
    with pytest.raises(InputError, match=r"empty\.png: the file is empty"):
        read_picture(tmp_path / "empty.png")
    (tmp_path / "text.png").write_text("this is no picture")
    with pytest.raises(InputError, match=r"text\.png: not a picture"):
        read_picture(tmp_path / "text.png")
    (tmp_path / "program.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n")  # is never run
    with pytest.raises(InputError, match=r"program\.png: not a picture.*no known picture format"):
        read_picture(tmp_path / "program.png")


@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.webp", "a.bmp", "a.tif", "a.ppm", "deep.png", "deep.tiff"])
@pytest.mark.parametrize("share", [0.02, 0.3, 0.9])
@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
def test_truncated_pictures_are_refused(tmp_path: Path, name: str, share: float) -> None:
    whole = tmp_path / f"whole_{name}"
    if name.startswith("deep"):
        cv2.imwrite(str(whole), picture_of(shape=(60, 80, 3)).astype(np.uint16) * 257)
    else:
        write_picture(whole, picture_of(shape=(60, 80, 3)))
    content = whole.read_bytes()
    (tmp_path / name).write_bytes(content[: int(len(content) * share)])
    with pytest.raises(InputError, match=name.replace(".", r"\.")):
        read_picture(tmp_path / name)


def test_corrupt_png_is_refused(tmp_path: Path) -> None:
    write_picture(tmp_path / "a.png", picture_of(shape=(60, 80, 3)))
    content = bytearray((tmp_path / "a.png").read_bytes())
    content[len(content) // 2] ^= 0xFF
    (tmp_path / "a.png").write_bytes(bytes(content))
    with pytest.raises(InputError, match=r"a\.png"):
        read_picture(tmp_path / "a.png")


def test_png_with_a_wrong_checksum_is_refused(tmp_path: Path) -> None:
    write_picture(tmp_path / "a.png", picture_of(shape=(60, 80, 3)))
    content = bytearray((tmp_path / "a.png").read_bytes())
    data_end = content.rindex(b"IEND") - 4  # the four bytes before the last chunk's length are the data's checksum
    content[data_end - 1] ^= 0xFF
    (tmp_path / "a.png").write_bytes(bytes(content))
    with pytest.raises(InputError, match=r"a\.png: a damaged picture"):
        read_picture(tmp_path / "a.png")


def test_write_picture_refuses_unknown_formats(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="unknown picture format"):
        write_picture(tmp_path / "a.xyz", picture_of())


# --- writing


def test_writing_replaces_whole_files_and_leaves_nothing_else(tmp_path: Path) -> None:
    target = tmp_path / "a.bin"
    write_bytes(target, b"old")
    write_bytes(target, b"new")
    assert target.read_bytes() == b"new"
    assert [path.name for path in tmp_path.iterdir()] == ["a.bin"]
    assert stat.S_IMODE(target.stat().st_mode) & 0o400


def test_writing_into_a_missing_folder_names_the_file(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"none/a\.pfm: cannot be written"):
        write_pfm(tmp_path / "none" / "a.pfm", np.ones((2, 2), np.float32))


# --- PFM


def test_pfm_round_trip(tmp_path: Path) -> None:
    values = np.random.default_rng(0).normal(size=(5, 7)).astype(np.float32)
    values[0, 0], values[1, 1] = np.inf, np.nan
    write_pfm(tmp_path / "a.pfm", values)
    np.testing.assert_array_equal(read_pfm(tmp_path / "a.pfm"), values)


def test_pfm_rows_run_from_bottom_to_top(tmp_path: Path) -> None:
    (tmp_path / "a.pfm").write_bytes(b"Pf\n2 2\n-1.0\n" + np.array([1, 2, 3, 4], "<f4").tobytes())
    np.testing.assert_array_equal(read_pfm(tmp_path / "a.pfm"), [[3, 4], [1, 2]])


@pytest.mark.parametrize(("scale", "order"), [("-1", "<"), ("1.0", ">"), ("-0.003922", "<"), ("5e-1", ">")])
def test_sign_of_the_pfm_scale_is_the_byte_order(tmp_path: Path, scale: str, order: str) -> None:
    content = np.array([1.5, 2.5], f"{order}f4").tobytes()
    (tmp_path / "a.pfm").write_bytes(f"Pf\n2 1\n{scale}\n".encode() + content)
    np.testing.assert_array_equal(read_pfm(tmp_path / "a.pfm"), [[1.5, 2.5]])


@pytest.mark.parametrize("header", [b"Pf\n2 1 \n-1.0\n", b"Pf 2 1 -1.0 ", b"Pf\r\n2 1\r\n-1.0\r\n", b"Pf\n2\n1\n-1\n"])
def test_pfm_headers_as_people_write_them(tmp_path: Path, header: bytes) -> None:
    (tmp_path / "a.pfm").write_bytes(header + np.array([1.5, 2.5], "<f4").tobytes())
    np.testing.assert_array_equal(read_pfm(tmp_path / "a.pfm"), [[1.5, 2.5]])


def test_pfm_whose_first_value_looks_like_a_line_end(tmp_path: Path) -> None:
    values = np.frombuffer(b"\n\n\n\n", "<f4")
    for ending in (b"\r", b"\n", b"\r\n"):
        (tmp_path / "a.pfm").write_bytes(b"Pf\n1 1\n-1.0" + ending + values.tobytes())
        np.testing.assert_array_equal(read_pfm(tmp_path / "a.pfm"), values[None])


def test_colour_pfm_is_read_but_is_no_disparity(tmp_path: Path) -> None:
    values = np.arange(24, dtype=np.float32).reshape(2, 4, 3)
    write_pfm(tmp_path / "c.pfm", values)
    np.testing.assert_array_equal(read_pfm(tmp_path / "c.pfm"), values)
    with pytest.raises(InputError, match=r"c\.pfm: a colour PFM where a disparity"):
        read_disparity(tmp_path / "c.pfm")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "empty"),
        (b"P6\n2 1\n255\n" + b"x" * 6, "not a PFM"),
        (b"Pf\ntwo 1\n-1\n" + b"x" * 8, "not a PFM"),
        (b"Pf\n2", "not a PFM"),
        (b"Pf\n0 1\n-1\n", "wrong"),
        (b"Pf\n2 1\n0\n" + b"x" * 8, "wrong"),
        (b"Pf\n2 1\n--\n" + b"x" * 8, "wrong"),
        (b"Pf\n2 1\n-1\n" + b"x" * 7, "truncated"),
        (b"Pf\n2 1\n-1\n" + b"x" * 9, "too long"),
        (b"Pf\n99999999 99999999\n-1\n" + b"x" * 8, "truncated"),
    ],
)
def test_damaged_pfm_is_refused(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "bad.pfm").write_bytes(content)
    with pytest.raises(InputError, match=rf"bad\.pfm.*{message}"):
        read_pfm(tmp_path / "bad.pfm")


# --- disparity


def test_unknown_pixels_become_inf_and_zero_stays() -> None:
    values = np.array([[0, 1, np.nan, np.inf, -np.inf, -3]], np.float32)
    np.testing.assert_array_equal(clean_disparity(values), [[0, 1, np.inf, np.inf, np.inf, np.inf]])


def test_all_negative_maps_are_negated() -> None:
    values = np.array([[-4, -2.5, 0, np.nan]], np.float32)
    np.testing.assert_array_equal(clean_disparity(values, either_sign=True), [[4, 2.5, 0, np.inf]])
    np.testing.assert_array_equal(clean_disparity(values), [[np.inf, np.inf, 0, np.inf]])


@pytest.mark.parametrize("values", [[np.nan, np.inf, -np.inf], [-1, -1, -1], [-1, np.inf, -1]])
def test_map_without_any_ground_truth_is_all_inf(values: list[float]) -> None:
    """-1 is how some write that nothing is known."""
    for either_sign in (False, True):
        assert np.isposinf(clean_disparity(np.array([values], np.float32), either_sign=either_sign)).all()


def test_kitti_disparity_is_value_over_256_and_zero_is_unknown(tmp_path: Path) -> None:
    cv2.imwrite(str(tmp_path / "d.png"), np.array([[0, 1, 256, 65535]], np.uint16))
    np.testing.assert_array_equal(read_disparity(tmp_path / "d.png"), [[np.inf, 1 / 256, 1, 65535 / 256]])


def test_kitti_round_trip_keeps_zero_disparity_valid(tmp_path: Path) -> None:
    disparity = np.array([[0, 0.5, 100.123, np.inf, np.nan]], np.float32)
    write_kitti_disparity(tmp_path / "d.png", disparity)
    read = read_kitti_disparity(tmp_path / "d.png")
    np.testing.assert_allclose(read[0, :3], [0, 0.5, 100.123], atol=1 / 256)
    assert np.isinf(read[0, 3:]).all()


def test_kitti_cannot_hold_256_px(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"300\.0 px does not fit"):
        write_kitti_disparity(tmp_path / "d.png", np.array([[300.0]]))
    assert not (tmp_path / "d.png").exists()


def test_kitti_disparity_of_another_kind_is_refused(tmp_path: Path) -> None:
    write_picture(tmp_path / "grey.png", picture_of(shape=(4, 4)))
    with pytest.raises(InputError, match=r"grey\.png.*this one has 8 bits"):
        read_kitti_disparity(tmp_path / "grey.png")
    write_picture(tmp_path / "rgb.png", picture_of())
    with pytest.raises(InputError, match=r"rgb\.png: a colour picture"):
        read_kitti_disparity(tmp_path / "rgb.png")


def test_scaled_disparity(tmp_path: Path) -> None:
    write_picture(tmp_path / "d.png", np.array([[0, 30, 255]], np.uint8))
    np.testing.assert_allclose(read_scaled_disparity(tmp_path / "d.png", 3), [[np.inf, 10, 85]])
    cv2.imwrite(str(tmp_path / "deep.png"), np.array([[0, 1]], np.uint16))
    with pytest.raises(InputError, match="16 bits"):
        read_scaled_disparity(tmp_path / "deep.png", 3)


def test_npy_disparity(tmp_path: Path) -> None:
    np.save(tmp_path / "d.npy", np.array([[1.0, np.nan]]))
    read = read_disparity(tmp_path / "d.npy")
    assert read.dtype == np.float32
    np.testing.assert_array_equal(read, [[1, np.inf]])


def test_npy_with_pickle_or_damage_or_another_shape_is_refused(tmp_path: Path) -> None:
    np.save(tmp_path / "pickle.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
    (tmp_path / "text.npy").write_text("no array")
    (tmp_path / "zip.npy").write_bytes(b"PK\x03\x04 and no archive")
    np.save(tmp_path / "cube.npy", np.zeros((2, 2, 2)))
    np.save(tmp_path / "words.npy", np.array([["a"]]))
    np.save(tmp_path / "whole.npy", np.zeros((9, 9)))
    (tmp_path / "cut.npy").write_bytes((tmp_path / "whole.npy").read_bytes()[:200])
    header = b"\x93NUMPY\x01\x00v\x00{'descr': '<f4', 'fortran_order': False, 'shape': ("
    (tmp_path / "open.npy").write_bytes((header + b"2, ").ljust(127) + b"\n1234")
    (tmp_path / "huge.npy").write_bytes((header + b"999999999, 99999)}").ljust(127) + b"\n1234")
    np.save(tmp_path / "empty.npy", np.zeros((0, 64)))
    for name in ("pickle", "text", "cube", "words", "cut", "open", "huge", "empty"):
        with pytest.raises(InputError, match=rf"{name}\.npy"):
            read_disparity(tmp_path / f"{name}.npy")


def test_unknown_disparity_format_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"unknown disparity format; use \.pfm, \.png, \.npy"):
        read_disparity(tmp_path / "d.exr")


def test_mask_stored_in_colour(tmp_path: Path) -> None:
    write_picture(tmp_path / "m.png", np.repeat(np.array([[0, 128, 255]], np.uint8)[..., None], 3, axis=2))
    np.testing.assert_array_equal(read_mask(tmp_path / "m.png"), [[0, 128, 255]])


def test_real_disparities(shared_data: Path) -> None:
    driving = read_disparity(shared_data / "pfm" / "Driving_0400.pfm")
    monkaa = read_disparity(shared_data / "pfm" / "Monkaa_0048.pfm")
    assert driving.shape == monkaa.shape == (540, 960)
    assert 260 < driving.max() < 280
    assert 380 < monkaa.max() < 390
    assert driving[-1].mean() > driving[0].mean()  # the road is near, the sky far: not upside down


# --- depth


def test_depth_in_millimetres_has_no_value_where_16_bits_cannot_hold_it(tmp_path: Path) -> None:
    depth_m = np.array([[1.2344, 1.2346, 65.5354, 65.536, -1], [np.inf, np.nan, 1000, 0.001, -0.001]], np.float32)
    write_depth_mm(tmp_path / "d.png", depth_m)
    stored = np.asarray(Image.open(tmp_path / "d.png"))
    assert stored.tolist() == [[1234, 1235, 65535, 0, 0], [0, 0, 0, 1, 0]]
    assert list(tmp_path.iterdir()) == [tmp_path / "d.png"]


def test_a_point_cloud_without_points(tmp_path: Path) -> None:
    write_ply(tmp_path / "none.ply", np.zeros((0, 3), np.float32), np.zeros((0, 3), np.uint8))
    assert (tmp_path / "none.ply").read_bytes().endswith(b"property uchar blue\nend_header\n")
