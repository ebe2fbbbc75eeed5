"""What prepare() finds in forwards: repeated calls, ReLUs called as functions, inputs that follow no ReLU, and what
does not trace."""

from __future__ import annotations

import copy
import pickle
import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import qbr
from qbr import QATConfig, calibrate, plan, prepare, tracing
from qbr.layers import call_names


def x_(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


class Block(nn.Module):
    """One ReLU module for two places, as in torchvision's ResNets."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.relu = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1), nn.ReLU(inplace=True)

    def forward(self, x):
        return self.relu(self.b(self.relu(self.a(x))) + x)


def blocks(**config) -> nn.Module:
    torch.manual_seed(0)
    return prepare(nn.Sequential(Block(), Block(), nn.Flatten(), nn.Linear(4 * 36, 3)), QATConfig(**config))


def gradients(model: nn.Module, run) -> list[torch.Tensor]:
    model.zero_grad()
    run(x_(2, 4, 6, 6).requires_grad_()).square().sum().backward()
    return [p.grad.clone() for p in model.parameters()]


# A module that is called several times


def test_each_call_has_its_own_step_and_its_own_loss():
    model = blocks()
    model(x_(2, 4, 6, 6))
    model(x_(2, 4, 6, 6))
    layers = qbr.bin_loss(model).layers
    assert [name for name in layers if "relu" in name] == ["0.relu", "0.relu@2", "1.relu", "1.relu@2"]
    assert call_names("quantizer", 2) == ["quantizer", "quantizer_2"]
    first, second = model[0].relu.quantizer, model[0].relu.quantizer_2
    assert first.alpha.item() != second.alpha.item()
    assert layers["0.relu"].bins.alpha.item() == first.alpha.item()
    assert layers["0.relu@2"].bins.alpha.item() == second.alpha.item()
    h = F.relu(model[0].a(x_(2, 4, 6, 6)))  # what the second call gets follows the first step
    h = qbr.functional.fake_quantize(h, first.alpha, first.spec)
    h = qbr.functional.fake_quantize(model[0].b(h) + x_(2, 4, 6, 6), second.alpha, second.spec, relu=True)
    assert torch.equal(h, model[0](x_(2, 4, 6, 6)))


def test_one_step_for_all_calls_is_an_option_and_old_state_dicts_load():
    model = blocks(step_per_call=False)
    model(x_(2, 4, 6, 6))
    state = model.state_dict()
    assert not [key for key in state if "quantizer_2" in key]
    other = blocks()
    other.load_state_dict(state)
    assert torch.equal(other[0].relu.quantizer_2.alpha, model[0].relu.quantizer.alpha)
    assert other[0].relu.quantizer_2.initialised
    assert torch.equal(other(x_(2, 4, 6, 6)), model(x_(2, 4, 6, 6)))


@pytest.mark.parametrize("copied", [lambda m: m, copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_steps_are_told_apart_in_copies_and_under_checkpointing(copied):
    model = blocks()
    model(x_(2, 4, 6, 6))
    model = copied(model)
    expected = gradients(model, model)
    for reentrant in (False, True):

        def run(x):
            for block in model[:2]:
                x = checkpoint(block, x, use_reentrant=reentrant)
            return model[2:](x)

        assert all(torch.equal(a, b) for a, b in zip(gradients(model, run), expected, strict=True))
    with pytest.raises(RuntimeError):
        model(x_(2, 9, 6, 6))  # an exception in mid-forward leaves the counters as they were
    assert all(torch.equal(a, b) for a, b in zip(gradients(model, model), expected, strict=True))


def test_compiled_whole_without_recompiling():
    torch._dynamo.reset()
    model = blocks()
    model(x_(2, 4, 6, 6))
    expected = gradients(model, model)
    with torch._dynamo.config.patch(error_on_recompile=True):
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        for _ in range(3):
            got = gradients(model, compiled)
            relus = [name for name in qbr.bin_loss(compiled).layers if "relu" in name]
            assert relus == ["0.relu", "0.relu@2", "1.relu", "1.relu@2"]
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_recomputing_a_part_of_a_forward_is_refused():
    class Partial(Block):
        def forward(self, x):
            x = self.relu(self.a(x))
            return self.relu(checkpoint(lambda t: self.relu(self.b(t)), x, use_reentrant=False))

    model = prepare(nn.Sequential(Partial(), nn.Flatten()), QATConfig(), example=x_(1, 4, 6, 6))
    assert model[0].relu.calls == 3
    with pytest.raises(RuntimeError, match="checkpoint the module around it as a whole"):
        model(x_(2, 4, 6, 6)).sum().backward()


class Shared(nn.Module):
    """One ReLU for three parts, one part used twice."""

    def __init__(self):
        super().__init__()
        relu = nn.ReLU()
        self.left, self.right = nn.Sequential(nn.Linear(5, 5), relu), nn.Sequential(relu, nn.Linear(5, 5), relu)
        self.relu = relu

    def forward(self, x):
        return self.relu(self.right(self.left(self.left(x))))


def test_a_relu_shared_by_several_modules_has_a_step_for_each_place():
    model = prepare(Shared(), QATConfig(weight_bits=None, act_bits=4))
    relu = model.relu
    assert relu.calls == 4  # left's place is one, though left runs twice: the same function
    model(x_(3, 5))
    model(x_(3, 5))
    names = [name for name in qbr.bin_loss(model).layers]
    assert sorted(names) == ["left.1", "left.1@2", "left.1@3", "left.1@4", "left.1@5"]


def test_a_model_inside_another_reuses_its_steps():
    class Siamese(nn.Module):
        def __init__(self):
            super().__init__()
            self.trunk = nn.Sequential(nn.Linear(5, 5), nn.ReLU())

        def forward(self, a, b):
            return self.trunk(a) - self.trunk(b)

    model = prepare(Siamese(), QATConfig())
    model(x_(3, 5), x_(3, 5, seed=1))
    assert list(qbr.bin_loss(model).layers) == ["trunk.0", "trunk.1", "trunk.1@2"]
    assert not model(x_(3, 5), x_(3, 5)).any()


def run_of(forward, **modules) -> nn.Module:
    """A module with a forward that is given as a function, in front of the modules that it calls."""
    torch.manual_seed(0)
    model = nn.Module()
    model.__class__ = type("Run", (nn.Module,), {"forward": forward})
    for name, module in modules.items():
        model.add_module(name, module)
    return model


def linear() -> nn.Linear:
    return nn.Linear(4, 4)


def test_calls_that_differ_between_the_modes_share_a_step():
    def forward(self, x):
        x = self.r(self.a(x))
        if self.training:
            self.r(100 * self.b(x))
        x = F.dropout(x, 0.5, True) if self.training else x
        return self.s(self.s(self.r(self.c(x))))

    model = run_of(forward, a=linear(), b=linear(), c=linear(), r=nn.ReLU(), s=nn.ReLU())
    rows = {row[0]: row for row in plan(model, QATConfig(2, 4)).rows}
    assert rows["r"][4].startswith("one step for calls that differ")
    prepare(model, QATConfig(weight_bits=None, act_bits=4))
    assert model.r.calls == 1 and model.s.calls == 2  # a dropout in one mode is no other call
    calibrate(model, [x_(8, 4)])
    alpha = model.r.quantizer.alpha.item()
    assert torch.equal(model.r(x_(3, 4)), model.eval().r(x_(3, 4))) and model.r.quantizer.alpha.item() == alpha


def test_an_owner_s_calls_stay_in_its_places():
    def forward(self, x):
        if not self.training:
            x = self.r(x) + 1
        return self.r(x)

    relu = nn.ReLU()
    one, two = run_of(forward, r=relu), run_of(lambda self, x: self.r(self.r(x) - 0.1), r=relu)
    model = prepare(nn.Sequential(linear(), one, two, one), QATConfig())
    assert relu.calls == 3
    ran = []
    for i, name in enumerate(call_names("quantizer", 3)):
        getattr(relu, name).register_forward_hook(lambda *_, i=i: ran.append(i))
    model(x_(2, 4)), model.eval()(x_(2, 4))
    assert ran == [0, 1, 2, 0] + [0, 0, 1, 2, 0, 0]


def test_what_a_reached_forward_calls_by_itself_is_not_counted_again():
    def through(self, x):
        for layer in self.layers:
            x = layer(x)
        return self.head(self.block.forward(x))

    relu = nn.ReLU()
    block = run_of(lambda self, x: self.r(self.a(self.r(x))), a=linear(), r=nn.ReLU())
    layers = nn.Sequential(linear(), relu, linear(), relu)
    model = prepare(run_of(through, layers=layers, block=block, head=linear()), QATConfig())
    assert relu.calls == block.r.calls == 2
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        calibrate(model, [x_(2, 4)])
        qbr.convert(model)


def test_the_first_and_the_last_layer_are_those_that_the_model_reaches():
    def forward(self, x):
        x = self.r(self.a(x))
        return x if self.training else self.head(x)

    model = run_of(forward, unused=linear(), a=linear(), head=linear(), r=nn.ReLU(), late=linear())
    prepare(model, QATConfig(2, 4, first_layer=8, last_layer=7))
    bits = {name: model.get_submodule(name).weight_quantizer.num_bits for name in ("unused", "a", "head", "late")}
    assert bits == {"unused": 2, "a": 8, "head": 7, "late": 2}


def test_a_forward_is_read_once_a_mode_however_often_it_is_called(monkeypatch):
    model, traced = linear(), []
    for _ in range(6):
        model = run_of(lambda self, x: self.d(F.dropout(self.d(x), 0.5, self.training)), d=model)
    original = tracing.trace
    monkeypatch.setattr(tracing, "trace", lambda *given, **more: traced.append(given) or original(*given, **more))
    assert [each.name for each in plan(model, QATConfig(act_bits=None)).weights] == ["d.d.d.d.d.d"]
    assert len(traced) == 2 * 6


# ReLUs called as functions


class Functional(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3)

    def forward(self, x, scale=None):
        y = F.relu(self.a(x), inplace=True)
        y = F.dropout(y, 0.5, self.training)
        z = self.b(y) - 0.1
        F.relu_(z)  # what it returns is not used
        z = torch.relu(z - 0.1) + (z - 0.2).relu()
        return F.relu6(z if scale is None else z * scale)


def test_functional_relus_are_quantized_in_both_modes():
    torch.manual_seed(0)
    model = Functional()
    plain = copy.deepcopy(model)
    prepare(model, QATConfig(weight_bits=None, act_bits=8))
    names = [f"functional_relu_{i}" for i in range(1, 6)]
    assert [n for n, m in model.named_modules() if isinstance(m, qbr.QuantizedClippedReLU)] == names
    assert model.functional_relu_5.clip_value == 6.0
    calibrate(model, [x_(2, 3, 9, 9)] * 3, method="mse")
    for mode in (True, False):
        model.train(mode), plain.train(mode)
        torch.manual_seed(1)
        got = model(x_(2, 3, 9, 9))
        torch.manual_seed(1)
        expected = plain(x_(2, 3, 9, 9))
        assert (got - expected).abs().max() < 0.05 * expected.abs().max()
        assert (got == 0).any() == (expected == 0).any()
        assert mode or len(got.unique()) <= 256
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert other.forward.owner is other and torch.equal(other(x_(2, 3, 9, 9)), got)
    model(x_(2, 3, 9, 9), scale=None)
    model(x=x_(2, 3, 9, 9))
    with pytest.raises(TypeError, match=r"forward\(scale=<float>\)"):
        model(x_(2, 3, 9, 9), 2.0)


def test_functional_relus_by_name_and_compiled():
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = nn.Sequential(Functional(), Functional())
    model[1].a = nn.Conv2d(4, 4, 3)
    config = QATConfig(act_bits=4, skip=["0.functional_relu_2"], overrides={"1.functional_relu_1": {"act_bits": 6}})
    prepare(model, config)
    assert not hasattr(model[0], "functional_relu_2") and model[1].functional_relu_1.num_bits == 6
    model.eval()
    calibrate(model, [x_(2, 3, 20, 20) * 9])
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x_(2, 3, 20, 20)), model(x_(2, 3, 20, 20)))


class Untraceable(nn.Module):
    """Its forward looks at values."""

    def __init__(self, functional=True):
        super().__init__()
        self.fc, self.act, self.functional = nn.Linear(4, 4), nn.ReLU(), functional

    def forward(self, x):
        y = self.act(self.fc(x))
        if y.sum() > -1:
            y = self.act(y - 0.1)
        return y.relu() if self.functional else y


def test_what_does_not_trace_is_named_and_the_rest_goes_on():
    model = nn.Sequential(Untraceable(), nn.Linear(4, 4), nn.ReLU())
    with pytest.warns(UserWarning, match="^0 calls a ReLU as a function.*use an nn.ReLU module there"):
        prepare(model, QATConfig())
    assert model[0].act.calls == 1
    model(x_(2, 4))
    assert list(qbr.bin_loss(model).layers) == ["0.fc", "0.act", "0.act@2", "1", "2"]  # a loss a call, and one step
    quiet = nn.Sequential(Untraceable(functional=False), nn.Linear(4, 4))
    quiet[0].__class__ = type("Quiet", (Untraceable,), {"forward": lambda self, x: self.act(x) if x.sum() > 0 else x})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        table = str(plan(quiet, QATConfig()))
    assert "one step for all calls: its parent's forward does not trace" in table


def test_an_example_counts_the_calls_that_do_not_trace_and_leaves_no_trace():
    torch.manual_seed(0)
    model = nn.Sequential(nn.BatchNorm1d(4), Untraceable(), nn.Dropout(0.5))
    state, random = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    with pytest.warns(UserWarning, match="1 calls a ReLU"):
        prepare(model, QATConfig(), example=(x_(8, 4), None))
    assert model[1].act.calls == 2
    assert all(torch.equal(state[key], value) for key, value in model.state_dict().items() if key in state)
    assert torch.equal(torch.get_rng_state(), random)
    assert not [m for m in model.modules() if m is not model and m is not model[1] and m._forward_pre_hooks]


@pytest.mark.parametrize("mode", [torch.no_grad(), torch.autocast("cpu")])
def test_a_forward_that_switches_modes_is_not_rewritten(mode):
    class Switches(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(4, 4)

        def forward(self, x):
            return self.helper(F.relu(self.fc(x)))

        def helper(self, x):
            with mode:
                return x.sigmoid()

    with pytest.warns(UserWarning, match="switches gradients or autocast"):
        model = prepare(Switches(), QATConfig(act_bits=2, quantize_inputs=True))
    assert "forward" not in model.__dict__


# Inputs that follow no ReLU


class Inputs(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.relu, self.pool = nn.Conv2d(3, 4, 3), nn.ReLU(), nn.MaxPool2d(2)
        self.after_relu, self.after_conv = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)
        self.average, self.fc = nn.AdaptiveAvgPool2d(1), nn.Linear(4, 2)

    def forward(self, x):
        x = self.pool(self.relu(self.stem(x)))
        x = self.after_conv(self.after_relu(x))
        return self.fc(torch.flatten(self.average(F.relu(x)), 1))


def test_inputs_are_quantized_where_they_follow_no_relu_signed_where_they_can_be_negative():
    model = prepare(Inputs(), QATConfig(weight_bits=3, act_bits=4, quantize_inputs=True, first_layer=8))
    found = {n: m.spec for n, m in model.named_modules() if n.endswith("input_quantizer")}
    assert {name: (spec.bits, spec.signed) for name, spec in found.items()} == {
        "stem.input_quantizer": (8, True), "after_conv.input_quantizer": (4, True), "fc.input_quantizer": (4, False),
    }  # fmt: skip
    model(x_(2, 3, 8, 8))
    y, layers = model(x_(2, 3, 8, 8)), qbr.bin_loss(model).layers
    assert [n for n in layers if n.endswith(".input")] == ["stem.input", "after_conv.input", "fc.input"]
    assert qbr.bin_loss(model).activations.item() == 0
    y.sum().backward()
    assert all(p.grad is not None for p in model.parameters())
    q = model.stem.input_quantizer
    expected = qbr.functional.fake_quantize(x_(2, 3, 8, 8), q.alpha, q.spec)
    assert torch.equal(model.stem(x_(2, 3, 8, 8)), model.stem._conv_forward(
        expected, model.stem.quantized_weight(), model.stem.bias))  # fmt: skip


def test_inputs_by_name_and_without_weights_or_relus():
    config = QATConfig(weight_bits=None, act_bits=4, overrides={"fc": {"quantize_inputs": True, "input_signed": True}})
    model = prepare(Inputs(), config)
    assert model.fc.input_quantizer.spec.signed and not hasattr(model.fc, "weight_quantizer")
    assert type(model.stem) is nn.Conv2d
    calibrate(model, [x_(2, 3, 8, 8)])
    assert torch.equal(qbr.convert(model.eval())(x_(2, 3, 8, 8)), model(x_(2, 3, 8, 8)))
    only = prepare(nn.Sequential(nn.Linear(3, 3), nn.GELU(), nn.Linear(3, 3)), QATConfig(quantize_inputs=True))
    assert all(hasattr(only[i], "input_quantizer") for i in (0, 2))
