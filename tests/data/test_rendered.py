from __future__ import annotations

import dataclasses
import hashlib
import math
import subprocess
import sys
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from fa_stereo.config import RenderConfig
from fa_stereo.data.rendered import RenderedPairs, photograph, render_pair, render_scene
from fa_stereo.data.sample import StereoSample
from fa_stereo.data.scenes import (
    STEEPEST,
    Appearance,
    Bars,
    Blob,
    Combined,
    Everywhere,
    Lace,
    Polygon,
    Scene,
    Shape,
    Silhouette,
    Strand,
    Surface,
    _SceneBuilder,
    random_scene,
)
from fa_stereo.data.textures import _NATURAL, _PATTERNS, _glyphs, _weak, random_map
from fa_stereo.errors import InputError
from tests.gpu import needs_gpu

SMALL = RenderConfig(height=96, width=224, seed=3)
PERFECT = dataclasses.replace(SMALL, asymmetry_probability=0.0, gloss=0.0)


def digest(sample: StereoSample) -> str:
    h = hashlib.sha256(sample.name.encode())
    for name in ("left", "right", "disparity", "right_disparity", "occluded"):
        h.update(np.ascontiguousarray(getattr(sample, name)).tobytes())
    return h.hexdigest()


def sample_at(image: np.ndarray, x: np.ndarray) -> np.ndarray:
    """Linear interpolation of [H, W, ...] along its rows at positions x [H, W]."""
    floor = np.floor(x).astype(int)
    weight = x - floor
    last = image.shape[1] - 1
    rows = np.arange(len(image))[:, None]
    if image.ndim == 3:
        weight = weight[..., None]
    return image[rows, np.clip(floor, 0, last)] * (1 - weight) + image[rows, np.clip(floor + 1, 0, last)] * weight


def away_from_edges(disparity: np.ndarray, step: float = 0.7) -> np.ndarray:
    """True where disparity changes by less than ``step`` a pixel to all sides within two pixels."""
    smooth = np.ones(disparity.shape, bool)
    for dy in (-2, -1, 0, 1, 2):
        for dx in (-2, -1, 0, 1, 2):
            moved = np.roll(disparity, (dy, dx), (0, 1))
            smooth &= np.abs(moved - disparity) < step * max(abs(dx), abs(dy), 1)
    smooth[:2] = smooth[-2:] = False
    smooth[:, :2] = smooth[:, -2:] = False
    return smooth


# --------------------------------------------------------------------------------------------------------------------
# ground truth


@pytest.mark.parametrize("index", range(4))
def test_warping_the_right_picture_by_the_disparity_gives_the_left(index: int) -> None:
    s = render_pair(PERFECT, index)
    columns = np.arange(PERFECT.width)
    x = columns - s.disparity
    trusted = ~s.occluded & away_from_edges(s.disparity) & (x >= 1) & (x <= PERFECT.width - 2)
    assert trusted.mean() > 0.1

    def error(shift: float) -> float:
        difference = np.abs(sample_at(s.right.astype(float), x + shift) - s.left)
        return float(difference[trusted].mean())

    right = error(0)
    assert right < 4.0
    assert error(1) > 1.5 * right
    assert error(-1) > 1.5 * right


@pytest.mark.parametrize("index", range(6))
def test_the_two_disparity_maps_agree_where_both_views_see(index: int) -> None:
    s = render_pair(PERFECT, index)
    x = np.arange(PERFECT.width) - s.disparity
    seen = sample_at(s.right_disparity, x)
    # where it is looked up the right map must be smooth too: no edge, and no crease, which interpolation would cut
    crease = np.abs(np.diff(s.right_disparity, 2, axis=1, prepend=0, append=0)) > 0.1
    smooth_right = away_from_edges(s.right_disparity) & ~crease
    trusted = ~s.occluded & away_from_edges(s.disparity) & (sample_at(smooth_right.astype(float), x) == 1)
    trusted &= (x >= 0) & (x <= PERFECT.width - 1)
    assert trusted.mean() > 0.1
    difference = np.abs(seen - s.disparity)[trusted]
    assert np.median(difference) < 1e-3
    assert np.mean(difference > 0.05) < 1e-3  # the rest: low steps between surfaces, which the filters let through


@pytest.mark.parametrize("index", range(4))
def test_occluded_pixels_are_outside_or_behind_something_nearer(index: int) -> None:
    s = render_pair(PERFECT, index)
    x = np.arange(PERFECT.width) - s.disparity
    outside = (x < -0.5) | (x > PERFECT.width - 0.5)
    assert s.occluded[outside].all()
    nearest_pixel = np.clip(np.rint(x).astype(int), 0, PERFECT.width - 1)
    rows = np.arange(PERFECT.height)[:, None]
    hidden = s.occluded & ~outside
    in_front = s.right_disparity[rows, nearest_pixel] > s.disparity
    assert in_front[hidden].mean() > 0.9  # the rest lies within half a pixel of an edge
    # and forward mapping: a visible point is not behind what the right view sees there, half-pixel edges apart
    visible = ~s.occluded & ~outside
    behind = s.right_disparity[rows, nearest_pixel] > s.disparity + 1
    assert behind[visible].mean() < 0.06


def test_disparity_stays_in_its_range_and_uses_it() -> None:
    config = dataclasses.replace(SMALL, width=320, height=48, texture_maps=1)
    samples = [render_pair(config, i) for i in range(30)]
    largest = np.array([s.disparity.max() for s in samples])
    for s in samples:
        for d in (s.disparity, s.right_disparity):
            assert d.dtype == np.float32
            assert np.isfinite(d).all()
            assert d.min() >= 0
            assert d.max() <= config.max_disparity
    assert largest.max() > 130  # the far end is trained too, also in narrow pictures
    assert 5 < np.median(largest) < 100  # most scenes are of the usual range
    small = dataclasses.replace(config, max_disparity=48.0)
    assert max(render_pair(small, i).disparity.max() for i in range(10)) <= 48


def test_the_last_twigs_of_a_plant_stay_in_the_range() -> None:
    config = dataclasses.replace(SMALL, max_disparity=48.0, slant=3.0)
    for seed in range(400):
        builder = _SceneBuilder(config, np.random.default_rng(seed))
        builder.scene.maps.append(np.full((256, 256, 4), 128, np.uint8))
        builder._bush()
        for shape in builder.scene.shapes:
            left, top, right, bottom = shape.silhouette.extent
            corners = torch.tensor([(left, top), (right, top), (left, bottom), (right, bottom)])
            disparity = shape.surface.disparity(*corners.T)
            assert 0 <= disparity.min() <= disparity.max() <= config.max_disparity, seed


def plain(color: float) -> Appearance:
    zero = (0.0, 0.0, 1.0, 0.0, 0.0)
    bias = np.full(3, color)
    return Appearance(0, np.zeros((2, 3)), np.zeros(2), np.zeros((3, 4)), bias, (1.0, 0.0, 0.0), zero)


def white_on_black(silhouette: Silhouette, disparity: float, height: int = 128, width: int = 256) -> Scene:
    shapes = [
        Shape(Everywhere(), Surface(3.0), plain(0.01)),
        Shape(silhouette, Surface(disparity), plain(0.99)),
    ]
    return Scene(height, width, shapes, [np.full((256, 256, 4), 128, np.uint8)])


@pytest.mark.parametrize(
    ("silhouette", "area"),
    [
        (Blob((130.3, 61.8), (50.2, 33.7), 0.4), math.pi * 50.2 * 33.7),
        (Polygon(np.array([(90.3, 20.1), (171.9, 33.3), (160.2, 99.6), (101.7, 80.4)])), None),
        (Combined(Blob((130.3, 61.8), (40.1, 40.1)), without=(Blob((130.3, 61.8), (25.3, 25.3)),)),
         math.pi * (40.1**2 - 25.3**2)),
    ],
)  # fmt: skip
def test_shapes_are_neither_fattened_nor_moved(silhouette: Silhouette, area: float | None) -> None:
    if area is None:
        assert isinstance(silhouette, Polygon)
        x, y = silhouette.vertices.T
        area = 0.5 * abs(np.dot(x, np.roll(y, -1)) - np.dot(y, np.roll(x, -1)))
    views = render_scene(white_on_black(silhouette, 20.25))
    centroids = []
    for picture in (views.left, views.right):
        coverage = (picture[..., 0] - 0.01) / 0.98
        assert coverage.sum() == pytest.approx(area, rel=0.005)
        centroids.append((coverage * np.arange(256)).sum() / coverage.sum())
    assert centroids[0] - centroids[1] == pytest.approx(20.25, abs=0.03)
    assert (views.disparity == 20.25).sum() == pytest.approx(area, rel=0.01)
    assert set(np.unique(views.disparity)) == {3.0, 20.25}
    # the background at u is hidden where the shape covers, in the right view, the same place: u - 3 = u' - 20.25
    u, v = torch.meshgrid(torch.arange(256) + 0.0, torch.arange(128) + 0.0, indexing="xy")
    hidden = silhouette.contains(u + 17.25, v) & ~silhouette.contains(u, v)
    assert np.array_equal(views.occluded, (hidden | (u < 2.5)).numpy())


def test_a_nearer_shape_hides_a_farther_one_whatever_the_order() -> None:
    scene = white_on_black(Blob((100.0, 60.0), (30.0, 30.0)), 20.0)
    scene.shapes.append(Shape(Blob((100.0, 60.0), (10.0, 10.0)), Surface(12.0), plain(0.5)))
    views = render_scene(scene)
    assert 12.0 not in views.disparity
    scene.shapes.reverse()
    assert np.array_equal(render_scene(scene).left, views.left)


def test_intersecting_surfaces_meet_where_their_disparities_do() -> None:
    shapes = [
        Shape(Everywhere(), Surface(20.0), plain(0.2)),
        Shape(Everywhere(), Surface(20.0, (100.25, 0.0), (0.1, 0.0)), plain(0.8)),
    ]
    views = render_scene(Scene(32, 256, shapes, [np.zeros((256, 256, 4), np.uint8)]))
    assert np.array_equal(views.disparity[5] > 20.0, np.arange(256) > 100.25)
    assert np.array_equal(views.right_disparity[5] > 20.0, np.arange(256) > 80.25)


# --------------------------------------------------------------------------------------------------------------------
# geometry


@pytest.mark.parametrize("seed", range(8))
def test_the_right_view_inverts_the_surface(seed: int) -> None:
    rng = np.random.default_rng(seed)
    surface = Surface(
        40.0, (150.0, 60.0), tuple(rng.uniform(-0.3, 0.3, 2)), tuple(rng.uniform(-0.002, 0.002, 3)),
        rng.uniform(0, 5) * (seed % 2), tuple(rng.uniform(-0.05, 0.05, 2)), 1.0,
    ).fitted(100, 60, 100)  # fmt: skip
    u = torch.linspace(50, 250, 201)[None, :]
    v = torch.linspace(0, 120, 61)[:, None]
    d = surface.disparity(u, v)
    low, high = surface.bounds(100, 60)
    assert -1e-6 < low <= float(d.min())
    assert float(d.max()) <= high < 100 + 1e-6
    assert float((d[:, 1:] - d[:, :-1]).abs().max()) <= STEEPEST + 1e-3
    torch.testing.assert_close(surface.disparity_from_right(u - d, v.expand_as(d)), d, atol=2e-3, rtol=0)


@pytest.mark.parametrize(
    "silhouette",
    [
        Polygon(np.array([(20, 5), (60, 30), (40, 70), (35, 40), (10, 50)])),
        Blob((50, 40), (30, 12), 0.7),
        Blob((50, 40), (25, 20), 0.3, (0.2 + 0.1j, -0.15j, 0.1 + 0j)),
        Strand((50, 40), 30, 1.5, 0.6, 5.0, 0.3, 1.0),
        Combined(Blob((50, 40), (30, 30)), also=(Bars((50, 40), 0.3, (9, 7), 0.4),)),
        Combined(Blob((50, 40), (30, 30)), also=(Lace(((0.5, 0.1, 0.0), (-0.2, 0.4, 1.0)), 0.3),)),
    ],
    ids=lambda s: type(s).__name__,
)
def test_a_silhouette_lies_within_its_extent_and_reaches_for_it(silhouette: Silhouette) -> None:
    u, v = torch.meshgrid(torch.arange(-20, 130, 0.25), torch.arange(-20, 110, 0.25), indexing="xy")
    inside = silhouette.contains(u[:1], v[:, :1]).expand(u.shape)
    assert 0.005 < inside.float().mean() < 0.5
    left, top, right, bottom = silhouette.extent
    assert left <= float(u[inside].min())
    assert float(u[inside].max()) <= right
    assert top <= float(v[inside].min())
    assert float(v[inside].max()) <= bottom
    assert float(u[inside].max() - u[inside].min()) > 0.45 * (right - left)
    assert torch.equal(inside, silhouette.contains(u, v))  # full grids give the same as rows and columns


def test_polygon_agrees_with_the_winding_of_its_edges() -> None:
    square = Polygon(np.array([(1.0, 1.0), (3.0, 1.0), (3.0, 3.0), (1.0, 3.0)]))
    u, v = torch.meshgrid(torch.arange(0, 5) + 0.0, torch.arange(0, 5) + 0.0, indexing="xy")
    # half open borders: neighbouring polygons share no point and leave no gap
    assert square.contains(u, v).int().tolist() == [
        [0, 0, 0, 0, 0],
        [0, 1, 1, 0, 0],
        [0, 1, 1, 0, 0],
        [0, 0, 0, 0, 0],
        [0, 0, 0, 0, 0],
    ]


# --------------------------------------------------------------------------------------------------------------------
# determinism


def test_same_seed_same_bytes_in_another_process() -> None:
    code = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "import hashlib, numpy as np, torch; torch.set_num_threads(1)\n"
        "from fa_stereo.config import RenderConfig\nfrom fa_stereo.data.rendered import render_pair\n"
        "s = render_pair(RenderConfig(height=96, width=224, seed=3), 5)\n"
        "h = hashlib.sha256(s.name.encode())\n"
        "for n in ('left', 'right', 'disparity', 'right_disparity', 'occluded'):\n"
        "    h.update(np.ascontiguousarray(getattr(s, n)).tobytes())\n"
        "print(h.hexdigest())\n"
    )
    import fa_stereo

    root = str(next(iter(fa_stereo.__path__))).removesuffix("/fa_stereo")
    result = subprocess.run([sys.executable, "-c", code, root], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == digest(render_pair(SMALL, 5))


def test_workers_do_not_change_samples() -> None:
    dataset = RenderedPairs(dataclasses.replace(SMALL, samples=4, height=48, width=96))
    alone, shared = (
        [digest(s) for s in DataLoader(dataset, batch_size=None, num_workers=workers)] for workers in (0, 2)
    )
    assert alone == shared
    assert len(set(alone)) == 4


def test_seeds_and_indices_differ_and_names_tell() -> None:
    first, second = render_pair(SMALL, 0), render_pair(SMALL, 1)
    other = render_pair(dataclasses.replace(SMALL, seed=4), 0)
    assert not np.array_equal(first.left, second.left)
    assert not np.array_equal(first.left, other.left)
    assert (first.name, other.name) == ("rendered/3/000000", "rendered/4/000000")


def test_global_random_state_is_neither_used_nor_touched() -> None:
    np.random.seed(1)  # noqa: NPY002 - the legacy global state is what must stay untouched
    before = np.random.get_state()[1].copy()  # noqa: NPY002
    state = torch.get_rng_state()
    render_pair(SMALL, 2)
    assert np.array_equal(before, np.random.get_state()[1])  # noqa: NPY002
    assert torch.equal(state, torch.get_rng_state())


def test_dataset_fills_every_field_and_ends() -> None:
    dataset = RenderedPairs(dataclasses.replace(SMALL, samples=2))
    assert len(dataset) == 2
    s = dataset[1]
    assert s.left.shape == s.right.shape == (96, 224, 3)
    assert s.left.dtype == np.uint8
    assert s.occluded is not None
    assert s.occluded.dtype == np.bool_
    assert s.occluded.shape == s.disparity.shape == s.right_disparity.shape == (96, 224)
    with pytest.raises(IndexError):
        dataset[2]
    with pytest.raises(ValueError, match="negative"):
        render_pair(SMALL, -1)


def test_odd_and_tiny_sizes_render() -> None:
    for height, width in ((16, 16), (33, 71)):
        s = render_pair(RenderConfig(height=height, width=width), 0)
        assert s.disparity.shape == (height, width)


@needs_gpu
def test_the_gpu_renders_the_same_scene() -> None:
    ours, theirs = render_pair(PERFECT, 1), render_pair(PERFECT, 1, device="cuda")
    assert np.quantile(np.abs(ours.disparity - theirs.disparity), 0.995) < 1e-2
    assert np.abs(ours.left.astype(int) - theirs.left).mean() < 0.2
    assert (ours.occluded != theirs.occluded).mean() < 0.01


# --------------------------------------------------------------------------------------------------------------------
# pictures


@pytest.mark.parametrize("slope", [(0.5, 0.0), (-0.6, 0.2), (0.1, -0.5)])
def test_both_views_filter_textures_by_their_own_pixels(slope: tuple[float, float]) -> None:
    """The right view of a plane is the left view of the plane's mirror image, seen from the other side."""
    height, width = 48, 64
    rng = np.random.default_rng(6)
    texture = rng.integers(0, 256, (256, 256, 4), dtype=np.uint8)
    color = np.concatenate([np.eye(3), np.zeros((3, 1))], axis=1)
    center, value = (40.0, 20.0), 30.0
    along_u, along_v = slope
    # where the left view sees (u, v), mirrored, the mirrored right one stands: u' = last - x, x = u - d(u, v), and so
    # u = (x + offset + along_v v) / (1 - along_u), d = u - x
    last = width - 1.0
    offset = value - along_u * center[0] - along_v * center[1]
    gain = 1 / (1 - along_u)
    u_from = np.array([gain * (last + offset), -gain, gain * along_v])  # coefficients of (1, u', v)
    d_from = u_from - np.array([last, -1.0, 0.0])
    axes = np.array([[3.0, 70.0, -20.0], [-5.0, 30.0, 60.0]])
    mirrored_axes = axes[:, :1] * [1.0, 0.0, 0.0] + axes[:, 1:2] * u_from + axes[:, 2:] * [0.0, 0.0, 1.0]

    def view(axes: np.ndarray, surface: Surface) -> Scene:
        look = dataclasses.replace(plain(0.5), axes=axes, offset=np.array([7.3, 1.2]), color=color)
        return Scene(height, width, [Shape(Everywhere(), surface, look)], [texture])

    scene = view(axes, Surface(value, center, slope))
    mirrored = view(mirrored_axes, Surface(float(d_from[0]), (0.0, 0.0), (float(d_from[1]), float(d_from[2]))))
    found, expected = render_scene(scene), render_scene(mirrored)
    np.testing.assert_allclose(found.right_disparity, expected.disparity[:, ::-1], atol=1e-3)
    assert found.right.std() > 0.02
    np.testing.assert_allclose(found.right, expected.left[:, ::-1], atol=5e-3)


def test_perfect_cameras_take_noise_free_pictures() -> None:
    s = render_pair(PERFECT, 0)
    loud = dataclasses.replace(PERFECT, noise=0.5, gain=0.9, blur=5.0, gamma=1.0, tint=0.5, vertical_shift=2.0)
    assert digest(render_pair(loud, 0)) == digest(s)
    off = dict.fromkeys(("gain", "gamma", "tint", "noise", "blur", "vertical_shift"), 0.0)
    all_off = dataclasses.replace(PERFECT, asymmetry_probability=1.0, **off)
    assert digest(render_pair(all_off, 0)) == digest(s)


@pytest.mark.parametrize("name", ["gain", "gamma", "tint", "noise", "blur", "vertical_shift"])
def test_camera_differences_change_pictures_only(name: str) -> None:
    off = dict.fromkeys(("gain", "gamma", "tint", "noise", "blur", "vertical_shift"), 0.0)
    perfect = dataclasses.replace(SMALL, grayscale=0.0, asymmetry_probability=1.0, **off)
    reference = render_pair(perfect, 0)
    s = render_pair(dataclasses.replace(perfect, **{name: getattr(SMALL, name) or 0.1}), 0)
    assert not np.array_equal(s.right, reference.right)
    assert np.array_equal(s.left, reference.left) == (name not in ("noise", "blur"))
    assert np.array_equal(s.disparity, reference.disparity)
    assert np.array_equal(s.right_disparity, reference.right_disparity)
    assert np.array_equal(s.occluded, reference.occluded)
    assert np.abs(s.right.astype(int) - reference.right).mean() < 40


def test_vertical_shift_moves_rows_by_the_amount_drawn() -> None:
    rows = np.arange(64, dtype=np.float32)[:, None, None]
    view = np.broadcast_to(0.4 + 0.2 * np.sin(rows / 5), (64, 40, 3)).astype(np.float32)
    config = RenderConfig(
        gain=0, gamma=0, tint=0, noise=0, blur=0, vertical_shift=1.5, asymmetry_probability=1, grayscale=0
    )
    shifts = []
    for seed in range(20):
        left, right = photograph(config, view, view, np.random.default_rng(seed))
        left_contrast = np.ptp(left[:, 20, 0].astype(float))
        # phase of the sine, by projection on its quadrature components
        column = right[5:-5, 20, 0] - left[:, 20, 0].mean()
        wave = rows[5:-5, 0, 0] / 5
        basis = np.stack([np.sin(wave), np.cos(wave), np.ones_like(wave)], axis=-1)
        a, b, _ = np.linalg.lstsq(basis, column, rcond=None)[0]
        assert math.hypot(a, b) == pytest.approx(left_contrast / 2, rel=0.03)
        shifts.append(5 * math.atan2(b, a))
    assert max(map(abs, shifts)) <= 1.55
    assert np.std(shifts) > 0.3


def test_difficulty_is_a_curriculum() -> None:
    def spread(difficulty: float) -> tuple[float, float]:
        config = dataclasses.replace(SMALL, difficulty=difficulty, height=64, texture_maps=2)
        samples = [render_pair(config, i) for i in range(16)]
        edges = [np.mean(np.abs(np.diff(s.disparity, axis=1)) > 1) for s in samples]
        return float(np.mean([s.disparity.max() for s in samples])), float(np.mean(edges))

    easy, hard = spread(0.0), spread(1.0)
    assert easy[0] < 50 < hard[0]
    assert easy[1] < hard[1]
    scene = random_scene(dataclasses.replace(SMALL, difficulty=0.0, groups=0.0), np.random.default_rng(0))
    assert not any(isinstance(shape.silhouette, Strand | Combined) for shape in scene.shapes)
    config = dataclasses.replace(SMALL, difficulty=0.0, asymmetry_probability=1.0)
    perfect = dataclasses.replace(config, asymmetry_probability=0.0)
    assert digest(render_pair(config, 0)) == digest(render_pair(perfect, 0))


def test_scenes_are_textured_and_varied() -> None:
    config = dataclasses.replace(SMALL, grayscale=0.0)
    samples = [render_pair(config, i) for i in range(12)]
    contrast = np.array([s.left.std() for s in samples])
    assert np.median(contrast) > 25
    assert np.ptp([s.left.mean() for s in samples]) > 30
    gray = render_pair(dataclasses.replace(PERFECT, grayscale=1.0), 0)
    assert np.array_equal(gray.left[..., 0], gray.left[..., 1])
    assert np.array_equal(gray.left[..., 0], gray.left[..., 2])


def test_maps_have_natural_spectra() -> None:
    slopes = []
    for seed in range(12):
        texture = random_map(np.random.default_rng(seed), 256, weak=0.0, repetition=0.0, glyphs=0.0)
        assert texture.shape == (256, 256, 4)
        assert texture.dtype == np.uint8
        luminance = texture[..., :3].mean(axis=-1)
        power = np.abs(np.fft.fft2(luminance - luminance.mean())) ** 2
        frequency = np.hypot(*np.meshgrid(np.fft.fftfreq(256), np.fft.fftfreq(256))) * 256
        rings = [power[(frequency >= f) & (frequency < 2 * f)].mean() for f in (2, 4, 8, 16, 32)]
        slopes.append(np.polyfit(np.log2([2, 4, 8, 16, 32]), np.log2(rings), 1)[0])
    # power of natural pictures falls as 1/f^2, with scatter
    assert -3.2 < np.mean(slopes) < -1.0
    white = random_map(np.random.default_rng(0), 256, weak=0.0, repetition=0.0, glyphs=0.0, natural=0.0)
    neighbours = np.corrcoef(white[:, :-1, 0].ravel(), white[:, 1:, 0].ravel())[0, 1]
    assert abs(neighbours) < 0.02


@pytest.mark.parametrize("draw", sorted({*_NATURAL, *_PATTERNS, _glyphs, _weak}, key=lambda kind: kind.__name__))
def test_maps_are_periodic(draw: Callable[[np.random.Generator, int], np.ndarray]) -> None:
    """The step from the last row (column) to the first is like the steps between neighbours, and no border."""
    steps, seams = [], []
    for seed in range(30):
        picture = draw(np.random.default_rng(seed), 128)
        for axis in (0, 1):
            step = np.abs(np.roll(picture, -1, axis=axis) - picture).mean(axis=(1 - axis, 2))  # [128]
            steps.append(np.sort(step)[-8:-1].mean() if draw in _PATTERNS else step[:-1].mean())
            seams.append(step[-1])
    assert np.mean(seams) < 1.1 * np.mean(steps)


def test_ingredients_can_be_switched_off() -> None:
    frontal = dataclasses.replace(SMALL, slant=0.0, curvature=0.0, rooms=0.0, groups=0.0, thin=0.0, wide_range=0.0)
    for seed in range(10):
        for shape in random_scene(frontal, np.random.default_rng(seed)).shapes:
            assert shape.surface.slope == (0, 0)
            assert shape.surface.curve == (0, 0, 0)
            assert shape.surface.ripple == 0
            assert not isinstance(shape.silhouette, Strand)
            assert shape.surface.value <= 80
    rooms = dataclasses.replace(frontal, rooms=1.0)
    for seed in range(10):
        walls = [
            s for s in random_scene(rooms, np.random.default_rng(seed)).shapes if isinstance(s.silhouette, Everywhere)
        ]
        assert len(walls) > 1


def test_plain_surfaces_show_next_to_no_texture() -> None:
    usual, textureless = (
        random_scene(dataclasses.replace(SMALL, plain=share), np.random.default_rng(5)) for share in (0.0, 1.0)
    )
    assert max(np.abs(s.appearance.color).max() for s in usual.shapes) > 0.3
    assert max(np.abs(s.appearance.color).max() for s in textureless.shapes) < 0.1
    ideal = {"noise": 0.0, "shading": 0.0, "gloss": 0.0, "haze": 0.0, "asymmetry_probability": 0.0}
    wall = dataclasses.replace(SMALL, **ideal, plain=1.0, min_shapes=1, max_shapes=1, rooms=0.0)
    steps = [np.abs(np.diff(render_pair(wall, index).left.astype(int), axis=1)) for index in range(4)]
    assert np.mean([np.mean(step <= 1) for step in steps]) > 0.95  # but for the object's border


def test_soft_shadows_lie_on_the_surface() -> None:
    look = dataclasses.replace(plain(0.5), shadows=((0.2, 0.05, 0.02, 1.0), (-0.1, 0.01, 0.07, 2.0)))
    scene = Scene(64, 128, [Shape(Everywhere(), Surface(16.0), look)], [np.full((256, 256, 4), 128, np.uint8)])
    views = render_scene(scene)
    v, u = np.mgrid[:64, :128]
    light = 1 + 0.2 * np.sin(0.05 * u + 0.02 * v + 1.0) - 0.1 * np.sin(0.01 * u + 0.07 * v + 2.0)
    np.testing.assert_allclose(views.left[..., 0], 0.5 * light, atol=1e-5)
    np.testing.assert_allclose(views.right[:, :-16], views.left[:, 16:], atol=1e-5)
    # beside a surface without shadows; and as scenes draw them
    scene.shapes.append(Shape(Blob((20.0, 30.0), (8.0, 8.0)), Surface(20.0), plain(0.25)))
    assert render_scene(scene).left[30, 20, 0] == pytest.approx(0.25, abs=1e-5)
    waves = {}
    for strength in (1.0, 3.0):
        drawn = random_scene(dataclasses.replace(SMALL, shadows=strength), np.random.default_rng(5))
        waves[strength] = np.array([shape.appearance.shadows for shape in drawn.shapes])  # [shapes, 2, 4]
        assert (np.hypot(waves[strength][..., 1], waves[strength][..., 2]) <= 2 * np.pi / 8 + 1e-9).all()
    np.testing.assert_allclose(waves[3.0][..., 0], 3 * waves[1.0][..., 0])
    assert 0.05 < waves[1.0][..., 0].std() < 0.15
    assert not any(s.appearance.shadows for s in random_scene(SMALL, np.random.default_rng(5)).shapes)


@pytest.mark.parametrize("enclosed", [0.0, 0.5, 1.0])
def test_enclosed_scenes_end_at_a_wall(enclosed: float) -> None:
    config = dataclasses.replace(SMALL, enclosed=enclosed)
    shares = np.array([b.farthest / b.nearest for b in (_SceneBuilder(config, np.random.default_rng(s))
                                                        for s in range(300))])  # fmt: skip
    assert (shares <= 0.7 + 1e-9).all()
    near = np.mean(shares >= 0.15 - 1e-9)
    assert abs(near - (0.53 + 0.47 * enclosed)) < (0.1 if enclosed < 1 else 1e-9)


def test_options_that_are_off_draw_the_scenes_of_earlier_versions() -> None:
    scene = random_scene(dataclasses.replace(SMALL, seed=3), np.random.default_rng(5))
    first, last = scene.shapes[0], scene.shapes[-1]
    found = [len(scene.shapes), first.surface.value, *first.appearance.light, last.surface.value, *last.appearance.bias]
    # of the version before shadows and enclosed scenes came
    earlier = [68, 0.001, 0.9793514, -0.001057526, 0.00289774, 0.4152052, 0.5549563, 0.5549563, 0.5549563]
    np.testing.assert_allclose(found, earlier, rtol=1e-5)


# --------------------------------------------------------------------------------------------------------------------
# configuration


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"height": 8}, "rendered.height must be at least 16"),
        ({"width": 0}, "rendered.width must be positive"),
        ({"seed": -1}, "rendered.seed"),
        ({"difficulty": 1.5}, "rendered.difficulty must be from 0 to 1"),
        ({"min_shapes": 5, "max_shapes": 4}, "max_shapes"),
        ({"noise": -0.1}, "rendered.noise"),
        ({"shadows": -1.0}, "rendered.shadows"),
        ({"enclosed": 1.1}, "rendered.enclosed must be from 0 to 1"),
        ({"gain": 1.0}, "rendered.gain"),
        ({"vertical_shift": 3.0}, "at most 2"),
    ],
)
def test_unusable_values_are_refused(values: dict[str, float], message: str) -> None:
    with pytest.raises(InputError, match=message):
        RenderConfig(**values)


@pytest.mark.parametrize(
    "values",
    [
        {"thin": 1.0, "groups": 0.0},
        {"thin": 0.0, "groups": 1.0},
        {"thin": 0.0, "groups": 0.0, "holes": 1.0},
        {"slant": 0.0, "curvature": 0.0},
        {"slant": 3.0, "curvature": 4.0},
        {"weak_texture": 1.0},
        {"plain": 1.0},
        {"shadows": 3.0, "enclosed": 1.0},
        {"weak_texture": 0.0, "repetition": 1.0},
        {"weak_texture": 0.0, "repetition": 0.0, "glyphs": 1.0},
        {"gloss": 1.0, "haze": 1.0},
        {"texture_maps": 1},
        {"max_disparity": 8.0},
        {"wide_range": 1.0, "rooms": 1.0, "natural_texture": 0.0},
    ],
)
def test_every_ingredient_renders_alone(values: dict[str, float]) -> None:
    config = dataclasses.replace(SMALL, height=48, width=96, **values)
    for index in range(3):
        s = render_pair(config, index)
        assert np.isfinite(s.disparity).all()
        assert s.disparity.max() <= config.max_disparity


def test_a_gpu_that_is_not_there_is_named() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(InputError, match=r"rendered\.device is cuda, but PyTorch sees no GPU"):
        RenderedPairs(RenderConfig(device="cuda"))
    assert RenderedPairs(RenderConfig(device="auto")).device == "cpu"
