"""What the parity tests share: backends and devices, dtypes, shapes, awkward values, and the one tolerance table."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from qbr import QuantSpec

DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}

# Relative to the largest magnitude that the sum could have: |got - expected| <= tolerance * scale.
# Elementwise results are exact in codes; a 16-bit result may differ by one rounding of the stored type.
SUM_TOLERANCE = 2e-5
ELEMENT_TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3, torch.float64: 1e-12}


@dataclass(frozen=True)
class Shape:
    """One tensor shape and how it lies in memory."""

    name: str
    size: tuple[int, ...]
    layout: str = "contiguous"  # contiguous, channels_last, channels_last_3d, sliced, transposed, offset, expanded

    def make(self, values: torch.Tensor) -> torch.Tensor:
        """values (flat, enough of them) in this shape and layout."""
        count = 1
        for n in self.size:
            count *= n
        x = values[:count].reshape(self.size)
        if self.layout == "channels_last":
            return x.contiguous(memory_format=torch.channels_last)
        if self.layout == "channels_last_3d":
            return x.contiguous(memory_format=torch.channels_last_3d)
        if self.layout == "expanded":  # one value along the last dimension, which has no stride
            return x[..., :1].expand(self.size)
        if self.layout == "sliced":
            return x.repeat_interleave(2, dim=-1)[..., ::2]
        if self.layout == "transposed":
            return x.transpose(0, -1).contiguous().transpose(0, -1)
        if self.layout == "offset":  # a storage offset of one element: no vector load is aligned
            return torch.cat([x.new_zeros(1), x.reshape(-1)])[1:].reshape(self.size)
        return x.clone()


SHAPES = [
    Shape("empty", (0,)),
    Shape("one", (1,)),
    Shape("three", (3,)),
    Shape("63", (63,)),
    Shape("conv", (64, 3, 3, 3)),
    Shape("100003", (100_003,)),
    Shape("sliced", (16, 33), "sliced"),
    Shape("transposed", (17, 5, 3), "transposed"),
    Shape("channels_last", (6, 8, 5, 5), "channels_last"),
    Shape("offset", (4097,), "offset"),
]


def values(count: int, spec: QuantSpec, alpha: float, seed: int = 0) -> torch.Tensor:
    """float32 values in random order: spread over and beyond the range, exact ties, levels, both ends and their
    neighbours by one ulp, zeros of both signs, subnormals."""
    generator = torch.Generator().manual_seed(seed)
    span = (spec.qp - spec.qn) / 2 + 1.5
    x = torch.randn(count, generator=generator) * span * alpha * 0.6 + (spec.qp + spec.qn) / 2 * alpha
    step = torch.tensor(alpha)
    levels = torch.arange(spec.qn, spec.qp + 1, dtype=torch.float32) * step
    ties = (torch.arange(spec.qn - 1, spec.qp + 1, dtype=torch.float32) + 0.5) * step
    special = torch.cat([levels, ties, torch.tensor([0.0, -0.0, 1e-40, -1e-40])])
    inf = torch.tensor(float("inf"))
    special = torch.cat([special, special.nextafter(inf), special.nextafter(-inf)])
    where = torch.randperm(count, generator=generator)[: len(special)]
    x[where] = special[torch.randperm(len(special), generator=generator)[: len(where)]]
    return x


def step_for(spec: QuantSpec) -> float:
    """An ordinary step, no power of two: products and quotients round."""
    return 0.3 if spec.num_slots <= 16 else 0.013


@dataclass(frozen=True)
class Case:
    """One way to quantize: the range, one step or many, and the fused ReLU."""

    name: str
    spec: QuantSpec
    relu: bool = False
    clip: float | None = None

    def fits(self, size: tuple[int, ...]) -> bool:
        axis = self.spec.channel_axis
        return axis is None or len(size) > max(axis, 1)

    def inputs(self, size: tuple[int, ...], seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """x, alpha and an incoming gradient, float32, contiguous."""
        count = 1
        for n in size:
            count *= n
        base = step_for(self.spec)
        x = values(count, self.spec, base, seed).reshape(size)
        if self.relu:  # the ReLU's own half-line, too
            x = x - self.spec.qp * base * 0.2
        channels = self.spec.channels(size)
        alpha = base * (1 + 0.37 * torch.arange(channels) % 1.0) if channels != 1 else torch.full((1,), base)
        grad = torch.randn(size, generator=torch.Generator().manual_seed(seed + 1))
        return x, alpha, grad

    def spread(self, alpha: torch.Tensor, dims: int) -> torch.Tensor:
        """alpha, broadcastable against x."""
        return alpha.reshape([-1 if i == self.spec.channel_axis else 1 for i in range(dims)])


SPECS = [
    Case("w1", QuantSpec(bits=1)),
    Case("w2", QuantSpec(bits=2)),
    Case("w3", QuantSpec(bits=3)),
    Case("w4", QuantSpec(bits=4)),
    Case("w4-symmetric", QuantSpec(bits=4, qn=-7, qp=7)),
    Case("w5", QuantSpec(bits=5)),
    Case("w8", QuantSpec(bits=8)),
    Case("ternary", QuantSpec(bits=2, qn=-1, qp=1)),
    Case("u1", QuantSpec(bits=1, signed=False)),
    Case("u2-relu-clip", QuantSpec(bits=2, signed=False), relu=True, clip=1.0),
    Case("u4-relu", QuantSpec(bits=4, signed=False), relu=True),
    Case("u8-relu-clip", QuantSpec(bits=8, signed=False), relu=True, clip=2.5),
    Case("w1-channel0", QuantSpec(bits=1, channel_axis=0)),
    Case("w2-channel0", QuantSpec(bits=2, channel_axis=0)),
    Case("w4-channel1", QuantSpec(bits=4, channel_axis=1)),
    Case("w8-channel0", QuantSpec(bits=8, channel_axis=0)),
    Case("u2-relu-channel1", QuantSpec(bits=2, signed=False, channel_axis=1), relu=True, clip=1.0),
]
