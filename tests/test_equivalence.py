"""What makes the variants of ``experiment=equivalence`` comparable: one start, one order of pairs, one recipe."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from test_configs import make
from training_runs import assert_identical, tiny_config, write_pairs

from fa_stereo.config import ATTENTION_SLOTS, AttentionConfig, ModelConfig
from fa_stereo.models.psmnet import build_model
from fa_stereo.training import Trainer

VARIANTS = [
    (AttentionConfig(key_channels=8), ["res4"]),
    (AttentionConfig(key_channels=16, heads=2), ["res1", "res3"]),
    (AttentionConfig(kind="non_local", key_channels=8, computation="fused"), ["pyramid"]),
    (AttentionConfig(kind="axial", key_channels=8, heads=4, span=5), list(ATTENTION_SLOTS)),
    (AttentionConfig(kind="resblock"), ["res2"]),
]


@pytest.mark.parametrize(("attention", "slots"), VARIANTS)
def test_a_block_leaves_the_other_weights_as_they_start(attention: AttentionConfig, slots: list[str]) -> None:
    def build(attention: AttentionConfig) -> torch.nn.Module:
        torch.manual_seed(3)
        return build_model(ModelConfig(base_channels=8, max_disparity=32, attention=attention, attention_slots=slots))

    plain = build(AttentionConfig(kind="none")).state_dict()
    after_plain = torch.get_rng_state()
    with_block = build(attention).state_dict()
    assert torch.equal(torch.get_rng_state(), after_plain)  # nor does it change what is drawn later
    assert_identical(dict(plain), {key: with_block[key] for key in plain}, "")
    assert len(with_block) > len(plain)


def test_blocks_of_two_slots_start_differently() -> None:
    config = ModelConfig(
        base_channels=8, max_disparity=32, attention=AttentionConfig(key_channels=8), attention_slots=["res3", "res4"]
    )
    weights = build_model(config).features.attention.state_dict()
    some = next(key for key in weights if key.startswith("res3.") and weights[key].std() > 0)
    assert not torch.equal(weights[some], weights[some.replace("res3.", "res4.")])


def test_all_variants_see_the_same_pairs_in_the_same_order(tmp_path: Path) -> None:
    pairs = write_pairs(tmp_path / "pairs")
    batches = []
    for attention in (AttentionConfig(kind="none"), AttentionConfig(kind="axial", key_channels=4, heads=2)):
        config = tiny_config(pairs, tmp_path / attention.kind, trainer__seed=5)
        config.model.attention = attention
        batches.append([dict(batch) for batch in Trainer(config)._batches()])
    assert_identical(batches[0], batches[1], "")


def test_the_variants_differ_in_the_attention_alone() -> None:
    plain = make("experiment=equivalence", "attention=none")
    for name in ("factorized", "non_local_fused", "axial"):
        config = make("experiment=equivalence", f"attention={name}")
        assert config.model.attention == make(f"attention={name}").model.attention
        config.model.attention = plain.model.attention
        assert config == plain
    materialized = make("experiment=equivalence", "attention=non_local", "model.attention.computation=materialized")
    assert materialized.model.attention.computation == "materialized"


def test_training_and_validation_pairs_differ() -> None:
    config = make("experiment=equivalence")
    assert config.data.validation is not None
    assert config.data.validation.rendered.seed != config.data.train.rendered.seed
    assert config.data.validation.rendered.max_disparity == config.data.train.rendered.max_disparity
    assert config.model.max_disparity >= config.data.train.rendered.max_disparity
