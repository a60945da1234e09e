"""``history.jsonl``: one line a validation, through kills and resumptions."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from training_runs import tiny_config, write_pairs

from fa_stereo.config import DatasetConfig
from fa_stereo.errors import InputError
from fa_stereo.history import FILE_NAME, History, read_history
from fa_stereo.training import Trainer


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pairs(tmp_path_factory.mktemp("history") / "pairs")


def test_lines_are_kept_up_to_the_step_a_run_goes_on_from(tmp_path: Path) -> None:
    history = History(tmp_path, -1)
    for step in (0, 10, 20):
        history.add({"step": step, "end_point_error": 2.0})
    own = read_history(tmp_path / FILE_NAME)
    for lines in (own, None):  # remembered by the run; of one that does not
        resumed = History(tmp_path, 10, lines)
        assert [line["step"] for line in resumed.lines] == [0, 10]
    assert History(tmp_path, 10).lines == []  # of a run that begins where another one left its file
    resumed.add({"step": 20, "end_point_error": 1.0})
    assert [(line["step"], line["end_point_error"]) for line in read_history(tmp_path / FILE_NAME)] == [
        (0, 2.0),
        (10, 2.0),
        (20, 1.0),
    ]
    assert [path.name for path in tmp_path.iterdir()] == [FILE_NAME]


@pytest.mark.parametrize("text", ["", "{]\n", "3\n", '{"epoch": 1}\n', '{"step": 3}\n{"step": 3}\n', "\xff\n"])
def test_what_is_not_a_history_is_refused(text: str, tmp_path: Path) -> None:
    path = tmp_path / FILE_NAME
    path.write_text(text, encoding="latin-1")
    with pytest.raises(InputError, match=FILE_NAME):
        read_history(path)


def test_a_run_writes_a_line_for_each_validation_also_when_resumed(pairs: Path, tmp_path: Path) -> None:
    """A run that is stopped and one that is not leave the same metrics."""

    def trainer(folder: str, steps: int) -> Trainer:
        config = tiny_config(
            pairs,
            tmp_path / folder,
            trainer__max_steps=steps,
            trainer__validate_every_steps=2,
            trainer__validate_at_start=True,
        )
        config.data.validation = DatasetConfig(kind="pairs", root=str(pairs))
        return Trainer(config)

    result = trainer("whole", 4).run()
    trainer("parts", 2).run()
    trainer("parts", 4).run()
    whole, parts = (read_history(tmp_path / folder / FILE_NAME) for folder in ("whole", "parts"))
    assert [line["step"] for line in whole] == [0, 2, 4]
    assert whole[-1]["end_point_error"] == result.validation["end_point_error"]
    for line in whole[1:]:
        assert line["step_seconds"] > 0
        assert line["step_cpu_seconds"] > 0
    assert whole[0]["step_seconds"] is None
    timed = {"step_seconds", "step_cpu_seconds", "peak_memory_bytes"}
    for one, other in zip(whole, parts, strict=True):
        assert {key: one[key] for key in one.keys() - timed} == {key: other[key] for key in other.keys() - timed}


def test_a_run_goes_on_where_its_history_cannot_be_written(
    pairs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    config = tiny_config(pairs, tmp_path / "run", trainer__max_steps=2, trainer__validate_every_steps=1)
    config.data.validation = DatasetConfig(kind="pairs", root=str(pairs))
    trainer = Trainer(config)
    write = History.add

    def fail_once(history: History, values: dict[str, object]) -> None:
        monkeypatch.setattr("fa_stereo.history.write_bytes", lambda path, content: _refuse(path))
        try:
            write(history, values)
        finally:
            monkeypatch.undo()

    def _refuse(path: Path) -> None:
        raise InputError(f"{path}: cannot be written (no space left on device)")

    monkeypatch.setattr(History, "add", fail_once)
    assert trainer.run().finished
    assert "no space left" in caplog.text
    lines = [json.loads(line) for line in (tmp_path / "run" / FILE_NAME).read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2]
