"""The checks of arguments, before anything is computed, and how x has to lie for the kernels."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from qbr.kernels import is_dense, reference
from qbr.spec import QuantSpec, check_flag, is_number


def check(x: Tensor, alpha, spec: QuantSpec, relu: bool, clip: float | None) -> tuple[Tensor, Tensor, tuple]:
    """Check one call's arguments; return dense x, alpha as [C] in the compute dtype, and the ops' plain arguments.

    Raises:
        TypeError, ValueError: naming the argument, its value and the remedy. Values of an alpha that is a tensor
            are not read (that would synchronise with the device); modules check them when they are made or loaded.
    """
    if not isinstance(x, Tensor) or x.dtype not in reference.DTYPES:
        got = f"{x.dtype} tensor" if isinstance(x, Tensor) else type(x).__name__
        remedy = "trace the model before qbr.prepare, or after qbr.convert" if got == "Proxy" else "cast it first"
        raise TypeError(f"x is a {got}: expected a tensor of float32, bfloat16, float16 or float64; {remedy}")
    if x.layout is not torch.strided or x.is_nested:
        kind = "nested" if x.is_nested else x.layout
        raise TypeError(f"x is a {kind} tensor: expected a strided one; pass x.to_dense()")
    if not isinstance(spec, QuantSpec):
        raise TypeError(f"spec={spec!r}: expected a qbr.QuantSpec")
    check_flag(relu, "relu")
    axis = spec.channel_axis
    if axis is not None:
        if not -x.dim() <= axis < x.dim():
            raise ValueError(f"spec.channel_axis={axis} is not a dimension of x with shape {tuple(x.shape)}")
        axis %= x.dim()
    compute_dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    alpha = check_alpha(alpha, x, 1 if axis is None else x.shape[axis], compute_dtype)
    if clip is not None and not relu:
        raise ValueError(f"clip={clip} without relu: clip is the upper bound of the fused ReLU; pass relu=True")
    if clip is not None and not is_number(clip):
        raise TypeError(f"clip={clip!r}: expected a number, or None for no upper bound")
    if clip is not None and not clip > 0:
        raise ValueError(f"clip={clip}: expected a positive number, or None for no upper bound")
    if relu and spec.qn < 0:
        raise ValueError(f"relu=True with spec.qn={spec.qn}: half of the levels could never occur; use signed=False")
    # One beyond the type's numbers is no bound, as rounding it to that type says; clamp() would refuse it.
    clip = math.inf if clip is None or clip > torch.finfo(compute_dtype).max else float(clip)
    plain = (spec.qn, spec.qp, spec.binary, -1 if axis is None else axis, relu, clip)
    return x if is_dense(x) else x.contiguous(), alpha, plain


def check_count(value: int, name: str, least: int) -> None:
    """Raise TypeError or ValueError, naming the argument, unless value is an int of ``least`` or more."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name}={value!r}: expected an int")
    if value < least:
        raise ValueError(f"{name}={value}: expected {least} or more")


def check_bits(bits: int, argument: str, instead: str = "; use the float layer to leave a tensor in float") -> int:
    """bits, if a kernel has it; the error names the argument that the caller used, and ``instead``."""
    if isinstance(bits, bool) or not isinstance(bits, int):
        raise TypeError(f"{argument}={bits!r}: expected an int, 1 to 8")
    if not 1 <= bits <= 8:
        raise ValueError(f"{argument}={bits}: expected 1 to 8{instead}")
    return bits


def check_clip(clip: float | None, argument: str) -> float | None:
    """clip as a float, or None; TypeError or ValueError, naming the argument, for what is no bound in float32."""
    if clip is None:
        return None
    expected = "expected a positive number within float32's, or None for no upper bound"
    if not is_number(clip):
        raise TypeError(f"{argument}={clip!r}: {expected}")
    if not 0 < clip <= torch.finfo(torch.float32).max:
        raise ValueError(f"{argument}={clip}: {expected}")
    return float(clip)


def check_step(alpha: float, argument: str) -> float:
    """alpha as a float, if it is positive and finite in float32."""
    if not is_number(alpha):
        raise TypeError(f"{argument}={alpha!r}: expected a number")
    if not _in_range(alpha, torch.float32):
        raise ValueError(f"{argument}={alpha}: expected a positive, finite step size, in float32's range")
    return float(alpha)


def _in_range(alpha: float, dtype: torch.dtype) -> bool:
    limits = torch.finfo(dtype)
    return limits.tiny * limits.eps <= alpha <= limits.max


def usable(steps: Tensor) -> Tensor:
    """Which step sizes are positive and finite: bool, in their shape."""
    return torch.isfinite(steps) & (steps > 0)


def check_alpha_grad(alpha_grad: float) -> None:
    """Raise TypeError or ValueError unless alpha's gradient can be multiplied by it."""
    if not is_number(alpha_grad):
        raise TypeError(f"alpha_grad={alpha_grad!r}: expected a number, 0 or more")
    if not 0 <= alpha_grad < math.inf:
        raise ValueError(f"alpha_grad={alpha_grad}: expected a finite number, 0 or more")


def check_alpha(alpha, x: Tensor, channels: int, dtype: torch.dtype) -> Tensor:
    """alpha as a tensor [channels] of dtype on x's device; a number is checked and converted."""
    if not isinstance(alpha, Tensor):
        if not is_number(alpha):
            raise TypeError(f"alpha={alpha!r}: expected a number, or a tensor of one step or one per channel")
        if not _in_range(alpha, dtype):
            raise ValueError(f"alpha={alpha}: expected a positive, finite step size, in {dtype}'s range")
        return torch.full((channels,), float(alpha), dtype=dtype, device=x.device)
    if alpha.numel() != channels:
        what = "one step per tensor" if channels == 1 else f"one step per channel, {channels}"
        raise ValueError(f"alpha has {alpha.numel()} elements (shape {tuple(alpha.shape)}): expected {what}")
    if alpha.device != x.device:
        raise ValueError(f"alpha is on {alpha.device} and x on {x.device}: move alpha with alpha.to(x.device)")
    if alpha.layout is not torch.strided:
        raise TypeError(f"alpha is a {alpha.layout} tensor: expected a strided one")
    if not alpha.is_floating_point():
        raise TypeError(f"alpha is a {alpha.dtype} tensor: expected {dtype}")
    if alpha.dtype == dtype and alpha.dim() == 1 and alpha.is_contiguous():
        return alpha  # as modules keep it: three calls fewer, forward and backward
    return alpha.to(dtype).reshape(channels).contiguous()
