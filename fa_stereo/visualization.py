"""Pictures of disparity, error and attention, and sheets of pictures with titles. Everything is uint8 RGB [H, W, 3].

Nothing here knows anything of networks: what is drawn comes as arrays.
"""

from __future__ import annotations

import base64
import io
import json
import math
from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

Picture = NDArray[np.uint8]
Panel = tuple[str, Picture]

# KITTI's error colours: (smallest error, colour). An error of 3 is where D1 begins: blue counts as right, red as wrong.
ERROR_COLORS: tuple[tuple[float, tuple[int, int, int]], ...] = (
    (0.0, (49, 54, 149)),
    (0.1875, (69, 117, 180)),
    (0.375, (116, 173, 209)),
    (0.75, (171, 217, 233)),
    (1.5, (224, 243, 248)),
    (3.0, (254, 224, 144)),
    (6.0, (253, 174, 97)),
    (12.0, (244, 109, 67)),
    (24.0, (215, 48, 39)),
    (48.0, (165, 0, 38)),
)

# Attention weights are drawn on a logarithmic scale of so many powers of ten below the largest.
WEIGHT_DECADES = 3
POSITIVE_COLOR, NEGATIVE_COLOR = (255, 60, 30), (40, 120, 255)

_BACKGROUND = (255, 255, 255)
_INK = (30, 30, 30)
_GAP_PX = 12


def disparity_range(disparity: NDArray[np.floating]) -> float:
    """Return the disparity that ``colorize_disparity`` gives its last colour by default, at least 1 px.

    It is the 99.5th percentile of the finite values: a few outliers do not darken the rest.
    """
    finite = disparity[np.isfinite(disparity)]
    return max(1.0, float(np.percentile(finite, 99.5))) if finite.size else 1.0


def colorize_disparity(disparity: NDArray[np.floating], maximum: float | None = None) -> Picture:
    """Colour a disparity map: far is dark blue, near is red (the "turbo" map), no value is black.

    Args:
        disparity: In pixels, [H, W]; inf and NaN are pixels without a value.
        maximum: Disparity of the last colour; larger ones get it too. None takes ``disparity_range``.

    Returns:
        uint8 RGB [H, W, 3], linear from 0 px to ``maximum``.

    Raises:
        ValueError: The maximum is not positive.

    Examples:
        >>> picture = colorize_disparity(np.array([[0.0, 64.0, np.inf]]), maximum=64)
        >>> picture[0, 2].tolist()
        [0, 0, 0]
    """
    top = disparity_range(disparity) if maximum is None else maximum
    if not 0 < top < math.inf:
        raise ValueError(f"the disparity of the last colour must be a positive number of pixels, got {top}")
    finite = np.isfinite(disparity)
    level = np.clip(np.where(finite, disparity, 0) * (255 / top), 0, 255).round().astype(np.uint8)
    picture: Picture = cv2.applyColorMap(level, cv2.COLORMAP_TURBO)[..., ::-1].copy()  # OpenCV's order is BGR
    picture[~finite] = 0
    return picture


def colorize_error(
    prediction: NDArray[np.floating], target: NDArray[np.floating], valid: NDArray[np.bool_] | None = None
) -> Picture:
    """Colour the disparity error logarithmically, as the KITTI 2015 benchmark does.

    The coloured quantity is ``min(|e|, 60 |e| / d)`` in pixels: the error, eased where it is small in relation to the
    disparity, so that 3 is exactly the limit of D1 (3 px and 5 %).

    Args:
        prediction: In pixels, [H, W].
        target: Ground truth in pixels, [H, W]; inf is none.
        valid: Pixels to draw; None draws all with finite ground truth. The others are black.

    Returns:
        uint8 RGB [H, W, 3] in the colours of ``ERROR_COLORS``.
    """
    drawn = np.isfinite(target) if valid is None else valid & np.isfinite(target)
    truth = np.where(drawn, target, 1.0)
    error = np.abs(np.where(drawn, prediction, 1.0) - truth)
    eased = np.minimum(error, 60 * error / np.maximum(truth, 1e-6))
    eased = np.nan_to_num(eased, nan=np.inf)  # no prediction is as wrong as can be
    limits = np.array([limit for limit, _ in ERROR_COLORS[1:]])
    palette = np.array([color for _, color in ERROR_COLORS], np.uint8)
    picture: Picture = palette[np.digitize(eased, limits)]
    picture[~drawn] = 0
    return picture


def disparity_legend(maximum: float, width: int = 480) -> Picture:
    """Draw the colours of ``colorize_disparity`` as a labelled bar from 0 px to ``maximum``."""
    height = max(10, width // 24)
    ramp = np.broadcast_to(np.linspace(0, maximum, width, dtype=np.float32), (height, width))
    digits = 0 if maximum >= 40 else 1
    shares = (0, 0.25, 0.5, 0.75, 1)
    labels = [(share * width, f"{share * maximum:.{digits}f}" + (" px" if share == 1 else "")) for share in shares]
    return _labelled_bar(colorize_disparity(ramp, maximum), labels)


def error_legend(width: int = 480) -> Picture:
    """Draw the colours of ``colorize_error`` as a bar, with the error in pixels at which each one begins."""
    edges = np.linspace(0, width, len(ERROR_COLORS) + 1).round().astype(int)
    bar = np.zeros((max(10, width // 24), width, 3), np.uint8)
    for (_, color), begin, end in zip(ERROR_COLORS, edges, edges[1:], strict=False):
        bar[:, begin:end] = color
    labels = [(float(edge), f"{limit:.2g}") for (limit, _), edge in zip(ERROR_COLORS, edges, strict=False)]
    return _labelled_bar(bar, [*labels, (float(width), "px")])


def overlay_weights(
    picture: Picture, weights: NDArray[np.floating], pixel: tuple[float, float] | None = None
) -> Picture:
    """Lay attention weights or a basis mask over a picture, which turns grey and dark below them.

    Softmax weights differ by powers of ten: their colours (the "inferno" map) are logarithmic, from a thousandth of the
    largest, or from the smallest if that is more, to the largest, which has a ring around it. Weights of which some are
    negative (dot-product attention) are drawn on a linear scale, positive ones red, negative ones blue.

    Args:
        picture: uint8 RGB [H, W, 3].
        weights: [h, w], over the whole picture, which should have no fewer pixels than there are weights.
        pixel: A place (x, y) to mark with a cross, the position whose row is drawn.

    Returns:
        uint8 RGB [H, W, 3].
    """
    height, width = picture.shape[:2]
    level = cv2.resize(_brightness(weights), (width, height), interpolation=cv2.INTER_NEAREST)[..., None]
    color = _glow(np.abs(level[..., 0]))
    if weights.min() < 0:
        color = np.where(level < 0, np.array(NEGATIVE_COLOR, np.uint8), np.array(POSITIVE_COLOR, np.uint8))
    opacity = 0.85 * np.sqrt(np.abs(level))
    blended = _dimmed(picture)[..., None] * (1 - opacity) + color * opacity
    drawn: Picture = blended.round().astype(np.uint8)
    row, column = divmod(int(np.abs(weights).argmax()), weights.shape[1])
    peak = round((column + 0.5) * width / weights.shape[1]), round((row + 0.5) * height / weights.shape[0])
    size = max(5, round(width / 60))
    for thickness, ink in ((3, (0, 0, 0)), (1, (255, 255, 255))):
        cv2.circle(drawn, peak, size, ink, thickness, cv2.LINE_AA)
    if pixel is not None:
        place = round(pixel[0]), round(pixel[1])
        for thickness, ink in ((4, (0, 0, 0)), (2, (80, 255, 80))):
            cv2.drawMarker(drawn, place, ink, cv2.MARKER_CROSS, 2 * size, thickness, cv2.LINE_AA)
    return drawn


def weights_legend(width: int = 480, *, signed: bool = False) -> Picture:
    """Draw the colours of ``overlay_weights`` as a labelled bar, for weights of one sign or of both."""
    height = max(10, width // 24)
    if signed:
        ramp = np.linspace(-1, 1, width)[:, None]
        color = np.where(ramp < 0, NEGATIVE_COLOR, POSITIVE_COLOR) * np.sqrt(np.abs(ramp))
        bar = np.repeat(color[None].round().astype(np.uint8), height, axis=0)
        return _labelled_bar(bar, [(0.0, "-largest"), (width / 2, "0"), (float(width), "largest")])
    ramp = np.broadcast_to(np.linspace(0, 1, width), (height, width))
    low = f"smallest, but at least 1/{10**WEIGHT_DECADES}"
    return _labelled_bar(_glow(ramp), [(0.0, low), (float(width), "largest (ring)")])


def attention_page(
    picture: Picture,
    coefficients: NDArray[np.floating],
    masks: NDArray[np.floating],
    names: Sequence[str],
    title: str,
    top_px: int = 0,
) -> str:
    """Return a web page, in one file, that shows the attention row of the place under the mouse.

    A row of factorized attention is a sum of masks, few enough that a browser composes it while the mouse moves. The
    page holds both factors as bfloat16, which keeps 8 bits of every number.

    Args:
        picture: uint8 RGB [H, W, 3], which the maps lie over.
        coefficients: [n, h, w], C.
        masks: [n, h, w], B. The row of position p is ``sum_n coefficients[n, p] * masks[n]``.
        names: Of the n masks.
        title: Of the page.
        top_px: Rows of the picture that its coordinates do not count.
    """
    encoded = io.BytesIO()
    Image.fromarray(_dimmed(picture)).save(encoded, "PNG")
    values = {
        "title": title,
        "names": list(names),
        "picture": "data:image/png;base64," + base64.b64encode(encoded.getvalue()).decode(),
        "size": [picture.shape[1], picture.shape[0]],
        "top": top_px,
        "map": [masks.shape[2], masks.shape[1]],
        "coefficients": _bfloat16(coefficients),
        "masks": _bfloat16(masks),
        "palette": _glow(np.linspace(0, 1, 256)[None])[0].tolist(),
        "positive": POSITIVE_COLOR,
        "negative": NEGATIVE_COLOR,
        "decades": WEIGHT_DECADES,
    }
    template = (Path(__file__).parent / "attention_page.html").read_text(encoding="utf-8")
    # As it stands, "<" in a name could end the script.
    return template.replace("/*DATA*/", json.dumps(values, separators=(",", ":")).replace("<", "\\u003c"))


def side_by_side(panels: Sequence[Panel], columns: int | None = None, footer: Sequence[Panel] = ()) -> Picture:
    """Put titled pictures beside each other, at their own sizes, on white.

    Args:
        panels: (title, picture) pairs; the pictures may be grey [H, W] or RGB [H, W, 3].
        columns: Pictures in a row; None puts all in one.
        footer: More of them, legends for instance, in a last row that keeps to no columns.

    Returns:
        uint8 RGB picture. A title longer than its picture is set smaller, then cut.
    """
    if not panels:
        raise ValueError("side_by_side needs at least one panel")
    columns = min(columns or len(panels), len(panels))
    widths = [max(picture.shape[1] for _, picture in panels[column::columns]) for column in range(columns)]
    rows = [
        list(zip(panels[first : first + columns], widths, strict=False)) for first in range(0, len(panels), columns)
    ]
    if footer:
        rows.append([(panel, panel[1].shape[1]) for panel in footer])
    size = _title_size(max(widths))
    title_height = round(1.6 * size)
    heights = [title_height + max(picture.shape[0] for (_, picture), _ in row) for row in rows]
    sheet_width = max(sum(width + _GAP_PX for _, width in row) for row in rows) + _GAP_PX
    sheet = Image.new("RGB", (sheet_width, sum(heights) + _GAP_PX * (len(rows) + 1)), _BACKGROUND)
    draw = ImageDraw.Draw(sheet)
    y = _GAP_PX
    for row, height in zip(rows, heights, strict=True):
        x = _GAP_PX
        for (title, picture), width in row:
            text, font = _fit(title, width, size)
            draw.text((x, y + title_height / 2), text, fill=_INK, font=font, anchor="lm")
            sheet.paste(Image.fromarray(_as_rgb(picture)), (x, y + title_height))
            x += width + _GAP_PX
        y += height + _GAP_PX
    return np.array(sheet)


def contact_sheet(panels: Sequence[Panel], columns: int = 4, width_px: int = 320) -> Picture:
    """Put titled pictures of any sizes into a grid of thumbnails.

    Args:
        panels: (title, picture) pairs, row by row.
        columns: Thumbnails in a row.
        width_px: Width of each; the height follows from the picture.
    """
    return side_by_side([(title, resize_to_width(picture, width_px)) for title, picture in panels], columns)


def resize_to_width(picture: Picture, width_px: int, *, sparse: bool = False) -> Picture:
    """Return the picture at another width, keeping its proportions.

    Args:
        picture: uint8 [H, W] or RGB [H, W, 3].
        width_px: The new width.
        sparse: Black pixels are such without a value, as in coloured disparity and error maps: a smaller map shows the
            mean of the others, not a darker one.
    """
    height, width = picture.shape[:2]
    if width == width_px:
        return picture
    interpolation = cv2.INTER_AREA if width_px < width else cv2.INTER_CUBIC
    size = (width_px, max(1, round(height * width_px / width)))
    if not sparse:
        return np.asarray(cv2.resize(picture, size, interpolation=interpolation), np.uint8)
    colors = _as_rgb(picture).astype(np.float32)
    known = np.asarray(colors.any(axis=2), np.float32)
    share = cv2.resize(known, size, interpolation=cv2.INTER_AREA)[..., None]  # [h, w, 1], of pixels with a value
    total = cv2.resize(colors, size, interpolation=cv2.INTER_AREA)
    return np.asarray((total / np.maximum(share, 1e-6)).round(), np.uint8)


def _brightness(weights: NDArray[np.floating]) -> NDArray[np.float32]:
    """Return how bright weights are drawn, from 0 to 1, or from -1 to 1 if some are negative."""
    top = float(np.abs(weights).max())
    if not np.isfinite(top) or top == 0:
        return np.zeros(weights.shape, np.float32)
    if weights.min() < 0:
        return np.asarray(weights / top, np.float32)
    bottom = max(float(weights.min()), top * 10.0**-WEIGHT_DECADES)
    if bottom == top:
        return np.ones(weights.shape, np.float32)
    return np.asarray(np.log(np.maximum(weights, bottom) / bottom) / np.log(top / bottom), np.float32)


def _glow(level: NDArray[np.floating]) -> Picture:
    """Return the colours of levels [H, W] from 0 to 1: "inferno" without its blackest quarter."""
    colored = cv2.applyColorMap((64 + 191 * level).round().astype(np.uint8), cv2.COLORMAP_INFERNO)
    return np.asarray(colored[..., ::-1], np.uint8)


def _dimmed(picture: Picture) -> Picture:
    """Return a picture as a dark grey one [H, W]."""
    grey = cv2.cvtColor(np.ascontiguousarray(picture), cv2.COLOR_RGB2GRAY)
    return np.asarray(10 + 0.4 * grey, np.uint8)


def _bfloat16(values: NDArray[np.floating]) -> str:
    """Return numbers as bfloat16, the upper half of a float32, little-endian, in base64."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    upper = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype("<u2")  # to the nearest, ties to even
    return base64.b64encode(upper.tobytes()).decode()


def _as_rgb(picture: Picture) -> Picture:
    return np.ascontiguousarray(np.repeat(picture[..., None], 3, axis=2) if picture.ndim == 2 else picture)


def _title_size(width: int) -> int:
    return int(np.clip(width / 22, 12, 40))


def _fit(text: str, width: float, size: int) -> tuple[str, ImageFont.FreeTypeFont | ImageFont.ImageFont]:
    """Return the text and a font with which it is no wider than ``width``: smaller down to 11 px, then cut."""
    font = ImageFont.load_default(size=size)
    while font.getlength(text) > width and size > 11:
        size -= 1
        font = ImageFont.load_default(size=size)
    if font.getlength(text) > width:
        while text and font.getlength(text + "...") > width:
            text = text[:-1]
        text += "..."
    return text, font


def _labelled_bar(bar: Picture, labels: Sequence[tuple[float, str]]) -> Picture:
    """Draw labels below a colour bar, each centred at its x but kept inside."""
    height, width = bar.shape[:2]
    size = int(np.clip(width / 32, 11, 24))
    font = ImageFont.load_default(size=size)
    picture = Image.new("RGB", (width, height + round(1.5 * size)), _BACKGROUND)
    picture.paste(Image.fromarray(bar), (0, 0))
    draw = ImageDraw.Draw(picture)
    for x, text in labels:
        half = font.getlength(text) / 2
        draw.text((min(max(x, half), width - half), height + 0.2 * size), text, fill=_INK, font=font, anchor="ma")
    return np.array(picture)
