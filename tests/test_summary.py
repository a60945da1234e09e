"""Runs grouped, counted and compared: every figure of ``fa-stereo summarize``."""

from __future__ import annotations

import math
import statistics
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from summary_runs import write_run
from torch import nn

import fa_stereo.summary
from fa_stereo.attention.complexity import block_cost
from fa_stereo.config import AttentionConfig, DatasetConfig, ModelConfig, RenderConfig
from fa_stereo.errors import InputError
from fa_stereo.models.checkpoint import load_model, read_record, save_weights
from fa_stereo.models.psmnet import build_model
from fa_stereo.summary import (
    choose_baseline,
    compare,
    count_kept_bytes,
    count_multiply_adds,
    count_parameters,
    find_runs,
    group_runs,
    student_t_factor,
)


def labels(root: Path) -> list[str]:
    return [variant.label for variant in group_runs(find_runs([root])[0])]


# --------------------------------------------------------------------------------------------------------------------
# reading and grouping


def test_runs_that_differ_in_the_seed_alone_are_one_variant(tmp_path: Path) -> None:
    for job, (kind, seed) in enumerate([("none", 0), ("none", 1), ("factorized", 0), ("factorized", 1)]):
        write_run(tmp_path / str(job), [3.0, 2.0 + seed], seed=seed, kind=kind)
    variants = group_runs(find_runs([tmp_path])[0])
    assert [(variant.label, list(variant.runs)) for variant in variants] == [("none", [0, 1]), ("factorized", [0, 1])]
    assert variants[0].finals("end_point_error") == [2.0, 3.0]
    assert variants[0].mean_and_deviation("end_point_error") == (2.5, pytest.approx(math.sqrt(0.5)))
    assert variants[0].curve("end_point_error") == ([0, 10], [[3.0, 3.0], [2.0, 3.0]])


def test_keys_without_an_effect_make_no_variant(tmp_path: Path) -> None:
    """A baseline is the baseline, whatever else was swept; where a run was computed changes nothing."""
    write_run(tmp_path / "0", kind="none", key_channels=16, heads=2)
    write_run(tmp_path / "1", kind="none", seed=1, slots=["res1"])
    write_run(tmp_path / "2", kind="none", seed=2, trainer={"log_every_steps": 3, "device": "cpu"})
    assert labels(tmp_path) == ["none"]


def test_labels_say_what_differs_in_the_words_of_the_command_line(tmp_path: Path) -> None:
    write_run(tmp_path / "0", kind="none")
    write_run(tmp_path / "2", kind="factorized", key_channels=16)
    write_run(tmp_path / "10", kind="factorized", key_channels=32)
    write_run(tmp_path / "11", kind="axial", heads=2, span=5)
    write_run(tmp_path / "12", kind="axial", heads=2)
    assert labels(tmp_path) == [
        "none",
        "factorized, key_channels=16",
        "factorized, key_channels=32",
        "axial, span=5",
        "axial, span=whole lines",
    ]


def test_other_slots_and_recipes_are_other_variants(tmp_path: Path) -> None:
    write_run(tmp_path / "0", slots=["res3", "res4"])
    write_run(tmp_path / "1", slots=["res4"])
    assert labels(tmp_path) == ["factorized, slots=res3,res4", "factorized, slots=res4"]
    write_run(tmp_path / "2", slots=["res4"], trainer={"batch_size": 2})
    assert "factorized, trainer.batch_size=2, slots=res4" in labels(tmp_path)


def test_settings_that_came_later_had_their_defaults(tmp_path: Path) -> None:
    write_run(tmp_path / "0")
    weights = write_run(tmp_path / "1", seed=1) / "weights.safetensors"
    record = read_record(weights)
    for later in ("model.regression", "data.train.rendered.plain", "trainer.ema_decay"):
        del record["training"][later]
    save_weights(load_model(weights), weights, record)
    assert labels(tmp_path) == ["factorized"]


def test_other_sources_of_pairs_are_other_variants(tmp_path: Path) -> None:
    sources = [DatasetConfig("pairs", root="mine"), DatasetConfig(rendered=RenderConfig(seed=9))]
    for count in range(3):
        write_run(tmp_path / str(count), also=sources[:count])
    assert labels(tmp_path) == [
        f"factorized, data.also={also}" for also in ("none", "pairs", "pairs + rendered(seed=9)")
    ]


def test_other_weights_to_start_from_make_another_variant(tmp_path: Path) -> None:
    for job, start in enumerate([None, {"steps": 5}, {"steps": 6}]):
        write_run(tmp_path / str(job), seed=job, started_from=start)
    assert "factorized, started_from=fresh weights" in labels(tmp_path)
    assert len(set(labels(tmp_path))) == 3


def test_a_folder_named_twice_is_read_once(tmp_path: Path) -> None:
    write_run(tmp_path / "sweep" / "0")
    write_run(tmp_path / "sweep" / "1", seed=1)
    runs, unfinished = find_runs([tmp_path / "sweep", tmp_path / "sweep" / "1", tmp_path])
    assert (len(runs), unfinished) == (2, [])


def test_unfinished_runs_are_told_apart(tmp_path: Path) -> None:
    write_run(tmp_path / "0")
    (write_run(tmp_path / "1", seed=1) / "weights.safetensors").unlink()
    write_run(tmp_path / "2", seed=2, trained_steps=5)  # went on after its weights were written
    runs, unfinished = find_runs([tmp_path])
    assert [run.seed for run in runs] == [0]
    assert [folder.name for folder in unfinished] == ["1", "2"]


def test_bad_input_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="nothing: there is no such folder"):
        find_runs([tmp_path / "nothing"])
    with pytest.raises(InputError, match=r"no run in it has a history\.jsonl"):
        find_runs([tmp_path])
    write_run(tmp_path / "0")
    write_run(tmp_path / "1")
    with pytest.raises(InputError, match=r"0 and .*1 are the same run twice \(seed 0\)"):
        group_runs(find_runs([tmp_path])[0])
    (tmp_path / "1" / "history.jsonl").write_text('{"step": 10}\n')
    with pytest.raises(InputError, match="end_point_error"):
        find_runs([tmp_path])
    (tmp_path / "1" / "weights.safetensors").write_bytes(b"no weights")
    with pytest.raises(InputError, match="weights"):
        find_runs([tmp_path])


def test_recorded_times_are_medians_and_memory_is_the_largest(tmp_path: Path) -> None:
    write_run(tmp_path / "0", [4.0, 3.0, 2.0], seconds=[None, 1.0, 3.0], memory=[5, 6, 7])
    write_run(tmp_path / "1", [4.0, 3.0, 2.0], seconds=[None, 4.0, 4.0], memory=[5, 6, 9], seed=1)
    (variant,) = group_runs(find_runs([tmp_path])[0])
    assert variant.recorded("step_seconds") == 3.0
    assert variant.recorded("peak_memory_bytes") == 8
    write_run(tmp_path / "2", heads=2, memory=[None, None])
    assert group_runs(find_runs([tmp_path])[0])[1].recorded("peak_memory_bytes") is None


# --------------------------------------------------------------------------------------------------------------------
# counting


def network(**attention: object) -> ModelConfig:
    return ModelConfig(base_channels=8, max_disparity=32, attention=AttentionConfig(key_channels=8, **attention))  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", ["factorized", "non_local", "axial", "resblock"])
def test_a_block_adds_its_own_cost_to_the_count(kind: str) -> None:
    config, plain = network(kind=kind), network(kind="none")
    block = build_model(config).features.attention["res4"]
    assert count_parameters(config) - count_parameters(plain) == sum(p.numel() for p in block.parameters())
    # once for each view; the closed form counts a multiplication and an addition apart, and other operations too
    added = count_multiply_adds(config, 64, 96) - count_multiply_adds(plain, 64, 96)
    assert added == pytest.approx(block_cost(config.attention, 32, (16, 24)).flops, rel=0.15)


def test_fused_attention_counts_like_any_other() -> None:
    counts = []
    for computation in ("materialized", "chunked", "fused"):
        # as many key channels as values: the fused form pads the fewer
        attention = AttentionConfig(kind="non_local", computation=computation, key_channels=32)
        config = ModelConfig(base_channels=8, max_disparity=32, attention=attention)
        counts.append(count_multiply_adds(config, 64, 96))
    assert len(set(counts)) == 1
    assert counts[0] > count_multiply_adds(network(kind="none"), 64, 96) + 2 * 2 * (16 * 24) ** 2 * 32


def test_kept_bytes_are_those_of_a_small_network_counted_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    class Small(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(3, 1, 1))
            self.features = SimpleNamespace(pyramid=SimpleNamespace(freeze_lonely_values=lambda *_: None))

        def forward(self, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
            scaled = left * self.weight  # keeps left, and the weight, which is there anyway
            return scaled.exp() + right  # keeps its result

    monkeypatch.setattr("fa_stereo.summary.build_model", lambda config: Small())
    assert count_kept_bytes(ModelConfig(), 16, 32, batch=2) == (2 + 2) * 2 * 3 * 16 * 32 * 4 // 2 + 2 * 3 * 16 * 32 * 4


def test_the_materialized_map_is_what_it_keeps() -> None:
    kept = {
        computation: count_kept_bytes(network(kind="non_local", computation=computation), 128, 192, batch=2)
        for computation in ("materialized", "fused")
    }
    attention_map = 2 * 2 * (32 * 48) ** 2 * 4  # of two pictures in two views
    assert kept["materialized"] - kept["fused"] == pytest.approx(attention_map, rel=0.1)  # the fused form keeps little
    half = count_kept_bytes(network(kind="factorized"), 64, 96, batch=2, precision="bf16")
    full = count_kept_bytes(network(kind="factorized"), 64, 96, batch=2)
    assert half < 0.8 * full
    # Frozen batch norm is folded: what its convolution puts out is not kept.
    assert count_kept_bytes(network(kind="factorized"), 64, 96, batch=2, freeze_batch_norm=True) < 0.7 * full


def test_what_is_computed_again_is_not_kept() -> None:
    full = count_kept_bytes(network(kind="factorized"), 64, 96, batch=2)
    assert count_kept_bytes(network(kind="factorized"), 64, 96, batch=2, activation_checkpointing=True) < 0.5 * full
    # one crop as small as a cell of the pyramid, of which no statistics of a batch could be taken
    assert count_kept_bytes(network(kind="factorized"), 32, 64, batch=1) > 0


@pytest.mark.parametrize("frozen", [False, True])
def test_what_large_batches_keep_is_known_from_small_ones(monkeypatch: pytest.MonkeyPatch, frozen: bool) -> None:
    sizes = []
    build = fa_stereo.summary.build_model

    def watched(config: ModelConfig) -> nn.Module:
        model = build(config)
        model.register_forward_pre_hook(lambda _, inputs: sizes.append(len(inputs[0])))
        return model

    monkeypatch.setattr("fa_stereo.summary.build_model", watched)
    kept = {
        batch: count_kept_bytes(network(kind="factorized"), 64, 96, batch, freeze_batch_norm=frozen)
        for batch in (2, 3, 5, 24)
    }
    assert max(sizes) == 3
    assert kept[24] - kept[5] == 19 * (kept[3] - kept[2])

    whole = network(kind="factorized")
    monkeypatch.setattr("fa_stereo.summary._FEW", 5)
    assert count_kept_bytes(whole, 64, 96, 5, freeze_batch_norm=frozen) == kept[5]
    assert max(sizes) == 5


def test_runs_on_other_pairs_are_other_variants(tmp_path: Path) -> None:
    for name, seed, pairs in (("a", 0, {"seed": 1}), ("b", 1, {"seed": 2}), ("c", 1, [{"seed": 4}, {"seed": 3}])):
        folder = write_run(tmp_path / name, seed=seed)
        weights = folder / "weights.safetensors"
        record = read_record(weights) | {"training_pairs": 40, "rendered_pairs": pairs}
        save_weights(load_model(weights), weights, record)
    for name, seed, pairs in (("d", 2, {"seed": 1, "device": "cuda"}), ("e", 3, {"seed": 1, "haze": 0.15})):
        weights = write_run(tmp_path / name, seed=seed) / "weights.safetensors"  # rendered alike
        record = read_record(weights) | {"training_pairs": 40, "rendered_pairs": pairs}
        save_weights(load_model(weights), weights, record)
    variants = group_runs(find_runs([tmp_path])[0])
    assert [len(variant.runs) for variant in variants] == [3, 1, 1]
    assert [variant.label for variant in variants] == [
        "factorized, pairs.seed=1", "factorized, pairs.seed=2", "factorized, pairs.seed=4",
    ]  # fmt: skip


def test_counting_leaves_the_random_numbers_alone() -> None:
    before = torch.get_rng_state()
    count_parameters(network())
    assert torch.equal(torch.get_rng_state(), before)


# --------------------------------------------------------------------------------------------------------------------
# comparing


@pytest.mark.parametrize(
    ("degrees", "factor"), [(1, 12.7062), (2, 4.30265), (4, 2.77645), (9, 2.26216), (29, 2.04523), (1000, 1.96234)]
)
def test_factors_are_those_of_the_tables(degrees: int, factor: float) -> None:
    assert student_t_factor(degrees) == pytest.approx(factor, rel=1e-4)


def test_differences_are_paired_by_seed(tmp_path: Path) -> None:
    baseline, better = [1.0, 2.0, 3.0], [0.9, 1.88, 2.89]  # far apart between seeds, alike within
    for seed in range(3):
        write_run(tmp_path / f"none_{seed}", [9.0, baseline[seed]], seed=seed, kind="none")
        write_run(tmp_path / f"some_{seed}", [9.0, better[seed]], seed=seed)
    write_run(tmp_path / "other", [9.0, 0.1], seed=7)  # no partner
    plain, factorized = group_runs(find_runs([tmp_path])[0])
    comparison = compare(factorized, plain)
    differences = [b - a for a, b in zip(baseline, better, strict=True)]
    assert comparison.differences == pytest.approx(dict(enumerate(differences)))
    margin = 4.30265 * statistics.stdev(differences) / math.sqrt(3)
    assert comparison.interval == pytest.approx((-0.11 - margin, -0.11 + margin), rel=1e-4)
    assert comparison.verdict == "better, with 3 seeds"
    assert compare(plain, factorized).verdict == "worse, with 3 seeds"


def test_a_difference_among_many_must_be_larger(tmp_path: Path) -> None:
    for seed, difference in enumerate([0.10, 0.12, 0.15]):
        write_run(tmp_path / f"none_{seed}", [9.0, 1.0], seed=seed, kind="none")
        write_run(tmp_path / f"some_{seed}", [9.0, 1.0 + difference], seed=seed)
    plain, factorized = group_runs(find_runs([tmp_path])[0])
    alone, among = compare(factorized, plain), compare(factorized, plain, comparisons=20)
    assert alone.verdict == "worse, with 3 seeds"
    assert among.verdict == "worse by itself, not as one of 20 comparisons with 3 seeds"
    assert among.interval == alone.interval == alone.joint_interval
    assert among.joint_interval is not None
    margin = student_t_factor(2, 1 - 0.05 / 20) * statistics.stdev([0.10, 0.12, 0.15]) / math.sqrt(3)
    assert among.joint_interval[1] - 0.37 / 3 == pytest.approx(margin)


def test_variants_of_one_kind_are_in_the_order_of_their_values(tmp_path: Path) -> None:
    for job, span in enumerate([17, None, 5, 9]):
        write_run(tmp_path / str(job), kind="axial", heads=2, span=span)
    assert [label.rpartition("=")[2] for label in labels(tmp_path)] == ["5", "9", "17", "whole lines"]


def test_what_cannot_be_told_is_not(tmp_path: Path) -> None:
    for seed, value in enumerate([1.5, 1.0]):
        write_run(tmp_path / f"none_{seed}", [9.0, 1.2], seed=seed, kind="none")
        write_run(tmp_path / f"some_{seed}", [9.0, value], seed=seed)
    write_run(tmp_path / "one", [9.0, 0.5], seed=1, heads=2)
    write_run(tmp_path / "stranger", [9.0, 0.5], seed=8, heads=4)
    variants = group_runs(find_runs([tmp_path])[0])
    plain = choose_baseline(variants)
    verdicts = {variant.label: compare(variant, plain).verdict for variant in variants}
    assert verdicts["factorized, heads=1"] == "not distinguishable with 2 seeds"
    assert verdicts["factorized, heads=2"] == "one seed: nothing to tell chance by"
    assert verdicts["factorized, heads=4"] == "no seed in common"


def test_the_baseline_is_the_variant_without_attention_or_the_one_named(tmp_path: Path) -> None:
    write_run(tmp_path / "0")
    write_run(tmp_path / "1", kind="none")
    variants = group_runs(find_runs([tmp_path])[0])
    assert choose_baseline(variants).label == "none"
    assert choose_baseline(variants, "factorized").label == "factorized"
    assert choose_baseline(variants[:1]).label == "factorized"
    with pytest.raises(InputError, match="there are: factorized; none"):
        choose_baseline(variants, "facorized")
