"""CUDA graphs for inputs of repeated sizes: all kernels of a network recorded once, then launched as one.

A network of some hundred small kernels can keep a fast GPU waiting for Python to launch the next one; a graph does not.
It computes the same with the same kernels, but for one size of picture, and it holds on to the memory that it needs.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from fa_stereo.errors import InputError

Network = Callable[[Tensor, Tensor], Any]
"""From both views [B, 3, H, W] to disparity [B, H, W], or to a tuple of such maps."""

Passes = Callable[..., tuple[Tensor, ...]]
"""The passes forward and backward of training: from tensors to tensors, adding to the gradients of some parameters."""


class GraphedNetwork:
    """Runs a network, from the second pair of a size in a row on by a CUDA graph recorded for that size.

    On other devices than CUDA it only calls the network. Threads may share it: they wait for each other.

    Args:
        network: What to run: the same kernels for every input of a size, and no transfers to the CPU. Its weights must
            stay where they are in memory.
        most_graphs: Sizes whose graphs are kept, those used last. Each keeps the memory of its activations.
        record: Records a network for views like those given, and returns what replays it.

    Attributes:
        network: Ditto.
    """

    def __init__(
        self, network: Network, most_graphs: int = 2, record: Callable[[Network, Tensor, Tensor], Network] | None = None
    ) -> None:
        self.network = network
        self._most_graphs = most_graphs
        self._record = record or record_cuda_graph
        self._graphs: OrderedDict[tuple[int, ...], Network] = OrderedDict()  # those used last at the end
        self._last_size: tuple[int, ...] | None = None
        self._lock = threading.Lock()

    def __call__(self, left: Tensor, right: Tensor) -> Any:
        """Return the network's result; it is the caller's, no later call overwrites it.

        Raises:
            InputError: The network cannot be recorded.
        """
        if self._record is record_cuda_graph and not left.is_cuda:
            return self.network(left, right)
        size = tuple(left.shape)
        with self._lock:
            repeated, self._last_size = size == self._last_size, size
            if size not in self._graphs:
                if not repeated:
                    return self.network(left, right)
                while len(self._graphs) >= self._most_graphs:
                    self._graphs.popitem(last=False)  # first, so that the new graph finds its memory free
                self._graphs[size] = self._record(self.network, left, right)
            self._graphs.move_to_end(size)
            return self._graphs[size](left, right)


def record_cuda_graph(network: Network, left: Tensor, right: Tensor) -> Network:
    """Record a network's kernels for views of one size on a GPU.

    Args:
        network: As for ``GraphedNetwork``.
        left: Example of the left view [B, 3, H, W], on the GPU.
        right: Example of the right view.

    Returns:
        What replays them: for views of this size and type, the network's result in memory of its own.

    Raises:
        InputError: The network does something that cannot be recorded, such as waiting for a value on the CPU.
    """
    with torch.cuda.device(left.device):
        inputs = left.clone(), right.clone()
        # Off the default stream, as recording demands: kernels are chosen and compiled, workspaces allocated.
        stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                network(*inputs)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with _recording(graph, "this network"):
            result = network(*inputs)

    def replay(left: Tensor, right: Tensor) -> Any:
        with torch.cuda.device(left.device):
            for buffer, view in zip(inputs, (left, right), strict=True):
                buffer.copy_(view)
            graph.replay()
            return result.clone() if isinstance(result, Tensor) else tuple(x.clone() for x in result)

    return replay


class GraphedPass:
    """Passes forward and backward, for inputs of the size of the first, from the fourth of these on by a CUDA graph.

    The calls before let PyTorch choose its kernels, and Triton compile ours. Inputs of another size are never recorded.
    A graph writes to the gradients where they are in memory: clear them by ``zero_grad(set_to_none=False)``.

    Args:
        passes: What to run: the same kernels for every input of a size, and no transfers to the CPU.
        parameters: Those whose gradients it adds to.
        record: Records passes for inputs like those given, and returns what replays them.

    Attributes:
        passes: Ditto.
    """

    CALLS_BEFORE = 3

    def __init__(
        self,
        passes: Passes,
        parameters: Iterable[nn.Parameter],
        record: Callable[[Passes, tuple[Tensor, ...]], Passes] | None = None,
    ) -> None:
        self.passes = passes
        self._parameters = list(parameters)
        self._record = record or record_passes
        self._replay: Passes | None = None
        self._calls = 0  # with inputs of these sizes
        self._sizes: list[torch.Size] = []

    def __call__(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """Return the passes' results; a later call may overwrite them.

        Raises:
            InputError: The passes cannot be recorded.
        """
        sizes = [x.shape for x in inputs]
        self._sizes = self._sizes or sizes
        if sizes != self._sizes:
            return self.passes(*inputs)
        self._calls += 1
        if self._calls > self.CALLS_BEFORE and self._replay is None:
            for parameter in self._parameters:
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
            self._replay = self._record(self.passes, inputs)
        return (self._replay or self.passes)(*inputs)


def record_passes(passes: Passes, inputs: tuple[Tensor, ...]) -> Passes:
    """Record the kernels of passes forward and backward, which have run before on inputs of this size.

    Args:
        passes: As for ``GraphedPass``; all gradients that they add to exist.
        inputs: Examples, on the GPU.

    Returns:
        What replays them: for inputs of these sizes and types, results that the next replay overwrites.

    Raises:
        InputError: The passes do something that cannot be recorded.
    """
    with torch.cuda.device(inputs[0].device):
        copies = tuple(x.clone() for x in inputs)
        graph = torch.cuda.CUDAGraph()
        with _recording(graph, "this training step"):
            results = passes(*copies)

    def replay(*inputs: Tensor) -> tuple[Tensor, ...]:
        with torch.cuda.device(inputs[0].device):
            for copy, x in zip(copies, inputs, strict=True):
                copy.copy_(x)
            graph.replay()
        return results

    return replay


@contextmanager
def _recording(graph: torch.cuda.CUDAGraph, what: str) -> Iterator[None]:
    """Record the kernels that are launched inside."""
    try:
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            yield
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        reason = str(error).strip().split("\n")[0]
        raise InputError(f"{what} cannot be recorded as a CUDA graph ({reason}): go without it") from error
