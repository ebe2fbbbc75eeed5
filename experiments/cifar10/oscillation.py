"""How many weights change their bin in an epoch, and how many go back and forth between two."""

from __future__ import annotations

import contextlib
from typing import Any

from torch import nn

import qbr

MOMENTUM = 0.01  # of each weight's frequency of oscillation: a memory of about 100 steps


@contextlib.contextmanager
def watched(model: nn.Module, on: bool):
    """A function that gives {"oscillation": ...} of the training steps since; {} unless ``on``.

    Watched anew in every epoch, so that a run which was resumed gives the same figures. Shares, over all weights: of
    those that changed their code in a step and that changed it back (means over steps), and of those whose frequency
    of changing back is above 0.005 at the epoch's end. By layer: the last of the three.

    Source: Nagel et al., Overcoming Oscillations in Quantization-Aware Training, ICML 2022, sections 2.3 and 4.1.
    """
    if not on:
        yield dict
        return
    quantized = {name: module for name, module in model.named_modules() if hasattr(module, "weight_quantizer")}
    sizes = {name: module.weight.numel() for name, module in quantized.items()}
    with qbr.Monitor(model, frequency=MOMENTUM) as monitor:
        yield lambda: {"oscillation": _figures(monitor.read(), sizes)}


def _figures(layers: dict[str, Any], sizes: dict[str, int]) -> dict[str, Any]:
    weights = {name: each for name, each in layers.items() if each.kind == "weight" and each.steps}
    total = sum(sizes[name] for name in weights)

    def share(key: str) -> float | None:
        return sum(getattr(each, key) * sizes[name] for name, each in weights.items()) / total if total else None

    shares = {key: share(key) for key in ("changed", "oscillated", "oscillating")}
    return {**shares, "layers": {name: each.oscillating for name, each in weights.items()}}
