"""One graph for every batch size and length: torch.compile for training, torch.export, ONNX."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import qbr
from qbr import QATConfig, calibrate, convert, prepare
from qbr.export import compare, to_onnx


class CallsReLU(nn.Module):
    """One that prepare() gives a traced forward."""

    def __init__(self):
        super().__init__()
        self.conv, self.fc = nn.Conv1d(4, 8, 3), nn.Linear(8, 3)

    def forward(self, x, scale: float = 1.0):
        return self.fc(F.relu(self.conv(x)).mean(2)) * scale


def _prepared(model: nn.Module, x: torch.Tensor) -> nn.Module:
    torch.manual_seed(0)
    prepare(model, QATConfig(4, 4))
    calibrate(model, [x])
    return model


@pytest.fixture
def graphs():
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    yield lambda: torch._dynamo.utils.counters["stats"]["unique_graphs"]
    torch.compiler.reset()


@pytest.mark.parametrize("to_alpha", [False, True, "scaled"])
@pytest.mark.parametrize("regularizer", ["br", "dampening"])
def test_training_compiles_twice_for_all_lengths(regularizer, to_alpha, graphs):
    """For the first length, and for all others: LSQ's gradient scale, a number, would make a graph for each."""
    model = _prepared(nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 6)), torch.randn(4, 5, 6))
    qbr.set_regularizer(model, weights=regularizer)
    qbr.AlphaControl(br_to_alpha_weights=to_alpha, br_to_alpha_acts=to_alpha).attach(model)

    def step(x):
        y = model(x).square().mean()
        br = qbr.bin_loss(model)
        return y + br.weights + br.activations

    def gradients(run, x):
        model.zero_grad()
        run(x).backward()
        return {name: p.grad for name, p in model.named_parameters()}

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for length in range(5, 15):
        x = torch.randn(4, length, 6)
        expected = gradients(step, x)
        for name, grad in gradients(compiled, x).items():
            torch.testing.assert_close(grad, expected[name], rtol=1e-6, atol=1e-8)
    assert graphs() == 2


@pytest.mark.parametrize("make", [CallsReLU, lambda: nn.Sequential(nn.Conv1d(4, 8, 3), nn.ReLU())])
@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("converted", [False, True])
def test_export_with_gradients_on(make, converted, strict):
    model = _prepared(make(), torch.randn(2, 4, 9)).eval()
    model = convert(model) if converted else model
    dim = torch.export.Dim
    shapes = ({0: dim("batch", min=2), 2: dim("length", min=4)},)
    if make is CallsReLU:
        shapes = (*shapes, None)
    arguments = (torch.randn(2, 4, 9), 1.0) if make is CallsReLU else (torch.randn(2, 4, 9),)
    program = torch.export.export(model, arguments, dynamic_shapes=shapes, strict=strict)
    x = torch.randn(5, 4, 12)
    assert torch.equal(program.module()(x, *arguments[1:]), model(x))


def test_onnx_of_a_traced_forward(tmp_path):
    for name in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(name)
    model = _prepared(CallsReLU(), torch.randn(2, 4, 9)).eval()
    path = tmp_path / "m.onnx"
    to_onnx(model, torch.randn(2, 4, 9), path)
    compared = compare(model, path, torch.randn(5, 4, 9))
    assert compared.rows == 5 and compared.quantizers and not any(compared.quantizers.values())


class Checkpointed(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6)) for _ in range(2))

    def forward(self, x):
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False)
        return x


def test_checkpointed_parts_compile_and_collect_their_losses(graphs):
    x = torch.randn(8, 6)
    model = _prepared(Checkpointed(), x)

    def step(run):
        model.zero_grad()
        y = run(x).square().mean()
        br = qbr.bin_loss(model)
        (y + br.weights + br.activations).backward()
        return [br.weights.detach(), br.activations.detach(), *(p.grad for p in model.parameters())]

    for mine, expected in zip(step(torch.compile(model, backend="aot_eager")), step(model)):
        torch.testing.assert_close(mine, expected)
    torch.compiler.reset()
    with pytest.raises(torch._dynamo.exc.Unsupported, match="side effect"):
        step(torch.compile(model, backend="aot_eager", fullgraph=True))
