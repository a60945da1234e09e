"""The example: factorized attention in torchvision's Mask R-CNN, at the positions of the paper's table 1."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from fa_stereo.attention.complexity import block_cost
from fa_stereo.config import AttentionConfig


@pytest.fixture(scope="module")
def example(repository: Path) -> ModuleType:
    specification = importlib.util.spec_from_file_location(
        "mask_rcnn_attention", repository / "scripts" / "mask_rcnn_attention.py"
    )
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    sys.modules["mask_rcnn_attention"] = module
    specification.loader.exec_module(module)
    return module


def test_detections_are_unchanged_until_trained(example: ModuleType) -> None:
    """res3, res4 and every FPN level have a block, and boxes, scores and masks are the same to the bit."""
    small = {
        "min_size": 64, "max_size": 96, "box_score_thresh": 0.0, "box_detections_per_img": 3,
        "rpn_pre_nms_top_n_test": 30, "rpn_post_nms_top_n_test": 10,
    }  # fmt: skip
    torch.manual_seed(0)
    plain = example.build_mask_rcnn("None", **small).eval()
    with_attention = example.build_mask_rcnn("fpn_all, res_3,4", **small).eval()
    loading = with_attention.load_state_dict(plain.state_dict(), strict=False)
    assert not loading.unexpected_keys
    assert len(loading.missing_keys) == 7 * 3  # C, B and V of seven blocks
    picture = torch.rand(3, 60, 80)
    with torch.no_grad():
        (expected,), (detections,) = plain([picture]), with_attention([picture])
        assert len(expected["boxes"]) == 3
        assert expected["masks"].shape == (3, 1, 60, 80)
        for name, values in expected.items():
            assert torch.equal(detections[name], values), name
        for name, parameter in with_attention.named_parameters():
            if "attention" in name and name.endswith("to_values.weight"):
                torch.nn.init.normal_(parameter)
        (trained,) = with_attention([picture])
    assert not torch.equal(trained["scores"], expected["scores"])


@pytest.mark.parametrize("position", ["res4", "fpn_all, res_3,4"])
def test_costs_are_those_of_the_blocks(example: ModuleType, position: str) -> None:
    """Counted on the whole network, parameters and FLOPs grow by the blocks' closed forms at table 1's sizes."""
    base_parameters, base_flops = example.measure("None")
    sizes = [example.PLACES[place][1] for place in example.TABLE_1[position][0]]
    for kind in ("factorized", "non_local"):
        parameters, flops = example.measure(position, kind)
        assert parameters - base_parameters == sum(2 * 64 * channels + channels**2 for _, _, channels in sizes)
        costs = [block_cost(AttentionConfig(kind=kind), channels, (h, w)) for h, w, channels in sizes]
        assert flops - base_flops == sum(cost.flops for cost in costs)


def test_the_table_has_all_positions(
    example: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(example, "measure", lambda position, kind="factorized": (10**6 * (1 + len(position)), 10**11))
    example.main()
    lines = capsys.readouterr().out.splitlines()
    rows = [line for line in lines if line.startswith("| ")][1:]
    assert len(rows) == 11
    assert all(line.count("|") == 9 for line in rows)
    assert "224x320x256" in rows[-1]  # the largest map
    assert "20,552.1 MB" in rows[-1]  # of 71,680 positions squared
    assert rows[-1].endswith("| 41.2 | 36.7 |")
