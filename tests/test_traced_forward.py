"""A forward that was read and rewritten: what it was read with does not change in silence afterwards."""

from __future__ import annotations

import copy
import functools
import gc
import pickle
import types
import warnings
import weakref

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import qbr
from qbr import QATConfig, prepare


class Listed(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers, self.p, self.aux = nn.ModuleList([nn.Linear(4, 4) for _ in range(3)]), 0.0, None
        self.blocks, self.steps = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), 0

    def forward(self, x):
        for layer in self.layers:
            x = F.relu(layer(x))
        x = self.blocks(F.dropout(x, self.p, self.training))
        return x if self.aux is None else self.aux(x)


class ByName(nn.Module):
    """Names of the class, a method that has the name of a tensor's, and a dict of which one member is used."""

    scale, use_aux = 2.0, False

    def __init__(self):
        super().__init__()
        self.first, self.trainer, self.heads = nn.Linear(4, 4), None, nn.ModuleDict({"main": nn.Linear(4, 2)})

    def log(self):
        return self.trainer

    def forward(self, x):
        y = F.relu(self.first(x)) * self.scale
        return (y, y) if self.use_aux else self.heads["main"]((y + 1).log())


def test_what_changes_nothing_is_no_error():
    model = prepare(ByName(), QATConfig(weight_bits=2, act_bits=2))
    x = torch.randn(3, 4)
    expected = model(x)
    model.scale, model.use_aux, model.trainer = 2.0, False, object()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(model(x), expected)
    model.heads["aux"] = nn.Linear(4, 3)
    with pytest.warns(UserWarning, match="ByName.heads was"):
        assert torch.equal(model(x), expected)
    del model.heads["aux"]
    model.scale = 3.0
    with pytest.raises(RuntimeError, match="ByName.scale was 2.0"):
        model(x)


def _inserted(model):
    model.layers.insert(1, nn.Linear(4, 4))


def _deleted(model):
    del model.layers[1]


CHANGES = {
    "appended": (lambda m: m.layers.append(nn.Linear(4, 4)), r"Listed.layers was \['0', '1', '2'\]"),
    "inserted": (_inserted, r"is \['0', '1', '2', '3'\] now"),
    "deleted": (_deleted, r"is \['0', '1'\] now"),
    "a module for None": (lambda m: setattr(m, "aux", nn.Linear(4, 4)), "Listed.aux was None .* is an object now"),
    "a number": (lambda m: setattr(m, "p", 0.5), r"Listed.p was 0.0 .* is 0.5 now"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_a_forward_was_read_with_cannot_change_in_silence(change):
    model = prepare(Listed(), QATConfig(weight_bits=2, act_bits=2))
    x = torch.rand(2, 4)
    model(x)
    made, expected = CHANGES[change]
    made(model)
    with pytest.raises(RuntimeError, match=expected):
        model(x)


def test_what_a_forward_does_not_read_may_change_and_members_be_replaced():
    model = prepare(Listed(), QATConfig(weight_bits=2, act_bits=2))
    x = torch.rand(2, 4)
    model(x)
    model.steps += 1
    model.layers[1] = nn.Linear(4, 4)
    model.blocks.append(nn.Linear(4, 7))  # called as one module, whose own forward goes through its members
    assert model.eval()(x).shape == (2, 7)
    copied = pickle.loads(pickle.dumps(model))
    assert torch.equal(copied(x), model(x))
    copied.p = 0.5
    with pytest.raises(RuntimeError, match="Listed.p was 0.0"):
        copied(x)


class Indirect(nn.Module):
    """Attributes read inside of a comprehension, by a property, by getattr and as tensors that may be None."""

    def __init__(self):
        super().__init__()
        self.a, self.scale, self._shift, self.gain = nn.Linear(4, 4), 1.0, 0.0, 1.0
        self.register_buffer("mask", None)
        self.verbose, self.blocks = False, nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))

    @property
    def shift(self):
        return self._shift

    def forward(this, x):  # noqa: N805
        x = F.relu(this.a(x)) + this.shift
        x = sum([this.scale * v for v in (x, x)]) * getattr(this, "gain", 1.0)
        if this.verbose:
            print("a forward")
        return this.blocks[0](x if this.mask is None else x * this.mask)


def _masked(model):
    model.mask = torch.ones(4)


INDIRECT = {
    "in a comprehension": (lambda m: setattr(m, "scale", 2.0), "Indirect.scale was 1.0"),
    "by a property": (lambda m: setattr(m, "_shift", 2.0), "Indirect._shift was 0.0"),
    "by getattr": (lambda m: setattr(m, "gain", 2.0), "Indirect.gain was 1.0"),
    "a buffer for None": (_masked, "Indirect.mask was None .* is an object now"),
}


@pytest.mark.parametrize("change", INDIRECT)
def test_what_is_read_by_other_ways(change):
    model = prepare(Indirect(), QATConfig(weight_bits=None, act_bits=4))
    made, expected = INDIRECT[change]
    model(torch.rand(2, 4))
    made(model)
    with pytest.raises(RuntimeError, match=expected):
        model(torch.rand(2, 4))


def test_flags_and_wrappers_and_members_that_nobody_calls_stop_nothing():
    model = prepare(Indirect(), QATConfig(weight_bits=None, act_bits=4))
    x = torch.rand(2, 4)
    expected = model(x)
    model.blocks.append(nn.Linear(4, 4))
    model.scale = float("nan")
    with pytest.raises(RuntimeError, match="scale"):
        model(x)
    model.scale, model.verbose = 1.0, True
    with pytest.warns(UserWarning, match="Indirect.verbose was False .* is True now: the forward goes on as it was"):
        assert torch.equal(model(x), expected)
    listed = prepare(Listed(), QATConfig(weight_bits=2, act_bits=2))
    y = listed(x)
    listed.layers = Wrapped(listed.layers)
    assert torch.equal(listed(x), y)


def _negative(x):
    return -x


class Partly(nn.Module):
    """Empty tuples, an object, a list of which the first member is not called, members of a dict in their order."""

    def __init__(self):
        super().__init__()
        self.layers, self.then, self.p = nn.ModuleList([nn.Linear(4, 4) for _ in range(3)]), _negative, 0.0
        self.heads = nn.ModuleDict({"one": nn.Linear(4, 4), "two": nn.Linear(4, 4)})

    def forward(self, x):
        found = () if self.p else (x,)
        for layer in self.layers[1:]:
            found = (*found, F.relu(layer(found[-1])))
        for head in self.heads.values():
            found += () if self.then is None else (self.then(head(found[-1])),)
        return found[-1]


def test_an_object_that_becomes_none():
    model = prepare(Partly(), QATConfig(weight_bits=2, act_bits=2))
    model(torch.rand(2, 4))
    model.then = None
    with pytest.warns(UserWarning, match="Partly.then was an object .* is None now"):
        model(torch.rand(2, 4))


@pytest.mark.parametrize("change", [
    (lambda m: m.layers.append(nn.Linear(4, 4)), r"Partly.layers was \['0', '1', '2'\]"),
    (lambda m: m.heads.update({"three": nn.Linear(4, 4)}), r"Partly.heads was \['one', 'two'\]"),
], ids=["a list", "a dict"])  # fmt: skip
def test_a_list_that_is_called_in_part_warns(change):
    model, x = prepare(Partly(), QATConfig(weight_bits=2, act_bits=2)), torch.rand(2, 4)
    expected = model(x)
    change[0](model)
    with pytest.warns(UserWarning, match=change[1] + ".* the forward goes on as it was read"):
        assert torch.equal(model(x), expected)


class Wrapped(nn.Module):
    """As torch.compile's and checkpointing's wrappers: attributes are those of what is inside."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def __getattr__(self, name):
        return super().__getattr__(name) if name == "inner" else getattr(self.inner, name)


class CallsReLU(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x):
        return self.last(F.relu(self.first(x)))


def _wrapped(model: nn.Module) -> nn.Module:
    """As accelerate wraps a forward in autocast."""
    inner = model.forward.__func__

    @functools.wraps(inner)
    def around(self, *args, **kwargs):
        return inner(self, *args, **kwargs)

    model.forward = types.MethodType(around, model)
    return model


@pytest.mark.parametrize("wrap", [lambda model: model, _wrapped], ids=["as it is", "wrapped"])
def test_copies_run_their_own_layers(wrap):
    model, x = wrap(prepare(CallsReLU(), QATConfig(weight_bits=4, act_bits=4))), torch.rand(2, 4)
    expected = model(x)
    for twin in (copy.deepcopy(model), qbr.convert(model)):
        assert torch.equal(twin(x), expected)
        with torch.no_grad():
            for layer in (twin.first, twin.last):
                layer.weight.zero_(), layer.bias.zero_()
        assert not twin(x).any() and torch.equal(model(x), expected)


def test_a_wrapper_that_takes_over_the_forward_s_attributes_is_copied():
    """As accelerate's hooks for offloading do."""
    model, x = prepare(CallsReLU(), QATConfig(weight_bits=4, act_bits=4)), torch.rand(2, 4)
    expected = model(x)
    inner = model.forward
    model.forward = functools.update_wrapper(functools.partial(inner), inner)
    assert torch.equal(copy.deepcopy(model)(x), expected)


@pytest.mark.parametrize("make", [CallsReLU, lambda: nn.Sequential(nn.Linear(4, 4), nn.ReLU())], ids=["F", "nn"])
def test_a_prepared_model_is_gone_when_nobody_has_it(make):
    gc.collect()
    gc.disable()
    try:
        model = prepare(make(), QATConfig(weight_bits=4, act_bits=4))
        twin = copy.deepcopy(model)
        gone = weakref.ref(model), weakref.ref(twin)
        del model, twin
        assert [each() for each in gone] == [None, None]
    finally:
        gc.enable()


def test_a_forward_without_its_model():
    forward, model = prepare(CallsReLU(), QATConfig(weight_bits=4, act_bits=4)).forward, None
    with pytest.raises(RuntimeError, match="the model of this forward is gone"):
        forward(torch.rand(2, 4))
    model, x = prepare(CallsReLU(), QATConfig(weight_bits=4, act_bits=4)), torch.rand(2, 4)
    expected, alone = model(x), copy.deepcopy(model.forward)
    del model
    assert torch.equal(alone(x), expected)
