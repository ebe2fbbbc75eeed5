"""The ops over lists: bit for bit what the ops over one tensor give, whichever tensors stand beside it."""

from __future__ import annotations

import pytest
import torch
from cases import DTYPES, SPECS
from test_parity import TARGETS, load

from qbr import QuantSpec, ops
from qbr import functional as F
from qbr.arguments import check

BACKENDS = [pytest.param("reference", "cpu", id="reference-cpu"), *TARGETS]
SIZES = [(0, 3, 2), (1, 1, 1), (3, 5, 7), (64, 3, 3, 3), (40, 10, 11, 5), (130, 130)]


def members(relu: bool, device: str, dtype: torch.dtype | None, some: slice = slice(None)):
    """Tensors of every size and (of some) way to quantize, with their alphas, specs and gradients."""
    cases = [case for case in SPECS if (case.relu, case.clip) == ((True, 1.0) if relu else (False, None))]
    found = []
    for i, size in enumerate(SIZES):
        for j, case in enumerate(case for case in cases[some] if case.fits(size)):
            x, alpha, grad = case.inputs(size, seed=i)
            kind = dtype or list(DTYPES.values())[(i + j) % 3]
            found.append((x.to(device, kind), alpha.to(device), case.spec, grad.to(device, kind)))
    return zip(*found)


@pytest.mark.parametrize("dtype", [*DTYPES, "mixed"])
# Triton compiles for every member, one after another: so in parts, which several processes share.
@pytest.mark.parametrize("part", [*(f"plain-{i}" for i in range(3)), "relu"])
@pytest.mark.parametrize("backend, device", BACKENDS)
def test_lists_are_loops(backend, device, part, dtype):
    load(backend, device)
    relu, some = part == "relu", slice(None) if part == "relu" else slice(int(part[-1]), None, 3)
    xs, alphas, specs, grads = members(relu, device, DTYPES.get(dtype), some)
    xs, alphas = [x.requires_grad_() for x in xs], [alpha.requires_grad_() for alpha in alphas]
    options = dict(relu=relu, clip=1.0 if relu else None, backend=backend)
    to_alpha = [(False, True, "scaled")[i % 3] for i in range(len(xs))]
    half = [torch.full((), 0.5, device=device)] * len(xs)

    got = F.foreach_fake_quantize(xs, alphas, specs, **options)
    got_grads = torch.autograd.grad(got, [*xs, *alphas], grads)
    expected = [F.fake_quantize(*each, **options) for each in zip(xs, alphas, specs)]
    same(got, expected)
    same(got_grads, torch.autograd.grad(expected, [*xs, *alphas], grads))

    got = F.foreach_fake_quantize_with_bin_loss(xs, alphas, specs, backprop_to_alpha=to_alpha, **options)
    outputs = [each.xhat for each in got] + [each.loss for each in got]
    got_grads = torch.autograd.grad(outputs, [*xs, *alphas], [*grads, *half])
    expected = [
        F.fake_quantize_with_bin_loss(*each, backprop_to_alpha=way, **options)
        for *each, way in zip(xs, alphas, specs, to_alpha)
    ]
    same(outputs, [each.xhat for each in expected] + [each.loss for each in expected])
    same([each.bins.table for each in got], [each.bins.table for each in expected])
    outputs = [each.xhat for each in expected] + [each.loss for each in expected]
    same(got_grads, torch.autograd.grad(outputs, [*xs, *alphas], [*grads, *half]))


@pytest.mark.parametrize("backend, device", BACKENDS)
def test_each_member_has_its_own_alpha_grad(backend, device):
    load(backend, device)
    xs, alphas, specs, grads = (each[-3:] for each in members(False, device, torch.float32))
    alphas, ways = [alpha.requires_grad_() for alpha in alphas], [1.0, 0.5, 0.0]
    together = F.foreach_fake_quantize(xs, alphas, specs, backend=backend, alpha_grad=ways)
    alone = [F.fake_quantize(*each, backend=backend, alpha_grad=way) for *each, way in zip(xs, alphas, specs, ways)]
    same(*(torch.autograd.grad(form, alphas, grads) for form in (together, alone)))


@pytest.mark.parametrize("backend, device", BACKENDS)
def test_channels_counted_from_the_end(backend, device):
    load(backend, device)
    x, grad = torch.randn(2, 5, 4, 3, 6, device=device).unbind()
    for axis in range(4):
        alpha = torch.linspace(0.2, 0.7, x.shape[axis], device=device, requires_grad=True)
        found = []
        for spec in (QuantSpec(3, channel_axis=axis), QuantSpec(3, channel_axis=axis - 4)):
            xhat = F.fake_quantize(x, alpha, spec, backend=backend)
            found.append([xhat, *torch.autograd.grad(xhat, alpha, grad)])
        same(*found)


def same(got, expected) -> None:
    assert len(got) == len(expected)
    for i, (a, b) in enumerate(zip(got, expected)):
        assert a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b), i


@pytest.mark.parametrize("backend, device", BACKENDS)
def test_foreach_bin_loss(backend, device):
    """The raw ops; functional.foreach_bin_loss is in tests/test_dampening.py."""
    load(backend, device)
    ops.implement(backend)
    namespace = getattr(torch.ops, f"qbr_{backend}")
    xs, alphas, specs, _ = members(False, device, torch.float32)
    plain = [check(x, alpha, spec, False, None)[2] for x, alpha, spec in zip(xs, alphas, specs)]
    ranges = [int(value) for each in plain for value in each[:4]]
    rest = plain[0][4:]
    losses, bins, dloss_dalphas = namespace.foreach_bin_loss_fwd(xs, alphas, ranges, *rest, True)
    ones = [torch.ones((), device=device)] * len(xs)
    dxs = namespace.foreach_bin_loss_bwd(ones, xs, alphas, bins, ranges, *rest)
    for i, (x, alpha) in enumerate(zip(xs, alphas)):
        loss, table, dloss_dalpha = namespace.bin_loss_fwd(x, alpha, *plain[i], True)
        dx = namespace.bin_loss_bwd(ones[i], x, alpha, table, *plain[i])
        same([losses[i], bins[i], dloss_dalphas[i], dxs[i]], [loss, table, dloss_dalpha, dx])


def test_a_tensor_that_nobody_uses_gets_no_gradient():
    xs = [torch.randn(20, requires_grad=True) for _ in range(3)]
    alphas = [torch.tensor([0.3], requires_grad=True) for _ in range(3)]
    spec = SPECS[1].spec
    F.foreach_fake_quantize(xs, alphas, spec)[1].sum().backward()
    assert [x.grad is not None for x in xs] == [a.grad is not None for a in alphas] == [False, True, False]
    xs[1].grad = alphas[1].grad = None
    results = F.foreach_fake_quantize_with_bin_loss(xs, alphas, spec)
    (results[0].xhat.sum() + results[2].loss).backward()
    assert [x.grad is not None for x in xs] == [a.grad is not None for a in alphas] == [True, False, True]
    x, alpha = xs[2].detach().requires_grad_(), alphas[2].detach().requires_grad_()
    F.fake_quantize_with_bin_loss(x, alpha, spec).loss.backward()
    assert torch.equal(x.grad, xs[2].grad)


def test_lists_compile_and_have_no_tensors_at_all():
    xs = [torch.randn(20, 3) for _ in range(2)]
    alphas = [torch.tensor([0.3]), torch.tensor([0.7])]
    spec = SPECS[1].spec
    compiled = torch.compile(lambda *xs: F.foreach_fake_quantize(xs, alphas, spec), fullgraph=True, backend="aot_eager")
    same(compiled(*xs), F.foreach_fake_quantize(xs, alphas, spec))
    assert F.foreach_fake_quantize([], [], spec) == F.foreach_fake_quantize_with_bin_loss([], [], []) == []


@pytest.mark.gpu
def test_lists_inside_cuda_graphs():
    """Nothing that the backend keeps for later calls may lie in the memory of the graphs that call it first."""
    spec = SPECS[1].spec
    alphas = [torch.tensor([0.3], device="cuda"), torch.tensor([0.7], device="cuda")]

    def run(*xs):
        return F.foreach_fake_quantize_with_bin_loss(xs, alphas, [spec] * 2)

    compiled = torch.compile(run, fullgraph=True, mode="reduce-overhead")
    for rows in (20, 24) * 3:  # the graphs of either are made by calls that no call outside graphs came before
        xs = [torch.randn(rows, 37, device="cuda", requires_grad=True) for _ in range(2)]
        torch.compiler.cudagraph_mark_step_begin()
        got = torch.autograd.grad(sum(each.xhat.sum() + each.loss for each in compiled(*xs)), xs)
        got = [grad.clone() for grad in got]
        same(got, torch.autograd.grad(sum(each.xhat.sum() + each.loss for each in run(*xs)), xs))


def test_lists_of_different_lengths():
    with pytest.raises(ValueError, match="2 tensors, 1 alphas and 2 specs"):
        F.foreach_fake_quantize([torch.ones(2)] * 2, [0.1], SPECS[1].spec)


@pytest.mark.parametrize("backend, device", BACKENDS)
def test_opcheck(backend, device):
    load(backend, device)
    ops.implement(backend)
    namespace = getattr(torch.ops, f"qbr_{backend}")
    xs, grads = ([torch.randn(4, 3, device=device), torch.randn(7, device=device)] for _ in range(2))
    alphas = [torch.tensor([0.3], device=device), torch.tensor([0.2], device=device)]
    quant = ([-2, 1, 0, -1] * 2, False, float("inf"))
    ones = [torch.ones((), device=device)] * 2
    bins = namespace.foreach_lsq_bin_fwd(xs, alphas, *quant, False)[2]
    for op, arguments in {
        "foreach_lsq_fwd": (xs, alphas, *quant),
        "foreach_lsq_bwd": (grads, xs, alphas, *quant, [0.1, 0.2]),
        "foreach_bin_loss_fwd": (xs, alphas, *quant, True),
        "foreach_bin_loss_bwd": (ones, xs, alphas, bins, *quant),
        "foreach_lsq_bin_fwd": (xs, alphas, *quant, True),
        "foreach_lsq_bin_bwd": (grads, ones, xs, alphas, bins, *quant, [0.1, 0.2]),
    }.items():
        torch.library.opcheck(getattr(namespace, op).default, arguments)
