"""The network as an ONNX file for other runtimes: pictures in, disparity out, for one size of picture.

What is exported is the plain path with batch norm folded in: the network's own modules, but for the cost volume, which
is gathered by indices instead of written slice by slice, so that it becomes three operations and not hundreds.
"""

from __future__ import annotations

import copy
import importlib
import json
import warnings
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from fa_stereo.config import to_plain
from fa_stereo.data.transforms import normalize_images
from fa_stereo.errors import InputError
from fa_stereo.models.cost_volume import gather_cost_volume
from fa_stereo.models.layers import convolved_as_written
from fa_stereo.models.optimized import fold_batch_norms
from fa_stereo.models.psmnet import SIZE_MULTIPLE, PSMNet

OPSET = 18
"""Of the operators used: old enough for the runtimes in use."""


class OnnxNetwork(nn.Module):
    """What is exported: pictures float32 [B, 3, H, W] RGB of 0 to 255 twice -> disparity float32 [B, H, W] in pixels.

    Args:
        model: The network; a copy of it is taken.
    """

    def __init__(self, model: PSMNet) -> None:
        super().__init__()
        self.network = copy.deepcopy(model).cpu().requires_grad_(False)
        self.network.plain = True
        fold_batch_norms(self.network)
        self.eval()

    def forward(self, left: Tensor, right: Tensor) -> Tensor:
        """Estimate the left view's disparity."""
        disparity: Tensor = self.network(normalize_images(left), normalize_images(right), score=self._score)
        return disparity

    def _score(self, left: Tensor, right: Tensor, disparities: int) -> list[Tensor]:
        aggregation = self.network.aggregation
        volume = gather_cost_volume(left, right, disparities)
        hidden = F.relu(aggregation.entry.conv1(volume))
        scores: list[Tensor] = aggregation(F.relu(aggregation.entry.conv2(hidden)), plain=True)
        return scores


def export_onnx(model: PSMNet, height: int, width: int, batch: int = 1) -> bytes:
    """Return the network as an ONNX model.

    Its inputs are called ``left`` and ``right``: float32 [B, 3, H, W] RGB from 0 to 255; its output ``disparity``:
    float32 [B, H, W] in pixels. The model's metadata has the key ``fa_stereo``: the model configuration as JSON.

    Args:
        model: The network as ``load_model`` or ``build_model`` returns it.
        height: Of the pictures in pixels, at least 16; no multiple of anything is asked for.
        width: Likewise.
        batch: Pairs at once.

    Raises:
        InputError: A size is refused, packages are missing, or the exporter failed.
    """
    if min(height, width) < SIZE_MULTIPLE:
        raise InputError(f"pictures must be at least {SIZE_MULTIPLE}x{SIZE_MULTIPLE} pixels, got {width}x{height}")
    if batch < 1:
        raise InputError(f"the batch must be positive, got {batch}")
    check_packages()
    try:
        # Two tensors: of one given twice the exporter would make one input.
        examples = torch.zeros(batch, 3, height, width), torch.zeros(batch, 3, height, width)
        with warnings.catch_warnings(), torch.no_grad(), convolved_as_written():
            warnings.simplefilter("ignore")  # of the exporter, about itself
            program: Any = torch.onnx.export(
                OnnxNetwork(model), examples, dynamo=True, optimize=True, verbose=False, opset_version=OPSET,
                input_names=["left", "right"], output_names=["disparity"],
            )  # fmt: skip
        proto = program.model_proto
    except Exception as error:  # packages that do not fit each other fail in many ways
        reason = " ".join(str(error.__cause__ or error).split())
        raise InputError(
            f"this network could not be exported for {batch} x {width}x{height}: {reason}; try a smaller size, or "
            "other packages: pip install --upgrade '.[onnx]'"
        ) from error
    for item in (*proto.graph.node, *proto.graph.value_info, *proto.graph.input, *proto.graph.output, proto.graph):
        del item.metadata_props[:]  # the exporter's notes: where on this machine the source code is
    entry = proto.metadata_props.add()
    entry.key, entry.value = "fa_stereo", json.dumps(to_plain(model.config))
    content: bytes = proto.SerializeToString()
    return content


def run_onnx(content: bytes, left: NDArray[np.uint8], right: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Run an exported model on the CPU by ONNX Runtime.

    Args:
        content: What ``export_onnx`` returned.
        left: uint8 RGB [B, H, W, 3], of the batch and size of the model.
        right: Likewise.

    Returns:
        Disparity [B, H, W] in pixels.

    Raises:
        InputError: The package onnxruntime is missing, or it cannot run the model on these pictures.
    """
    check_packages()
    import onnxruntime

    feeds = {
        name: np.ascontiguousarray(views.transpose(0, 3, 1, 2), dtype=np.float32)
        for name, views in (("left", left), ("right", right))
    }
    try:
        session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
        disparity: NDArray[np.float32] = session.run(None, feeds)[0]
    except Exception as error:  # its exceptions have no common type
        reason = " ".join(str(error).split())
        raise InputError(
            f"ONNX Runtime cannot run the network: {reason}; try a smaller size, or another version of onnxruntime"
        ) from error
    return disparity


def check_packages() -> None:
    """Make sure that what exports and runs ONNX files is installed.

    Raises:
        InputError: A package is missing.
    """
    for package in ("onnx", "onnxscript", "onnxruntime"):
        try:
            importlib.import_module(package)
        except ImportError as error:
            raise InputError(f"this needs the package {package}: pip install '.[onnx]' brings it ({error})") from error
