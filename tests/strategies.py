"""Hypothesis strategies that the property tests share: what is quantized, how it lies in memory, with which steps.

Three profiles: "quick" (the same 50 examples on every run), "few" (three, where an example takes seconds: in Triton's
interpreter, and where each is compiled anew), and "long" (2,000 fresh ones), which is run by

    QBR_PROPERTIES=long python -m pytest -q tests/test_properties.py tests/test_properties_equal.py

An example that it fails on is printed with the line that repeats it (@reproduce_failure).
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass

import torch
from cases import DTYPES, Shape
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from qbr import QuantSpec

_COMMON = dict(deadline=None, database=None, suppress_health_check=list(HealthCheck))
settings.register_profile("quick", max_examples=50, derandomize=True, **_COMMON)
settings.register_profile("long", max_examples=2000, print_blob=True, **_COMMON)
settings.register_profile("few", max_examples=3, derandomize=True, **_COMMON)
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
settings.load_profile("few" if INTERPRETED else os.environ.get("QBR_PROPERTIES", "quick"))

# At the seams of the kernels: vectors of 16, three of them in flight, chunks of 1,024, tasks of 16 chunks.
_LENGTHS = [1, 2, 15, 16, 17, 31, 33, 47, 48, 49, 63, 64, 65, 1023, 1024, 1025, 1040, 1073, 2049, 4097]
_LONG = [16_383, 16_385, 32_769, 50_001]
LAYOUTS = ["contiguous", "transposed", "sliced", "offset", "expanded", "channels_last", "channels_last_3d"]
_NEEDS_DIMS = {"channels_last": 4, "channels_last_3d": 5}
# Steps of every magnitude; and those with which no square of a distance, and no level in float16, leaves its type.
ANY_EXPONENT, ORDINARY_EXPONENT = (-149, 126), (-10, 2)


@dataclass(frozen=True)
class Problem:
    """One call's arguments; the tensors are made from a seed, so that what hypothesis prints says everything.

    Attributes:
        step, exponent: the first channel's step is step * 2^exponent, rounded to float32.
        kinds: what the values are, each drawn for some elements: see _KINDS.
        nonfinite: values that stand at random places besides ("inf", "-inf", "nan").
    """

    spec: QuantSpec
    shape: Shape
    grad_layout: str
    dtype: str
    step: float
    exponent: int
    kinds: tuple[str, ...]
    nonfinite: tuple[str, ...]
    relu: bool
    clip: float | None
    seed: int

    @property
    def options(self) -> dict:
        return dict(relu=self.relu, clip=self.clip)

    @property
    def alpha(self) -> torch.Tensor:
        """[1] or [C] float32, unequal where there are several."""
        count = self.spec.channels(self.shape.size)
        first = max(math.ldexp(self.step, self.exponent), 2.0**-149)
        return torch.tensor([first * (1 + 0.37 * i % 1.0) for i in range(count)], dtype=torch.float64).float()

    def spread(self, alpha: torch.Tensor) -> torch.Tensor:
        """alpha, broadcastable against x."""
        return alpha.reshape(self.spec.step_shape(len(self.shape.size)))

    @property
    def x(self) -> torch.Tensor:
        return self.laid_out(self.values(), self.shape.layout)

    def values(self) -> torch.Tensor:
        """x, contiguous."""
        size, spec = self.shape.size, self.spec
        generator = torch.Generator().manual_seed(self.seed)
        x = torch.zeros(size)
        which = torch.randint(len(self.kinds), size, generator=generator)
        step = self.spread(self.alpha).double()
        for i, kind in enumerate(self.kinds):
            x = torch.where(which == i, _KINDS[kind](spec, size, step, generator), x)
        x = x.to(DTYPES[self.dtype])
        for value in self.nonfinite:
            if x.numel():
                x.view(-1)[torch.randint(x.numel(), (1,), generator=generator)] = float(value)
        return x

    @property
    def grad(self) -> torch.Tensor:
        """An incoming gradient in x's dtype, laid out in a way of its own."""
        generator = torch.Generator().manual_seed(self.seed + 1)
        grad = torch.randn(self.shape.size, generator=generator).to(DTYPES[self.dtype])
        return self.laid_out(grad, self.grad_layout)

    def laid_out(self, values: torch.Tensor, layout: str) -> torch.Tensor:
        return Shape("", self.shape.size, layout).make(values.reshape(-1))


def _codes(spec, size, generator, beyond=0):
    return torch.randint(spec.qn - beyond, spec.qp + beyond + 1, size, generator=generator).double()


def _spread(spec, size, step, generator, wide=0.6):
    v = torch.randn(size, generator=generator, dtype=torch.float64) * ((spec.qp - spec.qn) / 2 + 1.5) * wide
    return ((v + (spec.qp + spec.qn) / 2) * step).float()


def _beside(made, step, generator):
    """Values, or their neighbours by one ulp on either side; those of 0, which are subnormal, by 2^-24 of a step."""
    way = torch.randint(-1, 2, made.shape, generator=generator)
    moved = torch.nextafter(made, torch.where(way > 0, math.inf, -math.inf).float())
    return torch.where(made == 0, way * step.float() * 2.0**-24, torch.where(way == 0, made, moved))


_KINDS = {
    "spread": _spread,
    "far": lambda *how: _spread(*how, wide=1000.0),
    # In float64 the product is exact, so this is the float32 product that a kernel's level is.
    "levels": lambda spec, size, step, g: (torch.tensor(spec.codes)[
        torch.randint(len(spec.codes), size, generator=g)] * step).float(),
    "near levels": lambda spec, size, step, g: _beside((_codes(spec, size, g, 1) * step).float(), step, g),
    "ties": lambda spec, size, step, g: _beside(((_codes(spec, size, g, 1) + 0.5) * step).float(), step, g),
    "zeros": lambda spec, size, step, g: torch.tensor([0.0, -0.0])[torch.randint(2, size, generator=g)],
    "subnormals": lambda spec, size, step, g: torch.randint(-1000, 1001, size, generator=g) * 2.0**-149,
    "huge": lambda spec, size, step, g: torch.randn(size, generator=g).sign() * 3e38,
}  # fmt: skip
ORDINARY = ("spread", "levels", "near levels", "ties", "zeros")
ALL_KINDS = tuple(_KINDS)


@st.composite
def specs(draw, dims: int, per_channel: bool | None = None, unsigned: bool = False) -> QuantSpec:
    """A range of 1 to 8 bits, or a named one that need not hold 0; per_channel None: either."""
    bits = draw(st.integers(1, 8))
    signed = not unsigned and draw(st.booleans())
    named = {}
    if not unsigned and draw(st.integers(0, 4)) == 0:
        qn = draw(st.integers(-300, 300))
        named = dict(qn=qn, qp=qn + draw(st.integers(0, 255)))
    axis = None
    if dims and (per_channel or (per_channel is None and draw(st.booleans()))):
        axis = draw(st.integers(-dims, dims - 1))
    return QuantSpec(bits, signed, axis, **named)


@st.composite
def sizes(draw, least_dims: int = 0, empty: bool = True) -> tuple[int, ...]:
    kind = draw(st.integers(0, 19))
    if kind < 7 and least_dims <= 1:
        return (draw(st.sampled_from(_LENGTHS if kind < 6 or INTERPRETED else _LONG)),)
    dims = draw(st.integers(least_dims, 5))
    size = tuple(draw(st.lists(st.integers(0 if empty and kind > 17 else 1, 9), min_size=dims, max_size=dims)))
    return size


@st.composite
def problems(
    draw,
    kinds: tuple[str, ...] = ORDINARY,
    exponent: tuple[int, int] = ORDINARY_EXPONENT,
    dtypes: tuple[str, ...] = tuple(DTYPES),
    nonfinite: bool = False,
    per_channel: bool | None = None,
    relu: bool | None = None,
    empty: bool = True,
) -> Problem:
    """relu None: either, with or without a clip."""
    size = draw(sizes(least_dims=1 if per_channel else 0, empty=empty))
    fits = [layout for layout in LAYOUTS if _NEEDS_DIMS.get(layout, len(size)) == len(size)]
    if not size:
        fits = ["contiguous"]
    with_relu = draw(st.booleans()) if relu is None else relu
    spec = draw(specs(len(size), per_channel, unsigned=with_relu))
    step, power = draw(st.sampled_from([1.0, 1.3, 1.7])), draw(st.integers(*exponent))
    clip = None
    if with_relu and draw(st.booleans()):  # below, at and above the uppermost level
        steps = draw(st.sampled_from([0.5, 1.0, spec.qp - 0.25, spec.qp, spec.qp + 7]))
        clip = max(steps * math.ldexp(step, power), 2.0**-149)
    return Problem(
        spec,
        Shape("x".join(map(str, size)), size, draw(st.sampled_from(fits))),
        draw(st.sampled_from(fits)),
        draw(st.sampled_from(dtypes)),
        step,
        power,
        tuple(draw(st.lists(st.sampled_from(kinds), min_size=1, max_size=4, unique=True))),
        tuple(draw(st.lists(st.sampled_from(["inf", "-inf", "nan"]), max_size=3))) if nonfinite else (),
        with_relu,
        clip,
        draw(st.integers(0, 2**20)),
    )
