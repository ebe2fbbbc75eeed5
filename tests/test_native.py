"""What the native kernels alone can get wrong: chunks, 16-bit rounding, long sums; and raw calls that do not fit."""

from __future__ import annotations

import math

import pytest
import torch
from cases import SUM_TOLERANCE
from test_parity import load

from qbr import QuantSpec
from qbr import functional as F

W2 = (-2, 1, False, -1, False, math.inf)


@pytest.fixture(autouse=True)
def native():
    load("native", "cpu")
    return torch.ops.qbr_native


@pytest.mark.parametrize("inner", [1022, 1023, 1024, 1025, 2047, 2049])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
def test_a_channel_that_ends_near_the_end_of_a_chunk(inner, dtype):
    """Chunks of 1,024 elements take one step for all where they lie in one channel."""
    x = torch.randn(2, 3, inner, generator=torch.Generator().manual_seed(0)).to(dtype)
    alpha, spec = torch.tensor([0.2, 0.9, 0.4]), QuantSpec(4, channel_axis=1)
    got, expected = (F.fake_quantize_with_bin_loss(x, alpha, spec, backend=b) for b in ("native", "reference"))
    assert torch.equal(got.xhat, expected.xhat) and torch.equal(got.bins.counts, expected.bins.counts)


@pytest.mark.parametrize("dtype, digits", [(torch.bfloat16, 8), (torch.float16, 11)], ids=["bf16", "f16"])
def test_16_bits_round_half_to_even(dtype, digits):
    """Levels that lie midway between two values of the type, on either side of an even one; vectors, tails."""
    x = torch.linspace(-3, 3, 63).to(dtype)
    for odd in (1, 3, 5):
        step = torch.tensor([1 + odd * 2.0**-digits])
        got = F.fake_quantize(x, step, QuantSpec(3), backend="native")
        exact = (x.double() / step.double()).round() * step.double()
        assert torch.equal(got, exact.float().to(dtype))
        assert (got.double() - exact).abs().max() >= 2.0**-digits, "no level lies midway: nothing was tested"


@pytest.mark.parametrize("bits", [2, 4, 5, 8])
def test_sums_of_many_equal_elements(bits):
    """Floats that add up for too long before they become doubles lose a part of every further one."""
    count, alpha = 1 << 24, torch.tensor([0.1])
    x = torch.full((count,), 0.1337)
    d = x[0].double() - alpha.double()[0]
    loss, bins = F.bin_loss(x, alpha, QuantSpec(bits), backend="native")
    slot = 1 - QuantSpec(bits).qn
    assert bins.counts[slot] == count and bins.counts.sum() == count
    for got, exact in ((bins.sums[slot], count * d), (bins.squares[slot], count * d**2), (loss, d**2)):
        assert abs(got - exact) <= SUM_TOLERANCE * exact


X, ALPHA, BINS, ONE = torch.randn(4, 6), torch.tensor([0.5]), torch.ones(14, dtype=torch.float64), torch.ones(())
REFUSED = {
    "alpha of another length": ("lsq_fwd", (X, torch.ones(2), *W2), "alpha has 2 elements: expected 1"),
    "alpha per channel, one missing": ("lsq_fwd", (X, torch.ones(5), -2, 1, False, 1, False, 1.0), "expected 6"),
    "alpha of another dtype": ("lsq_fwd", (X, ALPHA.double(), *W2), "of float32"),
    "x of another dtype": ("lsq_fwd", (X.double(), ALPHA, *W2), "expected float32, bfloat16 or float16"),
    "x with gaps": ("lsq_fwd", (X[:, ::2], ALPHA, *W2), "x is not dense"),
    "x that repeats": ("lsq_fwd", (X[:1].expand(4, 6), ALPHA, *W2), "x is not dense"),
    "an axis beyond x": ("lsq_fwd", (X, ALPHA, -2, 1, False, 2, False, 1.0), "channel_axis=2"),
    "a range upside down": ("lsq_fwd", (X, ALPHA, 1, -2, False, -1, False, 1.0), "expected qn <= qp"),
    "too many levels": ("lsq_bin_fwd", (X, ALPHA, 0, 256, False, -1, False, 1.0, False), "at most 256 levels"),
    "codes beyond rounding": ("lsq_fwd", (X, ALPHA, 2**22, 2**22 + 1, False, -1, False, 1.0), "codes within"),
    "binary of another range": ("lsq_fwd", (X, ALPHA, -2, 1, True, -1, False, 1.0), "expected -1 and 1"),
    "bins that are too short": ("bin_loss_bwd", (ONE, X, ALPHA, BINS[:13], *W2), "bins has 13 elements: expected 14"),
    "bins that are too long": ("bin_loss_bwd", (ONE, X, ALPHA, torch.ones(15).double(), *W2), "bins has 15 elements"),
    "bins of another dtype": ("bin_loss_bwd", (ONE, X, ALPHA, BINS.float(), *W2), "of float64"),
    "two gradients of one loss": ("bin_loss_bwd", (torch.ones(2), X, ALPHA, BINS, *W2), "grad_loss has 2 elements"),
    "grad_xhat of another shape": ("lsq_bwd", (X[:3], X, ALPHA, *W2, 1.0), "grad_xhat has another shape"),
    "a list without an alpha": ("foreach_lsq_fwd", ([X, X], [ALPHA], [*map(int, W2[:4])] * 2, *W2[4:]), "alphas has 1"),
    "a list without a range": ("foreach_lsq_fwd", ([X, X], [ALPHA] * 2, [*map(int, W2[:4])], *W2[4:]), "ranges has 4"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_raw_call_that_would_leave_its_memory_is_refused(native, name):
    op, arguments, message = REFUSED[name]
    with pytest.raises(RuntimeError, match=message):
        getattr(native, op)(*arguments)


@pytest.mark.parametrize("bits", [4, 5, 6, 7, 8])
@pytest.mark.parametrize("share", [0.5, 1.0])
def test_sums_of_equal_values_do_not_drift(bits, share):
    """A flat background: every addition of a bin rounds the same way."""
    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)
        value, alpha = torch.rand(2, generator=generator) * torch.tensor([2.0, 0.5]) + 0.01
        x = torch.where(torch.rand(1 << 14, generator=generator) < share, value, 0.0)
        spec = QuantSpec(bits, signed=False)
        expected, got = (F.bin_loss(x, alpha, spec, backend=name) for name in ("reference", "native"))
        torch.testing.assert_close(got.loss, expected.loss, rtol=SUM_TOLERANCE, atol=1e-9)
        torch.testing.assert_close(got.bins.sums, expected.bins.sums, rtol=SUM_TOLERANCE, atol=1e-6)
