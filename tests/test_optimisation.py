"""The poly schedule."""

import pytest

from isanet_pl.optimisation import poly_schedule


def test_poly_schedule_against_the_formula():
    factor = poly_schedule(100, power=0.9, end_factor=0.01, warmup_fraction=0.0)
    assert factor(0) == 1
    assert factor(50) == pytest.approx(0.01 + 0.99 * 0.5**0.9)
    assert factor(100) == pytest.approx(0.01)
    assert factor(500) == pytest.approx(0.01)  # a run resumed beyond its end does not turn negative


def test_warmup_rises_to_the_base_rate_and_then_decays():
    factor = poly_schedule(100, power=0.9, end_factor=0.0, warmup_fraction=0.1)
    values = [factor(step) for step in range(101)]
    assert values[:10] == pytest.approx([(i + 1) / 11 for i in range(10)])
    assert values[10] == 1
    assert values[10:] == sorted(values[10:], reverse=True)
    assert values[100] == 0
