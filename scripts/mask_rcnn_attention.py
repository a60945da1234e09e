"""Factorized attention in torchvision's Mask R-CNN, at the positions of the paper's table 1, and what it costs there.

    python scripts/mask_rcnn_attention.py

prints parameters and computation beside those of conventional attention at the same positions.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from torchvision.models.detection import MaskRCNN, maskrcnn_resnet50_fpn

from fa_stereo.attention.insertion import insert_attention
from fa_stereo.config import AttentionConfig

# Table 1: where a block can follow a module of the backbone, and the maps there for pictures of 896x1280.
PICTURE_SIZE = (896, 1280)
PLACES: dict[str, tuple[str, tuple[int, int, int]]] = {
    "res3": ("body.layer3", (56, 80, 1024)),
    "res4": ("body.layer4", (28, 40, 2048)),
    "fpn1": ("fpn:0", (224, 320, 256)),
    "fpn2": ("fpn:1", (112, 160, 256)),
    "fpn3": ("fpn:2", (56, 80, 256)),
    "fpn4": ("fpn:3", (28, 40, 256)),
    "fpn5": ("fpn:pool", (14, 20, 256)),
}
LEVELS = [place for place in PLACES if place.startswith("fpn")]

# Table 1: the positions compared, with box and mask AP on COCO as printed there.
TABLE_1: dict[str, tuple[list[str], float, float]] = {
    "None": ([], 39.4, 35.1),
    "res3": (["res3"], 40.2, 36.0),
    "res4": (["res4"], 39.1, 34.8),
    "fpn1": (["fpn1"], 39.9, 35.8),
    "fpn2": (["fpn2"], 39.7, 35.7),
    "fpn3": (["fpn3"], 39.7, 35.5),
    "fpn4": (["fpn4"], 39.7, 35.4),
    "fpn5": (["fpn5"], 39.6, 35.3),
    "fpn_all": (LEVELS, 40.6, 36.2),
    "fpn_1,2,3,4, res_3": ([*LEVELS[:4], "res3"], 40.6, 36.1),
    "fpn_all, res_3,4": ([*LEVELS, "res3", "res4"], 41.2, 36.7),
}


def build_mask_rcnn(position: str, attention: AttentionConfig | None = None, **options: Any) -> MaskRCNN:
    """Return torchvision's Mask R-CNN with attention at a position of table 1: all there is to it.

    Args:
        position: Key of ``TABLE_1``.
        attention: The block; the paper's factorized attention, gaussian with b = 64, by default.
        **options: For ``maskrcnn_resnet50_fpn``, such as ``weights="DEFAULT"``; random weights without.
    """
    model = maskrcnn_resnet50_fpn(**{"weights": None, "weights_backbone": None, **options})
    places, _, _ = TABLE_1[position]
    blocks = {PLACES[place][0]: attention or AttentionConfig() for place in places}
    insert_attention(model.backbone, blocks, next(model.parameters()).new_zeros(1, 3, 64, 64))
    return model


@torch.no_grad()
def count_flops(model: MaskRCNN, proposals: int = 1000, detections: int = 100) -> int:
    """Return the FLOPs of one picture by PyTorch's counter, for a model on the device ``meta``: nothing is computed."""

    def empty(*shape: int) -> Tensor:
        return torch.empty(*shape, device="meta")

    roi: Any = model.eval().roi_heads
    with FlopCounterMode(display=False) as counter:
        features = model.backbone(empty(1, 3, *PICTURE_SIZE))
        model.rpn.head(list(features.values()))
        roi.box_predictor(roi.box_head(empty(proposals, 256, 7, 7)))
        roi.mask_predictor(roi.mask_head(empty(detections, 256, 14, 14)))
    return counter.get_total_flops()


def measure(position: str, kind: str = "factorized") -> tuple[int, int]:
    """Return the parameters and the FLOPs of Mask R-CNN with attention of a kind at a position of table 1."""
    with torch.device("meta"):
        model = build_mask_rcnn(position, AttentionConfig(kind=kind))
    return sum(parameter.numel() for parameter in model.parameters()), count_flops(model)


def feature_size(position: str) -> tuple[int, int, int] | None:
    """Return height, width and channels of the largest map that gets a block at a position; None without any."""
    sizes = [PLACES[place][1] for place in TABLE_1[position][0]]
    return max(sizes, key=lambda size: size[0] * size[1], default=None)


def main() -> None:
    """Print the table."""
    parameters, flops = measure("None")
    print(
        f"Mask R-CNN, ResNet-50 with FPN: {parameters / 1e6:.1f} M parameters, {flops / 1e9:.0f} GFLOP for a picture\n"
        f"of {PICTURE_SIZE[0]}x{PICTURE_SIZE[1]}, 1000 proposals and 100 detections. Attention adds:\n"
    )
    print("| position | largest map | parameters | factorized | conventional | its N x N map | box AP | mask AP |")
    print("|---|---|---|---|---|---|---|---|")
    for position, (_, box_ap, mask_ap) in TABLE_1.items():
        size = feature_size(position)
        if size is None:
            print(f"| None | | | | | | {box_ap} | {mask_ap} |")
            continue
        more_parameters, more_flops = (
            with_attention - without
            for with_attention, without in zip(measure(position), (parameters, flops), strict=True)
        )
        map_bytes = 4 * (size[0] * size[1]) ** 2
        conventional = measure(position, "non_local")[1] - flops
        print(
            f"| {position} | {size[0]}x{size[1]}x{size[2]} | {more_parameters / 1e6:.2f} M "
            f"| {more_flops / 1e9:.1f} GFLOP ({more_flops / flops:.1%}) | {conventional / 1e9:,.1f} GFLOP "
            f"| {map_bytes / 1e6:,.1f} MB | {box_ap} | {mask_ap} |"
        )
    print("\nAP as printed in the paper, of models trained on COCO; one float32 N x N map of one picture, the largest.")


if __name__ == "__main__":
    main()
