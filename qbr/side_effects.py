"""Running the code of a module without a trace of it: what it changed is put back, and named."""

from __future__ import annotations

import operator
import random
from collections import deque

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from qbr.calls import joined

_ABSENT = object()
_TABLES = ("_parameters", "_buffers", "_modules")  # where nn.Module keeps attributes


class Undone:
    """A context at whose end all is as before: the attributes of owner and of the modules in it, the items of lists,
    dicts, sets and deques among them, the values of all tensors that were written to, and the global random number
    generators of Python, numpy and torch. What other objects hold is not looked into.

    Attributes:
        drew: afterwards, whether random numbers were drawn.
        unrepeatable: afterwards, what was done that a record of the operations on stand-ins would not repeat, in words.
    """

    def __init__(self, owner: nn.Module) -> None:
        self.owner = owner
        self.drew = False
        self.unrepeatable: list[str] = []

    def __enter__(self) -> Undone:
        self._attributes, self._containers, self._data = [], [], []
        for prefix, module in self.owner.named_modules():
            for table in (module.__dict__, *(module.__dict__[name] for name in _TABLES)):
                self._attributes.append((prefix, table, dict(table)))
            for key, value in module.__dict__.items():
                if isinstance(value, (list, dict, set, deque)) and key not in _TABLES:
                    self._containers.append((joined(prefix, key), value, _items(value) if value else []))
        for name, tensor in (*self.owner.named_parameters(), *self.owner.named_buffers()):
            if type(tensor) in (Tensor, nn.Parameter):
                self._data.append((name, tensor, tensor.data))
        self._generators = Generators()
        self._watch = _Watch().__enter__()
        return self

    def __exit__(self, *error) -> None:
        self._watch.__exit__(*error)
        self.drew = self._generators.put_back()
        self.unrepeatable += self._watch.seen
        for data, before in reversed(self._watch.overwritten):
            data.copy_(before)
        for name, tensor, data in self._data:
            if tensor.data_ptr() != data.data_ptr():
                tensor.data = data
                self.unrepeatable.append(f"it replaces the values of {name}")
        for name, container, before in self._containers:
            if (container or before) and not _same(_items(container), before):
                container.clear()
                (container.extend if isinstance(container, (list, deque)) else container.update)(before)
                self._note(name)
        for prefix, table, before in self._attributes:
            changed = [key for key in {**before, **table} if before.get(key, _ABSENT) is not table.get(key, _ABSENT)]
            if changed:
                table.clear()
                table.update(before)
            for key in changed:
                self._note(joined(prefix, key))

    def _note(self, name: str) -> None:
        if name != "training" and not name.startswith("_tensor_constant"):  # these two are tracing's own
            self.unrepeatable.append(f"it changes {name}")


class _Watch(TorchDispatchMode):
    """Keeps what operations write over; notes writes, and values that Python reads."""

    def __init__(self) -> None:
        super().__init__()
        self.overwritten: list[tuple[Tensor, Tensor]] = []
        self.seen: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is torch.ops.aten._local_scalar_dense.default:
            self.seen.append("it looks at a tensor's values")
        if func._schema.is_mutable:
            self.seen.append("it writes to a tensor in place")
            given = {**{a.name: v for a, v in zip(func._schema.arguments, args)}, **kwargs}
            for argument in func._schema.arguments:
                if argument.alias_info is not None and argument.alias_info.is_write:
                    value = given.get(argument.name)
                    for tensor in value if isinstance(value, (list, tuple)) else [value]:
                        if isinstance(tensor, Tensor):
                            self.overwritten.append((tensor.data, tensor.clone()))
        return func(*args, **kwargs)


class Generators:
    """The state of the global random number generators, those of CUDA only where it is in use."""

    def __init__(self) -> None:
        self.cuda = torch.cuda.is_initialized()
        self.before = self._states()

    def _states(self) -> list:
        cuda = torch.cuda.get_rng_state_all() if self.cuda else []
        return [random.getstate(), np.random.get_state(), torch.get_rng_state(), *cuda]

    def put_back(self) -> bool:
        """Whether they had moved."""
        python, numpy, cpu, *cuda = self.before
        python_now, *others = self._states()
        moved = python_now != python or not all(map(_equal, others, self.before[1:]))
        if moved:
            random.setstate(python)
            np.random.set_state(numpy)
            torch.set_rng_state(cpu)
            if self.cuda:
                torch.cuda.set_rng_state_all(cuda)
        return moved


def _equal(a, b) -> bool:
    """Whether two states, or tuples with arrays among them, are the same."""
    if isinstance(a, tuple):
        return len(a) == len(b) and all(map(_equal, a, b))
    return bool((a == b).all()) if isinstance(a, (Tensor, np.ndarray)) else a == b


def _items(container) -> list:
    return list(container.items() if isinstance(container, dict) else container)


def _same(a: list, b: list) -> bool:
    """Whether two lists of items, or of (key, value), have the same objects."""
    return len(a) == len(b) and all(
        x is y or (isinstance(x, tuple) and isinstance(y, tuple) and len(x) == len(y) and all(map(operator.is_, x, y)))
        for x, y in zip(a, b)
    )
