"""What plan, prepare and calibrate say where a model becomes something else than its user may think."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import qbr


class OwnConv(nn.Conv2d):
    pass


class Unread(nn.Module):
    """A forward that torch.fx does not read, whose layers are called in another order than they were made."""

    def __init__(self):
        super().__init__()
        self.head, self.body, self.act = nn.Linear(4, 3), nn.Linear(4, 4), nn.ReLU()

    def forward(self, x, **_):
        return self.head(self.act(self.body(x)))


def cells(model, **config) -> dict[str, str]:
    return {row[0]: row[3] for row in qbr.plan(model, qbr.QATConfig(**config)).rows}


def said(model, **config) -> list[str]:
    return qbr.plan(model, qbr.QATConfig(**config)).warnings


def test_the_plan_tells_what_flows_into_layers():
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.GELU(), nn.Linear(4, 4), Unread())
    expected = {"0": "input float", "2": "", "4": "input float", "5.head": "input unknown", "5.body": "input unknown"}
    assert cells(model).items() >= expected.items()
    assert cells(model, quantize_inputs=True)["4"] == "input 2 bits signed"
    assert cells(model, act_bits=None)["4"] == ""
    assert cells(model, overrides={"4": {"quantize_inputs": True}})["4"] == "input 2 bits signed"


def test_most_inputs_in_float_are_warned_of():
    few = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
    assert not said(few)
    many = nn.Sequential(*few, nn.GELU(), nn.Linear(4, 4), nn.GELU(), nn.Linear(4, 4))
    (warning,) = said(many)
    assert "3 of 5 layers get inputs in float" in warning and "quantize_inputs=True" in warning
    assert not said(many, quantize_inputs=True)


def test_layers_without_a_quantized_form_are_warned_of_unless_skipped():
    model = nn.Sequential(OwnConv(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.ReLU(), nn.Flatten(), nn.LSTM(4, 4))
    (warning,) = said(model)
    assert "1 OwnConv (subclass of Conv2d), 0; 1 LSTM (no quantized form), 5" in warning
    assert not said(model, skip=["0", "5"])
    norms = nn.Sequential(nn.Linear(4, 4), nn.LazyBatchNorm1d(), nn.ReLU(), nn.LayerNorm(4), nn.Linear(4, 4))
    assert not said(norms) and cells(norms).keys() == {"0", "2", "4"}


@pytest.mark.parametrize(("argument", "at", "which"), [("first_layer", 0, "first"), ("last_layer", 3, "last")])
def test_bits_of_the_first_and_last_layer_fall_on_no_neighbour(argument, at, which):
    layers = [nn.Conv2d(3, 3, 1), nn.ReLU(), nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1)]
    layers[at] = OwnConv(3, 3, 1)
    model = nn.Sequential(*layers)
    expected = f"{argument}=8: the {which} layer, {at}, stays in float"
    assert any(expected in each for each in said(model, **{argument: 8}))
    weights = qbr.plan(model, qbr.QATConfig(**{argument: 8})).weights
    assert {each.spec.bits for each in weights} == {2}


def test_the_order_of_layers_is_learned_from_an_example():
    config = qbr.QATConfig(first_layer=8)
    guessed = qbr.plan(Unread(), config)
    assert "head counts as its first layer by the order of registration" in guessed.warnings[0]
    learned = qbr.plan(Unread(), config, example=torch.randn(2, 4))
    assert not learned.warnings
    assert {each.name: each.spec.bits for each in learned.weights} == {"head": 2, "body": 8}


class ReadsWeights(nn.Module):
    """As many attention blocks: one weight, read by functions; the other layer is asked for its dtype alone."""

    def __init__(self):
        super().__init__()
        self.qkv, self.out, self.act = nn.Linear(4, 12), nn.Linear(4, 4), nn.ReLU()

    def forward(self, x, **_):
        x = x.to(self.out.weight.dtype).reshape(-1, self.out.weight.size(1))
        q, k, v = F.linear(x, self.qkv.weight.data, self.qkv.bias).chunk(3, -1)
        return self.out(self.act(q * k + v))


def test_calibrate_sees_weights_that_are_read_past_their_layers():
    model = qbr.prepare(ReadsWeights(), qbr.QATConfig())
    with pytest.warns(UserWarning, match=r"\['qkv.weight'\]: read by forwards that are not their layers'"):
        qbr.calibrate(model, [torch.randn(2, 4)])


def test_calibrate_says_nothing_of_weights_that_their_own_layers_read():
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.TransformerEncoder(layer, 1))
    qbr.prepare(model, qbr.QATConfig(quantize_inputs=True))
    for mode in (True, False):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            warnings.filterwarnings("ignore", message=".*nested tensor")
            qbr.calibrate(model.train(mode), [torch.randn(2, 3, 8)])


def test_a_step_that_nothing_has_set_is_warned_of_in_eval():
    model = qbr.prepare(nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2)), qbr.QATConfig())
    with pytest.warns(UserWarning, match="nothing has set was run in eval mode"):
        model.eval()(torch.randn(2, 4))
    qbr.calibrate(model, [torch.randn(2, 4)])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(torch.randn(2, 4))


def test_a_rewritten_forward_names_what_it_leaves_at_the_default():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(4, 4)

        def forward(self, x, mask=None):
            return F.relu(self.fc(x)) if mask is None else F.relu(self.fc(x)) * mask

    rows = {row[0]: row[4] for row in qbr.plan(Block(), qbr.QATConfig()).rows}
    assert rows["functional_relu_1"] == "part of a rewritten forward, with mask at the default"


class Sharing(nn.Module):
    """One ReLU, called here and in a child that is not read."""

    def __init__(self):
        super().__init__()
        self.act, self.inner, self.fc = nn.ReLU(), Unread(), nn.Linear(3, 3)
        self.inner.act = self.act

    def forward(self, x):
        return self.act(self.fc(self.act(self.inner(self.act(x)))))


def test_a_relu_that_an_unread_forward_may_call_has_one_step():
    found = qbr.plan(Sharing(), qbr.QATConfig())
    (note,) = [row[4] for row in found.rows if row[0] == "act"]
    assert "one step for all calls: inner's forward, which may call it too, does not trace" in note
    model = qbr.prepare(Sharing(), qbr.QATConfig())
    assert model.act.calls == 1
    counted = qbr.prepare(Sharing(), qbr.QATConfig(), example=torch.randn(2, 4))
    assert counted.act.calls == 4


class ReadsOne(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x, **_):
        return self.b(torch.relu(self.a(x))) + F.linear(x, self.a.weight)


def test_weights_alone_are_looked_at_where_there_is_a_batch():
    model = qbr.prepare(ReadsOne(), qbr.QATConfig(act_bits=None))
    with pytest.warns(UserWarning, match=r"\['a.weight'\]: read by forwards that are not their layers'"):
        qbr.calibrate(model, [torch.rand(2, 4)])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        once = iter([torch.rand(2, 4)] * 3)
        qbr.calibrate(model, once)
        assert len(list(once)) == 3  # what comes once is not used up for a warning
        qbr.calibrate(model, [{"labels": torch.rand(2)}])  # nor does anything depend on this batch


class NeverCalled(nn.Module):
    """As timm's BEiT: the forward does what the layer would do."""

    def __init__(self):
        super().__init__()
        self.qkv, self.act, self.out = nn.Linear(4, 4), nn.GELU(), nn.Linear(4, 4)

    def forward(self, x, **_):
        return self.out(self.act(F.linear(x, self.qkv.weight, self.qkv.bias)))


def test_an_input_quantizer_of_a_layer_that_nothing_calls_is_not_promised_data():
    model = qbr.prepare(NeverCalled(), qbr.QATConfig(act_bits=8, quantize_inputs=True))
    with pytest.warns(UserWarning) as seen:
        qbr.calibrate(model, [torch.rand(2, 4)])
    texts = [str(each.message) for each in seen]
    assert any(t.startswith("no batch reached ['qkv.input_quantizer'], whose layers are not called") for t in texts)
    assert not any("first training forward sets them" in t for t in texts)


class Experts(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate_up_proj, self.scale = nn.Parameter(torch.rand(8, 16, 32)), nn.Parameter(torch.rand(1, 16))

    def forward(self, x):
        return (x * self.scale) @ self.gate_up_proj.mean(0)


class Scaled(nn.Module):
    """Positions are no small part of it; to skip it would skip the layer, too."""

    def __init__(self):
        super().__init__()
        self.linear, self.position = nn.Linear(64, 64), nn.Parameter(torch.rand(1, 32, 64))

    def forward(self, x):
        return self.linear(x + self.position)


class Token(nn.Module):
    def __init__(self):
        super().__init__()
        self.token = nn.Parameter(torch.rand(1, 1, 256))

    def forward(self, x):
        return x + self.token[..., :64]


def test_matrices_of_any_name_are_missed_where_they_are_large():
    config = qbr.QATConfig(act_bits=None)
    with pytest.warns(UserWarning, match=r"1 Experts \(no quantized form\), 1"):
        qbr.prepare(nn.Sequential(nn.Linear(16, 16), Experts()), config)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        qbr.prepare(nn.Sequential(Scaled(), Token()), config)
