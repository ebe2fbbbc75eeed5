"""Forms of the same thing that give the same: equal steps per channel and one step, lists and loops, 16 bits and 32,
one backend and another. Inputs and the command for the long form: tests/strategies.py."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from cases import SUM_TOLERANCE
from hypothesis import given
from hypothesis import strategies as st
from strategies import ALL_KINDS, ANY_EXPONENT, Problem, problems
from test_parity import TARGETS, compare, load, run
from test_properties import everywhere, results, same

from qbr import QuantSpec
from qbr import functional as F

ELEMENTWISE = ("xhat", "dx", "dloss_dx")


def per_tensor(spec: QuantSpec) -> QuantSpec:
    named = {} if spec.binary else dict(qn=spec.qn, qp=spec.qp)
    return QuantSpec(spec.bits, spec.signed, **named)


@everywhere
@given(problem=problems(per_channel=True))
def test_equal_steps_are_one_step(backend, device, problem: Problem):
    """Steps for each channel that are all alpha, against the one step alpha. xhat, the counts and both gradients of x
    are the same bits: each element sees its step and its n_k alone, and n_k counts over all channels. Sums, and with
    them the loss, are the same terms, maybe in another order: within the tolerance of sums. Gradients of alpha: those
    of the channels add up to that of the tensor, LSQ's each divided by its own gradient scale s first, since N in s is
    the channel's number of elements."""
    load(backend, device)
    x, grad = problem.x.to(device), problem.grad.to(device)
    alpha = problem.alpha[:1].to(device)
    channels = problem.spec.channels(problem.shape.size)
    if not channels:
        return
    one = replace(problem, spec=per_tensor(problem.spec))
    many = results(problem, backend, device, x, alpha.expand(channels).contiguous(), grad)
    single = results(one, backend, device, x, alpha, grad)
    for name in (*ELEMENTWISE, "n", "near"):
        assert same(many[name], single[name]), name
    for name in ("S", "Q", "distance", "loss"):
        scale = single["distance"] if name == "S" else single[name]
        assert ((many[name] - single[name]).abs() <= SUM_TOLERANCE * scale).all(), name
    each = x.numel() // channels
    s_each, s_all = problem.spec.lsq_grad_scale(each), problem.spec.lsq_grad_scale(x.numel())
    code = max(abs(problem.spec.qn), abs(problem.spec.qp))
    error = (many["dalpha"].double().sum() / s_each - single["dalpha"].double().sum() / s_all).abs()
    assert error <= 2 * SUM_TOLERANCE * grad.float().abs().sum() * (code + 1)
    size = 2 * code * (single["Q"] * single["n"]).sqrt().div(single["n"].clamp(min=1)).sum()
    error = (many["dloss_dalpha"].double().sum() - single["dloss_dalpha"].double().sum()).abs()
    assert error <= 2 * SUM_TOLERANCE * size + 1e-30


def same_bits(a, b) -> bool:
    """To the bit, the signs of zeros included; any NaN for a NaN."""
    return same(a, b) and torch.equal(a.signbit() & ~a.isnan(), b.signbit() & ~b.isnan())


@st.composite
def lists(draw):
    relu = draw(st.booleans())
    found = draw(st.lists(problems(ALL_KINDS, ANY_EXPONENT, nonfinite=True, relu=relu), min_size=1, max_size=3))
    ways = st.sampled_from([False, True, 0.25, "scaled", (0.5, "scaled")])
    count = len(found)
    to_alpha = draw(st.lists(ways, min_size=count, max_size=count))
    regularizers = draw(st.lists(st.sampled_from(["br", "dampening"]), min_size=count, max_size=count))
    return [replace(problem, clip=found[0].clip) for problem in found], to_alpha, regularizers


@everywhere
@given(drawn=lists())
def test_a_list_is_a_loop(backend, device, drawn):
    """Every result of the list ops is that of the op on the tensor alone, to the bit, whatever stands beside it."""
    load(backend, device)
    members, to_alpha, regularizers = drawn
    options = dict(members[0].options, backend=backend)
    xs = [member.x.detach().to(device).requires_grad_() for member in members]
    alphas = [member.alpha.to(device).requires_grad_() for member in members]
    specs, grads = [member.spec for member in members], [member.grad.to(device) for member in members]
    half = [torch.full((), 0.5, device=device)] * len(xs)

    def equal(together, alone, incoming):
        assert all(map(same_bits, together, alone))
        inputs = [*xs, *alphas]
        gradients = [torch.autograd.grad(each, inputs, incoming, allow_unused=True) for each in (together, alone)]
        for a, b in zip(*gradients):
            assert (a is None) == (b is None) and (a is None or same_bits(a, b))

    equal(F.foreach_fake_quantize(xs, alphas, specs, **options),
          [F.fake_quantize(*each, **options) for each in zip(xs, alphas, specs)], grads)  # fmt: skip
    ways = dict(backprop_to_alpha=to_alpha, regularizer=regularizers)
    way = [dict(zip(ways, each), **options) for each in zip(*ways.values())]
    together = F.foreach_bin_loss(xs, alphas, specs, **ways, **options)
    alone = [F.bin_loss(*each, **how) for *each, how in zip(xs, alphas, specs, way)]
    assert all(same_bits(a.bins.table, b.bins.table) for a, b in zip(together, alone))
    equal([each.loss for each in together], [each.loss for each in alone], half)
    together = F.foreach_fake_quantize_with_bin_loss(xs, alphas, specs, **ways, **options)
    alone = [F.fake_quantize_with_bin_loss(*each, **how) for *each, how in zip(xs, alphas, specs, way)]
    assert all(same_bits(a.bins.table, b.bins.table) for a, b in zip(together, alone))
    outputs = [[each.xhat for each in form] + [each.loss for each in form] for form in (together, alone)]
    equal(*outputs, [*grads, *half])


@everywhere
@given(problem=problems(ALL_KINDS, ANY_EXPONENT, ("bf16", "f16"), nonfinite=True))
def test_16_bits_are_the_rounded_float32_result(backend, device, problem: Problem):
    """x and the incoming gradient in bfloat16 or float16 give what their float32 values give, bit for bit; xhat and dx
    rounded to the type, once, at the end; loss, bins and gradients of alpha not at all."""
    load(backend, device)
    x, alpha, grad = problem.x.to(device), problem.alpha.to(device), problem.grad.to(device)
    stored = results(problem, backend, device, x, alpha, grad)
    wide = results(problem, backend, device, x.float(), alpha, grad.float())
    for name, value in wide.items():
        assert same_bits(stored[name], value.to(x.dtype) if name in ELEMENTWISE else value), name


@pytest.mark.parametrize("backend, device", TARGETS)
@given(problem=problems())
def test_backends_agree(backend, device, problem: Problem):
    """tests/test_parity.py's comparison, on what is drawn: codes, counts and LSQ's dx exactly, sums in tolerance."""
    load(backend, device)
    x, alpha, grad = problem.x, problem.alpha, problem.grad
    expected = run("reference", "cpu", problem, x, alpha, grad)
    compare(run(backend, device, problem, x, alpha, grad), expected, x, alpha, grad, problem)


@pytest.mark.parametrize("backend, device", TARGETS)
@given(problem=problems(ALL_KINDS, ANY_EXPONENT, nonfinite=True))
def test_backends_agree_at_the_edges(backend, device, problem: Problem):
    """Any step and any value: codes, counts, LSQ's dx, and where a NaN is; sums may overflow in one and not in
    another, as they do so in float32 here and in float64 there."""
    load(backend, device)
    x, alpha, grad = problem.x, problem.alpha, problem.grad
    got, expected = (results(problem, *on, x.to(on[1]), alpha.to(on[1]), grad.to(on[1])) for on in
                     ((backend, device), ("reference", "cpu")))  # fmt: skip
    for name in ("xhat", "dx", "n", "near"):
        assert same(got[name].cpu(), expected[name]), name
    assert got["loss"].isnan() == expected["loss"].isnan()
