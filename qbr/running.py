"""Running a model on data without leaving a trace in it: what a batch is, and what is put back afterwards."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Mapping
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from qbr.quantizers import LSQQuantizer
from qbr.side_effects import Generators

Model = TypeVar("Model", bound=nn.Module)


def unwrapped(model: nn.Module) -> nn.Module:
    """The module inside the wrappers of torch.compile, DistributedDataParallel and AveragedModel: hooks work on it, and
    its forward waits for no other process."""
    while True:
        if hasattr(model, "_orig_mod"):
            model = model._orig_mod
        elif isinstance(model, (nn.parallel.DistributedDataParallel, nn.DataParallel, AveragedModel)):
            model = model.module
        else:
            return model


@contextmanager
def undisturbed(model: nn.Module):
    """No gradients; afterwards all buffers (those of quantizers excepted), also those that a forward assigns anew, and
    the global random number generators of Python, numpy and torch are as before."""
    owners = [module for module in model.modules() if not isinstance(module, LSQQuantizer)]
    buffers = [(owner, name, buffer) for owner in owners for name, buffer in owner._buffers.items()]
    before = [None if buffer is None else buffer.clone() for *_, buffer in buffers]
    generators = Generators()
    with torch.no_grad():
        try:
            yield
        finally:
            generators.put_back()
            for (owner, name, buffer), values in zip(buffers, before):
                owner._buffers[name] = buffer if buffer is None else buffer.copy_(values)


def copied(model: nn.Module) -> nn.Module:
    """A deepcopy, also of a model with tensors of a graph as attributes, which the hook of the older weight_norm leaves
    there: their values."""
    in_graph = [(module.__dict__, name, value) for module in model.modules() for name, value in module.__dict__.items()
                if isinstance(value, Tensor) and value.grad_fn is not None]  # fmt: skip
    try:
        for attributes, name, value in in_graph:
            attributes[name] = value.detach()
        twin = copy.deepcopy(model)
    finally:
        for attributes, name, value in in_graph:
            attributes[name] = value
    modes = {name: module.training for name, module in model.named_modules()}
    for name, module in twin.named_modules():  # torchvision's GraphModules begin in training mode
        if module.training != modes[name]:
            module.train(modes[name])
    return twin


def device_of(model: nn.Module) -> torch.device:
    """That of the first parameter or buffer."""
    return next((t.device for t in (*model.parameters(), *model.buffers())), torch.device("cpu"))


def device_beside(model: nn.Module, name: str) -> torch.device:
    """Where the module of that name gets its input, of a model that may be spread over devices: that of what stands
    last before it in the smallest module around it that has a parameter or buffer, or of the first one there."""
    path = name
    while path:
        path, _, last = path.rpartition(".")
        around, before = model.get_submodule(path), []
        for child_name, child in around.named_children():
            if child_name == last:
                break
            before += [*child.parameters(), *child.buffers()]
        found = before[-1:] or [*around.parameters(), *around.buffers()]
        if found:
            return found[0].device
    return device_of(model)


def arguments(batch) -> tuple[tuple, dict]:
    """(args, kwargs) of a call of a model with a batch: a tensor, the first of a tuple or list, a dict's items.

    Raises:
        TypeError: for anything else.
    """
    if isinstance(batch, (tuple, list)) and batch:
        batch = batch[0]
    if isinstance(batch, Tensor):
        return (batch,), {}
    if isinstance(batch, Mapping):
        return (), dict(batch)
    raise TypeError(f"a batch is a {type(batch).__name__}: expected a tensor, a tuple or list that starts with the "
                    "model's input, or a dict of the model's arguments; or name forward=")  # fmt: skip


def run(model: nn.Module, batch) -> None:
    """model(batch) for a tensor, model(batch[0]) for a tuple or list, model(**batch) for a dict; on model's device.

    Raises:
        TypeError: for anything else, and for what model's forward does not take.
    """
    device = device_of(model)
    args, kwargs = arguments(batch)
    args = tuple(value.to(device) for value in args)
    kwargs = {key: value.to(device) if isinstance(value, Tensor) else value for key, value in kwargs.items()}
    try:
        model(*args, **kwargs)
    except TypeError:
        try:
            inspect.signature(model.forward).bind(*args, **kwargs)
        except ValueError:
            pass  # no Python function
        except TypeError as error:
            raise TypeError(f"{type(model).__name__}.forward cannot be called with the batch ({error}): a tensor, or "
                            "the first item of a tuple, is its only argument, a dict names all; for what is called "
                            "otherwise, calibrate takes forward=") from error  # fmt: skip
        raise
