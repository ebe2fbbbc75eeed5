"""The reference backend: the formulas (README.md here) in PyTorch, op by op, with closed-form backwards.

It defines the truth that the tests hold the other backends to, and it runs on every device.
Shapes: x any, dense; alpha has C elements, one for each index of ``channel_axis`` (C = 1 where that is -1).
Arithmetic in float32 (float64 for float64 x); sums in float64.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def load(device_type: str) -> None:
    """Nothing to load: PyTorch is there."""


class _Quantized(NamedTuple):
    step: Tensor  # alpha, broadcastable against x
    v: Tensor  # y / alpha
    b: Tensor  # the integer code, as a float; NaN where x is NaN
    d: Tensor  # y - b * alpha
    inside: Tensor  # 1 where qn <= v <= qp, 0 outside, NaN for NaN
    passes: Tensor | None  # the ReLU's own mask, likewise; None without a ReLU


def _quantize(x, alpha, qn, qp, binary, channel_axis, relu, clip) -> _Quantized:
    y = x.to(alpha.dtype)
    passes = None
    if relu:
        passes = _mask((y > 0) & (y <= clip), y)
        y = y.clamp(0, clip)
    if channel_axis < 0:
        step = alpha.reshape([1] * x.dim())
    else:
        step = alpha.reshape([-1 if i == channel_axis else 1 for i in range(x.dim())])
    v = y / step
    if binary:
        b = torch.where(v >= 0, 1.0, -1.0).to(v.dtype)
        b = torch.where(v.isnan(), v, b)
    else:
        b = v.clamp(qn, qp).round()
    return _Quantized(step, v, b, y - b * step, _mask((v >= qn) & (v <= qp), v), passes)


def _mask(condition: Tensor, value: Tensor) -> Tensor:
    """1 where the condition holds, 0 elsewhere, NaN where value is NaN."""
    return torch.where(value.isnan(), value, condition.to(value.dtype))


def _sum_per_step(t: Tensor, channel_axis: int) -> Tensor:
    dims = [i for i in range(t.dim()) if i != channel_axis]
    return t.sum(dims, dtype=torch.float64).reshape(-1) if dims else t.to(torch.float64).reshape(-1)


def _sum_per_bin(slot: Tensor, t: Tensor, bins: int) -> Tensor:
    """The sum of t over each slot, [bins] float64, the same bits on every run."""
    if t.is_cuda:  # index_add_ adds there in an order of its own each time
        return torch.stack([torch.where(slot == k, t, 0.0).sum(dtype=torch.float64) for k in range(bins)])
    return t.new_zeros(bins, dtype=torch.float64).index_add_(0, slot.reshape(-1), t.reshape(-1).to(torch.float64))


def _slot(q: _Quantized, qn: int) -> Tensor:
    """code - qn as an index; a NaN counts in the lowest bin, with a NaN distance."""
    return torch.where(q.b.isnan(), float(qn), q.b).sub(qn).long()


def _bin_sums(q: _Quantized, qn, qp, channel_axis, per_step: bool) -> tuple[Tensor, Tensor | None]:
    """bins [3 * L + 2] = n_k, S_k, Q_k, sum |d|, count of |d| < 0.01 alpha; and S_(k,c) [L, C] if per_step."""
    levels = qp - qn + 1
    slot = _slot(q, qn)
    sums = [_sum_per_bin(slot, t, levels) for t in (torch.ones_like(q.d), q.d, q.d.double().square())]
    distance = q.d.abs()
    tail = [distance.sum(dtype=torch.float64), (distance < 0.01 * q.step).sum(dtype=torch.float64)]
    bins = torch.cat([*sums, torch.stack(tail)])
    if not per_step:
        return bins, None
    if channel_axis < 0:
        return bins, sums[1][:, None]
    return bins, torch.stack([_sum_per_step(torch.where(slot == k, q.d, 0.0), channel_axis) for k in range(levels)])


def loss_of(bins: Tensor, levels: int, dtype) -> Tensor:
    """L_BR = sum over occupied k of Q_k / n_k."""
    n, sq = bins[:levels], bins[2 * levels : 3 * levels]
    return torch.where(n > 0, sq / n.clamp(min=1), 0.0).sum().to(dtype)


def dloss_dalpha_of(bins: Tensor, s_step: Tensor | None, alpha: Tensor, qn: int, qp: int) -> Tensor:
    """dL/dalpha_c = -2 * sum_k k * S_(k,c) / n_k, in alpha's shape; empty where nobody asked for it."""
    if s_step is None:
        return alpha.new_empty(0)
    k = torch.arange(qn, qp + 1, dtype=torch.float64, device=bins.device)
    n = bins[: qp - qn + 1].clamp(min=1)
    return (-2.0 * (k / n) @ s_step).to(alpha.dtype).reshape(alpha.shape)


def dampening_dalpha(x, alpha, bins, qn, qp, binary, channel_axis, relu, clip) -> Tensor:
    """Dampening's gradient of alpha, alpha's shape: -2 * sum_i b_i * d_i over the elements of each step.

    With one step that is -2 * sum_k k * S_k, from the bin sums that any backend's forward has; with many it reads x
    once more, in PyTorch, for all backends.
    """
    if channel_axis < 0:
        k = torch.arange(qn, qp + 1, dtype=torch.float64, device=bins.device)
        return (-2.0 * (k * bins[qp - qn + 1 : 2 * (qp - qn + 1)]).sum()).to(alpha.dtype).reshape(alpha.shape)
    q = _quantize(x, alpha, qn, qp, binary, channel_axis, relu, clip)
    return (-2.0 * _sum_per_step(q.b * q.d, channel_axis)).to(alpha.dtype).reshape(alpha.shape)


def _bin_loss_dy(q: _Quantized, bins: Tensor, grad_loss: Tensor, qn: int, qp: int) -> Tensor:
    """grad_loss * 2 * d_i / n_(b_i), through a table over the codes."""
    table = (2.0 * grad_loss.to(torch.float64) / bins[: qp - qn + 1].clamp(min=1)).to(q.d.dtype)
    return table[_slot(q, qn)] * q.d


def _lsq_dy_dalpha(q: _Quantized, grad_xhat: Tensor, alpha: Tensor, channel_axis: int, grad_scale: float):
    g = grad_xhat.to(q.v.dtype)
    # An infinite v is outside; 0 * inf must not make a NaN of it.
    v_inside = torch.where(q.inside == 0, 0.0, q.v)
    dalpha = grad_scale * _sum_per_step(g * (q.b - v_inside), channel_axis)
    return g * q.inside, dalpha.to(alpha.dtype).reshape(alpha.shape)


def _through_relu(q: _Quantized, dy: Tensor, dtype) -> Tensor:
    if q.passes is None:
        return dy.to(dtype)
    # A masked position stays 0 even where the distance behind it is infinite.
    return torch.where(q.passes == 0, 0.0, dy * q.passes).to(dtype)


def lsq_fwd(x, alpha, qn, qp, binary, channel_axis, relu, clip):
    q = _quantize(x, alpha, qn, qp, binary, channel_axis, relu, clip)
    return (q.b * q.step).to(x.dtype)


def lsq_bwd(grad_xhat, x, alpha, qn, qp, binary, channel_axis, relu, clip, grad_scale):
    q = _quantize(x, alpha, qn, qp, binary, channel_axis, relu, clip)
    dy, dalpha = _lsq_dy_dalpha(q, grad_xhat, alpha, channel_axis, grad_scale)
    return _through_relu(q, dy, x.dtype), dalpha


def bin_loss_fwd(x, alpha, qn, qp, binary, channel_axis, relu, clip, backprop_to_alpha):
    q = _quantize(x, alpha, qn, qp, binary, channel_axis, relu, clip)
    bins, s_step = _bin_sums(q, qn, qp, channel_axis, backprop_to_alpha)
    return loss_of(bins, qp - qn + 1, alpha.dtype), bins, dloss_dalpha_of(bins, s_step, alpha, qn, qp)


def bin_loss_bwd(grad_loss, x, alpha, bins, qn, qp, binary, channel_axis, relu, clip):
    q = _quantize(x, alpha, qn, qp, binary, channel_axis, relu, clip)
    return _through_relu(q, _bin_loss_dy(q, bins, grad_loss, qn, qp), x.dtype)


def lsq_bin_fwd(x, alpha, qn, qp, binary, channel_axis, relu, clip, backprop_to_alpha):
    q = _quantize(x, alpha, qn, qp, binary, channel_axis, relu, clip)
    bins, s_step = _bin_sums(q, qn, qp, channel_axis, backprop_to_alpha)
    xhat = (q.b * q.step).to(x.dtype)
    return xhat, loss_of(bins, qp - qn + 1, alpha.dtype), bins, dloss_dalpha_of(bins, s_step, alpha, qn, qp)


def lsq_bin_bwd(grad_xhat, grad_loss, x, alpha, bins, qn, qp, binary, channel_axis, relu, clip, grad_scale):
    q = _quantize(x, alpha, qn, qp, binary, channel_axis, relu, clip)
    dy, dalpha = _lsq_dy_dalpha(q, grad_xhat, alpha, channel_axis, grad_scale)
    return _through_relu(q, dy + _bin_loss_dy(q, bins, grad_loss, qn, qp), x.dtype), dalpha
