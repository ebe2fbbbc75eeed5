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
    layout: str = "contiguous"  # contiguous, channels_last, sliced, transposed, offset

    def make(self, values: torch.Tensor) -> torch.Tensor:
        """values (flat, enough of them) in this shape and layout."""
        count = 1
        for n in self.size:
            count *= n
        x = values[:count].reshape(self.size)
        if self.layout == "channels_last":
            return x.contiguous(memory_format=torch.channels_last)
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
