"""``fa-stereo render``: write procedural stereo pairs in Scene Flow's official layout."""

from __future__ import annotations

import argparse
import json
import multiprocessing
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from tqdm import tqdm

from fa_stereo.config import RenderConfig, to_plain
from fa_stereo.data.loading import interrupts_ignored, start_renderer
from fa_stereo.data.rendered import LARGEST_SET, RenderedPairs, frame_files, read_settings, settings_file, write_frame
from fa_stereo.errors import InputError
from fa_stereo.files import write_bytes
from fa_stereo.machine import available_cores

FLAGS = ("samples", "height", "width", "seed", "max_disparity", "difficulty")


def main(argv: list[str]) -> int:
    """Render the pairs that are not there yet; return the exit code."""
    arguments = _parser().parse_args(argv)
    config = _config(arguments)
    root = Path(arguments.out)
    if config.samples > LARGEST_SET:
        raise InputError(f"--samples {config.samples}: the layout holds {LARGEST_SET} frames; write several folders")
    try:
        root.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{root}: cannot be used as output folder ({error.strerror}); choose another") from error
    _record(root, arguments.split, config)
    missing = [i for i in range(config.samples) if not all(f.exists() for f in frame_files(root, arguments.split, i))]
    work = partial(_render, config, root, arguments.split)
    with (
        _mapped(work, missing, arguments.workers) as done,
        tqdm(total=config.samples, initial=config.samples - len(missing), unit="pair", disable=None) as progress,
    ):
        for _ in done:
            progress.update()
    print(f"{root}: {config.samples} pairs ({arguments.split}), {len(missing)} of them new")
    return 0


def _parser() -> argparse.ArgumentParser:
    defaults = RenderConfig()
    parser = argparse.ArgumentParser(
        prog="fa-stereo render",
        description="Write procedural stereo pairs with exact disparity for both views, in Scene Flow's official "
        "layout (FlyingThings3D/frames_cleanpass and disparity). A stopped run goes on where it was.",
    )
    parser.add_argument("out", metavar="OUT", help="output folder")
    parser.add_argument("--samples", type=int, default=1000, help="number of pairs (default: %(default)s)")
    parser.add_argument("--height", type=int, default=defaults.height, help="of the pictures (default: %(default)s)")
    parser.add_argument("--width", type=int, default=defaults.width, help="of the pictures (default: %(default)s)")
    parser.add_argument(
        "--seed", type=int, default=defaults.seed, help="another seed, other pairs (default: %(default)s)"
    )
    parser.add_argument("--max-disparity", type=float, default=defaults.max_disparity,
                        help="largest disparity in pixels (default: %(default)s)")  # fmt: skip
    parser.add_argument("--difficulty", type=float, default=defaults.difficulty,
                        help="from 0 (smooth, near-range, equal cameras) to 1 (default: %(default)s)")  # fmt: skip
    parser.add_argument("--option", action="append", default=[], metavar="NAME=VALUE",
                        help="any other field of RenderConfig, e.g. thin=0 or noise=0.05; may be repeated")  # fmt: skip
    parser.add_argument("--split", choices=("TRAIN", "TEST"), default="TRAIN", help="default: %(default)s")
    parser.add_argument("--workers", type=int, default=available_cores(),
                        help="processes; 0 renders in this one (default: %(default)s, one a core)")  # fmt: skip
    return parser


def _config(arguments: argparse.Namespace) -> RenderConfig:
    if arguments.workers < 0:
        raise InputError(f"--workers must be zero or more, got {arguments.workers}")
    values = {name: getattr(arguments, name) for name in FLAGS}
    kinds = {name: type(value) for name, value in to_plain(RenderConfig()).items() if name not in FLAGS}
    for option in arguments.option:
        name, separator, value = option.partition("=")
        if not separator or name not in kinds:
            raise InputError(f"--option {option}: must be NAME=VALUE with a NAME of {', '.join(kinds)}")
        try:
            values[name] = kinds[name](value)
        except ValueError:
            raise InputError(f"--option {option}: {value!r} is not a number as {name} needs it") from None
    return RenderConfig(**values)


def _record(root: Path, split: str, config: RenderConfig) -> None:
    """Leave the configuration beside the pairs, and refuse to mix two of them in one folder."""
    settings = to_plain(config)
    del settings["samples"]  # more of the same may be added later
    known = read_settings(root, split)
    if known is None and any(file.exists() for i in range(config.samples) for file in frame_files(root, split, i)):
        raise InputError(
            f"{root} holds {split} pairs that are not this command's ({settings_file(root, split).name} is missing "
            "there): choose another output folder"
        )
    other_split = "TEST" if split == "TRAIN" else "TRAIN"
    other = read_settings(root, other_split)
    if other is not None and {**other, "device": config.device} == settings:
        raise InputError(f"{root} holds these very pairs as {other_split} already: give another --seed")
    known = settings if known is None else known
    different = sorted(key for key in known | settings if known.get(key) != settings.get(key))
    if different and different != ["device"]:  # a scene is the same on every device
        raise InputError(
            f"{root} holds {split} pairs rendered with another {', '.join(different)}; "
            "give the same values or another output folder"
        )
    path = settings_file(root, split)
    write_bytes(path, (json.dumps(settings, indent=2) + "\n").encode())


def _render(config: RenderConfig, root: Path, split: str, index: int) -> None:
    write_frame(RenderedPairs(config)[index], root, split, index)


@contextmanager
def _mapped(work: partial[None], indices: Iterable[int], workers: int) -> Iterator[Iterator[None]]:
    """Give the results of ``work`` as they are done, in this process or in several."""
    if workers == 0:
        yield map(work, indices)
        return
    context = multiprocessing.get_context("spawn")  # forking a process that has run PyTorch may hang
    with ProcessPoolExecutor(workers, mp_context=context, initializer=start_renderer) as pool:
        try:
            with interrupts_ignored():  # by the workers, which inherit it: Ctrl-C is this process's business
                done = pool.map(work, indices)
            yield done
        except BrokenProcessPool as error:
            raise InputError(
                "a process that renders was ended by the system, for want of memory perhaps: the same command with "
                f"fewer --workers (now {workers}) goes on where it was"
            ) from error
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
