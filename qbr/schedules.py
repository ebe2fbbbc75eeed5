"""Schedules of a loss's strength (lambda) over epochs or steps: a number for each, computed on the host."""

from __future__ import annotations

import math
from dataclasses import dataclass

from qbr.spec import is_number


@dataclass(frozen=True)
class Constant:
    """The same value always.

        lam = Constant(1.0)
        loss = task + lam(epoch) * qbr.bin_loss(model).weights

    Args:
        value: what a call gives, whatever it is called with.
    """

    value: float

    def __post_init__(self) -> None:
        _check_finite(self, "value")

    def __call__(self, when: float) -> float:
        return self.value


@dataclass(frozen=True)
class Linear:
    """From ``start`` to ``end`` in a straight line; before ``begin`` it is start, after ``until`` it is end.

        lam = Linear(0.0, 1.0, begin=31, until=100)         # in epochs, or in steps: whatever you count
        loss = task + lam(epoch) * qbr.bin_loss(model).weights

    Args:
        start, end: the values at ``begin`` and at ``until``.
        begin, until: in the unit that the schedule is called with; begin < until.

    Raises:
        TypeError, ValueError: naming the argument.
    """

    start: float
    end: float
    begin: float
    until: float

    def __post_init__(self) -> None:
        _check_finite(self, "start", "end", "begin", "until")
        if not self.begin < self.until:
            raise ValueError(f"begin={self.begin}, until={self.until}: expected begin < until")

    def __call__(self, when: float) -> float:
        if not is_number(when):
            raise TypeError(f"when={when!r}: expected a number, in the unit of begin and until")
        return self.start + (self.end - self.start) * self._done(self._fraction(when))

    def _fraction(self, when: float) -> float:
        return min(max((when - self.begin) / (self.until - self.begin), 0.0), 1.0)

    def _done(self, fraction: float) -> float:
        return fraction


@dataclass(frozen=True)
class Cosine(Linear):
    """From ``start`` to ``end`` along half a cosine, slow at both ends; arguments as Linear's.

    Source: Nagel et al., Overcoming Oscillations in Quantization-Aware Training, ICML 2022, which raises the
    strength of dampening so.
    """

    def _done(self, fraction: float) -> float:
        return (1.0 - math.cos(math.pi * fraction)) / 2.0


def _check_finite(schedule, *names: str) -> None:
    for name in names:
        value = getattr(schedule, name)
        if not is_number(value):
            raise TypeError(f"{name}={value!r}: expected a number")
        if not math.isfinite(value):
            raise ValueError(f"{name}={value}: expected a finite number")
