"""The weights of a model are quantized together, once per forward: one call of the backend for all of them.

``watch(model)`` (prepare() and AlphaControl.attach() call it) hooks the root: before its forward all weights that
can be are quantized in one call and left with their quantizers, whose layers pick them up; after it what was left is
dropped. A layer quantizes its weight alone, as it would without this module, wherever the group's result may not be
the tensor that it would have made itself:

- under torch.compile, in a forward that does not go through the root, and for a weight or alpha that is not the one
  that was quantized (functional_call, a parametrization, a hook that replaces it, an update in place since);
- inside activation checkpointing, forward and recomputation;
- for a weight that is not there before the layer runs (FSDP: a DTensor, or no storage), from then on also one whose
  layer did not run in the last forward.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from qbr import functional
from qbr.functional import BinLoss


class Ready(NamedTuple):
    """A weight's quantized form, and what it was made from."""

    weight: Tensor
    alpha: Tensor
    versions: tuple[int, int]
    with_grad: bool
    xhat: Tensor
    entry: BinLoss | None


def quantize_together(model: nn.Module, *_) -> None:
    """Quantize the weights of model's layers in one call, and leave each with its quantizer. A forward pre-hook."""
    if torch.compiler.is_compiling():
        return
    groups: dict[bool, list] = {}
    for quantizer, weight in weights(model):
        quantizer._ready = None
        if quantizer.alone or weight is None or not is_there(weight):
            continue
        if quantizer.training and not quantizer.initialised:
            continue  # its first forward sets alpha
        groups.setdefault(quantizer.collects(), []).append((quantizer, weight))
    for collects, members in groups.items():
        if len(members) > 1:
            _quantize(members, collects)


def weights(model: nn.Module) -> list[tuple[nn.Module, Tensor | None]]:
    """(quantizer, parameter) of all quantized weights: ``weight_quantizer`` is that of ``weight``, and so on for every
    name that ends so. A quantizer that tied weights share comes once."""
    found: dict[nn.Module, Tensor | None] = {}
    for module in model.modules():
        for name, child in module._modules.items():
            if name.endswith("weight_quantizer") and child is not None:
                found.setdefault(child, module._parameters.get(name.removesuffix("_quantizer")))
    return list(found.items())


def _quantize(members: list, collects: bool) -> None:
    xs = [weight for _, weight in members]
    alphas = [quantizer.alpha for quantizer, _ in members]
    specs = [quantizer.spec for quantizer, _ in members]
    if collects:
        to_alpha = [quantizer.br_to_alpha if quantizer.alpha.requires_grad else False for quantizer, _ in members]
        results = functional.foreach_fake_quantize_with_bin_loss(xs, alphas, specs, backprop_to_alpha=to_alpha)
        made = [(each.xhat, BinLoss(each.loss, each.bins)) for each in results]
    else:
        made = [(xhat, None) for xhat in functional.foreach_fake_quantize(xs, alphas, specs)]
    with_grad = torch.is_grad_enabled()
    for (quantizer, weight), (xhat, entry) in zip(members, made):
        versions = weight._version, quantizer.alpha._version
        quantizer._ready = Ready(weight, quantizer.alpha, versions, with_grad, xhat, entry)
        quantizer._ready_used = False


def take(quantizer, weight: Tensor) -> Ready | None:
    """What the group left for this quantizer, if it is what the quantizer would make of ``weight`` now and here."""
    ready = quantizer._ready
    if (
        ready is None
        or ready.weight is not weight
        or ready.alpha is not quantizer.alpha
        or ready.versions != (weight._version, quantizer.alpha._version)
        or ready.with_grad != torch.is_grad_enabled()
        or (ready.entry is not None) != quantizer.collects()
        or _is_checkpointed()
    ):
        return None
    quantizer._ready_used = True
    return ready


def drop(model: nn.Module, *_) -> None:
    """Forget what the forward has not used; a layer that did not use it quantizes alone from now on. A forward hook."""
    for quantizer, _ in weights(model):
        if quantizer._ready is not None:
            quantizer.alone = quantizer.alone or not quantizer._ready_used
            quantizer._ready = None


def is_there(weight: Tensor) -> bool:
    """Whether the weight can be read before its layer runs, and is an ordinary tensor."""
    ordinary = type(weight) in (nn.Parameter, Tensor)
    return ordinary and not weight.is_meta and (weight.numel() == 0 or weight.untyped_storage().size() > 0)


def _is_checkpointed() -> bool:
    """Whether saved tensors are being hooked (checkpoint's forward and recomputation, or offloading), or this runs
    inside a backward (the reentrant form's recomputation)."""
    hooked = torch._C._autograd._top_saved_tensors_default_hooks(True) is not None
    return hooked or torch._C._current_graph_task_id() != -1
