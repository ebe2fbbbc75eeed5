"""The contract: every op's schema once, its fake (meta) kernel and its autograd.

Each backend has a namespace of its own, ``torch.ops.qbr_reference``, ``qbr_native`` and ``qbr_triton``, with the
same ops from the same schemas: none fights another over a dispatch slot, and tests call each by name.
Raw ops take dense tensors and plain numbers; ``lsq``, ``bin_loss`` and ``lsq_bin`` below check their arguments
(qbr/arguments.py), choose the backend and are differentiable. qbr/functional.py is what people call.

Shapes and dtypes of the raw ops:
    x, grad_xhat, xhat, dx   any shape, dense, one dtype (float32, bfloat16, float16; float64 in the reference)
    alpha, dalpha            [1] or [C], float32 (float64 for float64 x)
    loss, grad_loss          [], alpha's dtype
    bins                     [3 * L + 2] float64, L = qp - qn + 1: n_k | S_k | Q_k | sum |d| | count of |d| < 0.01 alpha
    dloss_dalpha             alpha's shape with backprop_to_alpha, else [0]
    channel_axis             -1 for one step per tensor;  clip: inf for none
"""

from __future__ import annotations

import torch
from torch import Tensor

from qbr import kernels
from qbr.arguments import check, check_alpha_grad
from qbr.first_order import first_order
from qbr.fork_lock import ForkLock
from qbr.kernels import foreach, reference
from qbr.saved import save, saved
from qbr.spec import check_regularizer, check_to_alpha, lsq_grad_scale

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
_lock = ForkLock()

# Exact strides: inductor pads large ones on GPUs, and kernels walk a dense tensor's memory from end to end.
TAGS = (torch.Tag.needs_exact_strides, torch.Tag.pt2_compliant_tag)

for _name, _library in _libraries.items():
    for _op, _schema in (SCHEMAS | foreach.SCHEMAS).items():
        _library.define(_op + _schema, tags=TAGS)
        torch.library.register_fake(f"qbr_{_name}::{_op}", FAKES[_op], lib=_library)
        _ops[_name, _op] = getattr(getattr(torch.ops, f"qbr_{_name}"), _op).default


def implement(backend: str) -> None:
    """Register a loaded backend's Python functions as the kernels of its ops, once; compiled code did so itself."""
    if backend in _implemented:
        return
    with _lock:
        if backend in _implemented:  # another thread has, meanwhile
            return
        module = kernels.module(backend)
        functions = {op: getattr(module, op) for op in SCHEMAS if hasattr(module, op)}
        if functions:
            functions |= foreach.loops(functions) | kernels.list_functions(backend)
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


class _LSQ(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, alpha, backend, plain, alpha_grad):
        save(ctx, [x], x, alpha)
        ctx.call = backend, plain, alpha_grad
        return _ops[backend, "lsq_fwd"](x, alpha, *plain)

    @staticmethod
    @first_order
    def backward(ctx, grad_xhat):
        x, alpha = saved(ctx)
        backend, plain, alpha_grad = ctx.call
        here, later = _split_grad_scale(x, alpha, plain, alpha_grad)
        dx, dalpha = _ops[backend, "lsq_bwd"](kernels.laid_out_like(grad_xhat, x), x, alpha, *plain, here)
        return dx, _times(dalpha, later), None, None, None


class _BinLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, alpha, backend, plain, br_to_alpha, dampening):
        asks = br_to_alpha[0] != 0
        loss, bins, dloss_dalpha = _ops[backend, "bin_loss_fwd"](x, alpha, *plain, asks and not dampening)
        loss, weights, dloss_dalpha = _regularized(dampening, loss, bins, dloss_dalpha, x, alpha, plain, asks)
        save(ctx, [x], x, alpha, weights, dloss_dalpha)
        ctx.call = backend, plain, br_to_alpha
        ctx.mark_non_differentiable(bins)
        return loss, bins

    @staticmethod
    @first_order
    def backward(ctx, grad_loss, _):
        x, alpha, weights, dloss_dalpha = saved(ctx)
        backend, plain, br_to_alpha = ctx.call
        dx = _ops[backend, "bin_loss_bwd"](grad_loss, x, alpha, weights, *plain)
        factor = _of_br(br_to_alpha, _grad_scale(x, alpha, plain, 1.0))
        dalpha = dloss_dalpha * (grad_loss * factor) if br_to_alpha[0] != 0 else None
        return dx, dalpha, None, None, None, None


class _LSQBin(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, alpha, backend, plain, alpha_grad, br_to_alpha, dampening):
        asks = br_to_alpha[0] != 0
        xhat, loss, bins, dloss_dalpha = _ops[backend, "lsq_bin_fwd"](x, alpha, *plain, asks and not dampening)
        loss, weights, dloss_dalpha = _regularized(dampening, loss, bins, dloss_dalpha, x, alpha, plain, asks)
        save(ctx, [x], x, alpha, weights, dloss_dalpha)
        ctx.set_materialize_grads(False)
        ctx.call = backend, plain, alpha_grad, br_to_alpha
        ctx.mark_non_differentiable(bins)
        return xhat, loss, bins

    @staticmethod
    @first_order
    def backward(ctx, grad_xhat, grad_loss, _):
        x, alpha, weights, dloss_dalpha = saved(ctx)
        backend, plain, alpha_grad, br_to_alpha = ctx.call
        here, later = _split_grad_scale(x, alpha, plain, alpha_grad)
        grad_xhat = torch.zeros_like(x) if grad_xhat is None else kernels.laid_out_like(grad_xhat, x)
        if grad_loss is None:  # nobody used the loss: what LSQ alone does, to the bit
            dx, dalpha = _ops[backend, "lsq_bwd"](grad_xhat, x, alpha, *plain, here)
            return dx, _times(dalpha, later), None, None, None, None, None
        dx, dalpha = _ops[backend, "lsq_bin_bwd"](grad_xhat, grad_loss, x, alpha, weights, *plain, here)
        dalpha = _times(dalpha, later)
        if br_to_alpha[0] != 0:
            factor = _of_br(br_to_alpha, _grad_scale(x, alpha, plain, alpha_grad))
            dalpha = dalpha + dloss_dalpha * (grad_loss * factor)
        return dx, dalpha, None, None, None, None, None


def _split_grad_scale(x, alpha, plain, alpha_grad):
    """(what the kernel multiplies alpha's gradient by, what _times does afterwards), together _grad_scale().

    The scale depends on x's size and a kernel takes a number: torch.compile would make a graph for each size.
    """
    scale = _grad_scale(x, alpha, plain, alpha_grad)
    return (1.0, scale) if torch.compiler.is_compiling() else (scale, None)


def _times(dalpha: Tensor, later) -> Tensor:
    return dalpha if later is None else dalpha * later


def _grad_scale(x: Tensor, alpha: Tensor, plain, alpha_grad: float) -> float:
    """LSQ's scale of alpha's gradient, times alpha_grad."""
    return alpha_grad * lsq_grad_scale(x.numel() // max(alpha.numel(), 1), plain[1])


def _regularized(dampening, loss, bins, dloss_dalpha, x, alpha, plain, to_alpha):
    """(loss, the table that backward takes n_k from, dloss_dalpha): of BR as they come from the kernel, of dampening
    from the same bin sums with 1 in the place of every n_k."""
    if not dampening:
        return loss, bins, dloss_dalpha
    levels = plain[1] - plain[0] + 1
    if to_alpha:
        dloss_dalpha = reference.dampening_dalpha(x, alpha, bins, *plain)
    return bins[2 * levels : 3 * levels].sum().to(loss.dtype), torch.ones_like(bins), dloss_dalpha


class _ForeachLSQ(torch.autograd.Function):
    @staticmethod
    def forward(ctx, backend, quant, grad_scales, *tensors):
        xs, alphas = _halves(tensors)
        save(ctx, xs, *tensors)
        ctx.set_materialize_grads(False)
        ctx.call = backend, quant, grad_scales
        return tuple(_ops[backend, "foreach_lsq_fwd"](xs, alphas, *quant))

    @staticmethod
    @first_order
    def backward(ctx, *grad_xhats):
        backend, (ranges, *relu), grad_scales = ctx.call
        used = [i for i, grad in enumerate(grad_xhats) if grad is not None]
        xs, alphas = _halves(saved(ctx, used))
        grads = [kernels.laid_out_like(grad_xhats[i], xs[i]) for i in used]
        xs, alphas, grad_scales = _at(used, xs, alphas, grad_scales)
        dxs, dalphas = _ops[backend, "foreach_lsq_bwd"](grads, xs, alphas, _ranges(used, ranges), *relu, grad_scales)
        return None, None, None, *_spread(used, dxs, len(grad_xhats)), *_spread(used, dalphas, len(grad_xhats))


class _ForeachBinLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, backend, quant, br_to_alphas, dampenings, *tensors):
        xs, alphas = _halves(tensors)
        results = _ops[backend, "foreach_bin_loss_fwd"](xs, alphas, *quant, _asks_br(br_to_alphas, dampenings))
        losses, bins, weights, dloss_dalphas = _all_regularized(dampenings, *results, xs, alphas, quant, br_to_alphas)
        save(ctx, xs, *tensors, *weights, *dloss_dalphas)
        ctx.set_materialize_grads(False)
        ctx.call = backend, quant, br_to_alphas
        ctx.mark_non_differentiable(*bins)
        return *losses, *bins

    @staticmethod
    @first_order
    def backward(ctx, *grads):
        backend, (ranges, *relu), br_to_alphas = ctx.call
        count = len(grads) // 2
        used = [i for i in range(count) if grads[i] is not None]
        xs, alphas, weights, dloss_dalphas = _halves(saved(ctx, used), 4)
        lists = _at(used, grads, xs, alphas, weights)
        dxs = _ops[backend, "foreach_bin_loss_bwd"](*lists, _ranges(used, ranges), *relu)
        dalphas = [dloss_dalphas[i] * (grads[i] * br_to_alphas[i]) if br_to_alphas[i] != 0 else None for i in used]
        return None, None, None, None, *_spread(used, dxs, count), *_spread(used, dalphas, count)


class _ForeachLSQBin(torch.autograd.Function):
    @staticmethod
    def forward(ctx, backend, quant, grad_scales, br_to_alphas, dampenings, *tensors):
        xs, alphas = _halves(tensors)
        xhats, *results = _ops[backend, "foreach_lsq_bin_fwd"](xs, alphas, *quant, _asks_br(br_to_alphas, dampenings))
        losses, bins, weights, dloss_dalphas = _all_regularized(dampenings, *results, xs, alphas, quant, br_to_alphas)
        save(ctx, xs, *tensors, *weights, *dloss_dalphas)
        ctx.set_materialize_grads(False)
        ctx.call = backend, quant, grad_scales, br_to_alphas
        ctx.mark_non_differentiable(*bins)
        return *xhats, *losses, *bins

    @staticmethod
    @first_order
    def backward(ctx, *grads):
        backend, (ranges, *relu), grad_scales, br_to_alphas = ctx.call
        count = len(grads) // 3
        grad_losses = grads[count : 2 * count]
        with_loss = [i for i in range(count) if grad_losses[i] is not None]
        without = [i for i in range(count) if grad_losses[i] is None and grads[i] is not None]
        xs, alphas, weights, dloss_dalphas = _halves(saved(ctx, with_loss + without), 4)
        dxs, dalphas = [None] * count, [None] * count  # none for a tensor that nobody used
        # Two lists, since what LSQ alone does is not BR with a gradient of 0 where a distance is infinite.
        for used, op in ((without, "foreach_lsq_bwd"), (with_loss, "foreach_lsq_bin_bwd")):
            if not used:
                continue
            of_xhats = [
                torch.zeros_like(xs[i]) if grads[i] is None else kernels.laid_out_like(grads[i], xs[i]) for i in used
            ]
            if used is without:
                lists = of_xhats, *_at(used, xs, alphas)
            else:
                lists = of_xhats, *_at(used, grad_losses, xs, alphas, weights)
            made = _ops[backend, op](*lists, _ranges(used, ranges), *relu, *_at(used, grad_scales))
            for i, dx, dalpha in zip(used, *made):
                dxs[i], dalphas[i] = dx, dalpha
        for i in with_loss:
            if br_to_alphas[i] != 0:
                dalphas[i] = dalphas[i] + dloss_dalphas[i] * (grad_losses[i] * br_to_alphas[i])
        return None, None, None, None, None, *dxs, *dalphas


def _asks_br(br_to_alphas: list[float], dampenings: list[bool]) -> bool:
    """Whether the kernels are to give BR's gradient of any alpha."""
    return any(factor != 0 and not dampening for factor, dampening in zip(br_to_alphas, dampenings))


def _all_regularized(dampenings, losses, bins, dloss_dalphas, xs, alphas, quant, br_to_alphas):
    """_regularized() of every tensor: losses, bins as they are, weights, dloss_dalphas."""
    plains = [(*each, *quant[1:]) for each in foreach.quants(quant[0])]
    to_alphas = [factor != 0 for factor in br_to_alphas]
    each = zip(dampenings, losses, bins, dloss_dalphas, xs, alphas, plains, to_alphas)
    made = [_regularized(*arguments) for arguments in each]
    return [loss for loss, _, _ in made], bins, [weights for _, weights, _ in made], [dalpha for *_, dalpha in made]


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


def foreach_lsq(xs, alphas, specs, relu, clip, backend, alpha_grads) -> list[Tensor]:
    results: list = [None] * len(xs)
    for used, name, quant, grad_scales, xs_, alphas_ in _groups(xs, alphas, specs, relu, clip, backend, alpha_grads):
        xhats = _ForeachLSQ.apply(name, quant, grad_scales, *xs_, *alphas_)
        for i, xhat in zip(used, xhats):
            results[i] = xhat
    return results


def foreach_bin_loss(
    xs, alphas, specs, relu, clip, backprop_to_alphas, regularizers, backend
) -> list[tuple[Tensor, Tensor]]:
    results: list = [None] * len(xs)
    groups = _groups(xs, alphas, specs, relu, clip, backend, [1.0] * len(xs))
    for used, name, quant, grad_scales, xs_, alphas_ in groups:
        factors = [br_to_alpha_factor(backprop_to_alphas[i], scale) for i, scale in zip(used, grad_scales)]
        dampenings = [is_dampening(regularizers[i]) for i in used]
        flat = _ForeachBinLoss.apply(name, quant, factors, dampenings, *xs_, *alphas_)
        for i, *each in zip(used, *_halves(flat)):
            results[i] = tuple(each)
    return results


def foreach_lsq_bin(
    xs, alphas, specs, relu, clip, backprop_to_alphas, regularizers, backend, alpha_grads
) -> list[tuple[Tensor, Tensor, Tensor]]:
    results: list = [None] * len(xs)
    for used, name, quant, grad_scales, xs_, alphas_ in _groups(xs, alphas, specs, relu, clip, backend, alpha_grads):
        factors = [br_to_alpha_factor(backprop_to_alphas[i], scale) for i, scale in zip(used, grad_scales)]
        dampenings = [is_dampening(regularizers[i]) for i in used]
        flat = _ForeachLSQBin.apply(name, quant, grad_scales, factors, dampenings, *xs_, *alphas_)
        for i, *each in zip(used, *_halves(flat, 3)):
            results[i] = tuple(each)
    return results


def _groups(xs, alphas, specs, relu, clip, backend, alpha_grads):
    """Checked arguments, list by list: tensors of one device and backend go together."""
    groups: dict[tuple, list] = {}
    for i, (x, alpha, spec) in enumerate(zip(xs, alphas, specs)):
        x, alpha, plain = check(x, alpha, spec, relu, clip)
        check_alpha_grad(alpha_grads[i])
        key = (x.device, _backend(backend, x.device.type, x.dtype), *plain[4:])
        grad_scale = _grad_scale(x, alpha, plain, alpha_grads[i])
        groups.setdefault(key, []).append((i, x, alpha, plain[:4], grad_scale))
    for (_, name, relu_, clip_), members in groups.items():
        used, xs_, alphas_, ranges, grad_scales = zip(*members)
        quant = [int(value) for each in ranges for value in each], relu_, clip_
        yield list(used), name, quant, list(grad_scales), xs_, alphas_


def lsq(x, alpha, spec, relu, clip, backend, alpha_grad) -> Tensor:
    x, alpha, plain = check(x, alpha, spec, relu, clip)
    check_alpha_grad(alpha_grad)
    return _LSQ.apply(x, alpha, _backend(backend, x.device.type, x.dtype), plain, alpha_grad)


def bin_loss(x, alpha, spec, relu, clip, backprop_to_alpha, regularizer, backend) -> tuple[Tensor, Tensor]:
    x, alpha, plain = check(x, alpha, spec, relu, clip)
    backend = _backend(backend, x.device.type, x.dtype)
    to_alpha = check_to_alpha(backprop_to_alpha, "backprop_to_alpha")
    return _BinLoss.apply(x, alpha, backend, plain, to_alpha, is_dampening(regularizer))


def lsq_bin(
    x, alpha, spec, relu, clip, backprop_to_alpha, regularizer, backend, alpha_grad
) -> tuple[Tensor, Tensor, Tensor]:
    x, alpha, plain = check(x, alpha, spec, relu, clip)
    check_alpha_grad(alpha_grad)
    backend = _backend(backend, x.device.type, x.dtype)
    to_alpha = check_to_alpha(backprop_to_alpha, "backprop_to_alpha")
    return _LSQBin.apply(x, alpha, backend, plain, alpha_grad, to_alpha, is_dampening(regularizer))


def is_dampening(regularizer: str) -> bool:
    """Whether regularizer, one of REGULARIZERS, is dampening."""
    return check_regularizer(regularizer, "regularizer") == "dampening"


def br_to_alpha_factor(backprop_to_alpha, grad_scale: float) -> float:
    """What multiplies the bin loss's gradient of alpha: the fraction, times what multiplies LSQ's if it is scaled."""
    return _of_br(check_to_alpha(backprop_to_alpha, "backprop_to_alpha"), grad_scale)


def _of_br(to_alpha: tuple[float, bool], grad_scale: float) -> float:
    fraction, scaled = to_alpha
    return fraction * grad_scale if scaled else fraction
