"""The machine that a run is on: cores, memory, arithmetic, names."""

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
    """Returns, by the metric's name, the most GiB that this process has held so far.

    On the GPU that it uses, or else at all; nothing where the system does not count it (Windows).

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


def precision_in_hardware(wanted: str, device: torch.device) -> str:
    """Returns the precision to take for one that is wanted: itself, unless a device emulates it.

    Emulated bfloat16 takes several times as long as the precision named instead.

    Args:
        wanted: One of Lightning's, such as `bf16-mixed`.
        device: What computes.
    """
    if wanted != "bf16-mixed" or _has_bfloat16(device):
        return wanted
    return "16-mixed" if device.type == "cuda" else "32-true"


def _has_bfloat16(device: torch.device) -> bool:
    """Returns whether a device has instructions for bfloat16; True where PyTorch cannot tell."""
    if device.type == "cuda":  # from Ampere on
        return torch.version.hip is not None or torch.cuda.get_device_capability(device)[0] >= 8
    # `get_capabilities` is newer than torch 2.8.
    if device.type != "cpu" or not hasattr(torch.cpu, "get_capabilities"):
        return True
    found = torch.cpu.get_capabilities()
    return any(found.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16"))  # the last is Arm's


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
