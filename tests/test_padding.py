"""Strides with gaps: torch.compile pads large ones on GPUs, and no kernel may read what lies between."""

from __future__ import annotations

import copy

import pytest
import torch
from test_parity import TARGETS, load
from torch import nn

import qbr
from qbr import QuantSpec, functional, ops
from qbr.arguments import check

WIDTH = 3001  # a stride beyond 1,024 elements and no multiple of 128 bytes, which inductor makes one


@pytest.fixture(autouse=True)
def padding():
    """As on a GPU, where it is the default; a cached graph would be one of another version."""
    inductor = pytest.importorskip("torch._inductor.config")
    torch._dynamo.reset()
    with inductor.patch(disable_padding_cpu=False, force_disable_caches=True):
        yield
    torch._dynamo.reset()


def _tensor(device: str, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0)).to(device)


def _steps(call, inputs: list[torch.Tensor]) -> list[torch.Tensor]:
    """What call gives, and the gradients of its sum."""
    leaves = [x.clone().requires_grad_() for x in inputs]
    outs = call(*leaves)
    return [out.detach() for out in outs] + list(torch.autograd.grad(sum(out.sum() for out in outs), leaves))


def _same(call, inputs: list[torch.Tensor]) -> None:
    for eager, compiled in zip(_steps(call, inputs), _steps(torch.compile(call, fullgraph=True), inputs), strict=True):
        torch.testing.assert_close(compiled, eager, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("backend, device", TARGETS)
def test_one_tensor(backend, device):
    load(backend, device)

    def call(x, alpha):
        made = functional.fake_quantize_with_bin_loss(x.sin() * 2, alpha, QuantSpec(bits=2), backend=backend)
        return made.xhat.cos(), made.loss

    _same(call, [_tensor(device, 16, WIDTH), torch.tensor([0.5], device=device)])


@pytest.mark.parametrize("backend, device", TARGETS)
def test_a_list(backend, device):
    load(backend, device)

    def call(x, y, alpha, other):
        made = functional.foreach_fake_quantize_with_bin_loss(
            [x.sin() * 2, y.cos()], [alpha, other], QuantSpec(bits=2), backend=backend
        )
        return [out for each in made for out in (each.xhat, each.loss)]

    steps = [torch.tensor([step], device=device) for step in (0.5, 0.3)]
    _same(call, [_tensor(device, 16, WIDTH), _tensor(device, 5, WIDTH + 4), *steps])


@pytest.mark.parametrize("backend, device", TARGETS)
def test_a_model(backend, device):
    load(backend, device)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(48, 1100), nn.LayerNorm(1100), nn.ReLU(), nn.Linear(1100, 1101), nn.ReLU())
    model = qbr.prepare(model.append(nn.Linear(1101, 3)), qbr.QATConfig()).to(device)
    x = _tensor(device, 6, 48)

    def step(model, call):
        loss = call(x).square().mean()
        br = qbr.bin_loss(model)
        (loss + br.weights + br.activations).backward()
        return loss.item(), br.weights.item(), br.activations.item(), [p.grad for p in model.parameters()]

    with qbr.use_backend(backend):
        qbr.calibrate(model, [x])
        twin = copy.deepcopy(model)
        eager, compiled = step(model, model), step(twin, torch.compile(twin, fullgraph=True))
    assert compiled[:3] == pytest.approx(eager[:3], rel=1e-4)
    torch.testing.assert_close(compiled[3], eager[3], rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("backend, device", [target for target in TARGETS if "reference" not in target.values])
def test_a_tensor_with_gaps_is_refused(backend, device):
    load(backend, device)
    x, alpha, plain = check(_tensor(device, 4, 6), torch.tensor([0.5], device=device), QuantSpec(bits=2), False, None)
    gaps = torch.zeros(4, 8, device=device)[:, :6].copy_(x)
    ops.implement(backend)
    namespace = getattr(torch.ops, f"qbr_{backend}")
    with pytest.raises(RuntimeError, match="x is not dense"):
        namespace.lsq_fwd(gaps, alpha, *plain)
    with pytest.raises(RuntimeError, match="x is not dense"):
        namespace.lsq_bin_bwd(gaps, alpha.new_ones(()), gaps, alpha, alpha.new_zeros(14).double(), *plain, 1.0)
    with pytest.raises(RuntimeError, match="x is not dense"):
        namespace.foreach_lsq_fwd([x, gaps], [alpha, alpha], [int(v) for v in plain[:4]] * 2, *plain[4:])
