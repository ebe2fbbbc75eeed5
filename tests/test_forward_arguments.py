"""What a forward is called with decides what it calls: flags, None, numbers and lists that a parent or the example
gives."""

from __future__ import annotations

import copy
import enum
import pickle
import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import qbr
from qbr import QATConfig, tracing
from qbr.quantizers import quantizers

INPUTS = QATConfig(weight_bits=4, act_bits=4, quantize_inputs=True)


class Decoder(nn.Module):
    """A block of a U-Net: of its skip connection it asks whether there is one."""

    def __init__(self, channels: int, scale: int) -> None:
        super().__init__()
        self.conv, self.scale = nn.Conv2d(channels, 4, 3, padding=1), scale

    def forward(self, x, skip, size=None):
        x = F.interpolate(x, scale_factor=self.scale) if size is None else F.interpolate(x, size=size)
        if skip is not None:
            x = torch.cat([x, skip], 1)
        return F.relu(self.conv(x))


class UNet(nn.Module):
    def __init__(self, size=None) -> None:
        super().__init__()
        self.down, self.up, self.last, self.size = nn.Conv2d(3, 4, 1, stride=2), Decoder(7, 2), Decoder(4, 1), size

    def forward(self, x):
        return self.last(self.up(F.relu(self.down(x)), x, size=self.size), None)


@pytest.mark.parametrize("size", [None, (8, 8), [8, 8]], ids=str)
def test_each_block_is_read_with_what_it_is_given(size):
    model, x = UNet(size), torch.randn(2, 3, 8, 8)
    expected = model(x)
    table = str(qbr.plan(model, QATConfig(weight_bits=8, act_bits=8)))
    assert "with skip=None, size at the default" in table
    assert (f"with size={size!r}" if size else "with size at the default") in table
    prepared = qbr.prepare(model, QATConfig(weight_bits=8, act_bits=8))
    qbr.calibrate(prepared, [x], method="mse")
    assert (prepared(x) - expected).abs().max() < 0.05 * expected.abs().max()
    for twin in (copy.deepcopy(prepared), pickle.loads(pickle.dumps(prepared))):
        assert torch.equal(twin(x), prepared(x))


def test_a_rewritten_forward_refuses_what_it_was_not_read_with():
    model = qbr.prepare(UNet(), QATConfig(weight_bits=8, act_bits=8))
    y, x = torch.randn(2, 4, 4, 4), torch.randn(2, 3, 8, 8)
    assert model.up(y, x).shape == model.up(skip=x, x=y).shape == (2, 4, 8, 8)
    assert model.last(y, None).shape == model.last(y, skip=None, size=None).shape == (2, 4, 4, 4)
    for wrong, match in (
        (lambda: model.up(y, None), r"forward\(skip=<NoneType>\).* a value of its own for 'skip'.*example=...\)"),
        (lambda: model.up(y), "with a value of its own for 'skip'"),
        (lambda: model.up(y, x, (8, 8)), r"forward\(size=<tuple>\).* with its default for 'size'"),
        (lambda: model.last(y, y), r"forward\(skip=<Tensor>\).* with None for 'skip'"),
        (lambda: model.last(y), "with None for 'skip'"),
        (lambda: model.up(y, x, other=1), "arguments that it does not have"),
    ):
        with pytest.raises(TypeError, match=match):
            wrong()


class Block(nn.Module):
    def __init__(self, i: int, o: int) -> None:
        super().__init__()
        self.conv, self.act = nn.Conv2d(i, o, 1), nn.ReLU()

    def forward(self, x, act=True):
        x = self.conv(x)
        return self.act(x) if act else x


class Flagged(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.linear, self.last = Block(3, 4), Block(4, 4), nn.Conv2d(4, 4, 1)

    def forward(self, x):
        return self.last(self.linear(self.first(x), act=False))


def _inputs(model, config=INPUTS, **kwargs) -> dict[str, bool]:
    return {each.name: each.signed for each in qbr.plan(model, config, **kwargs).inputs}


def test_a_flag_that_leaves_a_relu_out_leaves_signed_values():
    assert _inputs(Flagged()) == {"first.conv": True, "last": True}


class Conditioned(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.embed, self.last = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1)

    def forward(self, x, condition=None, scale: float = 1.0):
        x = F.relu(self.conv(x))
        if condition is not None:
            x = x + self.embed(condition)
        return self.last(x * scale)


def test_the_example_tells_what_the_model_is_called_with():
    x = torch.randn(2, 3, 4, 4)
    assert _inputs(Conditioned()) == {"conv": True, "embed": True, "last": False}
    assert _inputs(Conditioned(), example=x) == {"conv": True, "embed": True, "last": False}
    both = {"x": x, "condition": x}
    assert _inputs(Conditioned(), example=both) == {"conv": True, "embed": True, "last": True}
    assert _inputs(Conditioned(), example={"x": x, "scale": -1.0})["last"] is True
    model = qbr.prepare(Conditioned(), INPUTS, example=both)
    assert model(**both).shape == model(x, x, 1.0).shape
    with pytest.raises(TypeError, match="with a value of its own for 'condition'"):
        model(x)
    assert _inputs(Conditioned(), example={"y": x}) == _inputs(Conditioned())
    with pytest.raises(TypeError, match="a batch is a int"):
        qbr.plan(Conditioned(), example=3)


def test_objects_are_not_handed_to_a_forward_that_is_only_read():
    """As a cache, to which it would write stand-ins."""
    call = tracing.call(Conditioned(), (torch.ones(1),), {"condition": [object()], "scale": (2, None)})
    assert call.tensors.keys() == {"x", "condition"} and call.values == {"scale": (2, None)}
    assert call.containers == ("condition",)


class Sorts(nn.Module):
    def forward(self, x, order):
        order.sort()
        return F.relu(x.permute(order))


class GivesAList(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear, self.sorts = nn.Linear(4, 4), Sorts()

    def forward(self, x):
        return self.sorts(self.linear(x), [1, 0])


def test_a_forward_that_changes_the_list_it_is_given_is_not_rewritten():
    with pytest.raises(ValueError, match="it changes a list or dict that it is called with"):
        qbr.plan(GivesAList())
    assert GivesAList()(torch.randn(2, 4)).shape == (2, 4)


class Auxiliary(nn.Module):
    def __init__(self, on: bool) -> None:
        super().__init__()
        self.linear, self.on = nn.Linear(4, 4), on

    def forward(self, x):
        return self.linear(x) if self.on else None


class Returned(nn.Module):
    """Asks whether a child has given it anything."""

    def __init__(self, on: bool) -> None:
        super().__init__()
        self.linear, self.auxiliary = nn.Linear(4, 4), Auxiliary(on)

    def forward(self, x):
        x = F.relu(self.linear(x))
        more = self.auxiliary(x)
        return x if more is None else x + more


class HandsOn(Returned):
    def forward(self, x):
        x = F.relu(self.linear(x))
        return x, self.auxiliary(x)


def test_whether_a_child_returns_none_is_not_asked_of_a_stand_in():
    config, x = QATConfig(weight_bits=8, act_bits=8), torch.randn(3, 4)
    assert [each.name for each in qbr.plan(Returned(True), config).relus] == ["functional_relu_1"]
    with pytest.raises(ValueError, match="auxiliary returns None, and it asks for None"):
        qbr.plan(Returned(False), config)
    for on in (True, False):
        assert [each.name for each in qbr.plan(HandsOn(on), config).relus] == ["functional_relu_1"]
    model = qbr.prepare(Returned(False), QATConfig(weight_bits=8, act_bits=None))
    assert model(x).shape == (3, 4)


class Shifts(nn.Module):
    def forward(self, x):
        x.view(-1).sub_(1.0)


class ShiftsWithin(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.shifts = Shifts()

    def forward(self, x):
        self.shifts(x)


@pytest.mark.parametrize("shifts", [Shifts, ShiftsWithin])
def test_what_a_child_writes_to_its_argument_is_seen_by_its_parent(shifts):
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.relu, self.shifts, self.last = nn.Linear(4, 4), nn.ReLU(), shifts(), nn.Linear(4, 4)

        def forward(self, x):
            x = self.relu(self.first(x)) * 1.0
            self.shifts(x)
            return self.last(x)

    assert _inputs(Net()) == {"first": True, "last": True}


def _set(x):
    x.data = x.data - 5
    return x


def _alias(x):
    y = x.data
    y -= 5
    return x


_THEN = {"set": _set, "alias": _alias}


def test_attributes_of_tensors_that_are_set_or_written_to():
    class Net(nn.Module):
        def __init__(self, then) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(4, 4), nn.Linear(4, 4)
            self.then = then

        def forward(self, x):
            return self.last(_THEN[self.then](F.relu(self.first(x))))

    torch.manual_seed(0)
    x = torch.randn(64, 4)
    with pytest.raises(ValueError, match="it sets .data of a tensor"):
        qbr.plan(Net("set"))
    model = Net("alias")
    expected = model(x)
    assert _inputs(model)["last"] is True
    qbr.calibrate(qbr.prepare(model, QATConfig(weight_bits=8, act_bits=8)), [x], method="mse")
    assert (model(x) - expected).abs().max() < 0.1


def test_calibration_warns_of_unsigned_inputs_below_zero():
    class Wrapper(nn.Module):
        def __init__(self, model):
            super().__init__()
            self.model = model

        def forward(self, x):
            return self.model(x)

    def calibrated(wrap=lambda model: model, **kwargs) -> list[str]:
        model = nn.Sequential(nn.Linear(4, 4), nn.Softplus(), nn.Linear(4, 4))
        model = qbr.prepare(model, QATConfig(act_bits=4, quantize_inputs=True, **kwargs))
        model[1].register_forward_hook(lambda module, args, y: y - 5)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            qbr.calibrate(wrap(model), [torch.randn(8, 4)])
        assert not quantizers(model)["2.input_quantizer"].spec.signed
        return [str(each.message) for each in caught]

    (warning,) = calibrated()
    assert "['2.input_quantizer'] are unsigned and were given values below 0" in warning and "input_signed" in warning
    for wrap in (lambda model: model, nn.DataParallel, Wrapper):
        assert calibrated(wrap, overrides={"2": {"input_signed": False}}) == []


class Mode(enum.Enum):
    PLAIN, LOUD = 1, 2


def _child(function) -> nn.Module:
    class Child(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.relu = nn.Conv2d(4, 4, 3, padding=1), nn.ReLU()

        forward = function

    return Child()


def _opts(self, x, opts):
    return F.relu(self.conv(x)) * opts["scale"]


def _size(self, x, size):
    return F.relu(self.conv(F.interpolate(x, size=size)))


def _mode(self, x, mode=Mode.PLAIN):
    y = F.relu(self.conv(x))
    return y * 10 if mode is Mode.LOUD else y


def _number(self, x, t):
    return F.relu(self.conv(x)) * (1 + t)


def _index(self, x, i):
    return F.relu(self.conv(x)) * [1.0, 2.0, 3.0][i]


def _pair(self, pair):
    y = F.relu(self.conv(pair[0]))
    return y * 10 if pair[1] is None else y


def _mask(self, x, mask):
    h = x.flatten(2)
    h = F.scaled_dot_product_attention(h, h, h, attn_mask=mask)
    return F.relu(self.conv(h.unflatten(2, x.shape[2:])))


def _divided(self, x, n=1):
    return F.relu(self.conv(x)) / n


def _checked(self, x, check=False):
    if check and bool(x.sum() > 1e9):
        raise ValueError
    return self.relu(F.relu(self.conv(x)))


CALLS = {
    "a dict": (_opts, lambda child, x: child(x, {"scale": 2.0}), True),
    "a size": (_size, lambda child, x: child(x, x.shape[2:]), True),
    "a torch.Size": (_size, lambda child, x: child(x, torch.Size((4, 4))), True),
    "an enum": (_mode, lambda child, x: child(x, mode=Mode.LOUD), True),
    "a number in a loop": (_number, lambda child, x: child(child(child(x, 0.1), 0.2), 1), True),
    "an index": (_index, lambda child, x: child(x, 2), True),
    "two indices": (_index, lambda child, x: child(child(x, 2), 1), False),
    "none in a list": (_pair, lambda child, x: child([x, None]), False),
    "a mask that is none": (_mask, lambda child, x: child(x, None), True),
    "a number that is the default": (_divided, lambda child, x: child(x, n=x.shape[0]), True),
    "what cannot be read first": (_checked, lambda child, x: child(child(x, True)), False),
    "what cannot be read last": (_checked, lambda child, x: child(child(x), True), False),
}


@pytest.mark.parametrize("name", CALLS)
def test_calls_of_a_child(name):
    function, call, rewritten = CALLS[name]

    class Parent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.child = _child(function)
            self.last = nn.ReLU()

        def forward(self, x):
            return self.last(call(self.child, x))

    torch.manual_seed(0)
    model, x = Parent(), torch.randn(1, 4, 4, 4)
    expected = model(x)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        qbr.prepare(model, QATConfig(weight_bits=8, act_bits=8))
    assert hasattr(model.child, "functional_relu_1") is rewritten
    assert rewritten is not any("child calls a ReLU as a function" in str(each.message) for each in caught)
    qbr.calibrate(model, [x], method="mse")
    for each in (model, copy.deepcopy(model), qbr.convert(model)):
        assert (each(x) - expected).abs().max() < 0.1 * expected.abs().max()


def test_a_number_in_the_example_may_be_another_in_the_next_call():
    model = _child(_number)
    x = torch.randn(1, 4, 4, 4)
    qbr.prepare(model, QATConfig(weight_bits=8, act_bits=8), example={"x": x, "t": 3})
    assert model(x, 4).shape == model(x, t=0.5).shape == x.shape
