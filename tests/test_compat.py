"""The drop-in: the predecessor's names, checkpoints, helpers and hook manager."""

from __future__ import annotations

import argparse
import gc
import inspect
import weakref

import pytest
import torch
from torch import nn

import qbr
from qbr import ActivationHookManager, BinRegularizer, grad_scale, round_pass

NAMES = [
    "grad_scale", "round_pass", "LSQ_WeightQuantizer", "LSQ_ActivationQuantizer", "QuantizedConv2d", "QuantizedLinear",
    "QuantizedClippedReLU", "BinRegularizer", "ActivationHookManager",
]  # fmt: skip

# Positional parameters and their defaults, as predecessor code may pass them.
SIGNATURES = {
    "LSQ_WeightQuantizer": [("num_bits", 2)],
    "LSQ_ActivationQuantizer": [("num_bits", 2), ("clip_value", None)],
    "QuantizedConv2d": [
        ("in_channels", ...), ("out_channels", ...), ("kernel_size", ...), ("stride", 1), ("padding", 0),
        ("dilation", 1), ("groups", 1), ("bias", True), ("num_bits", 2),
    ],
    "QuantizedLinear": [("in_features", ...), ("out_features", ...), ("bias", True), ("num_bits", 2)],
    "QuantizedClippedReLU": [("clip_value", None), ("num_bits", 2)],
    "BinRegularizer": [("num_bits", 2), ("signed", True), ("name", None)],
    "ActivationHookManager": [
        ("model", ...), ("target_modules", None), ("layer_names", None), ("exclude_first_last", True),
        ("detach_activations", False),
    ],
}  # fmt: skip


def test_names_and_signatures():
    for name in NAMES:
        assert name in qbr.__all__ and hasattr(qbr, name)
    for name, expected in SIGNATURES.items():
        parameters = [
            (p.name, ... if p.default is p.empty else p.default)
            for p in inspect.signature(getattr(qbr, name)).parameters.values()
            if p.kind is p.POSITIONAL_OR_KEYWORD
        ]
        assert parameters == expected, name


class _Block(nn.Module):
    """One ReLU module called twice, as in a ResNet's block."""

    def __init__(self, relu):
        super().__init__()
        self.conv1, self.conv2 = qbr.QuantizedConv2d(4, 4, 3, padding=1), qbr.QuantizedConv2d(4, 4, 3, padding=1)
        self.relu = relu

    def forward(self, x):
        return self.relu(self.conv2(self.relu(self.conv1(x))) + x)


def _net(make_relu=qbr.QuantizedClippedReLU):
    torch.manual_seed(0)
    return nn.Sequential(
        qbr.QuantizedConv2d(3, 4, 3), make_relu(), _Block(make_relu()), _Block(make_relu()), make_relu(),
        nn.Flatten(), qbr.QuantizedLinear(4 * 36, 5),
    )  # fmt: skip


def _x(seed=0):
    return torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(seed))


def test_a_predecessor_checkpoint_loads_strictly(tmp_path):
    state = {k: v for k, v in nn.Sequential(nn.Conv2d(3, 4, 3), nn.Linear(4, 5)).state_dict().items()}
    for prefix in ("0.weight_quantizer", "1.weight_quantizer", "2.quantizer"):
        state[f"{prefix}.alpha"], state[f"{prefix}.init_state"] = torch.tensor([0.37]), torch.tensor([1.0])
    path = tmp_path / "best.pth"
    torch.save({"epoch": 7, "model_state_dict": state, "test_acc": 91.0, "args": argparse.Namespace(lr=0.1)}, path)
    model = nn.Sequential(qbr.QuantizedConv2d(3, 4, 3), qbr.QuantizedLinear(4, 5), qbr.QuantizedClippedReLU(None, 2))
    with torch.serialization.safe_globals([argparse.Namespace]):
        loaded = torch.load(path, weights_only=True)["model_state_dict"]
    assert not any(model.load_state_dict(loaded, strict=True))
    assert all(q.initialised and q.alpha.item() == pytest.approx(0.37) for q in
               (model[0].weight_quantizer, model[1].weight_quantizer, model[2].quantizer))  # fmt: skip
    model[0](_x())
    assert model[0].weight_quantizer.alpha.item() == pytest.approx(0.37)
    assert model.state_dict().keys() == state.keys()


# grad_scale and round_pass


def test_grad_scale_and_round_pass():
    x = torch.tensor([0.1, 1.5, 2.5, -0.7], requires_grad=True)
    y = grad_scale(x, 0.3)
    assert torch.equal(y, x)
    y.backward(torch.ones(4))
    assert x.grad.tolist() == pytest.approx([0.3] * 4)
    x.grad = None
    z = round_pass(x)
    assert z.tolist() == [0.0, 2.0, 2.0, -1.0]
    (2 * z).sum().backward()
    assert x.grad.tolist() == [2.0] * 4


def test_the_helpers_write_lsq_as_the_paper_does():
    x = torch.randn(200, generator=torch.Generator().manual_seed(0))
    spec = qbr.QuantSpec(bits=3)
    results = []
    for written_out in (True, False):
        w, alpha = x.clone().requires_grad_(), torch.tensor([0.31], requires_grad=True)
        if written_out:
            step = grad_scale(alpha, spec.lsq_grad_scale(200))
            y = round_pass((w / step).clamp(spec.qn, spec.qp)) * step
        else:
            y = qbr.functional.fake_quantize(w, alpha, spec)
        y.square().sum().backward()
        results.append((y.detach(), w.grad, alpha.grad))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


# ActivationHookManager


def test_every_call_is_kept_in_the_graph():
    model = _net()
    with ActivationHookManager(model, exclude_first_last=False) as manager:
        assert manager.registered_layers == manager.get_registered_layers() == ["1", "2.relu", "3.relu", "4"]
        model(_x())
        names = ["1", "2.relu", "2.relu@2", "3.relu", "3.relu@2", "4"]
        assert list(manager.activations) == list(manager.get_activations()) == names
        pre = manager.get_pre_quant_activations()
        assert list(pre) == names and all(t.requires_grad and t.min() >= 0 for t in pre.values())
        quantizer = model[2].relu.quantizer
        quantized = qbr.functional.fake_quantize(pre["2.relu@2"], quantizer.alpha, quantizer.spec)
        assert torch.equal(quantized, manager.activations["2.relu@2"])
        torch.testing.assert_close(pre["2.relu@2"], model[2].relu.pre_quant_activation)
        alphas = {n: m.quantizer.alpha for n, m in model.named_modules() if isinstance(m, qbr.QuantizedClippedReLU)}
        loss, info = BinRegularizer(2, signed=False).compute_total_loss(pre, alphas)
        assert list(info["layer_losses"]) == names
        loss.backward()
        assert model[0].weight.grad is not None
        model(_x())
        assert list(manager.activations) == names
    assert not manager.hooks and not manager.activations
    model(_x())
    assert not manager.activations


def test_targets_and_exclusion():
    model = nn.Sequential(nn.ReLU(), nn.ReLU6(), nn.Sigmoid(), qbr.QuantizedClippedReLU(), nn.ReLU())
    assert ActivationHookManager(model).registered_layers == ["1", "3"]
    assert ActivationHookManager(model, exclude_first_last=False).registered_layers == ["0", "1", "3", "4"]
    assert ActivationHookManager(model, [nn.Sigmoid]).registered_layers == ["2", "3"]
    assert ActivationHookManager(model, layer_names=["2", "0"]).registered_layers == ["0", "2"]
    with pytest.warns(UserWarning, match="nowhere"):
        assert ActivationHookManager(model, layer_names=["1", "nowhere"]).registered_layers == ["1"]
    with pytest.raises(TypeError, match="layer_names='0': expected a list"):
        ActivationHookManager(model, layer_names="0")
    with pytest.raises(TypeError, match="target_modules=ReLU: expected a list"):
        ActivationHookManager(model, target_modules=nn.ReLU)


def test_plain_relus_are_kept_too():
    model = nn.Sequential(nn.ReLU(), nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 3), nn.ReLU())
    manager = ActivationHookManager(model)
    model(torch.randn(2, 3))
    assert list(manager.activations) == ["2"] and manager.activations["2"].requires_grad
    assert not manager.get_pre_quant_activations()
    detached = ActivationHookManager(model, detach_activations=True)
    model(torch.randn(2, 3))
    assert not detached.activations["2"].requires_grad


def test_nothing_is_kept_in_eval_or_after_clearing():
    model = _net()
    manager = ActivationHookManager(model)
    y = model(_x())
    kept = weakref.ref(manager.activations["2.relu"])
    assert kept() is not None
    manager.set_training_mode(False)
    assert not manager.activations and not manager.get_pre_quant_activations()
    del y
    gc.collect()
    assert kept() is None
    model(_x())
    assert not manager.activations
    manager.set_training_mode(True)
    model(_x())
    assert manager.activations
    manager.clear_activations()
    assert not manager.activations and not manager.get_pre_quant_activations()
    model.eval()(_x())
    assert not manager.activations


def test_a_predecessor_training_step():
    """The loop as a user of the predecessor has it, with only the import changed."""
    model = _net()
    weights_br, acts_br = BinRegularizer(2, True, "weights"), BinRegularizer(2, False, "activations")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    losses = []
    with ActivationHookManager(model, exclude_first_last=False) as manager:
        for _ in range(4):
            optimizer.zero_grad()
            y = model(_x())
            layers = {n: m for n, m in model.named_modules() if hasattr(m, "weight_quantizer")}
            w_loss, w_info = weights_br.compute_total_loss(
                {n: m.weight for n, m in layers.items()}, {n: m.weight_quantizer.alpha for n, m in layers.items()}
            )
            relus = {n: m for n, m in model.named_modules() if isinstance(m, qbr.QuantizedClippedReLU)}
            a_loss, a_info = acts_br.compute_total_loss(
                manager.get_pre_quant_activations(), {n: m.quantizer.alpha for n, m in relus.items()}
            )
            (y.square().mean() + w_loss + a_loss).backward()
            optimizer.step()
            losses.append(w_info["avg_loss"] + a_info["avg_loss"])
    assert losses[-1] < losses[0]
