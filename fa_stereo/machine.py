"""The machine that something was measured or trained on."""

from __future__ import annotations

import os
import platform
from pathlib import Path
from typing import Any

import torch


def compute_float32_in_full() -> None:
    """Have GPUs convolve float32 in float32, not, as PyTorch does by default, in TF32, whose mantissa has ten bits.

    It concerns the whole process, so that it is for commands to call and not for the library.
    """
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cuda.matmul.allow_tf32 = False


def describe_machine() -> dict[str, Any]:
    """Return what a measurement depends on: processor, its capability, versions, GPUs."""
    return {
        "cpu": cpu_name(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpus": [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())],
        "python": platform.python_version(),
        "torch": torch.__version__,
        "system": platform.platform(terse=True),
    }


def describe_device(device: torch.device, processes: int = 1) -> str:
    """Return what some processes compute on, in words."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    else:
        name = f"{cpu_name()} ({torch.get_num_threads()} of {os.cpu_count()} cores)"
    return name if processes == 1 else f"{processes} x {name}"


def available_cores() -> int:
    """Return how many cores this process may use (what PyTorch warns by, too)."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def cpu_name() -> str:
    """Return the processor's name."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if "model name" in line:
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()
