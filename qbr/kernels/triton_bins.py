"""Triton kernel: the forward that adds bins up, with xhat (lsq_bin) or without it (bin_loss).

Up to a few levels a program keeps n, S and Q of every bin in registers and masks each element into them. Beyond,
it adds integers in fixed point to a table in memory, which gives the same bits in any order; S and Q of the two end
bins, whose distances have no bound, stay in float registers. triton_finalize.py adds the programs' rows up.
Registers hold lane sums: [T0, T1] as [LANES, VEC], the VEC elements that one thread loaded together added up first.
"""

import triton
import triton.language as tl

from qbr.kernels.triton_kernels import FLAT, ROWS, _load, _n_tiles, _quantize, _steps, _store, _store_per_channel, _tile

# The code of a position beyond the tensor: in no bin.
NO_CODE = tl.constexpr(1e9)

# Fixed point, in units of alpha (S) and alpha^2 (Q): inside the range |d| <= alpha / 2, so integers of these widths
# hold the sums of 2^19 elements, and adding integers gives the same bits in any order.
S_ONE = tl.constexpr(2.0**24)
Q_ONE = tl.constexpr(2.0**44)
# Squares below FINE are added to a word of their own: a bin of small distances keeps its digits.
FINE = tl.constexpr(2.0**-24)
Q_FINE_ONE = tl.constexpr(2.0**66)
# One word holds a bin's count above its S: |S| <= 2^19 * 2^23 stays below the sign bit of 44 bits.
COUNT_SHIFT = tl.constexpr(44)
COUNT_ONE = tl.constexpr(2**44)


@triton.jit
def _zero_sums(COUNT: tl.constexpr, LANES: tl.constexpr):
    sums = ()
    for _ in tl.static_range(COUNT):
        sums = sums + (tl.zeros([LANES], tl.float32),)
    return sums


@triton.jit
def _add_bins(sums, b_b, b_d, QN: tl.constexpr, LEVELS: tl.constexpr, BINARY: tl.constexpr, LANES: tl.constexpr,
              VEC: tl.constexpr):  # fmt: skip
    """Add a tile to (n_k, S_k, Q_k) of every code, by one mask per code."""
    new = ()
    for k in tl.static_range(LEVELS):
        if BINARY and k == 1:
            new = new + (sums[3], sums[4], sums[5])
        else:
            # A NaN is not above the lowest code, so it counts there.
            if k == 0:
                m_k = ~(b_b > QN)
            else:
                m_k = b_b == QN + k
            b_k = tl.where(m_k, b_d, 0.0)
            new = new + (
                sums[3 * k] + tl.sum(tl.reshape(tl.where(m_k, 1.0, 0.0), [LANES, VEC]), 1),
                sums[3 * k + 1] + tl.sum(tl.reshape(b_k, [LANES, VEC]), 1),
                sums[3 * k + 2] + tl.sum(tl.reshape(b_k * b_k, [LANES, VEC]), 1),
            )
    return new


@triton.jit
def _to_fixed(b_t, one):
    """b_t in units of 1 / one, as an integer; 0 for what is no distance inside the range (NaN, inf, a broken alpha)."""
    return (tl.where(tl.abs(b_t) <= 1.0, b_t, 0.0) * one).to(tl.int64)


@triton.jit
def _add_bins_fixed(sums, words, inverse_unit, b_b, b_d, m_x, QN: tl.constexpr, QP: tl.constexpr,
                    LANES: tl.constexpr, VEC: tl.constexpr, MASKED: tl.constexpr):  # fmt: skip
    """Add a tile to the program's words [3, L] by integer atomics, and to S and Q of the two end bins in float.

    Distances are bounded inside the range alone; the end bins' words hold counts only.
    """
    m_low = ~(b_b > QN)
    m_high = b_b == QP
    m_inner = ~(m_low | m_high)
    if MASKED:
        m_inner = m_inner & m_x
    p_word = words + tl.where(b_b == b_b, b_b - QN, 0.0).to(tl.int32)
    b_t = b_d * inverse_unit
    b_word = tl.where(m_inner, _to_fixed(b_t, S_ONE), 0) + COUNT_ONE
    if MASKED:
        tl.atomic_add(p_word, b_word, mask=m_x, sem="relaxed")
    else:
        tl.atomic_add(p_word, b_word, sem="relaxed")
    b_q = b_t * b_t
    m_fine = b_q < FINE
    p_q = p_word + tl.where(m_fine, 2 * (QP - QN + 1), QP - QN + 1)
    tl.atomic_add(p_q, _to_fixed(b_q, tl.where(m_fine, Q_FINE_ONE, Q_ONE)), mask=m_inner, sem="relaxed")
    b_low = tl.where(m_low, b_d, 0.0)
    b_high = tl.where(m_high, b_d, 0.0)
    return (
        sums[0] + tl.sum(tl.reshape(b_low, [LANES, VEC]), 1),
        sums[1] + tl.sum(tl.reshape(b_low * b_low, [LANES, VEC]), 1),
        sums[2] + tl.sum(tl.reshape(b_high, [LANES, VEC]), 1),
        sums[3] + tl.sum(tl.reshape(b_high * b_high, [LANES, VEC]), 1),
    )


@triton.jit
def _unit(alpha, C):
    """The fixed-point unit: the largest finite |alpha|, but nothing so small that its inverse overflows."""
    b_max = tl.zeros([128], tl.float32)
    for i_c in range(0, C, 128):
        o_c = i_c + tl.arange(0, 128)
        b_a = tl.abs(tl.load(alpha + o_c, mask=o_c < C, other=0.0))
        b_max = tl.where((b_a < float("inf")) & (b_a > b_max), b_a, b_max)
    return tl.maximum(tl.max(b_max, 0), 1e-30)


@triton.jit
def _add_alpha_sums(b_ends, s_words, b_b, b_d, b_step, m_x, i_c, C, QN: tl.constexpr, QP: tl.constexpr,
                    LAYOUT: tl.constexpr, T0: tl.constexpr, T1: tl.constexpr):  # fmt: skip
    """Add a tile to S_(k,c): integer atomics to s_words [L, C] inside the range, (low, high) tiles at its ends."""
    if LAYOUT == ROWS:
        o_c = i_c * T0 + tl.arange(0, T0)[:, None]
    else:
        o_c = i_c * T1 + tl.arange(0, T1)[None, :]
    m_low = ~(b_b > QN) & m_x
    m_high = (b_b == QP) & (QP > QN) & m_x
    m_inner = m_x & (b_b > QN) & (b_b < QP)
    o_k = tl.where(m_inner, b_b - QN, 0.0).to(tl.int64)
    b_t = b_d * (1.0 / b_step)
    tl.atomic_add(s_words + o_k * C + o_c, _to_fixed(b_t, S_ONE), mask=m_inner, sem="relaxed")
    return b_ends[0] + tl.where(m_low, b_d, 0.0), b_ends[1] + tl.where(m_high, b_d, 0.0)


@triton.jit
def _bin_tile(x, xhat, sums, words, inverse_unit, b_ends, s_words, i_t, i_c, b_step, clip, outer, C, inner,
              QN: tl.constexpr, QP: tl.constexpr, BINARY: tl.constexpr, RELU: tl.constexpr, LAYOUT: tl.constexpr,
              T0: tl.constexpr, T1: tl.constexpr, VEC: tl.constexpr, MASKED: tl.constexpr):  # fmt: skip
    """One tile: xhat, and all sums. sums ends with sum |d| and the count of |d| < 0.01 alpha."""
    LANES: tl.constexpr = T0 * T1 // VEC
    o_x, m_x = _tile(i_t, i_c, outer, C, inner, LAYOUT, T0, T1)
    b_x = _load(x, o_x, m_x, MASKED)
    b_y, _, b_b, b_xhat = _quantize(b_x, b_step, clip, QN, QP, BINARY, RELU)
    if xhat is not None:
        _store(xhat, o_x, b_xhat, m_x, MASKED)
    b_d = b_y - b_xhat
    b_near = tl.where(tl.abs(b_d) < 0.01 * b_step, 1.0, 0.0)
    if MASKED:
        b_b = tl.where(m_x, b_b, NO_CODE)
        b_d = tl.where(m_x, b_d, 0.0)
        b_near = tl.where(m_x, b_near, 0.0)
    if s_words is not None:
        b_ends = _add_alpha_sums(b_ends, s_words, b_b, b_d, b_step, m_x, i_c, C, QN, QP, LAYOUT, T0, T1)
    if words is not None:
        new = _add_bins_fixed(sums, words, inverse_unit, b_b, b_d, m_x, QN, QP, LANES, VEC, MASKED)
    else:
        new = _add_bins(sums, b_b, b_d, QN, QP - QN + 1, BINARY, LANES, VEC)
    return new + (
        sums[len(new)] + tl.sum(tl.reshape(tl.abs(b_d), [LANES, VEC]), 1),
        sums[len(new) + 1] + tl.sum(tl.reshape(b_near, [LANES, VEC]), 1),
    ), b_ends


@triton.jit(do_not_specialize=["outer", "n_splits", "n_items"])
def _lsq_bin_fwd_kernel(
    x,  # [outer, C, inner]
    alpha,  # [C]
    xhat,  # as x; None for bin_loss_fwd
    partials,  # [programs, 4, LP]: n | S | Q | sum |d|, near; with words [programs, 8]: both ends' S, Q | the same
    words,  # zeros [programs, 3, L] int64: (count, S) | Q | fine Q, in fixed point; None for few levels
    s_words,  # zeros [L, C] int64: S_(k,c) in fixed point; None without its gradient or with one step
    s_ends,  # [n_splits, 2, C]: S_(k,c) of the lowest and the highest code; None as s_words
    outer,
    C,
    inner,
    n_splits,
    n_items,
    clip,
    QN: tl.constexpr,
    QP: tl.constexpr,
    BINARY: tl.constexpr,
    RELU: tl.constexpr,
    LAYOUT: tl.constexpr,
    T0: tl.constexpr,
    T1: tl.constexpr,
    VEC: tl.constexpr,
    LP: tl.constexpr,
):
    LEVELS: tl.constexpr = QP - QN + 1
    LANES: tl.constexpr = T0 * T1 // VEC
    i_p = tl.program_id(0)
    n_tiles = _n_tiles(outer, inner, LAYOUT, T0, T1)
    inverse_unit = None
    p_words = None
    if words is not None:
        inverse_unit = 1.0 / _unit(alpha, C)
        p_words = words + tl.cast(i_p, tl.int64) * (3 * LEVELS)
        sums = _zero_sums(6, LANES)
    else:
        sums = _zero_sums(3 * LEVELS + 2, LANES)
    # An item is one block of channels and one share of its tiles.
    for i_item in range(i_p, n_items, tl.num_programs(0)):
        i_c = i_item // n_splits
        i_s = i_item % n_splits
        b_step = _steps(alpha, i_c, C, LAYOUT, T0, T1)
        b_ends = (tl.zeros([T0, T1], tl.float32), tl.zeros([T0, T1], tl.float32))  # unused, and gone, without s_words
        for i_t in range(i_s, n_tiles, n_splits):
            sums, b_ends = _bin_tile(x, xhat, sums, p_words, inverse_unit, b_ends, s_words, i_t, i_c, b_step, clip,
                                     outer, C, inner, QN, QP, BINARY, RELU, LAYOUT, T0, T1, VEC,
                                     LAYOUT != FLAT)  # fmt: skip
        if LAYOUT == FLAT:
            if i_s == n_tiles % n_splits:
                sums, b_ends = _bin_tile(x, xhat, sums, p_words, inverse_unit, b_ends, s_words, n_tiles, i_c, b_step,
                                         clip, outer, C, inner, QN, QP, BINARY, RELU, LAYOUT, T0, T1, VEC,
                                         True)  # fmt: skip
        if s_words is not None:
            _store_per_channel(s_ends, b_ends[0], 2 * i_s, i_c, C, LAYOUT, T0, T1)
            _store_per_channel(s_ends, b_ends[1], 2 * i_s + 1, i_c, C, LAYOUT, T0, T1)
    if words is not None:
        p_row = partials + tl.cast(i_p, tl.int64) * 8
        _store_row(p_row, sums, 0, 1, 6, 8)
    else:
        p_row = partials + tl.cast(i_p, tl.int64) * (4 * LP)
        for j in tl.static_range(3):
            _store_row(p_row + j * LP, sums, j, 3, LEVELS, LP)
        _store_row(p_row + 3 * LP, sums, 3 * LEVELS, 1, 2, LP)


@triton.jit
def _store_row(p_row, sums, FIRST: tl.constexpr, STRIDE: tl.constexpr, COUNT: tl.constexpr, WIDTH: tl.constexpr):
    """Store the totals of sums[FIRST], sums[FIRST + STRIDE], ... as one row, zeros behind them."""
    o_k = tl.arange(0, WIDTH)
    b_row = tl.zeros([WIDTH], tl.float32)
    for k in tl.static_range(COUNT):
        total = sums[FIRST + k * STRIDE]
        b_row = tl.where(o_k == k, tl.sum(total, 0), b_row)
    tl.store(p_row + o_k, b_row)
