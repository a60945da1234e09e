"""Random tileable texture maps with the statistics of natural pictures, for the renderer.

A map is uint8 [size, size, 4]: RGB, and a fine luminance grain of its own in the fourth channel. Maps are periodic in
both directions, and shapes look at them through random scales, rotations, offsets and colour changes, so a handful of
maps dress a whole scene. Textures carry no ground truth, so OpenCV may draw here.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import cv2
import numpy as np
from numpy.typing import NDArray

Field = NDArray[np.float32]
Color = NDArray[np.float32]


def random_map(
    rng: np.random.Generator, size: int, *, weak: float, repetition: float, glyphs: float, natural: float = 1.0
) -> NDArray[np.uint8]:
    """Draw one texture map.

    Args:
        rng: Source of all randomness.
        size: Side in pixels, a power of two.
        weak: Probability of a nearly constant map.
        repetition: Probability of stripes, checkers, bricks and the like.
        glyphs: Probability of text-like marks.
        natural: Of the other maps, the share with the statistics of natural pictures; the rest is white noise.

    Returns:
        Periodic uint8 map [size, size, 4].
    """
    kind = rng.random()
    if kind < weak:
        picture = _weak(rng, size)
    elif kind < weak + repetition:
        picture = _PATTERNS[rng.integers(len(_PATTERNS))](rng, size)
    elif kind < weak + repetition + glyphs:
        picture = _glyphs(rng, size)
    elif natural < 1 and rng.random() >= natural:
        picture = rng.random((size, size, 3), dtype=np.float32)
    else:
        picture = _natural(rng, size)
    grain = 0.5 + 0.2 * _fine_noise(rng, size, rng.uniform(0.4, 1.3))
    stacked = np.concatenate([picture, grain[..., None]], axis=-1)  # [size, size, 4]
    return np.clip(stacked * 255 + 0.5, 0, 255).astype(np.uint8)


def spectral_noise(
    rng: np.random.Generator, channels: int, size: int, exponent: float, anisotropy: float = 1.0
) -> Field:
    """Return periodic noise [channels, size, size] of mean 0 and deviation 1 with amplitude ~ 1/f^exponent.

    ``anisotropy`` is the ratio of the correlation lengths along a random direction and across it.
    """
    fy = np.fft.fftfreq(size).astype(np.float32)[:, None] * size
    fx = np.fft.rfftfreq(size).astype(np.float32)[None, :] * size
    angle = rng.uniform(0, np.pi)
    along = (np.cos(angle) * fx + np.sin(angle) * fy) * anisotropy
    across = np.cos(angle) * fy - np.sin(angle) * fx
    power = along * along + across * across
    power[0, 0] = np.inf
    envelope = np.exp(np.log(power) * np.float32(-exponent / 2))
    noise = rng.standard_normal((channels, *power.shape, 2), dtype=np.float32).view(np.complex64)[..., 0]
    field = np.fft.irfft2(noise * envelope, s=(size, size))
    deviation = field.std(axis=(1, 2), keepdims=True)
    return np.asarray(field / np.maximum(deviation, 1e-9), dtype=np.float32)


def _fine_noise(rng: np.random.Generator, size: int, exponent: float) -> Field:
    """Return detail noise [size, size], which may repeat sooner than the map: other layers differ there."""
    tile = min(size, 256)
    return np.tile(spectral_noise(rng, 1, tile, exponent)[0], (size // tile, size // tile))


def random_color(rng: np.random.Generator) -> Color:
    """Return an RGB colour in [0, 1]: any lightness, mostly weak saturation as in natural scenes."""
    lightness = rng.beta(1.3, 1.3)
    saturation = min(1.0, abs(rng.normal(0, 0.25))) if rng.random() < 0.8 else rng.uniform(0.3, 1.0)
    hue = rng.normal(0, 1, 3)
    hue -= hue.mean()
    hue /= np.abs(hue).max() + 1e-6
    return np.clip(lightness * (1 + saturation * hue), 0.02, 0.98).astype(np.float32)


def _palette(rng: np.random.Generator, count: int) -> Field:
    """Return related colours [count, 3]: a base hue with varied lightness, or free colours."""
    if rng.random() < 0.4:
        return np.stack([random_color(rng) for _ in range(count)])
    base = random_color(rng)
    lightness = np.exp(rng.normal(0, rng.uniform(0.15, 0.8), (count, 1)))
    tint = rng.normal(0, rng.uniform(0.01, 0.12), (count, 3))
    return np.clip(base * lightness + tint, 0.02, 0.98).astype(np.float32)


def _ramp(rng: np.random.Generator, field: Field, *, smooth: bool = True) -> Field:
    """Color a scalar field in [0, 1] by a random palette; returns [size, size, 3]."""
    count = int(rng.integers(2, 7))
    colors = _palette(rng, count)
    knots = np.linspace(0, 1, 256)
    table = np.stack([np.interp(knots, np.linspace(0, 1, count), colors[:, c]) for c in range(3)], axis=-1)
    if not smooth:
        table = colors[np.minimum((knots * count).astype(int), count - 1)]
    return table.astype(np.float32)[np.clip(field * 255, 0, 255).astype(np.uint8)]


def _natural(rng: np.random.Generator, size: int) -> Field:
    """Draw one material, a third of the time mixed with another, with fine detail; [size, size, 3]."""
    first = _NATURAL[rng.integers(len(_NATURAL))](rng, size)
    if rng.random() < 0.3:  # a mixture: two materials in patches, or one seen through the other
        second = _NATURAL[rng.integers(len(_NATURAL))](rng, size)
        mask = 0.5 + rng.uniform(0.3, 6.0) * spectral_noise(rng, 1, size, rng.uniform(1.2, 2.2))[0]
        mask = np.clip(mask, 0, 1)[..., None]
        first = first * mask + second * (1 - mask)
    if rng.random() < 0.6:  # fine detail over whatever there is
        first = first * (1 + rng.uniform(0.02, 0.2) * _fine_noise(rng, size, rng.uniform(0.3, 1.2))[..., None])
    return first.astype(np.float32)


def _cloud(rng: np.random.Generator, size: int) -> Field:
    """1/f noise with a random colour covariance, the first order of natural statistics."""
    stretch = 1.0 if rng.random() < 0.6 else float(np.exp(rng.uniform(0, 2.0)))
    noise = spectral_noise(rng, 3, size, rng.uniform(0.7, 1.7), stretch)
    chroma = rng.normal(0, 1, (3, 3)) * rng.uniform(0.0, 0.35)
    chroma[:, 0] = 1 + 0.3 * chroma[:, 0]  # luminance is shared by the channels
    field = np.einsum("kc,cyx->yxk", chroma.astype(np.float32), noise)
    contrast = rng.uniform(0.08, 0.28)
    return np.asarray(random_color(rng) + contrast * np.tanh(field * 0.7) / 0.7, dtype=np.float32)


def _leaves(rng: np.random.Generator, size: int) -> Field:
    """Dead leaves: opaque shapes with a power law of sizes (Lee, Mumford, Huang 2001; exponent 3)."""
    largest = size * rng.uniform(0.08, 0.45)
    smallest = rng.uniform(1.5, 5.0)
    count = int(rng.integers(250, 700))
    uniform = rng.random(count)
    # inverse of the cumulative distribution of p(r) ~ r^-3 between smallest and largest
    radii = 1 / np.sqrt(uniform / largest**2 + (1 - uniform) / smallest**2)
    if rng.random() < 0.5:
        radii[: count // 6] = rng.uniform(0.25, 1.0, count // 6) * largest
    colors = _palette(rng, int(rng.integers(3, 16)))
    paints = colors[rng.integers(len(colors), size=count)] + rng.normal(0, rng.uniform(0.0, 0.08), (count, 3))
    kind = int(rng.integers(4))  # ellipses, rectangles, triangles to hexagons, all
    kinds = rng.integers(3, size=count) if kind == 3 else np.full(count, kind)
    outlines = _leaf_outlines(rng, kinds) * radii[:, None, None]  # [count, CORNERS, 2]
    shaded = rng.random() < 0.3
    canvas = _canvas(np.broadcast_to(colors[0], (size, size, 3)))
    for outline, radius, paint, center in zip(
        outlines, radii.tolist(), np.clip(paints * 255, 0, 255), rng.uniform(0, size, (count, 2)).tolist(), strict=True
    ):
        passes = [(1.0, paint * 0.6), (0.8, paint)] if shaded and radius > 3 else [(1.0, paint)]
        for u in _wrapped(center[0], radius, size):
            for v in _wrapped(center[1], radius, size):
                for scale, color in passes:
                    points = (outline * (16 * scale) + (16 * (u + MARGIN), 16 * (v + MARGIN))).astype(np.int32)
                    cv2.fillPoly(canvas, [points], color.tolist(), cv2.LINE_AA, 4)
    picture = _unit(canvas)
    if rng.random() < 0.5:
        picture = _soften(picture, rng.uniform(0.4, 1.2))
    return picture


MARGIN = 4  # of a canvas, px
CORNERS = 16  # of a leaf's outline; repeated points make it one with fewer


def _leaf_outlines(rng: np.random.Generator, kinds: NDArray[np.integer]) -> NDArray[np.float64]:
    """Return squeezed, turned outlines [n, CORNERS, 2] of radius 1 for ellipses (0), rectangles (1), polygons (2)."""
    count = len(kinds)
    corners = np.where(kinds == 0, CORNERS, np.where(kinds == 1, 4, rng.integers(3, 7, count)))[:, None]
    step = np.minimum(np.arange(CORNERS), corners - 1)  # [n, CORNERS]
    irregular = rng.uniform(-0.4, 0.4, (count, CORNERS)) * (kinds == 2)[:, None]
    irregular = np.take_along_axis(irregular, step, axis=1)
    angles = (step + irregular) * (2 * np.pi / corners) + rng.uniform(0, 2 * np.pi, (count, 1))
    along, across = np.cos(angles), np.sin(angles) * rng.uniform(0.3, 1.0, (count, 1))
    turn = rng.uniform(0, np.pi, (count, 1))
    return np.stack([along * np.cos(turn) - across * np.sin(turn), along * np.sin(turn) + across * np.cos(turn)], -1)


def _wrapped(center: float, radius: float, size: int) -> list[float]:
    """Return where a shape must be drawn along one axis so that the picture is periodic."""
    first, last = math.ceil((-radius - center) / size), math.floor((size + radius - center) / size)
    return [center + size * period for period in range(first, last + 1)]


def _marble(rng: np.random.Generator, size: int) -> Field:
    """Veins, contour lines, camouflage: a nonlinear function of smooth noise."""
    field = spectral_noise(rng, 1, size, rng.uniform(1.2, 2.2), float(np.exp(rng.uniform(0, 1.5))))[0]
    kind = rng.integers(3)
    if kind == 0:
        return _ramp(rng, 0.5 + 0.5 * np.sin(field * rng.uniform(2, 9)))
    if kind == 1:
        return _ramp(rng, np.abs(field) * rng.uniform(0.5, 1.5))
    return _soften(_ramp(rng, 0.5 + 0.25 * field, smooth=False), rng.uniform(0.4, 1.0))


def _scratches(rng: np.random.Generator, size: int) -> Field:
    """Many fine lines, straight or curling, on a cloudy ground: grass, fibres, drawings, cables."""
    canvas = _canvas(_cloud(rng, size))
    colors = _palette(rng, 5) * 255
    direction, spread = rng.uniform(0, 2 * np.pi), rng.uniform(0.05, 3.2)
    longest = rng.uniform(0.05, 0.5) * size
    curl = rng.choice([0.0, 0.3, 1.0])
    for _ in range(int(rng.integers(40, 350))):
        steps = 6
        headings = direction + rng.normal(0, spread) + np.cumsum(rng.normal(0, curl, steps))
        length = longest * rng.uniform(0.2, 1.0) / steps
        path = np.cumsum(np.stack([np.cos(headings), np.sin(headings)], -1) * length, axis=0) + rng.uniform(0, size, 2)
        color = tuple(float(v) for v in colors[rng.integers(5)])
        thickness = 1 if rng.random() < 0.8 else int(rng.integers(2, 4))
        low, high = path.min(axis=0), path.max(axis=0)
        middle, reach = (low + high) / 2, (high - low) / 2 + thickness
        for u in _wrapped(middle[0], reach[0], size):
            for v in _wrapped(middle[1], reach[1], size):
                points = np.round((path - middle + (u, v) + MARGIN) * 16).astype(np.int32)
                cv2.polylines(canvas, [points], False, color, thickness, cv2.LINE_AA, 4)
    return _unit(canvas)


def _weak(rng: np.random.Generator, size: int) -> Field:
    """A painted wall: one colour, a soft gradient, hardly any detail."""
    field = spectral_noise(rng, 1, size, rng.uniform(1.5, 2.5))[0]
    grain = _fine_noise(rng, size, rng.uniform(0.0, 0.8))
    shade = 1 + rng.uniform(0.0, 0.12) * field + rng.uniform(0.0, 0.025) * grain
    return np.asarray(random_color(rng) * shade[..., None], dtype=np.float32)


def _grid_coordinates(rng: np.random.Generator, size: int) -> tuple[Field, Field, int, int]:
    """Return periodic cell coordinates (columns, rows) [size, size] and the number of cells each way."""
    columns, rows = int(rng.integers(3, 28)), int(rng.integers(3, 28))
    if rng.random() < 0.5:
        rows = columns
    axis = (np.arange(size, dtype=np.float32) + 0.5) / size
    return (
        np.broadcast_to(axis * columns, (size, size)),
        np.broadcast_to(axis[:, None] * rows, (size, size)),
        columns,
        rows,
    )


def _weathered(rng: np.random.Generator, picture: Field) -> Field:
    """Lay grime of random strength over a regular pattern, which real repetition always has."""
    size = len(picture)
    grime = spectral_noise(rng, 1, size, rng.uniform(0.8, 1.6))[0][..., None]
    picture = picture * (1 + rng.uniform(0.0, 0.2) * grime)
    return _soften(picture, rng.uniform(0.5, 1.0))


def _stripes(rng: np.random.Generator, size: int) -> Field:
    """Soft or sharp stripes, straight or wavy, along the map or across its tiles."""
    x, y, _, rows = _grid_coordinates(rng, size)
    phase = x + (y * int(rng.integers(0, 3)) / rows)  # whole periods both ways keep the map tileable
    wobble = rng.uniform(0, 0.3) * spectral_noise(rng, 1, size, 1.8)[0] if rng.random() < 0.5 else 0
    wave = np.sin(2 * np.pi * (phase + wobble)) * rng.choice([0.5, 2.0, 8.0])
    return _weathered(rng, _ramp(rng, np.asarray(0.5 + 0.5 * np.clip(wave, -1, 1), np.float32)))


def _checkers(rng: np.random.Generator, size: int) -> Field:
    """A checkerboard, or cells of a few colours at random."""
    x, y, columns, rows = _grid_coordinates(rng, size)
    column, row = x.astype(int), y.astype(int)
    colors = _palette(rng, int(rng.integers(2, 6)))
    if rng.random() < 0.5 and columns % 2 == 0 and rows % 2 == 0:
        choice = (column + row) % 2
    else:
        choice = rng.integers(len(colors), size=(rows, columns))[row, column]
    return _weathered(rng, colors[choice])


def _tiles(rng: np.random.Generator, size: int) -> Field:
    """Bricks, planks, tiles, windows: cells with joints, each cell of a slightly different colour."""
    x, y, columns, rows = _grid_coordinates(rng, size)
    if rng.random() < 0.5 and rows % 2 == 0:
        x = np.asarray(x + 0.5 * (y.astype(int) % 2), dtype=np.float32)
    column, row = x.astype(int) % columns, y.astype(int)
    colors = _palette(rng, 6)
    cell = rng.integers(5, size=(rows, columns))[row, column]
    shade = np.exp(rng.normal(0, rng.uniform(0.02, 0.3), (rows, columns)))[row, column]
    joint = rng.uniform(0.04, 0.3)
    inside = (np.abs(x % 1 - 0.5) < 0.5 - joint / 2) & (np.abs(y % 1 - 0.5) < 0.5 - joint / 2)
    tile = colors[cell if rng.random() < 0.5 else 0] * shade[..., None]
    return _weathered(rng, np.where(inside[..., None], tile, colors[5]).astype(np.float32))


def _dots(rng: np.random.Generator, size: int) -> Field:
    """A grid of dots."""
    x, y, _, _ = _grid_coordinates(rng, size)
    distance = np.hypot(x % 1 - 0.5, y % 1 - 0.5)
    soft = np.clip((rng.uniform(0.15, 0.48) - distance) * 12, 0, 1).astype(np.float32)
    return _weathered(rng, _ramp(rng, soft))


def _weave(rng: np.random.Generator, size: int) -> Field:
    """Cloth: over- and undergoing threads."""
    x, y, _, _ = _grid_coordinates(rng, size)
    count = int(rng.integers(1, 4))
    over = np.sin(2 * np.pi * x * count) * np.sin(2 * np.pi * y * count)
    return _weathered(rng, _ramp(rng, np.asarray(0.5 + 0.5 * over, np.float32)))


def _glyphs(rng: np.random.Generator, size: int) -> Field:
    """Lines of letters and digits, as on posters, signs, books and boxes."""
    ground = _cloud(rng, size) if rng.random() < 0.5 else _weak(rng, size)
    canvas = _canvas(ground)
    y = 0.0
    while y < size:
        scale = float(np.exp(rng.uniform(np.log(0.35), np.log(3.0))))
        font = int(rng.integers(8))
        color = tuple(float(v) for v in random_color(rng) * 255)
        thickness = int(rng.integers(1, 2 + int(2 * scale)))
        lines = int(rng.integers(1, 5))
        for _ in range(lines):
            y += 30 * scale
            if y > size - 6 * scale:
                break
            x = rng.uniform(-40, 0.4 * size)
            text = "".join(chr(c) for c in rng.integers(33, 123, int(rng.integers(2, 4 + int(20 / scale)))))
            text = text[: max(1, int(len(text) * size / cv2.getTextSize(text, font, scale, thickness)[0][0]))]
            (length, above), below = cv2.getTextSize(text, font, scale, thickness)
            for u in _wrapped(int(x) + length / 2, length / 2 + thickness, size):
                for v in _wrapped(int(y) + (below - above) / 2, (above + below) / 2 + thickness, size):
                    origin = round(u - length / 2) + MARGIN, round(v - (below - above) / 2) + MARGIN
                    cv2.putText(canvas, text, origin, font, scale, color, thickness, cv2.LINE_AA)
        if rng.random() < 0.3:
            corner = rng.integers(0, size, 2)
            sides = rng.integers(8, size // 2, 2)
            border = -1 if rng.random() < 0.6 else 2
            for u in _wrapped(float(corner[0] + sides[0] / 2), sides[0] / 2 + 2, size):
                for v in _wrapped(float(corner[1] + sides[1] / 2), sides[1] / 2 + 2, size):
                    near = np.rint((u, v) - sides / 2).astype(int) + MARGIN
                    cv2.rectangle(canvas, near.tolist(), (near + sides).tolist(), color, border)
        y += 10 * scale
    turned = np.rot90(_unit(canvas), int(rng.integers(4)))
    return _soften(turned, rng.uniform(0.3, 0.7))


def _canvas(picture: Field) -> NDArray[np.uint8]:
    """Return a copy to draw on, with a margin around it, as OpenCV draws smooth lines less well at its borders."""
    canvas = np.clip(picture * 255, 0, 255).astype(np.uint8)
    return np.asarray(cv2.copyMakeBorder(canvas, MARGIN, MARGIN, MARGIN, MARGIN, cv2.BORDER_WRAP), np.uint8)


def _unit(canvas: NDArray[np.uint8]) -> Field:
    """Return what was drawn on a canvas, in [0, 1], without the margin."""
    return np.asarray(canvas[MARGIN:-MARGIN, MARGIN:-MARGIN] / np.float32(255), dtype=np.float32)


def _soften(picture: Field, sigma: float) -> Field:
    """Blur a periodic picture."""
    reach = math.ceil(4 * sigma) + 1  # beyond OpenCV's kernel
    padded = cv2.copyMakeBorder(picture, reach, reach, reach, reach, cv2.BORDER_WRAP)
    blurred = cv2.GaussianBlur(padded, (0, 0), sigma)
    return np.asarray(blurred[reach:-reach, reach:-reach], dtype=np.float32)


_Kind = Callable[[np.random.Generator, int], Field]
_NATURAL: tuple[_Kind, ...] = (_cloud, _cloud, _leaves, _leaves, _leaves, _marble, _scratches)
_PATTERNS: tuple[_Kind, ...] = (_stripes, _checkers, _tiles, _tiles, _dots, _weave)
