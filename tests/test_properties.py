"""What qbr/kernels/README.md promises for every input, over inputs that hypothesis draws: levels, zeros, scales, order.

Each test states exactly what holds; where the plain wording of a property does not, it says why. tests/strategies.py
has the inputs and the command for the long form; tests/test_properties_equal.py holds forms of the same thing equal.
"""

from __future__ import annotations

import math

import pytest
import torch
from cases import SUM_TOLERANCE
from hypothesis import assume, given
from hypothesis import strategies as st
from strategies import ALL_KINDS, ANY_EXPONENT, ORDINARY, Problem, problems
from test_parity import TARGETS, load

from qbr import QuantSpec
from qbr import functional as F

BACKENDS = [pytest.param("reference", "cpu", id="reference-cpu"), *TARGETS]
everywhere = pytest.mark.parametrize("backend, device", BACKENDS)
LARGEST = torch.finfo(torch.float32).max


def made(problem: Problem, backend: str, device: str, *, grad: bool = False):
    """x, alpha and the options of a call."""
    load(backend, device)
    x, alpha = problem.x.to(device), problem.alpha.to(device)
    if grad:
        x, alpha = x.detach().requires_grad_(), alpha.requires_grad_()
    return x, alpha, dict(problem.options, backend=backend)


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    """The same values, NaN for NaN; zeros of either sign are one level."""
    return a.dtype == b.dtype and torch.equal(a.isnan(), b.isnan()) and torch.equal(a.nan_to_num(), b.nan_to_num())


def activation(x: torch.Tensor, problem: Problem) -> torch.Tensor:
    """y in float32: what is quantized."""
    bound = math.inf if problem.clip is None or problem.clip > LARGEST else problem.clip
    return x.float().clamp(0, bound) if problem.relu else x.float()


# ---- xhat ----------------------------------------------------------------------------------------------------------


@everywhere
@given(problem=problems(ALL_KINDS, ANY_EXPONENT, nonfinite=True))
def test_quantizing_again_changes_nothing(backend, device, problem: Problem):
    """xhat(xhat(x)) = xhat(x) for every step that is positive and finite, the subnormal and the largest included.

    In float32 b * alpha is off by half an ulp, so that v comes back within |b| * 2^-23 of b. Where b * alpha overflows
    the code may change, but only to one whose level is infinite, too. Stored in 16 bits a level may move by more than
    half a step, where the type's numbers lie further apart than the levels; but then x, one of these numbers and within
    half a step of its level, is the number that the level is rounded to, and xhat(x) = x.
    """
    x, alpha, options = made(problem, backend, device)
    once = F.fake_quantize(x, alpha, problem.spec, **options)
    assert same(F.fake_quantize(once, alpha, problem.spec, **options), once)


@everywhere
def test_in_bfloat16_the_code_may_change_where_xhat_does_not(backend, device):
    """What does not hold: the code of xhat(x) is that of x. Rounded to 8 bits, level 255 may be nearer to level 254."""
    load(backend, device)
    spec, alpha = QuantSpec(8, signed=False), torch.tensor([128.49 / 255], device=device)
    once = F.fake_quantize(torch.tensor([200.0], device=device).bfloat16(), alpha, spec, backend=backend)
    assert once == 128 == F.fake_quantize(once, alpha, spec, backend=backend)
    codes = [F.bin_loss(x, alpha, spec, backend=backend).bins.counts.argmax().item() for x in (once + 99, once)]
    assert codes == [255, 254]


@everywhere
@given(problem=problems(ORDINARY, (-100, 100), ("f32",), nonfinite=True))
def test_xhat_is_the_nearest_of_the_levels(backend, device, problem: Problem):
    """Every xhat is one of the levels float32(k * alpha), k in [qn, qp], and none of them lies nearer to y by more
    than the rounding of v; a value beyond the range is on its end."""
    x, alpha, options = made(problem, backend, device)
    xhat = F.fake_quantize(x, alpha, problem.spec, **options).reshape(-1, 1)
    y = activation(x, problem).reshape(-1, 1)
    step = problem.spread(alpha).expand(x.shape).reshape(-1, 1)
    codes = torch.tensor(problem.spec.codes, device=device)
    levels = (codes * step.double()).float()  # [N, levels]
    number = ~y.isnan().squeeze(1)
    is_level = xhat == levels
    assert torch.equal(is_level.any(1), number) and torch.equal(xhat.isnan().squeeze(1), ~number)
    distance = (y.double() - codes * step.double()).abs().nan_to_num()
    rounding = 2.0**-23 * y.abs().clamp(max=LARGEST).double().nan_to_num()
    mine = torch.where(is_level, distance, math.inf).amin(1, keepdim=True)
    assert (mine <= distance.amin(1, keepdim=True) + rounding)[number].all()


@everywhere
@given(problem=problems(ALL_KINDS, ANY_EXPONENT, nonfinite=True), seed=st.integers(0, 99))
def test_an_element_does_not_see_the_others(backend, device, problem: Problem, seed):
    """xhat and LSQ's dx of an element are what it gets alone, wherever it lies: a NaN beside it changes nothing."""
    x, alpha, options = made(problem, backend, device, grad=True)
    assume(x.numel())
    grad = problem.grad.to(device)
    xhat = F.fake_quantize(x, alpha, problem.spec, **options)
    (dx,) = torch.autograd.grad(xhat, x, grad)
    at = tuple(int(i) for i in (torch.randint(2**30, (x.dim(),), generator=torch.Generator().manual_seed(seed))
                                % torch.tensor(x.shape, dtype=torch.long)))  # fmt: skip
    one = x.detach()[at].reshape(1).requires_grad_()
    step = problem.spread(alpha.detach()).expand(x.shape)[at].reshape(1)
    spec = problem.spec
    if spec.channel_axis is not None:
        spec = QuantSpec(spec.bits, spec.signed, None, *((None, None) if spec.binary else (spec.qn, spec.qp)))
    alone = F.fake_quantize(one, step, spec, **options)
    (d_alone,) = torch.autograd.grad(alone, one, grad[at].reshape(1))
    assert same(alone[0], xhat[at]) and same(d_alone[0], dx[at])
    inside = not (one.isnan() or one.isinf())
    assert same(d_alone, torch.zeros_like(d_alone)) or same(d_alone[0], grad[at]) or not inside


# ---- the bin loss --------------------------------------------------------------------------------------------------


@everywhere
@given(problem=st.one_of(problems(dtypes=("f32",)), problems(("levels",), dtypes=("f32",))))
def test_the_loss_is_zero_exactly_on_levels(backend, device, problem: Problem):
    """L = 0 if and only if every y (x after the fused ReLU) is a level float32(b * alpha); then dL/dx and dL/dalpha
    are 0, too. Not "every clamped value": one beyond the range is at a distance from the outermost level, which
    pulls it in. "Only if" ends where squares of distances underflow (the next test)."""
    x, alpha, options = made(problem, backend, device, grad=True)
    step = problem.spread(alpha.detach())
    y = activation(x.detach(), problem)
    levels = torch.tensor(problem.spec.codes, device=device) * step.expand(x.shape).reshape(-1, 1).double()
    on_level = (y.reshape(-1, 1) == levels.float()).any(1)
    loss, bins = F.bin_loss(x, alpha, problem.spec, backprop_to_alpha=True, **options)
    assert (loss == 0) == on_level.all() and loss >= 0
    dx, dalpha = torch.autograd.grad(loss, (x, alpha))
    # A pull is 0 on a level; off it, too, where the ReLU does not pass.
    passes = (x > 0) & (x <= (problem.clip or math.inf)) if problem.relu else torch.ones_like(x, dtype=torch.bool)
    assert torch.equal(dx.reshape(-1) != 0, ~on_level & passes.reshape(-1))
    if on_level.all():
        assert not dalpha.any() and not bins.sums.any() and not bins.squares.any() and not bins.table[-2]


@everywhere
def test_below_the_root_of_the_smallest_number_squares_are_zero(backend, device):
    """The end of "only if": a distance under 2^-75 has a square that float32 does not have. Its pull is still there."""
    load(backend, device)
    spec = QuantSpec(2)
    x = torch.tensor([2.0**-76], device=device, requires_grad=True)
    loss = F.bin_loss(x, torch.tensor([1.0], device=device), spec, backend=backend).loss
    assert loss == 0
    assert torch.autograd.grad(loss, x)[0] == 2.0**-75


def results(problem: Problem, backend: str, device: str, x, alpha, *grads) -> dict[str, torch.Tensor]:
    """Everything that both passes give; x and grad may be other than the problem's own."""
    x, alpha = x.detach().requires_grad_(), alpha.detach().requires_grad_()
    options = dict(problem.options, backend=backend)
    xhat, loss, bins = F.fake_quantize_with_bin_loss(x, alpha, problem.spec, **options)
    out = dict(xhat=xhat, loss=loss, n=bins.counts, S=bins.sums, Q=bins.squares, distance=bins.table[-2:-1])
    out["near"] = bins.table[-1:]
    out["dx"], out["dalpha"] = torch.autograd.grad(xhat, (x, alpha), grads[0], retain_graph=True)
    loss = F.bin_loss(x, alpha, problem.spec, backprop_to_alpha=True, **options).loss
    out["dloss_dx"], out["dloss_dalpha"] = torch.autograd.grad(loss, (x, alpha))
    return {name: t.detach() for name, t in out.items()}


@everywhere
@given(problem=problems(), power=st.integers(-24, 5))
def test_a_common_scale(backend, device, problem: Problem, power):
    """x, alpha (and clip) times 2^p: the loss is 2^(2 p) of what it was, and xhat, sums and gradients follow, to the
    bit, as all of it is products, quotients, sums and comparisons, as long as nothing leaves the type's range. Other
    factors round x and alpha each for itself, which moves codes at ties: nothing exact holds there."""
    x, alpha, _ = made(problem, backend, device)
    # In 16 bits xhat and dx are rounded as they are stored: exact as long as that is in the normal range.
    power = max(power, -2) if problem.dtype == "f16" else power
    x = torch.where(x.abs() < 2.0**-12, 0.0, x) if problem.dtype == "f16" else x
    grad = problem.grad.to(device)
    scale = 2.0**power
    scaled = Problem(**{**vars(problem), "clip": None if problem.clip is None else problem.clip * scale})
    before = results(problem, backend, device, x, alpha, grad)
    after = results(scaled, backend, device, x * scale, alpha * scale, grad)
    powers = {"loss": 2, "Q": 2, "xhat": 1, "S": 1, "distance": 1, "dloss_dx": 1, "dloss_dalpha": 1}
    for name, value in before.items():
        if problem.dtype == "f16" and name == "dloss_dx":
            continue  # a pull may be among float16's subnormal numbers
        assert same(after[name], value * scale ** powers.get(name, 0)), name


@everywhere
@given(problem=problems())
def test_the_order_of_elements_does_not_matter(backend, device, problem: Problem):
    """Permuted, within each channel where it has a step of its own: what belongs to an element goes with it, to the
    bit, and so do the counts; sums are made in another order, and agree within the tolerance of sums."""
    load(backend, device)
    x, alpha, grad = problem.values().to(device), problem.alpha.to(device), problem.grad.contiguous().to(device)
    axis, generator = problem.spec.channel_axis, torch.Generator().manual_seed(problem.seed)
    if not x.dim():
        return

    def permuted(t):
        rows = t.reshape(1, each) if axis is None else t.movedim(axis, 0).reshape(t.shape[axis], each)
        rows = rows[:, order]
        if axis is None:
            return rows.reshape(t.shape)
        moved = t.movedim(axis, 0).shape
        return rows.reshape(moved).movedim(0, axis).contiguous()

    each = x.numel() if axis is None else x.numel() // max(x.shape[axis], 1)
    order = torch.randperm(each, generator=generator).to(device)
    before = results(problem, backend, device, x, alpha, grad)
    after = results(problem, backend, device, permuted(x), alpha, permuted(grad))
    for name in ("xhat", "dx", "dloss_dx"):
        assert same(after[name], permuted(before[name])), name
    assert torch.equal(after["n"], before["n"]) and torch.equal(after["near"], before["near"])
    code, count = max(abs(problem.spec.qn), abs(problem.spec.qp)), before["n"].clamp(min=1)
    size = {  # the sum of the magnitudes of what is added up
        "loss": before["loss"], "Q": before["Q"], "S": before["distance"], "distance": before["distance"],
        "dalpha": problem.spec.lsq_grad_scale(each) * grad.float().abs().sum() * (code + 1),
        "dloss_dalpha": 2 * code * (before["Q"] * before["n"]).sqrt().div(count).sum(),
    }  # fmt: skip
    for name, bound in size.items():
        error = (after[name].double() - before[name].double()).abs()
        assert (error <= SUM_TOLERANCE * bound).all(), (name, error, bound)


@everywhere
@given(problem=problems(ALL_KINDS, ANY_EXPONENT, nonfinite=True))
def test_every_element_is_counted_once(backend, device, problem: Problem):
    """The counts add up to N, whatever the values: a NaN is in the lowest bin, an infinity in the outermost. They are
    those of the codes that xhat shows. The loss is NaN where x has a NaN, infinite where it has an infinity that no
    clip bounds, and not negative else. That holds while all levels are finite: an infinity on a level that overflows
    to infinity, too, has no distance to it."""
    x, alpha, options = made(problem, backend, device)
    loss, bins = F.bin_loss(x, alpha, problem.spec, **options)
    n = bins.counts
    assert n.sum() == x.numel() == bins.numel and (n >= 0).all() and (n == n.round()).all()
    assert n.sum() == 0 or not problem.spec.binary or n[1] == 0
    assert 0 <= bins.table[-1] <= x.numel()
    y = activation(x, problem)
    step = problem.spread(alpha)
    if (step * max(-problem.spec.qn, problem.spec.qp)).isfinite().all():
        assert loss.isnan() == y.isnan().any()
        assert loss.isnan() or loss.isinf() or (loss >= 0 and not y.isinf().any())
    v = y / step
    codes = torch.where(v >= 0, 1.0, -1.0) if problem.spec.binary else v.clamp(problem.spec.qn, problem.spec.qp).round()
    slots = codes.sub(problem.spec.qn).nan_to_num(0.0).long().reshape(-1)
    assert torch.equal(torch.bincount(slots, minlength=problem.spec.num_slots).double(), n)
    xhat = F.fake_quantize(x.float(), alpha, problem.spec, **options)
    assert same(xhat, torch.where(y.isnan(), math.nan, codes * step))
