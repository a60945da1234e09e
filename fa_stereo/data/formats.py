"""Files of pictures, disparity, depth and points: ordinary pictures, PFM, 16-bit and 8-bit PNG, NumPy, PLY.

Pictures are uint8 RGB [H, W, 3]. Disparities are float32 [H, W] in pixels, zero or more, with ``inf`` where there is no
ground truth. Whatever is wrong with a file is an ``InputError`` that names it.

How unusual pictures become uint8 RGB:

* grey is repeated in the three channels, palettes are looked up, JPEG's CMYK is converted;
* alpha is dropped, not composited: a background invented behind transparent pixels would be matched like a real one;
* the orientation stored by cameras (EXIF) is applied, as picture viewers do;
* 16-bit values are divided so that white becomes 255: white is the largest value of the smallest usual depth (8, 10,
  12, 14 or 16 bit) that holds the picture's largest value. Cameras store 10 and 12 bit unshifted in 16-bit files,
  where taking the upper byte leaves them black. The two views of a pair share their depth (``read_picture_pair``).
"""

from __future__ import annotations

import io
import re
import struct
import tokenize
import zipfile
import zlib
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from fa_stereo.errors import InputError, RangeError
from fa_stereo.files import read_bytes, write_bytes

PICTURE_EXTENSIONS = (".png", ".webp", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".ppm", ".pgm")
DISPARITY_EXTENSIONS = (".pfm", ".png", ".npy")
DEPTH_MM_LIMIT_M = 65.5355
"""What 16 bits of millimetres do not hold any more."""

# Pillow knows many more, some of which start other programs to decode a file
_PILLOW_FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "TIFF", "PPM", "GIF")
_USUAL_DEPTHS_BITS = (8, 10, 12, 14, 16)
_EXIF_ORIENTATION = 0x0112
# what Pillow's decoders raise on damaged files; most of them are OSError, but not all
_DECODING_ERRORS = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    IndexError,
    KeyError,
    struct.error,
    zlib.error,
)
# what NumPy raises on damaged files, by the part that is damaged
_NPY_ERRORS = (
    ValueError,
    EOFError,
    OSError,
    SyntaxError,
    OverflowError,
    MemoryError,
    tokenize.TokenError,
    zlib.error,
    zipfile.BadZipFile,
)
_PFM_HEADER = re.compile(rb"(P[Ff])\s+(\d+)\s+(\d+)\s+([-+.\deE]+)(\r\n|\s)")


# --------------------------------------------------------------------------------------------------------------------
# pictures


def read_picture(path: str | Path) -> NDArray[np.uint8]:
    """Read a picture of any usual kind (see the module's docstring for the conversions).

    Returns:
        uint8 RGB [H, W, 3].

    Raises:
        InputError: The file is missing, empty, truncated or no picture.
    """
    picture = _decode_picture(path)
    return _to_8_bit(picture, _depth_bits(picture))


def read_picture_pair(left: str | Path, right: str | Path) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Read two views; 16-bit ones are scaled alike.

    Returns:
        Left and right, uint8 RGB [H, W, 3] of equal size.

    Raises:
        InputError: A file is unusable, or the views differ in size.
    """
    left_picture, right_picture = _decode_picture(left), _decode_picture(right)
    if left_picture.shape != right_picture.shape:
        raise InputError(
            f"{left} is {_size(left_picture)} but {right} is {_size(right_picture)}: "
            "the two views of a rectified pair have the same size"
        )
    bits = max(_depth_bits(left_picture), _depth_bits(right_picture))
    return _to_8_bit(left_picture, bits), _to_8_bit(right_picture, bits)


def write_picture(path: str | Path, picture: NDArray[np.uint8]) -> None:
    """Write uint8 RGB [H, W, 3] or grey [H, W]; the extension says the format.

    Raises:
        InputError: The extension is unknown or the folder cannot be written.
    """
    image_format = Image.registered_extensions().get(Path(path).suffix.lower())
    if image_format is None:
        raise InputError(f"{path}: unknown picture format; use one of {', '.join(PICTURE_EXTENSIONS)}")
    buffer = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(picture)).save(buffer, format=image_format)
    write_bytes(path, buffer.getvalue())


def _decode_picture(path: str | Path) -> NDArray[Any]:
    """Return uint8 or uint16 RGB [H, W, 3] at the file's own depth."""
    content = read_bytes(path)
    try:
        with Image.open(io.BytesIO(content), formats=_PILLOW_FORMATS) as image:
            image.load()  # which turns a TIFF upright by itself
            orientation = int(image.getexif().get(_EXIF_ORIENTATION, 1))
            if image.format == "PNG" and not _png_is_whole(content):
                raise InputError(f"{path}: a damaged picture (wrong checksum); fetch or save it again")
            if image.mode == "F":
                raise InputError(f"{path}: a picture with floating-point values; save it with 8 or 16 bits a channel")
            if image.format == "TIFF" and _has_deep_planes(image):
                raise InputError(f"{path}: a TIFF with 16 bits and planes one after another; save it interleaved")
            if image.mode.startswith("I"):
                return _turn(_grey_to_rgb(_checked_16_bit(np.asarray(image), path)), orientation)
            if _may_hold_16_bit_colour(image.format, content):
                deep = _decode_16_bit_colour(content)
                if deep is not None:
                    return _turn(deep, orientation)
            upright = image if orientation == 1 else ImageOps.exif_transpose(image)
            return np.asarray(upright if upright.mode == "RGB" else upright.convert("RGB"))
    except InputError:
        raise
    except Image.DecompressionBombError as error:
        raise InputError(f"{path}: too large a picture ({_reason(error)}): reduce it first") from error
    except _DECODING_ERRORS as error:
        raise InputError(
            f"{path}: not a picture, or a damaged one ({_reason(error)}); "
            f"{len(content)} bytes long, fetch or save it again"
        ) from error


def _png_is_whole(content: bytes) -> bool:
    """Tell whether the checksums of the chunks that make the picture are right, of which Pillow skips the data's."""
    position = 8  # after the signature; a chunk is length, name, data, checksum
    while position + 12 <= len(content):
        (length,) = struct.unpack_from(">I", content, position)
        name, end = content[position + 4 : position + 8], position + 8 + length
        is_critical = name[:1].isupper()  # names of others (time, text, ...) begin in lower case
        if is_critical and content[end : end + 4] != zlib.crc32(content[position + 4 : end]).to_bytes(4, "big"):
            return False
        if name == b"IEND":
            break
        position = end + 4
    return True


def _reason(error: Exception) -> str:
    if isinstance(error, UnidentifiedImageError):
        return "no known picture format"
    return " ".join(str(error).split()) or type(error).__name__


def _checked_16_bit(values: NDArray[Any], path: str | Path) -> NDArray[np.uint16]:
    if values.min() < 0 or values.max() > 65535:
        raise InputError(f"{path}: values from {values.min()} to {values.max()} do not fit a 16-bit picture")
    return values.astype(np.uint16)


def _grey_to_rgb(grey: NDArray[Any]) -> NDArray[Any]:
    return np.repeat(grey[..., None], 3, axis=2)


def _has_deep_planes(image: Image.Image) -> bool:
    """Tell whether a TIFF stores its channels apart, with more than 8 bits: which neither decoder reads right."""
    tags = image.tag_v2  # type: ignore[attr-defined]
    depths = tags.get(258, (1,))
    return tags.get(284) == 2 and len(depths) > 1 and max(depths) > 8


def _may_hold_16_bit_colour(image_format: str | None, content: bytes) -> bool:
    if image_format == "PNG":
        return content[24] == 16  # the depth field of the header chunk
    return image_format == "TIFF" or content[:2] in (b"P5", b"P6")


def _decode_16_bit_colour(content: bytes) -> NDArray[np.uint16] | None:
    """Return uint16 RGB, or None if the picture has 8 bits. Pillow keeps only the upper byte of 16-bit colour."""
    values = cv2.imdecode(np.frombuffer(content, dtype=np.uint8), cv2.IMREAD_UNCHANGED)
    if values is None or values.dtype != np.uint16:
        return None
    if values.ndim == 2:
        return np.asarray(_grey_to_rgb(values), dtype=np.uint16)
    if values.shape[2] == 2:
        return np.asarray(_grey_to_rgb(values[..., 0]), dtype=np.uint16)
    return np.ascontiguousarray(values[..., 2::-1])  # BGR or BGRA to RGB


def _turn(picture: NDArray[Any], orientation: int) -> NDArray[Any]:
    """Apply an EXIF orientation (1 to 8) to [H, W, 3]."""
    if orientation in (5, 6, 7, 8):
        picture = picture.swapaxes(0, 1)
    if orientation in (2, 3, 6, 7):
        picture = picture[:, ::-1]
    if orientation in (3, 4, 7, 8):
        picture = picture[::-1]
    return np.ascontiguousarray(picture)


def _depth_bits(picture: NDArray[Any]) -> int:
    if picture.dtype == np.uint8:
        return 8
    largest = int(picture.max())
    return next(bits for bits in _USUAL_DEPTHS_BITS if largest < 1 << bits)


def _to_8_bit(picture: NDArray[Any], bits: int) -> NDArray[np.uint8]:
    if picture.dtype == np.uint8 or bits == 8:
        return picture.astype(np.uint8)
    white = (1 << bits) - 1
    return ((picture.astype(np.uint32) * 255 + white // 2) // white).astype(np.uint8)


def _size(array: NDArray[Any]) -> str:
    return f"{array.shape[1]}x{array.shape[0]}"


# --------------------------------------------------------------------------------------------------------------------
# PFM


def read_pfm(path: str | Path) -> NDArray[np.float32]:
    """Read a portable float map as it is (no sign or validity is changed).

    The rows run from bottom to top in the file; a negative scale means little-endian. The scale's size is ignored:
    Middlebury stores 1/255 there, the others 1, and all mean plain pixels.

    Returns:
        float32 [H, W] (``Pf``) or [H, W, 3] (``PF``), top row first.

    Raises:
        InputError: The header is wrong or the file's length does not fit it.
    """
    content = read_bytes(path)
    header = _PFM_HEADER.match(content)
    if header is None:
        raise InputError(f"{path}: not a PFM file: its header is not 'Pf' or 'PF', width, height and scale")
    kind, width, height = header[1], int(header[2]), int(header[3])
    try:
        scale = float(header[4])
    except ValueError:
        scale = 0.0
    if width == 0 or height == 0 or scale == 0 or not np.isfinite(scale):
        raise InputError(f"{path}: a PFM header with size {width}x{height} and scale {header[4].decode()} is wrong")
    channels = 3 if kind == b"PF" else 1
    start, expected = header.end(), 4 * width * height * channels
    if header[5] == b"\r\n" and len(content) - start == expected - 1:
        start -= 1  # a lone \r ended the header: the \n was the first value's first byte
    if len(content) - start != expected:
        problem = "truncated" if len(content) - start < expected else "too long"
        raise InputError(
            f"{path}: the PFM file is {problem}: {width}x{height} needs {expected} bytes of values, "
            f"it has {len(content) - start}; fetch it again"
        )
    values = np.frombuffer(content, dtype="<f4" if scale < 0 else ">f4", offset=start)
    shape = (height, width, 3) if channels == 3 else (height, width)
    return np.ascontiguousarray(values.reshape(shape)[::-1], dtype=np.float32)


def write_pfm(path: str | Path, values: NDArray[np.floating[Any]]) -> None:
    """Write [H, W] as ``Pf`` or [H, W, 3] as ``PF``, little-endian with scale -1.

    Raises:
        InputError: The folder cannot be written.
    """
    if values.ndim != 2 and not (values.ndim == 3 and values.shape[2] == 3):
        raise ValueError(f"a PFM holds [H, W] or [H, W, 3], got shape {list(values.shape)}")
    kind = "Pf" if values.ndim == 2 else "PF"
    header = f"{kind}\n{values.shape[1]} {values.shape[0]}\n-1.0\n".encode("ascii")
    write_bytes(path, header + np.ascontiguousarray(values[::-1], dtype="<f4").tobytes())


# --------------------------------------------------------------------------------------------------------------------
# disparity


def read_disparity(path: str | Path, *, either_sign: bool = False) -> NDArray[np.float32]:
    """Read a disparity map by its extension: ``.pfm``, KITTI's 16-bit ``.png``, or ``.npy``.

    Args:
        path: Of the map.
        either_sign: It may be negative throughout (see ``clean_disparity``).

    Returns:
        float32 [H, W] in pixels, zero or more, inf = no ground truth (see ``clean_disparity``).

    Raises:
        InputError: The file is unusable, of another kind, or not one channel.
    """
    extension = Path(path).suffix.lower()
    if extension == ".pfm":
        values = read_pfm(path)
        if values.ndim != 2:
            raise InputError(f"{path}: a colour PFM where a disparity of one channel was expected")
        return clean_disparity(values, either_sign=either_sign)
    if extension == ".png":
        return read_kitti_disparity(path)
    if extension == ".npy":
        return clean_disparity(_read_npy(path), either_sign=either_sign)
    raise InputError(f"{path}: unknown disparity format; use {', '.join(DISPARITY_EXTENSIONS)}")


def clean_disparity(values: NDArray[np.float32], *, either_sign: bool = False) -> NDArray[np.float32]:
    """Return [H, W] with inf for every pixel without ground truth: where it is NaN, infinite or negative.

    With ``either_sign``, a map without any positive value has the opposite sign throughout, as in the DispNet subset of
    Scene Flow, and is negated first, unless it is -1 throughout.
    """
    finite = np.isfinite(values)
    if finite.all() and values.min() >= 0:
        return values
    if either_sign and not (values[finite] > 0).any() and not (values[finite] == -1).all():
        values = np.where(finite, -values, values)
    return np.where(finite & (values >= 0), values, np.float32(np.inf)).astype(np.float32)


def read_kitti_disparity(path: str | Path) -> NDArray[np.float32]:
    """Read KITTI's 16-bit PNG: disparity = value / 256, 0 = no ground truth.

    Returns:
        float32 [H, W] in pixels, inf = no ground truth.

    Raises:
        InputError: The file is unusable or not a 16-bit picture of one channel.
    """
    values = _read_grey(path)
    if values.dtype != np.uint16:
        raise InputError(f"{path}: KITTI's disparities are 16-bit PNG (value / 256), this one has 8 bits")
    return np.where(values > 0, values.astype(np.float32) / 256, np.float32(np.inf)).astype(np.float32)


def write_kitti_disparity(path: str | Path, disparity: NDArray[np.floating[Any]]) -> None:
    """Write KITTI's 16-bit PNG: value = disparity * 256, at least 1; 0 where the disparity is not finite.

    Raises:
        RangeError: A disparity of 256 px or more does not fit.
        InputError: The folder cannot be written.
    """
    known = np.isfinite(disparity)
    values = np.rint(np.where(known, disparity, 0).astype(np.float64) * 256)
    if values.max(initial=0) > 65535:
        raise RangeError(
            f"{path}: a disparity of {values.max() / 256:.1f} px does not fit KITTI's 16-bit PNG (less than 256 px); "
            "use PFM or npy"
        )
    _write_16_bit_png(path, np.where(known, np.maximum(values, 1), 0).astype(np.uint16))


def read_scaled_disparity(path: str | Path, divisor: float) -> NDArray[np.float32]:
    """Read Middlebury's 8-bit disparity pictures: disparity = value / divisor, 0 = no ground truth.

    Returns:
        float32 [H, W] in pixels, inf = no ground truth.

    Raises:
        InputError: The file is unusable or not an 8-bit picture.
    """
    values = _read_grey(path)
    if values.dtype != np.uint8:
        raise InputError(f"{path}: an 8-bit disparity picture was expected, this one has 16 bits")
    disparity = np.where(values > 0, values / np.float32(divisor), np.float32(np.inf))
    return np.asarray(disparity, dtype=np.float32)


def read_mask(path: str | Path) -> NDArray[np.uint8]:
    """Read a mask picture; one stored in colour is read by its first channel.

    Returns:
        uint8 [H, W].

    Raises:
        InputError: The file is unusable.
    """
    return np.ascontiguousarray(read_picture(path)[..., 0])


def _read_grey(path: str | Path) -> NDArray[Any]:
    """Return uint8 or uint16 [H, W] of a picture whose channels, if several, are equal."""
    picture = _decode_picture(path)
    grey = picture[..., 0]
    if not ((picture[..., 1] == grey).all() and (picture[..., 2] == grey).all()):
        raise InputError(f"{path}: a colour picture where a disparity of one channel was expected")
    return np.ascontiguousarray(grey)


def _read_npy(path: str | Path) -> NDArray[np.float32]:
    content = read_bytes(path)
    try:
        values = np.load(io.BytesIO(content), allow_pickle=False)
    except _NPY_ERRORS as error:
        raise InputError(f"{path}: not a NumPy array file, or a damaged one; save it again with numpy.save") from error
    if not isinstance(values, np.ndarray) or values.ndim != 2 or values.dtype.kind not in "fiu":
        raise InputError(f"{path}: a disparity is an array [H, W] of numbers")
    if not values.size:
        raise InputError(f"{path}: an empty array of shape {list(values.shape)}; save the disparity again")
    return np.asarray(values, dtype=np.float32)


# --------------------------------------------------------------------------------------------------------------------
# depth, points, and what several kinds are written by


def write_npy(path: str | Path, values: NDArray[Any]) -> None:
    """Write an array in NumPy's format.

    Raises:
        InputError: The folder cannot be written.
    """
    buffer = io.BytesIO()
    np.save(buffer, values)
    write_bytes(path, buffer.getvalue())


def write_depth_mm(path: str | Path, depth_m: NDArray[np.floating[Any]]) -> None:
    """Write a 16-bit PNG of depth in millimetres, as RGB-D software reads it.

    0 = no value: where the depth is not finite or not positive, or ``DEPTH_MM_LIMIT_M`` and more.

    Args:
        path: A PNG file.
        depth_m: Distance from the cameras' plane in metres, [H, W].

    Raises:
        InputError: The folder cannot be written.
    """
    values = np.rint(np.where(np.isfinite(depth_m), depth_m, 0).astype(np.float64) * 1000)
    _write_16_bit_png(path, np.where((values > 0) & (values <= 65535), values, 0).astype(np.uint16))


def write_ply(path: str | Path, points_m: NDArray[np.floating[Any]], colors: NDArray[np.uint8]) -> None:
    """Write a coloured point cloud as binary PLY.

    Args:
        path: A PLY file.
        points_m: [N, 3], x, y, z in metres.
        colors: uint8 RGB [N, 3].

    Raises:
        InputError: The folder cannot be written.
    """
    vertex = np.dtype([("place", "<f4", 3), ("color", "u1", 3)])
    vertices = np.empty(len(points_m), vertex)
    vertices["place"], vertices["color"] = points_m, colors
    properties = [*(f"float {axis}" for axis in "xyz"), *(f"uchar {channel}" for channel in ("red", "green", "blue"))]
    header = ["ply", "format binary_little_endian 1.0", f"element vertex {len(vertices)}"]
    lines = [*header, *(f"property {name}" for name in properties), "end_header", ""]
    write_bytes(path, "\n".join(lines).encode("ascii") + vertices.tobytes())


def _write_16_bit_png(path: str | Path, values: NDArray[np.uint16]) -> None:
    written, content = cv2.imencode(".png", values)
    if not written:
        raise InputError(f"{path}: this map could not be encoded as PNG")
    write_bytes(path, content.tobytes())
