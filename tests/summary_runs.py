"""What the tests of summaries share: the folder that a finished run leaves, written without training."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fa_stereo.config import AttentionConfig, DatasetConfig, ModelConfig, TrainConfig, TrainerConfig, to_plain
from fa_stereo.export import without_paths
from fa_stereo.history import History
from fa_stereo.models.checkpoint import save_weights
from fa_stereo.models.psmnet import build_model


def write_run(
    folder: Path,
    errors: Sequence[float] = (3.0, 2.0),
    *,
    seed: int = 0,
    kind: str = "factorized",
    key_channels: int = 4,
    slots: Sequence[str] = ("res4",),
    trainer: dict[str, Any] | None = None,
    seconds: Sequence[float | None] | None = None,
    memory: Sequence[int | None] | None = None,
    trained_steps: int | None = None,
    started_from: dict[str, Any] | None = None,
    also: Sequence[DatasetConfig] = (),
    more: dict[str, Any] | None = None,
    **attention: Any,
) -> Path:
    """Write weights and history of a run with one validation every 10 steps, and return its folder."""
    settings = AttentionConfig(kind=kind, key_channels=key_channels, **attention)
    model = ModelConfig(base_channels=4, max_disparity=16, attention=settings, attention_slots=list(slots))
    config = TrainConfig(model, trainer=TrainerConfig(**{"batch_size": 3, "seed": seed, **(trainer or {})}))
    config.data.also = list(also)
    config.data.augmentation.crop_height, config.data.augmentation.crop_width = 32, 64
    folder.mkdir(parents=True)
    history = History(folder, -1)
    for index, error in enumerate(errors):
        history.add(
            {
                "step": 10 * index,
                "end_point_error": error,
                "bad_3": 10 * error,
                "step_seconds": seconds[index] if seconds else 0.5,
                "step_cpu_seconds": 0.4,
                "peak_memory_bytes": memory[index] if memory else None,
            }
        )
    steps = 10 * (len(errors) - 1) if trained_steps is None else trained_steps
    record = {"steps": steps, "training": without_paths(to_plain(config)), "started_from": started_from}
    save_weights(build_model(model), folder / "weights.safetensors", record | (more or {}))
    return folder
