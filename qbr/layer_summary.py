"""summary(model): a table of the quantized layers, their steps, and how their values lie on the levels."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from qbr import distributed, functional, grouping, metrics
from qbr.layers import QuantizedClippedReLU
from qbr.metrics import BinMetrics
from qbr.quantizers import LSQQuantizer
from qbr.regularizer import by_layer
from qbr.spec import QuantSpec


class LayerSummary(NamedTuple):
    """One row; None where there are no data.

    Attributes:
        layer, kind, bits: its name, "weight" or "activation", and its width.
        alpha: its step; with a step per channel, their mean.
        numel: how many values the figures to the right are of.
        bins_used, levels: how many codes occur, and how many there are.
        clipped: share of the values beyond the range, v < qn or v > qp, whose gradient LSQ stops.
        distance: mean distance to the levels over all values, in units of alpha (of their mean with a step per
            channel): 0.25 for a uniform spread, 0 on the levels.
    """

    layer: str
    kind: str
    bits: int
    alpha: float
    numel: int | None
    bins_used: int | None
    levels: int
    clipped: float | None
    distance: float | None


class Summary:
    """What summary() gives: ``rows``, and a table when it is printed."""

    def __init__(self, rows: list[LayerSummary]) -> None:
        self.rows = rows

    def __str__(self) -> str:
        lines = [("layer", "kind", "bits", "alpha", "bins used", "clipped", "distance", "values")]
        for row in self.rows:
            used = "-" if row.bins_used is None else f"{row.bins_used}/{row.levels}"
            clipped = "-" if row.clipped is None else f"{100 * row.clipped:.1f} %"
            distance = "-" if row.distance is None else f"{row.distance:.3f}"
            numel = "-" if row.numel is None else f"{row.numel:,}"
            lines.append((row.layer, row.kind, str(row.bits), f"{row.alpha:.4g}", used, clipped, distance, numel))
        widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
        align = [str.ljust, str.ljust] + [str.rjust] * 6
        return "\n".join("  ".join(to(cell, w) for cell, w, to in zip(line, widths, align)).rstrip() for line in lines)

    __repr__ = __str__


class _Values(NamedTuple):
    """What one row is made from, on the device."""

    table: Tensor  # of functional.Bins
    clipped: Tensor | None  # how many values are beyond the range


@torch.no_grad()
def summary(model: nn.Module, *inputs: Any) -> Summary:
    """Bits, steps, bins used, clipped share and distance to the levels, layer by layer; print it.

    Weights are looked at as they are now, in one pass. Activations are those of ``model(*inputs)`` in eval mode;
    without inputs those that a Monitor has pooled, or that the last training forward collected, without their clipped
    share, and where there is neither, none. One transfer from the device. Nothing of the model changes: modes, losses
    that wait for qbr.bin_loss, running statistics and gradients stay.

    Args:
        model: a prepared model.
        inputs: of one forward; or none.

    Raises:
        ValueError: for a model without quantizers.
    """
    found = by_layer(model)
    weights = grouping.quantized_weights(model)
    names = {quantizer: name for name, quantizer in found.items()}
    values = {names[quantizer]: value for quantizer, value in zip(weights, _weights(weights))}
    activations = {name: quantizer for name, quantizer in found.items() if quantizer not in weights}
    if inputs:
        values |= _activations(model, inputs, activations)
    else:
        values |= {name: kept for name, q in activations.items() if (kept := _kept(q)) is not None}
    return Summary(_rows(found, values))


def _weights(weights: dict[LSQQuantizer, Tensor]) -> list[_Values]:
    steps, specs = [distributed.whole(q.alpha) for q in weights], [q.spec for q in weights]
    tensors = [distributed.whole(weight) for weight in weights.values()]
    results = functional.foreach_bin_loss(tensors, steps, specs)
    return [_Values(each.bins.table, _clipped(*of)) for each, of in zip(results, zip(tensors, steps, specs))]


def _clipped(x: Tensor, alpha: Tensor, spec: QuantSpec, clip: float | None = None) -> Tensor:
    """How many elements of x, or of min(x, clip), are beyond the range."""
    v = (x if clip is None else x.clamp(max=clip)) / alpha.reshape(spec.step_shape(x.dim()))
    return ((v < spec.qn) | (v > spec.qp)).sum()


def _activations(model: nn.Module, inputs, found: dict[str, LSQQuantizer]) -> dict[str, _Values]:
    """What the quantizers of activations meet in one forward in eval mode; all calls of one are pooled."""
    met: dict[str, list[_Values]] = {}

    def look(name: str):
        def hook(quantizer: LSQQuantizer, args, kwargs) -> None:
            x, clip = args[0], kwargs.get("clip")
            y = x.clamp(min=0) if kwargs.get("relu") else x
            table = functional.bin_loss(x, quantizer.alpha, quantizer.spec, **kwargs).bins.table
            met.setdefault(name, []).append(_Values(table, _clipped(y, quantizer.alpha, quantizer.spec, clip)))

        return hook

    modes = {module: module.training for module in model.modules()}
    waiting = {module: module._retained for module in modes if isinstance(module, LSQQuantizer)}
    last = {module: (module._input, module._kept) for module in modes if isinstance(module, QuantizedClippedReLU)}
    hooks = [q.register_forward_pre_hook(look(name), with_kwargs=True) for name, q in found.items()]
    try:
        model.eval()
        with torch.compiler.set_stance("force_eager"):  # what is compiled would be compiled again for the hooks
            model(*inputs)
    finally:
        for hook in hooks:
            hook.remove()
        for module, mode in modes.items():
            module.training = mode
        for quantizer, retained in waiting.items():
            quantizer._retained = retained
        for module, (was_input, was_kept) in last.items():
            module._input, module._kept = was_input, was_kept
    return {name: _Values(*(torch.stack(each).sum(0) for each in zip(*calls))) for name, calls in met.items()}


def _kept(quantizer: LSQQuantizer) -> _Values | None:
    """The bin sums that are there without a forward: a Monitor's, or those that wait for qbr.bin_loss."""
    if quantizer.observer is not None:
        return _Values(quantizer.observer.table, None)
    tables = [entry.bins.table for entry in quantizer._retained]
    return _Values(torch.stack(tables).sum(0), None) if tables else None


def _rows(found: dict[str, LSQQuantizer], values: dict[str, _Values]) -> list[LayerSummary]:
    parts = [t for v in values.values() for t in (v.table, *(() if v.clipped is None else (v.clipped,)))]
    numbers = iter(metrics.to_host([distributed.whole(q.alpha) for q in found.values()] + parts))
    alphas = {name: next(numbers) for name in found}
    figures: dict[str, tuple[BinMetrics, float | None]] = {}
    for name, value in values.items():
        figure = metrics.from_values(next(numbers), alphas[name], found[name].spec)
        figures[name] = figure, None if value.clipped is None else next(numbers)[0]
    rows = []
    for name, quantizer in found.items():
        alpha = sum(alphas[name]) / len(alphas[name])
        fixed = name, quantizer.kind, quantizer.spec.bits, alpha
        levels = len(quantizer.spec.codes)
        figure, clipped = figures.get(name, (None, None))
        if figure is None or figure.numel == 0:
            rows.append(LayerSummary(*fixed, None, None, levels, None, None))
            continue
        share = None if clipped is None else clipped / figure.numel
        distance = figure.mean_distance / alpha
        rows.append(LayerSummary(*fixed, figure.numel, figure.bins_used, levels, share, distance))
    return rows
