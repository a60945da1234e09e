"""``fa-stereo check-data``: counts and verifies the files of a data set."""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from torch.utils.data import Dataset
from tqdm import tqdm

from fa_stereo.cli.outputs import check_output_file
from fa_stereo.config import (
    DATASET_KINDS,
    SCENE_FLOW_LAYOUTS,
    SCENE_FLOW_PASSES,
    SCENE_FLOW_SETS,
    DatasetConfig,
    SceneFlowConfig,
)
from fa_stereo.data.datasets import checked_root, open_dataset
from fa_stereo.data.pairs import FileDataset
from fa_stereo.data.sample import StereoSample
from fa_stereo.data.scene_flow import (
    EXPECTED_FRAMES,
    EXPECTED_FRAMES_OF_PART,
    AbsentSplitError,
    SceneFlowFrames,
    available_sets,
    detect_layout,
    list_scene_flow,
)
from fa_stereo.errors import InputError, MissingFilesError
from fa_stereo.files import write_bytes
from fa_stereo.machine import available_cores

_LARGE_DISPARITY_PX = 192  # what the paper's networks can express
_LISTED_PROBLEMS = 20
_KITTI_FRAMES = {"kitti2012": 194, "kitti2015": 200}


@dataclass
class DisparityStatistics:
    """Statistics over all pixels of the maps added."""

    pixels: int = 0
    invalid: int = 0
    large: int = 0
    total: float = 0.0
    minimum: float = math.inf
    maximum: float = -math.inf

    @classmethod
    def of(cls, disparity: np.ndarray[Any, np.dtype[np.float32]]) -> DisparityStatistics:
        """Return the statistics of one map [H, W], inf = no ground truth."""
        valid = disparity[np.isfinite(disparity)]
        if valid.size == 0:
            return cls(pixels=disparity.size, invalid=disparity.size)
        return cls(
            pixels=disparity.size,
            invalid=disparity.size - valid.size,
            large=int((valid >= _LARGE_DISPARITY_PX).sum()),
            total=float(valid.sum(dtype=np.float64)),
            minimum=float(valid.min()),
            maximum=float(valid.max()),
        )

    def add(self, other: DisparityStatistics) -> None:
        """Take another map's statistics in."""
        self.pixels += other.pixels
        self.invalid += other.invalid
        self.large += other.large
        self.total += other.total
        self.minimum = min(self.minimum, other.minimum)
        self.maximum = max(self.maximum, other.maximum)

    def summary(self) -> dict[str, float | int | None]:
        """Return minimum, mean and maximum in pixels, and shares in percent; None where there is nothing to measure."""
        valid = self.pixels - self.invalid
        return {
            "pixels": self.pixels,
            "min_px": self.minimum if valid else None,
            "mean_px": self.total / valid if valid else None,
            "max_px": self.maximum if valid else None,
            f"at_least_{_LARGE_DISPARITY_PX}_percent": 100 * self.large / valid if valid else None,
            "invalid_percent": 100 * self.invalid / self.pixels if self.pixels else None,
        }


@dataclass
class Count:
    """Frames found of a set, split or part; ``expected`` is None where no number is published."""

    what: str
    found: int
    expected: int | None = None
    missing_files: int = 0

    @property
    def complete(self) -> bool:
        """Whether as many frames are there as should be."""
        return self.expected is None or self.found == self.expected


@dataclass
class Report:
    """What was found."""

    root: str
    kind: str
    layout: str | None = None
    counts: list[Count] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    broken: list[str] = field(default_factory=list)
    frames_read: int = 0
    disparity: DisparityStatistics = field(default_factory=DisparityStatistics)
    partial: bool = False

    @property
    def sound(self) -> bool:
        """Whether nothing is missing or broken and, unless the data may be partial, every count is as expected."""
        return not (self.missing or self.broken) and (self.partial or all(count.complete for count in self.counts))

    def as_plain(self) -> dict[str, Any]:
        """Return the report as JSON values."""
        plain = dataclasses.asdict(self)
        plain["disparity"] = self.disparity.summary()
        return plain | {"sound": self.sound}


def main(argv: list[str]) -> int:
    """Run the command.

    Returns:
        0 if all is sound, 1 if files are missing or broken or counts are not as published.

    Raises:
        InputError: The root is unusable (exit code 2).
    """
    arguments = _parser().parse_args(argv)
    root = checked_root(arguments.root, arguments.kind)
    if arguments.json:
        check_output_file(Path(arguments.json))  # before hours of reading
    report = Report(str(root), arguments.kind, partial=arguments.partial)
    datasets = list(
        _scene_flow(root, arguments, report) if arguments.kind == "scene_flow" else _others(root, arguments, report)
    )
    if not arguments.quick:
        _read_all(datasets, arguments.limit, arguments.workers, report)
    _print(report, arguments.quick)
    if arguments.json:
        write_bytes(arguments.json, (json.dumps(report.as_plain(), indent=2) + "\n").encode())
    return 0 if report.sound else 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="fa-stereo check-data",
        description="Count a data set's frames against the published numbers, read every file, describe disparities.",
        epilog="Exit code: 0 all sound; 1 files missing or broken, or counts not as published; 2 the root is unusable.",
    )
    parser.add_argument("root", metavar="ROOT", help="folder of the data set (data/README.md shows the layouts)")
    kinds = [kind for kind in DATASET_KINDS if kind != "rendered"]
    parser.add_argument("--kind", choices=kinds, default="scene_flow", help="data set (default: %(default)s)")
    parser.add_argument("--layout", choices=("auto", *SCENE_FLOW_LAYOUTS), default="auto", help="Scene Flow only")
    parser.add_argument(
        "--passes", choices=SCENE_FLOW_PASSES, default="clean", help="Scene Flow only (default: %(default)s)"
    )
    parser.add_argument(
        "--sets", nargs="+", choices=SCENE_FLOW_SETS, metavar="SET", help="Scene Flow only; default: all"
    )
    parser.add_argument(
        "--resolution", choices=("quarter", "third", "half", "full"), help="Middlebury only, where several are there"
    )
    parser.add_argument("--right-disparity", action="store_true", help="check Scene Flow's right disparities too")
    parser.add_argument(
        "--partial", action="store_true", help="the data set is known to be a part: counts are not judged"
    )
    parser.add_argument("--quick", action="store_true", help="list and pair the files, read none")
    parser.add_argument("--limit", type=_positive, metavar="N", help="read only the first N frames of each split")
    parser.add_argument(
        "--workers",
        type=_positive,
        metavar="N",
        default=min(8, available_cores()),
        help="files read at once (%(default)s)",
    )
    parser.add_argument("--json", metavar="FILE", help="write the whole report here")
    return parser


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be 1 or more, got {value}")
    return value


# --------------------------------------------------------------------------------------------------------------------
# listing


def _scene_flow(root: Path, arguments: argparse.Namespace, report: Report) -> Iterator[FileDataset]:
    """Count every set and split, and yield what can be read."""
    report.layout = detect_layout(root) if arguments.layout == "auto" else arguments.layout
    available = available_sets(root, report.layout)
    wanted = arguments.sets or (available if arguments.partial else list(SCENE_FLOW_SETS))
    passes = ("clean", "final") if arguments.passes == "both" else (arguments.passes,)
    for pass_name in passes:
        for (set_name, split), expected in EXPECTED_FRAMES.items():
            if set_name not in wanted:
                continue
            count = Count(f"{pass_name} {split} {set_name}", 0, expected)
            report.counts.append(count)
            config = SceneFlowConfig(
                layout=report.layout,
                passes=pass_name,
                sets=[set_name],
                right_disparity=arguments.right_disparity,
                cache_index=False,
            )
            try:
                listing = list_scene_flow(root, split, config)
            except AbsentSplitError as error:
                if not arguments.partial:
                    report.missing.append(str(error))
                continue
            except InputError as error:
                report.missing.append(str(error))
                continue
            count.found, count.missing_files = len(listing.frames), len(listing.missing)
            report.missing += listing.missing
            parts = Counter("/".join(frame.name.split("/")[:2]) for frame in listing.frames)
            report.counts += [
                Count(f"{pass_name} {split} {part}", parts[part], expected_of_part)
                for (split_of_part, part), expected_of_part in EXPECTED_FRAMES_OF_PART.items()
                if split_of_part == split and (part.startswith("TEST") or part.startswith(set_name))
            ]
            yield SceneFlowFrames(listing.frames)


def _others(root: Path, arguments: argparse.Namespace, report: Report) -> Iterator[Dataset[StereoSample]]:
    split = "all" if arguments.kind.startswith("kitti") else "train"
    try:
        dataset = open_dataset(DatasetConfig(arguments.kind, str(root), split, arguments.resolution))
    except MissingFilesError as error:
        report.missing.append(str(error))
        return
    assert isinstance(dataset, FileDataset)
    found = sum(frame.disparity is not None for frame in dataset.frames)
    what = "frames with ground truth"
    if not found:
        what, found = "frames without ground truth, enough for fa-stereo predict alone", len(dataset)
    report.counts.append(Count(what, found, _KITTI_FRAMES.get(arguments.kind)))
    yield dataset


# --------------------------------------------------------------------------------------------------------------------
# reading


def _read_all(datasets: list[Any], limit: int | None, workers: int, report: Report) -> None:
    """Read every frame. Threads suffice: decoding releases Python's lock."""
    jobs = [(dataset, index) for dataset in datasets for index in range(min(len(dataset), limit or len(dataset)))]
    chunk = 16 * workers  # bounds what waits in memory
    with ThreadPoolExecutor(workers) as pool, tqdm(total=len(jobs), unit="frame", disable=None) as progress:
        for start in range(0, len(jobs), chunk):
            for outcome in pool.map(_read_one, jobs[start : start + chunk]):
                if isinstance(outcome, str):
                    report.broken.append(outcome)
                    progress.set_postfix(broken=len(report.broken))
                elif outcome is not None:
                    report.disparity.add(outcome)
                report.frames_read += 1
                progress.update()


def _read_one(job: tuple[Any, int]) -> DisparityStatistics | str | None:
    """Return one frame's statistics, nothing if it has no ground truth, or what is wrong with it."""
    dataset, index = job
    try:
        sample: StereoSample = dataset[index]
    except InputError as error:
        return str(error)
    if sample.disparity is None:
        return None
    statistics = DisparityStatistics.of(sample.disparity)
    if statistics.invalid == statistics.pixels:
        return f"{sample.name}: its ground truth has no known pixel (disparity is positive, in pixels of the left view)"
    return statistics


# --------------------------------------------------------------------------------------------------------------------
# printing


def _print(report: Report, quick: bool) -> None:
    print(f"{report.kind} at {report.root}" + (f", {report.layout} layout" if report.layout else ""))
    width = max((len(count.what) for count in report.counts), default=0)
    for count in report.counts:
        expected = "" if count.expected is None else f" of {count.expected:>6,}"
        remark = "" if count.complete else "  (a part)" if report.partial else "  <-- not complete"
        missing = f", {count.missing_files} files missing" if count.missing_files else ""
        print(f"  {count.what:<{width}} {count.found:>7,}{expected}{missing}{remark}")
    for title, problems in (("missing", report.missing), ("broken", report.broken)):
        if problems:
            print(f"{title}: {len(problems)}")
            for problem in problems[:_LISTED_PROBLEMS]:
                print(f"  {problem}")
            if len(problems) > _LISTED_PROBLEMS:
                print(f"  and {len(problems) - _LISTED_PROBLEMS} more (--json FILE lists all)")
    if not quick:
        values = report.disparity.summary()
        print(f"read {report.frames_read:,} frames, {len(report.broken)} broken")
        if values["mean_px"] is not None:
            print(
                f"disparity: min {values['min_px']:.2f}, mean {values['mean_px']:.2f}, max {values['max_px']:.2f} px; "
                f"{values[f'at_least_{_LARGE_DISPARITY_PX}_percent']:.2f} % at least {_LARGE_DISPARITY_PX} px, "
                f"{values['invalid_percent']:.2f} % without ground truth"
            )
    print("all sound" if report.sound else "problems found")
