"""Cores and memory, also where a system does not tell all of them."""

import os
import subprocess
import sys

import pytest
import torch

from isanet_pl.hardware import (
    describe_machine,
    num_cores,
    peak_memory,
    precision_in_hardware,
    processor,
)

CPU, GPU = torch.device("cpu"), torch.device("cuda:1")


def test_memory_is_that_of_the_process():
    # In a process of its own, which begins with the peak of this one.
    code = (
        "import numpy, torch; from isanet_pl.hardware import peak_memory\n"
        "(before,) = peak_memory(torch.device('cpu')).values()\n"
        "held = numpy.ones(int((before + 0.3) * 2**30), dtype=numpy.uint8)\n"
        "print(before, *peak_memory(torch.device('cpu')).values())"
    )
    text = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    before, after = map(float, text.stdout.split())
    assert before > 0.1
    assert before + 0.3 < after < before + 1.3  # what its imports hold is added


def test_memory_is_left_out_where_it_is_not_counted(monkeypatch):
    monkeypatch.setitem(sys.modules, "resource", None)  # as on Windows
    assert peak_memory(CPU) == {}


def test_a_gpu_is_named_only_by_a_run_that_uses_it(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"GPU {device.index}")
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: device.index * 2**30)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    assert describe_machine(GPU, 2) == "2x GPU 1"
    assert describe_machine(CPU, 2) == f"6 cores of {processor()}"
    assert peak_memory(GPU) == {"memory/gpu_peak_gib": 1.0}
    assert list(peak_memory(CPU)) == ["memory/peak_gib"]


@pytest.mark.parametrize(
    ("found", "precision"),
    [
        ({"avx2": True, "avx512_f": True, "avx512_bf16": False}, "32-true"),
        ({"avx2": True, "avx512_f": True, "avx512_bf16": True}, "bf16-mixed"),
        ({"amx_bf16": True}, "bf16-mixed"),
        ({"neon": True, "bf16": False}, "32-true"),
        ({"neon": True, "bf16": True}, "bf16-mixed"),
    ],
)
def test_a_cpu_that_would_emulate_bfloat16_takes_fp32(found, precision, monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: found, raising=False)
    assert precision_in_hardware("bf16-mixed", CPU) == precision
    assert precision_in_hardware("32-true", CPU) == "32-true"


@pytest.mark.parametrize(("major", "precision"), [(7, "16-mixed"), (8, "bf16-mixed")])
def test_a_gpu_that_would_emulate_bfloat16_takes_fp16(major, precision, monkeypatch):
    # Of the device that is asked for; another one may be the current one.
    capability = {GPU: (major, 5), torch.device("cuda:0"): (15 - major, 0)}
    monkeypatch.setattr(torch.cuda, "get_device_capability", capability.get)
    assert precision_in_hardware("bf16-mixed", GPU) == precision
    assert precision_in_hardware("16-mixed", GPU) == "16-mixed"


def test_a_pytorch_that_cannot_tell_takes_what_was_wanted(monkeypatch):
    monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    assert precision_in_hardware("bf16-mixed", CPU) == "bf16-mixed"


def test_cores_are_those_that_the_process_may_use(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {1, 5, 7})
    assert num_cores() == 3
    monkeypatch.delattr(os, "sched_getaffinity")  # as on macOS
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    assert num_cores() == 8
