"""The machine that a run is on: cores, memory, names."""

import os
import platform
import sys
from pathlib import Path

import torch


def num_cores() -> int:
    """Returns how many cores this process may use."""
    if hasattr(os, "sched_getaffinity"):  # Linux, where a scheduler may allow a process a few only
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def peak_memory(device: torch.device) -> dict[str, float]:
    """Returns the most GiB that this process has held so far: on the GPU it uses, or else at all.

    Nothing where the system does not count it (Windows).

    Args:
        device: What the process computes on.
    """
    if device.type == "cuda":
        return {"memory/gpu_peak_gib": torch.cuda.max_memory_allocated(device) / 2**30}
    try:
        import resource
    except ImportError:
        return {}
    unit = 1 if sys.platform == "darwin" else 1024  # bytes or KiB
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    return {"memory/peak_gib": used / 2**30}


def processor() -> str:
    """Returns the name of the processor, or at least its architecture."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
    names = [line.split(":")[1].strip() for line in lines if "model name" in line]
    return names[0] if names else platform.machine()


def describe_machine(device: torch.device, count: int = 1) -> str:
    """Returns the GPUs' number and name, or the cores' and the processor's.

    Args:
        device: What a process computes on.
        count: How many processes there are, with a device each.
    """
    if device.type == "cuda":
        return f"{count}x {torch.cuda.get_device_name(device)}"
    cores = torch.get_num_threads() * count
    return f"{cores} core{'s' if cores > 1 else ''} of {processor()}"
