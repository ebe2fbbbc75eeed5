"""How far BR of weights will pull: a line before its first epoch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from qbr import grouping

from .optim import factor, rise

FAINT = 0.1  # an exponent below which BR moves a weight less than a tenth of the way to its level


def expected_pull(model: nn.Module, options: Any, begin: int, steps: int, skip: Sequence[str]) -> str:
    """What 2 * lambda * (sum of lr) / (1 - momentum) over the steps with BR means for the weights as they are now.

    Alone, BR leaves a bin of n weights exp(-strength / n) of its distance to its level, dampening every weight
    exp(-strength) (qbr/kernels/README.md, "Strength").

    Args:
        options: lr, lambda_br, momentum, regularizer and what schedules lr and lambda are read.
        begin, steps: the steps before BR, and all of the run.
        skip: names of the layers that BR leaves alone.
    """
    at = factor(options.lr_schedule, steps, options.lr_warmup)
    share = rise(options.lambda_br_schedule, begin, steps)
    most = limit(options.momentum, options.nesterov)
    full = 2 * options.lambda_br * options.lr
    rates = [full * at(step) * (share(step) if share else 1) for step in range(begin, steps)]
    strength = sum(rates) / (1 - options.momentum)
    beyond = max(rates, default=0.0) / most  # bins of fewer weights grow
    if options.regularizer == "dampening":
        line = f"dampening: strength {strength:.3g}: alone it would move every weight by {_share(strength)} of its way"
        return line + ("; too strong for this lr: weights will oscillate and grow" if beyond > 1 else "")
    sizes = _bin_sizes(model, skip)  # a bin of n weights has n of them
    median = strength / sizes[torch.searchsorted(sizes.cumsum(0), sizes.sum() / 2)].item()
    moved = (sizes[strength / sizes >= FAINT].sum() / sizes.sum()).item()
    line = f"BR of weights: strength {strength:.3g}: alone it would move the median weight by {_share(median)} of its "
    line += f"way to its level, and {100 * moved:.0f} % of the weights by a tenth or more"
    if median < FAINT:
        line += "; most bins are too large for BR to move them far (--regularizer dampening weighs every weight alike)"
    if beyond > 1:
        small = int((sizes < beyond).sum())
        line += (f"; bins of fewer than {beyond:.3g} weights ({small} of {len(sizes)} now) will oscillate and grow: "
                 f"2 * lambda * lr is up to {max(rates):.3g}, and this momentum follows {most:.3g} a weight: a lower "
                 "--lambda-br or --lr helps")
    return line


def limit(momentum: float, nesterov: bool) -> float:
    """The largest 2 * lambda * lr / n at which torch's SGD pulls a bin of n weights to its level instead of past it and
    away: a quadratic's curvature times lr.

    Nesterov's form steps along g + momentum * v, v the velocity after g: it ends earlier than the plain one.
    """
    return 2 * (1 + momentum) / (1 + 2 * momentum if nesterov else 1)


def _share(exponent: float) -> str:
    return f"{100 * -torch.expm1(torch.tensor(-exponent, dtype=torch.float64)).item():.2g} %"


@torch.no_grad()
def _bin_sizes(model: nn.Module, skip: Sequence[str]) -> torch.Tensor:
    """How many weights each bin has that BR moves, the smallest first: float64 [bins], on the CPU."""
    left_out = {model.get_submodule(name).weight_quantizer for name in skip}
    found = grouping.weight_bins(model).items()
    counts = torch.cat([bins.counts.cpu() for quantizer, bins in found if quantizer not in left_out])
    return counts[counts > 0].sort().values
