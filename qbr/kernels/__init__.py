"""The table of backends: which can run here, which one a tensor gets, and why another cannot.

A backend is a module with ``DTYPES``, ``load(device_type)`` and either the op functions under the names of
qbr/ops.py or a compiled library that registers them. ``load`` raises BackendUnavailable, with the remedy, for
what is absent (normal: "auto" takes the next one) and anything else for what is broken (which "auto" passes on).
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch

MODULES = {
    "reference": "qbr.kernels.reference",
    "native": "qbr.kernels.native",
    "triton": "qbr.kernels.triton_backend",
}
LIST_MODULES = {"triton": "qbr.kernels.triton_lists"}  # Python backends with functions of their own for lists
AUTO_ORDER = {"cuda": ("triton", "native", "reference"), "cpu": ("native", "reference")}

_preferred: ContextVar[str] = ContextVar("qbr_backend", default="auto")
_resolved: dict[tuple[str, str, torch.dtype], str] = {}


class BackendUnavailable(RuntimeError):
    """A backend cannot be had here; the message says what is missing and how to get it."""


def module(name: str):
    """A backend's module, imported; that of "triton" needs no Triton to be imported."""
    return importlib.import_module(MODULES[name])


def list_functions(name: str) -> dict:
    """A Python backend's own functions over lists, {"foreach_lsq_fwd": ...}; none for most."""
    found = vars(importlib.import_module(LIST_MODULES[name])) if name in LIST_MODULES else {}
    return {op: function for op, function in found.items() if op.startswith("foreach_")}


def is_dense(x: torch.Tensor) -> bool:
    """Whether kernels can walk x in storage order as it lies; the layouts that a copy can be asked to keep."""
    return (
        x.is_contiguous()
        or (x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last))
        or (x.dim() == 5 and x.is_contiguous(memory_format=torch.channels_last_3d))
    )


def check_dense(x: torch.Tensor) -> None:
    """Raise RuntimeError unless x is dense: the ops' callers have seen to it, code that was compiled may undo it."""
    if not is_dense(x):
        raise RuntimeError(f"x is not dense (shape {tuple(x.shape)}, strides {x.stride()}): pass x.contiguous(); in "
                           "code that an older version of qbr compiled, clear torch.compile's caches")  # fmt: skip


def laid_out_like(grad: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """grad in x's dtype and strides, copied only where they differ: kernels walk both in storage order.

    Backends ask again, though the ops have: code that inductor has compiled may lay the two out differently.
    """
    if grad.dtype == x.dtype and grad.stride() == x.stride():
        return grad
    return torch.empty_like(x).copy_(grad)


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Prefer one backend ("auto", "triton", "native", "reference") for the calls inside that name none.

    The backward of a call runs on the backend of its forward, wherever it runs. torch.compile takes the choice
    that holds when it traces.
    """
    _check_name(name)
    token = _preferred.set(name)
    try:
        yield
    finally:
        _preferred.reset(token)


def resolve(requested: str, device_type: str, dtype: torch.dtype) -> str:
    """The backend that runs a tensor of this device and dtype; loads it (and builds it) on first use.

    Raises:
        ValueError: for a name that is no backend.
        BackendUnavailable: if the one that was named cannot be had, or does not take the dtype.
    """
    if requested == "auto":
        requested = _preferred.get()
    key = (requested, device_type, dtype)
    if key not in _resolved:
        _resolved[key] = _choose(requested, device_type, dtype)
    return _resolved[key]


def _check_name(name: str) -> None:
    if name != "auto" and name not in MODULES:
        raise ValueError(f"backend={name!r}: expected 'auto' or one of {', '.join(map(repr, MODULES))}")


def _choose(requested: str, device_type: str, dtype: torch.dtype) -> str:
    _check_name(requested)
    if requested != "auto":
        backend = module(requested)
        if dtype not in backend.DTYPES:
            raise BackendUnavailable(
                f"backend={requested!r} does not take {dtype} (it takes {', '.join(map(str, backend.DTYPES))}); "
                "use backend='reference' or cast x"
            )
        backend.load(device_type)
        return requested
    for name in AUTO_ORDER.get(device_type, ("reference",)):
        backend = module(name)
        if dtype not in backend.DTYPES:
            continue
        try:
            backend.load(device_type)
        except BackendUnavailable:
            continue
        return name
    raise AssertionError("the reference backend runs everywhere")


class BackendTable(dict[str, dict[str, str | None]]):
    """{backend: {device: None if it runs there, else what is missing and how to get it}}; prints as a table."""

    def __str__(self) -> str:
        rows = [
            f"{name:<10} {device:<5} {'available' if reason is None else reason}"
            for name, by_device in self.items()
            for device, reason in by_device.items()
        ]
        return "\n".join(rows)


def backends() -> BackendTable:
    """What can run here, and why the rest cannot. Loads (and where it can, builds) every backend."""
    table = BackendTable()
    for name in MODULES:
        table[name] = {}
        for device_type in ("cpu", "cuda"):
            if device_type == "cuda" and not torch.cuda.is_available():
                build = "" if torch.version.cuda else " (a CPU-only build)"
                table[name]["cuda"] = f"torch sees no CUDA device{build}"
                continue
            try:
                module(name).load(device_type)
                table[name][device_type] = None
            except Exception as error:  # a report: a broken backend is told here, and raises where it is used
                table[name][device_type] = f"{type(error).__name__}: {error}"
    return table
