"""The checks of one call's arguments, before anything is computed, and how x has to lie for the kernels."""

from __future__ import annotations

import math
import numbers

import torch
from torch import Tensor

from qbr.kernels import is_dense, reference
from qbr.spec import QuantSpec


def check(x: Tensor, alpha, spec: QuantSpec, relu: bool, clip: float | None) -> tuple[Tensor, Tensor, tuple]:
    """Check one call's arguments; return dense x, alpha as [C] in the compute dtype, and the ops' plain arguments.

    Raises:
        TypeError, ValueError: naming the argument, its value and the remedy. Values of an alpha that is a tensor
            are not read (that would synchronise with the device); modules check them when they are made or loaded.
    """
    if not isinstance(x, Tensor) or x.dtype not in reference.DTYPES:
        got = f"{x.dtype} tensor" if isinstance(x, Tensor) else type(x).__name__
        raise TypeError(f"x is a {got}: expected a tensor of float32, bfloat16, float16 or float64; cast it first")
    if not isinstance(spec, QuantSpec):
        raise TypeError(f"spec={spec!r}: expected a qbr.QuantSpec")
    axis = spec.channel_axis
    if axis is not None:
        if not -x.dim() <= axis < x.dim():
            raise ValueError(f"spec.channel_axis={axis} is not a dimension of x with shape {tuple(x.shape)}")
        axis %= x.dim()
    compute_dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    alpha = check_alpha(alpha, x, 1 if axis is None else x.shape[axis], compute_dtype)
    if clip is not None and not relu:
        raise ValueError(f"clip={clip} without relu: clip is the upper bound of the fused ReLU; pass relu=True")
    if clip is not None and not isinstance(clip, numbers.Real):
        raise TypeError(f"clip={clip!r}: expected a number, or None for no upper bound")
    if clip is not None and not clip > 0:
        raise ValueError(f"clip={clip}: expected a positive number, or None for no upper bound")
    if relu and spec.qn < 0:
        raise ValueError(f"relu=True with spec.qn={spec.qn}: half of the levels could never occur; use signed=False")
    # One beyond the type's numbers is no bound, as rounding it to that type says; clamp() would refuse it.
    clip = math.inf if clip is None or clip > torch.finfo(compute_dtype).max else float(clip)
    plain = (spec.qn, spec.qp, spec.binary, -1 if axis is None else axis, bool(relu), clip)
    return x if is_dense(x) else x.contiguous(), alpha, plain


def usable(steps: Tensor) -> Tensor:
    """Which step sizes are positive and finite: bool, in their shape."""
    return torch.isfinite(steps) & (steps > 0)


def check_alpha_grad(alpha_grad: float) -> None:
    """Raise TypeError or ValueError unless alpha's gradient can be multiplied by it."""
    if not isinstance(alpha_grad, numbers.Real):
        raise TypeError(f"alpha_grad={alpha_grad!r}: expected a number, 0 or more")
    if not 0 <= alpha_grad < math.inf:
        raise ValueError(f"alpha_grad={alpha_grad}: expected a finite number, 0 or more")


def check_alpha(alpha, x: Tensor, channels: int, dtype: torch.dtype) -> Tensor:
    """alpha as a tensor [channels] of dtype on x's device; a number is checked and converted."""
    if not isinstance(alpha, Tensor):
        if not isinstance(alpha, numbers.Real):
            raise TypeError(f"alpha={alpha!r}: expected a number, or a tensor of one step or one per channel")
        limits = torch.finfo(dtype)
        if not limits.tiny * limits.eps <= alpha <= limits.max:
            raise ValueError(f"alpha={alpha}: expected a positive, finite step size, in {dtype}'s range")
        return torch.full((channels,), alpha, dtype=dtype, device=x.device)
    if alpha.numel() != channels:
        what = "one step per tensor" if channels == 1 else f"one step per channel, {channels}"
        raise ValueError(f"alpha has {alpha.numel()} elements (shape {tuple(alpha.shape)}): expected {what}")
    if alpha.device != x.device:
        raise ValueError(f"alpha is on {alpha.device} and x on {x.device}: move alpha with alpha.to(x.device)")
    if not alpha.is_floating_point():
        raise TypeError(f"alpha is a {alpha.dtype} tensor: expected {dtype}")
    if alpha.dtype == dtype and alpha.dim() == 1 and alpha.is_contiguous():
        return alpha  # as modules keep it: three calls fewer, forward and backward
    return alpha.to(dtype).reshape(channels).contiguous()
