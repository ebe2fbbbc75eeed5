"""Lists in the Triton backend: the compiled PTX executed on the CPU gives what launches one by one give, to the bit."""

from __future__ import annotations

import math

import pytest
import torch
from cases import values
from torch._subclasses.fake_tensor import FakeTensorMode

from qbr import QuantSpec
from qbr.kernels import foreach

test_triton_ptx = pytest.importorskip("test_triton_ptx", reason="needs ptxrun and Triton")
from qbr.kernels import triton_backend, triton_lists  # noqa: E402

LOOPS = foreach.loops({name: function for name, function in vars(triton_backend).items() if callable(function)})


def make(sizes, spec, dtype=torch.float32):
    xs = [values(math.prod(size), spec, 0.1).reshape(size).to(dtype) for size in sizes]
    axis = spec.channel_axis
    alphas = [0.1 * torch.linspace(0.8, 1.2, 1 if axis is None else x.shape[axis]) for x in xs]
    ranges = [v for _ in xs for v in (spec.qn, spec.qp, int(spec.binary), -1 if axis is None else axis)]
    return xs, alphas, ranges


def equal(a, b) -> bool:
    if isinstance(a, torch.Tensor):
        return torch.equal(a.nan_to_num(99.0), b.nan_to_num(99.0))
    return len(a) == len(b) and all(equal(x, y) for x, y in zip(a, b))


def check(xs, alphas, ranges) -> dict[str, int]:
    """Every list op against the loop over its op; the number of launches of each."""
    generator = torch.Generator().manual_seed(0)
    gs = [torch.empty_like(x).copy_(torch.randn(x.shape, generator=generator)) for x in xs]
    grad_losses = [torch.tensor(0.5 + i) for i in range(len(xs))]
    scales = [0.1 * (i + 1) for i in range(len(xs))]
    quant = ranges, False, math.inf
    with test_triton_ptx.Device():
        bins = LOOPS["foreach_bin_loss_fwd"](xs, alphas, *quant, False)[1]
    calls = {
        "foreach_lsq_fwd": (xs, alphas, *quant),
        "foreach_lsq_bwd": (gs, xs, alphas, *quant, scales),
        "foreach_bin_loss_fwd": (xs, alphas, *quant, True),
        "foreach_bin_loss_bwd": (grad_losses, xs, alphas, bins, *quant),
        "foreach_lsq_bin_fwd": (xs, alphas, *quant, True),
        "foreach_lsq_bin_bwd": (gs, grad_losses, xs, alphas, bins, *quant, scales),
    }
    launches = {}
    for op, arguments in calls.items():
        with test_triton_ptx.Device() as device:
            together = getattr(triton_lists, op)(*arguments)
        launches[op] = device.launches
        with test_triton_ptx.Device():
            assert equal(together, LOOPS[op](*arguments)), op
    return launches


def test_one_launch_for_all_tensors_of_a_kind():
    xs, alphas, ranges = make([(1500,), (3, 5), (0, 4), (1,), (2600,)], QuantSpec(2))
    launches = check(xs, alphas, ranges)
    assert launches["foreach_lsq_fwd"] == 1 and launches["foreach_bin_loss_bwd"] == 1
    assert launches["foreach_lsq_bin_fwd"] == launches["foreach_lsq_bin_bwd"] == 2  # with the second stage


@pytest.mark.slow
@pytest.mark.parametrize("bits, dtype", [(4, torch.float32), (8, torch.bfloat16)])
def test_more_levels(bits, dtype):
    check(*make([(1500,), (2100,)], QuantSpec(bits), dtype))


@pytest.mark.slow
@pytest.mark.parametrize("bits", [2, 8])
def test_a_step_for_each_channel(bits):
    launches = check(*make([(8, 4, 3, 3), (5, 4, 3, 3), (20, 16)], QuantSpec(bits, channel_axis=0)))
    assert launches["foreach_lsq_fwd"] < 3


def test_ranges_and_types_that_differ_go_one_after_another():
    a, b = make([(700,), (900,)], QuantSpec(2)), make([(700,), (900,)], QuantSpec(3), torch.bfloat16)
    xs, alphas, ranges = ([*first, *second] for first, second in zip(a, b))
    order = [0, 2, 1, 3]
    ranges = [v for i in order for v in ranges[4 * i : 4 * i + 4]]
    xs, alphas = [xs[i] for i in order], [alphas[i] for i in order]
    with test_triton_ptx.Device() as device:
        together = triton_lists.foreach_lsq_fwd(xs, alphas, ranges, False, math.inf)
    with test_triton_ptx.Device():
        assert equal(together, LOOPS["foreach_lsq_fwd"](xs, alphas, ranges, False, math.inf))
    assert device.launches == 2


def test_what_is_kept_for_later_calls_belongs_to_no_mode_of_the_first():
    """As with modes, so with the memory pools of CUDA graphs: both are the thread's."""
    with torch.inference_mode(), FakeTensorMode():
        kept = triton_lists._scales((0.25, 123.0), torch.device("cpu"))
    assert type(kept) is torch.Tensor and not kept.is_inference() and kept.tolist() == [0.25, 123.0]
