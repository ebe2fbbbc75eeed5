"""summary(model): its figures against the tensors themselves, and that the model does not notice."""

from __future__ import annotations

import pytest
import torch
from guards import no_host_reads
from torch import nn

import qbr
from qbr import QATConfig
from qbr.quantizers import quantizers


def _model(**config):
    torch.manual_seed(0)
    layers = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 6, 3), nn.ReLU6(), nn.Flatten()
    model = nn.Sequential(*layers, nn.Linear(6 * 16, 5))
    return qbr.prepare(model, QATConfig(**{"weight_bits": 2, "act_bits": 3, **config}))


def _x(seed=0):
    return torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(seed))


def _expect(row, x, alpha, qn, qp):
    v = x.detach() / alpha
    codes = v.clamp(qn, qp).round()
    assert row.numel == x.numel() and row.bins_used == len(codes.unique()) and row.levels == qp - qn + 1
    assert row.clipped == pytest.approx(((v < qn) | (v > qp)).double().mean().item())
    assert row.distance == pytest.approx((v - codes).abs().mean().item(), rel=1e-4)
    assert row.alpha == pytest.approx(alpha.mean().item())


@pytest.mark.parametrize("per_channel", [False, True])
def test_weights(per_channel):
    model = _model(weight_per_channel=per_channel)
    model(_x())
    with torch.no_grad():  # spread alphas, so that a mean is not every channel's own
        model[0].weight_quantizer.alpha.mul_(torch.linspace(0.5, 2, model[0].weight_quantizer.alpha.numel()))
    rows = {row.layer: row for row in qbr.summary(model).rows}
    assert list(rows) == ["0", "2", "3", "4", "6"]
    for name in "036":
        weight, alpha = model[int(name)].weight, model[int(name)].weight_quantizer.alpha.detach()
        assert (rows[name].kind, rows[name].bits) == ("weight", 2) and (rows[name].clipped > 0) == (name != "6")
        if per_channel:  # distance: mean |d| over the mean alpha
            d = (weight - model[int(name)].weight_quantizer(weight)).abs().mean() / alpha.mean()
            v = weight / alpha.reshape(-1, *[1] * (weight.dim() - 1))
            assert rows[name].distance == pytest.approx(d.item(), rel=1e-4)
            assert rows[name].clipped == pytest.approx(((v < -2) | (v > 1)).double().mean().item())
        else:
            _expect(rows[name], weight, alpha, -2, 1)


def test_the_outermost_levels_are_not_clipped():
    model = qbr.prepare(nn.Linear(4, 1), QATConfig(weight_bits=2, act_bits=None))
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[-1.0, 0.5, 0.50001, -1.25]]))
        model.weight_quantizer.alpha.fill_(0.5)
    (row,) = qbr.summary(model).rows
    assert row.clipped == 0.5 and row.bins_used == 2 and row.distance == pytest.approx((0.00002 + 0.5) / 4, rel=1e-3)


def test_activations_of_given_inputs():
    model = _model(clip=1.0)
    model(_x())
    model.eval()
    y = model[1](model[0](_x(1))).clamp(0, 1.0)
    z = model[3](model[2](model[1](model[0](_x(1))))).clamp(0, 1.0)
    rows = {row.layer: row for row in qbr.summary(model, _x(1)).rows}
    _expect(rows["2"], y, model[2].quantizer.alpha.detach(), 0, 7)
    _expect(rows["4"], z, model[4].quantizer.alpha.detach(), 0, 7)


def test_a_module_that_is_called_twice_is_pooled():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.relu = nn.ReLU()

        def forward(self, x):
            return self.relu(self.relu(x) * 2)

    model = qbr.prepare(Twice(), QATConfig(weight_bits=None, step_per_call=False))
    model(torch.rand(10))
    (row,) = qbr.summary(model, torch.rand(10)).rows
    assert row.numel == 20
    with qbr.Monitor(model):
        model(torch.rand(10))
        assert qbr.summary(model).rows[0].numel == 20


def test_activations_without_inputs():
    model = _model()
    empty = {row.layer: row for row in qbr.summary(model).rows}["2"]
    assert empty[4:] == (None, None, 8, None, None)
    model(_x())
    waiting = {row.layer: row for row in qbr.summary(model).rows}["2"]
    assert waiting.numel == 4 * 4 * 36 and waiting.clipped is None and 0 < waiting.distance < 0.5
    assert qbr.bin_loss(model).layers  # they still wait
    assert {row.layer: row for row in qbr.summary(model).rows}["2"].numel is None
    with qbr.Monitor(model):
        for _ in range(2):
            model(_x())
        qbr.bin_loss(model)
        assert {row.layer: row for row in qbr.summary(model).rows}["2"].numel == 2 * 4 * 4 * 36


def test_nothing_of_the_model_changes_and_the_device_is_read_once():
    model = _model()
    model(_x())
    model[1].eval()
    model(_x()).sum().backward()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    grads = [p.grad.clone() for p in model.parameters()]
    modes = [module.training for module in model.modules()]
    y = model(_x(2))
    pre = model[2].pre_quant_activation
    for inputs in ((), (_x(1),)):
        with no_host_reads(count=True) as guard:
            qbr.summary(model, *inputs)
        assert len(guard.reads) == 1
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert torch.equal(model[2].pre_quant_activation, pre)
    br = qbr.bin_loss(model)
    assert list(br.layers) == ["0", "2", "3", "4", "6"]
    (y.sum() + br.weights + br.activations).backward()
    assert any(not torch.equal(p.grad, grad) for p, grad in zip(model.parameters(), grads))
    assert not any(q._forward_pre_hooks for q in quantizers(model).values())
    with pytest.raises(RuntimeError):
        qbr.summary(model, torch.randn(1, 2, 8, 8))
    assert [module.training for module in model.modules()] == modes


def test_a_compiled_model_is_looked_at_in_eager_mode():
    model = _model()
    model(_x())
    compiled = torch.compile(model, backend="aot_eager")
    with torch.compiler.set_stance("fail_on_recompile"):
        assert str(qbr.summary(compiled, _x())) == str(qbr.summary(model, _x()))


def test_the_table():
    model = _model()
    text = str(qbr.summary(model))
    assert text.splitlines()[0].split() == ["layer", "kind", "bits", "alpha", "bins", "used", "clipped", "distance",
                                            "values"]  # fmt: skip
    assert len(text.splitlines()) == 6 and len({len(line) for line in text.splitlines()}) == 1
    assert text.splitlines()[2].split()[:4] == ["2", "activation", "3", "0.5714"]
    assert text.splitlines()[2].split()[4:] == ["-"] * 4 and repr(qbr.summary(model)) == text
    with pytest.raises(ValueError, match="call qbr.prepare"):
        qbr.summary(nn.Linear(2, 2))
