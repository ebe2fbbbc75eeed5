"""prepare(): what becomes of a model's modules, what stays, and what is refused."""

from __future__ import annotations

import copy
import pickle
import warnings

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

import qbr
from qbr import QATConfig, prepare
from qbr.quantizers import quantizers


def _model():
    return nn.Sequential(
        nn.Sequential(
            nn.Conv2d(3, 4, 3, padding=1, padding_mode="circular", bias=False), nn.BatchNorm2d(4), nn.ReLU(True)
        ),
        nn.Sequential(nn.Conv2d(4, 4, 3, groups=2), nn.ReLU6()),
        nn.Flatten(),
        nn.Linear(4 * 36, 5),
    )


def _x(seed=0):
    return torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(seed))


def test_it_is_in_place_and_keeps_what_was_there():
    model = _model().to(torch.float64).eval()
    model[1][0].weight.requires_grad_(False)
    model[0][2].train()
    calls = []
    model[0][0].register_forward_hook(lambda *_: calls.append(1))
    modules, parameters = list(model.modules()), dict(model.named_parameters())
    assert prepare(model, QATConfig(weight_bits=3, act_bits=4)) is model
    assert [m for m in model.modules() if m in modules] == modules
    for name, parameter in parameters.items():
        assert dict(model.named_parameters())[name] is parameter
    conv, relu, relu6 = model[0][0], model[0][2], model[1][1]
    assert type(conv) is qbr.QuantizedConv2d and type(model[3]) is qbr.QuantizedLinear
    assert type(relu) is type(relu6) is qbr.QuantizedClippedReLU
    assert (relu.clip_value, relu6.clip_value) == (None, 6.0)
    assert conv.weight_quantizer.num_bits == 3 and relu.quantizer.num_bits == relu.num_bits == 4
    assert conv.padding_mode == "circular" and conv.weight.dtype == torch.float64
    assert conv.weight_quantizer.alpha.dtype == torch.float32
    assert not model[1][0].weight.requires_grad and model[1][0].weight_quantizer.alpha.requires_grad
    assert not conv.weight_quantizer.training and relu.quantizer.training
    with qbr.use_backend("reference"):
        model(_x().double())
    assert calls == [1]


def test_high_precision_is_close_to_the_float_model():
    torch.manual_seed(0)
    model = _model()
    expected = model(_x())
    got = prepare(model, QATConfig(weight_bits=8, act_bits=8))(_x())
    assert (got - expected).abs().max() < 0.2 * expected.abs().max()


@pytest.mark.parametrize("act_bits", [None, 32])
def test_a_side_stays_in_float(act_bits):
    model = prepare(_model(), QATConfig(weight_bits=2, act_bits=act_bits))
    assert type(model[0][2]) is nn.ReLU and type(model[1][1]) is nn.ReLU6
    model = prepare(_model(), QATConfig(weight_bits=act_bits, act_bits=2))
    assert type(model[0][0]) is nn.Conv2d and type(model[0][2]) is qbr.QuantizedClippedReLU


def test_skip():
    model = prepare(_model(), QATConfig(skip=["0.[0]", "1"]))
    kinds = [type(m) for m in (model[0][0], model[0][2], model[1][0], model[1][1], model[3])]
    assert kinds == [nn.Conv2d, qbr.QuantizedClippedReLU, nn.Conv2d, nn.ReLU6, qbr.QuantizedLinear]
    model = prepare(_model(), QATConfig(skip=["3"], clip=2.5))
    assert type(model[3]) is nn.Linear and model[0][2].clip_value == model[1][1].clip_value == 2.5


def test_a_step_per_channel():
    model = prepare(_model(), QATConfig(weight_per_channel=True))
    assert [m.weight_quantizer.alpha.numel() for m in (model[0][0], model[1][0], model[3])] == [4, 4, 5]
    model(_x()).sum().backward()
    assert qbr.bin_loss(model).weights.item() > 0


def test_the_root_and_shared_and_tied_modules():
    root = prepare(nn.Linear(3, 3), QATConfig(act_bits=None))
    assert type(root) is qbr.QuantizedLinear
    root(torch.ones(1, 3))
    assert list(qbr.bin_loss(root).layers) == [""]
    relu = nn.ReLU()
    model = prepare(nn.Sequential(relu, nn.Sequential(relu)), QATConfig(weight_bits=None))
    assert model[0] is model[1][0] is relu and type(relu) is qbr.QuantizedClippedReLU
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    model[1].weight = model[0].weight
    prepare(model, QATConfig(act_bits=None))
    assert model[0].weight is model[1].weight


class _Block(nn.Module):
    def __init__(self, device):
        super().__init__()
        self.relu, self.fc = nn.ReLU(), nn.Linear(4, 4, device=device)

    def forward(self, x):
        return self.relu(nn.functional.relu(self.fc(x)) - 0.1)


def test_a_model_that_is_spread_over_devices_keeps_each_quantizer_with_its_layer():
    parts = [nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4, device="meta"), nn.Sequential(nn.ReLU()), _Block("cpu"),
             _Block("meta"), nn.ReLU()]  # fmt: skip
    model = qbr.prepare(nn.Sequential(*parts), QATConfig(quantize_inputs=True))
    for name, quantizer in quantizers(model).items():
        assert quantizer.alpha.device.type == ("meta" if name[0] in "2356" else "cpu"), name
    assert qbr.prepare(nn.ReLU(), QATConfig(weight_bits=None)).quantizer.alpha.device.type == "cpu"


class _OwnConv(nn.Conv2d):
    """A user's subclass, which prepare leaves alone."""


def test_subclasses_are_left_alone():
    model = nn.Sequential(nn.Conv2d(1, 1, 1), _OwnConv(1, 1, 1), nn.MultiheadAttention(4, 2))
    prepare(model, QATConfig(act_bits=None))
    assert type(model[1]) is _OwnConv and not isinstance(model[2].out_proj, qbr.QuantizedLinear)


def test_the_plan_shows_what_stays_in_float_for_its_type():
    model = nn.Sequential(
        nn.Linear(2, 2), nn.ReLU(), nn.utils.parametrizations.weight_norm(nn.Linear(2, 2)), _OwnConv(1, 1, 1),
        nn.LazyLinear(2), type("OwnReLU", (nn.ReLU6,), {})(), nn.MultiheadAttention(4, 2), nn.LayerNorm(2),
    )  # fmt: skip
    rows = {row[0]: row[2:4] for row in qbr.plan(model).rows}
    assert rows == {
        "0": ("2 bits", "input float"), "1": ("", "2 bits"), "2": ("float (parametrized)", ""),
        "3": ("float (subclass of Conv2d)", ""), "4": ("float (lazy: run the model once before)", ""),
        "5": ("", "float (subclass of ReLU6)"), "6 in_proj_weight": ("2 bits", "input float"),
        "6.out_proj": ("2 bits", ""),
    }  # fmt: skip


@pytest.mark.parametrize(
    "model,config,message",
    [
        (_model(), {"weight_bits": None, "act_bits": 32}, "nothing to quantize"),
        (_model(), {"skip": ["0.0", "layer9*"]}, r"skip=\['layer9\*'\]"),
        (nn.Linear(2, 2), {}, "act_bits=2: no ReLU or ReLU6 to quantize"),
        (nn.ReLU(), {}, "weight_bits=2: no layer with a weight"),
        (_model(), {"skip": ["*.0", "3"]}, "all 3 are skipped"),
        (nn.Sequential(), {}, "weight_bits=2"),
    ],
)
def test_refused(model, config, message):
    before = [type(m) for m in model.modules()]
    with pytest.raises(ValueError, match=message):
        prepare(model, QATConfig(**config))
    assert [type(m) for m in model.modules()] == before


def test_twice():
    model = prepare(_model())
    with pytest.raises(ValueError, match="quantizers already"):
        prepare(model)


@pytest.mark.parametrize(
    "config,error,message",
    [
        ({"weight_bits": 0}, ValueError, "weight_bits=0"),
        ({"act_bits": 16}, ValueError, "act_bits=16: expected 1 to 8, or 32 or None for float"),
        ({"act_bits": 2.5}, TypeError, "act_bits=2.5"),
        ({"clip": 0}, ValueError, "clip=0"),
        ({"skip": "conv1"}, TypeError, "skip='conv1'"),
    ],
)
def test_bad_config(config, error, message):
    with pytest.raises(error, match=message):
        QATConfig(**config)
    with pytest.raises(TypeError, match="model is a int"):
        prepare(3)
    with pytest.raises(TypeError, match="config="):
        prepare(_model(), config)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_of_a_prepared_model_train_alike(copied):
    torch.manual_seed(0)
    model = prepare(_model())
    model(_x())
    other = copied(model)
    results = []
    for m in (model, other):
        optimizer = torch.optim.SGD(qbr.parameter_groups(m, lr=0.1, weight_decay=0.1), momentum=0.9)
        for step in range(2):
            optimizer.zero_grad()
            y = m(_x(step))
            br = qbr.bin_loss(m)
            (y.square().mean() + br.weights + br.activations).backward()
            optimizer.step()
        results.append([*m.state_dict().values()])
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


def test_compile_fullgraph_of_a_whole_model_equals_eager():
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = prepare(_model())
    model(_x())
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    results = []
    for run in (model, compiled):
        model.zero_grad()
        y = run(_x(1))
        br = qbr.bin_loss(run)
        (y.square().mean() + br.weights + br.activations).backward()
        results.append([y, br.weights, br.activations, *(p.grad.clone() for p in model.parameters())])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_pruned_weights_are_refused_one_bit():
    model = nn.Sequential(nn.Linear(4, 4))
    prune.l1_unstructured(model[0], "weight", amount=0.5)
    with pytest.raises(ValueError, match="0 is pruned and has weight_bits=1: binary codes have no 0"):
        qbr.prepare(model, qbr.QATConfig(weight_bits=1))


@pytest.mark.parametrize("dtype", [torch.complex64, torch.float8_e4m3fn])
def test_weights_of_other_dtypes_are_refused_by_name(dtype):
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = nn.Parameter(model[1].weight.detach().to(dtype))
    with pytest.raises(TypeError, match=f"1 has a weight of {dtype}: expected float32"):
        prepare(model, QATConfig(act_bits=None))
    prepare(model, QATConfig(act_bits=None, skip=["1"]))


class Operand(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.place, self.last = nn.Linear(8, 8), nn.Identity(), nn.Linear(8, 8)

    def forward(self, x):
        return self.last(self.place(torch.sigmoid(self.first(x))))


def test_a_quantizer_that_comes_after_prepare_is_not_left_out_of_the_loss_in_silence():
    model, x = prepare(Operand(), QATConfig(weight_bits=4, act_bits=None)), _x()[..., 0, :]
    model.place = qbr.LSQ_ActivationQuantizer(4)
    model(x)
    with pytest.warns(UserWarning, match=r"'place' collects no bin loss.*set its .collecting to True"):
        assert list(qbr.bin_loss(model).layers) == ["first", "last"]
    model.place.collecting = True
    model(x)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = qbr.bin_loss(model)
        assert set(found.layers) == {"first", "place", "last"} and found.activations > 0
        model.place.collecting = False
        model(x)
        assert list(qbr.bin_loss(model).layers) == ["first", "last"]
    with pytest.raises(ValueError, match="prepare it once.*add quantizers of your own afterwards"):
        prepare(model)


def test_tracing_a_prepared_model_says_when_to_trace():
    model = prepare(_model())
    with pytest.raises(TypeError, match="x is a Proxy.*trace the model before qbr.prepare, or after qbr.convert"):
        torch.fx.symbolic_trace(model)
    with pytest.raises(TypeError, match="x is a float: .*cast it first"):
        qbr.functional.fake_quantize(1.0, 1.0, qbr.QuantSpec(2))
