"""Whole calls of the Triton backend with the compiled PTX of every launch executed on the CPU, against the reference.

What compiled kernels alone can show: results, out-of-bounds accesses, reads of memory that nobody wrote, elements
that nobody wrote, races, lanes that disagree, and the traffic: x read once, xhat written once.
"""

from __future__ import annotations

import math
import os

import pytest
import torch
from cases import ELEMENT_TOLERANCE, SUM_TOLERANCE, Shape, values

from qbr import QuantSpec
from qbr.kernels import reference, triton_backend

ptxrun = pytest.importorskip("ptxrun", reason="ptxrun, which executes PTX on the CPU, is not on the path")
pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
    pytest.skip("kernels under Triton's interpreter cannot be compiled", allow_module_level=True)

from qbr.kernels import aot  # noqa: E402  imports triton

# What each kernel writes in full, so that its memory may start uninitialised.
OUTPUTS = {
    "_lsq_fwd_kernel": {"xhat"},
    "_lsq_bin_fwd_kernel": {"xhat", "partials", "words", "s_ends"},
    "_lsq_bin_bwd_kernel": {"dx", "dalpha", "table"},
    "_sum_rows_kernel": {"out"},
    "_bins_kernel": {"loss", "bins", "dloss_dalpha"},
    "_dloss_dalpha_kernel": {"dloss_dalpha"},
    "_lsq_fwd_list_kernel": {"xhats"},
    "_lsq_bin_fwd_list_kernel": {"xhats", "partials", "words", "s_ends"},
    "_lsq_bin_bwd_list_kernel": {"dxs", "dalphas", "table"},
    "_sum_rows_list_kernel": {"outs"},
    "_bins_list_kernel": {"losses", "bins", "dloss_dalphas"},
    "_dloss_dalpha_list_kernel": {"dloss_dalphas"},
}


class Device:
    """Runs launches in ptxrun and keeps their reports by kernel name."""

    def __init__(self, arch=80, seed=None):
        self.arch, self.seed, self.reports, self.launches = arch, seed, {}, 0

    def run(self, launch: aot.Launch) -> None:
        name = launch.kernel.__name__
        outputs, args = [], []
        listed = {key: value if type(value) is tuple else (value,) for key, value in launch.arguments.items()}
        for key, value in ((key, each) for key, found in listed.items() for each in found):
            if not isinstance(value, torch.Tensor):
                args.append(value)
                continue
            flat = value.new_empty(0).set_(value.untyped_storage())
            flat = (flat.view(torch.uint16) if value.dtype == torch.bfloat16 else flat).numpy()
            if key in OUTPUTS[name]:
                fresh = ptxrun.uninit(flat.shape, flat.dtype)
                outputs.append((key, fresh, flat))
                flat = fresh
            args.append(ptxrun.Buffer(flat, value.storage_offset() * value.element_size(), key))
        kernel = ptxrun.from_triton(aot.compile(launch, self.arch))
        options = {} if self.seed is None else {"seed": self.seed}
        self.launches += 1
        self.reports[name] = kernel.launch(launch.grid, args, n=launch.arguments.get("outer"), **options)
        for key, fresh, flat in outputs:
            assert fresh.unwritten() == 0, f"{name} left {fresh.unwritten()} bytes of {key} unwritten"
            flat[...] = fresh

    def __enter__(self):
        self.interception = aot.intercept(self.run, multiprocessors=1)
        self.interception.__enter__()
        return self

    def __exit__(self, *error):
        return self.interception.__exit__(*error)


def plain(spec, axis=-1, relu=False, clip=math.inf):
    return spec.qn, spec.qp, spec.binary, axis, relu, clip


def assert_sums(got, expected, scale):
    got, expected = got.double(), expected.double()
    assert ((got - expected).abs() <= SUM_TOLERANCE * torch.as_tensor(scale)).all(), (got, expected)


def check_all(device, x, alpha, spec, axis=-1, relu=False, clip=math.inf):
    """Every op of the backend against the reference."""
    q = plain(spec, axis, relu, clip)
    levels, scale = spec.num_slots, 0.1
    g = torch.empty_like(x).copy_(torch.randn(x.shape, generator=torch.Generator().manual_seed(1)))
    grad_loss = torch.tensor(0.7)
    tolerance = ELEMENT_TOLERANCE[x.dtype]

    assert torch.equal(triton_backend.lsq_fwd(x, alpha, *q), reference.lsq_fwd(x, alpha, *q))
    dx, dalpha = triton_backend.lsq_bwd(g, x, alpha, *q, scale)
    expected_dx, expected_dalpha = reference.lsq_bwd(g, x, alpha, *q, scale)
    assert torch.equal(dx, expected_dx)
    dalpha_scale = scale * x.numel() / alpha.numel() * max(-spec.qn, spec.qp)
    assert_sums(dalpha, expected_dalpha, dalpha_scale)

    xhat, loss, bins, dloss_dalpha = triton_backend.lsq_bin_fwd(x, alpha, *q, True)
    expected = reference.lsq_bin_fwd(x, alpha, *q, True)
    assert torch.equal(xhat, expected[0])
    assert_sums(loss, expected[1], expected[1])
    n, s, sq, tail = bins.split([levels, levels, levels, 2])
    expected_n, expected_s, expected_sq, expected_tail = expected[2].split([levels, levels, levels, 2])
    assert torch.equal(n, expected_n) and tail[1] == expected_tail[1]
    sq_scale = torch.maximum(expected_sq, expected_n * alpha.max() ** 2 / 4)
    assert_sums(sq, expected_sq, sq_scale)
    assert_sums(s, expected_s, (expected_n * sq_scale).sqrt())
    assert_sums(tail[0], expected_tail[0], expected_tail[0])
    codes = torch.arange(spec.qn, spec.qp + 1).double()
    assert_sums(dloss_dalpha, expected[3], 2 * (codes.abs() * (sq_scale / expected_n.clamp(min=1)).sqrt()).sum())
    alone = triton_backend.bin_loss_fwd(x, alpha, *q, False)
    assert torch.equal(alone[1][:levels], n) and alone[2].numel() == 0
    assert_sums(alone[0], loss, loss)

    bins = expected[2]
    expected_dx = reference.bin_loss_bwd(grad_loss, x, alpha, bins, *q)
    torch.testing.assert_close(
        triton_backend.bin_loss_bwd(grad_loss, x, alpha, bins, *q), expected_dx, rtol=tolerance, atol=tolerance
    )
    dx, dalpha = triton_backend.lsq_bin_bwd(g, grad_loss, x, alpha, bins, *q, scale)
    expected_dx, _ = reference.lsq_bin_bwd(g, grad_loss, x, alpha, bins, *q, scale)
    torch.testing.assert_close(dx, expected_dx, rtol=tolerance, atol=tolerance)
    assert_sums(dalpha, expected_dalpha, dalpha_scale)
    assert set(device.reports) >= {"_lsq_fwd_kernel", "_lsq_bin_fwd_kernel", "_lsq_bin_bwd_kernel", "_bins_kernel"}


SPECS = {
    "binary": (QuantSpec(1), False),
    "2bit": (QuantSpec(2), False),
    "4bit": (QuantSpec(4), False),
    "4bit-relu": (QuantSpec(4, signed=False), True),
    "8bit": (QuantSpec(8), False),
}


@pytest.mark.parametrize("name", [n if n == "2bit" else pytest.param(n, marks=pytest.mark.slow) for n in SPECS])
def test_one_step_per_tensor(name):
    spec, relu = SPECS[name]
    x = values(4096 + 515, spec, 0.1)  # full tiles for every program, and a tail
    with Device() as device:
        check_all(device, x, torch.tensor([0.1]), spec, relu=relu, clip=0.9 if relu else math.inf)


@pytest.mark.slow
@pytest.mark.parametrize("bits", [2, 8])
def test_bfloat16_behind_a_misaligned_offset(bits):
    spec = QuantSpec(bits)
    x = Shape("offset", (2051,), "offset").make(values(2051, spec, 0.1).bfloat16())
    with Device() as device:
        check_all(device, x, torch.tensor([0.1]), spec)


@pytest.mark.parametrize(
    "size, axis, layout, bits",
    [
        pytest.param((3, 2, 2), 1, "contiguous", 4, id="fewer-elements-than-threads-4bit"),
        pytest.param((5, 3), 1, "contiguous", 8, id="fewer-elements-than-threads-8bit", marks=pytest.mark.slow),
        pytest.param((24, 3, 3, 3), 0, "contiguous", 2, id="rows-2bit", marks=pytest.mark.slow),
        pytest.param((24, 3, 3, 3), 0, "contiguous", 4, id="rows-4bit", marks=pytest.mark.slow),
        pytest.param((40, 20), 1, "contiguous", 3, id="columns-3bit", marks=pytest.mark.slow),
        pytest.param((3, 5, 40), 1, "contiguous", 8, id="rows-8bit", marks=pytest.mark.slow),
        pytest.param((40, 20), 1, "contiguous", 2, id="columns-2bit", marks=pytest.mark.slow),
        pytest.param((2, 20, 5, 5), 1, "channels_last", 8, id="columns-8bit", marks=pytest.mark.slow),
    ],
)
def test_one_step_per_channel(size, axis, layout, bits):
    spec = QuantSpec(bits)
    x = Shape("", size, layout).make(values(math.prod(size), spec, 0.1))
    with Device() as device:
        check_all(device, x, 0.1 * torch.linspace(0.5, 1.5, size[axis]), spec, axis)
    assert "_dloss_dalpha_kernel" in device.reports


def test_the_short_division_gives_the_codes_of_the_long_one():
    """On both sides of every tie and end of the range, by steps of every size for which it is taken, and beyond."""
    generator = torch.Generator().manual_seed(0)
    steps = torch.exp2(torch.empty(48).uniform_(-59, 59, generator=generator)).float()
    steps = torch.cat([steps, torch.tensor([2.0**-60, 2.0**60, 2.0**-61, 2.0**61, 1e-38, 1e38])])
    spec = QuantSpec(4, channel_axis=0)
    ties = (torch.arange(-20, 20) / 2)[None, :] * steps[:, None]
    around = [ties, torch.nextafter(ties, ties + ties.abs()), torch.nextafter(ties, ties - ties.abs())]
    random = torch.randn(steps.numel(), 200, generator=generator) * 4 * steps[:, None]
    x = torch.cat([*around, random, torch.full((steps.numel(), 1), math.inf)], 1).contiguous()
    with Device():
        xhat = triton_backend.lsq_fwd(x, steps, *plain(spec, 0))
    expected = reference.lsq_fwd(x, steps, *plain(spec, 0))  # NaN where the ties of the largest steps overflow
    assert torch.equal(xhat.nan_to_num(99.0), expected.nan_to_num(99.0))


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("alpha", [0.0, -0.1, math.nan, math.inf])
def test_hostile_values_stay_inside_their_buffers(bits, alpha):
    spec = QuantSpec(bits)
    x = values(1100, spec, 0.1)
    x[:3] = torch.tensor([math.nan, math.inf, -math.inf])
    steps, q = torch.tensor([alpha]), plain(spec)
    with Device():
        xhat, loss, bins, _ = triton_backend.lsq_bin_fwd(x, steps, *q, False)
        triton_backend.lsq_bin_bwd(x, torch.tensor(1.0), x, steps, bins, *q, 1.0)
    assert torch.equal(xhat.nan_to_num(99.0), reference.lsq_fwd(x, steps, *q).nan_to_num(99.0))
    assert bins[: spec.num_slots].sum() == x.numel() and loss.isnan()


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_an_infinite_step_spoils_no_bin_but_its_own(bits):
    """Sums inside of the range are integers in units of the largest finite step."""
    spec = QuantSpec(bits, channel_axis=1)
    x, steps, q = values(800, spec, 0.1).reshape(40, 20), 0.1 * torch.linspace(0.5, 1.5, 20), plain(spec, 1)
    steps[7] = math.inf  # all that it quantizes has the code 0
    with Device():
        _, _, bins, _ = triton_backend.lsq_bin_fwd(x, steps, *q, False)
    expected = reference.lsq_bin_fwd(x, steps, *q, False)[2]
    others = torch.arange(spec.num_slots) != -spec.qn
    counts, sums, squares = bins[:-2].reshape(3, -1)
    assert torch.equal(counts, expected[: spec.num_slots]) and bins[:-2].reshape(3, -1)[1:, others].isfinite().all()
    for got, part in ((sums, slice(spec.num_slots, 2 * spec.num_slots)), (squares, slice(2 * spec.num_slots, -2))):
        torch.testing.assert_close(got[others], expected[part][others], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_a_bin_that_has_nearly_converged_keeps_its_mean(bits):
    spec, alpha = QuantSpec(bits), torch.tensor([0.7])
    x = 1e-5 * torch.rand(4096, generator=torch.Generator().manual_seed(bits)) - alpha
    with Device():
        bins = triton_backend.bin_loss_fwd(x, alpha, *plain(spec), False)[1]
    expected = (x.double() + alpha.double()).sum().item()
    assert bins[spec.num_slots - 1 - spec.qn].item() == pytest.approx(expected, rel=5e-4)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_the_same_bits_in_any_order_of_blocks_and_threads(bits):
    spec = QuantSpec(bits)
    x, alpha, results = values(9001, spec, 0.1), torch.tensor([0.1]), []
    for seed in (None, 1, 2):
        with Device(seed=seed):
            results.append(triton_backend.lsq_bin_fwd(x, alpha, *plain(spec), True))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
def test_one_pass_over_x(dtype):
    """Forward reads x once and writes xhat once; backward reads x and the gradient once and writes dx once."""
    spec, alpha, grad_loss = QuantSpec(2), torch.tensor([0.1]), torch.tensor(1.0)
    x = values(1 << 14, spec, 0.1).to(dtype)
    q = plain(spec)
    with Device() as device:
        _, _, bins, _ = triton_backend.lsq_bin_fwd(x, alpha, *q, False)
        forward = device.reports["_lsq_bin_fwd_kernel"]
        triton_backend.lsq_bin_bwd(x.clone(), grad_loss, x, alpha, bins, *q, 1.0)
        backward = device.reports["_lsq_bin_bwd_kernel"]
    for report, ins, out in ((forward, ["x"], "xhat"), (backward, ["x", "g"], "dx")):
        assert all(report.buffers[name] == [x.nbytes, 0] for name in ins)
        assert report.buffers[out] == [0, x.nbytes]
        wide = x.nbytes // 16
        assert report.loads.widths[16] == len(ins) * wide
        assert report.stores.widths[16] - wide <= report.grid[0] * 128  # rows of partial sums may be wide, too
