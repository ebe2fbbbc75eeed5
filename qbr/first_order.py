"""Backwards that have no derivative themselves: whoever asks for one gets an error, and never a part of the answer."""

from __future__ import annotations

import functools

import torch
from torch import Tensor


class _Refused(torch.autograd.Function):
    """The first tensor, as a result of the others, through which no derivative goes."""

    @staticmethod
    def forward(ctx, result, *inputs):
        return result.detach()

    @staticmethod
    def backward(ctx, *grads):
        raise RuntimeError(
            "qbr's operations have first derivatives only, and this asks for a second one through them (a Hessian, a "
            "gradient penalty): take it of the float model, or of formulas in PyTorch operations"
        )


def first_order(backward):
    """A decorator of an autograd.Function's backward, under its staticmethod.

    torch's once_differentiable hangs its error where torch.autograd.grad(..., inputs) does not look, and such a second
    derivative would be 0 in silence; here the gradients hang on what they were computed from.
    """

    @functools.wraps(backward)
    def once(ctx, *grads):
        if torch.compiler.is_compiling() or not torch.is_grad_enabled():  # no create_graph=True
            return backward(ctx, *grads)
        ctx.read = []  # by qbr/saved.py
        with torch.no_grad():
            results = backward(ctx, *grads)
        inputs = [each for each in (*ctx.read, *grads) if isinstance(each, Tensor) and each.requires_grad]
        ctx.read = None
        return tuple(_Refused.apply(each, *inputs) if isinstance(each, Tensor) else each for each in results)

    return once
