"""Schedules of lambda: their values, their ends, pickling, and bad arguments."""

from __future__ import annotations

import copy
import pickle

import pytest

from qbr.schedules import Constant, Cosine, Linear

RAMPS = [Constant(0.3), Linear(0.0, 2.0, begin=10, until=20), Cosine(2.0, 0.0, begin=10, until=20)]


@pytest.mark.parametrize("schedule, values", [
    (RAMPS[0], {-5: 0.3, 0: 0.3, 10**9: 0.3}),
    (RAMPS[1], {0: 0.0, 10: 0.0, 11: 0.2, 15: 1.0, 17.5: 1.5, 20: 2.0, 99: 2.0}),
    (RAMPS[2], {0: 2.0, 10: 2.0, 12.5: 1 + 0.5**0.5, 15: 1.0, 17.5: 1 - 0.5**0.5, 20: 0.0, 99: 0.0}),
])  # fmt: skip
def test_values(schedule, values):
    for when, value in values.items():
        assert schedule(when) == pytest.approx(value) and isinstance(schedule(when), float)
    for copied in (copy.deepcopy(schedule), pickle.loads(pickle.dumps(schedule))):
        assert copied == schedule and [copied(when) for when in values] == [schedule(when) for when in values]


@pytest.mark.parametrize("make, error, message", [
    (lambda: Linear(0.0, 1.0, begin=5, until=5), ValueError, "begin=5, until=5: expected begin < until"),
    (lambda: Cosine(0.0, float("inf"), begin=1, until=2), ValueError, "end=inf"),
    (lambda: Constant("1"), TypeError, "value='1'"),
    (lambda: Linear(True, 1.0, begin=1, until=2), TypeError, "start=True"),
])  # fmt: skip
def test_bad_arguments(make, error, message):
    with pytest.raises(error, match=message):
        make()
