"""Time, memory and arithmetic of a call, for the benchmarks."""

import os
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from isanet_pl.hardware import processor

Call = Callable[[], object]


GPU_SECONDS = 0.02
"""What is timed on a GPU takes at least as long: a single call may end before it is launched."""


def alternate(
    calls: Mapping[str, Call], rounds: int, warmup: int = 2, device: str = "cpu"
) -> dict[str, list[float]]:
    """Returns milliseconds of each call in each round.

    The calls take turns, so that whatever else the machine does meets all of them. On a GPU each
    is repeated, and the mean taken.

    Args:
        calls: What to time.
        rounds: How often.
        warmup: Calls before that, each; on a GPU two more.
        device: What they compute on, `cpu` or `cuda`.
    """
    times: dict[str, list[float]] = {name: [] for name in calls}
    repeats = dict.fromkeys(calls, 1)
    if device == "cuda":
        for name, call in calls.items():
            # The first takes long: kernels are loaded, and cuDNN tries its algorithms.
            _seconds(call, 1, device)
            repeats[name] = max(1, round(GPU_SECONDS / _seconds(call, 1, device)))
    for number in range(warmup + rounds):
        for name, call in calls.items():
            milliseconds = 1000 * _seconds(call, repeats[name], device)
            if number >= warmup:
                times[name].append(milliseconds)
    return times


def _seconds(call: Call, repeats: int, device: str) -> float:
    """Returns the mean time of a call."""
    _wait(device)
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    _wait(device)
    return (time.perf_counter() - start) / repeats


def _wait(device: str) -> None:
    """Waits until a device has done what it was given; a CPU has."""
    if device == "cuda":
        torch.cuda.synchronize()


def spread(times: list[float]) -> dict[str, float]:
    """Returns median, least and most."""
    return {"median": statistics.median(times), "min": min(times), "max": max(times)}


def gmacs(call: Call) -> float:
    """Returns billions of multiply-adds of convs and matrix products, attention included."""
    with FlopCounterMode(display=False) as counter:
        call()
    return float(counter.get_total_flops() / 2e9)


def peak_mib(call: Call, device: str = "cpu") -> float:
    """Returns the most MiB of tensors that a call has alive at once, beyond those before it.

    On a GPU by its allocator, on a CPU by the allocations that PyTorch's profiler sees.
    """
    if device == "cuda":
        call()  # cuDNN tries its algorithms in the first call, with memory that no later one takes
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    with _silent(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as trace:
        call()
    results = getattr(trace.profiler, "kineto_results", None)
    assert results is not None
    events = [e for e in results.events() if e.name() == "[memory]"]
    live = most = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        live += event.nbytes()
        most = max(most, live)
    return most / 2**20


@contextmanager
def _silent() -> Iterator[None]:
    """Keeps what the profiler's libraries print from the terminal."""
    kept = os.dup(2)
    with Path(os.devnull).open("w") as nowhere:
        os.dup2(nowhere.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(kept, 2)
            os.close(kept)


def saved_mib(run: Callable[[Tensor], object], x: Tensor, module: nn.Module) -> float:
    """Returns the MiB that autograd keeps for the backward pass, without input and parameters."""
    own = [x, *module.parameters(), *module.buffers()]
    known = {tensor.untyped_storage().data_ptr() for tensor in own}
    sizes: dict[int, int] = {}
    kept = []

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            sizes[storage.data_ptr()] = storage.nbytes()
            kept.append(tensor)  # so that no address is used twice
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = run(x)
    del result
    return sum(sizes.values()) / 2**20


def conv_ceiling(x: Tensor, dtype: torch.dtype, rounds: int = 20) -> float:
    """Returns the best GMAC/s of a conv1x1 of the head's width, 2048 to 512, channels_last.

    Args:
        x: (N, 2048, H, W), the head's input.
        dtype: Of the conv.
        rounds: Timed calls.
    """
    x = x.to(dtype, memory_format=torch.channels_last)
    weight = torch.randn(512, 2048, 1, 1, device=x.device, dtype=dtype)
    with torch.inference_mode():
        call = {"conv": lambda: nn.functional.conv2d(x, weight)}
        times = alternate(call, rounds, device=x.device.type)["conv"]
    return 512 * x.numel() / 1e6 / min(times)


def machine(device: str = "cpu") -> str:
    """Returns the GPU's name, or the processor and the threads in use."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    count = torch.get_num_threads()
    threads = "1 thread" if count == 1 else f"{count} threads"
    return f"{threads} of {processor()}"
