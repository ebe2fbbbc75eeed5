"""What the autograd nodes of ops.py keep for their backward: beside autograd's own saved tensors where it is weights.

One node may quantize all weights of a model, and two losses reach different weights. In float these are nodes of their
own, so that the losses may have backwards of their own, in any order, with an optimizer's step between. Autograd frees
all that a node has saved after its first backward, and refuses it all where one tensor has changed; Parameters live
on anyway, so that such a node keeps them itself and refuses those alone that have changed.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn


def save(ctx, xs: Sequence[Tensor], *tensors: Tensor) -> None:
    """ctx.save_for_backward(*tensors), but for Parameters xs; of these ``tensors`` has one after the other, then as
    many alphas, and so on."""
    ctx.kept = ctx.read = None
    if torch.compiler.is_compiling() or {*map(type, xs)} != {nn.Parameter}:
        ctx.save_for_backward(*tensors)
        return
    try:
        ctx.kept = tensors, _versions(tensors), len(xs)
    except RuntimeError:  # made under torch.inference_mode: no version, and no backward
        ctx.save_for_backward(*tensors)


def saved(ctx, used: Sequence[int] = (0,)) -> Sequence[Tensor]:
    """What save() was given; noted in ctx.read, if that is a list: checkpointing has it read once alone.

    Args:
        used: which of xs this backward is about.

    Raises:
        RuntimeError: where one of these, or its alpha, has changed since.
    """
    if ctx.kept is None:
        tensors = ctx.saved_tensors
        if ctx.read is not None:
            ctx.read.extend(tensors)
        return tensors
    tensors, before, count = ctx.kept
    if ctx.read is not None:
        ctx.read.extend(tensors)
    now = _versions(tensors)
    if now != before:
        for i in used:
            if now[i::count] != before[i::count]:
                raise RuntimeError(
                    f"a weight of shape {tuple(tensors[i].shape)}, or its step size, has been modified by an inplace "
                    "operation since the forward (an optimizer's step?): run every backward that reaches it before, "
                    "or run the forward again"
                )
    return tensors


def _versions(tensors: Sequence[Tensor]) -> list[int]:
    return [each._version for each in tensors]
