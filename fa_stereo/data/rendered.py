"""Stereo pairs rendered from random scenes, with exact ground truth: nothing to download, nothing to license.

Both views evaluate the same analytic shapes (``fa_stereo.data.scenes``) at their own sample positions. Colours are
antialiased by supersampling; disparity is the nearest surface's at the pixel's centre, so it is exact to float32 and
an edge lies where the shape's formula has it. The idea of training on such worlds: Mayer et al. 2016 (FlyingThings3D),
Sun et al. 2021 (AutoFlow), Baradad et al. 2021 ("Learning to see by looking at noise").
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from fa_stereo.config import RenderConfig, to_plain
from fa_stereo.data.formats import write_pfm, write_picture
from fa_stereo.data.sample import StereoSample
from fa_stereo.data.scenes import Appearance, Scene, Shape, random_scene
from fa_stereo.data.transforms import LUMA
from fa_stereo.errors import InputError
from fa_stereo.files import read_bytes

# Offsets of the samples of a pixel: the centre, which alone decides disparity, then a rotated grid for the colours of
# pixels that more than one surface shares.
SAMPLE_OFFSETS = ((0.0, 0.0), (-0.125, -0.375), (0.375, -0.125), (0.125, 0.375), (-0.375, 0.125))
OCCLUSION_TOLERANCE = 0.02  # px; a surface must be nearer by this to hide another
MAP_LEVELS = 7  # of the texture pyramids
# What shading reads of every shape, and how many numbers each is (see ``Appearance``; slope is the surface's).
SHADING_PARAMETERS = {"axes": 6, "offset": 2, "slope": 2, "light": 3, "highlight": 5, "shadows": 8, "color": 15}
SHADING_CHUNK = 32768  # samples shaded at once on a CPU: small enough for its caches


class RenderedPairs(Dataset[StereoSample]):
    """Pairs rendered on the fly; sample i is the same picture in every process, epoch and run.

    Args:
        config: What to render, and where.

    Attributes:
        device: ``cpu`` or ``cuda``, as ``config.device`` says. Loader processes that render on a GPU must be spawned:
            a forked one cannot use CUDA.

    Raises:
        InputError: A GPU is asked for and PyTorch sees none.
    """

    def __init__(self, config: RenderConfig) -> None:
        self.config = config
        if config.device == "cuda" and not torch.cuda.is_available():
            raise InputError("rendered.device is cuda, but PyTorch sees no GPU: set rendered.device=cpu")
        self.device = "cuda" if config.device != "cpu" and torch.cuda.is_available() else "cpu"

    def __len__(self) -> int:
        return self.config.samples

    def __getitem__(self, index: int) -> StereoSample:
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        return render_pair(self.config, index, self.device)


def render_pair(config: RenderConfig, index: int, device: str | torch.device = "cpu") -> StereoSample:
    """Render sample ``index`` of ``config.seed``, with every field of the sample filled.

    Args:
        config: What to render.
        index: Any non-negative number, also beyond ``config.samples``.
        device: Where visibility and shading are computed. The scene does not depend on it; the last bits may.

    Raises:
        ValueError: ``index`` is negative.
    """
    if index < 0:
        raise ValueError(f"index must not be negative, got {index}")
    scene_seed, camera_seed = np.random.SeedSequence([config.seed, index]).spawn(2)
    scene = random_scene(config, np.random.default_rng(scene_seed))
    views = render_scene(scene, device)
    left, right = photograph(config, views.left, views.right, np.random.default_rng(camera_seed))
    return StereoSample(
        name=pair_name(config, index),
        left=left,
        right=right,
        disparity=views.disparity,
        right_disparity=views.right_disparity,
        occluded=views.occluded,
    )


def pair_name(config: RenderConfig, index: int) -> str:
    """Return the name of a rendered pair."""
    return f"rendered/{config.seed}/{index:06d}"


# --------------------------------------------------------------------------------------------------------------------
# on disk

FRAMES_A_SEQUENCE = 10  # numbered 0006 to 0015, as FlyingThings3D's
SEQUENCES_A_LETTER = 10000
LARGEST_SET = 3 * SEQUENCES_A_LETTER * FRAMES_A_SEQUENCE  # letters A, B and C


def frame_files(root: Path, split: str, index: int) -> tuple[Path, Path, Path, Path]:
    """Return the files of a pair in Scene Flow's official layout, in the order in which they are written.

    Args:
        root: Folder that holds ``FlyingThings3D``.
        split: TRAIN or TEST.
        index: Of the pair, below ``LARGEST_SET``.

    Returns:
        Left picture, right picture, left disparity, right disparity.
    """
    sequence, frame = divmod(index, FRAMES_A_SEQUENCE)
    letter, sequence = divmod(sequence, SEQUENCES_A_LETTER)
    folder = f"{split}/{'ABC'[letter]}/{sequence:04d}"
    pictures, disparities = root / "FlyingThings3D/frames_cleanpass", root / "FlyingThings3D/disparity"
    name = f"{frame + 6:04d}"
    return (
        pictures / folder / "left" / f"{name}.png",
        pictures / folder / "right" / f"{name}.png",
        disparities / folder / "left" / f"{name}.pfm",
        disparities / folder / "right" / f"{name}.pfm",
    )


def settings_file(root: Path, split: str) -> Path:
    """Return the file that holds how the pairs of a split were rendered, a ``RenderConfig`` as JSON."""
    return root / f"rendered_{split.lower()}.json"


def read_settings(root: Path, split: str) -> dict[str, Any] | None:
    """Return how the pairs of a split were rendered, with defaults for what came later; None where nothing says so.

    Raises:
        InputError: The file that should say so is damaged.
    """
    file = settings_file(root, split)
    if not file.exists():
        return None
    try:
        settings = {**to_plain(RenderConfig()), **json.loads(read_bytes(file))}
    except (ValueError, TypeError) as error:
        raise InputError(f"{file}: not the record of a rendered set: restore it, or choose another folder") from error
    settings.pop("samples")  # more of the same may be added later
    return settings


def write_frame(sample: StereoSample, root: Path, split: str, index: int) -> None:
    """Write pictures and disparities of a pair, each file whole or not at all.

    Raises:
        ValueError: The sample lacks the disparity of a view.
        InputError: The folder cannot be written.
    """
    if sample.disparity is None or sample.right_disparity is None:
        raise ValueError(f"{sample.name} has not the disparity of both views")
    left, right, disparity, right_disparity = frame_files(root, split, index)
    for file in (left, right, disparity, right_disparity):
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"{file.parent}: cannot be made ({error.strerror or error})") from error
    write_picture(left, sample.left)
    write_picture(right, sample.right)
    write_pfm(disparity, sample.disparity)
    write_pfm(right_disparity, sample.right_disparity)


# --------------------------------------------------------------------------------------------------------------------
# visibility


@dataclass(frozen=True)
class Views:
    """What an ideal pair of cameras sees.

    Attributes:
        left: Colours, float32 [H, W, 3] from 0 to 1.
        right: Likewise.
        disparity: Of the left view at its pixels' centres, float32 [H, W].
        right_disparity: Of the right view at its pixels' centres.
        occluded: Bool [H, W], True where the centre of the left pixel cannot be seen in the right picture.
    """

    left: NDArray[np.float32]
    right: NDArray[np.float32]
    disparity: NDArray[np.float32]
    right_disparity: NDArray[np.float32]
    occluded: NDArray[np.bool_]


def render_scene(scene: Scene, device: str | torch.device = "cpu") -> Views:
    """Render both views of a scene."""
    rows = torch.arange(scene.height, dtype=torch.float32, device=device)
    columns = torch.arange(scene.width, dtype=torch.float32, device=device)
    offsets = torch.tensor(SAMPLE_OFFSETS, dtype=torch.float32, device=device)
    x = columns[None, None, :] + offsets[:, 0, None, None]  # [S, 1, W]
    y = rows[None, :, None] + offsets[:, 1, None, None]  # [S, H, 1]
    left = _nearest_surface(scene, x, y, right=False)
    right = _nearest_surface(scene, x, y, right=True)
    painter = _Painter(scene, device)
    disparity = left[0][0]  # [H, W]
    return Views(
        left=painter.picture(x, y, *left, right=False),
        right=painter.picture(x, y, *right, right=True),
        disparity=disparity.cpu().numpy(),
        right_disparity=right[0][0].cpu().numpy(),
        occluded=_occluded(scene, disparity, columns, rows).cpu().numpy(),
    )


def _nearest_surface(scene: Scene, x: Tensor, y: Tensor, *, right: bool) -> tuple[Tensor, Tensor]:
    """Find the nearest surface at the samples (x + column, y + row) of one view.

    Args:
        scene: What there is.
        x: Horizontal sample positions [S, 1, W] or [S, H, W]. In column j they lie within half a pixel of j, or,
            for the right view and [S, H, W], at j - d for any d >= 0 that the caller asks about.
        y: Vertical sample positions [S, H, 1], within half a pixel of the row.
        right: The view.

    Returns:
        Disparity [S, H, W] and the shape's index, int32 [S, H, W].
    """
    size = (x.shape[0], y.shape[1], x.shape[2])
    anywhere = x.shape[1] > 1
    nearest = torch.full(size, -math.inf, device=x.device)
    which = torch.zeros(size, dtype=torch.int32, device=x.device)
    for k, shape in enumerate(scene.shapes):
        window = _window(shape, size[1], size[2], right=right, anywhere=anywhere)
        if window is None:
            continue
        rows, columns = window
        part_x, part_y = x[:, rows if anywhere else slice(None), columns], y[:, rows]
        if right:
            d = shape.surface.disparity_from_right(part_x, part_y)
            inside = shape.silhouette.contains(part_x + d, part_y)
        else:
            d = shape.surface.disparity(part_x, part_y)
            inside = shape.silhouette.contains(part_x, part_y)
        candidate = torch.where(inside, d, -math.inf)
        known = nearest[:, rows, columns]
        which[:, rows, columns].masked_fill_(candidate > known, k)
        torch.maximum(known, candidate, out=known)
    return nearest.clamp_min_(0), which


def _window(shape: Shape, height: int, width: int, *, right: bool, anywhere: bool) -> tuple[slice, slice] | None:
    """Return the rows and columns that a shape can touch, None if there are none."""
    left, top, far, bottom = shape.silhouette.extent
    if not math.isfinite(left):
        return slice(0, height), slice(0, width)
    if right:
        center = shape.surface.center
        smallest, largest = shape.surface.bounds(
            max(far - center[0], center[0] - left), max(bottom - center[1], center[1] - top)
        )
        # x = u - d; where x = j - d' is asked about, only surfaces with d > d' matter: u - d <= x < j < x + d = u
        left, far = left - largest, far if anywhere else far - smallest
    rows = slice(max(0, math.floor(top)), min(height, math.ceil(bottom) + 1))
    columns = slice(max(0, math.floor(left)), min(width, math.ceil(far) + 1))
    return (rows, columns) if rows.start < rows.stop and columns.start < columns.stop else None


def _occluded(scene: Scene, disparity: Tensor, columns: Tensor, rows: Tensor) -> Tensor:
    """Ask the right view, at the very point where it would see each left pixel, whether something is nearer."""
    x = columns - disparity  # [H, W]
    nearest, _ = _nearest_surface(scene, x[None], rows[None, :, None], right=True)
    outside = (x < -0.5) | (x > scene.width - 0.5)
    return outside | (nearest[0] > disparity + OCCLUSION_TOLERANCE)


# --------------------------------------------------------------------------------------------------------------------
# shading


class _Painter:
    """Colors visible samples: each is shaded once, however many surfaces lie behind it."""

    def __init__(self, scene: Scene, device: str | torch.device) -> None:
        self.scene = scene
        self.counts = dict(SHADING_PARAMETERS)
        if not any(shape.appearance.shadows for shape in scene.shapes):
            self.counts["shadows"] = 0
        self.parameters = torch.from_numpy(
            np.stack([_parameters(shape.appearance, shape.surface.slope, self.counts) for shape in scene.shapes], -1)
        ).to(device)  # [P, K]
        self.textures = torch.tensor([s.appearance.texture for s in scene.shapes], dtype=torch.int32, device=device)
        rows, starts, bits = [], [], []
        start = 0
        for texture in scene.maps:
            level = texture
            for _ in range(MAP_LEVELS):
                rows.append(level.reshape(-1, 4))
                starts.append(start)
                bits.append(int(math.log2(len(level))))
                start += len(rows[-1])
                level = np.asarray(cv2.resize(level, None, fx=0.5, fy=0.5, interpolation=cv2.INTER_AREA), np.uint8)
        self.atlas = torch.from_numpy(np.concatenate(rows)).to(device).float().div_(255)  # [texels, 4]
        self.starts = torch.tensor(starts, dtype=torch.int32, device=device)
        self.bits = torch.tensor(bits, dtype=torch.int32, device=device)

    def picture(self, x: Tensor, y: Tensor, disparity: Tensor, which: Tensor, *, right: bool) -> NDArray[np.float32]:
        """Return the view's colours [H, W, 3].

        A pixel whose samples all see one surface takes the colour at its centre, which the prefiltered textures keep
        free of aliasing; a pixel at an edge takes the mean over the other samples.
        """
        size = disparity.shape  # [S, H, W]
        edge = (which[1:] != which[0]).any(dim=0).flatten()
        inner_pixels, edge_pixels = (~edge).nonzero()[:, 0], edge.nonzero()[:, 0]
        subsamples = size[0] - 1
        pixels_each = size[1] * size[2]
        samples = torch.cat([inner_pixels] + [edge_pixels + pixels_each * (s + 1) for s in range(subsamples)])
        flat_x, flat_y = x.expand(size).reshape(-1), y.expand(size).reshape(-1)
        flat_disparity, flat_which = disparity.reshape(-1), which.reshape(-1)
        colors = torch.empty(len(samples), 3, device=disparity.device)
        chunk = SHADING_CHUNK if disparity.device.type == "cpu" else len(samples)
        for start in range(0, len(samples), chunk):
            part = samples[start : start + chunk]
            d = flat_disparity.index_select(0, part)
            u = flat_x.index_select(0, part) + (d if right else 0)
            v = flat_y.index_select(0, part)
            colors[start : start + chunk] = self._shade(u, v, d, flat_which.index_select(0, part), right=right)
        picture = torch.empty(pixels_each, 3, device=disparity.device)
        picture[inner_pixels] = colors[: len(inner_pixels)]
        picture[edge_pixels] = colors[len(inner_pixels) :].view(subsamples, -1, 3).mean(dim=0)
        return picture.view(size[1], size[2], 3).cpu().numpy()

    def _shade(self, u: Tensor, v: Tensor, d: Tensor, which: Tensor, *, right: bool) -> Tensor:
        """Return the colours [N, 3] of surface points (u, v), float32 [N], of the shapes ``which``, int32 [N]."""
        values = iter(self.parameters.index_select(1, which).unbind(0))
        p = {name: [next(values) for _ in range(count)] for name, count in self.counts.items()}
        s_1, s_u, s_v, t_1, t_u, t_v = p["axes"]
        inverse = 1 / (d + self.scene.far_offset)
        s = (s_1 + s_u * u + s_v * v) * inverse
        t = (t_1 + t_u * u + t_v * v) * inverse
        # the texture's scale, texels per pixel of the view, decides which levels of the pyramid to read
        d_u, d_v = p["slope"]
        ds_u, dt_u = (s_u - s * d_u) * inverse, (t_u - t * d_u) * inverse
        ds_v, dt_v = (s_v - s * d_v) * inverse, (t_v - t * d_v) * inverse
        if right:  # at x = u - d(u, v): du/dx = 1 / (1 - d_u), and du/dv = d_v du/dx along a column
            stretch = 1 / (1 - d_u)
            ds_u, dt_u = ds_u * stretch, dt_u * stretch
            ds_v, dt_v = ds_v + d_v * ds_u, dt_v + d_v * dt_u
        area = 0.5 * (ds_u.square() + dt_u.square() + ds_v.square() + dt_v.square())
        level = (0.5 * torch.log2(area + 1e-12)).clamp(0, MAP_LEVELS - 1.001)
        s_0, t_0 = p["offset"]
        texel = self._texel(self.textures.index_select(0, which), level, s + s_0, t + t_0) - 0.5  # [N, 4]
        light_1, light_u, light_v = p["light"]
        light = light_1 + light_u * u + light_v * v
        for i in range(0, self.counts["shadows"], 4):
            amplitude, along_u, along_v, phase = p["shadows"][i : i + 4]
            light = light + amplitude * torch.sin(along_u * u + along_v * v + phase)
        light = light.clamp(0.4, 1.6)
        center_u, center_v, sharpness, brightness, shift = p["highlight"]
        spot_u = u - center_u - shift if right else u - center_u
        spot = brightness * torch.exp(-sharpness * (spot_u.square() + (v - center_v).square()))
        red, green, blue, grain = texel.unbind(1)
        *air, strength = self.scene.haze
        depth = -math.log(1 - strength) * self.scene.far_offset
        clear = torch.exp(-depth * inverse)
        channels = []
        for c in range(3):
            bias, of_red, of_green, of_blue, of_grain = p["color"][5 * c : 5 * c + 5]
            color = bias + of_red * red + of_green * green + of_blue * blue + of_grain * grain
            color = color.clamp(0.01, 0.99) * light + spot
            channels.append(color * clear + air[c] * (1 - clear) if depth else color)
        return torch.stack(channels, dim=1).clamp_(0, 1)

    def _texel(self, texture: Tensor, level: Tensor, s: Tensor, t: Tensor) -> Tensor:
        """Read the maps trilinearly and periodically at (s, t) texels; returns [N, 4]."""
        lower = level.floor()
        fraction = (level - lower)[:, None]
        entry = texture * MAP_LEVELS + lower.int()
        scale = torch.exp2(-lower)
        fine = self._bilinear(entry, s * scale, t * scale)
        coarse = self._bilinear(entry + 1, s * scale * 0.5, t * scale * 0.5)
        return torch.lerp(fine, coarse, fraction)

    def _bilinear(self, entry: Tensor, s: Tensor, t: Tensor) -> Tensor:
        start, bits = self.starts.index_select(0, entry), self.bits.index_select(0, entry)
        mask = (1 << bits) - 1
        s, t = s - 0.5, t - 0.5  # texel i is centred at i + 0.5
        floor_s, floor_t = s.floor(), t.floor()
        weight_s, weight_t = (s - floor_s)[:, None], (t - floor_t)[:, None]
        i, j = floor_s.int(), floor_t.int()
        i0, i1 = i & mask, (i + 1) & mask
        row0, row1 = start + ((j & mask) << bits), start + (((j + 1) & mask) << bits)
        top = torch.lerp(self.atlas.index_select(0, row0 + i0), self.atlas.index_select(0, row0 + i1), weight_s)
        bottom = torch.lerp(self.atlas.index_select(0, row1 + i0), self.atlas.index_select(0, row1 + i1), weight_s)
        return torch.lerp(top, bottom, weight_t)


def _parameters(look: Appearance, slope: tuple[float, float], counts: dict[str, int]) -> NDArray[np.float32]:
    """Return one shape's ``SHADING_PARAMETERS``, one after the other, filled up with zeros to their ``counts``."""
    parts: dict[str, Any] = {
        "axes": look.axes,  # [2, 3]
        "offset": look.offset,
        "slope": slope,
        "light": look.light,
        "highlight": look.highlight,
        "shadows": look.shadows,
        "color": np.concatenate([look.bias[:, None], look.color], axis=1),  # [3, 5]
    }
    values = [np.pad(np.ravel(parts[name]), (0, n - np.size(parts[name]))) for name, n in counts.items()]
    return np.concatenate(values).astype(np.float32)


# --------------------------------------------------------------------------------------------------------------------
# cameras


def photograph(
    config: RenderConfig, left: NDArray[np.float32], right: NDArray[np.float32], rng: np.random.Generator
) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Turn ideal colours [H, W, 3] into the pictures that two imperfect cameras take.

    Both expose for the scene alike. With every camera option off that and rounding to 8 bits is all they do.
    """
    strength = config.difficulty
    exposure = np.float32(np.clip(rng.uniform(0.25, 0.6) / (left.mean() + 1e-3), 0.7, 2.5))
    left, right = left * exposure, right * exposure

    def chosen() -> bool:
        return rng.random() < config.asymmetry_probability * strength

    if rng.random() < config.grayscale:
        left, right = (np.repeat(view @ LUMA, 3).reshape(view.shape) for view in (left, right))
    if config.vertical_shift and chosen():
        shift, roll = rng.uniform(-1, 1, 2) * config.vertical_shift * (0.7, 0.3)
        right = _shift_rows(right, shift + roll * np.linspace(-1, 1, right.shape[1]))
    if config.blur and chosen():
        left, right = (_defocus(view, rng.uniform(0, config.blur)) for view in (left, right))
    if config.gain and chosen():
        right = right * np.float32(1 + rng.uniform(-config.gain, config.gain))
    if config.tint and chosen():
        right = right * (1 + rng.uniform(-config.tint, config.tint, 3)).astype(np.float32)
    if config.gamma and chosen():
        right = np.clip(right, 0, 1) ** np.float32(math.exp(rng.uniform(-config.gamma, config.gamma)))
    if config.noise and chosen():
        level = config.noise * rng.random() ** 2
        left, right = (_add_noise(view, level * rng.uniform(0.8, 1.2), rng) for view in (left, right))
    return _to_bytes(left), _to_bytes(right)


def _shift_rows(view: NDArray[np.float32], shift: NDArray[np.floating]) -> NDArray[np.float32]:
    """Resample every column c at rows y + shift[c] by Catmull-Rom interpolation; |shift| <= 2."""
    reach = 4
    padded = np.pad(view, ((reach, reach), (0, 0), (0, 0)), mode="edge")
    result = np.zeros_like(view)
    for tap in range(-reach + 1, reach):
        distance = np.abs(tap - shift)
        weight = np.where(
            distance < 1,
            1.5 * distance**3 - 2.5 * distance**2 + 1,
            np.where(distance < 2, -0.5 * distance**3 + 2.5 * distance**2 - 4 * distance + 2, 0.0),
        ).astype(np.float32)
        if weight.any():
            result += padded[reach + tap : reach + tap + len(view)] * weight[:, None]
    return result


def _defocus(view: NDArray[np.float32], sigma: float) -> NDArray[np.float32]:
    if sigma < 0.2:
        return view
    return np.asarray(cv2.GaussianBlur(view, (0, 0), sigma, borderType=cv2.BORDER_REPLICATE), dtype=np.float32)


def _add_noise(view: NDArray[np.float32], level: float, rng: np.random.Generator) -> NDArray[np.float32]:
    """Add read noise of half the level and shot noise that brings it to the level at full brightness."""
    deviation = np.float32(level) * np.sqrt(0.25 + 0.75 * np.clip(view, 0, 1))
    noise = rng.standard_normal(view.shape, dtype=np.float32)
    return np.asarray(view + deviation * noise, dtype=np.float32)


def _to_bytes(view: NDArray[np.floating]) -> NDArray[np.uint8]:
    return np.asarray(np.clip(view * 255 + 0.5, 0, 255), dtype=np.uint8)
