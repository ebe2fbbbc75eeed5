"""What qbr.functional and QuantSpec refuse, and how they say so; gradients of gradients, unused losses, large codes."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch
from test_foreach import BACKENDS
from test_parity import load

from qbr import QuantSpec
from qbr import functional as F

X = torch.linspace(-1, 1, 12).reshape(3, 4)
W4 = QuantSpec(4)


@pytest.mark.parametrize(
    "error, message, call",
    [
        (TypeError, "x is a list: expected a tensor of float32", lambda: F.fake_quantize([0.1], 0.1, W4)),
        (TypeError, "x is a torch.int64 tensor.*cast it", lambda: F.fake_quantize(X.long(), 0.1, W4)),
        (TypeError, "float8_e4m3fn tensor.*cast it", lambda: F.bin_loss(X.to(torch.float8_e4m3fn), 0.1, W4)),
        (TypeError, "spec=4: expected a qbr.QuantSpec", lambda: F.fake_quantize(X, 0.1, 4)),
        (TypeError, r"alpha=\[0.1, 0.2\]: expected a number, or a tensor", lambda: F.fake_quantize(X, [0.1, 0.2], W4)),
        (TypeError, "alpha=None: expected a number", lambda: F.fake_quantize(X, None, W4)),
        (TypeError, "alpha='a': expected a number", lambda: F.bin_loss(X, "a", W4)),
        (TypeError, "alpha is a torch.int64 tensor", lambda: F.fake_quantize(X, torch.ones(1).long(), W4)),
        (ValueError, "alpha=0: expected a positive, finite", lambda: F.fake_quantize(X, 0, W4)),
        (ValueError, "alpha=nan: expected a positive", lambda: F.fake_quantize(X, math.nan, W4)),
        (ValueError, "alpha=inf: expected a positive", lambda: F.fake_quantize(X, math.inf, W4)),
        (ValueError, "alpha=1e-60: .* in torch.float32's range", lambda: F.fake_quantize(X, 1e-60, W4)),
        (ValueError, r"alpha=1e\+39: .* in torch.float32's range", lambda: F.fake_quantize(X, 1e39, W4)),
        (ValueError, "alpha has 2 elements.*expected one step per tensor",
         lambda: F.fake_quantize(X, torch.ones(2), W4)),
        (ValueError, "alpha has 1 elements.*one step per channel, 4",
         lambda: F.fake_quantize(X, torch.ones(1), QuantSpec(4, channel_axis=-1))),
        (ValueError, "channel_axis=2 is not a dimension of x",
         lambda: F.fake_quantize(X, 0.1, QuantSpec(4, channel_axis=2))),
        (TypeError, "alpha_grad='a': expected a number", lambda: F.fake_quantize(X, 0.1, W4, alpha_grad="a")),
        (ValueError, "alpha_grad=nan", lambda: F.fake_quantize_with_bin_loss(X, 0.1, W4, alpha_grad=math.nan)),
        (ValueError, "alpha_grad=-1", lambda: F.foreach_fake_quantize([X], [0.1], W4, alpha_grad=[-1])),
        (ValueError, "clip=1 without relu", lambda: F.fake_quantize(X, 0.1, W4, clip=1)),
        (ValueError, "clip=-1: expected a positive",
         lambda: F.fake_quantize(X, 0.1, QuantSpec(4, False), relu=True, clip=-1)),
        (TypeError, "clip='3': expected a number",
         lambda: F.fake_quantize(X, 0.1, QuantSpec(4, False), relu=True, clip="3")),
        (TypeError, r"clip=\[3\]: expected a number",
         lambda: F.fake_quantize(X, 0.1, QuantSpec(4, False), relu=True, clip=[3])),
        (ValueError, "relu=True with spec.qn=-8", lambda: F.fake_quantize(X, 0.1, W4, relu=True)),
        (TypeError, "relu='no': expected True or False", lambda: F.fake_quantize(X, 0.1, W4, relu="no")),
        (TypeError, "x is a torch.sparse_coo tensor", lambda: F.fake_quantize(X.to_sparse(), 1, W4)),
        (TypeError, "alpha is a torch.sparse_coo", lambda: F.fake_quantize(X, torch.ones(1).to_sparse(), W4)),
        (TypeError, "signed='unsigned': expected True or False", lambda: QuantSpec(4, "unsigned")),
        (TypeError, "signed=0: expected True or False", lambda: QuantSpec(4, 0)),
        (TypeError, "binary='no': expected True or False", lambda: QuantSpec(1, binary="no")),
        (ValueError, "bits=9: expected 1 to 8", lambda: QuantSpec(9)),
        (TypeError, "bits=True: expected an int", lambda: QuantSpec(True)),
        (ValueError, "name both or neither", lambda: QuantSpec(4, qn=0)),
        (ValueError, "257 levels, expected at most 256", lambda: QuantSpec(8, qn=0, qp=256)),
        (ValueError, "expected codes within 524288 of 0", lambda: QuantSpec(2, qn=524288, qp=524289)),
        (ValueError, "binary=True with 2 bits", lambda: QuantSpec(2, binary=True)),
        (ValueError, "binary=True with 1 bits.*qn=0, qp=1", lambda: QuantSpec(1, qn=0, qp=1, binary=True)),
    ],
)  # fmt: skip
def test_bad_arguments_are_named_with_their_values(error, message, call):
    with pytest.raises(error, match=message):
        call()


def test_numbers_of_every_kind_are_steps():
    expected = F.fake_quantize(X, torch.tensor([0.25]), W4)
    for alpha in (0.25, np.float32(0.25), np.float64(0.25), torch.tensor(0.25), torch.tensor([[0.25]])):
        assert torch.equal(F.fake_quantize(X, alpha, W4), expected)
    assert F.fake_quantize(X.double(), 1e-60, W4).abs().max() == 8e-60


def test_a_spec_is_what_its_text_says():
    """Binary and ternary have the same ends: told apart by ==, repr and dataclasses.replace()."""
    specs = [QuantSpec(1), QuantSpec(1, qn=-1, qp=1), QuantSpec(2, qn=-1, qp=1), QuantSpec(1, False), QuantSpec(3)]
    assert [spec.binary for spec in specs] == [True, False, False, False, False]
    assert len(set(specs)) == len({repr(spec) for spec in specs}) == len(specs)
    for spec in specs:
        assert dataclasses.replace(spec) == spec
        assert dataclasses.replace(spec, channel_axis=1).codes == spec.codes


@pytest.mark.parametrize("backend, device", BACKENDS)
def test_the_largest_codes(backend, device):
    load(backend, device)
    for qn in (-(1 << 19), (1 << 19) - 255):
        spec = QuantSpec(8, qn=qn, qp=qn + 255)
        x = torch.arange(qn - 3, qn + 260, dtype=torch.float32, device=device) * 0.3
        expected = F.bin_loss(x.cpu(), 0.3, spec, backend="reference").bins.counts
        assert torch.equal(F.bin_loss(x, 0.3, spec, backend=backend).bins.counts.cpu(), expected)


@pytest.mark.parametrize("backend, device", BACKENDS)
def test_in_a_list_an_unused_loss_is_no_loss(backend, device):
    """Its gradient of 0 would meet the infinite distance of an infinity."""
    load(backend, device)
    first = torch.tensor([math.inf, 0.3, -0.2], device=device, requires_grad=True)
    second = torch.tensor([0.31, -0.7], device=device, requires_grad=True)
    alphas = [torch.tensor([0.25], device=device, requires_grad=True) for _ in range(2)]
    a, b = F.foreach_fake_quantize_with_bin_loss(
        [first, second], alphas, W4, backprop_to_alpha=True, backend=backend
    )
    got = torch.autograd.grad(a.xhat.sum() + b.xhat.sum() + b.loss, [first, second, *alphas])
    alone = F.fake_quantize(first, alphas[0], W4, backend=backend)
    other = F.fake_quantize_with_bin_loss(second, alphas[1], W4, backprop_to_alpha=True, backend=backend)
    expected = torch.autograd.grad(alone.sum() + other.xhat.sum() + other.loss, [first, second, *alphas])
    assert got[0].tolist() == [0, 1, 1]
    assert all(torch.equal(one, two) for one, two in zip(got, expected))
