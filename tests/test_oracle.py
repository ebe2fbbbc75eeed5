"""The reference backend against the float64 oracle, and against automatic differentiation in float64."""

from __future__ import annotations

import numpy as np
import oracle
import pytest
import torch
from cases import SPECS, Case, step_for

from qbr import QuantSpec
from qbr import functional as F

SHAPE = {None: (7, 5, 3, 3), 0: (7, 5, 3, 3), 1: (7, 5, 3, 3)}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["f64", "f32"])
@pytest.mark.parametrize("case", SPECS, ids=lambda case: case.name)
def test_reference_equals_the_oracle(case: Case, dtype):
    x, alpha, grad = (t.to(dtype) for t in case.inputs((7, 5, 3, 3)))
    x.requires_grad_(), alpha.requires_grad_()
    q = oracle.quantities(x.detach().numpy(), alpha.detach().numpy(), case.spec, case.relu, case.clip)
    options = dict(relu=case.relu, clip=case.clip, backend="reference")
    tolerance = 1e-12 if dtype == torch.float64 else 3e-6

    # In float32 a distance is off by the rounding of x and of b * alpha, however small it is.
    rounding = np.finfo(np.float32 if dtype == torch.float32 else np.float64).eps * np.abs(q["y"]).max()
    distance = np.abs(q["d"])

    def close(got, expected, scale, slack=0.0):
        error = np.abs(got.detach().double().numpy() - expected).max(initial=0)
        assert error <= tolerance * scale + slack, (error, scale, slack)

    xhat = F.fake_quantize(x, alpha, case.spec, **options)
    close(xhat, q["xhat"], np.abs(q["xhat"]).max())
    dx, dalpha = torch.autograd.grad(xhat, (x, alpha), grad)
    expected_dx, expected_dalpha = oracle.lsq_gradients(q, grad.double().numpy())
    assert np.array_equal(dx.double().numpy(), expected_dx)
    close(dalpha, expected_dalpha, np.abs(q["s"] * grad.numpy() * (np.abs(q["b"]) + np.abs(q["v"]))).sum())

    loss, bins = F.bin_loss(x, alpha, case.spec, backprop_to_alpha=True, **options)
    assert np.array_equal(bins.counts.numpy(), q["n"])
    close(bins.sums, q["S"], distance.sum(), x.numel() * rounding)
    close(bins.squares, q["Q"], q["Q"].sum(), 2 * distance.sum() * rounding)
    close(bins.table[-2], distance.sum(), distance.sum(), x.numel() * rounding)
    close(loss, q["loss"], q["loss"], 2 * len(case.spec.codes) * distance.max() * rounding)
    dx, dalpha = torch.autograd.grad(loss, (x, alpha))
    close(dx, q["dloss_dx"], distance.max(), 2 * rounding)
    largest_code = max(abs(case.spec.qn), case.spec.qp)
    close(dalpha, q["dloss_dalpha"], 2 * largest_code * len(case.spec.codes) * distance.max())

    both = F.fake_quantize_with_bin_loss(x, alpha, case.spec, backprop_to_alpha=True, **options)
    assert torch.equal(both.xhat, xhat) and torch.equal(both.loss, loss)
    both_dx, both_dalpha = torch.autograd.grad([both.xhat, both.loss], (x, alpha), [grad, torch.tensor(0.5).to(dtype)])
    close(both_dx, expected_dx + 0.5 * dx.double().numpy(), np.abs(expected_dx).max() + distance.max())
    close(both_dalpha, expected_dalpha + 0.5 * dalpha.double().numpy(), x.numel() * (1 + largest_code))


@pytest.mark.parametrize("case", [c for c in SPECS if c.spec.num_slots <= 16], ids=lambda case: case.name)
def test_gradcheck_of_the_bin_loss(case: Case):
    """Between ties, ends and the ReLU's corners the loss is smooth in x and alpha, and its backward exact."""
    x, alpha, _ = (t.double() for t in case.inputs((4, 3, 3, 2)))
    step = case.spread(alpha, x.dim())
    code = (x / step).round()
    x = (code + (x / step - code).clamp(-0.35, 0.35) + 0.01) * step  # a hundredth of a step from every kink
    x.requires_grad_(), alpha.requires_grad_()

    def loss(x, alpha):
        return F.bin_loss(
            x, alpha, case.spec, relu=case.relu, clip=case.clip, backprop_to_alpha=True, backend="reference"
        ).loss

    assert torch.autograd.gradcheck(loss, (x, alpha), eps=1e-7)


def test_loss_is_the_sum_of_mse_and_variance_of_every_bin():
    """The definition, mean and variance bin by bin, against the one-pass identity sum Q_k / n_k."""
    x = torch.randn(5000, dtype=torch.float64)
    spec, alpha = QuantSpec(bits=3), 0.4
    b = (x / alpha).clamp(spec.qn, spec.qp).round()
    expected = 0.0
    for k in b.unique():
        in_bin = x[b == k]
        expected += (in_bin.mean() - k * alpha) ** 2 + in_bin.var(unbiased=False)
    torch.testing.assert_close(F.bin_loss(x, alpha, spec, backend="reference").loss, expected)


def test_a_pre_scaled_step_would_be_wrong():
    """x * (1 / alpha) moves values across a tie: the contract's true division is what the codes come from."""
    alpha = torch.tensor([step_for(QuantSpec(bits=4))])
    ties = (torch.arange(-9, 8) + 0.5) * alpha
    got = F.fake_quantize(ties, alpha, QuantSpec(bits=4), backend="reference")
    expected = np.rint(np.clip(ties.numpy() / alpha.numpy(), -8, 7)) * alpha.numpy()
    assert np.array_equal(got.numpy(), expected)
