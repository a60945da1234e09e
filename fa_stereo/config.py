"""Every configurable thing as a dataclass: each field documented and validated, standard library only.

The dataclasses are the schema of the YAML files in ``conf/`` (converted once, in ``fa_stereo.cli``) and the public
way to configure the library from Python. A model configuration is stored, as plain data, inside every checkpoint.

Examples:
    >>> ModelConfig().max_disparity
    192
    >>> ModelConfig(max_disparity=100)
    Traceback (most recent call last):
        ...
    fa_stereo.errors.InputError: max_disparity must be a positive multiple of 16, got 100; use 96 or 112
"""

from __future__ import annotations

import dataclasses
import math
import re
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

from fa_stereo.errors import InputError

ATTENTION_KINDS = ("none", "factorized", "non_local", "axial", "resblock", "resblock_bottleneck")
ATTENTION_SLOTS = ("res1", "res2", "res3", "res4", "pyramid")
ATTENTION_NORMALIZATIONS = ("gaussian", "dot")
ATTENTION_COMPUTATIONS = ("materialized", "chunked", "fused")
AGGREGATIONS = ("stacked_hourglass", "basic")
REGRESSIONS = ("expectation", "modal")
NETWORK_PADDINGS = ("zeros", "replicate")
PREDICTION_SETTINGS = ("regression", "padding", "halve_from_px", "enlarge_below_px")
"""Keys of ``ModelConfig`` that say how weights predict, and not what they are: no training depends on them."""
PRECISIONS = ("fp32", "bf16", "fp16")
INFERENCE_PRECISIONS = (*PRECISIONS, "mixed")
SCENE_FLOW_SETS = ("flyingthings3d", "monkaa", "driving")
SCENE_FLOW_LAYOUTS = ("official", "psmnet", "merged")
SCENE_FLOW_PASSES = ("clean", "final", "both")


def _check_choice(name: str, value: object, choices: tuple[object, ...]) -> None:
    if value not in choices:
        raise InputError(f"{name} must be one of {', '.join(map(str, choices))}, got {value!r}")


def _check_positive(name: str, value: float | int | None, *, zero: bool = False, none: bool = False) -> None:
    if value is None:
        if none:
            return
        raise InputError(f"{name} must be given")
    if not 0 <= value < math.inf or (value == 0 and not zero):  # NaN is not, either
        raise InputError(f"{name} must be {'zero or more' if zero else 'positive'}, got {value}")


def _check_seed(name: str, value: int) -> None:
    if not 0 <= value < 2**32:
        raise InputError(f"{name} must be from 0 to {2**32 - 1}, got {value}")


# --------------------------------------------------------------------------------------------------------------------
# the network


@dataclass
class AttentionConfig:
    """One attention block on a feature map [B, C, H, W] (paper, section 3; defaults are the paper's).

    Attributes:
        kind: Mechanism; ``none`` leaves the slot empty. ``factorized`` is the paper's subject, ``non_local`` the
            conventional attention it is compared with, ``axial`` Axial-DeepLab's position-sensitive axial attention,
            ``resblock`` and ``resblock_bottleneck`` the convolutional baselines of the paper's tables 9 and 10.
        normalization: ``gaussian`` (softmax, paper eq. 4 and 9) or ``dot`` (scaling by 1/b, eq. 3 and 6).
        key_channels: b, the number of basis masks (factorized); k, the query and key channels (the others).
        value_channels: m of the value bottleneck (FA-bot, CA-bot), reprojected to c; None keeps V at c channels, not
            reprojected. For ``axial`` None is c, for ``resblock_bottleneck`` c/2.
        heads: h modules in parallel, each with b/h and m/h channels, concatenated (paper eq. 5).
        transformer: Follow the attention by a pointwise feed-forward layer, both residual (FA-Tfm, CA-Tfm); then V is
            always reprojected.
        feed_forward_channels: Hidden channels of that layer; None is c, as the paper's costs have it.
        computation: How ``non_local`` is computed: ``materialized`` stores the map of N x N positions as the paper
            did, ``chunked`` a few rows of it at a time, ``fused`` never (scaled_dot_product_attention; gaussian only).
        span: Window of the axial attention in positions; None attends to whole rows and columns.
        reach: For ``span`` None, the largest offset between positions with position vectors of its own in ``axial``.
    """

    kind: str = "factorized"
    normalization: str = "gaussian"
    key_channels: int = 64
    value_channels: int | None = None
    heads: int = 1
    transformer: bool = False
    feed_forward_channels: int | None = None
    computation: str = "materialized"
    span: int | None = None
    reach: int = 64

    def __post_init__(self) -> None:
        _check_choice("attention.kind", self.kind, ATTENTION_KINDS)
        _check_choice("attention.normalization", self.normalization, ATTENTION_NORMALIZATIONS)
        _check_choice("attention.computation", self.computation, ATTENTION_COMPUTATIONS)
        _check_positive("attention.key_channels", self.key_channels)
        _check_positive("attention.value_channels", self.value_channels, none=True)
        _check_positive("attention.heads", self.heads)
        _check_positive("attention.feed_forward_channels", self.feed_forward_channels, none=True)
        _check_positive("attention.span", self.span, none=True)
        _check_positive("attention.reach", self.reach)
        if self.key_channels % self.heads:
            raise InputError(
                f"attention.key_channels ({self.key_channels}) must be divisible by attention.heads ({self.heads})"
            )
        if self.value_channels is not None and self.value_channels % self.heads:
            raise InputError(
                f"attention.value_channels ({self.value_channels}) must be divisible by attention.heads ({self.heads})"
            )
        if self.span is not None and self.span % 2 == 0:
            raise InputError(f"attention.span must be odd (a window around its position), got {self.span}")
        if self.kind == "non_local" and self.computation == "fused" and self.normalization == "dot":
            raise InputError(
                "attention.computation=fused computes a softmax and cannot be combined with "
                "attention.normalization=dot; use attention.kind=factorized, the same function at linear cost"
            )
        if self.kind == "axial" and self.normalization == "dot":
            raise InputError("attention.kind=axial needs a softmax: use attention.normalization=gaussian")
        if self.transformer and self.kind in ("resblock", "resblock_bottleneck"):
            raise InputError(f"attention.transformer needs an attention, attention.kind={self.kind} is a convolution")


@dataclass
class ModelConfig:
    """PSMNet with attention slots. The defaults are FA-PSMNet as in the paper.

    Attributes:
        aggregation: ``stacked_hourglass`` (three supervised outputs) or ``basic`` (one), as in PSMNet.
        base_channels: Width of the first convolution and of the matching features; PSMNet has 32, the small model 16.
        max_disparity: D, exclusive, in pixels; a multiple of 16 (quarter resolution, then two halvings).
        align_corners: Convention of every bilinear and trilinear upsampling. It belongs to the weights: wrong, it
            costs 0.6 to 0.9 px. True for PSMNet weights trained before PyTorch 0.4, False for later ones.
        regression: How disparity is predicted from its probabilities: by the ``expectation`` over all of the range as
            in PSMNet, or ``modal``, by that around the most probable value, which does not mix two surfaces at an
            edge. Training is by the expectation either way.
        padding: What pictures whose sides are no multiples of 16 px are padded with, at the top and the right:
            ``zeros`` (the mean colour of ImageNet) as in PSMNet's evaluation, or ``replicate``, their border repeated.
        halve_from_px: In prediction, pictures of at least so many pixels are scored at half their size too, and their
            halves likewise; those scores count where the larger one's are less sure (see ``fa_stereo.models.halving``),
            for about a quarter more time. 0 never does.
        enlarge_below_px: In prediction, pictures of fewer pixels than this are predicted at one and a half times their
            size too, and both are merged (see ``fa_stereo.models.two_sizes``), in three times the time; 0 never does.
        attention: The attention block put into every slot named in ``attention_slots``.
        attention_slots: Where blocks sit: after ``res1`` .. ``res4`` (PSMNet's layer1 .. layer4), or after the
            ``pyramid`` pooling's fusion.
    """

    aggregation: str = "stacked_hourglass"
    base_channels: int = 32
    max_disparity: int = 192
    align_corners: bool = False
    regression: str = "expectation"
    padding: str = "zeros"
    halve_from_px: int = 0
    enlarge_below_px: int = 0
    attention: AttentionConfig = field(default_factory=AttentionConfig)
    attention_slots: list[str] = field(default_factory=lambda: ["res4"])

    def __post_init__(self) -> None:
        _check_choice("model.aggregation", self.aggregation, AGGREGATIONS)
        _check_positive("model.base_channels", self.base_channels)
        if self.base_channels % 4:
            raise InputError(f"model.base_channels must be a multiple of 4, got {self.base_channels}")
        if self.max_disparity <= 0 or self.max_disparity % 16:
            below = max(16, self.max_disparity // 16 * 16)
            raise InputError(
                f"max_disparity must be a positive multiple of 16, got {self.max_disparity}; "
                f"use {below} or {below + 16}"
            )
        _check_choice("model.regression", self.regression, REGRESSIONS)
        _check_choice("model.padding", self.padding, NETWORK_PADDINGS)
        _check_positive("model.halve_from_px", self.halve_from_px, zero=True)
        _check_positive("model.enlarge_below_px", self.enlarge_below_px, zero=True)
        self.attention_slots = list(self.attention_slots)
        for slot in self.attention_slots:
            _check_choice("model.attention_slots", slot, ATTENTION_SLOTS)
        if len(set(self.attention_slots)) != len(self.attention_slots):
            raise InputError(f"model.attention_slots names a slot twice: {self.attention_slots}")


# --------------------------------------------------------------------------------------------------------------------
# data


@dataclass
class SceneFlowConfig:
    """Which Scene Flow frames to read, for ``DatasetConfig.kind == "scene_flow"``.

    Attributes:
        layout: ``auto`` detects ``official``, ``psmnet`` or ``merged`` (GwcNet's and IGEV's).
        passes: ``clean``, ``final`` or ``both``.
        sets: Any of flyingthings3d, monkaa, driving. The TEST split has flyingthings3d only.
        right_disparity: Read the right view's disparity too (needed by the flip augmentation).
        unused_files: Text file listing FlyingThings3D frames to leave out (``all_unused_files.txt``); None reads all.
        cache_index: Keep the list of frames in a file beside the data (or in the user's cache folder).
    """

    layout: str = "auto"
    passes: str = "clean"
    sets: list[str] = field(default_factory=lambda: list(SCENE_FLOW_SETS))
    right_disparity: bool = False
    unused_files: str | None = None
    cache_index: bool = True

    def __post_init__(self) -> None:
        _check_choice("scene_flow.layout", self.layout, ("auto", *SCENE_FLOW_LAYOUTS))
        _check_choice("scene_flow.passes", self.passes, SCENE_FLOW_PASSES)
        self.sets = list(self.sets)
        for name in self.sets:
            _check_choice("scene_flow.sets", name, SCENE_FLOW_SETS)
        if not self.sets:
            raise InputError(f"scene_flow.sets is empty: name at least one of {', '.join(SCENE_FLOW_SETS)}")


@dataclass
class RenderConfig:
    """Procedural stereo pairs (layered dead leaves), for ``DatasetConfig.kind == "rendered"`` and ``fa-stereo render``.

    The ingredients of a scene are shares and strengths that can be switched off one by one (0), to see what each is
    worth. The differences between the two cameras change pictures, never ground truth; each is applied to a pair
    with ``asymmetry_probability``, independently, with a strength drawn up to the value given.

    Attributes:
        height: Picture height in pixels.
        width: Picture width in pixels.
        samples: Number of pairs in one epoch (or to write).
        seed: Sample i of seed s is always the same picture, whatever the number of workers.
        max_disparity: Largest disparity drawn, in pixels. Most scenes stay within 5 to 80 px; one in eight uses more
            than 60 % of the range.
        difficulty: From 0 (few smooth shapes, up to 40 px or 30 % of the range, no thin structures, holes or weak
            or no texture, equal cameras) to 1 (everything below in full): for a curriculum.
        min_shapes: Fewest objects besides the background.
        max_shapes: Most objects besides the background; log-uniform in between. A group counts as one.
        wide_range: Share of scenes whose nearest disparity is drawn evenly up to 130 px, or for a third of them from 60
            to 100 % of the maximum, instead of mostly small up to 80 px.
        enclosed: Share of scenes that end at a wall of 15 to 70 % of the nearest disparity, as on a table or in a small
            room; the others may reach far. 0 draws the same scenes as versions without this option.
        rooms: Probability that the back wall gets a ground, and perhaps side walls and a ceiling.
        slant: Strength of the slant of surfaces; 1 reaches 70 degrees. Rooms and boxes have their own.
        curvature: Strength of the curvature and ripple of surfaces.
        thin: Share of objects that are sticks, poles and wires. Plants, which are groups, have their twigs besides.
        groups: Share of objects made of several parts: boxes, clusters, plants.
        holes: Probability that a shape is perforated: rings, frames, fences, lace.
        texture_maps: Texture maps drawn for each scene, shared by its shapes in different dress.
        natural_texture: Of maps that are neither weak nor repetitive nor text, the share with the statistics of
            natural pictures; the rest is white noise.
        weak_texture: Probability of (nearly) uniform maps and shapes.
        plain: Probability that a surface has next to no texture, as painted walls and plastic: what is left to see are
            its light and its borders. 0 draws the same scenes as versions without this option.
        repetition: Probability of a repetitive map: stripes, checkers, bricks, cloth.
        glyphs: Probability of a map with text-like marks.
        shading: Strength of illumination gradients over a shape.
        shadows: Strength of soft shadows: light that also varies to and fro over a shape. 0 draws the same scenes as
            versions without this option.
        gloss: Probability of a glossy spot on a shape, which each view sees at another place.
        haze: Probability of haze, which takes contrast from what is far.
        grayscale: Probability that both pictures are grey, as of a monochrome camera.
        asymmetry_probability: Probability of each of the camera differences below; 0 leaves both cameras perfect.
        gain: Largest relative difference of exposure.
        gamma: Largest log difference of the response curves.
        tint: Largest relative difference of a colour channel.
        noise: Largest standard deviation of sensor noise at full brightness, of the range 0 to 1 (half of it in the
            dark: shot and read noise).
        blur: Largest standard deviation of the defocus in pixels, drawn for each view.
        vertical_shift: Largest vertical shift of the right picture in pixels (imperfect rectification), partly
            varying along the rows as by a small roll.
        device: Where the loader's processes compute visibility and shading: ``cpu``, ``cuda``, or ``auto`` (the GPU
            where there is one). The scenes are the same; a GPU may round the last bit of a colour differently.
    """

    height: int = 256
    width: int = 512
    samples: int = 10000
    seed: int = 0
    max_disparity: float = 192.0
    difficulty: float = 1.0
    min_shapes: int = 10
    max_shapes: int = 60
    wide_range: float = 0.4
    enclosed: float = 0.0
    rooms: float = 0.55
    slant: float = 1.0
    curvature: float = 1.0
    thin: float = 0.15
    groups: float = 0.2
    holes: float = 0.15
    texture_maps: int = 7
    natural_texture: float = 1.0
    weak_texture: float = 0.12
    plain: float = 0.0
    repetition: float = 0.2
    glyphs: float = 0.1
    shading: float = 1.0
    shadows: float = 0.0
    gloss: float = 0.08
    haze: float = 0.15
    grayscale: float = 0.15
    asymmetry_probability: float = 0.5
    gain: float = 0.2
    gamma: float = 0.2
    tint: float = 0.06
    noise: float = 0.03
    blur: float = 0.9
    vertical_shift: float = 0.6
    device: str = "cpu"

    def __post_init__(self) -> None:
        _check_choice("rendered.device", self.device, ("cpu", "cuda", "auto"))
        for name in ("height", "width", "samples", "max_disparity", "min_shapes", "texture_maps"):
            _check_positive(f"rendered.{name}", getattr(self, name))
        for name in ("height", "width"):
            if getattr(self, name) < 16:
                raise InputError(f"rendered.{name} must be at least 16 pixels, got {getattr(self, name)}")
        _check_seed("rendered.seed", self.seed)
        if self.max_shapes < self.min_shapes:
            raise InputError(
                f"rendered.max_shapes ({self.max_shapes}) must not be below rendered.min_shapes ({self.min_shapes})"
            )
        for name in ("difficulty", "thin", "groups", "holes", "weak_texture", "plain", "repetition", "glyphs",
                     "gloss", "haze", "grayscale", "asymmetry_probability", "wide_range", "enclosed", "rooms",
                     "natural_texture"):  # fmt: skip
            if not 0 <= getattr(self, name) <= 1:
                raise InputError(f"rendered.{name} must be from 0 to 1, got {getattr(self, name)}")
        for name in ("slant", "curvature", "shading", "shadows", "gain", "gamma", "tint", "noise", "blur",
                     "vertical_shift"):  # fmt: skip
            _check_positive(f"rendered.{name}", getattr(self, name), zero=True)
        if self.gain >= 1:
            raise InputError(f"rendered.gain must be below 1, got {self.gain}")
        if self.vertical_shift > 2:
            raise InputError(f"rendered.vertical_shift must be at most 2 pixels, got {self.vertical_shift}")


@dataclass
class DatasetConfig:
    """One source of stereo pairs.

    Attributes:
        kind: scene_flow, rendered, kitti2012, kitti2015, middlebury2014, middlebury2006, middlebury_v2, eth3d or
            pairs (people's own: see data/README.md).
        root: Folder of the data; unused by ``rendered``.
        split: ``train`` or ``test``; ``validation`` where the data set has one (KITTI); ``all`` for all pairs with
            ground truth: Scene Flow's train and test, KITTI's train and validation, ``train`` of ETH3D and Middlebury
            2014. Data sets without splits give all their pairs.
        resolution: Which size of Middlebury to read where several are there: ``quarter``, ``third``, ``half`` or
            ``full``; None takes the only one.
        limit: Use only the first n pairs; None uses all.
        scene_flow: Options of ``scene_flow``.
        rendered: Options of ``rendered``.
    """

    kind: str = "rendered"
    root: str | None = None
    split: str = "train"
    resolution: str | None = None
    limit: int | None = None
    scene_flow: SceneFlowConfig = field(default_factory=SceneFlowConfig)
    rendered: RenderConfig = field(default_factory=RenderConfig)

    def __post_init__(self) -> None:
        _check_choice("kind", self.kind, DATASET_KINDS)
        _check_choice("split", self.split, ("train", "validation", "all", "test"))
        _check_choice("resolution", self.resolution, (None, "quarter", "third", "half", "full"))
        _check_positive("limit", self.limit, none=True)

    @property
    def lacks_root(self) -> bool:
        """Whether the folder that it needs is not given."""
        return self.kind != "rendered" and self.root is None


DATASET_KINDS = (
    "scene_flow",
    "rendered",
    "kitti2012",
    "kitti2015",
    "middlebury2014",
    "middlebury2006",
    "middlebury_v2",
    "eth3d",
    "pairs",
)


@dataclass
class AugmentationConfig:
    """Random changes of a training sample; all off, as in the paper's recipe.

    Attributes:
        crop_height: Height of the random training crop in pixels, a multiple of 16 (PSMNet: 256).
        crop_width: Width of the random training crop in pixels, a multiple of 16 (PSMNet: 512).
        color: Strength of brightness, contrast, gamma and saturation changes; 0 is off, 1 is usual.
        asymmetric_color: Probability that ``color`` changes the two views differently; without ``color`` no effect.
        right_occluder: Probability of painting rectangles of mean colour into the right view.
        scale: Largest log2 of the random scale; 0 is off, 0.4 is usual. Disparity scales with the width.
        stretch: Largest log2 of the random horizontal stretch; 0 is off, 0.2 is usual.
        scale_probability: Probability of scaling or stretching a sample at all.
        vertical_jitter: Largest vertical shift of the right view in pixels (imperfect rectification); 0 is off.
        horizontal_flip: Probability of mirroring both views and swapping them (needs right disparity).
        vertical_flip: Probability of turning both views upside down.
    """

    crop_height: int = 256
    crop_width: int = 512
    color: float = 0.0
    asymmetric_color: float = 0.0
    right_occluder: float = 0.0
    scale: float = 0.0
    stretch: float = 0.0
    scale_probability: float = 0.8
    vertical_jitter: float = 0.0
    horizontal_flip: float = 0.0
    vertical_flip: float = 0.0

    def __post_init__(self) -> None:
        _check_positive("augmentation.crop_height", self.crop_height)
        _check_positive("augmentation.crop_width", self.crop_width)
        for name in ("color", "scale", "stretch", "vertical_jitter"):
            _check_positive(f"augmentation.{name}", getattr(self, name), zero=True)
        for name in ("asymmetric_color", "right_occluder", "scale_probability", "horizontal_flip", "vertical_flip"):
            if not 0 <= getattr(self, name) <= 1:
                raise InputError(f"augmentation.{name} is a probability from 0 to 1, got {getattr(self, name)}")


@dataclass
class DataConfig:
    """What is trained on, and what validates.

    Attributes:
        train: Training pairs.
        also: More training pairs, of any kind: all sources together are one set, whose pairs come equally often.
        validation: Validation pairs; None, or files whose ``root`` is not given, skips validation.
        augmentation: Crop and random changes of training samples.
        workers: Loader processes per training process.
        render_workers: Processes that render the pairs of rendered sources, of one size, once and into memory (14 bytes
            a pixel, for all of them from the start), while the training goes on with those that are there; for machines
            with many cores. It sees the same pairs, but not in the same order twice. Every training process has its
            own. 0 renders every pair anew when it is drawn.
    """

    train: DatasetConfig = field(default_factory=DatasetConfig)
    also: list[DatasetConfig] = field(default_factory=list)
    validation: DatasetConfig | None = None
    augmentation: AugmentationConfig = field(default_factory=AugmentationConfig)
    workers: int = 4
    render_workers: int = 0

    def __post_init__(self) -> None:
        _check_positive("data.workers", self.workers, zero=True)
        _check_positive("data.render_workers", self.render_workers, zero=True)

    @property
    def sources(self) -> dict[str, DatasetConfig]:
        """All that is trained on, by full key."""
        return {"data.train": self.train} | {f"data.also.{i}": source for i, source in enumerate(self.also)}


# --------------------------------------------------------------------------------------------------------------------
# training


@dataclass
class LossConfig:
    """Smooth L1 on every output of the network (PSMNet, eq. 4), masked by the ground truth's range.

    Attributes:
        output_weights: Weight of each output, first to last; the last ones are used if the network has fewer.
        mask_zero: Leave out pixels with disparity 0 (GwcNet's mask; PSMNet masks d < max_disparity only).
        smooth_l1_beta: Error in pixels at which smooth L1 turns from a parabola, ``e^2 / (2 beta)``, into a line, ``e -
            beta / 2``. 1 is PSMNet's; with less, smaller errors pull as strongly as large ones, with 0 all (L1).
        cross_entropy_weight: Weight of an auxiliary cross-entropy on the quarter-resolution scores; 0 is off, as in
            the paper's experiments.
    """

    output_weights: list[float] = field(default_factory=lambda: [0.5, 0.7, 1.0])
    mask_zero: bool = False
    smooth_l1_beta: float = 1.0
    cross_entropy_weight: float = 0.0

    def __post_init__(self) -> None:
        self.output_weights = list(self.output_weights)
        if not all(0 <= weight < math.inf for weight in self.output_weights) or not any(self.output_weights):
            raise InputError(
                f"loss.output_weights must be numbers of zero or more, and not all zero, got {self.output_weights}"
            )
        for name in ("smooth_l1_beta", "cross_entropy_weight"):
            _check_positive(f"loss.{name}", getattr(self, name), zero=True)


@dataclass
class OptimizerConfig:
    """The optimizer.

    Attributes:
        kind: ``adam`` (the paper's), ``adamw`` or ``sgd``.
        learning_rate: Peak learning rate (paper: 2e-3; PSMNet: 1e-3).
        betas: Adam's two decay rates.
        weight_decay: Decoupled for adamw, L2 otherwise.
        momentum: Of sgd.
    """

    kind: str = "adam"
    learning_rate: float = 2e-3
    betas: list[float] = field(default_factory=lambda: [0.9, 0.999])
    weight_decay: float = 0.0
    momentum: float = 0.9

    def __post_init__(self) -> None:
        _check_choice("optimizer.kind", self.kind, ("adam", "adamw", "sgd"))
        _check_positive("optimizer.learning_rate", self.learning_rate)
        _check_positive("optimizer.weight_decay", self.weight_decay, zero=True)
        self.betas = list(self.betas)
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise InputError(f"optimizer.betas must be two numbers from 0 to below 1, got {self.betas}")
        if not 0 <= self.momentum < 1:
            raise InputError(f"optimizer.momentum must be from 0 to below 1, got {self.momentum}")


@dataclass
class ScheduleConfig:
    """The learning rate over the run, as a factor of the peak.

    Attributes:
        kind: ``constant`` (the paper's), ``cosine``, ``one_cycle``, ``linear`` or ``multi_step``.
        warmup_steps: Steps of linear growth from zero to where the schedule proper begins.
        final_factor: Factor at the end of ``cosine``, ``one_cycle`` and ``linear``.
        rise_fraction: Share of the run (after the warm-up) in which ``one_cycle`` rises from 1/25 of the peak.
        milestones: Epochs at which ``multi_step`` multiplies by ``decay``.
        decay: Factor of ``multi_step``.
    """

    kind: str = "constant"
    warmup_steps: int = 0
    final_factor: float = 0.0
    rise_fraction: float = 0.3
    milestones: list[int] = field(default_factory=list)
    decay: float = 0.1

    def __post_init__(self) -> None:
        _check_choice("schedule.kind", self.kind, ("constant", "cosine", "one_cycle", "linear", "multi_step"))
        _check_positive("schedule.warmup_steps", self.warmup_steps, zero=True)
        for name in ("final_factor", "rise_fraction", "decay"):
            if not 0 <= getattr(self, name) <= 1:
                raise InputError(f"schedule.{name} is a factor from 0 to 1, got {getattr(self, name)}")
        self.milestones = list(self.milestones)


@dataclass
class TrainerConfig:
    """The training loop.

    Attributes:
        epochs: Passes over the training pairs.
        max_steps: Stop after this many optimizer steps, whatever ``epochs`` says; None does not.
        max_minutes: Train by the clock instead: begin no step after so many minutes, and spread a cosine, linear or
            one_cycle schedule over them (warm-up goes by steps; multi_step is refused). ``epochs`` and ``max_steps`` do
            not count then. Starting, validating and writing come on top, compiling does not; of a resumed run what its
            checkpoint had taken counts. Not the same bits twice.
        batch_size: Samples per optimizer step, over all processes and accumulated micro-batches.
        micro_batch_size: Samples per forward pass and process; None does the process's share at once.
        precision: fp32, bf16 or fp16 (fp16 with loss scaling).
        gradient_clip_norm: Largest gradient norm; None does not clip.
        ema_decay: Decay of the exponential moving average of the weights (and buffers); 0 is off.
        sync_batch_norm: Batch norm statistics over all processes.
        freeze_batch_norm: Keep batch norm in eval mode (fine-tuning). On a CPU in fp32 a step takes less time and
            memory then.
        activation_checkpointing: Recompute activations in the backward pass: less memory, more time.
        compile: Run features and aggregation through torch.compile, for GPUs: the first step takes minutes, and on a
            CPU nothing is gained. Not together with ``activation_checkpointing``.
        cuda_graph: Record the passes forward and backward once and launch their kernels as one, for GPUs that wait for
            Python otherwise (small models, busy CPUs); the same values. Its activations keep their memory, beside
            which steps with pictures, smaller last micro-batches and validations take theirs. For one process, not
            together with ``compile``.
        seed: Of weights, data order and augmentation.
        device: ``auto``, ``cpu``, ``cuda``, or ``cuda:N`` for one process.
        log_every_steps: Scalars to TensorBoard.
        picture_every_steps: Pictures to TensorBoard; 0 is off.
        validate_every_steps: Validation; 0 validates at the end of each epoch.
        validate_at_start: Validate before the first step, too.
        checkpoint_every_steps: ``last.pt`` is rewritten this often; 0 writes it at the end of each epoch.
        keep_every_steps: Keep a numbered checkpoint this often; 0 is off.
        init_from: Weights to start from, a bundled name (``small``, ``full``) or a file; what matches is loaded, and
            the rest is reported.
        resume: ``auto`` goes on from ``last.pt`` of the output folder if there is one. A checkpoint of another folder
            is where a new run goes on from; given again, from that run's own ``last.pt``. A checkpoint of the output
            folder itself is gone back to every time. None begins anew, and is refused where a run is.
        plateau_alarm_steps: Warn if the loss has not fallen over so many steps; 0 is off.
    """

    epochs: int = 100
    max_steps: int | None = None
    max_minutes: float | None = None
    batch_size: int = 24
    micro_batch_size: int | None = None
    precision: str = "fp32"
    gradient_clip_norm: float | None = None
    ema_decay: float = 0.0
    sync_batch_norm: bool = False
    freeze_batch_norm: bool = False
    activation_checkpointing: bool = False
    compile: bool = False
    cuda_graph: bool = False
    seed: int = 0
    device: str = "auto"
    log_every_steps: int = 20
    picture_every_steps: int = 500
    validate_every_steps: int = 0
    validate_at_start: bool = False
    checkpoint_every_steps: int = 500
    keep_every_steps: int = 0
    init_from: str | None = None
    resume: str | None = "auto"
    plateau_alarm_steps: int = 500

    def __post_init__(self) -> None:
        _check_positive("trainer.epochs", self.epochs)
        _check_positive("trainer.max_steps", self.max_steps, none=True)
        _check_positive("trainer.max_minutes", self.max_minutes, none=True)
        _check_positive("trainer.batch_size", self.batch_size)
        _check_positive("trainer.micro_batch_size", self.micro_batch_size, none=True)
        _check_choice("trainer.precision", self.precision, PRECISIONS)
        _check_positive("trainer.gradient_clip_norm", self.gradient_clip_norm, none=True)
        if not 0 <= self.ema_decay < 1:
            raise InputError(f"trainer.ema_decay must be from 0 to below 1, got {self.ema_decay}")
        if self.compile and self.activation_checkpointing:
            raise InputError("trainer.compile and trainer.activation_checkpointing exclude each other: choose one")
        if self.compile and self.cuda_graph:
            raise InputError("trainer.compile and trainer.cuda_graph exclude each other: choose one")
        if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", self.device):
            raise InputError(f"trainer.device must be auto, cpu, cuda or cuda:N, got {self.device!r}")
        _check_seed("trainer.seed", self.seed)
        for name in ("log_every_steps", "picture_every_steps", "validate_every_steps", "checkpoint_every_steps",
                     "keep_every_steps", "plateau_alarm_steps"):  # fmt: skip
            _check_positive(f"trainer.{name}", getattr(self, name), zero=True)


@dataclass
class TrainConfig:
    """A whole training run: ``fa-stereo train``.

    Attributes:
        model: The network.
        data: Training and validation pairs.
        loss: The loss.
        optimizer: The optimizer.
        schedule: Learning rate over time.
        trainer: The loop.
        output_dir: Folder of checkpoints, logs and metrics.
    """

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    output_dir: str = "runs/train"


# --------------------------------------------------------------------------------------------------------------------
# evaluation

AVERAGINGS = ("pixel", "image", "batch")
PADDINGS = ("by_network", "top_right_zeros", "top_right_replicate", "symmetric_replicate")


@dataclass
class ProtocolConfig:
    """Everything besides the network that changes a published figure: which images, which pixels, which mean.

    The defaults are this project's own protocol; ``conf/protocol/`` has those of the published codes.

    Attributes:
        name: Printed and stored with every result.
        passes: Scene Flow's ``clean`` or ``final`` pass, or ``both``; other data sets have none.
        images: Size of the random subset that is evaluated; None evaluates all images.
        image_seed: Seed of NumPy's legacy generator that draws the subset.
        expected_images: Size of the whole test set, to say so when a result rests on fewer; None does not.
        crop: [height, width] kept at the bottom right of larger images; None keeps all.
        padding: ``by_network`` (as its ``ModelConfig.padding`` says), ``top_right_zeros`` (after normalisation, which
            the network is told to do), ``top_right_replicate`` or ``symmetric_replicate`` (the border repeated, half
            at each side), always cropped off again.
        padding_multiple: The replicating paddings pad to multiples of this many pixels.
        min_disparity: Ground truth up to and including this is not valid; None has no lower bound.
        max_disparity: Ground truth from this on is not valid; None takes all that is known.
        averaging: What is averaged over: ``pixel`` (all pixels alike), ``image`` (the mean of the images' means) or
            ``batch`` (the mean of the batches' means over their pixels).
        outlier_averaging: The same for bad_1, bad_2, bad_3 and d1, where a code averages them otherwise; None is
            ``averaging``.
        batch_size: Images of a batch, in the order of the data set; the last may be smaller.
        empty: How an image or batch without a valid pixel counts: ``skip`` leaves it out, ``zero`` as no error.
        min_valid_fraction: Images with a smaller share of their known pixels inside the bounds are left out.
    """

    name: str = "default"
    passes: str = "clean"
    images: int | None = None
    image_seed: int = 1000
    expected_images: int | None = None
    crop: list[int] | None = None
    padding: str = "by_network"
    padding_multiple: int = 32
    min_disparity: float | None = 0.0
    max_disparity: float | None = 192.0
    averaging: str = "image"
    outlier_averaging: str | None = None
    batch_size: int = 8
    empty: str = "skip"
    min_valid_fraction: float = 0.0

    def __post_init__(self) -> None:
        _check_choice("protocol.passes", self.passes, SCENE_FLOW_PASSES)
        _check_choice("protocol.padding", self.padding, PADDINGS)
        _check_choice("protocol.averaging", self.averaging, AVERAGINGS)
        _check_choice("protocol.outlier_averaging", self.outlier_averaging, (None, *AVERAGINGS))
        _check_choice("protocol.empty", self.empty, ("skip", "zero"))
        _check_positive("protocol.images", self.images, none=True)
        _check_seed("protocol.image_seed", self.image_seed)
        _check_positive("protocol.expected_images", self.expected_images, none=True)
        _check_positive("protocol.padding_multiple", self.padding_multiple)
        _check_positive("protocol.batch_size", self.batch_size)
        _check_positive("protocol.max_disparity", self.max_disparity, none=True)
        if self.crop is not None:
            self.crop = list(self.crop)
            if len(self.crop) != 2 or min(self.crop) < 16:
                raise InputError(f"protocol.crop is [height, width], each at least 16, got {self.crop}")
        if not 0 <= self.min_valid_fraction <= 1:
            raise InputError(f"protocol.min_valid_fraction must be from 0 to 1, got {self.min_valid_fraction}")
        if (
            self.min_disparity is not None
            and self.max_disparity is not None
            and self.min_disparity >= self.max_disparity
        ):
            raise InputError(
                f"protocol.min_disparity ({self.min_disparity}) must be below protocol.max_disparity "
                f"({self.max_disparity})"
            )


@dataclass
class EvaluateConfig:
    """One evaluation: ``fa-stereo evaluate``.

    Attributes:
        checkpoint: Weights: a bundled name (``small``, ``full``) or a file; None takes the default bundled ones.
        method: ``network``, or ``sgbm`` for OpenCV's semi-global matching, which needs no weights.
        dataset: What is evaluated on.
        protocol: Images, pixels and means.
        output_dir: Folder of ``metrics.json``, ``per_image.csv`` and pictures.
        max_images: Evaluate only the first n images of the protocol's; None evaluates all.
        error_maps: Write an error map of every image, in KITTI's colours.
        worst: Write left view, ground truth, prediction and error of so many images with the largest error.
        contact_sheet: Write ``contact_sheet.png``, one picture with small ones of the same of so many images, evenly
            spread over the data set.
        confidence: Measure the network's confidence too, over all pixels: the errors of what is kept from several
            thresholds on, and the area under the sparsification curve; printed, and in ``metrics.json``.
        regression: ``expectation`` or ``modal`` (see ``ModelConfig``); None takes what belongs to the weights.
        padding: ``zeros`` or ``replicate`` likewise; None takes what the protocol asks for, or belongs to the weights.
        halve_from_px: Pictures of at least so many pixels count at half their size too (see ``ModelConfig``; 0 never);
            None takes what belongs to the weights.
        enlarge_below_px: Pictures of fewer pixels are predicted at two sizes (see ``ModelConfig``; 0 never); None takes
            what belongs to the weights.
        max_disparity: Search range in pixels (exclusive), a multiple of 16; None is that of the weights, of SGBM 192.
            Which pixels count is the protocol's.
        tile: For large pictures: compute this many rows at a time, a multiple of 16; None computes whole pictures.
        precision: ``fp32``, ``bf16``, ``fp16``, ``mixed`` (``fa_stereo.inference.choose_precision``) or ``auto``.
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.
        workers: Loader processes per evaluating process.
    """

    checkpoint: str | None = None
    method: str = "network"
    dataset: DatasetConfig = field(default_factory=DatasetConfig)
    protocol: ProtocolConfig = field(default_factory=ProtocolConfig)
    output_dir: str = "runs/evaluate"
    max_images: int | None = None
    error_maps: bool = False
    worst: int = 0
    contact_sheet: int = 0
    confidence: bool = False
    regression: str | None = None
    padding: str | None = None
    halve_from_px: int | None = None
    enlarge_below_px: int | None = None
    max_disparity: int | None = None
    tile: int | None = None
    precision: str = "fp32"
    device: str = "auto"
    workers: int = 2

    def __post_init__(self) -> None:
        _check_choice("method", self.method, ("network", "sgbm"))
        _check_choice("regression", self.regression, (None, *REGRESSIONS))
        _check_choice("padding", self.padding, (None, *NETWORK_PADDINGS))
        _check_positive("halve_from_px", self.halve_from_px, zero=True, none=True)
        _check_positive("enlarge_below_px", self.enlarge_below_px, zero=True, none=True)
        _check_choice("precision", self.precision, ("auto", *INFERENCE_PRECISIONS))
        for name in ("max_disparity", "tile"):
            value = getattr(self, name)
            if value is not None and (value < 16 or value % 16):
                raise InputError(f"{name} must be a positive multiple of 16, got {value}")
        _check_positive("max_images", self.max_images, none=True)
        _check_positive("worst", self.worst, zero=True)
        _check_positive("contact_sheet", self.contact_sheet, zero=True)
        _check_positive("workers", self.workers, zero=True)
        if self.method == "sgbm" and self.checkpoint is not None:
            raise InputError(f"method=sgbm has no weights: leave out checkpoint={self.checkpoint}")
        if self.method == "sgbm" and self.confidence:
            raise InputError("method=sgbm has no confidence: leave out confidence=true")
        for name in PREDICTION_SETTINGS if self.method == "sgbm" else ():
            if (value := getattr(self, name)) is not None:
                raise InputError(f"method=sgbm is no network, which {name}={value} is for: leave it out")
        if self.method == "sgbm" and self.precision not in ("auto", "fp32"):
            raise InputError(f"method=sgbm computes in integers: leave out precision={self.precision}")
        if self.method == "sgbm" and self.tile is not None:
            raise InputError("method=sgbm computes whole pictures: leave out tile")
        if self.dataset.lacks_root:
            raise InputError(
                f"dataset.root is not given: name the folder of {self.dataset.kind} (data/README.md says how it is "
                "laid out), or take dataset=rendered"
            )


# --------------------------------------------------------------------------------------------------------------------
# plain data <-> dataclasses

T = TypeVar("T")


def to_plain(config: Any) -> dict[str, Any]:
    """Return a configuration as nested dicts, lists and scalars (what a checkpoint stores)."""
    return dataclasses.asdict(config)


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested plain data by full key.

    Examples:
        >>> flatten({"trainer": {"seed": 0, "epochs": 9}, "output_dir": "runs"})
        {'trainer.seed': 0, 'trainer.epochs': 9, 'output_dir': 'runs'}
        >>> flatten({"also": [{"root": "mine"}, {"root": "theirs"}], "sets": ["monkaa"]})
        {'also.0.root': 'mine', 'also.1.root': 'theirs', 'sets': ['monkaa']}
    """
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, list) and value and all(isinstance(part, Mapping) for part in value):
            value = {str(i): part for i, part in enumerate(value)}
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def flatten_used(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return nested plain data by full key, without settings of another kind of data than the one chosen beside them.

    Examples:
        >>> flatten_used({"train": {"kind": "rendered", "rendered": {"seed": 3}, "scene_flow": {"passes": "clean"}}})
        {'train.kind': 'rendered', 'train.rendered.seed': 3}
    """
    flat = flatten(values)

    def used(key: str) -> bool:
        data, _, part = key.rpartition(".")[0].rpartition(".")
        kind = flat.get(f"{data}.kind")
        return part not in ("rendered", "scene_flow") or kind is None or part == kind

    return {key: value for key, value in flat.items() if used(key)}


def from_plain(cls: type[T], values: dict[str, Any], *, where: str = "") -> T:
    """Build configuration ``cls`` from nested plain data.

    Args:
        cls: One of this module's dataclasses.
        values: What ``to_plain`` returned; missing fields take their defaults.
        where: Name of the file or key, for the error message.

    Raises:
        InputError: A key is unknown or its value is refused; either way it is named in full.
    """
    hints = typing.get_type_hints(cls)
    known = {f.name for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    arguments: dict[str, Any] = {}
    for key, value in values.items():
        full_key = f"{where}.{key}" if where else key
        if key not in known:
            raise InputError(f"unknown configuration key {full_key!r}; known here: {', '.join(sorted(known))}")
        inner = _dataclass_of(hints[key])
        if inner is not None and typing.get_origin(hints[key]) is list:
            if not isinstance(value, list) or not all(isinstance(part, dict) for part in value):
                raise InputError(f"{full_key} must be a list of groups of keys, as [{{kind: pairs, root: FOLDER}}]")
            arguments[key] = [from_plain(inner, part, where=f"{full_key}.{i}") for i, part in enumerate(value)]
        elif inner is not None and isinstance(value, dict):
            arguments[key] = from_plain(inner, value, where=full_key)
        else:
            arguments[key] = value
    try:
        return cls(**arguments)
    except InputError as error:
        # The dataclass does not know where it is: "kind must be ..." may be about data.train.kind or dataset.kind.
        key, _, rest = str(error).partition(" ")
        name = key.rpartition(".")[2]
        raise InputError(f"{where}.{name} {rest}" if where and name in known else str(error)) from error


def _dataclass_of(hint: Any) -> type[Any] | None:
    several = isinstance(hint, types.UnionType) or typing.get_origin(hint) is list
    candidates = typing.get_args(hint) if several else (hint,)
    for candidate in candidates:
        if dataclasses.is_dataclass(candidate) and isinstance(candidate, type):
            return candidate
    return None
