"""The contract: every op's schema once, its checks, its fake (meta) kernel and its autograd.

Each backend has a namespace of its own, ``torch.ops.qbr_reference``, ``qbr_native`` and ``qbr_triton``, with the
same ops from the same schemas: none fights another over a dispatch slot, and tests call each by name.
Raw ops take dense tensors and plain numbers; ``lsq``, ``bin_loss`` and ``lsq_bin`` below check their arguments,
choose the backend and are differentiable. qbr/functional.py is what people call.

Shapes and dtypes of the raw ops:
    x, grad_xhat, xhat, dx   any shape, dense, one dtype (float32, bfloat16, float16; float64 in the reference)
    alpha, dalpha            [1] or [C], float32 (float64 for float64 x)
    loss, grad_loss          [], alpha's dtype
    bins                     [3 * L + 2] float64, L = qp - qn + 1: n_k | S_k | Q_k | sum |d| | count of |d| < 0.01 alpha
    dloss_dalpha             alpha's shape with backprop_to_alpha, else [0]
    channel_axis             -1 for one step per tensor;  clip: inf for none
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from qbr import kernels
from qbr.kernels import foreach
from qbr.spec import QuantSpec

_QUANT = "int qn, int qp, bool binary, int channel_axis, bool relu, float clip"
SCHEMAS = {
    "lsq_fwd": f"(Tensor x, Tensor alpha, {_QUANT}) -> Tensor",
    "lsq_bwd": f"(Tensor grad_xhat, Tensor x, Tensor alpha, {_QUANT}, float grad_scale) -> (Tensor, Tensor)",
    "bin_loss_fwd": f"(Tensor x, Tensor alpha, {_QUANT}, bool backprop_to_alpha) -> (Tensor, Tensor, Tensor)",
    "bin_loss_bwd": f"(Tensor grad_loss, Tensor x, Tensor alpha, Tensor bins, {_QUANT}) -> Tensor",
    "lsq_bin_fwd": f"(Tensor x, Tensor alpha, {_QUANT}, bool backprop_to_alpha) -> (Tensor, Tensor, Tensor, Tensor)",
    "lsq_bin_bwd": f"(Tensor grad_xhat, Tensor grad_loss, Tensor x, Tensor alpha, Tensor bins, {_QUANT}, "
    "float grad_scale) -> (Tensor, Tensor)",
}


def _fake_loss_bins(alpha, qn, qp, backprop_to_alpha):
    bins = alpha.new_empty(3 * (qp - qn + 1) + 2, dtype=torch.float64)
    return alpha.new_empty(()), bins, torch.empty_like(alpha) if backprop_to_alpha else alpha.new_empty(0)


def _fake_bin_loss_fwd(x, alpha, qn, qp, binary, channel_axis, relu, clip, backprop_to_alpha):
    return _fake_loss_bins(alpha, qn, qp, backprop_to_alpha)


def _fake_lsq_bin_fwd(x, alpha, qn, qp, binary, channel_axis, relu, clip, backprop_to_alpha):
    return torch.empty_like(x), *_fake_loss_bins(alpha, qn, qp, backprop_to_alpha)


FAKES = {
    "lsq_fwd": lambda x, *rest: torch.empty_like(x),
    "lsq_bwd": lambda grad_xhat, x, alpha, *rest: (torch.empty_like(x), torch.empty_like(alpha)),
    "bin_loss_fwd": _fake_bin_loss_fwd,
    "bin_loss_bwd": lambda grad_loss, x, *rest: torch.empty_like(x),
    "lsq_bin_fwd": _fake_lsq_bin_fwd,
    "lsq_bin_bwd": lambda grad_xhat, grad_loss, x, alpha, *rest: (torch.empty_like(x), torch.empty_like(alpha)),
}

FAKES |= foreach.loops(FAKES)

_libraries = {name: torch.library.Library(f"qbr_{name}", "DEF") for name in kernels.MODULES}
_ops: dict[tuple[str, str], torch._ops.OpOverload] = {}
_implemented: set[str] = set()

for _name, _library in _libraries.items():
    for _op, _schema in (SCHEMAS | foreach.SCHEMAS).items():
        _library.define(_op + _schema, tags=(torch.Tag.needs_fixed_stride_order, torch.Tag.pt2_compliant_tag))
        torch.library.register_fake(f"qbr_{_name}::{_op}", FAKES[_op], lib=_library)
        _ops[_name, _op] = getattr(getattr(torch.ops, f"qbr_{_name}"), _op).default


def implement(backend: str) -> None:
    """Register a loaded backend's Python functions as the kernels of its ops, once; compiled code did so itself."""
    if backend not in _implemented:
        module = kernels.module(backend)
        functions = {op: getattr(module, op) for op in SCHEMAS if hasattr(module, op)}
        if functions:
            functions |= foreach.loops(functions)
        for op, function in functions.items():
            _libraries[backend].impl(op, function, "CompositeExplicitAutograd")
        _implemented.add(backend)


implement("reference")


def _backend(requested: str, device_type: str, dtype: torch.dtype) -> str:
    name = kernels.resolve(requested, device_type, dtype)
    implement(name)
    return name


# What torch.compiler.assume_constant_result sets; calling that would import all of torch._dynamo with qbr.
_backend._dynamo_marked_constant = True


def is_dense(x: Tensor) -> bool:
    """Whether kernels can walk x in storage order as it lies; the layouts that a copy can be asked to keep."""
    return (
        x.is_contiguous()
        or (x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last))
        or (x.dim() == 5 and x.is_contiguous(memory_format=torch.channels_last_3d))
    )


def _laid_out_like(grad: Tensor, x: Tensor) -> Tensor:
    """grad in x's dtype and strides, copied only where they differ: kernels walk both in storage order."""
    if grad.dtype == x.dtype and grad.stride() == x.stride():
        return grad
    return torch.empty_like(x).copy_(grad)


def check(x: Tensor, alpha, spec: QuantSpec, relu: bool, clip: float | None) -> tuple[Tensor, Tensor, tuple]:
    """Check one call's arguments; return dense x, alpha as [C] in the compute dtype, and the ops' plain arguments.

    Raises:
        TypeError, ValueError: naming the argument, its value and the remedy. Values of an alpha that is a tensor
            are not read (that would synchronise with the device); modules check them when they are made or loaded.
    """
    if not isinstance(x, Tensor) or not x.is_floating_point():
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
    if clip is not None and not clip > 0:
        raise ValueError(f"clip={clip}: expected a positive number, or None for no upper bound")
    if relu and spec.qn < 0:
        raise ValueError(f"relu=True with spec.qn={spec.qn}: half of the levels could never occur; use signed=False")
    clip = math.inf if clip is None else float(clip)
    plain = (spec.qn, spec.qp, spec.binary, -1 if axis is None else axis, bool(relu), clip)
    return x if is_dense(x) else x.contiguous(), alpha, plain


def check_alpha(alpha, x: Tensor, channels: int, dtype: torch.dtype) -> Tensor:
    """alpha as a tensor [channels] of dtype on x's device; a number is checked and converted."""
    if not isinstance(alpha, Tensor):
        if not (math.isfinite(alpha) and alpha > 0):
            raise ValueError(f"alpha={alpha}: expected a positive, finite step size")
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


class _LSQ(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, alpha, backend, plain, grad_scale):
        ctx.save_for_backward(x, alpha)
        ctx.call = backend, plain, grad_scale
        return _ops[backend, "lsq_fwd"](x, alpha, *plain)

    @staticmethod
    def backward(ctx, grad_xhat):
        x, alpha = ctx.saved_tensors
        backend, plain, grad_scale = ctx.call
        dx, dalpha = _ops[backend, "lsq_bwd"](_laid_out_like(grad_xhat, x), x, alpha, *plain, grad_scale)
        return dx, dalpha, None, None, None


class _BinLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, alpha, backend, plain, br_to_alpha):
        loss, bins, dloss_dalpha = _ops[backend, "bin_loss_fwd"](x, alpha, *plain, br_to_alpha != 0)
        ctx.save_for_backward(x, alpha, bins, dloss_dalpha)
        ctx.call = backend, plain, br_to_alpha
        ctx.mark_non_differentiable(bins)
        return loss, bins

    @staticmethod
    def backward(ctx, grad_loss, _):
        x, alpha, bins, dloss_dalpha = ctx.saved_tensors
        backend, plain, br_to_alpha = ctx.call
        dx = _ops[backend, "bin_loss_bwd"](grad_loss, x, alpha, bins, *plain)
        dalpha = dloss_dalpha * (grad_loss * br_to_alpha) if br_to_alpha != 0 else None
        return dx, dalpha, None, None, None


class _LSQBin(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, alpha, backend, plain, grad_scale, br_to_alpha):
        xhat, loss, bins, dloss_dalpha = _ops[backend, "lsq_bin_fwd"](x, alpha, *plain, br_to_alpha != 0)
        ctx.save_for_backward(x, alpha, bins, dloss_dalpha)
        ctx.call = backend, plain, grad_scale, br_to_alpha
        ctx.mark_non_differentiable(bins)
        return xhat, loss, bins

    @staticmethod
    def backward(ctx, grad_xhat, grad_loss, _):
        x, alpha, bins, dloss_dalpha = ctx.saved_tensors
        backend, plain, grad_scale, br_to_alpha = ctx.call
        grad_xhat = _laid_out_like(grad_xhat, x)
        dx, dalpha = _ops[backend, "lsq_bin_bwd"](grad_xhat, grad_loss, x, alpha, bins, *plain, grad_scale)
        if br_to_alpha != 0:
            dalpha = dalpha + dloss_dalpha * (grad_loss * br_to_alpha)
        return dx, dalpha, None, None, None, None


class _ForeachLSQ(torch.autograd.Function):
    @staticmethod
    def forward(ctx, backend, quant, grad_scales, *tensors):
        xs, alphas = _halves(tensors)
        ctx.save_for_backward(*tensors)
        ctx.set_materialize_grads(False)
        ctx.call = backend, quant, grad_scales
        return tuple(_ops[backend, "foreach_lsq_fwd"](xs, alphas, *quant))

    @staticmethod
    def backward(ctx, *grad_xhats):
        xs, alphas = _halves(ctx.saved_tensors)
        backend, (ranges, *relu), grad_scales = ctx.call
        used = [i for i, grad in enumerate(grad_xhats) if grad is not None]
        grads = [_laid_out_like(grad_xhats[i], xs[i]) for i in used]
        xs, alphas, grad_scales = _at(used, xs, alphas, grad_scales)
        dxs, dalphas = _ops[backend, "foreach_lsq_bwd"](grads, xs, alphas, _ranges(used, ranges), *relu, grad_scales)
        return None, None, None, *_spread(used, dxs, len(grad_xhats)), *_spread(used, dalphas, len(grad_xhats))


class _ForeachLSQBin(torch.autograd.Function):
    @staticmethod
    def forward(ctx, backend, quant, grad_scales, br_to_alphas, *tensors):
        xs, alphas = _halves(tensors)
        to_alpha = any(br_to_alphas)
        xhats, losses, bins, dloss_dalphas = _ops[backend, "foreach_lsq_bin_fwd"](xs, alphas, *quant, to_alpha)
        ctx.save_for_backward(*tensors, *bins, *dloss_dalphas)
        ctx.set_materialize_grads(False)
        ctx.call = backend, quant, grad_scales, br_to_alphas
        ctx.mark_non_differentiable(*bins)
        return *xhats, *losses, *bins

    @staticmethod
    def backward(ctx, *grads):
        xs, alphas, bins, dloss_dalphas = _halves(ctx.saved_tensors, 4)
        backend, (ranges, *relu), grad_scales, br_to_alphas = ctx.call
        count = len(xs)
        # A tensor that nobody used has no gradient, as one that was never quantized.
        used = [i for i in range(count) if grads[i] is not None or grads[count + i] is not None]
        grad_xhats = [torch.zeros_like(xs[i]) if grads[i] is None else _laid_out_like(grads[i], xs[i]) for i in used]
        grad_losses = [alphas[i].new_zeros(()) if grads[count + i] is None else grads[count + i] for i in used]
        xs, alphas, bins, grad_scales = _at(used, xs, alphas, bins, grad_scales)
        dxs, dalphas = _ops[backend, "foreach_lsq_bin_bwd"](
            grad_xhats, grad_losses, xs, alphas, bins, _ranges(used, ranges), *relu, grad_scales
        )
        for j, i in enumerate(used):
            if br_to_alphas[i] != 0:
                dalphas[j] = dalphas[j] + dloss_dalphas[i] * (grad_losses[j] * br_to_alphas[i])
        return None, None, None, None, *_spread(used, dxs, count), *_spread(used, dalphas, count)


def _halves(tensors, parts: int = 2) -> list[list[Tensor]]:
    size = len(tensors) // parts
    return [list(tensors[i * size : (i + 1) * size]) for i in range(parts)]


def _at(used: list[int], *lists) -> list[list]:
    return [[each[i] for i in used] for each in lists]


def _ranges(used: list[int], ranges: list[int]) -> list[int]:
    return [ranges[4 * i + j] for i in used for j in range(4)]


def _spread(used: list[int], values, count: int) -> list:
    spread = [None] * count
    for i, value in zip(used, values):
        spread[i] = value
    return spread


def foreach_lsq(xs, alphas, specs, relu, clip, backend) -> list[Tensor]:
    results: list = [None] * len(xs)
    for used, name, quant, grad_scales, xs_, alphas_ in _groups(xs, alphas, specs, relu, clip, backend):
        xhats = _ForeachLSQ.apply(name, quant, grad_scales, *xs_, *alphas_)
        for i, xhat in zip(used, xhats):
            results[i] = xhat
    return results


def foreach_lsq_bin(xs, alphas, specs, relu, clip, backprop_to_alphas, backend) -> list[tuple[Tensor, Tensor, Tensor]]:
    results: list = [None] * len(xs)
    for used, name, quant, grad_scales, xs_, alphas_ in _groups(xs, alphas, specs, relu, clip, backend):
        factors = [
            br_to_alpha_factor(backprop_to_alphas[i], x, alpha, specs[i]) for i, x, alpha in zip(used, xs_, alphas_)
        ]
        flat = _ForeachLSQBin.apply(name, quant, grad_scales, factors, *xs_, *alphas_)
        for i, *each in zip(used, *_halves(flat, 3)):
            results[i] = tuple(each)
    return results


def _groups(xs, alphas, specs, relu, clip, backend):
    """Checked arguments, list by list: tensors of one device and backend go together."""
    groups: dict[tuple, list] = {}
    for i, (x, alpha, spec) in enumerate(zip(xs, alphas, specs)):
        x, alpha, plain = check(x, alpha, spec, relu, clip)
        key = (x.device, _backend(backend, x.device.type, x.dtype), *plain[4:])
        grad_scale = _grad_scale(x, alpha, spec)
        groups.setdefault(key, []).append((i, x, alpha, plain[:4], grad_scale))
    for (_, name, relu_, clip_), members in groups.items():
        used, xs_, alphas_, ranges, grad_scales = zip(*members)
        quant = [int(value) for each in ranges for value in each], relu_, clip_
        yield list(used), name, quant, list(grad_scales), xs_, alphas_


def _grad_scale(x: Tensor, alpha: Tensor, spec: QuantSpec) -> float:
    return spec.lsq_grad_scale(x.numel() // max(alpha.numel(), 1))


def lsq(x, alpha, spec, relu, clip, backend) -> Tensor:
    x, alpha, plain = check(x, alpha, spec, relu, clip)
    backend = _backend(backend, x.device.type, x.dtype)
    if not torch.is_grad_enabled():  # the gradient's scale is a number: it would fix a dynamic batch in torch.export
        return _ops[backend, "lsq_fwd"](x, alpha, *plain)
    return _LSQ.apply(x, alpha, backend, plain, _grad_scale(x, alpha, spec))


def bin_loss(x, alpha, spec, relu, clip, backprop_to_alpha, backend) -> tuple[Tensor, Tensor]:
    x, alpha, plain = check(x, alpha, spec, relu, clip)
    backend = _backend(backend, x.device.type, x.dtype)
    return _BinLoss.apply(x, alpha, backend, plain, br_to_alpha_factor(backprop_to_alpha, x, alpha, spec))


def lsq_bin(x, alpha, spec, relu, clip, backprop_to_alpha, backend) -> tuple[Tensor, Tensor, Tensor]:
    x, alpha, plain = check(x, alpha, spec, relu, clip)
    backend = _backend(backend, x.device.type, x.dtype)
    grad_scale = _grad_scale(x, alpha, spec)
    return _LSQBin.apply(x, alpha, backend, plain, grad_scale, br_to_alpha_factor(backprop_to_alpha, x, alpha, spec))


def br_to_alpha_factor(backprop_to_alpha: bool | str, x: Tensor, alpha: Tensor, spec: QuantSpec) -> float:
    """What multiplies BR's gradient of alpha: 0 (off), 1 (True) or LSQ's gradient scale ("scaled")."""
    if backprop_to_alpha == "scaled":
        return _grad_scale(x, alpha, spec)
    if not isinstance(backprop_to_alpha, bool):
        raise ValueError(f"backprop_to_alpha={backprop_to_alpha!r}: expected False, True or 'scaled'")
    return float(backprop_to_alpha)
