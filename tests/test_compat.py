"""The drop-in: the predecessor's names, checkpoints, helpers and hook manager."""

from __future__ import annotations

import argparse
import copy
import gc
import inspect
import weakref

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

import qbr
from qbr import ActivationHookManager, BinRegularizer, grad_scale, round_pass
from qbr.layers import clipped_relu

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


def _kept(manager) -> tuple[list[str], float]:
    found = manager.get_pre_quant_activations()
    return list(found), sum(each.sum().item() for each in found.values())


def test_forwards_that_do_not_enter_by_the_model_are_not_added_up():
    model = _net()
    manager = ActivationHookManager(model, exclude_first_last=False)
    model(_x())
    names, total = _kept(manager)
    model.forward(_x())
    for _ in range(2):  # a part of it, several times
        model[1](model[0](_x()))
    assert not [name for name in manager.activations if name not in names]
    model(_x())
    assert _kept(manager) == (names, total)


def test_copies_of_a_model_are_not_watched():
    model = _net()
    manager = ActivationHookManager(model, exclude_first_last=False)
    teacher, average = copy.deepcopy(model), AveragedModel(model)
    model(_x())
    before = _kept(manager)
    teacher(_x(1)), average(_x(1)), teacher.eval()(_x(1))
    assert _kept(manager) == before and before[0]
    assert all(each.requires_grad for each in manager.get_pre_quant_activations().values())
    manager.remove_hooks()
    manager.clear_activations()
    teacher.train()(_x(1))
    assert not manager.activations


def test_a_layer_that_is_called_by_name():
    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            self.relu = qbr.QuantizedClippedReLU(1.0, 2)

        def forward(self, x):
            return self.relu(input=x)

    model = Named()
    manager = ActivationHookManager(model)
    y = model(_x())
    assert torch.equal(manager.get_activations()["relu"], y)
    assert manager.get_pre_quant_activations()["relu"].max() <= 1.0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_pre_quant_activations_on_the_way_to_the_loss(dtype):
    x = (2 * torch.randn(64, 32, generator=torch.Generator().manual_seed(0))).to(dtype).requires_grad_()
    relu, other = (qbr.QuantizedClippedReLU(1.5, 3, keep_pre_quant_activation=keep) for keep in (True, False))
    # 1.5 is a number of 16 bits; of another clip the kept tensor has what they make of it.
    y, expected = relu(x), other(x)
    assert torch.equal(y, expected) and torch.equal(relu.quantizer.alpha, other.quantizer.alpha)
    relu.pre_quant_activation.retain_grad()
    g = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    dx, dalpha = torch.autograd.grad(expected, (x, other.quantizer.alpha), g)
    y.backward(g)
    assert torch.equal(x.grad, dx) and torch.allclose(relu.quantizer.alpha.grad, dalpha, rtol=1e-5)
    assert relu.pre_quant_activation.grad is not None
    relu.pre_quant_activation = None
    assert relu.pre_quant_activation is None
    with pytest.raises(AttributeError, match="only None can be assigned"):
        relu.pre_quant_activation = y


def test_an_input_that_is_written_to_after_its_relu():
    def run(keep):
        x = torch.randn(8, requires_grad=True)
        y = x * 1.0
        r = qbr.QuantizedClippedReLU(keep_pre_quant_activation=keep)(y)
        y += 1
        (r * 2 + y).sum().backward()

    run(True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        run(False)


def test_the_clip_of_16_bits_is_not_rounded_before_it_is_compared():
    """As in the fused pass: a value between clip and what 16 bits make of it is clipped, and gets no gradient."""
    for dtype, clip in ((torch.bfloat16, 1.1), (torch.float16, 1.0007)):
        edge = torch.tensor(clip).to(dtype)
        x = torch.stack([edge, torch.nextafter(edge, edge * 0)]).requires_grad_()
        dx = torch.autograd.grad(clipped_relu(x, clip).sum(), x)[0]
        assert dx.tolist() == [float(each <= clip) for each in x.detach().float()] and dx.tolist() == [0.0, 1.0]


def test_layers_by_number_and_info_that_is_merged_into():
    weights = {0: torch.randn(8), 1: torch.randn(8)}
    loss, info = BinRegularizer().compute_total_loss(weights, {0: 0.5})
    info |= {"avg_loss": 7.0}
    assert info["avg_loss"] == 7.0 and set(info["layer_losses"]) == {0} and loss.item() > 0


def test_what_grad_scale_gives_may_be_written_to():
    alpha = torch.tensor([0.5], requires_grad=True)
    grad_scale(alpha, 0.1).clamp_(min=1e-5).sum().backward()
    assert alpha.grad.item() == pytest.approx(0.1)
    with torch.no_grad():
        grad_scale(alpha, 0.1).mul_(2)
    assert alpha.item() == 0.5


def test_figures_that_could_not_be_read_are_read_again():
    answers = iter([RuntimeError("out of memory"), {"a": 1}])

    def load():
        answer = next(answers)
        if isinstance(answer, Exception):
            raise answer
        return answer

    info = qbr.metrics.LazyInfo(("a",), load)
    with pytest.raises(RuntimeError, match="out of memory"):
        info["a"]
    assert info["a"] == 1 and info == {"a": 1}


@pytest.mark.parametrize("detached", [False, True])
def test_an_input_that_was_written_to_gives_no_wrong_activation(detached):
    model = nn.Sequential(qbr.QuantizedClippedReLU(2.0))
    manager = ActivationHookManager(model, detach_activations=detached)
    x = torch.ones(4)
    model(x)
    assert model[0].pre_quant_activation.tolist() == manager.get_pre_quant_activations()["0"].tolist() == [1.0] * 4
    x.fill_(-5.0)
    with pytest.raises(RuntimeError, match="written to since"):
        _ = model[0].pre_quant_activation
    with pytest.raises(RuntimeError, match="'0'.*written to since"):
        manager.get_pre_quant_activations()
    with torch.inference_mode():
        model(torch.ones(4))


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: ActivationHookManager(nn.ReLU(), target_modules=["ReLU"]), r"target_modules=\['ReLU'\]: expected"),
        (lambda: ActivationHookManager(None), "model=None: expected an nn.Module"),
        (lambda: BinRegularizer().compute_total_loss([torch.ones(3)], {}), "weights_dict is a list: expected"),
        (lambda: BinRegularizer().get_bin_statistics({"a": torch.ones(3)}, [0.3]), "alphas_dict is a list: expected"),
        (lambda: round_pass(3.0), "x=3.0: expected a tensor"),
        (lambda: grad_scale(torch.ones(3), "x"), "scale='x': expected a number"),
        (lambda: qbr.calibrate(nn.Sequential(qbr.QuantizedLinear(2, 2)), [], forward=3), "forward=3: expected"),
        (lambda: qbr.AlphaControl().load_state_dict(None), "state is a NoneType: expected"),
        (lambda: qbr.schedules.Linear(0.0, 1.0, begin=1, until=3)("x"), "when='x': expected a number"),
        (lambda: qbr.QATConfig.from_json(None), "text is a NoneType: expected"),
    ],
)
def test_arguments_of_another_type_are_named(call, words):
    with pytest.raises(TypeError, match=words):
        call()
