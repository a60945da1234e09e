"""The cost volume by its definition, and its first convolution without it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fa_stereo.models.cost_volume import build_cost_volume, convolve_cost_volume, convolve_cost_volume_reference


def test_volume_by_hand() -> None:
    left = torch.tensor([1.0, 2.0, 3.0]).view(1, 1, 1, 3)
    right = torch.tensor([4.0, 5.0, 6.0]).view(1, 1, 1, 3)
    volume = build_cost_volume(left, right, 4)
    assert volume.shape == (1, 2, 4, 1, 3)
    assert volume[0, 0, :, 0].tolist() == [[1, 2, 3], [0, 2, 3], [0, 0, 3], [0, 0, 0]]
    assert volume[0, 1, :, 0].tolist() == [[4, 5, 6], [0, 4, 5], [0, 0, 4], [0, 0, 0]]


# batch, channels, outputs, height, width, disparities: odd sizes, W smaller than D, W of one column, D from 2 up
SIZES = [
    (2, 3, 4, 5, 13, 4),
    (1, 2, 3, 4, 6, 8),
    (2, 3, 2, 3, 20, 5),
    (1, 2, 2, 1, 3, 12),
    (1, 2, 2, 3, 4, 4),
    (1, 2, 2, 3, 1, 4),
    (1, 2, 2, 3, 2, 6),
    (1, 1, 1, 2, 9, 2),
    (1, 4, 3, 7, 31, 24),
]


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("size", SIZES)
def test_convolution_without_the_volume(size: tuple[int, ...], with_bias: bool, device: str) -> None:
    batch, channels, outputs, height, width, disparities = size
    kind = {"dtype": torch.float64, "device": device, "requires_grad": True}
    left, right = (torch.randn(batch, channels, height, width, **kind) for _ in range(2))
    weight = torch.randn(outputs, 2 * channels, 3, 3, 3, **kind)
    bias = torch.randn(outputs, **kind) if with_bias else None
    expected = convolve_cost_volume_reference(left, right, weight, disparities, bias)
    result = convolve_cost_volume(left, right, weight, disparities, bias)
    torch.testing.assert_close(result, expected, atol=1e-12, rtol=0)

    inputs = [x for x in (left, right, weight, bias) if x is not None]
    upstream = torch.randn_like(expected)
    for ours, plain in zip(
        torch.autograd.grad(result, inputs, upstream), torch.autograd.grad(expected, inputs, upstream), strict=True
    ):
        torch.testing.assert_close(ours, plain, atol=1e-11, rtol=0)


@pytest.mark.parametrize("arrange", ["channels_last", "sliced", "transposed"])
def test_convolution_takes_any_memory(arrange: str, device: str) -> None:
    def arranged(x: Tensor) -> Tensor:
        if arrange == "channels_last":
            return x.contiguous(memory_format=torch.channels_last)
        if arrange == "sliced":
            return torch.stack([x, -x], dim=-1)[..., 0]
        return x.transpose(2, 3).contiguous().transpose(2, 3)

    kind = {"dtype": torch.float64, "device": device, "requires_grad": True}
    left, right = (torch.randn(2, 3, 6, 11, **kind) for _ in range(2))
    weight = torch.randn(4, 6, 3, 3, 3, **kind)
    kernel = weight.contiguous(memory_format=torch.channels_last_3d) if arrange == "channels_last" else weight
    result = convolve_cost_volume(arranged(left), arranged(right), kernel, 4)
    expected = convolve_cost_volume_reference(left, right, weight, 4)
    torch.testing.assert_close(result, expected, atol=1e-12, rtol=0)

    upstream = torch.randn(*expected.shape[:3], 11, 6, dtype=torch.float64, device=device).transpose(3, 4)
    inputs = (left, right, weight)
    for ours, plain in zip(
        torch.autograd.grad(result, inputs, upstream), torch.autograd.grad(expected, inputs, upstream), strict=True
    ):
        torch.testing.assert_close(ours, plain, atol=1e-11, rtol=0)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 2e-2), (torch.float16, 3e-3)])
def test_low_precision_accumulates_in_float32(dtype: torch.dtype, tolerance: float) -> None:
    """By autocast, values and gradients; a sum over 24 disparities in bfloat16 alone would be off by more."""
    left, right = (torch.randn(1, 8, 12, 40, requires_grad=True) for _ in range(2))
    weight = (torch.randn(8, 16, 3, 3, 3) / 20).requires_grad_()
    inputs = (left, right, weight)
    expected = convolve_cost_volume_reference(left, right, weight, 24)
    with torch.autocast("cpu", dtype=dtype):
        result = convolve_cost_volume(left, right, weight, 24)
    assert result.dtype == dtype
    upstream = torch.randn_like(expected)
    results = [result, *torch.autograd.grad(result, inputs, upstream.to(dtype))]
    plain = [expected, *torch.autograd.grad(expected, inputs, upstream)]
    for ours, reference in zip(results, plain, strict=True):
        difference = ours.float() - reference
        assert (difference.norm() / reference.norm()).item() < tolerance


def test_fewer_than_two_disparities_are_refused() -> None:
    left = torch.zeros(1, 2, 3, 5)
    with pytest.raises(ValueError, match="disparities must be at least 2, got 1"):
        convolve_cost_volume(left, left, torch.zeros(2, 4, 3, 3, 3), 1)
