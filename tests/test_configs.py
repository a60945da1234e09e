"""Every configuration file composes, and the experiments are the recipes they are named after."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import yaml
from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from omegaconf import OmegaConf

from fa_stereo.cli.hydra_entry import find_conf_dir
from fa_stereo.config import ATTENTION_KINDS, ProtocolConfig, TrainConfig, from_plain, to_plain
from fa_stereo.errors import InputError
from fa_stereo.models.checkpoint import load_model
from fa_stereo.weights import find_weights

CONF = Path(__file__).resolve().parent.parent / "conf"
GROUPS = ("model", "attention", "data", "optimizer", "schedule", "trainer", "experiment")


def options(group: str) -> list[str]:
    return sorted(path.stem for path in (CONF / group).glob("*.yaml"))


def make(*overrides: str) -> TrainConfig:
    ConfigStore.instance().store(name="train_schema", node=TrainConfig)
    OmegaConf.register_new_resolver("started", lambda pattern: "now", replace=True)
    with initialize_config_dir(str(CONF), version_base="1.3"):
        composed = compose("train", list(overrides))
    return from_plain(TrainConfig, OmegaConf.to_container(composed, resolve=True, throw_on_missing=True))  # type: ignore[arg-type]


def test_the_repositorys_files_are_found() -> None:
    assert find_conf_dir() == CONF


@pytest.mark.parametrize(("group", "option"), [(group, option) for group in GROUPS for option in options(group)])
def test_every_option_composes(group: str, option: str) -> None:
    make(f"{group}={option}")


def test_the_defaults_are_the_papers_run() -> None:
    """Paper: batch 24, learning rate 2e-3, 100 epochs on Scene Flow; everything else as PSMNet."""
    for config in (make(), make("experiment=fa_psmnet_scene_flow")):
        assert (config.trainer.batch_size, config.trainer.epochs, config.trainer.max_steps) == (24, 100, None)
        assert config.optimizer.kind == "adam"
        assert config.optimizer.learning_rate == 2e-3
        assert (config.optimizer.betas, config.optimizer.weight_decay) == ([0.9, 0.999], 0)
        assert (config.schedule.kind, config.schedule.warmup_steps) == ("constant", 0)
        assert config.loss.output_weights == [0.5, 0.7, 1.0]
        assert config.loss.cross_entropy_weight == 0
        assert config.loss.smooth_l1_beta == 1
        assert not config.loss.mask_zero
        assert (config.trainer.precision, config.trainer.gradient_clip_norm, config.trainer.ema_decay) == (
            "fp32",
            None,
            0,
        )
        augmentation = config.data.augmentation
        assert (augmentation.crop_height, augmentation.crop_width) == (256, 512)
        assert augmentation.color == augmentation.asymmetric_color == augmentation.right_occluder == 0
        assert augmentation.scale == augmentation.stretch == augmentation.vertical_jitter == 0
        assert augmentation.horizontal_flip == augmentation.vertical_flip == 0
        train, validation = config.data.train, config.data.validation
        assert (train.kind, train.split, train.limit) == ("scene_flow", "train", None)
        assert train.scene_flow.passes == "clean"
        assert train.scene_flow.sets == ["flyingthings3d", "monkaa", "driving"]
        assert validation is not None
        assert (validation.kind, validation.split) == ("scene_flow", "test")
        assert validation.scene_flow.sets == ["flyingthings3d"]
        model = config.model
        assert (model.aggregation, model.base_channels, model.max_disparity) == ("stacked_hourglass", 32, 192)
        assert model.attention_slots == ["res4"]
        attention = model.attention
        assert (attention.kind, attention.normalization) == ("factorized", "gaussian")
        assert (attention.key_channels, attention.heads, attention.value_channels) == (64, 1, None)


def test_psmnets_own_run() -> None:
    config = make("experiment=psmnet_scene_flow")
    assert config.model.attention.kind == "none"
    assert config.optimizer.learning_rate == 1e-3
    assert (config.trainer.epochs, config.trainer.batch_size) == (10, 12)


@pytest.mark.parametrize(("experiment", "kind"), [("psmnet_tuned", "none"), ("nonlocal_psmnet", "non_local")])
def test_the_papers_comparisons_differ_in_the_attention_alone(experiment: str, kind: str) -> None:
    config, paper = make(f"experiment={experiment}"), make("experiment=fa_psmnet_scene_flow")
    assert config.model.attention.kind == kind
    assert config.model.attention.computation == "materialized"
    config.model.attention = paper.model.attention
    assert config == paper


def test_kitti_fine_tuning_is_psmnets() -> None:
    config = make("experiment=finetune_kitti2015", "data.train.root=/kitti")
    assert config.loss.mask_zero
    assert (config.trainer.epochs, config.optimizer.learning_rate) == (300, 1e-3)
    assert (config.schedule.kind, config.schedule.milestones, config.schedule.decay) == ("multi_step", [200], 0.1)
    assert config.data.validation is not None
    assert (config.data.train.split, config.data.validation.split) == ("train", "validation")


def test_fine_tuning_goes_on_from_bundled_weights() -> None:
    config = make("experiment=finetune", "data.train.root=/mine")
    assert config.trainer.init_from == "small"
    bundled = load_model(find_weights("small")).config
    assert config.model == bundled
    of_full_width = make("experiment=finetune", "data.train.root=/mine", "trainer.init_from=full", "model=full").model
    assert of_full_width == load_model(find_weights("full")).config
    assert config.data.train.kind == "pairs"
    assert config.trainer.freeze_batch_norm
    assert not make("experiment=finetune", "trainer.freeze_batch_norm=false").trainer.freeze_batch_norm


def test_small_models_train_on_rendered_pairs() -> None:
    for experiment in ("quick", "small_rendered_start", "small_rendered", "small_rendered_full_range",
                       "small_rendered_context"):  # fmt: skip
        config = make(f"experiment={experiment}")
        assert config.model.base_channels == 16
        assert config.data.train.kind == "rendered"
        assert config.data.validation is not None
        assert config.data.validation.kind == "rendered"
        assert config.data.validation.rendered.seed != config.data.train.rendered.seed
        assert config.data.train.rendered.max_disparity == (40 if experiment == "quick" else 192)
        assert config.data.validation.rendered.max_disparity == config.data.train.rendered.max_disparity


@pytest.mark.parametrize("seed", [-1, 2**32])
def test_seeds_out_of_range_are_refused(seed: int) -> None:
    with pytest.raises(InputError, match=r"trainer\.seed must be from 0 to 4294967295"):
        make(f"trainer.seed={seed}")
    with pytest.raises(InputError, match=r"rendered\.seed must be from 0"):
        make("data=rendered", f"data.train.rendered.seed={seed}")
    with pytest.raises(InputError, match=r"image_seed must be from 0"):
        ProtocolConfig(image_seed=seed)


def test_the_validation_reads_what_the_training_reads() -> None:
    config = make("data.train.root=/scene_flow", "data.train.scene_flow.passes=final")
    assert config.data.validation is not None
    assert config.data.validation.root == "/scene_flow"
    assert config.data.validation.scene_flow.passes == "final"
    config = make("data.train.root=/scene_flow", "data.validation.root=/elsewhere")
    assert config.data.validation is not None
    assert config.data.validation.root == "/elsewhere"
    assert make("data.validation=null").data.validation is None


@pytest.mark.parametrize(("model", "attention"), list(itertools.product(options("model"), options("attention"))))
def test_the_attention_is_chosen_apart_from_the_model(model: str, attention: str) -> None:
    config = make(f"model={model}", f"attention={attention}")
    kind, _, variant = attention.rpartition("_") if attention not in ATTENTION_KINDS else (attention, "", "")
    found = config.model.attention
    assert found.kind == kind
    assert (found.normalization == "dot", found.transformer) == (variant == "dot", variant == "transformer")
    assert (found.heads == 8) == (variant in ("heads", "transformer") or kind == "axial")
    assert (found.value_channels is not None) == (variant == "bottleneck")
    assert found.span == (65 if attention == "axial" else None)
    assert found.computation == (variant if variant in ("chunked", "fused") else "materialized")
    assert config.model.attention_slots == ["res4"]


def test_attention_beats_the_experiment_and_the_command_line_beats_all() -> None:
    config = make("experiment=nonlocal_psmnet", "attention=axial", "model.attention.span=9", "trainer.batch_size=8")
    assert (config.model.attention.kind, config.model.attention.span, config.trainer.batch_size) == ("axial", 9, 8)


def test_the_equivalence_experiment_takes_every_attention_as_it_is() -> None:
    for attention in options("attention"):
        chosen = make("experiment=equivalence", f"attention={attention}").model.attention
        assert chosen == make(f"attention={attention}").model.attention, attention


def test_no_file_instantiates_objects_and_experiments_hold_differences_only() -> None:
    for path in CONF.rglob("*.yaml"):
        assert "_target_" not in path.read_text()
    for option in options("experiment"):
        content = yaml.safe_load((CONF / "experiment" / f"{option}.yaml").read_text()) or {}
        entries = content.pop("defaults", [])
        base = [f"experiment={entry}" for entry in entries if isinstance(entry, str)]  # one that this one goes on from
        overridden = {next(iter(entry)).split("/")[-1] for entry in entries if not isinstance(entry, str)}
        _assert_different(content, to_plain(make(*base)), overridden, option)


def _assert_different(values: dict[str, object], defaults: dict[str, object], overridden: set[str], where: str) -> None:
    for key, value in values.items():
        if isinstance(value, dict):
            inner = defaults[key]
            assert isinstance(inner, dict)
            _assert_different(value, inner, overridden, f"{where}.{key}")
        elif not where.split(".")[1:2] or where.split(".")[1] not in overridden:
            assert value != defaults[key], f"{where}.{key} repeats the default"
