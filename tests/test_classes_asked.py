"""What a forward asks of classes: of its own, its layers' and its arguments', and in ways in which a stand-in for a
tensor could not answer."""

from __future__ import annotations

import functools
import types

import pytest
import torch
from test_stand_ins import Layers
from torch import nn
from torch.nn import functional as F

import qbr


class Matches(Layers):
    def forward(self, x):
        match x:
            case torch.Tensor():
                return self.act(self.b(F.relu(self.a(x))))
        return x


@functools.singledispatch
def halved(x):
    return x


@halved.register
def _(x: torch.Tensor):
    return x / 2


class Dispatches(Layers):
    def forward(self, x):
        return self.act(self.b(halved(F.relu(self.a(x)))))


class ReadsClass(Layers):
    def forward(self, x):
        h = F.relu(self.a(x))
        return self.act(self.b(h if h.__class__ is torch.Tensor else 0 * h))


class ReadsType(Layers):
    def forward(self, x):
        h = F.relu(self.a(x))
        return self.act(self.b(h if type(h) is torch.Tensor else 0 * h))


class DispatchesThroughAModule(Layers):
    def forward(self, x):
        return self.act(self.b(_here.halved(F.relu(self.a(x)))))


_here = types.ModuleType("here")
_here.halved = halved


class DispatchesItself(Layers):
    @functools.singledispatchmethod
    def scaled(self, x):
        return x

    @scaled.register
    def _(self, x: torch.Tensor):
        return x / 2

    def forward(self, x):
        return self.act(self.b(self.scaled(F.relu(self.a(x)))))


class ReadsClasses(Layers):
    def forward(self, x):
        h = F.relu(self.a(x))
        return self.act(self.b(sum(v if v.__class__ is torch.Tensor else 0 * v for v in (h,))))


class ReadsTheClassOfItsWeight(Layers):
    def forward(self, x):
        h = F.relu(self.a(x))
        return self.act(self.b(h if self.own.__class__ is nn.Parameter else 0 * h))

    def __init__(self):
        super().__init__()
        self.own = nn.Parameter(torch.ones(4))


CLASSES = [
    Matches, Dispatches, DispatchesThroughAModule, DispatchesItself, ReadsClass, ReadsClasses, ReadsTheClassOfItsWeight,
    ReadsType,
]  # fmt: skip


@pytest.mark.parametrize("make", CLASSES)
def test_a_forward_that_asks_for_a_class_otherwise_is_not_read(make):
    torch.manual_seed(0)
    model, x = make(), torch.randn(8, 4)
    expected = model(x)
    with pytest.warns(UserWarning, match="a stand-in has its own|it asks for the type of what it has computed"):
        qbr.prepare(model, qbr.QATConfig(weight_bits=None, act_bits=8))
    qbr.calibrate(model, [x], method="mse")
    torch.testing.assert_close(model(x), expected, atol=0.05, rtol=0.05)


class AsksForItsLayers(nn.Module):
    """type() of children and of a default is the float model's own; of the input that of a tensor."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(4, 4), nn.Identity(), nn.Linear(4, 4)])

    def forward(self, x, scale=1.0):
        if type(scale) is not float or type(x) is not torch.Tensor or not isinstance(type(self), type):
            raise TypeError(f"{type(x)}")
        if {type: 1}.get(type(type(self))) != 1 or type(type(self)) != type or not issubclass(type(type(self)), type):  # noqa: E721
            raise TypeError(f"{type.__name__} of {type | None}, {None | type}")
        if self.layers.__class__.__name__ != "ModuleList" or issubclass(int, type) or type == int:  # noqa: E721
            raise TypeError("the class of a child, and other classes")
        for layer in self.layers:
            x = F.relu(layer(x)) if type(layer) is nn.Linear else layer(x)
        return x


def test_a_forward_that_asks_for_the_class_of_its_layers_is_read():
    model = qbr.prepare(AsksForItsLayers(), qbr.QATConfig(act_bits=8))
    assert {"functional_relu_1", "functional_relu_2"} <= dict(model.named_modules()).keys()
    assert "type" not in globals() and "isinstance" not in globals()
    model(torch.randn(3, 4))


class Strict(dict):
    __getattr__ = dict.__getitem__


class Lazy:
    def __getattr__(self, name):
        raise RuntimeError("looked at")


_lazy = Lazy()


class NamesOddObjects(Layers):
    """Objects that answer to no name that is not theirs, as configurations and lazily imported modules do."""

    def __init__(self):
        super().__init__()
        self.config = Strict(scale=0.5)

    def forward(self, x):
        return self.act(self.b(F.relu(self.a(x)) * self.config.scale)) if x is not _lazy else None


def test_objects_are_not_asked_for_what_they_do_not_have():
    model = qbr.prepare(NamesOddObjects(), qbr.QATConfig(weight_bits=None, act_bits=8))
    assert "functional_relu_1" in dict(model.named_modules())


OWN_TYPE = """
import torch
from torch.nn import functional as F
type = "half"

class Own(Layers):
    def forward(self, x):
        h = F.relu(self.a(x))
        return self.act(self.b(h / 2 if type == "half" else h))
"""


def test_a_module_s_own_name_for_type_stays():
    scope = {"Layers": Layers, "__name__": "own"}
    exec(OWN_TYPE, scope)
    torch.manual_seed(0)
    model, x = scope["Own"](), torch.randn(8, 4)
    expected = model(x)
    qbr.calibrate(qbr.prepare(model, qbr.QATConfig(weight_bits=None, act_bits=8)), [x], method="mse")
    torch.testing.assert_close(model(x), expected, atol=0.05, rtol=0.05)
    assert scope["type"] == "half"


class NamesItself(Layers):
    def forward(self, x):
        if self.training is None:
            raise RuntimeError(f"{type(self).__name__} or {self.__class__.__name__}: {x.dim()} dimensions")
        return self.act(self.b(F.relu(self.a(x))))


def test_a_forward_that_names_its_own_class_is_read():
    model = qbr.prepare(NamesItself(), qbr.QATConfig(weight_bits=None, act_bits=8))
    assert "functional_relu_1" in dict(model.named_modules())
