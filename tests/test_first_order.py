"""Second derivatives are refused, however they are asked for; create_graph for other parts of a model is not."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import qbr
from qbr import QuantSpec, functional

ASKED = {
    "grad": lambda value, inputs: torch.autograd.grad(value, inputs, allow_unused=True),
    "backward": lambda value, inputs: value.backward(),
    "backward(inputs)": lambda value, inputs: value.backward(inputs=inputs),
}
W2 = QuantSpec(2)
OPS = {
    "bin_loss alone": lambda x, alpha: functional.bin_loss(x, alpha, W2).loss,
    "fake_quantize": lambda x, alpha: functional.fake_quantize(x, alpha, W2).pow(3).sum(),
    "bin_loss": lambda x, alpha: functional.bin_loss(x, alpha, W2, backprop_to_alpha=True).loss.pow(2),
    "both": lambda x, alpha: functional.fake_quantize_with_bin_loss(x, alpha, W2).loss.pow(2),
    "list": lambda x, alpha: functional.foreach_fake_quantize([x], [alpha], W2)[0].pow(3).sum(),
    "list of losses": lambda x, alpha: functional.foreach_bin_loss([x], [alpha], W2)[0].loss.pow(2),
    "list of both": lambda x, alpha: functional.foreach_fake_quantize_with_bin_loss([x], [alpha], W2)[0].loss.pow(2),
}


@pytest.mark.parametrize("parameter", [True, False])
@pytest.mark.parametrize("how", ASKED)
@pytest.mark.parametrize("op", OPS)
def test_a_second_derivative_is_refused(op, how, parameter):
    x = torch.randn(32, generator=torch.Generator().manual_seed(0))
    x = nn.Parameter(x) if parameter else x.requires_grad_()
    alpha = torch.tensor([0.5], requires_grad=True)
    first = torch.autograd.grad(OPS[op](x, alpha), x, create_graph=True)[0]
    with pytest.raises(RuntimeError, match="qbr's operations have first derivatives only"):
        ASKED[how](first.square().sum(), [x])


def model_of(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 3))
    return qbr.prepare(model, qbr.QATConfig())


def test_gradients_made_with_create_graph_are_those_without():
    grads = []
    for create_graph in (False, True):
        model = model_of()
        x, y = torch.randn(8, 4, generator=torch.Generator().manual_seed(1)), torch.arange(8) % 3
        loss = F.cross_entropy(model(x), y) + sum(qbr.bin_loss(model)[:2])
        grads.append(torch.autograd.grad(loss, list(model.parameters()), create_graph=create_graph))
    assert all(map(torch.equal, *grads))
    own = torch.ones((), requires_grad=True)  # beside them, something twice differentiable
    slope = torch.autograd.grad(own**3 + grads[1][0].sum(), own, create_graph=True)[0]
    assert torch.autograd.grad(slope, own)[0] == 6


def test_create_graph_under_checkpointing():
    """Whose saved tensors may be read once in a backward."""
    model = model_of()
    x = torch.randn(8, 4, generator=torch.Generator().manual_seed(1), requires_grad=True)
    qbr.calibrate(model, [x.detach()])
    loss = checkpoint(model, x, use_reentrant=False).square().sum()
    first = torch.autograd.grad(loss, x, create_graph=True)[0]
    assert torch.equal(first, torch.autograd.grad(model(x).square().sum(), x)[0])
