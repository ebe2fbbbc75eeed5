"""QuantSpec: the integer range of a quantized tensor and everything that follows from it."""

from __future__ import annotations

import math
import numbers
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

MAX_LEVELS = 256
LARGEST_CODE = 1 << 19  # up to which every backend divides and rounds as the reference
REGULARIZERS = ("br", "dampening")
# How a bin loss reaches alpha, see check_to_alpha().
ToAlpha = bool | float | str | tuple[float, str]


def is_number(value: object) -> bool:
    """Whether value is a real number and no bool."""
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def check_flag(value: bool, argument: str) -> bool:
    """value, if it is True or False: by its truth "no" would be a yes."""
    if not isinstance(value, bool):
        raise TypeError(f"{argument}={value!r}: expected True or False")
    return value


@dataclass(frozen=True)
class QuantSpec:
    """The integer grid of one quantized tensor.

    Signed b bits: qn = -2^(b-1), qp = 2^(b-1) - 1. Unsigned b bits: qn = 0, qp = 2^b - 1.
    Signed 1 bit is binary: codes -1 and +1. Other ranges are had by naming ``qn`` and ``qp``: ternary is
    ``bits=2, qn=-1, qp=1``.

    Args:
        bits: width of a code, 1 to 8.
        signed: weights are signed, activations after a ReLU are not.
        channel_axis: the dimension of x along which steps differ; None for one step per tensor.
        qn, qp: both or neither, within +-524288; they override the range that ``bits`` and ``signed`` give. Always ints
            afterwards, so that dataclasses.replace(spec, bits=4) keeps the range; to have it anew, qn=None, qp=None.
        binary: codes are -1 and +1, and 0 does not occur. Default: for signed 1 bit without ``qn`` and ``qp``.

    Raises:
        ValueError, TypeError: for a range that no kernel has; the message names the argument.

    Source: Esser et al., Learned Step Size Quantization, ICLR 2020, section 2.
    """

    bits: int
    signed: bool = True
    channel_axis: int | None = None
    qn: int = None  # type: ignore[assignment]
    qp: int = None  # type: ignore[assignment]
    binary: bool = None  # type: ignore[assignment]

    if TYPE_CHECKING:  # None may be given, and is never there afterwards

        def __init__(
            self, bits: int, signed: bool = True, channel_axis: int | None = None, qn: int | None = None,
            qp: int | None = None, binary: bool | None = None,
        ) -> None: ...  # fmt: skip

    def __post_init__(self) -> None:
        for name in ("bits", "channel_axis", "qn", "qp"):
            value = getattr(self, name)
            optional = name != "bits"
            if isinstance(value, bool) or not (isinstance(value, int) or (optional and value is None)):
                raise TypeError(f"{name}={value!r}: expected an int{' or None' if optional else ''}")
        if not 1 <= self.bits <= 8:
            raise ValueError(f"bits={self.bits}: expected 1 to 8 (leave a tensor unquantized to keep it in float)")
        if (self.qn is None) != (self.qp is None):
            raise ValueError(f"qn={self.qn}, qp={self.qp}: name both or neither")
        check_flag(self.signed, "signed")
        if self.binary is not None:
            check_flag(self.binary, "binary")
        named = self.qn is not None
        if self.binary is None:
            object.__setattr__(self, "binary", self.signed and self.bits == 1 and not named)
        elif self.binary and not (self.signed and self.bits == 1 and (self.qn, self.qp) in ((None, None), (-1, 1))):
            raise ValueError(f"binary=True with {self.bits} bits, signed={self.signed}, qn={self.qn}, qp={self.qp}: "
                             "expected bits=1, signed=True and no other range")  # fmt: skip
        if not named:
            half = 1 << (self.bits - 1)
            low, high = (-half, half - 1) if self.signed else (0, 2 * half - 1)
            object.__setattr__(self, "qn", low)
            object.__setattr__(self, "qp", 1 if self.binary else high)
        if self.qn > self.qp:
            raise ValueError(f"qn={self.qn} > qp={self.qp}: expected qn <= qp")
        if self.qp - self.qn + 1 > MAX_LEVELS:
            raise ValueError(f"qn={self.qn}, qp={self.qp}: {self.num_slots} levels, expected at most {MAX_LEVELS}")
        if max(-self.qn, self.qp) > LARGEST_CODE:
            raise ValueError(f"qn={self.qn}, qp={self.qp}: expected codes within {LARGEST_CODE} of 0; shift x")

    @property
    def num_slots(self) -> int:
        """Entries of a table indexed by ``code - qn`` (binary leaves the middle one empty)."""
        return self.qp - self.qn + 1

    @property
    def codes(self) -> tuple[int, ...]:
        """The codes that can occur, ascending."""
        return (-1, 1) if self.binary else tuple(range(self.qn, self.qp + 1))

    def channels(self, shape: Sequence[int]) -> int:
        """How many steps a tensor of this shape has."""
        return 1 if self.channel_axis is None else shape[self.channel_axis]

    def step_shape(self, dim: int) -> list[int]:
        """The shape in which steps, [1] or [C], broadcast against a tensor of dim dimensions."""
        if self.channel_axis is None:
            return [1] * dim
        return [-1 if i == self.channel_axis % dim else 1 for i in range(dim)]

    def lsq_grad_scale(self, numel_per_step: int) -> float:
        """s = 1 / sqrt(N * max(qp, 1)), N the elements that share one step (LSQ paper, section 2.2)."""
        return lsq_grad_scale(numel_per_step, self.qp)


def lsq_grad_scale(numel_per_step: int, qp: int) -> float:
    """QuantSpec.lsq_grad_scale of a range that ends at qp."""
    return 1.0 / math.sqrt(max(numel_per_step, 1) * max(qp, 1))


def check_regularizer(value: str, argument: str) -> str:
    """value, if it names a bin loss: "br" (an element's weight is 1 / n_k) or "dampening" (it is 1)."""
    if value not in REGULARIZERS:
        raise ValueError(f"{argument}={value!r}: expected 'br' or 'dampening'")
    return value


def check_to_alpha(value: ToAlpha, argument: str) -> tuple[float, bool]:
    """(fraction of a bin loss's gradient that reaches alpha, whether LSQ's gradient scale multiplies it).

    Args:
        value: False (none), True (all of it, as the predecessor), a fraction from 0 to 1, "scaled" (all of it, times
            LSQ's gradient scale, as the task loss's gradient is), or (fraction, "scaled").
        argument: the caller's name of it, for the message.
    """
    scaled = False
    if isinstance(value, str) and value == "scaled":
        fraction, scaled = 1.0, True
    elif isinstance(value, tuple) and len(value) == 2 and value[1] == "scaled":
        fraction, scaled = value[0], True
    else:
        fraction = value
    if not isinstance(fraction, (bool, int, float)) or not 0 <= fraction <= 1:
        expected = "False, True, a fraction from 0 to 1, 'scaled' or (fraction, 'scaled')"
        raise ValueError(f"{argument}={value!r}: expected {expected}")
    return float(fraction), scaled
