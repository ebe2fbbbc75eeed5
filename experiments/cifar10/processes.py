"""Several processes on one batch, as torchrun starts them; in a single process everything here does nothing."""

from __future__ import annotations

import contextlib
import gc
import os
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .files import UserError


@contextlib.contextmanager
def joined(gpu: int):
    """Inside, the processes that torchrun started are one group; all but rank 0 print nothing.

    Args:
        gpu: --gpu; below 0 or without CUDA the group talks by gloo, otherwise by NCCL, a device for each process.
    """
    if int(os.environ.get("WORLD_SIZE", 1)) == 1 and world() == 1:
        yield
        return
    ours = not dist.is_initialized()
    if ours:
        cuda = gpu >= 0 and torch.cuda.is_available()
        if cuda:
            torch.cuda.set_device(local_rank())
        dist.init_process_group("nccl" if cuda else "gloo")
    try:
        with contextlib.ExitStack() as stack:
            if rank():
                stack.enter_context(contextlib.redirect_stdout(stack.enter_context(open(os.devnull, "w"))))
            yield
    finally:
        if ours:
            gc.collect()  # a cycle may hold a model, and that a thread of gloo's, which Python's end would abort
            dist.destroy_process_group()


def world() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    return dist.get_rank() if world() > 1 else 0


def local_rank() -> int:
    """This process's number on its machine."""
    return int(os.environ.get("LOCAL_RANK", 0))


def label() -> str:
    """What an error begins with: the rank, but for rank 0, whose error the others mostly repeat."""
    number = os.environ.get("RANK", "0")
    return "" if number == "0" else f"[rank {number}] "


def share(start: int, stop: int) -> slice:
    """This process's part of the images start to stop."""
    size, of, mine = stop - start, world(), rank()
    return slice(start + size * mine // of, start + size * (mine + 1) // of)


def on_main(function: Callable, *args) -> Any:
    """What function(*args) returns on rank 0, which alone calls it, on every rank; its UserError too. With any other
    error of rank 0 the others end by a UserError."""
    if world() == 1:
        return function(*args)
    answer: list = [None]
    if rank() == 0:
        try:
            answer = [(function(*args), None)]
        except UserError as error:
            answer = [(None, error)]
        except Exception:  # the others wait for an answer: they end with it, and this rank with what it is
            dist.broadcast_object_list([(None, UserError("rank 0 has failed"))], src=0)
            raise
    dist.broadcast_object_list(answer, src=0)
    result, error = answer[0]
    if error is not None:
        raise error
    return result


@contextlib.contextmanager
def first_on_each_machine(wanted: bool):
    """With ``wanted`` the first process of every machine runs the block before the others do."""
    wanted = wanted and world() > 1
    if wanted and local_rank() > 0:
        dist.barrier()
    try:
        yield
    finally:  # after an error, too, which the others meet then
        if wanted and local_rank() == 0:
            dist.barrier()


def total(values: Tensor) -> Tensor:
    """The sum over all ranks, in place."""
    if world() > 1:
        dist.all_reduce(values)
    return values


def largest(value: Tensor) -> Tensor:
    """The largest over all ranks, in place."""
    if world() > 1:
        dist.all_reduce(value, op=dist.ReduceOp.MAX)
    return value


def each(value: Any) -> list:
    """Every rank's value."""
    values = [value] * world()
    if world() > 1:
        dist.all_gather_object(values, value)
    return values


def as_on_main(model: nn.Module, weights: bool = False) -> None:
    """Give every rank rank 0's buffers (BatchNorm's statistics), as DistributedDataParallel does before a step.

    weights: its parameters, too.
    """
    if world() > 1:
        for tensor in (*model.buffers(), *(model.parameters() if weights else ())):
            dist.broadcast(tensor.detach(), src=0)


def parallel(model: nn.Module, device: torch.device) -> nn.Module:
    """model as it is to be called in training; it begins on every rank with rank 0's weights."""
    if world() == 1:
        return model
    return nn.parallel.DistributedDataParallel(model, device_ids=[device] if device.type == "cuda" else None)
