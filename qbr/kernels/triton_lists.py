"""The Triton backend over lists: one launch of each kernel for all tensors that share dtype, range and layout.

Tensors are divided as triton_backend.py divides them one by one, so results are the same to the bit. What launches
need to know of sizes goes to the device once for each list; pointers are arguments, so that a CUDA graph holds them.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from qbr.kernels import laid_out_like
from qbr.kernels import triton_backend as one
from qbr.kernels.foreach import quants

# Of one launch: each tensor brings up to nine pointers, and arguments have 4 KB.
LONGEST_LIST = 48


class Group(NamedTuple):
    """Tensors of one launch."""

    members: list[int]
    plans: tuple[one.Plan, ...]
    quant: tuple[int, int, bool]  # qn, qp, binary
    aligned: bool  # to 16 bytes, every x; what is allocated here is
    divisible: bool  # by 16, every run of elements that lie together

    def pick(self, tensors) -> tuple | None:
        return None if tensors is None else tuple(tensors[i] for i in self.members)

    def options(self, relu: bool, num_warps: int = one.NUM_WARPS) -> dict:
        qn, qp, binary = self.quant
        n = len(self.members)
        return dict(N=n, NP=one._power_of_two(n), ALIGNED=self.aligned, DIVISIBLE=self.divisible, QN=qn, QP=qp,
                    BINARY=binary, RELU=relu, **one._tile_options(self.plans[0], num_warps))  # fmt: skip

    @property
    def levels(self) -> int:
        return self.quant[1] - self.quant[0] + 1


def _groups(xs, alphas, ranges, bins: bool = False, grads=None) -> Iterator[Group]:
    """The launches of a list, of the kernel that adds bins up or of another; tensors of no elements are in none."""
    groups: dict[tuple, list] = {}
    for i, (x, alpha, (qn, qp, binary, axis)) in enumerate(zip(xs, alphas, quants(ranges))):
        if x.numel() == 0:
            continue
        p = one._plan_of(x, alpha, axis, one._bin_method(qp - qn + 1) if bins else None)
        divisible = (p.inner if p.layout == 1 else p.channels) % 16 == 0
        aligned = x.data_ptr() % 16 == 0 and (grads is None or grads[i].data_ptr() % 16 == 0)
        key = (x.dtype, aligned, qn, qp, binary, divisible, p.layout, p.t0, p.t1, p.vec)
        groups.setdefault(key, []).append((i, p))
    for (_, aligned, qn, qp, binary, divisible, *_), found in groups.items():
        for start in range(0, len(found), LONGEST_LIST):
            members, plans = zip(*found[start : start + LONGEST_LIST])
            yield Group(list(members), plans, (qn, qp, binary), aligned, divisible)


@cache  # never emptied: a CUDA graph that was captured points at its tables, of some KiB at most
def _layouts(plans: tuple[one.Plan, ...], device: torch.device, loops: bool) -> tuple[Tensor, int, int]:
    """The kernels' table of sizes, how many programs there are and how many partial sums over channels.

    loops: the kernel's programs go through several items each (the forward with bins), so fewer are enough.
    """
    columns, first, parts = [], 0, 0
    for p in plans:
        programs = p.programs if loops else p.blocks * p.splits
        columns.append((first, programs, p.outer, p.channels, p.inner, p.splits, p.blocks * p.splits, parts))
        first += programs
        parts += p.splits * p.channels
    return _to_device(list(zip(*columns)), torch.int64, device), first, parts


@cache
def _scales(values: tuple[float, ...], device: torch.device) -> Tensor:
    return _to_device(values, torch.float32, device)


def _to_device(values, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A tensor that outlives the call: made on a thread of its own, since what a thread allocates while it warms up or
    captures CUDA graphs (torch.compile's reduce-overhead) belongs to their memory pool."""
    with ThreadPoolExecutor(max_workers=1) as other:
        return other.submit(torch.tensor, values, dtype=dtype, device=device).result()


def foreach_lsq_fwd(xs, alphas, ranges, relu, clip):
    xhats = [torch.empty_like(x) for x in xs]
    for group in _groups(xs, alphas, ranges):
        layouts, programs, _ = _layouts(group.plans, xs[0].device, False)
        with one._on_device_of(xs[0]):
            one._kernels().lsq_fwd_list[(programs,)](
                group.pick(xs), group.pick(alphas), group.pick(xhats), layouts, clip, **group.options(relu)
            )
    return xhats


def foreach_bin_loss_fwd(xs, alphas, ranges, relu, clip, backprop_to_alpha):
    return _bin_fwd(None, xs, alphas, ranges, relu, clip, backprop_to_alpha)


def foreach_lsq_bin_fwd(xs, alphas, ranges, relu, clip, backprop_to_alpha):
    xhats = [torch.empty_like(x) for x in xs]
    return xhats, *_bin_fwd(xhats, xs, alphas, ranges, relu, clip, backprop_to_alpha)


def _bin_fwd(xhats, xs, alphas, ranges, relu, clip, backprop_to_alpha):
    """losses, bins, dloss_dalphas; writes xhats unless that is None."""
    new = alphas[0].new_empty if alphas else None
    lengths = [3 * (qp - qn + 1) + 2 for qn, qp, *_ in quants(ranges)]
    losses = [new(()) for _ in xs]
    bins = [new(length, dtype=torch.float64) for length in lengths]
    dloss_dalphas = [new(alpha.shape if backprop_to_alpha else (0,)) for alpha in alphas]
    for i in (i for i, x in enumerate(xs) if x.numel() == 0):
        for result in (losses[i], bins[i], dloss_dalphas[i]):
            result.zero_()
    kernels = one._kernels()
    for group in _groups(xs, alphas, ranges, bins=True):
        levels, n = group.levels, len(group.members)
        method = one._bin_method(levels)
        num_warps = one._num_warps(method)
        lp = max(one._power_of_two(levels), 2)
        layouts, programs, _ = _layouts(group.plans, xs[0].device, True)
        channels = [p.channels for p in group.plans]
        partials = new(programs, 8 if method == one.WORDS else 4 * lp)
        words = new((programs, 3, levels), dtype=torch.int64) if method == one.WORDS else None
        if words is not None and kernels.interpreted:
            words.zero_()
        s_words = s_ends = one_step = None
        if backprop_to_alpha and channels[0] == 1:
            one_step = group.pick(dloss_dalphas)
        elif backprop_to_alpha:
            s_words = new((levels * sum(channels),), dtype=torch.int64).zero_().split([levels * c for c in channels])
            s_ends = tuple(new(p.splits, 2, p.channels) for p in group.plans)
        with one._on_device_of(xs[0]):
            kernels.lsq_bin_fwd_list[(programs,)](
                group.pick(xs), group.pick(alphas), group.pick(xhats), partials, words, s_words, s_ends, layouts, clip,
                VEC=group.plans[0].vec, LP=lp, METHOD=method, THREADS=32 * num_warps, **group.options(relu, num_warps),
            )  # fmt: skip
            kernels.bins_list[(n,)](
                partials, words, group.pick(alphas), group.pick(losses), group.pick(bins), one_step, layouts,
                N=n, QN=group.quant[0], LEVELS=levels, LP=lp, **one._bins_options(method, lp),
            )  # fmt: skip
            if s_words is not None:
                bc = one.FINAL_COLUMNS
                kernels.dloss_dalpha_list[(-(-max(channels) // bc), n)](
                    group.pick(bins), group.pick(alphas), s_words, s_ends, group.pick(dloss_dalphas), layouts,
                    N=n, QN=group.quant[0], LEVELS=levels, BR=one.FINAL_TILE // bc, BC=bc, **one._options(),
                )  # fmt: skip
    return losses, bins, dloss_dalphas


def foreach_lsq_bwd(grad_xhats, xs, alphas, ranges, relu, clip, grad_scales):
    return _bwd(grad_xhats, None, xs, alphas, None, ranges, relu, clip, grad_scales)


def foreach_bin_loss_bwd(grad_losses, xs, alphas, bins, ranges, relu, clip):
    return _bwd(None, grad_losses, xs, alphas, bins, ranges, relu, clip, None)[0]


def foreach_lsq_bin_bwd(grad_xhats, grad_losses, xs, alphas, bins, ranges, relu, clip, grad_scales):
    return _bwd(grad_xhats, grad_losses, xs, alphas, bins, ranges, relu, clip, grad_scales)


def _bwd(grad_xhats, grad_losses, xs, alphas, bins, ranges, relu, clip, grad_scales):
    """dxs and dalphas (empty without grad_xhats)."""
    if grad_xhats is not None:
        grad_xhats = [laid_out_like(grad, x) for grad, x in zip(grad_xhats, xs)]
    dxs = [torch.empty_like(x) for x in xs]
    dalphas = [] if grad_xhats is None else [torch.empty_like(alpha) for alpha in alphas]
    for dalpha in (d for d, x in zip(dalphas, xs) if x.numel() == 0):
        dalpha.zero_()
    kernels = one._kernels()
    for group in _groups(xs, alphas, ranges, grads=grad_xhats):
        layouts, programs, parts = _layouts(group.plans, xs[0].device, False)
        lp, n = one._power_of_two(group.levels), len(group.members)
        select = group.levels <= one.SELECT_LEVELS
        new = alphas[0].new_empty
        table = None if select or grad_losses is None else new(programs, lp)
        partials = None if grad_xhats is None else new(parts)
        with one._on_device_of(xs[0]):
            kernels.lsq_bin_bwd_list[(programs,)](
                group.pick(grad_xhats), group.pick(grad_losses), group.pick(xs), group.pick(alphas), group.pick(bins),
                table, group.pick(dxs), partials, layouts, clip, SELECT=select, LP=lp, **group.options(relu),
            )  # fmt: skip
            if partials is not None:
                channels = max(p.channels for p in group.plans)
                bc = one._columns(channels)
                kernels.sum_rows_list[(-(-channels // bc), n)](
                    partials, group.pick(dalphas), _scales(group.pick(grad_scales), xs[0].device), layouts,
                    N=n, BR=one.FINAL_TILE // bc, BC=bc, **one._options(),
                )  # fmt: skip
    return dxs, dalphas
