"""What stands for a tensor in a forward that torch.fx reads: fx's Proxy, with what it lacks of a tensor."""

from __future__ import annotations

import operator
import threading
from collections.abc import Iterable
from contextlib import contextmanager
from types import FunctionType

import torch.fx

_IN_PLACE = ("iadd", "isub", "imul", "itruediv", "ifloordiv", "imod", "ipow", "iand", "ior", "ixor")


def _made(name: str):
    operation = getattr(operator, name)

    def written(a, b):
        return operation(a, b)

    # Not operator's own: fx prints that as a statement, after which a number's old value would be lost as well.
    written.__name__ = written.__qualname__ = name
    return written


# {what an operator like += becomes in a graph: that operator}; by name in this module, as fx's code and pickles ask.
IN_PLACE = {_made(name): getattr(operator, name) for name in _IN_PLACE}
globals().update({function.__name__: function for function in IN_PLACE})


class StandIn(torch.fx.Proxy):
    """A Proxy whose += and the like stay writes in place (fx makes additions of them, which an alias does not see),
    and which inside of ``told_apart`` is a Tensor to whoever asks by isinstance or torch.is_tensor.

    The tracer's ``kind_of(node)`` says what type is meant, or raises. What it gives for an attribute is such a
    stand-in, too; an attribute that is set would be lost, and is refused.
    """

    def __getattr__(self, name: str) -> Part:
        return Part(self, name)

    def __setattr__(self, name: str, value) -> None:
        if name not in _OWN:
            raise TypeError(f"it sets .{name} of a tensor, which a graph does not keep")
        super().__setattr__(name, value)


class Part(torch.fx.proxy.Attribute, StandIn):
    """What stands for an attribute of a tensor; called, for a method's result."""


_OWN = {"tracer", "node", "root", "attr", "_node"}  # what fx's own Proxy and Attribute set


class _Type:
    """What stands for ``type``: of a stand-in it gives the class of what that stands for. It is equal to type, but not
    type itself to who asks by ``is``."""

    def __call__(self, *args, **kwargs):
        if len(args) == 1 and isinstance(args[0], StandIn):
            return args[0].tracer.kind_of(args[0].node)
        return type(*args, **kwargs)

    def __instancecheck__(self, value) -> bool:
        return isinstance(value, type)

    def __subclasscheck__(self, kind) -> bool:
        return issubclass(kind, type)

    def __getattr__(self, name: str):
        return getattr(type, name)

    def __eq__(self, other) -> bool:
        return other is type or isinstance(other, _Type)

    def __hash__(self) -> int:
        return hash(type)

    def __or__(self, other):
        return type | other

    def __ror__(self, other):
        return other | type


_telling = threading.RLock()


@contextmanager
def told_apart(functions: Iterable[FunctionType]):
    """In the modules of these functions, and for torch.is_tensor, isinstance and type take a stand-in for what it
    stands for; one thread at a time. Modules within torch and qbr are left out: fx has to tell its own.

    Not by a ``__class__`` of its own, which torch's C++ asks for as well, and would read the tensor that is not there;
    nor for everyone, since what is imported meanwhile (torch._dynamo) would keep this isinstance for Python's.
    """

    def told(value, kinds) -> bool:
        if isinstance(value, StandIn):
            return issubclass(value.tracer.kind_of(value.node), kinds)
        return isinstance(value, kinds)

    places = {id(place): place for place in (vars(torch), *(each.__globals__ for each in functions))}
    asking = [p for p in places.values() if not str(p.get("__name__")).startswith(("torch.", "qbr."))]
    ours = [(place, "isinstance", told) for place in asking]
    ours += [(place, "type", _Type()) for place in asking if place is not vars(torch)]
    ours = [(place, name, value) for place, name, value in ours if name not in place]  # what is the module's own stays
    with _telling:
        for place, name, value in ours:
            place[name] = value
        try:
            yield
        finally:
            for place, name, _ in ours:
                del place[name]


def _operator(function):
    def method(self, other):
        return self.tracer.create_proxy("call_function", function, (self, other), {})

    return method


for _function in IN_PLACE:
    setattr(StandIn, f"__{_function.__name__}__", _operator(_function))
