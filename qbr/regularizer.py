"""Bin regularization of a model: bin_loss(model) from the fused pass, and the predecessor's BinRegularizer."""

from __future__ import annotations

import re
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn

from qbr import distributed, functional, grouping, metrics, ops, quantizer_state, step_guard
from qbr.arguments import check, check_bits
from qbr.functional import BinLoss, Bins
from qbr.metrics import BinMetrics, LazyInfo
from qbr.patterns import matches
from qbr.quantizers import LSQQuantizer, quantizers, require_quantizers
from qbr.spec import QuantSpec, ToAlpha, check_flag, check_regularizer

Alphas: TypeAlias = Mapping[str, Tensor | float]  # {layer: step size}
# A quantizer of one of these names is reported as its layer, those of further calls and other tensors with a suffix.
_OWNED = re.compile(r"(?:weight_)?quantizer(?:_(?P<call>\d+))?|(?P<tensor>input|memory|\w+_weight)_quantizer")
_LAYER_KEYS = (
    "loss", "mse", "var", "quantization_mse", "bins_used", "mean_distance", "effectiveness", "pct_near_levels",
)  # fmt: skip
# What the predecessor calls the figures of BinMetrics: of one tensor, and of all layers together.
_INFO = {
    "bins_used": "bins_used", "br_mse_loss": "mse", "br_var_loss": "var", "quantization_mse": "quantization_mse",
    "mean_distance": "mean_distance", "effectiveness": "effectiveness", "pct_near_levels": "pct_near_levels",
}  # fmt: skip
_TOTAL_INFO = {
    "avg_loss": "loss", "avg_mse": "mse", "avg_var": "var", "avg_quantization_mse": "quantization_mse",
    "avg_mean_distance": "mean_distance", "avg_effectiveness": "effectiveness", "avg_pct_near": "pct_near_levels",
}  # fmt: skip
_SUMS = ("avg_loss", "avg_mse", "avg_var")  # in spite of their names; the others are means over the layers
_NOTHING_COLLECTED = (
    "bin_loss(model): nothing was collected, and both losses are 0: call it after each training forward, with "
    "gradients, and before the optimizer's step"
)
_NO_EPOCH = (
    "bin_loss(model): the AlphaControl of this model goes by epochs, and none has begun, so that it stays as in epoch "
    "1: call control.begin_epoch(epoch) when each epoch begins"
)

_NOT_TOLD = (
    "bin_loss(model): {} collects no bin loss, while the model's other quantizers do: it came after qbr.prepare; set "
    "its .collecting to True, or to False to leave it out (an AlphaControl's begin_epoch sets it for all)"
)


class ModelBinLoss(NamedTuple):
    """The bin losses that the last training forward collected.

    Attributes:
        weights, activations: scalar float32 tensors in the graph, the sums of the layers' losses; 0 where nothing
            was collected (eval, no_grad, warm-up).
        layers: {layer name: BinLoss(loss, bins)}; the further calls of an activation module that is called more than
            once in a forward are ``name@2``, ``name@3``, and so on.
    """

    weights: Tensor
    activations: Tensor
    layers: dict[str, BinLoss]

    def metrics(self) -> dict[str, BinMetrics]:
        """Each layer's figures, with one synchronisation for all."""
        return dict(zip(self.layers, metrics.read([each.bins for each in self.layers.values()])))


def bin_loss(model: nn.Module, *, global_bins: bool = False, skip: Sequence[str] = ()) -> ModelBinLoss:
    """Take the bin losses that model's training forward has collected; call it between forward and backward.

    Nothing is left behind: a second call without a forward in between finds nothing. No synchronisation.

    Args:
        model: a prepared model, or any module that contains quantizers (wrapped or compiled too).
        global_bins: under torch.distributed, take activations' bins over the whole batch instead of over each rank's
            share of it: one all-reduce, which every rank has to take part in (qbr/distributed.py).
        skip: patterns, as QATConfig's, of layers whose losses are in ``layers`` alone and regularize nothing: a first
            and last layer at 8 bits, say, which has so few weights to a bin that BR nails them.

    Raises:
        ValueError: for a model without quantizers, or with layers of the drop-in alone, which nobody has told to
            collect; for a pattern of ``skip`` that matches no layer with a quantizer; with global_bins also where
            activation checkpointing or offloading keeps the global bins from backward, and for BR's gradient of alphas
            per channel.

    Source: Han et al., Improving Low-Precision Network Quantization via Bin Regularization, ICCV 2021.
    """
    found = require_quantizers(model)
    if all(quantizer.collecting is None for quantizer in found.values()):
        raise ValueError(f"model ({type(model).__name__}) has quantizers that collect no bin loss: attach a control "
                         "before its forward, qbr.AlphaControl().attach(model), or use BinRegularizer")  # fmt: skip
    check_flag(global_bins, "global_bins")
    if isinstance(skip, str) or not all(isinstance(pattern, str) for pattern in skip):
        raise TypeError(f"skip={skip!r}: expected a list or tuple of patterns, str each")
    skipped = _skipped(tuple(found), tuple(skip)) if skip else ()
    layers: dict[str, BinLoss] = {}
    losses: dict[str, list[Tensor]] = {"weight": [], "activation": []}
    acts: dict[str, LSQQuantizer] = {}
    if global_bins and distributed.ranks() > 1:
        acts = {name: q for name, q in found.items() if q.kind == "activation" and q._retained}
        _check_global_bins(acts)
    taken = {name: quantizer.take_retained() for name, quantizer in found.items()}
    taken |= _with_global_bins(acts, taken) if acts else {}
    steps = Counter(_layer_and_call(name)[0] for name in found)
    for name, quantizer in found.items():
        layer, first = _layer_and_call(name)
        for call, entry in enumerate(taken[name]):
            layers[_call_name(layer, first + call * steps[layer])] = entry
            if name not in skipped:
                losses[quantizer.kind].append(entry.loss)
    if not torch.compiler.is_compiling() and torch.is_grad_enabled():
        if not layers and any(quantizer.collecting and quantizer.training for quantizer in found.values()):
            warnings.warn(_NOTHING_COLLECTED, stacklevel=2)
        untold = [repr(name) for name, quantizer in found.items() if quantizer.collecting is None]
        if untold:
            warnings.warn(_NOT_TOLD.format(", ".join(untold)), stacklevel=2)
        if any(quantizer.awaits_epoch and quantizer.training for quantizer in found.values()):
            warnings.warn(_NO_EPOCH, stacklevel=2)
    device = next(iter(found.values())).alpha.device
    return ModelBinLoss(
        _sum(losses["weight"], device), _sum(losses["activation"], device), dict(zip(layers, _fixed(layers.values())))
    )


def set_regularizer(model: nn.Module, *, weights: str | None = None, activations: str | None = None) -> None:
    """Choose the bin loss that model's quantizers collect: "br" (as prepare() leaves them) or "dampening".

    ``model.qat_config`` says so then, too, so that a checkpoint with it restores the loss.

    Args:
        model: a prepared model, or one around it. Of a part of one, the whole's qat_config does not know.
        weights, activations: the loss of that side; None leaves it.

    Raises:
        ValueError: for another name, or a model without quantizers. Nothing has changed then.

    Source: Nagel et al., Overcoming Oscillations in Quantization-Aware Training, ICML 2022, which dampens weights.
    """
    chosen = {"weight": weights, "activation": activations}
    for value, argument in ((weights, "weights"), (activations, "activations")):
        if value is not None:
            check_regularizer(value, argument)
    for quantizer in require_quantizers(model).values():
        quantizer.regularizer = chosen[quantizer.kind] or quantizer.regularizer
    for module in model.modules():
        config = module.__dict__.get("qat_config")
        if hasattr(config, "regularizer_of"):  # qbr.QATConfig
            ways = {kind: value or config.regularizer_of(kind) for kind, value in chosen.items()}
            module.qat_config = replace(config, regularizer=ways["weight"], act_regularizer=ways["activation"])


def by_layer(model: nn.Module) -> dict[str, LSQQuantizer]:
    """The quantizers of a model by the names that bin_loss(model) reports.

    Raises:
        ValueError: for a model without quantizers.
    """
    found: dict[str, LSQQuantizer] = {}
    for name, quantizer in require_quantizers(model).items():
        layer = _call_name(*_layer_and_call(name))
        found[name if layer in found else layer] = quantizer
    return found


def _check_global_bins(acts: dict[str, LSQQuantizer]) -> None:
    """Raise ValueError where one of these has what global bins cannot do; nothing has been taken then."""
    for name, quantizer in acts.items():
        layer, _ = _layer_and_call(name)
        if quantizer._saved_elsewhere:
            raise ValueError(f"global_bins=True: {layer} runs under activation checkpointing or saved-tensor hooks, "
                             "whose backward has this rank's bins only; leave it out of them, or use global_bins=False")
        br = quantizer.regularizer == "br"
        if br and quantizer.bin_loss_to_alpha() and quantizer.alpha.numel() > 1:
            raise ValueError(f"global_bins=True: BR's gradient of {layer}'s {quantizer.alpha.numel()} alphas needs "
                             "bins per channel; use br_to_alpha_acts=False, or global_bins=False")


def _with_global_bins(acts: dict[str, LSQQuantizer], taken: dict[str, list[BinLoss]]) -> dict[str, list[BinLoss]]:
    calls = [(name, entry) for name in acts for entry in taken[name]]
    to_alpha = [_to_alpha_factor(acts[name], entry.bins) for name, entry in calls]
    in_graph = {name: quantizer._alpha_in_graph or (quantizer.alpha,) for name, quantizer in acts.items()}
    alphas = [in_graph[name][0] for name, _ in calls]
    dampened = [acts[name].regularizer == "dampening" for name, _ in calls]
    pooled = distributed.with_global_bins([entry for _, entry in calls], alphas, to_alpha, dampened)
    result: dict[str, list[BinLoss]] = {name: [] for name in acts}
    for (name, _), entry in zip(calls, pooled):
        result[name].append(entry)
    return result


def _to_alpha_factor(quantizer: LSQQuantizer, bins: Bins) -> float:
    """What multiplied BR's gradient of alpha when bins were made."""
    scale = quantizer.alpha_grad() * quantizer.spec.lsq_grad_scale(bins.numel // quantizer.alpha.numel())
    return ops.br_to_alpha_factor(quantizer.bin_loss_to_alpha(), scale)


def _layer_and_call(name: str) -> tuple[str, int]:
    """What a quantizer is reported as: its layer, without the prefix that torch.compile's wrapper adds, and which of
    the layer's calls is its first."""
    return _parsed(name)


_layer_and_call._dynamo_marked_constant = True  # the cache is none of compiled code's; as in qbr/ops.py


@lru_cache(maxsize=4096)  # every step asks, with the same names
def _parsed(name: str) -> tuple[str, int]:
    layer, _, last = name.replace("_orig_mod.", "").rpartition(".")
    owned = _OWNED.fullmatch(last)
    if owned and owned["tensor"]:
        last = owned["tensor"]
    elif owned:
        return layer, int(owned["call"] or 1)
    return (f"{layer}.{last}" if layer else last), 1


def _skipped(found: tuple[str, ...], skip: tuple[str, ...]) -> tuple[str, ...]:
    return _matched(found, skip)


_skipped._dynamo_marked_constant = True  # torch.compile cannot trace fnmatch; as in qbr/ops.py


@lru_cache(maxsize=64)  # every step asks, with the same names
def _matched(found: tuple[str, ...], skip: tuple[str, ...]) -> tuple[str, ...]:
    """Those of the quantizers' names whose layers the patterns of ``skip`` match."""
    layers = {name: _layer_and_call(name)[0] for name in found}
    for pattern in skip:
        if not any(matches(layer, pattern) for layer in layers.values()):
            raise ValueError(f"skip: {pattern!r} matches no layer with a quantizer: expected names as "
                             f"{', '.join(list(dict.fromkeys(layers.values()))[:3])}")  # fmt: skip
    return tuple(name for name, layer in layers.items() if any(matches(layer, pattern) for pattern in skip))


def _call_name(name: str, call: int) -> str:
    """The name of a module's call in one forward, from 1: ``name``, ``name@2``, ``name@3``."""
    return name if call == 1 else f"{name}@{call}"


def _sum(losses: list[Tensor], device) -> Tensor:
    if not losses:
        return torch.zeros((), dtype=torch.float32, device=device)
    return torch.stack([loss.to(device=device, dtype=torch.float32) for loss in losses]).sum()


def _fixed(entries) -> list[BinLoss]:
    """The entries with a copy of alpha: metrics that are read after the optimizer's step must not see its new one."""
    entries = list(entries)
    alphas = torch._foreach_mul([entry.bins.alpha for entry in entries], 1.0) if entries else []
    bins = [entry.bins for entry in entries]  # not by _replace, which dynamo of torch 2.11 cannot follow
    copies = [Bins(each.table, alpha, each.spec, each.numel) for each, alpha in zip(bins, alphas)]
    return [BinLoss(entry.loss, copy) for entry, copy in zip(entries, copies)]


def forget(model: nn.Module, *_) -> None:
    """Drop what earlier forwards of model have collected; as a forward pre-hook, at the start of each new one that
    collects something itself: not of one without gradients, or in eval mode, between a training forward and its loss.
    """
    if not torch.compiler.is_compiling() and torch.is_grad_enabled():
        ddp = distributed.running_ddp()
        if ddp is not None and model.__dict__.get("_qbr_known_to") != id(ddp):
            distributed.check_known([quantizer.alpha for quantizer in quantizers(model).values()], ddp)
            grouping.assign(model, "_qbr_known_to", id(ddp))
    if grouping.is_inside(model):
        return
    grouping.mark_roots(model, True)
    modules = grouping.walk(model)
    fresh = False
    for module in modules:
        if isinstance(module, LSQQuantizer) and module.training:
            # Unseen in compiled code: to look at it would compile a graph for each of its lengths.
            if torch.is_grad_enabled() and (torch.compiler.is_compiling() or module._retained):
                module._retained = []
            fresh = fresh or not module.initialised
    if fresh and distributed.is_sharded(modules):
        raise ValueError("alphas are not set yet and FSDP has sharded them, so that what this forward would set is "
                         "lost: run one training forward before fully_shard, or load a state_dict")


def _check_before_loading(model, state_dict, prefix, *_) -> None:
    """Raise ValueError, before anything is written, for a state_dict that one of model's quantizers rejects."""
    for name, quantizer in quantizers(model).items():
        quantizer_state.check(quantizer, state_dict, f"{prefix}{name}." if name else prefix)


def watch(model: nn.Module) -> None:
    """Hook the root of a model, once: before each forward forget() and all weights' quantization, before each load
    the check of its state_dict; and have optimizers that lack its step sizes noticed."""
    step_guard.remember(model, quantizers(model), grouping.weights(model))
    roots = [each for each in model.modules() if each is not model and forget in each._forward_pre_hooks.values()]
    grouping.assign(model, "_qbr_roots", roots)
    if forget not in model._forward_pre_hooks.values():
        model.register_forward_pre_hook(forget)
        model.register_forward_pre_hook(grouping.quantize_together)
        model.register_forward_hook(grouping.drop, always_call=True)
        model.register_load_state_dict_pre_hook(_check_before_loading)


def unwatch(model: nn.Module) -> None:
    """Take back what watch() did."""
    mine = (forget, grouping.quantize_together, grouping.drop, _check_before_loading)
    for module in model.modules():
        for hooks in (module._forward_pre_hooks, module._forward_hooks, module._load_state_dict_pre_hooks):
            for key in [key for key, hook in hooks.items() if any(getattr(hook, "hook", hook) is m for m in mine)]:
                del hooks[key]
                module._forward_hooks_always_called.pop(key, None)
        module.__dict__.pop("_qbr_roots", None), module.__dict__.pop("_qbr_inside", None)


class BinRegularizer:
    """The predecessor's regularizer, for tensors that the caller names; ``bin_loss(model)`` needs no second pass.

    Args:
        num_bits: 1 to 8.
        signed: True for weights, False for activations after a ReLU. Signed 1 bit is binary.
        name: only kept and shown.
        regularizer: "br", or "dampening" (see functional.bin_loss).
    """

    def __init__(
        self, num_bits: int = 2, signed: bool = True, name: str | None = None, *, regularizer: str = "br"
    ) -> None:
        self.num_bits = num_bits
        self.signed = signed
        self.name = name
        self.regularizer: str = check_regularizer(regularizer, "regularizer")
        self.spec: QuantSpec = QuantSpec(check_bits(num_bits, "num_bits"), signed=signed)

    def __repr__(self) -> str:
        return f"BinRegularizer(num_bits={self.num_bits}, signed={self.signed}, name={self.name!r})"

    def compute_bin_loss(
        self, weights: Tensor, alpha: Tensor | float, backprop_to_alpha: ToAlpha = False
    ) -> tuple[Tensor, Tensor, Tensor, LazyInfo]:
        """Bin regularization of one tensor.

        Args:
            weights: any shape.
            alpha: its step size: a tensor of one element, or a number.
            backprop_to_alpha: False, True, a fraction, "scaled" or (fraction, "scaled"), as in functional.bin_loss.

        Returns:
            (loss, mse, var, info). loss: a scalar tensor in the graph. mse and var: its two parts, detached. info: a
            dict whose values are read from the device, all at once, when one is first read: bins_used (int) and
            br_mse_loss, br_var_loss, quantization_mse, mean_distance, effectiveness, pct_near_levels (floats).

        Raises:
            TypeError, ValueError: for a bad argument, naming it.
        """
        if not isinstance(weights, Tensor):
            raise TypeError(f"weights is a {type(weights).__name__}: expected a tensor")
        result = functional.bin_loss(
            weights, alpha, self.spec, backprop_to_alpha=backprop_to_alpha, regularizer=self.regularizer
        )
        loss, bins = _fixed([result])[0]
        mse, var = metrics.mse_and_var(bins)

        def load() -> dict:
            (figures,) = metrics.read([bins])
            return {key: getattr(figures, name) for key, name in _INFO.items()}

        return loss, mse, var, LazyInfo(tuple(_INFO), load)

    def compute_total_loss(
        self, weights_dict: Mapping[str, Tensor], alphas_dict: Alphas, backprop_to_alpha: ToAlpha = False
    ) -> tuple[Tensor, LazyInfo]:
        """The sum of the layers' losses.

        Args:
            weights_dict: {layer: tensor}. The alpha of ``name@2`` (a later call of one module) is that of ``name``.
            alphas_dict: {layer: step size}. A layer that has none is skipped.
            backprop_to_alpha: as in compute_bin_loss.

        Returns:
            (loss, info). info is a dict that is read from the device, all at once, when a value is first read:
            avg_loss, avg_mse, avg_var (sums over the layers, in spite of their names), avg_quantization_mse,
            avg_mean_distance, avg_effectiveness, avg_pct_near (means over the layers) and layer_losses:
            {layer: {loss, mse, var, quantization_mse, bins_used, mean_distance, effectiveness, pct_near_levels}}.
        """
        results = self._bin_losses(weights_dict, alphas_dict, backprop_to_alpha)
        device = next((w.device for w in weights_dict.values()), None)
        total = _sum([each.loss for each in results.values()], device)
        tables = {name: each.bins for name, each in results.items()}
        return total, LazyInfo((*_TOTAL_INFO, "layer_losses"), lambda: _total_info(tables))

    def get_bin_statistics(self, weights_dict: Mapping[str, Tensor], alphas_dict: Alphas) -> dict[str, dict[str, Any]]:
        """Each layer's bins, read with one synchronisation for all; lists have one entry per code, ascending.

        Returns:
            {layer: {bin_counts (ints), bin_means, bin_stds (unbiased, 0.0 for fewer than two), total_values, levels}}
        """
        with torch.no_grad():
            tables = {name: each.bins for name, each in self._bin_losses(weights_dict, alphas_dict, False).items()}
        return {
            name: {
                "bin_counts": m.counts,
                "bin_means": m.means,
                "bin_stds": m.stds,
                "total_values": m.numel,
                "levels": m.levels,
            }
            for name, m in zip(tables, metrics.read(list(tables.values())))
        }

    def _bin_losses(self, weights_dict: Mapping[str, Tensor], alphas_dict: Alphas, to_alpha: ToAlpha):
        """{layer: BinLoss} of the layers that have an alpha, from one call of the backend."""
        for name, given in (("weights_dict", weights_dict), ("alphas_dict", alphas_dict)):
            if not isinstance(given, Mapping):
                raise TypeError(f"{name} is a {type(given).__name__}: expected {{layer: ...}}")
        named = list(_with_alphas(weights_dict, alphas_dict))
        tensors, alphas = [tensor for _, tensor, _ in named], [alpha for *_, alpha in named]
        try:
            results = functional.foreach_bin_loss(
                tensors, alphas, self.spec, backprop_to_alpha=to_alpha, regularizer=self.regularizer
            )
        except (TypeError, ValueError):
            for name, tensor, alpha in named:
                try:
                    check(tensor, alpha, self.spec, False, None)
                except (TypeError, ValueError) as error:
                    raise type(error)(f"layer {name!r}: {error}") from None
            raise
        return dict(zip([name for name, *_ in named], _fixed(results)))


def _with_alphas(weights_dict: Mapping[str, Tensor], alphas_dict: Alphas):
    """(name, tensor, alpha) of the layers that have an alpha, under their own name or the one before '@'."""
    for name, weights in weights_dict.items():
        alpha = alphas_dict.get(name)
        if alpha is None and isinstance(name, str):
            alpha = alphas_dict.get(name.partition("@")[0])
        if alpha is not None:
            yield name, weights, alpha


def _total_info(tables: dict[str, Bins]) -> dict:
    layers = metrics.read(list(tables.values()))
    count = max(len(layers), 1)
    sums = {key: sum(getattr(m, name) for m in layers) for key, name in _TOTAL_INFO.items()}
    return {
        **{key: value if key in _SUMS else value / count for key, value in sums.items()},
        "layer_losses": {name: {key: getattr(m, key) for key in _LAYER_KEYS} for name, m in zip(tables, layers)},
    }
