"""What stands for a tensor in a forward that torch.fx reads: fx's Proxy, with what it lacks of a tensor."""

from __future__ import annotations

import builtins
import operator
import sys
import threading
from contextlib import contextmanager

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

    The tracer's ``kind_of(node)`` says what type is meant, or raises.
    """


_telling = threading.RLock()


@contextmanager
def told_apart():
    """isinstance takes a stand-in for what it stands for, where Python code asks that is not torch's (of which fx is a
    part) or qbr's; one thread at a time.

    Not by a ``__class__`` of its own: torch's C++ asks for that as well, and would read the tensor that is not there.
    """

    def told(value, kinds) -> bool:
        if type(value) is StandIn:
            asking = sys._getframe(1).f_globals.get("__name__", "")
            if not asking.startswith(("torch.", "qbr.")):
                return issubclass(value.tracer.kind_of(value.node), kinds)
        return true(value, kinds)

    with _telling:
        true = builtins.isinstance
        builtins.isinstance = told
        try:
            yield
        finally:
            builtins.isinstance = true


def _operator(function):
    def method(self, other):
        return self.tracer.create_proxy("call_function", function, (self, other), {})

    return method


for _function in IN_PLACE:
    setattr(StandIn, f"__{_function.__name__}__", _operator(_function))
