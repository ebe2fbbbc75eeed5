"""The guard around every optimizer's step: alpha stays positive, and an optimizer that lacks a step size is noticed.

Every live quantizer is known here, so that an optimizer's alphas are found by identity: this survives deepcopy, pickle,
.to() and load_state_dict(assign=True), as no mark on the parameter does.
"""

from __future__ import annotations

import gc
import weakref

import torch
from torch import nn
from torch._compile import _disable_dynamo  # torch.compiler.disable imports torch._dynamo at once, which takes seconds
from torch.nn.utils.parametrize import is_parametrized
from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from qbr import distributed

LARGEST_SHRINK = 10.0  # one optimizer step leaves at least alpha / 10 ...
SMALLEST_ALPHA = 1e-8  # ... and never less than this, so that x / alpha stays finite for every ordinary x

_live: weakref.WeakSet[nn.Module] = weakref.WeakSet()
# What was noted before the steps that run: a subclass's step may call its parent's, which torch hooks, too.
_before: weakref.WeakKeyDictionary[Optimizer, list[tuple]] = weakref.WeakKeyDictionary()
_DEEPEST = 8  # a step that raised leaves its notes there
# {quantizer: (owner, name) of the parameters beside it}; a reference to one would forbid torch.utils.swap_tensors.
_beside: weakref.WeakKeyDictionary[nn.Module, list[tuple]] = weakref.WeakKeyDictionary()
_checked: weakref.WeakSet[Optimizer] = weakref.WeakSet()
_met: weakref.WeakSet[Optimizer] = weakref.WeakSet()  # so that many (one for each parameter) search all objects once
_DIRECTIONS = ("momentum_buffer", "exp_avg")  # what torch's optimizers call the mean of the gradients so far
_hooks: list = []


def register(quantizer: nn.Module) -> None:
    """Guard a quantizer's alpha in every optimizer's step from now on, as long as it lives."""
    _live.add(quantizer)
    if not _hooks:
        _hooks.extend([register_optimizer_step_pre_hook(_before_step), register_optimizer_step_post_hook(guard_step)])


def remember(model: nn.Module, quantizers: dict[str, nn.Module], weights: list[tuple]) -> None:
    """Note for each quantizer of model the parameters beside it, so that an optimizer without its alpha is noticed.

    For a weight's, (quantizer, layer, name) in ``weights``, that is itself; for an activation's all of the smallest
    module around it that has any.
    """
    check_again()  # an optimizer may have stepped before these were there
    own = {quantizer: [(weakref.ref(owner), name)] for quantizer, owner, name in weights}
    for name, quantizer in quantizers.items():
        beside = own.get(quantizer, [])
        while name and not beside:
            name = name.rpartition(".")[0]
            beside = [
                (weakref.ref(owner), parameter)
                for owner in model.get_submodule(name).modules()
                if owner not in _live
                for parameter, value in owner._parameters.items()
                if value is not None
            ]
        _beside[quantizer] = beside


def check_again() -> None:
    """Look at every optimizer once more in its next step: there are new step sizes, or some have been released."""
    _checked.clear()


def _are_moved(parameters: list[tuple], owned: set[int]) -> bool:
    """Whether the optimizer of these ids has the parameters (owner, name), all that are trained."""
    alive = [p for owner, name in parameters if owner() is not None for p in _now(owner(), name)]
    return any(id(p) in owned for p in alive) and all(id(p) in owned or not p.requires_grad for p in alive)


def _now(owner: nn.Module, name: str) -> list[nn.Parameter]:
    """What has become of a parameter: itself, or what pruning or a parametrization has made of it."""
    own = owner._parameters.get(name, owner._parameters.get(f"{name}_orig"))
    if own is None and is_parametrized(owner, name):
        return list(owner.parametrizations[name].parameters())
    return [] if own is None else [own]


def _elsewhere() -> set[int]:
    """The ids of what the optimizers have that were met so far, and live."""
    return {id(p) for optimizer in list(_met) for group in optimizer.param_groups for p in group["params"]}


def _check_optimizer(optimizer: Optimizer, owned: set[int]) -> None:
    """Raise RuntimeError, at every step of it, if this optimizer moves weights whose step sizes no optimizer has."""
    steps = {q: q._parameters.get("alpha") for q in _beside}  # None while FSDP1 holds it
    if any(distributed.local(p) is not p for group in optimizer.param_groups for p in group["params"]):
        # FSDP2's are there as ordinary tensors, which no optimizer has, from a forward to its backward.
        steps = {q: alpha for q, alpha in steps.items() if alpha is not None and distributed.local(alpha) is not alpha}
    alphas = {
        id(alpha)
        for q, alpha in steps.items()
        if alpha is not None and alpha.requires_grad and id(alpha) not in owned and _are_moved(_beside[q], owned)
    }
    alphas -= _elsewhere()
    if alphas:  # torch keeps no list of optimizers; issubclass, since isinstance asks lazy objects what they stand for
        _met.update(each for each in gc.get_objects() if issubclass(type(each), Optimizer))
        alphas -= _elsewhere()
    if alphas:
        raise RuntimeError(
            f"this {type(optimizer).__name__} has weights of a model of which {len(alphas)} step sizes (alpha) are in "
            "no optimizer, so they would never be trained. Was it built before prepare()? Build it afterwards, from "
            "qbr.parameter_groups(model, ...); to keep step sizes as they are, set their requires_grad to False"
        )
    _checked.add(optimizer)


@_disable_dynamo  # a compiled step would be compiled anew whenever a quantizer comes or goes
@torch.no_grad()
def _before_step(optimizer: Optimizer, args, kwargs) -> None:
    """Note the values of this optimizer's frozen alphas, and the least that each of the others may have afterwards."""
    owned = {id(p) for group in optimizer.param_groups for p in group["params"]}
    if optimizer not in _checked:
        _check_optimizer(optimizer, owned)
    mine = [q for q in _live if id(q._parameters.get("alpha")) in owned]
    frozen = [q for q in mine if q.frozen]
    if optimizer.state:  # else it may be a checkpoint's loader, which makes the state of what has a gradient
        for q in frozen:
            q.alpha.grad = None  # an optimizer leaves a parameter without gradient alone, its momentum included
        _forget_directions(optimizer, frozen)
    # A closure makes gradients anew, inside of the step; and some optimizers move what has no gradient, too.
    held = [(weakref.ref(q), distributed.local(q.alpha)) for q in frozen if q.initialised]
    values = torch._foreach_mul([alpha for _, alpha in held], 1.0) if held else []
    moving = [q for q in mine if q.alpha.requires_grad and not q.frozen]
    alphas = [distributed.local(q.alpha) for q in moving]
    floors = torch._foreach_div(alphas, LARGEST_SHRINK) if alphas else []
    for q, floor in zip(moving, floors):
        if not q.initialised:  # its first forward, in a closure, sets it from data: there is no value before
            floor.zero_()
    if floors:
        torch._foreach_clamp_min_(floors, SMALLEST_ALPHA)
    notes = _before.setdefault(optimizer, [])
    notes.append((weakref.WeakSet(mine), alphas, floors, held, values))
    del notes[:-_DEEPEST]


def _forget_directions(optimizer: Optimizer, quantizers: list[nn.Module]) -> None:
    """Clear what past gradients have left for these alphas: released epochs later, they would go on that way."""
    states = [optimizer.state.get(quantizer._parameters.get("alpha"), {}) for quantizer in quantizers]
    means = [state.get(name) for state in states for name in _DIRECTIONS]
    means = [distributed.local(mean) for mean in means if isinstance(mean, torch.Tensor)]
    if means:
        torch._foreach_zero_(means)


def confirm() -> None:
    """Read once, for all quantizers, whether the forward that has just set step sizes from data could."""
    quantizers = [quantizer for quantizer in list(_live) if quantizer._unconfirmed]
    if not quantizers or torch._guards.active_fake_mode() is not None:
        return
    # Neither fake nor on meta, as copies of a model that is in use may be.
    quantizers = [q for q in quantizers if type(q.init_state) is torch.Tensor and not q.init_state.is_meta]
    capturing = torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()
    if not quantizers or capturing:
        return
    device = quantizers[0].init_state.device
    states = torch.stack([quantizer.init_state[0].to(device) for quantizer in quantizers]).tolist()
    for quantizer, state in zip(quantizers, states):
        quantizer.confirm(state)


@_disable_dynamo
@torch.no_grad()
def guard_step(optimizer: Optimizer, args=(), kwargs=None) -> None:
    """Keep alpha positive after any torch.optim step: alpha = max(alpha, alpha before the step / 10, 1e-8); and a
    frozen one as it was.

    Runs by itself after every ``optimizer.step()`` once a quantizer exists; a few fused operations for all alphas of
    the optimizer, no synchronisation (but one after the first forward has set alphas from data: see
    LSQQuantizer.confirm), no state. A NaN stays a NaN. Bin losses that nobody asked for go here too:
    after the step their graph is stale.
    """
    notes = _before.get(optimizer)
    mine, alphas, floors, held, values = notes.pop() if notes else ((), [], [], [], [])
    if alphas:
        torch._foreach_maximum_(alphas, floors)
    # A closure may have released some.
    still = [(alpha, value) for (q, alpha), value in zip(held, values) if q() is not None and q().frozen]
    if still:
        torch._foreach_copy_(*map(list, zip(*still)))
    confirm()
    for quantizer in mine:
        if quantizer._retained:
            quantizer._retained = []
        if quantizer.observer is not None:
            quantizer.observer.stepped()
