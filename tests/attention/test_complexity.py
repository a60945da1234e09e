"""The closed forms against print (the paper's tables and figures) and against counting (PyTorch's own)."""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Iterable

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from fa_stereo.attention import build_attention, complexity
from fa_stereo.attention.complexity import COUNTED, MISPRINTS, PRINTED, block_cost, counted_table, resources
from fa_stereo.attention.formula import Formula
from fa_stereo.config import AttentionConfig

C64 = {"c": 64, "b": 32, "k": 32}


# --------------------------------------------------------------------------------------------------------------------
# formulas


def test_formulas_calculate() -> None:
    s, c, h = (Formula.symbol(name) for name in "sch")
    formula = (2 * c + h) * (s + 3) / (2 * h)
    assert formula == c * s / h + s / 2 + 3 * c / h + Formula.of(3) / 2
    assert formula.evaluate(s=5, c=3, h=2) == (2 * 3 + 2) * (5 + 3) / (2 * 2)
    assert formula.substitute(c=h * h, s=1).evaluate(h=3) == (18 + 3) * 4 / 6
    assert formula != formula + 1
    assert (s**2 * c + s).degree("s") == 2
    assert (c / h).degree("s") == 0


def test_formulas_are_written_as_in_the_paper() -> None:
    s, c, k, h = (Formula.symbol(name) for name in "sckh")
    assert str((2 * k + 3 * c) * s + s**2) == "(2k + 3c)s + s²"
    assert str(c**2 / (16 * h) + 3 * c * s) == "3cs + c²/(16h)"
    assert str(13 * c**2 * s / 2) == "13c²s/2"
    assert str(s / s) == "1"
    assert str(Formula({})) == "0"


def test_formula_wants_every_value() -> None:
    with pytest.raises(ValueError, match="values are missing for 2c"):
        (Formula.symbol("c") * Formula.symbol("s")).evaluate(s=2)


# --------------------------------------------------------------------------------------------------------------------
# the paper's tables


def test_memory_of_every_row_counts_as_printed() -> None:
    for number, rows in PRINTED.items():
        for module, counted in counted_table(number).items():
            assert counted.memory == rows[module].memory, (number, module)


def test_computation_counts_as_printed_but_for_the_known_misprints() -> None:
    found = complexity.disagreements()
    assert {(item.table, item.module) for item in found} == set(MISPRINTS)
    assert {item.quantity for item in found} == {"computation"}
    assert [(item.table, item.module) for item in found] == [
        *((9, "CA-dot"), (9, "CA-multi"), (9, "FA-Tfm"), (9, "CA-Tfm")),
        *((10, "CA-dot"), (10, "CA-multi")),
        *((11, "CA-multi"), (11, "FA-Tfm"), (11, "CA-Tfm")),
    ]


def test_conventional_rows_counted() -> None:
    s, c, k, m = (Formula.symbol(name) for name in "sckm")
    assert COUNTED["CA-dot"].computation == (4 * k * c + 2 * c**2) * s + (2 * k + 2 * c) * s**2
    assert COUNTED["CA-multi"].computation == (4 * k * c + 4 * m * c) * s + (2 * k + 2 * m) * s**2
    assert "h" not in str(COUNTED["CA-multi"].computation)


def test_table_12_is_the_order_of_the_formulas() -> None:
    for module, cost in COUNTED.items():
        expected = "O(s²)" if module.startswith("CA") else "O(s)"
        assert complexity.order(cost.memory) == complexity.order(cost.computation) == expected


def test_figures_that_the_paper_states() -> None:
    """As printed formulas give them: where the paper agrees with itself, and where it does not."""
    by_claim = {statement.claim: statement for statement in complexity.statements()}
    expected = {
        "64x64: 17x less memory": (17.0, True),
        "64x64: 32x less computation": (32.3, True),
        "non-local on 128x128: over 1 GB": (1.09, True),
        "non-local on 128x128: over 50 GMACC": (51.7, True),
        "non-local on 64x64x32: over 68 GB": (68.9, True),
        "non-local on 64x64x32: over 3.2 TMACC": (3.30, True),
        "non-local on 256x256: 17.2 GB": (17.2, True),
        "non-local on 256x256: 412 GMACC": (825, False),
        "64x64x32: 32x less memory": (513, False),
        "64x64x32: 1025x less computation": (1024, True),
        "memory of factorized on 256x256 below non-local on 64x64": (67.1 / 71.3, True),
        "computation of factorized on 256x256 below non-local on 64x64": (1.61 / 3.26, True),
    }
    for claim, (figure, agrees) in expected.items():
        assert by_claim[claim].by_print == pytest.approx(figure, rel=5e-3), claim
        assert by_claim[claim].by_count == pytest.approx(figure, rel=2e-2), claim
        assert by_claim[claim].agrees == agrees, claim
    # c = b = m = 768, h = 12, s = 512: (10cs + c²/h) beside (10cs + hs²) as printed, whose feed-forward layer has c
    bert = by_claim["factorized BERT (512 entries): 20 % less memory"]
    assert bert.by_print == pytest.approx(100 * (1 - 3_981_312 / 7_077_888))
    assert bert.by_count == pytest.approx(32.8, abs=0.05)
    assert not bert.agrees
    for statement in complexity.statements():
        assert bool(statement.reason) == (not statement.agrees), statement.claim


def test_the_ingredients_of_the_comparison_at_256() -> None:
    factorized = resources("FA-dot", (256, 256), C64)
    non_local = resources("CA-dot", (64, 64), C64, PRINTED[9])
    assert factorized.memory_bytes == pytest.approx(67e6, rel=5e-3)
    assert non_local.memory_bytes == pytest.approx(71e6, rel=5e-3)
    assert factorized.computation_macc == pytest.approx(1.6e9, rel=1e-2)
    assert non_local.computation_macc == pytest.approx(3.3e9, rel=2e-2)


def test_figure_4_grows_linearly_and_quadratically() -> None:
    points = {(point.module, point.size): point for point in complexity.figure_4()}
    for quantity in ("memory_bytes", "computation_macc"):
        factorized, conventional = (
            getattr(points[module, (512, 512)], quantity) / getattr(points[module, (256, 256)], quantity)
            for module in ("FA-dot", "CA-dot")
        )
        assert factorized == pytest.approx(4, rel=1e-3)
        assert conventional == pytest.approx(16, rel=1e-2)
    assert points["CA-dot", (64, 64, 32)].memory_bytes == pytest.approx(68.9e9, rel=1e-3)


def test_figure_5_is_a_stack_of_blocks() -> None:
    points = {(point.module, point.size): point for point in complexity.figure_5()}
    for module in ("FA-Tfm", "CA-Tfm"):
        one = complexity.figure_5(dataclasses.replace(complexity.BERT_BASE, layers=1), lengths=(1024,))
        block = next(point for point in one if point.module == module)
        assert points[module, (1024,)].memory_bytes == 12 * block.memory_bytes
    # 8192 entries: "impractical" beside "still reasonable"
    assert points["CA-Tfm", (8192,)].memory_bytes > 40e9
    assert points["FA-Tfm", (8192,)].memory_bytes < 5e9
    # twice the layers and 4/3 of the channels, but each head as wide: maps of 16 heads instead of 12
    large = {(point.module, point.size): point for point in complexity.figure_5(complexity.BERT_LARGE)}
    ratio = large["CA-Tfm", (8192,)].memory_bytes / points["CA-Tfm", (8192,)].memory_bytes
    assert ratio == pytest.approx(2 * 16 / 12, rel=1e-6)


# --------------------------------------------------------------------------------------------------------------------
# this software's blocks, counted by PyTorch

BLOCKS = {
    "FA": {},
    "FA-dot": {"normalization": "dot"},
    "FA-bot": {"value_channels": 16},
    "FA-heads": {"heads": 4},
    "FA-multi": {"value_channels": 16, "heads": 4},
    "FA-Tfm": {"value_channels": 16, "heads": 4, "transformer": True},
    "FA-Tfm-wide": {"heads": 2, "transformer": True, "feed_forward_channels": 128},
    "CA": {"kind": "non_local"},
    "CA-dot": {"kind": "non_local", "normalization": "dot"},
    "CA-bot": {"kind": "non_local", "value_channels": 16},
    "CA-multi": {"kind": "non_local", "value_channels": 16, "heads": 4},
    "CA-Tfm": {"kind": "non_local", "value_channels": 16, "heads": 4, "transformer": True},
    "chunked": {"kind": "non_local", "computation": "chunked"},
    "fused": {"kind": "non_local", "computation": "fused"},
    "fused-bot": {"kind": "non_local", "computation": "fused", "value_channels": 4, "heads": 2},
    "axial": {"kind": "axial", "heads": 4},
    "axial-5": {"kind": "axial", "heads": 4, "span": 5},
    "axial-17-bot": {"kind": "axial", "heads": 4, "span": 17, "value_channels": 16},
    "ResBlock": {"kind": "resblock"},
    "ResBlock-bot": {"kind": "resblock_bottleneck"},
}
CHANNELS = 32


class MemoryCounter(TorchDispatchMode):
    """Counts the bytes of all tensors that operations return, while they live."""

    def __init__(self, given: Iterable[Tensor]) -> None:
        super().__init__()
        self.live = self.peak = 0
        self.known: set[int] = {tensor.untyped_storage().data_ptr() for tensor in given}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(tensor, Tensor) and tensor.untyped_storage().data_ptr() not in self.known:
                storage = tensor.untyped_storage()
                self.known.add(storage.data_ptr())
                weakref.finalize(storage, self._free, storage.data_ptr(), storage.nbytes())
                self.live += storage.nbytes()
                self.peak = max(self.peak, self.live)
        return out

    def _free(self, address: int, size: int) -> None:
        self.known.discard(address)
        self.live -= size


def build(overrides: dict[str, object]) -> tuple[AttentionConfig, nn.Module]:
    config = AttentionConfig(**{"key_channels": 8, **overrides})
    return config, build_attention(config, CHANNELS).eval()


@pytest.mark.parametrize("overrides", BLOCKS.values(), ids=BLOCKS.keys())
def test_flops_are_what_pytorch_counts(overrides: dict[str, object]) -> None:
    for size in ((20, 24), (3, 10, 12)):
        config, block = build(overrides)
        # Not every version's counter knows every fused kernel of attention; it does know the products it is made of.
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
            block(torch.randn(2, CHANNELS, *size, requires_grad=True))
        assert block_cost(config, CHANNELS, size, batch=2).flops == counter.get_total_flops()


@pytest.mark.parametrize("module", ["FA-dot", "FA-bot", "FA-multi", "FA-Tfm", "CA-dot", "CA-bot", "CA-multi", "CA-Tfm"])
def test_the_papers_count_is_what_pytorch_counts(module: str) -> None:
    """The counted row of table 9, not the printed one, is the number of operations of the module it names."""
    overrides = {"normalization": "dot", **BLOCKS[module]}
    _, block = build(overrides)
    with FlopCounterMode(display=False) as counter:
        block(torch.randn(1, CHANNELS, 12, 16, requires_grad=True))
    values = {"c": CHANNELS, "b": 8, "k": 8, "m": 16, "h": overrides.get("heads", 1)}
    assert resources(module, (12, 16), values).computation_macc == counter.get_total_flops()
    if (9, module) in MISPRINTS:
        assert resources(module, (12, 16), values, PRINTED[9]).computation_macc != counter.get_total_flops()


@pytest.mark.parametrize("module", ["FA-dot", "FA-bot", "FA-multi", "CA-bot"])
def test_the_papers_memory_is_what_a_training_pass_holds(module: str) -> None:
    """With gradients nothing is freed in between: the values of all layers, to the last float."""
    _, block = build({"normalization": "dot", **BLOCKS[module]})
    x = torch.randn(1, CHANNELS, 16, 24, requires_grad=True)
    with MemoryCounter([x, *block.parameters()]) as counter:
        block(x)
    values = {"c": CHANNELS, "b": 8, "k": 8, "m": 16, "h": 4}
    slack = 4 * 8 * 16 * 24 if module == "CA-bot" else 0  # the keys divided by k
    assert counter.peak == pytest.approx(resources(module, (16, 24), values).memory_bytes + slack, abs=8)


@pytest.mark.parametrize("overrides", BLOCKS.values(), ids=BLOCKS.keys())
@pytest.mark.parametrize("batch", [1, 2])
def test_memory_of_blocks_is_what_is_allocated(
    overrides: dict[str, object], batch: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    size = (34, 34)  # axial blocks of 17 divide it; position tables of whole lines are small beside it
    entries = 100 * 34 * 34 * batch
    monkeypatch.setattr(complexity, "CHUNK_ENTRIES", entries)
    config, block = build(overrides)
    if config.computation == "chunked":
        block.chunk_entries = entries
    cost = block_cost(config, CHANNELS, size, batch)

    x = torch.randn(batch, CHANNELS, *size)
    given = [x, *block.parameters(), *block.buffers()]
    with torch.no_grad(), MemoryCounter(given) as counter:
        block(x)
    assert counter.peak == pytest.approx(cost.inference_bytes, rel=0.03)

    block.train()
    x.requires_grad_()
    with MemoryCounter(given) as counter:
        result = block(x)
        assert counter.live == pytest.approx(cost.training_bytes, rel=0.03)
    del result


def test_factorized_attention_at_the_networks_size() -> None:
    """res4 of a 544x960 picture: 136x240 positions, 128 channels, b = 64. One materialized map is 4.3 GB."""
    factorized = block_cost(AttentionConfig(), 128, (136, 240))
    conventional = block_cost(AttentionConfig(kind="non_local"), 128, (136, 240))
    one_map = 4 * (136 * 240) ** 2
    assert one_map == pytest.approx(4.26e9, rel=1e-3)
    assert conventional.inference_bytes > 2 * one_map
    assert conventional.inference_bytes / factorized.inference_bytes > 100
    assert conventional.flops / factorized.flops > 100
