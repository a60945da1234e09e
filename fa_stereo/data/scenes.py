"""Random layered scenes: what there is to see, as analytic functions of the left picture's coordinates.

A scene is a list of shapes. Each has a silhouette (which points (u, v) of the left picture it covers), a disparity
surface d(u, v) and an appearance. The right view sees the point (u, v) at x = u - d(u, v), so both views, and their
ground truth, follow from the same functions without any resampling. Where shapes overlap the nearest wins, per sample.

Convention: pixel (row i, column j) is centred at (u, v) = (j, i). Silhouettes and surfaces work on tensors of any
device and of any shapes that broadcast.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fa_stereo.config import RenderConfig
from fa_stereo.data.textures import random_map

Points = NDArray[np.float64]

# --------------------------------------------------------------------------------------------------------------------
# disparity surfaces

STEEPEST = 0.6  # largest |dd/du|: below 1 every point of a surface is seen once by each view


@dataclass(frozen=True)
class Surface:
    """d = value + slope . p + p' curve p + ripple sin(wave . p + phase), where p = (u, v) - center.

    Attributes:
        value: Disparity at the centre, px.
        center: (u, v) of the centre, px.
        slope: First derivatives of the quadratic at the centre.
        curve: Coefficients of pu^2, pu pv, pv^2.
        ripple: Amplitude of the sine, px.
        wave: Angular frequencies of the sine along u and v, rad/px.
        phase: Phase of the sine.
    """

    value: float
    center: tuple[float, float] = (0.0, 0.0)
    slope: tuple[float, float] = (0.0, 0.0)
    curve: tuple[float, float, float] = (0.0, 0.0, 0.0)
    ripple: float = 0.0
    wave: tuple[float, float] = (0.0, 0.0)
    phase: float = 0.0

    def disparity(self, u: Tensor, v: Tensor) -> Tensor:
        """Return d at points of the left picture."""
        offset, linear = self._along_row(v)
        pu = u - self.center[0]
        quadratic = pu * (self.curve[0] * pu + linear) + offset
        if self.ripple == 0:
            return quadratic
        return quadratic + self.ripple * torch.sin(self._phase_at(u, v))

    def disparity_from_right(self, x: Tensor, v: Tensor) -> Tensor:
        """Return d of the point that the right view sees at (x, v): the solution of u - d(u, v) = x, with d = u - x.

        Along a row the quadratic part is d = offset + linear pu + c pu^2, so c pu^2 - (1 - linear) pu + x - center +
        offset = 0: solved in closed form, in the arrangement that stays exact for c = 0. A ripple is then met by
        Newton's method, which converges because |dd/du| <= STEEPEST < 1.
        """
        offset, linear = self._along_row(v)
        gain = 1 - linear
        target = (x - self.center[0]) + offset
        c = self.curve[0]
        if c == 0:
            pu = target / gain
        else:
            pu = 2 * target / (gain + torch.sqrt((gain * gain - 4 * c * target).clamp_min(0)))
        if self.ripple == 0:
            return pu * (c * pu + linear) + offset
        for _ in range(5):
            angle = self._phase_at(pu + self.center[0], v)
            residual = pu - pu * (c * pu + linear) - self.ripple * torch.sin(angle) - target
            derivative = gain - 2 * c * pu - self.ripple * self.wave[0] * torch.cos(angle)
            pu = pu - residual / derivative.clamp_min(1 - STEEPEST)
        return pu + (self.center[0] - x)

    def bounds(self, half_width: float, half_height: float) -> tuple[float, float]:
        """Return bounds on d within the rectangle of these half sides about the centre."""
        variation = self._variation(half_width, half_height)
        return self.value - variation, self.value + variation

    def fitted(self, half_width: float, half_height: float, largest: float) -> Surface:
        """Return this surface flattened so far that it stays from 0 to ``largest`` and each view sees it once."""
        value = min(max(self.value, 0.0), largest)
        room = min(value, largest - value)
        steepness = (
            abs(self.slope[0])
            + 2 * abs(self.curve[0]) * half_width
            + abs(self.curve[1]) * half_height
            + abs(self.ripple * self.wave[0])
        )
        variation = self._variation(half_width, half_height)
        factor = min(1.0, room / max(variation, 1e-9), STEEPEST / max(steepness, 1e-9))
        return Surface(
            value,
            self.center,
            (self.slope[0] * factor, self.slope[1] * factor),
            (self.curve[0] * factor, self.curve[1] * factor, self.curve[2] * factor),
            self.ripple * factor,
            self.wave,
            self.phase,
        )

    def _along_row(self, v: Tensor) -> tuple[Tensor | float, Tensor | float]:
        """Coefficients (offset, linear) of the quadratic part as a function of pu in the row at v."""
        if self.slope[1] == 0 and self.curve[1] == 0 and self.curve[2] == 0:
            return self.value, self.slope[0]
        pv = v - self.center[1]
        return self.value + pv * (self.slope[1] + self.curve[2] * pv), self.slope[0] + self.curve[1] * pv

    def _phase_at(self, u: Tensor, v: Tensor) -> Tensor:
        return (u - self.center[0]) * self.wave[0] + ((v - self.center[1]) * self.wave[1] + self.phase)

    def _variation(self, half_width: float, half_height: float) -> float:
        return (
            abs(self.slope[0]) * half_width
            + abs(self.slope[1]) * half_height
            + abs(self.curve[0]) * half_width**2
            + abs(self.curve[1]) * half_width * half_height
            + abs(self.curve[2]) * half_height**2
            + abs(self.ripple)
        )


# --------------------------------------------------------------------------------------------------------------------
# silhouettes


class Silhouette(Protocol):
    """Which points of the left picture belong to a shape."""

    @property
    def extent(self) -> tuple[float, float, float, float]:
        """Return (left, top, right, bottom) of a rectangle around all of it."""

    def contains(self, u: Tensor, v: Tensor) -> Tensor:
        """Return bool, True inside."""


@dataclass(frozen=True)
class Everywhere:
    """No border: walls, grounds and skies."""

    @property
    def extent(self) -> tuple[float, float, float, float]:
        """Infinite."""
        return -math.inf, -math.inf, math.inf, math.inf

    def contains(self, u: Tensor, v: Tensor) -> Tensor:
        """Return True."""
        return torch.ones((), dtype=torch.bool, device=u.device)


@dataclass(frozen=True)
class Polygon:
    """Any simple or self-crossing polygon, by the even-odd rule.

    Attributes:
        vertices: [n, 2] points (u, v), px.
    """

    vertices: Points

    @property
    def extent(self) -> tuple[float, float, float, float]:
        """The vertices' bounding box."""
        low, high = self.vertices.min(axis=0), self.vertices.max(axis=0)
        return float(low[0]), float(low[1]), float(high[0]), float(high[1])

    def contains(self, u: Tensor, v: Tensor) -> Tensor:
        """Count the edges that cross the row to the right of the point."""
        inside: Tensor | None = None
        previous = self.vertices[-1]
        for vertex in self.vertices:
            (u0, v0), (u1, v1) = previous.tolist(), vertex.tolist()
            previous = vertex
            if v0 == v1:
                continue
            crossing = u0 + (v - v0) * ((u1 - u0) / (v1 - v0))
            crossing = torch.where((v >= v0) != (v >= v1), crossing, -math.inf)  # rows the edge does not reach
            left_of_edge = u < crossing
            inside = left_of_edge if inside is None else inside.logical_xor_(left_of_edge)
        return inside if inside is not None else torch.zeros_like(u, dtype=torch.bool)


@dataclass(frozen=True)
class Blob:
    """A star-shaped region with the radius r(phi) = radius (1 + Re sum_k c_k e^(ik phi)) in a squeezed, turned frame.

    Without harmonics it is an ellipse.

    Attributes:
        center: (u, v), px.
        radii: Half axes of the frame, px.
        angle: Direction of the first half axis, rad.
        harmonics: Complex c_1, c_2, ...; the sum of their moduli must stay below 1.
    """

    center: tuple[float, float]
    radii: tuple[float, float]
    angle: float = 0.0
    harmonics: tuple[complex, ...] = ()

    @property
    def extent(self) -> tuple[float, float, float, float]:
        """The box of the ellipse blown up by the harmonics."""
        reach = 1 + sum(map(abs, self.harmonics))
        cosine, sine = math.cos(self.angle), math.sin(self.angle)
        half_width = reach * math.hypot(self.radii[0] * cosine, self.radii[1] * sine)
        half_height = reach * math.hypot(self.radii[0] * sine, self.radii[1] * cosine)
        u, v = self.center
        return u - half_width, v - half_height, u + half_width, v + half_height

    def contains(self, u: Tensor, v: Tensor) -> Tensor:
        """Compare the distance from the centre with the radius in that direction."""
        cosine, sine = math.cos(self.angle), math.sin(self.angle)
        pu, pv = u - self.center[0], v - self.center[1]
        a = pu * (cosine / self.radii[0]) + pv * (sine / self.radii[0])
        b = pv * (cosine / self.radii[1]) - pu * (sine / self.radii[1])
        square = a * a + b * b
        if not self.harmonics:
            return square < 1
        distance = torch.sqrt(square)
        inverse = 1 / distance.clamp_min(1e-6)
        real, imaginary = a * inverse, b * inverse  # e^(i phi)
        power_real, power_imaginary = real, imaginary
        limit: Tensor | float = 1.0
        for order, c in enumerate(self.harmonics):
            if order:
                power_real, power_imaginary = (
                    power_real * real - power_imaginary * imaginary,
                    power_real * imaginary + power_imaginary * real,
                )
            limit = limit + (c.real * power_real - c.imag * power_imaginary)
        return distance < limit


@dataclass(frozen=True)
class Strand:
    """A thin wavy band: wires, cables, branches, handles.

    Attributes:
        center: (u, v), px.
        half_length: Half the length along the chord, px.
        half_width: Half the thickness, px.
        angle: Direction of the chord, rad.
        swing: Amplitude of the wave across the chord, px.
        frequency: Angular frequency of the wave, rad/px.
        phase: Its phase.
    """

    center: tuple[float, float]
    half_length: float
    half_width: float
    angle: float
    swing: float = 0.0
    frequency: float = 0.0
    phase: float = 0.0

    @property
    def extent(self) -> tuple[float, float, float, float]:
        """The turned box around the wave."""
        cosine, sine = abs(math.cos(self.angle)), abs(math.sin(self.angle))
        across = abs(self.swing) + self.half_width * math.hypot(1, self.swing * self.frequency)
        half_width = self.half_length * cosine + across * sine
        half_height = self.half_length * sine + across * cosine
        u, v = self.center
        return u - half_width, v - half_height, u + half_width, v + half_height

    def contains(self, u: Tensor, v: Tensor) -> Tensor:
        """Compare the distance from the wave, to first order, with the thickness."""
        along, across = _in_frame(u, v, self.center, self.angle)
        inside = along.abs() <= self.half_length
        if self.swing == 0:
            return inside & (across.abs() <= self.half_width)
        angle = along * self.frequency + self.phase
        steep = torch.cos(angle) * (self.swing * self.frequency)
        distance = (across - torch.sin(angle) * self.swing).abs()
        return inside & (distance <= self.half_width * torch.sqrt(1 + steep * steep))


@dataclass(frozen=True)
class Bars:
    """Parallel bars in one or both directions: fences, grilles, ladders, blinds. Infinite: to be cut by a silhouette.

    Attributes:
        center: Origin of the frame, px.
        angle: Its direction, rad.
        period: Distance of the bars each way, px; inf leaves a direction without bars.
        share: Thickness over period.
    """

    center: tuple[float, float]
    angle: float
    period: tuple[float, float]
    share: float

    @property
    def extent(self) -> tuple[float, float, float, float]:
        """Infinite."""
        return -math.inf, -math.inf, math.inf, math.inf

    def contains(self, u: Tensor, v: Tensor) -> Tensor:
        """Compare the place within the period with the thickness."""
        inside = torch.zeros((), dtype=torch.bool, device=u.device)
        for place, period in zip(_in_frame(u, v, self.center, self.angle), self.period, strict=True):
            if math.isfinite(period):
                inside = inside | (torch.frac(place / period + 4096.0) < self.share)
        return inside


@dataclass(frozen=True)
class Lace:
    """Irregular holes: where a sum of plane waves stays below a threshold. Leaves, cloth, sponge. Infinite.

    Attributes:
        waves: Rows (frequency along u, along v, phase), rad/px.
        threshold: In units of one wave's amplitude.
    """

    waves: tuple[tuple[float, float, float], ...]
    threshold: float

    @property
    def extent(self) -> tuple[float, float, float, float]:
        """Infinite."""
        return -math.inf, -math.inf, math.inf, math.inf

    def contains(self, u: Tensor, v: Tensor) -> Tensor:
        """Sum the waves."""
        total: Tensor | float = 0.0
        for along_u, along_v, phase in self.waves:
            total = total + torch.sin(u * along_u + (v * along_v + phase))
        assert isinstance(total, Tensor)
        return total < self.threshold


@dataclass(frozen=True)
class Combined:
    """``inside`` and every one of ``also``, but none of ``without``."""

    inside: Silhouette
    also: tuple[Silhouette, ...] = ()
    without: tuple[Silhouette, ...] = ()

    @property
    def extent(self) -> tuple[float, float, float, float]:
        """The box of ``inside``."""
        return self.inside.extent

    def contains(self, u: Tensor, v: Tensor) -> Tensor:
        """Combine the parts."""
        result = self.inside.contains(u, v)
        for part in self.also:
            result = result & part.contains(u, v)
        for part in self.without:
            result = result & ~part.contains(u, v)
        return result


# --------------------------------------------------------------------------------------------------------------------
# scenes


@dataclass(frozen=True)
class Appearance:
    """How a shape looks: a texture map seen in perspective, recoloured, lit.

    With w = d + ``Scene.far_offset``, proportional to inverse depth, a point's texture coordinates in texels are
    (a . (1, u, v) / w + offset) for each of the two rows a of ``axes``: its 3-D position projected on two directions.

    Attributes:
        texture: Index into ``Scene.maps``.
        axes: [2, 3].
        offset: [2].
        color: [3, 4] matrix from the map's RGB and grain (0.5 = neutral) to RGB.
        bias: [3], the colour of a neutral texel.
        light: The factor light . (1, u, v) by which illumination changes over the shape.
        highlight: (u, v, 1 / (2 sigma^2), strength, shift along u in the right view): a glossy spot, which each view
            sees at another place.
        shadows: Waves (amplitude, rad/px along u, along v, phase) that are added to the light; two, or none.
    """

    texture: int
    axes: Points
    offset: Points
    color: Points
    bias: Points
    light: tuple[float, float, float]
    highlight: tuple[float, float, float, float, float]
    shadows: tuple[tuple[float, float, float, float], ...] = ()


@dataclass(frozen=True)
class Shape:
    """One opaque thing of the scene.

    Attributes:
        silhouette: Where it is, in the left picture.
        surface: Its disparity.
        appearance: Its look.
    """

    silhouette: Silhouette
    surface: Surface
    appearance: Appearance


@dataclass
class Scene:
    """Shapes and the maps they wear.

    Attributes:
        height: Of the pictures.
        width: Of the pictures.
        shapes: In no particular order.
        maps: Texture maps, uint8 [size, size, 4] with sizes that are powers of two.
        far_offset: Positive offset between disparity and inverse depth (nothing is infinitely far).
        haze: RGB of distant air and its share in what is seen at d = 0, below 1.
    """

    height: int
    width: int
    shapes: list[Shape] = field(default_factory=list)
    maps: list[NDArray[np.uint8]] = field(default_factory=list)
    far_offset: float = 2.0
    haze: tuple[float, float, float, float] = (0.0, 0.0, 0.0, 0.0)


def random_scene(config: RenderConfig, rng: np.random.Generator) -> Scene:
    """Draw a scene as ``config`` describes."""
    return _SceneBuilder(config, rng).build()


class _SceneBuilder:
    """The random choices that make one scene."""

    def __init__(self, config: RenderConfig, rng: np.random.Generator) -> None:
        self.config = config
        self.rng = rng
        self.difficulty = config.difficulty
        self.scene = Scene(config.height, config.width)
        self.size = float(min(config.height, config.width))
        self.focal = config.width * rng.uniform(0.6, 1.8)
        self.principal = (config.width * rng.uniform(0.4, 0.6), config.height * rng.uniform(0.35, 0.65))
        self.nearest, self.farthest = self._disparity_range()
        self.scene.far_offset = max(1.0, 0.03 * self.nearest)
        self.horizon = config.height * rng.uniform(0.2, 0.6)
        self.ground_slope = 0.0  # disparity per row of the ground below the horizon, 0 without a ground

    def build(self) -> Scene:
        """Return the scene: textures, haze, background, objects."""
        config, rng = self.config, self.rng
        large = 512 if max(config.height, config.width) > 256 else 256
        for i in range(config.texture_maps):  # the first two are large: for backgrounds, whose repetition would show
            self.scene.maps.append(
                random_map(
                    rng, large if i < 2 else 256,
                    weak=config.weak_texture * self.difficulty,
                    repetition=config.repetition * self.difficulty * (0.4 if i < 2 else 1.0),
                    glyphs=config.glyphs,
                    natural=config.natural_texture,
                )
            )  # fmt: skip
        if rng.random() < config.haze * self.difficulty:
            air = rng.uniform(0.5, 0.9)
            tint = rng.normal(0, 0.05, 3)
            self.scene.haze = (air + tint[0], air + tint[1], air + tint[2], rng.uniform(0.1, 0.8))
        self._background()
        low = config.min_shapes
        high = low + (config.max_shapes - low) * (0.3 + 0.7 * self.difficulty)
        for _ in range(round(low * (high / low) ** rng.random())):
            self._object()
        return self.scene

    # ---------------------------------------------------------------------------------------------- disparity, places

    def _disparity_range(self) -> tuple[float, float]:
        """Draw the nearest and the farthest disparity: most scenes within 5 to 80 px, some up to the maximum."""
        rng, largest, wide_share = self.rng, self.config.max_disparity, self.config.wide_range
        usual, wide = min(80.0, largest), min(130.0, largest)
        draw = rng.random()
        if draw < 1 - wide_share:
            nearest = math.exp(rng.uniform(math.log(0.15 * usual), math.log(usual)))
        elif draw < 1 - 0.325 * wide_share:  # all but about a third of the wide ones
            nearest = rng.uniform(0.4 * wide, wide)
        else:
            nearest = rng.uniform(0.6 * largest, largest)
        easy = min(40.0, 0.3 * largest)
        nearest = easy * (nearest / easy) ** self.difficulty if nearest > easy else nearest
        share = rng.choice([0.0, rng.uniform(0.0, 0.2), rng.uniform(0.1, 0.5), rng.uniform(0.3, 0.7)])
        if self.config.enclosed and rng.random() < self.config.enclosed:
            share = rng.uniform(0.15, 0.7)
        return nearest, nearest * share

    def _disparity(self) -> float:
        """Draw an object's disparity: far ones are more frequent, as there is more space far away."""
        spread = self.nearest - self.farthest
        return float(self.farthest + spread * (0.03 + 0.92 * self.rng.random() ** 1.4))

    def _place(self, disparity: float, half_height: float) -> tuple[float, float]:
        """Draw a centre; the right view sees a strip of width d beyond the left picture's right border."""
        rng, config = self.rng, self.config
        u = rng.uniform(-0.1 * config.width, 1.05 * config.width + disparity)
        if self.ground_slope and rng.random() < 0.7:  # standing on the ground
            bottom = self.horizon + disparity / self.ground_slope
            return u, min(bottom, config.height * 1.1) - half_height * 0.9
        return u, rng.uniform(-0.05, 1.05) * config.height

    def _radius(self, disparity: float) -> float:
        """Draw an object's radius in pixels: many small, some large, near ones larger."""
        low, high = ((0.03, 0.15), (0.1, 0.35), (0.25, 0.7))[self.rng.choice(3, p=[0.45, 0.4, 0.15])]
        perspective = 0.6 + 0.6 * disparity / self.nearest
        return perspective * self.size * math.exp(self.rng.uniform(math.log(low), math.log(high)))

    def _normal(self, frontal: float) -> tuple[float, float, float]:
        """Draw a surface normal (nz = 1 is frontal, unnormalised): slants up to 70 degrees."""
        rng = self.rng
        if rng.random() < frontal or self.config.slant == 0:
            return 0.0, 0.0, 1.0
        tangent = min(abs(rng.normal(0, 0.8)), 2.7) * self.config.slant * (0.3 + 0.7 * self.difficulty)
        direction = rng.uniform(0, 2 * np.pi)
        if rng.random() < 0.4:  # upright or lying: walls, shelves, boxes
            direction = rng.choice([0.0, 0.5, 1.0, 1.5]) * np.pi
        return tangent * math.cos(direction), tangent * math.sin(direction), 1.0

    def _plane(self, normal: tuple[float, float, float], center: tuple[float, float], value: float) -> Surface:
        """Return the disparity of the 3-D plane with this normal through the point seen at ``center``.

        n . X = h with X = ((u - cu) / f, (v - cv) / f, 1) Z gives w = d + far_offset ~ 1 / Z affine in (u, v).
        """
        w = value + self.scene.far_offset
        ray = ((center[0] - self.principal[0]) / self.focal, (center[1] - self.principal[1]) / self.focal)
        facing = normal[0] * ray[0] + normal[1] * ray[1] + normal[2]
        facing = math.copysign(max(abs(facing), 0.3), facing)
        scale = w / (self.focal * facing)
        return Surface(value, center, (normal[0] * scale, normal[1] * scale))

    def _surface(self, center: tuple[float, float], value: float, half: tuple[float, float], frontal: float) -> Surface:
        """Draw a plane or a gently curved surface that stays in the scene's range over the shape's extent."""
        rng = self.rng
        surface = self._plane(self._normal(frontal), center, value)
        curve = (0.0, 0.0, 0.0)
        ripple, wave = 0.0, (0.0, 0.0)
        radius = max(half)
        strength = self.config.curvature * self.difficulty
        if radius > 6 and rng.random() < 0.45 * min(1.0, strength):
            bend = (value + self.scene.far_offset) / (self.focal * radius) * rng.uniform(-1.2, 0.8) * strength
            kind = rng.integers(3)  # bowl or ball, upright or lying cylinder, saddle or twist
            if kind == 0:
                curve = (bend, 0.0, bend * rng.uniform(0.5, 1.5))
            elif kind == 1:
                curve = (bend, 0.0, 0.0) if rng.random() < 0.6 else (0.0, 0.0, bend)
            else:
                curve = (bend * rng.uniform(-1, 1), bend * rng.uniform(-1, 1), bend * rng.uniform(-1, 1))
        if radius > 20 and rng.random() < 0.15 * min(1.0, strength):
            length = rng.uniform(0.4, 2.0) * radius
            direction = rng.uniform(0, 2 * np.pi)
            wave = (2 * np.pi / length * math.cos(direction), 2 * np.pi / length * math.sin(direction))
            ripple = rng.uniform(0.02, 0.3) * strength * length * value / self.focal
        bent = Surface(value, center, surface.slope, curve, ripple, wave, rng.uniform(0, 2 * np.pi))
        return bent.fitted(half[0], half[1], self.config.max_disparity - 0.5)

    # ------------------------------------------------------------------------------------------------------ background

    def _background(self) -> None:
        """A wall, alone or with a ground, a ceiling and side walls: as the nearest wins, planes make a room."""
        rng, config = self.rng, self.config
        middle = reach = (config.width + config.max_disparity) / 2, config.height / 2
        draw = rng.random()
        wall = self._surface(middle, max(self.farthest, 1e-3), reach, 0.3 if self.difficulty > 0 else 0.7)
        self._add(Everywhere(), wall)
        if draw < 1 - config.rooms:
            return
        # a ground: w grows linearly from the horizon down; a ceiling likewise upwards
        below = config.height - self.horizon
        lowest = rng.uniform(0.5, 0.95) * self.nearest
        self.ground_slope = lowest / below
        roll = 0.0 if rng.random() < 0.6 else rng.uniform(-0.04, 0.04) * lowest / (config.width + config.max_disparity)
        ground = Surface(0.0, (config.width / 2, self.horizon), (roll, self.ground_slope))
        self._add(Everywhere(), ground, aligned=True)
        if draw < 1 - 5 / 11 * config.rooms:  # the others have walls too
            return
        sides = rng.integers(1, 4)  # left, right, both
        steep = min(STEEPEST, self.nearest / (config.width * rng.uniform(0.35, 0.7)))
        if sides & 1:
            start = config.width * rng.uniform(0.1, 0.5)
            steep_left = min(steep, (config.max_disparity - 1) / start)
            left_wall = Surface(0.0, (start, 0.0), (-steep_left * rng.uniform(0.4, 1.0), 0.0))
            self._add(Everywhere(), left_wall, aligned=True)
        if sides & 2:
            start = config.width * rng.uniform(0.5, 1.0)
            slope = min(steep, (config.max_disparity - 1) / (config.width + config.max_disparity - start))
            right_wall = Surface(0.0, (start, 0.0), (slope * rng.uniform(0.4, 1.0), 0.0))
            self._add(Everywhere(), right_wall, aligned=True)
        if rng.random() < 0.4:
            above = self.horizon * rng.uniform(0.7, 1.0)
            slope = rng.uniform(0.3, 0.9) * self.nearest / max(self.horizon, 1.0)
            self._add(Everywhere(), Surface(0.0, (config.width / 2, above), (0.0, -slope)), aligned=True)

    # --------------------------------------------------------------------------------------------------------- objects

    def _object(self) -> None:
        """Add one object, which may be made of several shapes."""
        rng, config = self.rng, self.config
        draw = rng.random()
        thin = config.thin * self.difficulty
        group = config.groups * (0.3 + 0.7 * self.difficulty)
        if draw < thin:
            self._thin()
        elif draw < thin + group:
            (self._cluster, self._box, self._bush, self._box)[rng.integers(4)]()
        else:
            disparity = self._disparity()
            radius = self._radius(disparity)
            self._solid(self._place(disparity, radius), radius, disparity)

    def _solid(self, center: tuple[float, float], radius: float, disparity: float) -> None:
        """Add a shape of one piece, perhaps with holes."""
        silhouette = self._outline(center, radius)
        left, top, right, bottom = silhouette.extent
        half = max(center[0] - left, right - center[0]), max(center[1] - top, bottom - center[1])
        surface = self._surface(center, disparity, half, 0.35)
        rng = self.rng
        if radius > 10 and rng.random() < self.config.holes * self.difficulty:
            silhouette = self._perforated(silhouette, center, radius)
        self._add(silhouette, surface)

    def _outline(self, center: tuple[float, float], radius: float) -> Silhouette:
        """Draw an ellipse, a blob, a rectangle, a polygon or a star of about this radius in pixels."""
        rng = self.rng
        kind = rng.random()
        squeeze = math.exp(rng.uniform(math.log(0.3), 0))
        angle = rng.uniform(0, np.pi)
        if kind < 0.2:
            return Blob(center, (radius, radius * squeeze), angle)
        if kind < 0.45:
            count = int(rng.integers(3, 8))
            orders = np.arange(1, count + 1)
            amplitude = rng.uniform(0.1, 0.6) * rng.dirichlet(np.ones(count)) / orders**0.3
            turns = np.exp(1j * rng.uniform(0, 2 * np.pi, count))
            harmonics = tuple(complex(c) for c in amplitude * turns)
            return Blob(center, (radius, radius * max(squeeze, 0.5)), angle, harmonics)
        if kind < 0.75:  # rectangles, upright more often than not
            turn = rng.normal(0, 0.03) if rng.random() < 0.6 else angle
            corners = np.array([(-1, -1), (1, -1), (1, 1), (-1, 1)]) * (radius * 0.9, radius * squeeze * 0.9)
            if rng.random() < 0.5:
                corners = corners[:, ::-1]
            if rng.random() < 0.4:  # as seen in perspective
                corners = corners * (1 + rng.uniform(-0.25, 0.25, (4, 1)))
            return Polygon(_rotated(corners, turn) + center)
        count = int(rng.integers(3, 9))
        phi = np.sort(rng.uniform(0, 2 * np.pi, count)) if rng.random() < 0.5 else np.arange(count) * 2 * np.pi / count
        r = radius * (rng.uniform(0.4, 1.0, count) if rng.random() < 0.6 else np.ones(count))
        if rng.random() < 0.15:
            phi = np.arange(2 * count) * np.pi / count  # a star
            r = radius * np.tile([1.0, rng.uniform(0.3, 0.7)], count)
        corners = np.stack([r * np.cos(phi), r * np.sin(phi) * max(squeeze, 0.5)], -1)
        return Polygon(_rotated(corners, angle) + center)

    def _perforated(self, outline: Silhouette, center: tuple[float, float], radius: float) -> Silhouette:
        """Cut holes: a ring or frame, several round holes, bars, or lace."""
        rng = self.rng
        kind = rng.random()
        if kind < 0.4:
            share = rng.uniform(0.4, 0.85)
            if isinstance(outline, Polygon):
                return Combined(outline, without=(Polygon((outline.vertices - center) * share + center),))
            assert isinstance(outline, Blob)
            radii = (outline.radii[0] * share, outline.radii[1] * share)
            return Combined(outline, without=(Blob(center, radii, outline.angle, outline.harmonics),))
        if kind < 0.6:
            holes = []
            for _ in range(int(rng.integers(1, 5))):
                offset = rng.uniform(-0.6, 0.6, 2) * radius
                size = radius * rng.uniform(0.08, 0.35)
                holes.append(Blob((center[0] + offset[0], center[1] + offset[1]), (size, size * rng.uniform(0.5, 1))))
            return Combined(outline, without=tuple(holes))
        if kind < 0.8:
            period = max(5.0, radius * rng.uniform(0.12, 0.6))
            other = period * rng.uniform(0.7, 1.5) if rng.random() < 0.5 else math.inf
            angle = rng.normal(0, 0.05) if rng.random() < 0.6 else rng.uniform(0, np.pi)
            return Combined(outline, also=(Bars(center, angle, (period, other), rng.uniform(0.12, 0.5)),))
        waves = []
        for _ in range(4):
            length = rng.uniform(6, 8 + 0.6 * radius)
            angle = rng.uniform(0, 2 * np.pi)
            waves.append((2 * np.pi / length * math.cos(angle), 2 * np.pi / length * math.sin(angle),
                          rng.uniform(0, 2 * np.pi)))  # fmt: skip
        return Combined(outline, also=(Lace(tuple(waves), rng.uniform(-0.3, 0.9)),))

    def _thin(self) -> None:
        """Sticks, poles, wires, or several of them with one look."""
        rng = self.rng
        appearance: Appearance | None = None
        count = 1 if rng.random() < 0.6 else int(rng.integers(2, 7))
        base = self._disparity()
        angle = rng.choice([0.5 * np.pi, 0.0, rng.uniform(0, np.pi)], p=[0.45, 0.1, 0.45]) + rng.normal(0, 0.04)
        length = self.size * math.exp(rng.uniform(math.log(0.1), math.log(0.7)))
        place = self._place(base, length * abs(math.sin(angle)))
        spread = self.size * rng.uniform(0.05, 0.5)
        for _ in range(count):
            disparity = base if rng.random() < 0.5 else float(np.clip(base * rng.uniform(0.8, 1.25), 0, self.nearest))
            center = (place[0] + rng.normal(0, spread) * (count > 1), place[1] + rng.normal(0, 0.2 * spread))
            tilt = angle + rng.normal(0, 0.25) * (count > 1)
            thickness = math.exp(rng.uniform(math.log(0.4), math.log(max(1.5, 0.02 * self.size))))
            swing, frequency = 0.0, 0.0
            if rng.random() < 0.35:
                frequency = 2 * np.pi / (length * rng.uniform(0.6, 3.0))
                swing = rng.uniform(0.1, 0.8) / frequency
            silhouette = Strand(center, length, thickness, tilt, swing, frequency, rng.uniform(0, 2 * np.pi))
            left, top, right, bottom = silhouette.extent
            half = (right - left) / 2, (bottom - top) / 2
            surface = self._surface(center, disparity, half, 0.5)
            appearance = self._add(silhouette, surface, appearance)

    def _cluster(self) -> None:
        """Similar small things near each other: leaves, books, bottles, stones."""
        rng = self.rng
        base = self._disparity()
        spread = self.size * rng.uniform(0.08, 0.4)
        middle = self._place(base, spread / 2)
        radius = spread * rng.uniform(0.1, 0.35)
        depth = rng.uniform(0, 0.2)
        looks: list[Appearance | None] = [None] * int(rng.integers(1, 4))
        squeeze, kind, angle = rng.uniform(0.25, 1.0), rng.integers(2), rng.uniform(0, np.pi)
        loose = rng.choice([0.0, 0.2, 1.5])
        row = rng.random() < 0.4
        count = int(rng.integers(4, 13))
        for i in range(count):
            shift = rng.normal(0, 1, 2) * spread / 2
            if row:
                shift = np.array([(i - count / 2) * radius * 1.9, rng.normal(0, 0.1) * radius])
            center = (middle[0] + float(shift[0]), middle[1] + float(shift[1]))
            r = radius * math.exp(rng.normal(0, 0.2))
            turn = angle + rng.normal(0, loose) if loose else (0.5 * np.pi if row else angle)
            silhouette: Silhouette
            if kind == 0:
                silhouette = Blob(center, (r, max(1.0, r * squeeze)), turn)
            else:
                corners = np.array([(-1, -1), (1, -1), (1, 1), (-1, 1)]) * (r, max(1.0, r * squeeze))
                silhouette = Polygon(_rotated(corners, turn) + center)
            disparity = float(np.clip(base * (1 + rng.normal(0, depth)), 0.0, self.nearest))
            surface = self._surface(center, disparity, (1.5 * r, 1.5 * r), 0.5)
            which = int(rng.integers(len(looks)))
            looks[which] = self._add(silhouette, surface, looks[which])

    def _bush(self) -> None:
        """A branching plant: tapering twigs, with leaves at their ends."""
        rng = self.rng
        disparity = self._disparity()
        length = self.size * rng.uniform(0.1, 0.3)
        foot = self._place(disparity, 0.0)
        # twigs fork at most three times, by at most 0.9 shorter each: they reach 1 + 0.9 + 0.81 + 0.73 lengths
        surface = self._surface(foot, disparity, (3.5 * length, 3.5 * length), 0.2)
        bark: Appearance | None = None
        leaf: Appearance | None = None
        leafy = rng.random() < 0.7
        tips = [(foot, -0.5 * np.pi + rng.normal(0, 0.2), length, max(1.0, length * rng.uniform(0.02, 0.07)))]
        for _ in range(int(rng.integers(5, 16))):
            start, heading, reach, width = tips.pop(0)
            end = (start[0] + reach * math.cos(heading), start[1] + reach * math.sin(heading))
            side = np.array([-math.sin(heading), math.cos(heading)])
            quad = np.array([start + side * width, start - side * width, end - side * width * 0.7,
                             end + side * width * 0.7])  # fmt: skip
            bark = self._add(Polygon(quad), surface, bark)
            for turn in rng.choice([-1, 1]) * np.array([rng.uniform(0.1, 0.9), -rng.uniform(0.1, 0.9)]):
                tips.append((end, heading + turn, reach * rng.uniform(0.55, 0.9), max(0.5, width * 0.65)))
            if leafy:
                r = length * rng.uniform(0.06, 0.2)
                nearer = float(np.clip(disparity * (1 + rng.normal(0, 0.05)), 0, self.config.max_disparity - 1))
                blob = Blob(end, (r, r * rng.uniform(0.3, 0.8)), rng.uniform(0, np.pi))
                leaf = self._add(blob, self._surface(end, nearer, (r, r), 0.3), leaf)

    def _box(self) -> None:
        """A cuboid in 3-D: its corners projected, its three visible faces planar in disparity."""
        rng, scene = self.rng, self.scene
        disparity = self._disparity()
        radius = self._radius(disparity)
        middle = self._place(disparity, radius)
        w = disparity + scene.far_offset
        # camera space in units of focal lengths at depth 1 / w
        ray = np.array(
            [(middle[0] - self.principal[0]) / self.focal, (middle[1] - self.principal[1]) / self.focal, 1.0]
        )
        half = radius / self.focal / w * np.exp(rng.uniform(-1.0, 0.2, 3))
        turn = rng.uniform(0, 2 * np.pi)
        yaw = np.array([[math.cos(turn), 0, math.sin(turn)], [0, 1, 0], [-math.sin(turn), 0, math.cos(turn)]])
        tip = rng.normal(0, 0.25) if rng.random() < 0.7 else rng.uniform(-1.5, 1.5)
        pitch = np.array([[1, 0, 0], [0, math.cos(tip), -math.sin(tip)], [0, math.sin(tip), math.cos(tip)]])
        axes = (pitch @ yaw) * half  # columns are the half edges
        center = ray / w + np.array([0, 0, half.max()])
        look: Appearance | None = None
        same = rng.random() < 0.5
        for axis in range(3):
            direction = axes[:, axis]
            sign = -1.0 if float(direction @ center) > 0 else 1.0
            middle_of_face = center + sign * direction
            if float(middle_of_face @ direction) * sign > 0:
                continue  # seen from within: happens only for boxes around the camera
            a, b = axes[:, (axis + 1) % 3], axes[:, (axis + 2) % 3]
            corners = np.stack([middle_of_face + i * a + j * b for i, j in ((-1, -1), (1, -1), (1, 1), (-1, 1))])
            if corners[:, 2].min() <= 0.05 / w:
                continue
            u = corners[:, 0] / corners[:, 2] * self.focal + self.principal[0]
            v = corners[:, 1] / corners[:, 2] * self.focal + self.principal[1]
            d = 1 / corners[:, 2] - scene.far_offset
            if d.min() < 0 or d.max() > self.config.max_disparity - 0.5:
                continue
            design = np.stack([np.ones(3), u[:3], v[:3]], axis=-1)
            if abs(np.linalg.det(design)) < 2.0:
                continue  # edge on
            value, along_u, along_v = np.linalg.solve(design, d[:3])
            if abs(along_u) > STEEPEST:
                continue
            at = (float(u.mean()), float(v.mean()))
            surface = Surface(float(value + along_u * at[0] + along_v * at[1]), at, (float(along_u), float(along_v)))
            look = self._add(Polygon(np.stack([u, v], axis=-1)), surface, look if same else None)

    # ------------------------------------------------------------------------------------------------------ appearance

    def _add(
        self, silhouette: Silhouette, surface: Surface, like: Appearance | None = None, *, aligned: bool = False
    ) -> Appearance:
        """Add a shape with a look of its own or one like another's; return the look."""
        large = isinstance(silhouette, Everywhere)
        extent = (0.0, 0.0, float(self.config.width), float(self.config.height)) if large else silhouette.extent
        appearance = self._appearance(surface, extent, like, large=large, aligned=aligned)
        self.scene.shapes.append(Shape(silhouette, surface, appearance))
        return appearance

    def _appearance(
        self, surface: Surface, extent: tuple[float, float, float, float], like: Appearance | None, *, large: bool,
        aligned: bool,
    ) -> Appearance:  # fmt: skip
        """Dress a surface in a texture of its own, or in that of another with a little change.

        Args:
            surface: Whose plane the texture lies on.
            extent: (left, top, right, bottom) of the shape in pixels.
            like: The look to repeat; None draws a new one.
            large: Of the background: a texture whose repetition does not show.
            aligned: Along the edges of a room more often than not.
        """
        rng, scene = self.rng, self.scene
        half = max(1.0, (extent[2] - extent[0]) / 2), max(1.0, (extent[3] - extent[1]) / 2)
        middle = ((extent[0] + extent[2]) / 2, (extent[1] + extent[3]) / 2)
        # tangent directions of the plane w = w0 + slope . p, whose normal is ~ (slope f, w at the principal point)
        at = surface.center
        w0 = surface.value + scene.far_offset
        on_axis = w0 + surface.slope[0] * (self.principal[0] - at[0]) + surface.slope[1] * (self.principal[1] - at[1])
        normal = np.array([surface.slope[0] * self.focal, surface.slope[1] * self.focal, on_axis])
        normal /= np.linalg.norm(normal) + 1e-12
        helper = np.array([1.0, 0.0, 0.0]) if abs(normal[0]) < 0.8 else np.array([0.0, 0.0, 1.0])
        first = helper - normal * (helper @ normal)
        first /= np.linalg.norm(first)
        second = np.cross(normal, first)
        # never quite along the rows, where a periodic map would match itself exactly one period further
        turn = rng.uniform(0, 2 * np.pi)
        if like is None and rng.random() < (0.6 if aligned else 0.4):
            turn = rng.choice([0.0, 0.5, 1.0, 1.5]) * np.pi + rng.normal(0, 0.04)
        cosine, sine = math.cos(turn), math.sin(turn)
        tangents = np.stack([cosine * first + sine * second, cosine * second - sine * first])
        density = math.exp(rng.uniform(math.log(0.35), math.log(1.3 if large else 2.0)))  # texels per pixel
        reference = 0.3 * (self.nearest + scene.far_offset) if aligned else w0  # those start at the horizon
        scale = density * reference
        axes = np.stack(
            [
                scale * (self.focal * tangents[:, 2] - tangents[:, 0] * self.principal[0]
                         - tangents[:, 1] * self.principal[1]),
                scale * tangents[:, 0],
                scale * tangents[:, 1],
            ], axis=-1,
        )  # fmt: skip
        light_u, light_v = (float(x) for x in rng.normal(0, 0.2 * self.config.shading, 2) / half)
        highlight = (0.0, 0.0, 1.0, 0.0, 0.0)
        if rng.random() < self.config.gloss * self.difficulty:
            sigma = max(half) * rng.uniform(0.1, 0.6)
            highlight = (
                middle[0] + rng.uniform(-1, 1) * half[0],
                middle[1] + rng.uniform(-1, 1) * half[1],
                1 / (2 * sigma * sigma),
                rng.uniform(0.1, 0.6),
                rng.normal(0, 0.3) * surface.value,
            )
        shadows = []
        for _ in range(2 if self.config.shadows else 0):
            frequency = 2 * np.pi / max(8.0, max(half) * rng.uniform(0.5, 3.0))
            direction, phase = rng.uniform(0, 2 * np.pi, 2)
            amplitude = rng.normal(0, 0.1 * self.config.shadows)
            shadows.append((amplitude, frequency * math.cos(direction), frequency * math.sin(direction), phase))
        if like is None:
            count = len(scene.maps)
            texture = int(rng.integers(min(2, count) if large and rng.random() < 0.8 else count))
            color, bias = self._recolor()
        else:
            texture, color, bias = like.texture, like.color, like.bias
        return Appearance(
            texture,
            axes,
            rng.uniform(0, 512, 2),
            color,
            bias * (1.0 if like is None else math.exp(rng.normal(0, 0.06))),
            (1 - light_u * middle[0] - light_v * middle[1], light_u, light_v),
            highlight,
            tuple(shadows),
        )

    def _recolor(self) -> tuple[Points, Points]:
        """Draw the colour matrix [3, 4] and the bias [3] that give one map many looks."""
        rng = self.rng
        color = np.zeros((3, 4))
        if rng.random() < 0.4:  # as drawn
            color[:, :3] = np.eye(3)
            bias = np.full(3, 0.5)
        else:
            saturation = rng.uniform(0, 1.2)
            order = rng.permutation(3)
            color[:, :3] = saturation * np.eye(3)[order] + (1 - saturation) / 3
            color[:, :3] *= math.exp(rng.normal(-0.3, 0.5)) * rng.choice([1, -1], p=[0.75, 0.25])
            bias = rng.uniform(0.2, 0.75) + rng.normal(0, 0.12, 3) * rng.random()
        if rng.random() < self.config.weak_texture * self.difficulty:
            color[:, :3] *= rng.uniform(0.02, 0.25)
        color[:, 3] = rng.uniform(0.0, 0.25) if rng.random() < 0.6 else 0.02
        if rng.random() < self.config.weak_texture * self.difficulty:
            color[:, 3] = rng.uniform(0.0, 0.03)
        if self.config.plain and rng.random() < self.config.plain * self.difficulty:
            color *= rng.uniform(0.0, 0.04)
        return color, bias


def _in_frame(u: Tensor, v: Tensor, center: tuple[float, float], angle: float) -> tuple[Tensor, Tensor]:
    """Return how far points lie from a center along a direction and across it, px."""
    cosine, sine = math.cos(angle), math.sin(angle)
    pu, pv = u - center[0], v - center[1]
    return pu * cosine + pv * sine, pv * cosine - pu * sine


def _rotated(points: Points, angle: float) -> Points:
    cosine, sine = math.cos(angle), math.sin(angle)
    rotation = np.array([[cosine, sine], [-sine, cosine]])
    return np.asarray(points @ rotation, dtype=np.float64)
