"""SGD, its learning rate over the steps, and torch.compile of a training forward."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.optim.lr_scheduler import CosineAnnealingLR, LambdaLR, LRScheduler

import qbr

from . import processes
from .files import UserError
from .models import first_and_last

SCHEDULES = ("cosine", "onecycle")
WARMUP = {"cosine": 0.0, "onecycle": 0.2}  # --lr-warmup where it is not given
COMPILE_MODES = ("none", "default", "reduce-overhead", "max-autotune")
BACKEND = "inductor"  # torch.compile's; tests that have no minute for it put "aot_eager" here


def sgd(model: nn.Module, options: Any, quantized: bool) -> torch.optim.SGD:
    """SGD with momentum; of a quantized model the alphas have their own group, without weight decay."""
    rates = {"lr": options.lr, "weight_decay": options.weight_decay}
    if quantized:
        alphas = {"alpha_lr": options.lr_alpha, "act_alpha_lr": options.lr_alpha_act}
        if options.lr_alpha_first_last is not None:
            ends = [f"{name}.weight_quantizer" for name in first_and_last(model)]
            alphas["alpha_lr_overrides"] = dict.fromkeys(ends, options.lr_alpha_first_last)
        groups = qbr.parameter_groups(model, **alphas, **rates)
    else:
        groups = [{"params": list(model.parameters()), **rates}]
    # The fused form skips a step on the device where found_inf says so: NaN never reaches the weights.
    return torch.optim.SGD(groups, lr=options.lr, momentum=options.momentum, nesterov=options.nesterov, fused=True)


def schedule(optimizer: torch.optim.Optimizer, options: Any, steps: int) -> LRScheduler:
    """The learning rate over ``steps`` steps: up to lr in a straight line (--lr-warmup), then down to 0.

    The straight line down is the triangular schedule of the fast CIFAR-10 recipes (Page, How to Train Your ResNet,
    2018), Smith's one-cycle policy (arXiv 1708.07120) with a constant momentum.
    """
    if options.lr_schedule == "cosine" and options.lr_warmup == 0:
        return CosineAnnealingLR(optimizer, T_max=steps)
    return LambdaLR(optimizer, factor(options.lr_schedule, steps, options.lr_warmup))


def factor(name: str, steps: int, warmup: float) -> Callable[[int], float]:
    """What lr is multiplied with in step 0 to steps - 1: never 0 there, and 1 at the end of the warm-up."""
    rising = round(warmup * steps)

    def at(step: int) -> float:
        if step < rising:
            return (step + 1) / rising
        left = max(steps - step, 0) / (steps - rising) if steps > rising else 0.0
        return left if name == "onecycle" else (1 - math.cos(math.pi * left)) / 2

    return at


def rise(name: str, begin: int, steps: int) -> Callable[[float], float] | None:
    """What multiplies the lambdas from step ``begin``, the first with BR, to ``steps`` - 1, the last; None: nothing."""
    if name == "constant" or begin >= steps - 1:
        return None
    return qbr.schedules.Cosine(0.0, 1.0, begin=begin, until=steps - 1)


def compiled(forward: Callable, mode: str) -> Callable:
    """``forward`` as one graph for every shape and every phase of AlphaControl; as it is with mode "none".

    Raises:
        UserError: in several processes, whose gradients DistributedDataParallel exchanges by hooks of its own.
    """
    if mode == "none":
        return forward
    if processes.world() > 1:
        raise UserError(f"--compile {mode}: works in a single process alone; leave it out under torchrun")
    torch.compiler.reset()  # the graphs of an earlier run would count against this one's limit of recompilations
    call = torch.compile(forward, fullgraph=True, dynamic=False, backend=BACKEND, mode=mode)
    if mode == "default":
        return call

    def in_a_new_step(*args):
        torch.compiler.cudagraph_mark_step_begin()  # what the graphs of the last step left may be overwritten
        return call(*args)

    return in_a_new_step
