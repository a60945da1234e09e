"""One training process or many: what ``torchrun`` starts, and the few collective operations training needs.

Without ``torchrun`` every function here is the trivial one, so that the training loop has one form.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

T = TypeVar("T")


@contextmanager
def process_group() -> Iterator[None]:
    """Join the other processes that ``torchrun`` started, and leave them at the end; alone, do nothing.

    Processor tensors travel by gloo and CUDA tensors by NCCL. A group that exists already is used and left alone.
    """
    if dist.is_initialized() or int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield
        return
    if torch.cuda.is_available():
        torch.cuda.set_device(local_rank() % torch.cuda.device_count())
        dist.init_process_group("cpu:gloo,cuda:nccl")
    else:
        dist.init_process_group("gloo")
    try:
        yield
    finally:
        dist.destroy_process_group()


def rank() -> int:
    """Return this process's number among all: 0 writes the files."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """Return the number of processes over all nodes."""
    return dist.get_world_size() if dist.is_initialized() else 1


def local_rank() -> int:
    """Return this process's number on its own node: its GPU."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def sum_over_processes(tensor: Tensor) -> Tensor:
    """Return the sum of every process's tensor."""
    if world_size() == 1:
        return tensor
    total = tensor.clone()
    dist.all_reduce(total)
    return total


def gather_objects(value: T) -> list[T]:
    """Return every process's value, in the order of their ranks, to all of them."""
    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def broadcast_object(value: T) -> T:
    """Return rank 0's value."""
    if world_size() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def broadcast_buffers(module: nn.Module) -> None:
    """Overwrite every process's buffers, batch norm's statistics, by rank 0's."""
    if world_size() > 1:
        for buffer in module.buffers():
            dist.broadcast(buffer, src=0)


# --------------------------------------------------------------------------------------------------------------------
# batch norm over all processes


def synchronize_batch_norm(model: nn.Module, device: torch.device) -> None:
    """Let every batch norm of the model take its statistics from the batch of all processes, in place.

    Parameters, buffers and their names stay. On CUDA this is PyTorch's own ``SyncBatchNorm``, which does not know other
    devices; elsewhere it is ``SynchronizedBatchNorm``.
    """
    if world_size() == 1:
        return
    for name, child in model.named_children():
        if isinstance(child, nn.modules.batchnorm._BatchNorm):
            setattr(model, name, _synchronized(child, device))
        else:
            synchronize_batch_norm(child, device)


def _synchronized(norm: nn.modules.batchnorm._BatchNorm, device: torch.device) -> nn.Module:
    if device.type == "cuda":
        converted: nn.Module = nn.SyncBatchNorm.convert_sync_batchnorm(norm)  # type: ignore[no-untyped-call]
        return converted
    result = SynchronizedBatchNorm(
        norm.num_features, norm.eps, norm.momentum, norm.affine, norm.track_running_stats, dtype=norm.weight.dtype
    )
    result.load_state_dict(norm.state_dict())
    return result.train(norm.training)


def is_synchronized(norm: nn.Module) -> bool:
    """Tell whether a batch norm takes its statistics over the batches of all processes."""
    return isinstance(norm, (SynchronizedBatchNorm, nn.SyncBatchNorm))


class SynchronizedBatchNorm(nn.modules.batchnorm._BatchNorm):
    """Batch norm over the batches of all processes, in plain PyTorch, for any device that can all-reduce.

    ``y = (x - mean) / sqrt(variance + eps) * weight + bias`` per channel, mean and (biased) variance over all
    processes; the running variance is the unbiased one, as in PyTorch's batch norm.
    """

    def _check_input_dim(self, input: Tensor) -> None:
        if input.dim() < 2:
            raise ValueError(f"expected [B, C, ...], got {input.dim()} dimensions")

    def forward(self, input: Tensor) -> Tensor:
        """Normalise [B, C, ...]."""
        if not (self.training and dist.is_initialized()):
            normalized: Tensor = super().forward(input)
            return normalized
        self._check_input_dim(input)
        axes = [axis for axis in range(input.dim()) if axis != 1]
        x = input if input.dtype == torch.float64 else input.float()
        count = x.new_tensor([x.numel() / x.shape[1]])
        totals: Tensor = _SumOverProcesses.apply(torch.cat([x.sum(axes), count]))
        mean, count = totals[:-1] / totals[-1], totals[-1]
        shape = [1, -1] + [1] * (x.dim() - 2)
        # A second round for the squares: from E[x²] - E[x]² the variance of a large mean would be noise.
        centered = x - mean.view(shape)
        variance: Tensor = _SumOverProcesses.apply(centered.square().sum(axes)) / count
        self._update_running(mean.detach(), variance.detach() * (count / (count - 1)))
        y = centered * torch.rsqrt(variance + self.eps).view(shape)
        if self.affine:
            y = y * self.weight.view(shape) + self.bias.view(shape)
        return y.to(input.dtype)

    @torch.no_grad()
    def _update_running(self, mean: Tensor, variance: Tensor) -> None:
        if not self.track_running_stats:
            return
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.num_batches_tracked is not None
        self.num_batches_tracked.add_(1)
        momentum = self.momentum if self.momentum is not None else 1.0 / float(self.num_batches_tracked)
        self.running_mean.lerp_(mean.to(self.running_mean.dtype), momentum)
        self.running_var.lerp_(variance.to(self.running_var.dtype), momentum)


class _SumOverProcesses(torch.autograd.Function):
    """The sum over all processes, whose gradient is the sum of all processes' gradients."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        return sum_over_processes(tensor)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return sum_over_processes(gradients[0].contiguous())
