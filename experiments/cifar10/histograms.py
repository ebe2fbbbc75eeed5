"""Each layer's weights against its quantization levels, as counts small enough to keep with the run."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

import qbr

BINS_PER_STEP = 24  # resolution of the histogram, bins per step alpha ...
MOST_BINS = 264  # ... as long as there are no more than this; wider ranges get coarser bins
MARGIN = 1.5  # steps shown beyond the outermost levels; what lies further out is counted in the outermost bin


@torch.no_grad()
def weight_histograms(model: nn.Module) -> dict[str, Any]:
    """{layer: {alpha, qn, qp, low, high, counts}} of every quantized weight, plain values.

    counts is over weight / alpha between low and high, in bins of equal width, so that levels lie at whole numbers.
    With a step per channel every weight is divided by its own, and alpha is their mean.
    """
    layers = {}
    for name, module in model.named_modules():
        quantizer = getattr(module, "weight_quantizer", None)
        if not isinstance(quantizer, qbr.LSQQuantizer):
            continue
        if not quantizer.initialised:  # as its first training forward would, from the same weight
            quantizer.initialise(module.weight)
        spec = quantizer.spec
        steps = quantizer.alpha.reshape(spec.step_shape(module.weight.dim()))
        low, high = spec.qn - MARGIN, spec.qp + MARGIN
        bins = min(round((high - low) * BINS_PER_STEP), MOST_BINS)
        scaled = (module.weight / steps).float().cpu().clamp(low, high)
        layers[name] = {
            "alpha": float(quantizer.alpha.mean()),
            "qn": spec.qn,
            "qp": spec.qp,
            "low": low,
            "high": high,
            "counts": torch.histc(scaled, bins, low, high).int().tolist(),
        }
    return layers
