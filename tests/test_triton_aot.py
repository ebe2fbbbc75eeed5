"""Every Triton kernel compiled ahead of time: 16-byte accesses in the main path, and no spilled registers.

The launches are those of the backend's own functions (qbr/kernels/aot.py), so what is compiled is what runs.
"""

from __future__ import annotations

import contextlib
import math
import os
import re

import pytest
import torch

from qbr import QuantSpec
from qbr.kernels import triton_backend, triton_lists

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
    pytest.skip("kernels under Triton's interpreter cannot be compiled", allow_module_level=True)

from qbr.kernels import aot  # noqa: E402  imports triton

LAYOUTS = {"tensor": ((1 << 20,), -1, 1), "rows": ((64, 32, 512), 1, 32), "columns": ((16384, 64), 1, 64)}


@contextlib.contextmanager
def distinct():
    """{key: launch} of the launches that differ, of what is called meanwhile."""
    found = {}

    def record(launch):
        key = launch.kernel.__name__, *launch.types.items(), *launch.constants.items(), launch.aligned
        found[key] = launch

    with aot.intercept(record):
        yield found


# Bytes of a thread that a version of Triton may keep in local memory for want of a register or two (3.7: 8).
SPILLED = 8


def launches(bits, dtype, layout="tensor", relu=False, br_to_alpha=False, only=None):
    """Every distinct launch of all six ops on a tensor of a million elements."""
    spec = QuantSpec(bits, signed=not relu)
    size, axis, channels = LAYOUTS[layout]
    x = torch.empty(size, dtype=dtype)
    alpha, grad_loss = torch.ones(channels), torch.tensor(1.0)
    bins = torch.zeros(3 * spec.num_slots + 2, dtype=torch.float64)
    q = spec.qn, spec.qp, spec.binary, axis, relu, math.inf
    calls = {
        "lsq_fwd": lambda f: f(x, alpha, *q),
        "lsq_bwd": lambda f: f(x, x, alpha, *q, 1.0),
        "bin_loss_fwd": lambda f: f(x, alpha, *q, br_to_alpha),
        "bin_loss_bwd": lambda f: f(grad_loss, x, alpha, bins, *q),
        "lsq_bin_fwd": lambda f: f(x, alpha, *q, br_to_alpha),
        "lsq_bin_bwd": lambda f: f(x, grad_loss, x, alpha, bins, *q, 1.0),
    }
    with distinct() as found:
        for op, call in calls.items():
            if only is None or op in only:
                call(getattr(triton_backend, op))
    return list(found.values())


def check(launch, arch):
    compiled = aot.compile(launch, arch)
    used = aot.resources(compiled)
    name = f"{launch.kernel.__name__} {launch.types}"
    assert used.stack_bytes <= SPILLED, f"{name} keeps {used.stack_bytes} bytes of a thread in local memory"
    ptx = compiled.asm["ptx"]
    assert ".local" not in ptx
    # Every pass over a tensor has its 16-byte access; beside it stand only the tail's narrow ones.
    tensors = launch.arguments.keys()
    if "x" in tensors:
        assert ptx.count("ld.global.v4.b32") >= len(tensors & {"x", "g"}), f"{name}: narrow loads"
        assert ptx.count("st.global.v4.b32") >= len(tensors & {"xhat", "dx"}), f"{name}: narrow stores"
    # Sums must not depend on the order of threads: no atomics on floats.
    assert not re.search(r"\b(atom|red)\.\S*\.(f16|f32|f64|bf16)", ptx)


MAIN = ("lsq_bwd", "lsq_bin_fwd", "lsq_bin_bwd")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
@pytest.mark.parametrize("bits", [2, pytest.param(4, marks=pytest.mark.slow), 8])
def test_one_step_per_tensor(bits, dtype):
    for launch in launches(bits, dtype, only=MAIN if dtype == torch.bfloat16 else None):
        check(launch, 90)


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["rows", "columns"])
@pytest.mark.parametrize("bits, dtype", [(2, torch.bfloat16), (4, torch.float32), (8, torch.float32)])
def test_one_step_per_channel(bits, dtype, layout):
    for launch in launches(bits, dtype, layout, br_to_alpha=True, only=MAIN):
        check(launch, 90)


@pytest.mark.slow
@pytest.mark.parametrize("arch", [80, 100])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_other_architectures(bits, arch):
    for launch in launches(bits, torch.float32, relu=True, br_to_alpha=True, only=MAIN):
        check(launch, arch)


@pytest.mark.parametrize("to_alpha", [False, True])
def test_lists_with_and_without_each_output(to_alpha):
    """A list's kernel has tuples of pointers, None for what is not wanted, which not every Triton takes alike."""
    xs = [torch.empty(64, 3, 3, 3), torch.empty(128, 64)]
    alphas, losses = [torch.ones(1)] * 2, [torch.ones(())] * 2
    lists, rest = triton_lists, ([-2, 1, 0, -1] * 2, False, math.inf)
    with distinct() as found:
        _, _, bins, _ = lists.foreach_lsq_bin_fwd(xs, alphas, *rest, to_alpha)
        lists.foreach_bin_loss_fwd(xs, alphas, *rest, to_alpha)
        if not to_alpha:
            lists.foreach_lsq_fwd(xs, alphas, *rest)
            lists.foreach_lsq_bwd(xs, xs, alphas, *rest, [0.1] * 2)
            lists.foreach_bin_loss_bwd(losses, xs, alphas, bins, *rest)
            lists.foreach_lsq_bin_bwd(xs, losses, xs, alphas, bins, *rest, [0.1] * 2)
    for launch in found.values():
        aot.compile(launch, 90)


def test_a_size_that_nothing_divides_keeps_wide_accesses():
    """The tail has a path of its own: an odd size costs the full tiles nothing."""
    x, alpha = torch.empty(1_000_003), torch.ones(1)
    with aot.intercept(lambda launch: check(launch, 90)):
        triton_backend.lsq_fwd(x, alpha, -2, 1, False, -1, False, math.inf)


def test_programs_share_the_work_in_bounded_pieces():
    for numel in (1, 4097, 1 << 24, 1 << 33):
        for channels, inner in ((1, 1), (64, 9), (4096, 4096), (64, 1)):
            plan = triton_backend.plan(max(numel, channels * inner), channels, inner, 4, 512, 132 * 4, 132 * 8)
            items = plan.blocks * plan.splits
            tiles = max(plan.outer, 1) * -(-plan.inner // plan.t1) if plan.layout == 1 else -(-plan.outer // plan.t0)
            if plan.layout == 0:
                tiles = -(-plan.outer // 512)
            per_program = -(-items // plan.programs) * -(-tiles // plan.splits) * plan.t0 * plan.t1
            assert 1 <= plan.programs <= items
            assert per_program <= 2 * triton_backend.ELEMENTS_PER_PROGRAM


@pytest.mark.parametrize("log2, programs", [(16, 128), (18, 512), (20, 528), (21, 1024), (22, 1056), (26, 1056)])
def test_programs_have_four_tiles_where_that_leaves_enough_of_them(log2, programs):
    """Of 512 elements, on 132 multiprocessors: all tiles at once, then four programs on each, then one wave."""
    plan = triton_backend.plan(1 << log2, 1, 1, 4, 512, 132 * 4, 132 * 8)
    assert plan.programs == plan.splits == programs
