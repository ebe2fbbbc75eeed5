"""parameter_groups: a prepared model's parameters as an optimizer takes them, the step sizes in groups of their own."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from qbr.patterns import matches
from qbr.quantizers import require_quantizers
from qbr.spec import is_number


def parameter_groups(
    model: nn.Module,
    *,
    lr: float,
    weight_decay: float,
    alpha_lr: float | None = None,
    act_alpha_lr: float | None = None,
    alpha_lr_overrides: Mapping[str, float] | None = None,
) -> list[dict[str, Any]]:
    """Groups for a torch.optim optimizer: everything else, and the alphas with no weight decay.

    Weight decay pulls a step size to 0, and Adam undoes LSQ's gradient scale, so that alpha wants a learning rate of
    its own there (qbr/kernels/README.md, "Strength"). An activation's scale counts the elements of the whole batch: its
    alpha hardly moves at the lr of weights (docs/accuracy.md, "First step sizes, and how fast they learn").

        parameter_groups(model, lr=0.04, weight_decay=1e-4, alpha_lr_overrides={"conv1": 5e-4, "fc": 5e-4})

    Args:
        model: a prepared model. Parameters that are frozen now are included: they may be released later.
        lr, weight_decay: of the other parameters.
        alpha_lr: of the alphas; None for lr.
        act_alpha_lr: of the alphas of activations, in a third group; None: they are in the second, at alpha_lr.
        alpha_lr_overrides: {pattern: lr}, a further group for each: patterns as QATConfig's, over the names of
            model's quantizers, without torch.compile's prefix: "fc" covers every quantizer in fc,
            "*.weight_quantizer" all weights'. Of several that match, the later one wins.

    Raises:
        TypeError, ValueError: naming the argument; for a model without quantizers (an optimizer made before prepare()
            would miss every alpha), and for a pattern that matches none.
    """
    overrides = {} if alpha_lr_overrides is None else alpha_lr_overrides
    if not isinstance(overrides, Mapping):
        raise TypeError(f"alpha_lr_overrides={overrides!r}: expected {{pattern: lr}}")
    rates = {"lr": lr, "weight_decay": weight_decay, "alpha_lr": alpha_lr, "act_alpha_lr": act_alpha_lr}
    rates |= {f"alpha_lr_overrides[{pattern!r}]": rate for pattern, rate in overrides.items()}
    for argument, rate in rates.items():
        _check_rate(rate, argument, optional=argument in ("alpha_lr", "act_alpha_lr"))
    found = {name.replace("_orig_mod.", ""): each for name, each in require_quantizers(model).items()}
    for pattern in overrides:
        if not any(matches(name, pattern) for name in found):
            names = ", ".join(list(found)[:3])
            raise ValueError(f"alpha_lr_overrides[{pattern!r}] matches no quantizer: expected names as {names}")
    alphas, acts, apart = [], [], {pattern: [] for pattern in overrides}
    for name, quantizer in found.items():
        mine = [pattern for pattern in overrides if matches(name, pattern)]
        if mine:
            apart[mine[-1]].append(quantizer.alpha)
        else:
            (acts if act_alpha_lr is not None and quantizer.kind == "activation" else alphas).append(quantizer.alpha)
    ids = {id(quantizer.alpha) for quantizer in found.values()}
    others = [p for p in model.parameters() if id(p) not in ids]
    groups = [
        {"name": "weights", "params": others, "lr": lr, "weight_decay": weight_decay},
        {"name": "alphas", "params": alphas, "lr": lr if alpha_lr is None else alpha_lr, "weight_decay": 0.0},
    ]
    if act_alpha_lr is not None:
        groups.append({"name": "alphas of activations", "params": acts, "lr": act_alpha_lr, "weight_decay": 0.0})
    for pattern, rate in overrides.items():
        groups.append({"name": f"alphas of {pattern}", "params": apart[pattern], "lr": rate, "weight_decay": 0.0})
    return groups


def _check_rate(rate, argument: str, optional: bool) -> None:
    """torch.optim checks its defaults alone, and not what groups have."""
    if isinstance(rate, Tensor) or (optional and rate is None):
        return
    if not is_number(rate):
        raise TypeError(f"{argument}={rate!r}: expected a number")
    if not 0 <= rate < math.inf:
        raise ValueError(f"{argument}={rate}: expected a finite number, 0 or more")
