"""Triton kernels over lists of tensors: one launch for all of them, each program at work on one.

Pointers come as tuples, whose length is fixed at compile time; what the tensors' sizes decide comes in a table
[ROWS_OF_LAYOUT, n] int64 in memory, made once for a list (triton_lists.py). Tensors of one launch share dtype, range,
layout and tile; each is divided as it would be alone, so its results are those of a launch of its own, to the bit.
"""

import triton
import triton.language as tl

from qbr.kernels.triton_bins import _lsq_bin_fwd
from qbr.kernels.triton_finalize import _bins, _dloss_dalpha, _sum_rows
from qbr.kernels.triton_kernels import FLAT, ROWS, _lsq_bin_bwd, _lsq_fwd

# Rows of the table. FIRST: the tensor's first program, and with it its first row of partial sums. PARTS: where its
# partial sums over channels begin, in elements.
FIRST = tl.constexpr(0)
PROGRAMS = tl.constexpr(1)
OUTER = tl.constexpr(2)
CHANNELS = tl.constexpr(3)
INNER = tl.constexpr(4)
SPLITS = tl.constexpr(5)
ITEMS = tl.constexpr(6)
PARTS = tl.constexpr(7)
ROWS_OF_LAYOUT = tl.constexpr(8)


@triton.jit
def _which(layouts, N: tl.constexpr, NP: tl.constexpr):
    """Which tensor of the list this program works on."""
    o_n = tl.arange(0, NP)
    b_first = tl.load(layouts + FIRST * N + o_n, mask=o_n < N, other=1 << 40)
    return tl.sum((b_first <= tl.program_id(0)).to(tl.int32), 0) - 1


@triton.jit
def _pick(pointers, i_x, ALIGNED: tl.constexpr = False):
    """pointers[i_x], or None for None. By masks: a choice between pointers would become an address of arguments."""
    pointer = pointers  # Triton 3.6 cannot return the constant None
    if pointers is not None:
        address = tl.cast(0, tl.int64)
        for j in tl.static_range(len(pointers)):
            address |= tl.where(i_x == j, pointers[j].to(tl.int64, bitcast=True), 0)
        pointer = address.to(pointers[0].dtype, bitcast=True)
        if ALIGNED:
            pointer = tl.multiple_of(pointer, 16)
    return pointer


@triton.jit
def _sizes(layouts, i_x, N: tl.constexpr, LAYOUT: tl.constexpr, DIVISIBLE: tl.constexpr):
    """outer, C, inner and n_splits of a tensor; DIVISIBLE: runs of elements are multiples of 16."""
    outer = tl.load(layouts + OUTER * N + i_x)
    if LAYOUT == FLAT:
        C = 1
        inner = 1
    else:
        C = tl.load(layouts + CHANNELS * N + i_x).to(tl.int32)
        inner = tl.load(layouts + INNER * N + i_x)
        if DIVISIBLE and LAYOUT == ROWS:
            inner = tl.multiple_of(inner, 16)
        elif DIVISIBLE:
            C = tl.multiple_of(C, 16)
    return outer, C, inner, tl.load(layouts + SPLITS * N + i_x).to(tl.int32)


@triton.jit
def _lsq_fwd_list_kernel(
    xs,  # of [outer, C, inner]
    alphas,  # of [C]
    xhats,  # as xs
    layouts,  # [ROWS_OF_LAYOUT, N] int64
    clip,
    N: tl.constexpr,
    NP: tl.constexpr,
    ALIGNED: tl.constexpr,
    DIVISIBLE: tl.constexpr,
    QN: tl.constexpr,
    QP: tl.constexpr,
    BINARY: tl.constexpr,
    RELU: tl.constexpr,
    LAYOUT: tl.constexpr,
    T0: tl.constexpr,
    T1: tl.constexpr,
):
    i_x = _which(layouts, N, NP)
    outer, C, inner, n_splits = _sizes(layouts, i_x, N, LAYOUT, DIVISIBLE)
    i_p = tl.program_id(0) - tl.load(layouts + FIRST * N + i_x).to(tl.int32)
    _lsq_fwd(_pick(xs, i_x, ALIGNED), _pick(alphas, i_x), _pick(xhats, i_x, ALIGNED), outer, C, inner, n_splits, clip,
             i_p, QN, QP, BINARY, RELU, LAYOUT, T0, T1)  # fmt: skip


@triton.jit
def _lsq_bin_fwd_list_kernel(
    xs,  # of [outer, C, inner]
    alphas,  # of [C]
    xhats,  # as xs; None for bin_loss_fwd
    partials,  # [all programs, 4, LP], with WORDS [all programs, 8]: see _lsq_bin_fwd_kernel, as for the rest
    words,
    s_words,
    s_ends,
    layouts,  # [ROWS_OF_LAYOUT, N] int64
    clip,
    N: tl.constexpr,
    NP: tl.constexpr,
    ALIGNED: tl.constexpr,
    DIVISIBLE: tl.constexpr,
    QN: tl.constexpr,
    QP: tl.constexpr,
    BINARY: tl.constexpr,
    RELU: tl.constexpr,
    LAYOUT: tl.constexpr,
    T0: tl.constexpr,
    T1: tl.constexpr,
    VEC: tl.constexpr,
    LP: tl.constexpr,
    METHOD: tl.constexpr,
    THREADS: tl.constexpr,
):
    i_x = _which(layouts, N, NP)
    outer, C, inner, n_splits = _sizes(layouts, i_x, N, LAYOUT, DIVISIBLE)
    i_p = tl.program_id(0) - tl.load(layouts + FIRST * N + i_x).to(tl.int32)
    n_programs = tl.load(layouts + PROGRAMS * N + i_x).to(tl.int32)
    n_items = tl.load(layouts + ITEMS * N + i_x).to(tl.int32)
    _lsq_bin_fwd(_pick(xs, i_x, ALIGNED), _pick(alphas, i_x), _pick(xhats, i_x, ALIGNED), partials, words,
                 _pick(s_words, i_x), _pick(s_ends, i_x), outer, C, inner, n_splits, n_items, clip, i_p, n_programs,
                 tl.program_id(0), QN, QP, BINARY, RELU, LAYOUT, T0, T1, VEC, LP, METHOD, THREADS)  # fmt: skip


@triton.jit
def _bins_list_kernel(
    partials,  # as _lsq_bin_fwd_list_kernel leaves them
    words,
    alphas,  # of [C]
    losses,  # of []
    bins,  # of [3 L + 2] float64
    dloss_dalphas,  # of [1], or None
    layouts,
    N: tl.constexpr,
    QN: tl.constexpr,
    LEVELS: tl.constexpr,
    LP: tl.constexpr,
    BR: tl.constexpr,
):
    """A program for each tensor."""
    i_x = tl.program_id(0)
    first = tl.load(layouts + FIRST * N + i_x)
    rows = tl.load(layouts + PROGRAMS * N + i_x).to(tl.int32)
    C = tl.load(layouts + CHANNELS * N + i_x).to(tl.int32)
    p_words = None
    if words is not None:
        p_words = words + first * (3 * LEVELS)
        p_partials = partials + first * 8
    else:
        p_partials = partials + first * (4 * LP)
    _bins(p_partials, p_words, _pick(alphas, i_x), _pick(losses, i_x), _pick(bins, i_x), _pick(dloss_dalphas, i_x),
          rows, C, QN, LEVELS, LP, BR)  # fmt: skip


@triton.jit
def _dloss_dalpha_list_kernel(
    bins,  # of [3 L + 2] float64
    alphas,  # of [C]
    s_words,  # of [L, C] int64
    s_ends,  # of [n_splits, 2, C]
    dloss_dalphas,  # of [C]
    layouts,
    N: tl.constexpr,
    QN: tl.constexpr,
    LEVELS: tl.constexpr,
    BR: tl.constexpr,
    BC: tl.constexpr,
):
    """A program for each block of channels and tensor: a grid is longest in its first dimension."""
    i_x = tl.program_id(1)
    C = tl.load(layouts + CHANNELS * N + i_x).to(tl.int32)
    n_splits = tl.load(layouts + SPLITS * N + i_x).to(tl.int32)
    _dloss_dalpha(_pick(bins, i_x), _pick(alphas, i_x), _pick(s_words, i_x), _pick(s_ends, i_x),
                  _pick(dloss_dalphas, i_x), C, n_splits, tl.program_id(0), QN, LEVELS, BR, BC)  # fmt: skip


@triton.jit
def _lsq_bin_bwd_list_kernel(
    gs,  # gradients of the xhats; None for bin_loss_bwd
    grad_losses,  # of []; None for lsq_bwd
    xs,  # of [outer, C, inner]
    alphas,  # of [C]
    bins,  # of [3 L + 2] float64; None for lsq_bwd
    table,  # scratch [all programs, LP]; None with SELECT and for lsq_bwd
    dxs,  # as xs
    dalphas,  # partial sums: [n_splits, C] of each tensor in turn; None for bin_loss_bwd
    layouts,
    clip,
    N: tl.constexpr,
    NP: tl.constexpr,
    ALIGNED: tl.constexpr,
    DIVISIBLE: tl.constexpr,
    QN: tl.constexpr,
    QP: tl.constexpr,
    BINARY: tl.constexpr,
    RELU: tl.constexpr,
    LAYOUT: tl.constexpr,
    T0: tl.constexpr,
    T1: tl.constexpr,
    SELECT: tl.constexpr,
    LP: tl.constexpr,
):
    i_x = _which(layouts, N, NP)
    outer, C, inner, n_splits = _sizes(layouts, i_x, N, LAYOUT, DIVISIBLE)
    i_p = tl.program_id(0) - tl.load(layouts + FIRST * N + i_x).to(tl.int32)
    p_dalpha = None
    if dalphas is not None:
        p_dalpha = dalphas + tl.load(layouts + PARTS * N + i_x)
    _lsq_bin_bwd(_pick(gs, i_x, ALIGNED), _pick(grad_losses, i_x), _pick(xs, i_x, ALIGNED), _pick(alphas, i_x),
                 _pick(bins, i_x), table, _pick(dxs, i_x, ALIGNED), p_dalpha, outer, C, inner, n_splits, clip, i_p,
                 tl.program_id(0), QN, QP, BINARY, RELU, LAYOUT, T0, T1, SELECT, LP)  # fmt: skip


@triton.jit
def _sum_rows_list_kernel(
    partials,  # [n_splits, C] float32 of each tensor in turn
    outs,  # of [C] float32
    scales,  # [N] float32
    layouts,
    N: tl.constexpr,
    BR: tl.constexpr,
    BC: tl.constexpr,
):
    """A program for each tensor and block of channels."""
    i_x = tl.program_id(1)
    rows = tl.load(layouts + SPLITS * N + i_x).to(tl.int32)
    C = tl.load(layouts + CHANNELS * N + i_x).to(tl.int32)
    p_partials = partials + tl.load(layouts + PARTS * N + i_x)
    _sum_rows(p_partials, _pick(outs, i_x), rows, C, tl.load(scales + i_x), tl.program_id(0), BR, BC)
