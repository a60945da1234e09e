"""``fa-stereo train``: one training run, or a sweep of them."""

from __future__ import annotations

import sys

from fa_stereo import distributed
from fa_stereo.cli.hydra_entry import run_hydra
from fa_stereo.config import TrainConfig

# Short names of what nearly every second command line gives.
_ALIASES = {"init_from": "trainer.init_from", "resume": "trainer.resume", "seed": "trainer.seed"}


def main(argv: list[str]) -> int:
    """Train; the exit code is 0 also if a signal stopped the run in time, and 1 if training could not go on."""
    stopped = False

    def train(config: TrainConfig) -> int:
        nonlocal stopped
        if stopped:  # a signal ends the sweep, not just one of its runs
            return 0
        from fa_stereo.memory import keep_freed_memory  # only now: a typo is told without delay
        from fa_stereo.training import Trainer, TrainingError

        keep_freed_memory()
        try:
            stopped = not Trainer(config).run().finished
        except TrainingError as error:
            print(f"fa-stereo train: {error}", file=sys.stderr)
            return 1
        return 0

    with distributed.process_group():
        return run_hydra([_expand_alias(argument) for argument in argv], "train", TrainConfig, train)


def _expand_alias(argument: str) -> str:
    key, equals, value = argument.partition("=")
    return f"{_ALIASES.get(key, key)}{equals}{value}"
