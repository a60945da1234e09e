"""``fa-stereo show-attention``: the basis masks of a block over the picture, and what single pixels attend to."""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from fa_stereo.cli.outputs import check_outputs, prepare_output_folder
from fa_stereo.cli.predictors import add_weights_arguments, named_weights
from fa_stereo.errors import InputError
from fa_stereo.files import write_bytes

if TYPE_CHECKING:
    from torch import Tensor, nn

    from fa_stereo.attention.factorized import FactorizedAttention
    from fa_stereo.attention.masks import Attention
    from fa_stereo.models.psmnet import PSMNet
    from fa_stereo.visualization import Panel, Picture

DESCRIPTION = """\
Shows what an attention block of the network does on a rectified pair. For factorized attention it writes

  masks_left.png, masks_right.png   the basis masks that add most to the features (their share of the energy in the
                                    title), the same ones over both views
  masks.npy, coefficients.npy       all of them, float32 [view, head, mask, row, column]; the attention row of a
                                    position is the sum of the masks, each times its coefficient there (dot-product
                                    attention: and divided by the masks of a head)
  attention.html                    a page on which the row of the left picture's pixel under the mouse is composed

and for each --pixel, or for any other attention (nine pixels then, if none is given),

  rows_left.png                     the row averaged over the heads; beside it, for factorized attention, the largest
                                    masks it is composed of, times their coefficients; else the single heads
  rows.npy                          float32 [pixel, head, row, column]

with attention.json, which says what is what. Axial attention's row is that of both its layers: the height layer's
weights times the width layer's. Colours are logarithmic, a ring is around the largest weight, and "spread" in a title
is the number of positions that the weights effectively cover, (sum w)^2 / sum w^2."""

TERMS = 3  # of a row
THUMBNAIL_WIDTH_PX = 400  # or twice as many as the map has columns, if they are more
PAGE_LIMIT = 2**23  # coefficients on a page; beyond some 45 MB browsers grow slow


@dataclass(frozen=True)
class Look:
    """What a block is given when the network sees a pair.

    Attributes:
        views: Left and right picture as the network sees them, uint8 RGB [H, W, 3]: with grey rows above and columns to
            the right that fill them up to a multiple of 16.
        top_px: Such rows.
        features: Of both views, [2, c, h, w].
    """

    views: NDArray[np.uint8]
    top_px: int
    features: Tensor

    def position(self, pixel: tuple[int, int]) -> tuple[int, int]:
        """Return the position (y, x) of the map that holds a pixel (x, y) of the pictures."""
        height, width = self.views.shape[1:3]
        rows, columns = self.features.shape[2:]
        return (pixel[1] + self.top_px) * rows // height, pixel[0] * columns // width

    def thumbnail(self, view: int) -> Picture:
        """Return a view at the width it has on the sheets."""
        from fa_stereo.visualization import resize_to_width

        return resize_to_width(self.views[view], max(THUMBNAIL_WIDTH_PX, 2 * self.features.shape[3]))


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = argparse.ArgumentParser(
        prog="fa-stereo show-attention", description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("left", metavar="LEFT", help="left picture")
    parser.add_argument("right", metavar="RIGHT", help="right picture")
    parser.add_argument("-o", "--output", required=True, metavar="OUT", help="folder for the results")
    parser.add_argument(
        "--pixel", action="append", default=[], metavar="X,Y", help="pixel of LEFT to show the row of; repeatable"
    )
    parser.add_argument("--masks", type=int, default=11, metavar="N", help="masks on the sheets (default 11)")
    parser.add_argument("--slot", help="where the block sits, e.g. res4, if the network has several")
    add_weights_arguments(parser)
    parser.add_argument("--device", default="auto", help="auto (default), cpu, cuda or cuda:N")
    return parser


def main(argv: list[str]) -> int:
    """Run the command; see ``DESCRIPTION``."""
    arguments = build_parser().parse_args(argv)
    if arguments.masks < 1:
        raise InputError(f"--masks must be positive, got {arguments.masks}")
    pixels = [parse_pixel(text) for text in arguments.pixel]
    from fa_stereo.data.formats import read_picture_pair
    from fa_stereo.data.pairs import pair_pictures
    from fa_stereo.inference import check_pair, choose_device
    from fa_stereo.models.checkpoint import load_model
    from fa_stereo.weights import find_checkpoint

    pairs = pair_pictures(arguments.left, arguments.right)
    if len(pairs) > 1:
        raise InputError(f"{arguments.left} and {arguments.right} are {len(pairs)} pairs: name one")
    left, right = check_pair(*read_picture_pair(pairs[0].left_path, pairs[0].right_path))
    check_pixels(pixels, left)
    device = choose_device(arguments.device)
    model = load_model(find_checkpoint(named_weights(arguments), device), device=device).eval()
    slot, attention = choose_attention(model, arguments.slot)

    from fa_stereo.attention import FactorizedAttention

    folder = Path(arguments.output)
    names = ["rows.npy", "rows_left.png", "attention.json"]
    if isinstance(attention, FactorizedAttention):
        names += ["masks_left.png", "masks_right.png", "masks.npy", "coefficients.npy", "attention.html"]
    check_outputs(pairs, {pairs[0].name: {folder / name: name for name in names}})
    prepare_output_folder(folder)

    seen = look(model, model.features.attention[slot], left, right)
    rows, columns = seen.features.shape[2:]
    config = model.config.attention
    print(f"{pairs[0].name}: {config.kind} attention after {slot}, heads: {config.heads}, map: {rows}x{columns}")
    summary: dict[str, object] = {
        "kind": config.kind, "normalization": config.normalization, "slot": slot, "heads": config.heads,
        "map_size": [rows, columns], "picture_size": list(left.shape[:2]), "rows_above_px": seen.top_px,
    }  # fmt: skip
    if isinstance(attention, FactorizedAttention):
        summary["masks"] = _show_masks(folder, attention, seen, arguments.masks)
        _write_page(folder / "attention.html", attention, seen, f"Attention of {pairs[0].name} after {slot}")
    elif not pixels:
        pixels = grid_of_pixels(left)
    if pixels:
        summary["rows"] = _show_rows(folder, attention, seen, pixels)
    _write(folder / "attention.json", (json.dumps(summary, indent=2) + "\n").encode())
    return 0


def parse_pixel(text: str) -> tuple[int, int]:
    """Return the pixel (x, y) that ``X,Y`` names.

    Raises:
        InputError: It names none.
    """
    try:
        x, y = (int(part) for part in text.split(","))
    except ValueError:
        raise InputError(f"--pixel takes X,Y in pixels of the left picture, got {text!r}") from None
    return x, y


def check_pixels(pixels: list[tuple[int, int]], picture: Picture) -> None:
    """Raise InputError if a pixel (x, y) is outside of the picture."""
    height, width = picture.shape[:2]
    for x, y in pixels:
        if not (0 <= x < width and 0 <= y < height):
            raise InputError(
                f"--pixel {x},{y} is outside of the left picture: X is from 0 to {width - 1}, Y from 0 to {height - 1}"
            )


def grid_of_pixels(picture: Picture) -> list[tuple[int, int]]:
    """Return nine pixels (x, y) spread over a picture."""
    height, width = picture.shape[:2]
    return [(width * x // 6, height * y // 6) for y in (1, 3, 5) for x in (1, 3, 5)]


def choose_attention(model: PSMNet, slot: str | None) -> tuple[str, Attention]:
    """Return the slot to show and the attention in it.

    Raises:
        InputError: There is none, or one of several has to be chosen.
    """
    from fa_stereo.attention.masks import attention_of

    blocks: dict[str, nn.Module] = dict(model.features.attention.items())
    if not blocks:
        raise InputError("this network has no attention: choose other weights with --weights or --checkpoint")
    if slot is None and len(blocks) > 1:
        raise InputError(f"this network has attention after {' and '.join(blocks)}: choose one with --slot")
    slot = slot or next(iter(blocks))
    if slot not in blocks:
        raise InputError(f"--slot {slot}: this network has attention after {' and '.join(blocks)}")
    attention = attention_of(blocks[slot])
    if attention is None:
        raise InputError(f"the {type(blocks[slot]).__name__} after {slot} has no attention to show: a convolution")
    return slot, attention


def look(model: PSMNet, block: nn.Module, left: Picture, right: Picture) -> Look:
    """Run the feature extractor on both views and return what the block is given."""
    import torch
    from torch.nn import functional as F

    from fa_stereo.attention.masks import record_inputs
    from fa_stereo.data.transforms import IMAGENET_MEAN, normalize_images
    from fa_stereo.models.psmnet import SIZE_MULTIPLE

    height, width = left.shape[:2]
    top, margin = -height % SIZE_MULTIPLE, -width % SIZE_MULTIPLE
    # The network fills normalised pictures up with zeros, which is the mean colour.
    views = np.empty((2, height + top, width + margin, 3), np.uint8)
    views[...] = np.round(255 * np.array(IMAGENET_MEAN))
    views[:, top:, :width] = left, right
    pair = torch.from_numpy(np.stack([left, right]).transpose(0, 3, 1, 2).copy())  # [2, 3, H, W]
    images = F.pad(normalize_images(pair.to(next(model.parameters()).device)), (0, margin, top, 0))
    with torch.no_grad(), record_inputs({"block": block}) as inputs:
        model.features(images)
    return Look(views, top, inputs["block"])


def _show_masks(folder: Path, attention: FactorizedAttention, seen: Look, count: int) -> list[dict[str, float]]:
    """Write all masks and coefficients, and the strongest masks over both views; return what the sheets show."""
    import torch

    from fa_stereo.attention.masks import effective_positions, mask_name, strongest_masks
    from fa_stereo.visualization import overlay_weights

    with torch.no_grad():
        _write_array(folder / "masks.npy", attention.basis_masks(seen.features))
        _write_array(folder / "coefficients.npy", attention.coefficients(seen.features))
    strongest = strongest_masks(attention, seen.features, count)
    for view, name in enumerate(("left", "right")):
        picture = seen.thumbnail(view)
        panels: list[Panel] = [(f"{name}: {seen.features[0, 0].numel():,} positions", picture)]
        for mask in strongest:
            title = (
                f"{mask_name(mask.head, mask.number, attention.heads)}: {mask.weight:.1%}, {_spread(mask.mask[view])}"
            )
            panels.append((title, overlay_weights(picture, _numpy(mask.mask[view]))))
        _write_sheet(folder / f"masks_{name}.png", panels, columns=4, signed=attention.normalization == "dot")
    return [
        {
            "head": mask.head,
            "mask": mask.number,
            "energy_share": mask.weight,
            "spread_left": effective_positions(mask.mask[0]),
            "spread_right": effective_positions(mask.mask[1]),
        }
        for mask in strongest
    ]


def _write_page(path: Path, attention: FactorizedAttention, seen: Look, title: str) -> None:
    """Write the page for the left view, whose row is the average over the heads."""
    import torch

    from fa_stereo.attention.masks import mask_name
    from fa_stereo.visualization import attention_page

    with torch.no_grad():
        masks = attention.basis_masks(seen.features[:1])[0]  # [h, b/h, H, W]
        coefficients = attention.coefficients(seen.features[:1])[0] / attention.heads
    heads, per_head = masks.shape[:2]
    if masks.numel() > PAGE_LIMIT:
        print(f"no {path.name}: the picture is too large for a page")
        return
    if attention.normalization == "dot":
        coefficients = coefficients / per_head
    names = [mask_name(head, number, heads) for head in range(heads) for number in range(per_head)]
    page = attention_page(
        seen.views[0], _numpy(coefficients.flatten(0, 1)), _numpy(masks.flatten(0, 1)), names, title, seen.top_px
    )
    _write(path, page.encode())


def _show_rows(
    folder: Path, attention: Attention, seen: Look, pixels: list[tuple[int, int]]
) -> list[dict[str, object]]:
    """Write the rows of pixels of the left view as arrays and as a sheet, a line each; return what the sheet shows."""
    import torch

    from fa_stereo.attention import FactorizedAttention
    from fa_stereo.attention.masks import effective_positions, mask_name, row_terms
    from fa_stereo.visualization import overlay_weights

    features, picture = seen.features[:1], seen.thumbnail(0)
    scale = picture.shape[1] / seen.views.shape[2]
    panels: list[Panel] = []
    rows, told = [], []
    for x, y in pixels:
        position = seen.position((x, y))
        with torch.no_grad():
            row = attention.attention_row(features, position)[0]  # [h, H, W]
        average = row.mean(0)
        parts = [(f"row of {x},{y}: {_spread(average)}", average)]
        heads = len(row)
        if isinstance(attention, FactorizedAttention):
            terms = row_terms(attention, features, position, TERMS)
            parts += [
                (f"{term.weight:.3g} x {mask_name(term.head, term.number, heads)}", term.mask[0]) for term in terms
            ]
        elif heads > 1:
            parts += [(f"head {head}: {_spread(part)}", part) for head, part in enumerate(row)]
        for title, weights in parts:
            place = (scale * (x + 0.5), scale * (y + seen.top_px + 0.5))
            panels.append((title, overlay_weights(picture, _numpy(weights), place)))
        rows.append(row)
        told.append({"pixel": [x, y], "position": list(position), "spread": effective_positions(average)})
    together = torch.stack(rows)  # [pixels, h, H, W]
    _write_array(folder / "rows.npy", together)
    columns = len(panels) // len(pixels)
    _write_sheet(folder / "rows_left.png", panels, columns if columns > 1 else 3, signed=bool((together < 0).any()))
    return told


def _spread(weights: Tensor) -> str:
    from fa_stereo.attention.masks import effective_positions

    positions = effective_positions(weights)
    return f"spread {positions:.1f}" if positions < 100 else f"spread {positions:,.0f}"


def _numpy(tensor: Tensor) -> NDArray[np.float32]:
    array: NDArray[np.float32] = tensor.float().cpu().numpy()
    return array


def _write(path: Path, content: bytes) -> None:
    write_bytes(path, content)
    print(path)


def _write_array(path: Path, tensor: Tensor) -> None:
    from fa_stereo.data.formats import write_npy

    write_npy(path, _numpy(tensor))
    print(path)


def _write_sheet(path: Path, panels: list[Panel], columns: int, *, signed: bool) -> None:
    from fa_stereo.data.formats import write_picture
    from fa_stereo.visualization import side_by_side, weights_legend

    legend = weights_legend(THUMBNAIL_WIDTH_PX, signed=signed)
    write_picture(path, side_by_side(panels, columns, footer=[("weights", legend)]))
    print(path)
