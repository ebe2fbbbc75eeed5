"""The weights of a model are quantized together, once per forward: one call of the backend for all of them.

``watch(model)`` (prepare() and AlphaControl.attach() call it) hooks the root: before its forward all weights that
can be are quantized in one call and left with their quantizers, whose layers pick them up; after it what was left is
dropped. A layer quantizes its weight alone, as it would without this module, wherever the group's result may not be
the tensor that it would have made itself:

- under torch.compile and torch.func's transforms, in a forward that does not go through the root, and for a weight or
  alpha that is not the one that was quantized (functional_call, a parametrization, a hook that replaces it, an update
  in place since);
- inside activation checkpointing, forward and recomputation;
- for a weight that is not there before the layer runs (FSDP: a DTensor, or no storage), from then on also one whose
  layer did not run in the last forward;
- for a weight that is no dense tensor, or one made under torch.inference_mode, which has no version to compare;
- for a layer with forward pre-hooks, which may write to ``weight.data``. Who else writes to it, in place, during a
  forward (a parent, a hook further up) is not seen: under torch.no_grad() ``weight.mul_(...)`` is.

Losses of different weights may have backwards of their own all the same: qbr/saved.py.
"""

from __future__ import annotations

import warnings
from typing import NamedTuple

import torch
from torch import Tensor, nn

from qbr import distributed, functional
from qbr.functional import BinLoss, Bins
from qbr.kernels import is_dense

# Assigns an attribute that is no parameter, module or buffer: nn.Module's own __setattr__ takes as long as a small op.
assign = object.__setattr__


class Ready(NamedTuple):
    """A weight's quantized form, and what it was made from."""

    weight: Tensor
    alpha: Tensor
    versions: tuple[tuple[int, int], tuple[int, int]]
    with_grad: bool
    xhat: Tensor
    entry: BinLoss | None


def quantize_together(model: nn.Module, *_) -> None:
    """Quantize the weights of model's layers in one call, and leave each with its quantizer. A forward pre-hook."""
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active() or is_inside(model):
        return
    groups: dict[bool, list] = {}
    known: dict[int, nn.Module] = {}
    for quantizer, owner, name in weights(model):
        weight = owner._parameters.get(name)
        if known.setdefault(id(weight), quantizer) is not quantizer and weight is not None:
            _warn_of_two_steps(model, weight)
        if quantizer.alone or weight is None or not is_there(weight) or _has_hooks(owner):
            continue  # a hook may write to the weight's .data, which no version tells
        if quantizer.training and not quantizer.initialised:
            continue  # its first forward sets alpha
        alpha = quantizer.alpha
        if weight.is_inference() or alpha.is_inference() or not is_dense(weight):
            continue
        groups.setdefault(quantizer.makes_bins(), []).append((quantizer, weight, alpha))
    grouped: list = []
    for with_bins, members in groups.items():
        if len(members) > 1:
            _quantize(members, with_bins)
            grouped += [quantizer for quantizer, *_ in members]
    assign(model, "_qbr_grouped", grouped)


def _warn_of_two_steps(model: nn.Module, weight: Tensor) -> None:
    if model.__dict__.get("_qbr_told_of_ties"):
        return
    assign(model, "_qbr_told_of_ties", True)
    names = [name for name, each in model.named_parameters(remove_duplicate=False) if each is weight]
    warnings.warn(f"{names} are one weight with a step size for each, which bin_loss counts as often: tie weights "
                  "before prepare", stacklevel=4)  # fmt: skip


def _has_hooks(layer: nn.Module) -> bool:
    """Whether a layer has forward pre-hooks beside those of qbr, which it has as the root of a model."""
    modules = (getattr(hook, "__module__", None) or "" for hook in layer._forward_pre_hooks.values())
    return any(not module.startswith("qbr.") for module in modules)


def weights(model: nn.Module) -> list[tuple[nn.Module, nn.Module, str]]:
    """(quantizer, layer, name of the weight) of all quantized weights: ``weight_quantizer`` is that of ``weight``, and
    so on for every name that ends so, and for those of other parameters. One that tied weights share comes once.

    Warns:
        UserWarning: once a model, of a quantizer that weights share which are not tied (any more).
    """
    found: dict[nn.Module, tuple[nn.Module, nn.Module, str]] = {}
    for module in walk(model):
        for name, child in module._modules.items():
            if not name.endswith("_quantizer") or getattr(child, "kind", None) != "weight":
                continue
            parameter = name.removesuffix("_quantizer")
            own = any(module._parameters.get(each) is not None for each in (parameter, f"{parameter}_orig"))
            if not (own or name.endswith("weight_quantizer")):  # of an input, say: signed, and no weight
                continue
            _, first, its = found.setdefault(child, (child, module, parameter))
            weight, other = module._parameters.get(parameter), first._parameters.get(its)
            if weight is not other and isinstance(weight, nn.Parameter) and isinstance(other, nn.Parameter):
                _warn_of_one_step(model, child)
    return list(found.values())


def _warn_of_one_step(model: nn.Module, quantizer: nn.Module) -> None:
    if torch.compiler.is_compiling() or model.__dict__.get("_qbr_told_of_sharing"):
        return
    assign(model, "_qbr_told_of_sharing", True)
    names = [name for name, each in model.named_modules(remove_duplicate=False) if each is quantizer]
    warnings.warn(f"{names} are one quantizer of weights that are not one: only the one that runs last has a bin loss, "
                  "only the first figures and a part in calibration. Untie before prepare; a state_dict that is loaded "
                  "with assign=True unties: tie again after it", stacklevel=4)  # fmt: skip


def quantized_weights(model: nn.Module) -> dict[nn.Module, Tensor]:
    """{quantizer: its weight}; of a parametrized layer what it is in eval mode, where spectral_norm learns nothing."""
    found = {}
    for quantizer, layer, name in weights(model):
        parametrizations = layer.parametrizations.modules() if hasattr(layer, "parametrizations") else ()
        training = [each for each in parametrizations if each.training]
        for each in training:
            each.training = False
        try:
            found[quantizer] = getattr(layer, name)
        finally:
            for each in training:
                each.training = True
    return found


@torch.no_grad()
def weight_bins(model: nn.Module) -> dict[nn.Module, Bins]:
    """{quantizer: the bins of its weight as it is now}, from one pass over all of them; of shards, gathered."""
    found = quantized_weights(model)
    steps, specs = [distributed.whole(quantizer.alpha) for quantizer in found], [each.spec for each in found]
    results = functional.foreach_bin_loss([distributed.whole(weight) for weight in found.values()], steps, specs)
    return dict(zip(found, (result.bins for result in results)))


def _quantize(members: list, with_bins: bool) -> None:
    quantizers, xs, alphas = (list(each) for each in zip(*members))
    specs = [quantizer.spec for quantizer in quantizers]
    alpha_grads = [quantizer.alpha_grad() for quantizer in quantizers]
    if with_bins:
        to_alpha = [quantizer.bin_loss_to_alpha() for quantizer in quantizers]
        regularizers = [quantizer.regularizer for quantizer in quantizers]
        results = functional.foreach_fake_quantize_with_bin_loss(
            xs, alphas, specs, backprop_to_alpha=to_alpha, regularizer=regularizers, alpha_grad=alpha_grads
        )
        made = [(each.xhat, BinLoss(each.loss, each.bins)) for each in results]
    else:
        made = [(xhat, None) for xhat in functional.foreach_fake_quantize(xs, alphas, specs, alpha_grad=alpha_grads)]
    with_grad = torch.is_grad_enabled()
    for (quantizer, weight, alpha), (xhat, entry) in zip(members, made):
        versions = _state(weight), _state(alpha)
        assign(quantizer, "_ready", Ready(weight, alpha, versions, with_grad, xhat, entry))
        assign(quantizer, "_ready_used", False)


def take(quantizer, weight: Tensor) -> Ready | None:
    """What the group left for this quantizer, if it is what the quantizer would make of ``weight`` now and here."""
    if torch.compiler.is_compiling():  # a part of a model whose root is not: versions would be guarded, and change
        return None
    ready, alpha = quantizer._ready, quantizer.alpha
    if (
        ready is None
        or ready.weight is not weight
        or ready.alpha is not alpha
        or ready.versions != (_state(weight), _state(alpha))
        or ready.with_grad != torch.is_grad_enabled()
        or (ready.entry is not None) != quantizer.makes_bins()
        or are_saves_hooked()
        or is_in_backward()
    ):
        return None
    assign(quantizer, "_ready_used", True)
    return ready


def _state(tensor: Tensor) -> tuple[int, int]:
    """What changes with a tensor's values: its version, and with ``tensor.data = ...`` its place."""
    return tensor._version, tensor.data_ptr()


def drop(model: nn.Module, args=(), output=None) -> None:
    """Forget what the forward has not used; a layer that did not use it quantizes alone from now on, unless the
    forward was broken off (output is None). A forward hook."""
    if is_inside(model):
        return
    mark_roots(model, False)
    if torch.compiler.is_compiling():
        return
    for quantizer in model.__dict__.pop("_qbr_grouped", ()):
        if not quantizer._ready_used and output is not None:
            quantizer.alone = True
        assign(quantizer, "_ready", None)


def mark_roots(model: nn.Module, inside: bool) -> None:
    """Tell the watched modules within model whether a forward of model is running: then it is the root, and they are
    a part of it that may run several times."""
    for root in model.__dict__.get("_qbr_roots", ()):
        assign(root, "_qbr_inside", inside)


def is_inside(model: nn.Module) -> bool:
    """Whether a forward of a watched module around model is running."""
    return model.__dict__.get("_qbr_inside", False)


def is_there(weight: Tensor) -> bool:
    """Whether the weight can be read before its layer runs, and is an ordinary tensor."""
    ordinary = type(weight) in (nn.Parameter, Tensor)
    return ordinary and not weight.is_meta and (weight.numel() == 0 or weight.untyped_storage().size() > 0)


def are_saves_hooked() -> bool:
    """Whether backward will get other tensors than those saved here: checkpointing without reentry, or offloading."""
    return torch._C._autograd._top_saved_tensors_default_hooks(True) is not None


def is_in_backward() -> bool:
    """Whether a backward is running: a forward here and now is checkpointing's second one, of either form."""
    return torch._C._current_graph_task_id() != -1


def walk(model: nn.Module) -> list[nn.Module]:
    """The modules of model, each once, in no particular order: what model.modules() gives, in half the time."""
    found, waiting = {id(model): model}, [model]
    while waiting:
        for child in waiting.pop()._modules.values():
            if child is not None and id(child) not in found:
                found[id(child)] = child
                waiting.append(child)
    return list(found.values())
