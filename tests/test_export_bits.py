"""Packing codes as bits: against a plain loop over bits, at every width, and what is refused."""

from __future__ import annotations

import pytest
import torch

from qbr import QuantSpec
from qbr.export import bits
from qbr.export.codes import codes_of, from_unsigned, to_unsigned, values_of, width


def _by_hand(values, width):
    stream = [(value >> j) & 1 for value in values for j in range(width)]
    stream += [0] * (-len(stream) % 8)
    return [sum(bit << j for j, bit in enumerate(stream[i : i + 8])) for i in range(0, len(stream), 8)]


@pytest.mark.parametrize("count", [0, 1, 7, 8, 9, 63, 1000])
@pytest.mark.parametrize("width", range(1, 9))
def test_round_trip_and_layout(width, count, monkeypatch):
    monkeypatch.setattr(bits, "CHUNK", 64)
    generator = torch.Generator().manual_seed(count)
    values = torch.randint(0, 1 << width, (count,), generator=generator).to(torch.uint8)
    packed = bits.pack(values, width)
    assert packed.tolist() == _by_hand(values.tolist(), width)
    assert len(packed) == bits.packed_size(count, width)
    assert torch.equal(bits.unpack(packed, width, count), values)


def test_refused():
    with pytest.raises(ValueError, match="below 4"):
        bits.pack(torch.tensor([4], dtype=torch.uint8), 2)
    with pytest.raises(ValueError, match="uint8"):
        bits.pack(torch.tensor([1]), 2)
    with pytest.raises(ValueError, match="width=9"):
        bits.pack(torch.tensor([1], dtype=torch.uint8), 9)
    packed = bits.pack(torch.tensor([1, 2, 3], dtype=torch.uint8), 2)
    with pytest.raises(ValueError, match=r"expected uint8 \(2,\)"):
        bits.unpack(packed, 2, 5)
    with pytest.raises(ValueError, match="beyond the last"):
        bits.unpack(packed, 2, 2)
    three = bits.pack(torch.tensor([1, 2], dtype=torch.uint8), 3) | 0x80  # in the two bits that make no value
    with pytest.raises(ValueError, match="beyond the last"):
        bits.unpack(three, 3, 2)


@pytest.mark.parametrize(
    "spec, wide",
    [(QuantSpec(b), b) for b in range(1, 9)]
    + [(QuantSpec(2, qn=-1, qp=1), 2), (QuantSpec(8, False, qn=0, qp=4), 3), (QuantSpec(3, channel_axis=1), 3)],
)
def test_codes_are_the_kernels(spec, wide):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4, 5, 6, generator=generator)
    alpha = torch.rand(spec.channels(x.shape), generator=generator) * 0.5 + 0.01
    x[0] = alpha.reshape([1, -1, 1]) * torch.arange(6) * 0.5  # ties and ends
    from qbr import functional

    xhat = functional.fake_quantize(x, alpha, spec)
    codes = codes_of("w", x, alpha, spec)
    assert width(spec) == wide
    assert torch.equal(values_of(codes, alpha, spec, torch.float32), xhat)
    assert torch.equal(codes_of("w", xhat, alpha, spec), codes)  # quantizing again changes nothing
    values = to_unsigned(codes, spec)
    assert int(values.max()) < 1 << wide
    assert torch.equal(from_unsigned(values, spec), codes)


def test_codes_beyond_the_range_and_bad_steps():
    with pytest.raises(ValueError, match="beyond -1..1"):
        from_unsigned(torch.tensor([3], dtype=torch.uint8), QuantSpec(2, qn=-1, qp=1))
    for step in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="w has a step size of"):
            codes_of("w", torch.ones(2), torch.tensor([step]), QuantSpec(2))
    with pytest.raises(ValueError, match="w has values that are not finite"):
        codes_of("w", torch.tensor([float("nan")]), torch.ones(1), QuantSpec(2))
