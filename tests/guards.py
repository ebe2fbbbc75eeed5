"""What proves the absence of something: a mode under which every read of a tensor's value by the host is an error."""

from __future__ import annotations

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

# Operators that make the host wait for a device (their result, or its size, is on the host).
_WAITING_OPS = {"_local_scalar_dense", "is_nonzero", "nonzero", "masked_select", "equal", "_unique2", "allclose"}
# Methods that read values without an operator of their own where the tensor is on the CPU already.
_WAITING_CALLS = {
    "item", "tolist", "numpy", "cpu", "__bool__", "__float__", "__int__", "__index__", "__array__", "__contains__",
}  # fmt: skip


class HostRead(AssertionError):
    """The host has read a tensor's value."""


class _Calls(TorchFunctionMode):
    def __init__(self, guard):
        super().__init__()
        self.guard = guard

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if getattr(func, "__name__", "") in _WAITING_CALLS:
            self.guard.found(f"Tensor.{func.__name__}")
        return func(*args, **(kwargs or {}))


class _Ops(TorchDispatchMode):
    def __init__(self, guard):
        super().__init__()
        self.guard = guard

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = func._schema.name.partition("::")[2]
        masked = name in ("index", "index_put", "index_put_") and any(
            i is not None and i.dtype in (torch.bool, torch.uint8) for i in args[1]
        )
        moved = name in ("_to_copy", "copy_") and len(_devices(args) | _devices(kwargs.values())) > 1
        if name in _WAITING_OPS or masked or moved:
            self.guard.found(str(func))
        return func(*args, **kwargs)


def _devices(values) -> set[str]:
    return {v.device.type if isinstance(v, torch.Tensor) else v.type for v in values if hasattr(v, "device") or
            isinstance(v, torch.device)}  # fmt: skip


class no_host_reads:
    """Inside, a read of a tensor's value by the host is an error (``count=True``: is counted in ``reads``)."""

    def __init__(self, count: bool = False) -> None:
        self.count = count
        self.reads: list[str] = []
        self._modes = (_Calls(self), _Ops(self))

    def found(self, what: str) -> None:
        self.reads.append(what)
        if not self.count:
            raise HostRead(f"{what}: the host waits for the device here")

    def __enter__(self):
        for mode in self._modes:
            mode.__enter__()
        return self

    def __exit__(self, *error):
        for mode in reversed(self._modes):
            mode.__exit__(*error)
