"""Small Triton kernels that add partial sums up, in a fixed order and in float64: the second of two stages."""

import triton
import triton.language as tl

from qbr.kernels.triton_bins import COUNT_SHIFT, Q_FINE_ONE, Q_ONE, S_ONE, _unit


@triton.jit
def _sum_rows(partials, out, rows, C, scale, i_c, BR: tl.constexpr, BC: tl.constexpr):
    """Block i_c of the channels."""
    o_c = i_c * BC + tl.arange(0, BC)  # [BC]
    b_sum = tl.zeros([BR, BC], tl.float64)
    for i_r in range(0, rows, BR):
        o_r = i_r + tl.arange(0, BR)  # [BR]
        m_p = (o_r < rows)[:, None] & (o_c < C)[None, :]
        p_p = partials + o_r.to(tl.int64)[:, None] * C + o_c[None, :]
        b_sum += tl.load(p_p, mask=m_p, other=0.0).to(tl.float64)  # [BR, BC]
    tl.store(out + o_c, (tl.sum(b_sum, 0) * scale).to(tl.float32), mask=o_c < C)


@triton.jit
def _sum_rows_kernel(
    partials,  # [rows, C] float32
    out,  # [C] float32: scale * sum over rows
    rows,
    C,
    scale,
    BR: tl.constexpr,
    BC: tl.constexpr,
):
    _sum_rows(partials, out, rows, C, scale, tl.program_id(0), BR, BC)


@triton.jit
def _bin_sums(partials, rows, LP: tl.constexpr, BR: tl.constexpr):
    """n, S, Q and the tail (sum |d|, near), [LP] float64 each, from rows [rows, 4, LP]."""
    o_j = tl.arange(0, 4 * LP)
    b_sum = tl.zeros([BR, 4 * LP], tl.float64)
    for i_r in range(0, rows, BR):
        o_r = i_r + tl.arange(0, BR)
        m_r = (o_r < rows)[:, None] & (o_j >= 0)[None, :]  # [BR, 4 LP]
        p_r = partials + o_r.to(tl.int64)[:, None] * (4 * LP) + o_j[None, :]
        b_sum += tl.load(p_r, mask=m_r, other=0.0).to(tl.float64)
    b_row = tl.reshape(tl.sum(b_sum, 0), [4, LP])
    return _part(b_row, 0), _part(b_row, 1), _part(b_row, 2), _part(b_row, 3)


@triton.jit
def _part(b_row, j: tl.constexpr):
    """Row j of four; a select, not a product: others may be NaN."""
    return tl.sum(tl.where(tl.arange(0, 4)[:, None] == j, b_row, 0.0), 0)


@triton.jit
def _column(b_t, o_k, k: tl.constexpr):
    """Element k of a vector; a select, not a product: others may be NaN."""
    return tl.sum(tl.where(o_k == k, b_t, 0.0), 0)


@triton.jit
def _bin_sums_fixed(partials, words, alpha, rows, C, QN: tl.constexpr, LEVELS: tl.constexpr, LP: tl.constexpr,
                    BR: tl.constexpr):  # fmt: skip
    """The same from words [rows, 3, L] and the ends' float rows [rows, 8]; the tail is the last of these [8]."""
    o_k = tl.arange(0, LP)
    o_e = tl.arange(0, 8)
    b_n = tl.zeros([BR, LP], tl.float64)
    b_s = tl.zeros([BR, LP], tl.float64)
    b_q = tl.zeros([BR, LP], tl.float64)
    b_ends = tl.zeros([BR, 8], tl.float64)
    for i_r in range(0, rows, BR):
        o_r = i_r + tl.arange(0, BR)
        m_r = (o_r < rows)[:, None]
        p_r = words + o_r.to(tl.int64)[:, None] * (3 * LEVELS) + o_k[None, :]
        m_k = m_r & (o_k < LEVELS)[None, :]  # [BR, LP]
        b_word = tl.load(p_r, mask=m_k, other=0)
        b_low = (b_word << (64 - COUNT_SHIFT)) >> (64 - COUNT_SHIFT)  # S, its sign extended
        b_n += ((b_word - b_low) >> COUNT_SHIFT).to(tl.float64)
        b_s += b_low.to(tl.float64)
        b_q += tl.load(p_r + LEVELS, mask=m_k, other=0).to(tl.float64) / Q_ONE
        b_q += tl.load(p_r + 2 * LEVELS, mask=m_k, other=0).to(tl.float64) / Q_FINE_ONE
        p_e = partials + o_r.to(tl.int64)[:, None] * 8 + o_e[None, :]
        b_ends += tl.load(p_e, mask=m_r & (o_e >= 0)[None, :], other=0.0).to(tl.float64)
    unit = _unit(alpha, C).to(tl.float64)
    b_s = tl.sum(b_s, 0) * (unit / S_ONE)
    b_q = tl.sum(b_q, 0) * (unit * unit)
    b_ends = tl.sum(b_ends, 0)  # [8]
    ends = _column(b_ends, o_e, 1) + _column(b_ends, o_e, 3)
    distance = _column(b_ends, o_e, 4)
    # Inside the range only an infinite alpha makes d a NaN, and code 0 of it: fixed point holds none, sum |d| does.
    poison = tl.where((tl.abs(ends) < float("inf")) & ~(tl.abs(distance) < float("inf")), distance, 0.0)
    b_s += tl.where(o_k == -QN, poison, 0.0)
    b_q += tl.where(o_k == -QN, poison, 0.0)
    b_s += tl.where(o_k == 0, _column(b_ends, o_e, 0), 0.0)
    b_q += tl.where(o_k == 0, _column(b_ends, o_e, 1), 0.0)
    b_s += tl.where(o_k == LEVELS - 1, _column(b_ends, o_e, 2), 0.0)
    b_q += tl.where(o_k == LEVELS - 1, _column(b_ends, o_e, 3), 0.0)
    return tl.sum(b_n, 0), b_s, b_q, b_ends


@triton.jit
def _bins(partials, words, alpha, loss, bins, dloss_dalpha, rows, C, QN: tl.constexpr, LEVELS: tl.constexpr,
          LP: tl.constexpr, BR: tl.constexpr):  # fmt: skip
    """One program: the table of bins, L_BR = sum of Q_k / n_k, and for one step -2 * sum of k * S_k / n_k."""
    o_k = tl.arange(0, LP)
    m_k = o_k < LEVELS
    if words is not None:
        b_n, b_s, b_q, b_tail = _bin_sums_fixed(partials, words, alpha, rows, C, QN, LEVELS, LP, BR)
        o_tail = tl.arange(0, 8) - 4
    else:
        b_n, b_s, b_q, b_tail = _bin_sums(partials, rows, LP, BR)
        o_tail = o_k
    tl.store(bins + o_k, b_n, mask=m_k)
    tl.store(bins + LEVELS + o_k, b_s, mask=m_k)
    tl.store(bins + 2 * LEVELS + o_k, b_q, mask=m_k)
    tl.store(bins + 3 * LEVELS + o_tail, b_tail, mask=(o_tail >= 0) & (o_tail < 2))
    b_n = tl.maximum(b_n, 1.0)
    tl.store(loss, tl.sum(b_q / b_n, 0).to(tl.float32))
    if dloss_dalpha is not None:
        b_k = (QN + o_k).to(tl.float64)
        tl.store(dloss_dalpha, (-2.0 * tl.sum(b_k / b_n * b_s, 0)).to(tl.float32))


@triton.jit
def _bins_kernel(
    partials,  # [rows, 4, LP] float32; with words [rows, 8]
    words,  # [rows, 3, L] int64, or None
    alpha,  # [C]
    loss,  # []
    bins,  # [3 L + 2] float64
    dloss_dalpha,  # [1], or None
    rows,
    C,
    QN: tl.constexpr,
    LEVELS: tl.constexpr,
    LP: tl.constexpr,
    BR: tl.constexpr,
):
    _bins(partials, words, alpha, loss, bins, dloss_dalpha, rows, C, QN, LEVELS, LP, BR)


@triton.jit
def _dloss_dalpha(bins, alpha, s_words, s_ends, dloss_dalpha, C, n_splits, i_c, QN: tl.constexpr,
                  LEVELS: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr):  # fmt: skip
    """-2 * sum over k of k * S_(k,c) / n_k, for block i_c of the channels; levels and splits BR at a time."""
    o_r = tl.arange(0, BR)
    o_c = i_c * BC + tl.arange(0, BC)
    m_c = o_c < C
    b_inner = tl.zeros([BR, BC], tl.float64)
    for i_k in range(1, LEVELS - 1, BR):
        o_k = i_k + o_r
        m_k = o_k < LEVELS - 1
        b_k = (o_k + QN).to(tl.float64) / tl.maximum(tl.load(bins + o_k, mask=m_k, other=1.0), 1.0)  # [BR]
        p_s = s_words + o_k.to(tl.int64)[:, None] * C + o_c[None, :]
        b_inner += b_k[:, None] * tl.load(p_s, mask=m_k[:, None] & m_c[None, :], other=0).to(tl.float64)
    b_sum = tl.sum(b_inner, 0) * tl.load(alpha + o_c, mask=m_c, other=0.0).to(tl.float64) / S_ONE  # [BC]
    b_low = tl.zeros([BR, BC], tl.float64)
    b_high = tl.zeros([BR, BC], tl.float64)
    for i_s in range(0, n_splits, BR):
        o_s = i_s + o_r
        m_e = (o_s < n_splits)[:, None] & m_c[None, :]
        p_e = s_ends + o_s.to(tl.int64)[:, None] * (2 * C) + o_c[None, :]
        b_low += tl.load(p_e, mask=m_e, other=0.0).to(tl.float64)
        b_high += tl.load(p_e + C, mask=m_e, other=0.0).to(tl.float64)
    b_sum += QN / tl.maximum(tl.load(bins), 1.0) * tl.sum(b_low, 0)
    b_sum += (QN + LEVELS - 1) / tl.maximum(tl.load(bins + LEVELS - 1), 1.0) * tl.sum(b_high, 0)
    tl.store(dloss_dalpha + o_c, (-2.0 * b_sum).to(tl.float32), mask=m_c)


@triton.jit
def _dloss_dalpha_kernel(
    bins,  # [3 L + 2] float64
    alpha,  # [C]
    s_words,  # [L, C] int64: S_(k,c) inside the range, in units of alpha_c
    s_ends,  # [n_splits, 2, C]: S_(k,c) of the lowest and the highest code
    dloss_dalpha,  # [C]
    C,
    n_splits,
    QN: tl.constexpr,
    LEVELS: tl.constexpr,
    BR: tl.constexpr,
    BC: tl.constexpr,
):
    _dloss_dalpha(bins, alpha, s_words, s_ends, dloss_dalpha, C, n_splits, tl.program_id(0), QN, LEVELS, BR, BC)
