"""A trained network rearranged for speed: the same function with batch norm folded in, in the layout convolutions like.

What else makes the network fast is not here but in its parts, which all use it by default: the first 3-D convolution
without the volume (``cost_volume``), scores without the 3-D convolution (``aggregation``), regression without the
upsampled volume (``regression``).
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from fa_stereo.config import INFERENCE_PRECISIONS
from fa_stereo.errors import InputError
from fa_stereo.models.aggregation import ScoreHead
from fa_stereo.models.layers import ConvNorm2d, ConvNorm3d, DeconvNorm3d, fold
from fa_stereo.models.memory_format import to_channels_last
from fa_stereo.models.psmnet import PSMNet

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "mixed": torch.bfloat16}
"""Of the cost volume and what is computed from it."""


def optimize_for_inference(model: PSMNet, precision: str = "fp32") -> PSMNet:
    """Return a copy of a network that predicts the same faster; the original is left alone.

    Batch norm is folded into the convolutions and their weights are put into channels_last order, which makes every
    activation channels_last too. With bf16 or fp16 the weights and the activations of the convolutions have that
    type, with ``mixed`` those of the 3-D part alone are bf16: rounding the features moves disparity several times as
    far as rounding what follows. Scores, softmax, regression and attention are always computed in float32.

    Args:
        model: The network; its parameters are float32.
        precision: fp32, bf16, fp16 or mixed.

    Returns:
        A network in eval mode whose ``forward`` takes float32 pictures, which must be finite (see ``fused``), and
        returns float32 disparity, like the model's own. It cannot be trained, and its state dict is not the model's.

    Raises:
        InputError: The precision is unknown.
    """
    if precision not in INFERENCE_PRECISIONS:
        raise InputError(f"precision must be one of {', '.join(INFERENCE_PRECISIONS)}, got {precision!r}")
    fast = copy.deepcopy(model).requires_grad_(False)
    fast.plain = False
    fold_batch_norms(fast)
    if not all(parameter.isfinite().all() for parameter in fast.parameters()):
        for layer in fast.modules():
            if isinstance(layer, ConvNorm2d | ConvNorm3d | DeconvNorm3d):
                layer.plain = True  # what is not a number shall come out as such, see ``fused``
    if precision != "fp32":
        fast.volume_dtype = DTYPES[precision]
        _convert_convolutions(fast, fast.aggregation if precision == "mixed" else fast, DTYPES[precision])
    return to_channels_last(fast.eval())


def cpu_computes_float16() -> bool:
    """Tell whether this CPU multiplies float16 matrices in hardware, and so gains from fp16 rather than losing.

    AVX512-FP16 alone is not enough: there fp16 takes longer than fp32.
    """
    # Not public, but what PyTorch itself asks.
    return bool(getattr(torch.cpu, "_is_amx_fp16_supported", lambda: False)())


def cpu_computes_bfloat16() -> bool:
    """Tell whether this CPU multiplies bfloat16 numbers in hardware (AMX, AVX512-BF16)."""
    return bool(
        getattr(torch.cpu, "_is_amx_tile_supported", lambda: False)()
        or getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)()
    )


def computes_in_hardware(precision: str, device: torch.device) -> bool:
    """Tell whether a device has hardware for a precision; a CPU without it is far slower than in fp32."""
    if device.type != "cpu" or precision == "fp32":
        return True
    return cpu_computes_float16() if precision == "fp16" else cpu_computes_bfloat16()


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """Return the context in which a network of float32 weights computes in fp32, bf16 or fp16, as in training."""
    return torch.autocast(device.type, dtype=DTYPES[precision], enabled=precision != "fp32")


def fold_batch_norms(model: PSMNet) -> None:
    """Fold every batch norm of a network into the convolution before it, in place: see ``fold_batch_norm``."""
    for module in list(model.modules()):
        if isinstance(module, ConvNorm2d | ConvNorm3d | DeconvNorm3d):
            fold_batch_norm(module)


@torch.no_grad()
def fold_batch_norm(layer: ConvNorm2d | ConvNorm3d | DeconvNorm3d) -> None:
    """Replace a convolution and its batch norm by one convolution with a bias, in place."""
    weight, bias = fold(layer.conv, layer.norm, torch.float64)
    layer.conv.weight = nn.Parameter(weight, requires_grad=False)
    layer.conv.bias = nn.Parameter(bias, requires_grad=False)
    layer.norm = nn.Identity()  # type: ignore[assignment]


def _convert_convolutions(model: PSMNet, part: nn.Module, dtype: torch.dtype) -> None:
    """Give convolutions of a part another type; the attention and the last one of each score head stay float32."""
    attention = model.features.attention
    for slot, block in attention.items():
        attention[slot] = _Float32(block)
    kept = {module for block in attention.values() for module in block.modules()}
    kept |= {head.conv2 for head in model.modules() if isinstance(head, ScoreHead)}
    for module in part.modules():
        if isinstance(module, nn.Conv2d | nn.Conv3d | nn.ConvTranspose3d) and module not in kept:
            module.to(dtype)


class _Float32(nn.Module):
    """A block that computes in float32 amid lower precision."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.block(x.float())
        return out.to(x.dtype)
