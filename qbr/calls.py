"""Which call of a module this is: a module that its owner's forward calls several times tells its calls apart."""

from __future__ import annotations

import torch
from torch import nn

_IDLE = -1  # no owner's forward is running


def joined(name: str, child: str) -> str:
    """The full name of a child of the module of that name; "" is the root."""
    return f"{name}.{child}" if name else child


class Counted:
    """A mixin for a module with something of its own for every place that calls it.

    The places are numbered from 0 over all owners (the modules whose forward calls it). ``count_calls`` hooks the
    owners, so that every run of an owner's forward starts with the owner's first place and stays at its last:
    recomputation by activation checkpointing and a block that runs twice (shared weights) find the same number as the
    first run did.
    """

    calls = 1
    _call = _last = _IDLE

    def next_call(self) -> int:
        """The number of the call that is being made; beyond the owner's last place, the last; outside of any owner, 0.

        Raises:
            RuntimeError: in a recomputation of a part of the owner's forward, where the number cannot be known.
        """
        if self.calls == 1:
            return 0
        call = self._call
        if call == _IDLE:
            if not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1:
                raise RuntimeError("backward recomputes a part of a forward, and with it one call of a module that is "
                                   f"called {self.calls} times: checkpoint the module around it as a whole, or "
                                   "prepare with QATConfig(step_per_call=False)")  # fmt: skip
            return 0
        self._call = min(call + 1, self._last)
        return call


class _Owner:
    """The hooks of one owner: (module, numbers of its first and last place here) for each counted module it calls."""

    def __init__(self, places: list[tuple[nn.Module, int, int]]) -> None:
        self.places = places
        self.outer: list[list[tuple[int, int]]] = []  # what to go back to: forwards can nest

    def enter(self, *_) -> None:
        self.outer.append([(module._call, module._last) for module, _, _ in self.places])
        for module, first, last in self.places:
            module._call, module._last = first, last

    def leave(self, *_) -> None:
        for (module, _, _), (call, last) in zip(self.places, self.outer.pop()):
            module._call, module._last = call, last

    def __getstate__(self):
        return {"places": self.places, "outer": []}


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
        module.calls = first
    for owner, mine in owners.items():
        hooks = _Owner(mine)
        owner.register_forward_pre_hook(hooks.enter)
        owner.register_forward_hook(hooks.leave, always_call=True)
