"""Cores and memory, also where a system does not tell all of them."""

import os
import sys

import numpy as np
import torch

from isanet_pl.hardware import num_cores, peak_memory


def test_memory_is_that_of_the_process():
    (before,) = peak_memory().values()
    held = np.ones(300 * 2**20, dtype=np.uint8)
    (after,) = peak_memory().values()
    if not torch.cuda.is_available():
        assert 0.1 < before < after + held[0] < before + 2
        assert after > 0.29


def test_memory_is_left_out_where_it_is_not_counted(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setitem(sys.modules, "resource", None)  # as on Windows
    assert peak_memory() == {}


def test_cores_are_those_that_the_process_may_use(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {1, 5, 7})
    assert num_cores() == 3
    monkeypatch.delattr(os, "sched_getaffinity")  # as on macOS
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    assert num_cores() == 8
