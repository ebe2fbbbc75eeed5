"""Which call of a module this is: a module that its owner's forward calls several times tells its calls apart."""

from __future__ import annotations

import threading
import warnings

import torch
from torch import nn

from qbr.grouping import is_in_backward


def joined(name: str, child: str) -> str:
    """The full name of a child of the module of that name; "" is the root."""
    return f"{name}.{child}" if name else child


def _thread() -> int:
    return threading.get_ident()


# What torch.compiler.assume_constant_result sets: dynamo cannot follow the call, and would not guard a threading.local.
_thread._dynamo_marked_constant = True


class Counted:
    """A mixin for a module with something of its own for every place that calls it.

    The places are numbered from 0 over all owners (the modules whose forward calls it). ``count_calls`` hooks the
    owners, so that every run of an owner's forward starts with the owner's first place and stays at its last:
    recomputation by activation checkpointing and a block that runs twice (shared weights) find the same number as the
    first run did.
    """

    calls = 1
    # {thread: [next call, owner's last call] of each owner's forward that runs in it, the innermost last}
    _places: dict[int, list[list[int]]] = {}  # of its own once count_calls has been told of it

    def next_call(self) -> int:
        """The number of the call that is being made; beyond the owner's last place, the last; outside of any owner, 0.

        Raises:
            RuntimeError: in a recomputation of a part of the owner's forward, where the number cannot be known.

        Warns:
            UserWarning: of a call outside of any owner.
        """
        if self.calls == 1:
            return 0
        running = self._places.get(_thread())
        if not running:
            if not torch.compiler.is_compiling():
                self._refuse_recomputation()
                warnings.warn(f"a {type(self).__name__} with a step for each of its {self.calls} calls was called "
                              "outside of the forwards that it counts them in, and takes its first step: call the "
                              "module around it, and not its .forward or another method of it, or prepare with "
                              "QATConfig(step_per_call=False)", stacklevel=3)  # fmt: skip
            return 0
        call, last = running[-1]
        running[-1][0] = min(call + 1, last)
        return call

    def _refuse_recomputation(self) -> None:
        if is_in_backward():
            raise RuntimeError("backward recomputes a part of a forward, and with it one call of a module that is "
                               f"called {self.calls} times: checkpoint the module around it as a whole, or "
                               "prepare with QATConfig(step_per_call=False)")  # fmt: skip


class _Owner:
    """The hooks of one owner: (module, numbers of its first and last place here) for each counted module it calls."""

    def __init__(self, places: list[tuple[nn.Module, int, int]]) -> None:
        self.places = places

    def enter(self, *_) -> None:
        for module, first, last in self.places:
            module._places.setdefault(_thread(), []).append([first, last])

    def leave(self, *_) -> None:
        for module, _, _ in self.places:
            running = module._places[_thread()]
            running.pop()
            if not running:
                del module._places[_thread()]


def count_calls(places: dict[nn.Module, list[tuple[nn.Module, int]]]) -> None:
    """Hook the owners of counted modules.

    Args:
        places: {counted module: [(owner, how many calls its forward makes), ...]}. Each counted module's ``calls``
            becomes the sum.
    """
    owners: dict[nn.Module, list[tuple[nn.Module, int, int]]] = {}
    for module, callers in places.items():
        first = 0
        for owner, count in callers:
            owners.setdefault(owner, []).append((module, first, first + count - 1))
            first += count
        module.calls, module._places = first, {}
    for owner, mine in owners.items():
        hooks = _Owner(mine)
        owner.register_forward_pre_hook(hooks.enter)
        owner.register_forward_hook(hooks.leave, always_call=True)
