"""``fa-stereo evaluate``: the error of weights on a data set by a named protocol; ``evaluate compare``: of two such."""

from __future__ import annotations

import argparse
import dataclasses
import heapq
import sys
from collections.abc import Callable, Collection
from functools import partial
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from fa_stereo.config import (
    PREDICTION_SETTINGS,
    DatasetConfig,
    EvaluateConfig,
    ProtocolConfig,
    from_plain,
    to_plain,
)

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor

    from fa_stereo.evaluation import EvaluatedImage, EvaluationResult, Predict
    from fa_stereo.visualization import Panel

THUMBNAIL_PX = 320


def main(argv: list[str]) -> int:
    """Run the command: ``compare`` with its own options, else Hydra's overrides (see ``conf/evaluate.yaml``)."""
    if argv and argv[0] == "compare":
        return _compare(argv[1:])
    from fa_stereo import distributed
    from fa_stereo.cli.hydra_entry import run_hydra

    with distributed.process_group():
        return run_hydra(argv, "evaluate", EvaluateConfig, run)


def run(config: EvaluateConfig) -> int:
    """Evaluate, write ``metrics.json``, ``per_image.csv`` and the pictures asked for, and print the table."""
    from fa_stereo import __version__, distributed
    from fa_stereo.data import open_dataset
    from fa_stereo.data.datasets import rendered_settings
    from fa_stereo.evaluation import evaluate, select_images
    from fa_stereo.machine import compute_float32_in_full
    from fa_stereo.memory import keep_freed_memory

    compute_float32_in_full()
    keep_freed_memory(whole=False)
    dataset = open_dataset(config.dataset)
    predict, description = _predictor(config)
    folder = Path(config.output_dir)
    images = len(select_images(len(dataset), config.protocol)[: config.max_images])  # type: ignore[arg-type]
    pictures = PictureWriter(
        folder, error_maps=config.error_maps, worst=config.worst, sheet=spread(images, config.contact_sheet)
    )
    result = evaluate(
        predict,
        dataset,
        config.protocol,
        max_images=config.max_images,
        workers=config.workers,
        on_image=pictures if config.error_maps or config.worst or config.contact_sheet else None,
    )
    result.notes[:0] = deviations(config)
    result.source = {**description, "dataset": to_plain(config.dataset), "fa_stereo": __version__}
    if (rendered := rendered_settings(config.dataset)) is not None:
        result.source["rendered_pairs"] = rendered
    if distributed.rank() == 0:  # first, as nothing that cannot be written may take it along
        print(f"{_subject(config, description)} on {_describe_dataset(config.dataset)}")
        print(result.table(), flush=True)
        result.save(folder)
    pictures.write_worst(result)
    pictures.write_contact_sheet()
    if distributed.rank() == 0:
        print(f"\nwritten to {folder}")
    return 0


def _predictor(config: EvaluateConfig) -> tuple[Predict, dict[str, Any]]:
    """Return what predicts, and what to record of it."""
    if config.method == "sgbm":
        limit = config.max_disparity or 192
        return partial(sgbm_predictor, max_disparity=limit), {"method": "sgbm", "max_disparity": limit}
    from fa_stereo.evaluation import network_predictor
    from fa_stereo.inference import choose_device, choose_precision
    from fa_stereo.models.checkpoint import load_model
    from fa_stereo.models.optimized import optimize_for_inference
    from fa_stereo.tiling import predict_in_bands
    from fa_stereo.weights import find_checkpoint

    device = choose_device(config.device)
    precision = choose_precision(config.precision, device)
    checkpoint = find_checkpoint(config.checkpoint, device)
    model = load_model(checkpoint, device)
    padding = "zeros" if config.protocol.padding == "top_right_zeros" else None
    model.set_prediction(
        regression=config.regression,
        padding=config.padding or padding,
        halve_from_px=config.halve_from_px,
        enlarge_below_px=config.enlarge_below_px,
    )
    if config.max_disparity is not None:
        model.set_max_disparity(config.max_disparity)

    def build(computed_in: str = "fp32") -> Predict:
        network = optimize_for_inference(model, computed_in)
        compute: Callable[..., Any] = network
        if config.tile is not None:
            compute = partial(predict_in_bands, network, band_height=config.tile)
        return network_predictor(compute, device, confidence=config.confidence)

    predict = build(precision)
    if precision != "fp32":
        predict = repeat_in_full(predict, build)
    return predict, {
        "method": "network",
        "checkpoint": str(config.checkpoint or checkpoint.stem),
        **{key: getattr(model.config, key) for key in PREDICTION_SETTINGS},
        "max_disparity": model.config.max_disparity,
        "precision": precision,
        "device": device.type,
        **({} if config.tile is None else {"tile": config.tile}),
    }


def repeat_in_full(predict: Predict, build: Callable[[], Predict]) -> Predict:
    """Return ``predict``, which leaves what is not finite to what ``build`` returns, as fa-stereo predict does."""
    full: list[Predict] = []

    def checked(left: Tensor, right: Tensor) -> Tensor:
        maps = predict(left, right)
        if maps.isfinite().all():
            return maps
        if not full:
            print("fa-stereo evaluate: pairs whose result is not finite are computed again in fp32", file=sys.stderr)
            full.append(build())
        return full[0](left, right)

    return checked


def _subject(config: EvaluateConfig, description: dict[str, Any]) -> str:
    """Return what predicts, and in what it departs from what it does by itself."""
    how = [] if config.max_disparity is None else [f"searching {config.max_disparity} px"]
    if description["method"] == "sgbm":
        return "OpenCV's SGBM" + (f" ({how[0]})" if how else "")
    if description["regression"] != "expectation":
        how.append(f"{description['regression']} regression")
    if description["padding"] != "zeros" and config.protocol.padding in ("by_network", "top_right_zeros"):
        how.append("padded with the border")
    if limit := description["halve_from_px"]:
        how.append(f"from {limit / 1e6:g} megapixels at half the size too")
    if limit := description["enlarge_below_px"]:
        how.append(f"pictures below {limit / 1e6:g} megapixels at two sizes")
    if config.tile is not None:
        how.append(f"bands of {config.tile} rows")
    how.append(f"{description['precision']} on {description['device']}")
    return f"{description['checkpoint']} ({', '.join(how)})"


def _describe_dataset(config: DatasetConfig) -> str:
    words = [config.kind, *([config.root] if config.root else [])]
    if config.kind == "scene_flow":
        words.append(f"({config.split} split, {config.scene_flow.passes} pass)")
    return " ".join(words)


def sgbm_predictor(left: Tensor, right: Tensor, *, max_disparity: int = 192) -> Tensor:
    """Return SGBM's disparity [1, H, W] of uint8 views [1, 3, H, W]."""
    import torch

    from fa_stereo.sgbm import match_semi_global

    left_view, right_view = (view[0].permute(1, 2, 0).contiguous().numpy() for view in (left, right))  # [H, W, 3]
    return torch.from_numpy(match_semi_global(left_view, right_view, max_disparity))[None]


def deviations(config: EvaluateConfig) -> list[str]:
    """Return in what a configuration departs from the protocol that it names, one sentence each."""
    from omegaconf import OmegaConf

    from fa_stereo.cli.hydra_entry import find_conf_dir

    notes = []
    protocol, data = config.protocol, config.dataset
    if config.padding == "replicate" and protocol.padding == "top_right_zeros":
        notes.append("padding is replicate, not top_right_zeros")
    file = find_conf_dir() / "protocol" / f"{protocol.name}.yaml"
    if file.is_file():  # people's own protocols have no other definition than the one in use
        published = from_plain(ProtocolConfig, OmegaConf.to_container(OmegaConf.load(file)), where=f"{file}: protocol")  # type: ignore[arg-type]
        for field in dataclasses.fields(ProtocolConfig):
            here, there = getattr(protocol, field.name), getattr(published, field.name)
            if here != there:
                notes.append(f"{field.name} is {here}, not {there}")
    if data.kind == "scene_flow":
        if data.scene_flow.passes != protocol.passes:
            notes.append(f"the pass is {data.scene_flow.passes}, not {protocol.passes}")
        if data.split != "test":
            notes.append(f"the frames are those of split {data.split}, not test")
        if data.scene_flow.unused_files is not None:
            notes.append(f"the frames listed in {data.scene_flow.unused_files} are left out")
    if data.limit is not None:
        notes.append(f"the data set is limited to its first {data.limit:,} images")
    return notes


class PictureWriter:
    """Writes error maps as images come, and remembers what the other pictures need.

    Args:
        folder: Error maps go to its ``error_maps``, the worst images to its ``worst``.
        error_maps: Write an error map of every image.
        worst: How many images with the largest end-point error to remember.
        sheet: Indices of the images that go onto the contact sheet.
    """

    def __init__(self, folder: Path, *, error_maps: bool, worst: int, sheet: Collection[int] = ()) -> None:
        self.folder = folder
        self.error_maps = error_maps
        self.count = worst
        # (error, -index, image): the least bad of the worst on top, ties as EvaluationResult.worst breaks them
        self.worst: list[tuple[float, int, EvaluatedImage]] = []
        self.sheet = sheet
        self.thumbnails: dict[int, list[Panel]] = {}

    def __call__(self, image: EvaluatedImage) -> None:
        """Take in one image."""
        if self.error_maps:
            self._write_error_map(image)
        if image.errors.index in self.sheet:
            self.thumbnails[image.errors.index] = _thumbnails(image)
        error = image.errors.mean("end_point_error")
        if self.count and error == error and not image.errors.skipped:  # NaN: no valid pixel
            heapq.heappush(self.worst, (error, -image.errors.index, image))
            if len(self.worst) > self.count:
                heapq.heappop(self.worst)

    def _write_error_map(self, image: EvaluatedImage) -> None:
        from fa_stereo.data.formats import write_picture
        from fa_stereo.evaluation import prepare_folder
        from fa_stereo.visualization import colorize_error

        # A name must not lead out of the folder.
        parts = [part for part in PurePosixPath(image.errors.name).parts if part not in ("/", "..")]
        path = self.folder.joinpath("error_maps", *parts[:-1], f"{parts[-1]}.png")
        prepare_folder(path.parent)
        write_picture(path, colorize_error(image.prediction, image.target, image.valid))

    def write_worst(self, result: EvaluationResult) -> None:
        """Write those of this process's images that are among the worst of all processes, numbered from the worst.

        The first process removes those that an evaluation before has left.
        """
        from fa_stereo import distributed
        from fa_stereo.data.formats import write_picture
        from fa_stereo.evaluation import prepare_folder

        own = {image.errors.index: image for _, _, image in self.worst}
        names = {
            f"{place:03d}_{errors.name.strip('/').replace('/', '_')}.png": errors.index
            for place, errors in enumerate(result.worst(self.count), start=1)
        }
        for name, index in names.items():
            if index in own:
                write_picture(prepare_folder(self.folder / "worst") / name, _sheet(own[index]))
        if distributed.rank() == 0 and self.count:
            for file in (self.folder / "worst").glob("[0-9][0-9][0-9]_*.png"):
                if file.name not in names:
                    file.unlink(missing_ok=True)

    def write_contact_sheet(self) -> None:
        """Write the small pictures of all processes as one, an image a row; all processes call it, the first writes."""
        from fa_stereo import distributed
        from fa_stereo.data.formats import write_picture
        from fa_stereo.evaluation import prepare_folder
        from fa_stereo.visualization import error_legend, side_by_side

        if not self.sheet:
            return
        rows = {index: panels for part in distributed.gather_objects(self.thumbnails) for index, panels in part.items()}
        if distributed.rank() == 0:
            panels = [panel for _, row in sorted(rows.items()) for panel in row]
            sheet = side_by_side(panels, columns=4, footer=[("error, px", error_legend(2 * THUMBNAIL_PX))])
            write_picture(prepare_folder(self.folder) / "contact_sheet.png", sheet)


def spread(images: int, count: int) -> set[int]:
    """Return ``count`` of the indices of so many images, from the first to the last in equal steps.

    Examples:
        >>> sorted(spread(10, 4)), sorted(spread(3, 4)), sorted(spread(10, 0))
        ([0, 3, 6, 9], [0, 1, 2], [])
    """
    count = min(count, images)
    return {round(place * (images - 1) / max(count - 1, 1)) for place in range(count)}


def _thumbnails(image: EvaluatedImage) -> list[Panel]:
    from fa_stereo.visualization import resize_to_width

    (_, left), *maps = _panels(image)
    small = [(title, resize_to_width(picture, THUMBNAIL_PX, sparse=True)) for title, picture in maps]
    return [(image.errors.name, resize_to_width(left, THUMBNAIL_PX)), *small]


def _panels(image: EvaluatedImage) -> list[Panel]:
    """Return left view, ground truth, prediction and error with their titles."""
    from fa_stereo import visualization

    maximum = visualization.disparity_range(image.target)
    errors = image.errors
    return [
        (f"{errors.name}: left", image.left),
        (f"ground truth, 0 to {maximum:.0f} px", visualization.colorize_disparity(image.target, maximum)),
        ("prediction", visualization.colorize_disparity(image.prediction, maximum)),
        (
            f"error: EPE {errors.mean('end_point_error'):.2f} px, bad-3 {errors.mean('bad_3'):.1f} %",
            visualization.colorize_error(image.prediction, image.target, image.valid),
        ),
    ]


def _sheet(image: EvaluatedImage) -> NDArray[np.uint8]:
    from fa_stereo import visualization

    maximum = visualization.disparity_range(image.target)
    legends = [("disparity, px", visualization.disparity_legend(maximum)), ("error, px", visualization.error_legend())]
    return visualization.side_by_side(_panels(image), columns=2, footer=legends)


def _compare(argv: list[str]) -> int:
    from fa_stereo.comparison import compare
    from fa_stereo.metrics import METRICS

    parser = argparse.ArgumentParser(
        prog="fa-stereo evaluate compare",
        description="Compares two evaluations of the same images: the difference of the means over images, with a "
        "95 % bootstrap interval over images.",
    )
    parser.add_argument("a", metavar="A", help="output folder of the first evaluation")
    parser.add_argument("b", metavar="B", help="output folder of the second one")
    parser.add_argument(
        "--metric",
        default="end_point_error",
        help=f"{', '.join(METRICS)}; noc_ or occ_ before it for non-occluded or occluded pixels (default: %(default)s)",
    )
    parser.add_argument("--samples", type=int, default=10000, help="bootstrap samples (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the bootstrap (default: %(default)s)")
    arguments = parser.parse_args(argv)
    print(f"A: {arguments.a}\nB: {arguments.b}")
    print(compare(arguments.a, arguments.b, arguments.metric, arguments.samples, arguments.seed).table())
    return 0
