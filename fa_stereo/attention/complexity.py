"""What attention costs: the paper's tables 9 to 12 as printed and as counted, its figures, and this software's blocks.

The paper counts memory in floats, one for every value that a layer returns, and computation in MACC, where one
multiplication or one addition is 1 (what is usually called a FLOP). Its symbols:

    s  positions (called N elsewhere here)    b, k  channels of the basis, of the key    h  heads
    c  channels of the input                  m     channels of the value                f  hidden feed-forward channels

``COUNTED`` adds up the layers of the paper's figures 8 to 17 by these rules; ``PRINTED`` is what the tables say. Where
the two differ, ``disagreements`` names both. ``block_cost`` is about the blocks of this package as they are computed:
products as PyTorch's counter counts them, the peak of an inference pass, what training keeps for the backward pass.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from operator import add

from fa_stereo.attention.axial import block_length
from fa_stereo.attention.formula import Formula, Number
from fa_stereo.attention.non_local import CHUNK_ENTRIES
from fa_stereo.config import AttentionConfig

BYTES_PER_FLOAT = 4

s, c, b, k, m, h, f = (Formula.symbol(name) for name in "scbkmhf")


@dataclass(frozen=True)
class Cost:
    """Memory in floats and computation in MACC."""

    memory: Formula
    computation: Formula

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.memory + other.memory, self.computation + other.computation)

    def times(self, factor: Formula | Number) -> Cost:
        """Return the cost of as many of the same."""
        return Cost(self.memory * factor, self.computation * factor)

    def substitute(self, **symbols: Formula | Number) -> Cost:
        """Return the cost with symbols replaced."""
        return Cost(self.memory.substitute(**symbols), self.computation.substitute(**symbols))


# --------------------------------------------------------------------------------------------------------------------
# counting, by the paper's rules


def product(rows: Formula | Number, inner: Formula | Number, columns: Formula | Number) -> Cost:
    """Return the cost of a matrix product: every result is ``inner`` multiplications and as many additions."""
    results = Formula.of(rows) * columns
    return Cost(results, 2 * (results * inner))


def linear(inputs: Formula, outputs: Formula) -> Cost:
    """Return the cost of a linear layer, or 1x1 convolution, at s positions."""
    return product(s, inputs, outputs)


def convolution(inputs: Formula, outputs: Formula) -> Cost:
    """Return the cost of a 3x3 convolution at s positions."""
    return product(s, 9 * inputs, outputs)


def elementwise(channels: Formula) -> Cost:
    """Return the cost of a sum, rectification or normalization at s positions: it is stored, its computation is not."""
    return Cost(channels * s, Formula.of(0))


def total(*costs: Cost) -> Cost:
    """Return the sum of costs."""
    return reduce(add, costs)


def feed_forward() -> Cost:
    """Return the cost of a transformer block's second half, with hidden channels f."""
    return total(linear(c, f), elementwise(f), linear(f, c), elementwise(c))


FACTORIZED_HEAD = total(product(b / h, s, m / h), product(s, b / h, m / h))  # context, then coefficients times context
CONVENTIONAL_HEAD = total(product(s, k / h, s), product(s, s, m / h))  # attention map, then map times values
FACTORIZED_MULTI = total(
    linear(c, b), linear(c, b), linear(c, m), FACTORIZED_HEAD.times(h), linear(m, c), elementwise(c)
)
CONVENTIONAL_MULTI = total(
    linear(c, k), linear(c, k), linear(c, m), CONVENTIONAL_HEAD.times(h), linear(m, c), elementwise(c)
)

COUNTED: dict[str, Cost] = {
    "ResBlock": total(convolution(c, c), elementwise(c), convolution(c, c), elementwise(c), elementwise(c)),
    "ResBlock-bot": total(
        *(linear(c, m), elementwise(m), convolution(m, m), elementwise(m)),
        *(linear(m, c), elementwise(c), elementwise(c)),
    ),
    "FA-dot": total(*(linear(c, b), linear(c, b), linear(c, c)), product(b, s, c), product(s, b, c), elementwise(c)),
    "CA-dot": total(*(linear(c, k), linear(c, k), linear(c, c)), product(s, k, s), product(s, s, c), elementwise(c)),
    "FA-bot": FACTORIZED_MULTI.substitute(h=1),
    "CA-bot": CONVENTIONAL_MULTI.substitute(h=1),
    "FA-multi": FACTORIZED_MULTI,
    "CA-multi": CONVENTIONAL_MULTI,
    "FA-Tfm": FACTORIZED_MULTI + feed_forward(),
    "CA-Tfm": CONVENTIONAL_MULTI + feed_forward(),
}
"""Table 9, counted; the transformers with f hidden channels, which the memory of the paper's table takes to be c."""

PRINTED: dict[int, dict[str, Cost]] = {
    9: {
        "ResBlock": Cost(5 * c * s, 36 * c**2 * s),
        "ResBlock-bot": Cost((4 * m + 3 * c) * s, (4 * m * c + 18 * m**2) * s),
        "FA-dot": Cost((2 * b + 3 * c) * s + b * c, (8 * b * c + 2 * c**2) * s),
        "CA-dot": Cost((2 * k + 3 * c) * s + s**2, (2 * k * c + c**2) * s + (2 * k + 2 * c) * s**2),
        "FA-bot": Cost((2 * b + 2 * m + 2 * c) * s + b * m, (4 * b * c + 4 * m * c + 4 * b * m) * s),
        "CA-bot": Cost((2 * k + 2 * m + 2 * c) * s + s**2, (4 * k * c + 4 * m * c) * s + (2 * k + 2 * m) * s**2),
        "FA-multi": Cost((2 * b + 2 * m + 2 * c) * s + b * m / h, (4 * b * c + 4 * m * c + 4 * b * m / h) * s),
        "CA-multi": Cost(
            (2 * k + 2 * m + 2 * c) * s + h * s**2, (4 * k * c + 4 * m * c) * s + (2 * h * k + 2 * m) * s**2
        ),
        "FA-Tfm": Cost((2 * b + 2 * m + 6 * c) * s + b * m / h, (4 * b * c + 4 * m * c + 4 * b * m + 5 * c**2) * s),
        "CA-Tfm": Cost(
            (2 * k + 2 * m + 6 * c) * s + h * s**2,
            (4 * k * c + 4 * m * c + 5 * c**2) * s + (2 * k + 2 * m) * s**2,
        ),
    },
    10: {
        "ResBlock": Cost(5 * c * s, 36 * c**2 * s),
        "ResBlock-bot": Cost(5 * c * s, 13 * c**2 * s / 2),
        "FA-dot": Cost(4 * c * s + c**2 / 2, 6 * c**2 * s),
        "CA-dot": Cost(4 * c * s + s**2, 2 * c**2 * s + 3 * c * s**2),
        "FA-bot": Cost(4 * c * s + c**2 / 4, 5 * c**2 * s),
        "CA-bot": Cost(4 * c * s + s**2, 4 * c**2 * s + 2 * c * s**2),
        "FA-multi": Cost(4 * c * s + c**2 / (4 * h), (4 * c**2 + c**2 / h) * s),
        "CA-multi": Cost(4 * c * s + h * s**2, 4 * c * s + (h * c + c) * s**2),
    },
    11: {
        "FA-multi": Cost(3 * c * s + c**2 / (16 * h), (2 * c**2 + c**2 / (4 * h)) * s),
        "CA-multi": Cost(3 * c * s + h * s**2, 2 * c**2 * s + (h * c / 2 + m / 2) * s**2),
        "FA-Tfm": Cost(7 * c * s + c**2 / (16 * h), (c**2 / 7 * 4 * h + 7 * c**2) * s),
        "CA-Tfm": Cost(7 * c * s + h * s**2, 7 * c**2 * s + c * s**2),
    },
}
"""Tables 9 to 11 as printed. Table 12 gives the orders, O(s) for all but the CA rows, which are O(s²)."""

MISPRINTS: dict[tuple[int, str], str] = {
    (9, "CA-dot"): "the linear layers count one operation a product, those of every other row two",
    (9, "CA-multi"): "every head has k/h key channels: h heads together cost 2k, not 2hk",
    (9, "FA-Tfm"): "printed 4(bm/h)h, with a factor h too many; feed-forward 5c², its two layers count 4c²",
    (9, "CA-Tfm"): "feed-forward 5c², its two layers count 4c²",
    (10, "CA-dot"): "the linear layers count one operation a product, as in table 9",
    (10, "CA-multi"): "4cs has lost a square, and (hc + c)s² has table 9's factor h",
    (11, "CA-multi"): "table 9's factor h, and m/2 where c/2 is meant",
    (11, "FA-Tfm"): "printed (c²/7)4h, garbled from c²/(4h); feed-forward 5c², its two layers count 4c²",
    (11, "CA-Tfm"): "feed-forward 5c², its two layers count 4c²",
}


def counted_table(number: int) -> dict[str, Cost]:
    """Return one of the paper's tables of costs, counted, with the rows that are printed there.

    Args:
        number: 9 (general), 10 (b = k = m = c/2) or 11 (b = k = m = c/4). Table 12 is ``order`` of table 9's formulas.
    """
    assumptions: dict[int, dict[str, Formula | Number]] = {
        9: {"f": c},
        10: {"f": c, "b": c / 2, "k": c / 2, "m": c / 2},
        11: {"f": c, "b": c / 4, "k": c / 4, "m": c / 4},
    }
    return {module: COUNTED[module].substitute(**assumptions[number]) for module in PRINTED[number]}


def order(formula: Formula) -> str:
    """Return the growth with the number of positions, as in table 12: O(s) or O(s²)."""
    return {1: "O(s)", 2: "O(s²)"}[formula.degree("s")]


@dataclass(frozen=True)
class Disagreement:
    """A row of a table whose print differs from the count.

    Attributes:
        table: Its number in the paper.
        module: The row.
        quantity: ``memory`` or ``computation``.
        printed: As printed.
        counted: As counted.
        reason: What went wrong in print.
    """

    table: int
    module: str
    quantity: str
    printed: Formula
    counted: Formula
    reason: str


def disagreements() -> list[Disagreement]:
    """Return every formula of tables 9 to 11 that is printed otherwise than it counts."""
    found = []
    for number, rows in PRINTED.items():
        for module, counted in counted_table(number).items():
            printed = rows[module]
            for quantity in ("memory", "computation"):
                ours, theirs = getattr(counted, quantity), getattr(printed, quantity)
                if ours != theirs:
                    reason = MISPRINTS[number, module]
                    found.append(Disagreement(number, module, quantity, theirs, ours, reason))
    return found


# --------------------------------------------------------------------------------------------------------------------
# the paper's figures and claims in numbers


@dataclass(frozen=True)
class Resources:
    """The cost of one module on one input.

    Attributes:
        module: Row of table 9.
        size: Of the input, such as (64, 64), or a sequence's length.
        memory_bytes: In float32.
        computation_macc: One multiplication or addition is 1.
    """

    module: str
    size: tuple[int, ...]
    memory_bytes: float
    computation_macc: float


def resources(
    module: str, size: Sequence[int], symbols: Mapping[str, int], source: Mapping[str, Cost] = COUNTED
) -> Resources:
    """Return the cost of a row of table 9 on an input, as counted or, given ``PRINTED[9]``, as printed.

    Args:
        module: Row of table 9.
        size: Of the input: height and width, with the depth of a volume, or the length of a sequence.
        symbols: Values of c and of b, k, m, h, f, as far as the row has them; f is c unless given.
        source: Where the row is.
    """
    values = {"f": symbols["c"], **symbols, "s": math.prod(size)}
    cost = source[module]
    return Resources(
        module,
        tuple(size),
        BYTES_PER_FLOAT * cost.memory.evaluate(**values),
        cost.computation.evaluate(**values),
    )


IMAGE_SIZES = ((32, 32), (64, 64), (128, 128), (256, 256), (512, 512))
VIDEO_SIZES = ((28, 28, 4), (32, 32, 8), (64, 64, 16), (64, 64, 32), (128, 128, 64))
SEQUENCE_LENGTHS = (128, 256, 512, 1024, 2048, 4096, 8192)


def figure_4() -> list[Resources]:
    """Return figure 4: factorized and conventional attention on growing inputs, with c = 64 and b = k = 32.

    On the paper's maps, and on volumes around those of its text.
    """
    return [
        resources(module, size, {"c": 64, key: 32})
        for module, key in (("FA-dot", "b"), ("CA-dot", "k"))
        for size in IMAGE_SIZES + VIDEO_SIZES
    ]


@dataclass(frozen=True)
class TransformerSize:
    """Sizes of a stack of transformer blocks.

    Attributes:
        channels: c, and b = k = m as well.
        heads: h.
        layers: l.
        hidden_channels: f.
    """

    channels: int
    heads: int
    layers: int
    hidden_channels: int


BERT_BASE = TransformerSize(channels=768, heads=12, layers=12, hidden_channels=3072)  # Devlin et al. 2019
BERT_LARGE = TransformerSize(channels=1024, heads=16, layers=24, hidden_channels=4096)
BERTS = {"BERT-base": BERT_BASE, "BERT-large": BERT_LARGE}
"""The architectures of figure 5, which does not name its own."""


def figure_5(
    size: TransformerSize = BERT_BASE,
    lengths: Sequence[int] = SEQUENCE_LENGTHS,
    source: Mapping[str, Cost] = COUNTED,
) -> list[Resources]:
    """Return figure 5: a whole factorized and a whole conventional BERT on growing sequences, embeddings left out."""
    points = []
    for module, key in (("FA-Tfm", "b"), ("CA-Tfm", "k")):
        for length in lengths:
            widths = {"c": size.channels, key: size.channels, "m": size.channels}
            block = resources(module, (length,), {**widths, "h": size.heads, "f": size.hidden_channels}, source)
            memory, computation = size.layers * block.memory_bytes, size.layers * block.computation_macc
            points.append(Resources(module, (length,), memory, computation))
    return points


@dataclass(frozen=True)
class Statement:
    """A figure that the paper's text states, and what the formulas give.

    Attributes:
        claim: What is stated.
        unit: Of the figures.
        stated: The paper's figure; None for a comparison ("less than").
        by_print: By the printed formulas; for a comparison, the ratio of what is said to be less to the other.
        by_count: By the counted formulas.
        reason: Why the stated figure is another, as far as one can tell; empty where it agrees.
    """

    claim: str
    unit: str
    stated: float | None
    by_print: float
    by_count: float
    reason: str = ""

    @property
    def agrees(self) -> bool:
        """Whether the counted figure is the stated one, to rounding, or the comparison holds."""
        if self.stated is None:
            return self.by_count < 1
        return abs(self.by_count / self.stated - 1) <= 0.1


def statements() -> list[Statement]:
    """Return the figures of the paper's introduction and section 3.4 (c = 64, b = k = 32) beside the formulas'.

    The paper names no channels for the 28x28x4 volume in res3 of the non-local I3D-ResNet-50, where c = 512 and
    b = k = 256, and no size of BERT, for which BERT-base is taken.
    """

    def both(quantity: str, size: Sequence[int], channels: int = 64) -> tuple[tuple[float, float], tuple[float, float]]:
        """Return (by print, by count) of FA-dot and of CA-dot."""
        values = {"c": channels, "b": channels // 2, "k": channels // 2}
        fa, ca = (
            tuple(getattr(resources(module, size, values, source), quantity) for source in (PRINTED[9], COUNTED))
            for module in ("FA-dot", "CA-dot")
        )
        return (fa[0], fa[1]), (ca[0], ca[1])

    def stated(claim: str, unit: str, figure: float, quantity: str, size: Sequence[int], reason: str = "") -> Statement:
        scale = {"GB": 1e9, "GMACC": 1e9, "TMACC": 1e12}[unit]
        _, ca = both(quantity, size)
        return Statement(claim, unit, figure, ca[0] / scale, ca[1] / scale, reason)

    def saving(
        claim: str, figure: float, quantity: str, size: Sequence[int], channels: int = 64, reason: str = ""
    ) -> Statement:
        fa, ca = both(quantity, size, channels)
        return Statement(claim, "x", figure, ca[0] / fa[0], ca[1] / fa[1], reason)

    def less(claim: str, quantity: str, size: Sequence[int], other: Sequence[int]) -> Statement:
        (fa, _), (_, ca) = both(quantity, size), both(quantity, other)
        return Statement(claim, "ratio < 1", None, fa[0] / ca[0], fa[1] / ca[1])

    memory, computation = "memory_bytes", "computation_macc"
    no_channels = "the paper does not say the channels"
    bert = []  # savings in per cent, by print and by count
    for source in (PRINTED[9], COUNTED):
        fa_bert, ca_bert = (point.memory_bytes for point in figure_5(lengths=(512,), source=source))
        bert.append(100 * (1 - fa_bert / ca_bert))
    return [
        stated("non-local on 128x128: over 1 GB", "GB", 1, memory, (128, 128)),
        stated("non-local on 128x128: over 50 GMACC", "GMACC", 50, computation, (128, 128)),
        stated("non-local on 64x64x32: over 68 GB", "GB", 68, memory, (64, 64, 32)),
        stated("non-local on 64x64x32: over 3.2 TMACC", "TMACC", 3.2, computation, (64, 64, 32)),
        saving("64x64: 17x less memory", 17, memory, (64, 64)),
        saving("64x64: 32x less computation", 32, computation, (64, 64)),
        stated("non-local on 256x256: 17.2 GB", "GB", 17.2, memory, (256, 256)),
        stated("non-local on 256x256: 412 GMACC", "GMACC", 412, computation, (256, 256),
               "half of what table 9 gives, as if two operations counted as one here alone"),
        less("memory of factorized on 256x256 below non-local on 64x64", memory, (256, 256), (64, 64)),
        less("computation of factorized on 256x256 below non-local on 64x64", computation, (256, 256), (64, 64)),
        saving("28x28x4 (I3D's res3, c = 512): 2x less memory", 2, memory, (28, 28, 4), 512, no_channels),
        saving("28x28x4 (I3D's res3, c = 512): 2x less computation", 2, computation, (28, 28, 4), 512, no_channels),
        saving("64x64x32: 32x less memory", 32, memory, (64, 64, 32),
               reason="a misprint: the saving of computation on 64x64, once more"),
        saving("64x64x32: 1025x less computation", 1025, computation, (64, 64, 32)),
        Statement("factorized BERT (512 entries): 20 % less memory", "%", 20, bert[0], bert[1],
                  "the paper does not say which BERT, nor what else is counted"),
    ]  # fmt: skip


# --------------------------------------------------------------------------------------------------------------------
# this software's blocks


@dataclass(frozen=True)
class BlockCost:
    """What a block of this package costs on one input in float32.

    Attributes:
        flops: Of matrix products and convolutions in a forward pass, as PyTorch's counter has them: a multiplication
            and the addition that goes with it are 2.
        inference_bytes: Most that a forward pass without gradients holds at a time, its result included, its input and
            the weights not.
        training_bytes: What a forward pass with gradients leaves behind for the backward pass, its result included, its
            input and the weights not.
    """

    flops: int
    inference_bytes: int
    training_bytes: int


def block_cost(config: AttentionConfig, channels: int, size: Sequence[int], batch: int = 1) -> BlockCost:
    """Return what ``build_attention(config, channels)`` costs on maps [batch, channels, *size], by closed forms.

    Where the block differs from the paper's count: a softmax over the whole attention map briefly needs a second one,
    conventional attention in inference holds one head's map at a time, chunked and fused attention hold none, and a
    block in inference frees what it no longer needs. Left out are a few floats that do not grow with the positions and
    what a kernel needs for itself.

    Args:
        config: The block.
        channels: c.
        size: Of the map or volume.
        batch: Maps.

    Raises:
        KeyError: The kind is ``none``, which costs nothing and is no block.
    """
    attention = {
        "factorized": _factorized_cost,
        "non_local": _non_local_cost,
        "axial": _axial_cost,
        "resblock": _resblock_cost,
        "resblock_bottleneck": _resblock_cost,
    }[config.kind]
    flops, inference, training = attention(config, channels, tuple(size), batch)
    if config.transformer:
        positions = batch * math.prod(size)
        hidden = config.feed_forward_channels or channels
        flops += 4 * channels * hidden * positions
        inference = max(inference, max(channels + 2 * hidden, 3 * channels + hidden) * positions)
        training += (hidden + channels) * positions  # the rectified hidden layer, the sum
    return BlockCost(flops, BYTES_PER_FLOAT * inference, BYTES_PER_FLOAT * training)


def _values(config: AttentionConfig, channels: int) -> tuple[int, int]:
    """Return m and the channels of the reprojection, which is absent (0) without a bottleneck."""
    if config.value_channels is None and not config.transformer:
        return channels, 0
    return config.value_channels or channels, channels


def _factorized_cost(config: AttentionConfig, channels: int, size: tuple[int, ...], batch: int) -> tuple[int, int, int]:
    positions = batch * math.prod(size)
    keys, heads = config.key_channels, config.heads
    values, reprojected = _values(config, channels)
    linear_flops = 2 * channels * (2 * keys + values) + 2 * values * reprojected
    flops = (linear_flops + 4 * keys * values // heads) * positions
    kept = 2 * keys + values  # C, B, V
    last = max(kept + values + reprojected + channels, kept + 2 * values if heads > 1 else 0)
    training = (kept + (values if reprojected else 0) + channels) * positions + batch * keys * values // heads
    return flops, last * positions, training


def _non_local_cost(config: AttentionConfig, channels: int, size: tuple[int, ...], batch: int) -> tuple[int, int, int]:
    one = math.prod(size)
    positions = batch * one
    keys, heads = config.key_channels, config.heads
    values, reprojected = _values(config, channels)
    flops = (2 * channels * (2 * keys + values) + 2 * values * reprojected) * positions
    kept = 2 * keys + values  # K, Q, V
    result = reprojected + channels
    attention_map = positions * one  # of one head
    if config.computation == "fused":
        width = max(keys, values)  # all heads together, after padding
        padding = (2 * width if keys < values else 0) + (width if values < keys else 0)
        flops += 4 * width * attention_map
        cut = values if heads > 1 and values < keys else 0  # a copy of the result without the padding
        inference = max(kept + padding + width + heads + cut, kept + values + result) * positions
        training = (4 * width + heads + (cut if reprojected else 0) + channels) * positions
        return flops, inference, training
    flops += 2 * (keys + values) * attention_map
    done = values - values // heads  # channels of the heads before the last
    part = attention_map
    if config.computation == "chunked":
        part, done = min(attention_map, CHUNK_ENTRIES), values
    maps = part if config.normalization == "dot" else 2 * part
    inference = max((kept + done) * positions + maps, (kept + values + max(values, result)) * positions)
    training = (kept + (values if reprojected else 0) + channels) * positions
    if config.computation == "materialized":
        training += heads * attention_map
    return flops, inference, training


def _axial_cost(config: AttentionConfig, channels: int, size: tuple[int, ...], batch: int) -> tuple[int, int, int]:
    planes, (height, width) = batch * math.prod(size[:-2]), size[-2:]
    positions = planes * height * width
    keys, values, heads = config.key_channels, config.value_channels or channels, config.heads
    flops = 2 * values * channels * positions  # the reprojection
    inference, training = (values + 2 * channels) * positions, channels * positions
    axes = ((height, planes * width, channels, 0), (width, planes * height, values, values))
    for length, lines, inputs, before in axes:  # before: channels of the height layer's result
        block = block_length(length, config.span)
        reach = block if block == length or config.span is None else block + config.span - 1
        blocks = lines * -(-length // block)
        flops += 2 * inputs * (2 * keys + values) * positions
        flops += 2 * blocks * block * reach * (3 * keys + 2 * values)  # q k, q r, k r, and the weights times v and r
        stored = blocks * (block * keys + reach * (keys + values))  # queries, keys and values of the blocks
        weights = heads * blocks * block * reach
        tables = block * reach * ((2 * keys + values) // heads + 6)  # r of every place, and three int64 indices
        inference = max(inference, before * positions + stored + 2 * weights)
        training += stored + weights + tables + values * positions
    return flops, inference, training


def _resblock_cost(config: AttentionConfig, channels: int, size: tuple[int, ...], batch: int) -> tuple[int, int, int]:
    positions = batch * math.prod(size)
    if config.kind == "resblock":
        return 36 * channels**2 * positions, 2 * channels * positions, 4 * channels * positions
    inner = config.value_channels or max(1, channels // 2)
    flops = (4 * inner * channels + 18 * inner**2) * positions
    return flops, max(2 * channels, 2 * inner) * positions, (4 * inner + 2 * channels) * positions
