"""Dampening, and how much of a bin loss reaches alpha: against plain autograd in float64, alike on every backend."""

from __future__ import annotations

import pytest
import torch
from cases import DTYPES, ELEMENT_TOLERANCE, SPECS, SUM_TOLERANCE, Case
from test_parity import TARGETS, load
from torch import nn

import qbr
from qbr import QATConfig, QuantSpec
from qbr import functional as F
from qbr.quantizers import quantizers

BACKENDS = [pytest.param("reference", "cpu", id="reference-cpu"), *TARGETS]
SIZE = (7, 5, 3, 3)


def by_autograd(x, alpha, case: Case):
    """sum of (y - b * alpha)^2 with the codes b as constants, in float64."""
    x, alpha = x.detach().double().requires_grad_(), alpha.detach().double().requires_grad_()
    y = x.clamp(min=0) if case.relu else x
    if case.clip is not None:
        y = torch.where(x > case.clip, case.clip, y)
    step = case.spread(alpha, x.dim())
    v = (y / step).detach()
    b = torch.where(v >= 0, 1.0, -1.0) if case.spec.binary else v.clamp(case.spec.qn, case.spec.qp).round()
    loss = (y - b * step).square().sum()
    return loss, *torch.autograd.grad(loss, (x, alpha))


@pytest.mark.parametrize("case", SPECS, ids=lambda case: case.name)
def test_reference_equals_plain_autograd(case: Case):
    x, alpha, grad = (t.double() for t in case.inputs(SIZE))
    x.requires_grad_(), alpha.requires_grad_()
    options = dict(relu=case.relu, clip=case.clip, backprop_to_alpha=True, regularizer="dampening", backend="reference")
    expected, expected_dx, expected_dalpha = by_autograd(x, alpha, case)
    loss, bins = F.bin_loss(x, alpha, case.spec, **options)
    dx, dalpha = torch.autograd.grad(loss, (x, alpha), retain_graph=True)
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(dx, expected_dx, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(dalpha, expected_dalpha, rtol=1e-10, atol=1e-12)
    assert torch.equal(bins.squares.sum(), loss.detach())

    both = F.fake_quantize_with_bin_loss(x, alpha, case.spec, **options)
    outputs, weights = [both.xhat, both.loss], [grad, torch.tensor(0.5).double()]
    got = torch.autograd.grad(outputs, (x, alpha), weights)
    xhat = F.fake_quantize(x, alpha, case.spec, relu=case.relu, clip=case.clip, backend="reference")
    apart = torch.autograd.grad(xhat, (x, alpha), grad)
    assert torch.equal(both.xhat, xhat) and torch.equal(both.loss, loss) and torch.equal(both.bins.table, bins.table)
    torch.testing.assert_close(got[0], apart[0] + 0.5 * dx)
    torch.testing.assert_close(got[1], apart[1] + 0.5 * dalpha)


@pytest.mark.parametrize("case", [c for c in SPECS if c.spec.num_slots <= 16], ids=lambda case: case.name)
def test_gradcheck(case: Case):
    x, alpha, _ = (t.double() for t in case.inputs((4, 3, 3, 2)))
    step = case.spread(alpha, x.dim())
    code = (x / step).round()
    x = (code + (x / step - code).clamp(-0.35, 0.35) + 0.01) * step  # a hundredth of a step from every kink
    x.requires_grad_(), alpha.requires_grad_()
    options = dict(relu=case.relu, clip=case.clip, backprop_to_alpha=True, regularizer="dampening", backend="reference")
    assert torch.autograd.gradcheck(lambda *each: F.bin_loss(*each, case.spec, **options).loss, (x, alpha), eps=1e-7)


def results(backend: str, device: str, case: Case, dtype) -> list[torch.Tensor]:
    """loss and gradients of bin_loss; xhat, loss and gradients of both in one pass; on the CPU."""
    x, alpha, grad = (t.to(device) for t in case.inputs(SIZE))
    x, grad = x.to(dtype).requires_grad_(), grad.to(dtype)
    alpha.requires_grad_()
    options = dict(relu=case.relu, clip=case.clip, backprop_to_alpha=True, regularizer="dampening", backend=backend)
    loss = F.bin_loss(x, alpha, case.spec, **options).loss
    found = [loss, *torch.autograd.grad(loss, (x, alpha))]
    both = F.fake_quantize_with_bin_loss(x, alpha, case.spec, **options)
    half = torch.full((), 0.5, device=device)
    found += [both.xhat, both.loss, *torch.autograd.grad([both.xhat, both.loss], (x, alpha), [grad, half])]
    return [t.detach().cpu() for t in found]


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("case", SPECS, ids=lambda case: case.name)
@pytest.mark.parametrize("backend, device", TARGETS)
def test_backends_agree(backend, device, case: Case, dtype):
    load(backend, device)
    expected = results("reference", "cpu", case, dtype)
    names = "loss dx dalpha xhat fused_loss fused_dx fused_dalpha".split()
    for name, a, b in zip(names, results(backend, device, case, dtype), expected, strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape, name
        tolerance = ELEMENT_TOLERANCE[dtype] if name.endswith("dx") else SUM_TOLERANCE
        bound = 0 if name == "xhat" else tolerance * b.double().abs().max() + 1e-6
        assert ((a.double() - b.double()).abs() <= bound).all(), name


@pytest.mark.parametrize("backend, device", BACKENDS)
def test_lists_are_loops_whatever_each_tensor_asks_for(backend, device):
    load(backend, device)
    cases = [case for case in SPECS if not case.relu]
    xs, alphas, grads = (list(each) for each in zip(*[[t.to(device) for t in case.inputs(SIZE)] for case in cases]))
    xs, alphas = [x.requires_grad_() for x in xs], [alpha.requires_grad_() for alpha in alphas]
    specs = [case.spec for case in cases]
    to_alpha = [(False, True, "scaled", 0.25, (0.5, "scaled"))[i % 5] for i in range(len(xs))]
    ways = [("br", "dampening")[i % 2] for i in range(len(xs))]
    each = list(zip(xs, alphas, specs, to_alpha, ways))
    half = [torch.full((), 0.5, device=device)] * len(xs)

    got = F.foreach_bin_loss(xs, alphas, specs, backprop_to_alpha=to_alpha, regularizer=ways, backend=backend)
    one = [F.bin_loss(*a, backprop_to_alpha=t, regularizer=r, backend=backend) for *a, t, r in each]
    same([e.loss for e in got] + [e.bins.table for e in got], [e.loss for e in one] + [e.bins.table for e in one])
    inputs = [*xs, *[alpha for alpha, way in zip(alphas, to_alpha) if way]]
    same(*[torch.autograd.grad([e.loss for e in made], inputs, half) for made in (got, one)])

    options = dict(backprop_to_alpha=to_alpha, regularizer=ways, backend=backend)
    got = F.foreach_fake_quantize_with_bin_loss(xs, alphas, specs, **options)
    one = [F.fake_quantize_with_bin_loss(*a, backprop_to_alpha=t, regularizer=r, backend=backend) for *a, t, r in each]
    for made in (got, one):
        made[:] = [e.xhat for e in made] + [e.loss for e in made]
    same(got, one)
    same(*[torch.autograd.grad(made, [*xs, *alphas], [*grads, *half]) for made in (got, one)])


def same(got, expected) -> None:
    assert len(got) == len(expected)
    for i, (a, b) in enumerate(zip(got, expected)):
        assert a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b), i


def test_foreach_bin_loss_calls_the_list_op_once(monkeypatch):
    xs, alphas = [torch.randn(9, requires_grad=True) for _ in range(3)], [torch.tensor([0.3])] * 3
    names = []
    ops = dict(qbr.ops._ops)
    for (backend, op), function in ops.items():
        monkeypatch.setitem(qbr.ops._ops, (backend, op), lambda *a, f=function, op=op: (names.append(op), f(*a))[1])
    losses = [each.loss for each in F.foreach_bin_loss(xs, alphas, QuantSpec(bits=2))]
    (losses[0] + losses[2]).backward()  # the one in between: nobody used it
    assert names == ["foreach_bin_loss_fwd", "foreach_bin_loss_bwd"]
    assert [x.grad is not None for x in xs] == [True, False, True]
    names.clear()
    tensors, steps = {f"layer{i}": x for i, x in enumerate(xs)}, {f"layer{i}": 0.3 for i in range(3)}
    qbr.BinRegularizer(2).compute_total_loss(tensors, steps)[0].backward()
    assert names == ["foreach_bin_loss_fwd", "foreach_bin_loss_bwd"]
    assert F.foreach_bin_loss([], [], []) == []


@pytest.mark.parametrize("backend, device", BACKENDS)
def test_a_loss_that_nobody_uses_leaves_what_lsq_alone_does(backend, device):
    load(backend, device)
    for case in SPECS:
        x, alpha, grad = (t.to(device) for t in case.inputs(SIZE))
        x.requires_grad_(), alpha.requires_grad_()
        options = dict(relu=case.relu, clip=case.clip, backend=backend)
        alone = torch.autograd.grad(F.fake_quantize(x, alpha, case.spec, **options), (x, alpha), grad)
        one = F.fake_quantize_with_bin_loss(x, alpha, case.spec, backprop_to_alpha=True, **options)
        (listed,) = F.foreach_fake_quantize_with_bin_loss([x], [alpha], [case.spec], backprop_to_alpha=True, **options)
        for made in (one, listed):
            same(torch.autograd.grad(made.xhat, (x, alpha), grad), alone)


@pytest.mark.parametrize("regularizer", ["br", "dampening"])
def test_a_fraction_multiplies_the_gradient_of_alpha_and_nothing_else(regularizer):
    x, spec = torch.randn(400, requires_grad=True), QuantSpec(bits=3)
    alpha = torch.tensor([0.3], requires_grad=True)

    def gradients(way):
        loss = F.bin_loss(x, alpha, spec, backprop_to_alpha=way, regularizer=regularizer).loss
        return loss, *torch.autograd.grad(loss, (x, alpha), allow_unused=True)

    loss, dx, whole = gradients(True)
    for way, factor in ((1, 1), (1.0, 1), (0.25, 0.25), ("scaled", (400 * 3) ** -0.5),
                        ((0.25, "scaled"), 0.25 * (400 * 3) ** -0.5)):  # fmt: skip
        got_loss, got_dx, dalpha = gradients(way)
        assert torch.equal(got_loss, loss) and torch.equal(got_dx, dx)
        torch.testing.assert_close(dalpha, whole * factor)
    for way in (False, 0, 0.0, (0, "scaled")):
        assert gradients(way)[2] is None


@pytest.mark.parametrize("way", ["half", -0.1, 1.5, float("nan"), None, (0.5, "plain"), (2, "scaled"), [0.5, "scaled"]])
def test_bad_fractions(way):
    with pytest.raises(ValueError, match="backprop_to_alpha=.*expected False, True, a fraction from 0 to 1"):
        F.bin_loss(torch.randn(3), 0.1, QuantSpec(bits=2), backprop_to_alpha=way)


@pytest.mark.parametrize("sides", [("dampening", "br"), ("br", "dampening"), ("dampening", "dampening")])
def test_the_configuration_of_a_model_names_its_regularizers(sides):
    def regularizers(model):
        by_kind = {quantizer.kind: quantizer.regularizer for quantizer in quantizers(model).values()}
        return by_kind["weight"], by_kind["activation"]

    make = lambda: nn.Sequential(nn.Linear(4, 4), nn.ReLU())  # noqa: E731
    model = qbr.prepare(make())
    if sides[0] == "dampening":
        qbr.set_regularizer(nn.Sequential(model), weights="dampening")
    if sides[1] == "dampening":
        qbr.set_regularizer(model, activations="dampening")
    fresh = qbr.prepare(make(), qbr.QATConfig.from_json(model.qat_config.to_json()))
    assert regularizers(fresh) == regularizers(model) == sides


def test_bad_regularizers():
    with pytest.raises(ValueError, match="regularizer='dampen': expected 'br' or 'dampening'"):
        F.fake_quantize_with_bin_loss(torch.randn(3), 0.1, QuantSpec(bits=2), regularizer="dampen")
    with pytest.raises(ValueError, match="regularizer has 1 entries for 2 tensors"):
        F.foreach_bin_loss([torch.ones(2)] * 2, [0.1] * 2, QuantSpec(bits=2), regularizer=["br"])
    model = qbr.prepare(nn.Linear(2, 2), QATConfig(act_bits=None))
    with pytest.raises(ValueError, match="activations='l2'"):
        qbr.set_regularizer(model, weights="dampening", activations="l2")
    assert model.weight_quantizer.regularizer == "br"
    with pytest.raises(ValueError, match="call qbr.prepare"):
        qbr.set_regularizer(nn.Linear(2, 2), weights="dampening")


def test_compiled_with_a_full_graph():
    spec = QuantSpec(bits=2, channel_axis=0)
    x, alpha = torch.randn(6, 20, requires_grad=True), torch.full((6,), 0.4, requires_grad=True)

    def both(x, alpha):
        options = dict(backprop_to_alpha=0.5, regularizer="dampening")
        (listed,) = F.foreach_bin_loss([x], [alpha], [spec], **options)
        made = F.fake_quantize_with_bin_loss(x, alpha, spec, **options)
        return made.xhat.square().sum() + made.loss + listed.loss

    expected = both(x, alpha)
    got = torch.compile(both, fullgraph=True, backend="aot_eager")(x, alpha)
    torch.testing.assert_close(got, expected)
    torch.testing.assert_close(torch.autograd.grad(got, (x, alpha)), torch.autograd.grad(expected, (x, alpha)))


@pytest.mark.parametrize("alone", [False, True])
def test_a_model_collects_the_loss_that_was_chosen(alone):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))
    qbr.prepare(model, QATConfig(weight_bits=2, act_bits=2))
    x = torch.randn(16, 8)
    model(x)
    for quantizer in quantizers(model).values():
        quantizer.alone = alone
    qbr.set_regularizer(model, weights="dampening")
    model(x)
    br = qbr.bin_loss(model)
    squares = sum((w - w_hat).square().sum() for w, w_hat in (
        (m.weight, m.weight_quantizer(m.weight)) for m in model if isinstance(m, nn.Linear)))  # fmt: skip
    torch.testing.assert_close(br.weights, squares)
    assert br.activations.item() == pytest.approx(sum(br.metrics()[name].loss for name in "13"))
    br.weights.backward()
    for module in model:
        if isinstance(module, nn.Linear):
            d = module.weight - module.weight_quantizer(module.weight)
            torch.testing.assert_close(module.weight.grad, 2 * d)
    qbr.set_regularizer(model, activations="dampening", weights="br")
    model(x)
    br = qbr.bin_loss(model)
    assert br.weights.item() == pytest.approx(sum(br.metrics()[name].loss for name in "024"))
    total = sum(m.quantization_mse * m.numel for name, m in br.metrics().items() if name in "13")
    assert br.activations.item() == pytest.approx(total)
