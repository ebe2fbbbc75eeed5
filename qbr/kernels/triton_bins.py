"""Triton kernel: the forward that adds bins up, with xhat (lsq_bin) or without it (bin_loss).

Three methods, by the number of levels (triton_backend.py has the bounds):
    MASKED  n, S and Q of every bin in registers, each element masked into them
    CELLS   a float table in shared memory, every thread alone in its column (not in Triton's interpreter)
    WORDS   integer atomics in shared memory on fixed-point distances, which give the same bits in any order; S and Q
            of the two end bins, whose distances have no bound, stay in float registers
triton_finalize.py adds the programs' rows up. Registers hold lane sums: [T0, T1] as [LANES, VEC], the VEC elements
that one thread loaded together added up first.
"""

import triton
import triton.language as tl

from qbr.kernels.triton_kernels import (
    FLAT,
    INTERPRETED,
    ROWS,
    _divisor,
    _load,
    _n_tiles,
    _quantize,
    _steps,
    _store,
    _store_per_channel,
    _tile,
)
from qbr.kernels.triton_shared import (
    _add_to_cells,
    _add_to_words,
    _clear,
    _memory,
    _read_float,
    _read_word,
    _write_float,
)

MASKED = tl.constexpr(0)
CELLS = tl.constexpr(1)
WORDS = tl.constexpr(2)

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


# A predicated add is one instruction; Triton's select and add are two. Operands: three sums in and out, code, d, d * d
# and the bin's code. Unordered for the lowest bin: a NaN is not above it, so it counts there.
_ADD_TO_BIN = tl.constexpr("""{
    .reg .pred p;
    setp.eq.f32 p, $6, $9;
    @p add.f32 $0, $0, 0f3F800000;
    @p add.f32 $1, $1, $7;
    @p add.f32 $2, $2, $8;
}""")
_ADD_TO_LOWEST_BIN = tl.constexpr(_ADD_TO_BIN.value.replace("setp.eq", "setp.leu"))

@triton.jit
def _columns(b_t, LANES: tl.constexpr, VEC: tl.constexpr):
    """A tile as VEC vectors [LANES], one for each of the elements that a thread has loaded together."""
    columns = (tl.reshape(b_t, [LANES, VEC]),)
    for i in tl.static_range(4):
        if VEC >> i > 1:
            halves = ()
            for j in tl.static_range(1 << i):
                b_even, b_odd = tl.split(tl.reshape(columns[j], [LANES, VEC >> (i + 1), 2]))
                halves = halves + (b_even, b_odd)
            columns = halves
    vectors = ()
    for i in tl.static_range(VEC):
        vectors = vectors + (tl.reshape(columns[i], [LANES]),)
    return vectors


@triton.jit
def _add_bins_predicated(sums, b_b, b_d, QN: tl.constexpr, LEVELS: tl.constexpr, BINARY: tl.constexpr,
                         LANES: tl.constexpr, VEC: tl.constexpr):  # fmt: skip
    """_add_bins in compiled code."""
    codes = _columns(b_b, LANES, VEC)
    distances = _columns(b_d, LANES, VEC)
    for i in tl.static_range(VEC):
        b_square = distances[i] * distances[i]
        new = ()
        for k in tl.static_range(LEVELS):
            if BINARY and k == 1:
                new = new + (sums[3], sums[4], sums[5])
            else:
                new = new + tl.inline_asm_elementwise(
                    _ADD_TO_LOWEST_BIN if k == 0 else _ADD_TO_BIN,
                    "=f,=f,=f,0,1,2,f,f,f,f",
                    [sums[3 * k], sums[3 * k + 1], sums[3 * k + 2], codes[i], distances[i], b_square, QN + k + 0.0],
                    (tl.float32, tl.float32, tl.float32), True, 1,
                )  # fmt: skip
        sums = new + (sums[3 * LEVELS], sums[3 * LEVELS + 1])
    return sums[: 3 * LEVELS]


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
    """b_t in units of 1 / one, as an integer; 0 for what is no distance inside the range (NaN, inf, a broken alpha).

    To the nearest: cut off, distances of a few units would lose a part of their mean.
    """
    b_v = tl.where(tl.abs(b_t) <= 1.0, b_t, 0.0) * one
    if INTERPRETED:
        return tl.floor(b_v + 0.5).to(tl.int64)
    return tl.inline_asm_elementwise("cvt.rni.s64.f32 $0, $1;", "=l,f", [b_v], tl.int64, True, 1)


@triton.jit
def _add_bins_fixed(sums, address, inverse_unit, b_b, b_d, m_x, QN: tl.constexpr, QP: tl.constexpr,
                    LANES: tl.constexpr, VEC: tl.constexpr, PARTIAL: tl.constexpr):  # fmt: skip
    """Add a tile to the words [3, L] in shared memory, and to S and Q of the two end bins in float.

    Distances are bounded inside the range alone; the end bins' words hold counts only.
    """
    m_low = ~(b_b > QN)
    m_high = b_b == QP
    m_inner = ~(m_low | m_high)
    b_slot = tl.where(m_low, 0.0, b_b - QN)
    b_t = b_d * inverse_unit
    b_word = tl.where(m_inner, _to_fixed(b_t, S_ONE), 0) + COUNT_ONE
    b_q = b_t * b_t
    m_fine = b_q < FINE
    b_square = tl.where(m_inner, _to_fixed(b_q, tl.where(m_fine, Q_FINE_ONE, Q_ONE)), 0)
    if PARTIAL:
        m_inner = m_inner & m_x
        b_slot = tl.where(m_x, b_slot, 0.0)
        b_word = tl.where(m_x, b_word, 0)
        b_square = tl.where(m_x, b_square, 0)
    o_w = b_slot.to(tl.int32)
    _add_to_words(address, o_w, b_word)
    _add_to_words(address, o_w + tl.where(m_fine, 2 * (QP - QN + 1), QP - QN + 1), b_square)
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
    b_max = tl.zeros([1024], tl.float32)  # every program reads all steps: in few rounds
    for i_c in range(0, C, 1024):
        o_c = i_c + tl.arange(0, 1024)
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
def _bin_tile(x, xhat, sums, address, inverse_unit, b_ends, s_words, i_t, i_c, b_step, divisor, clip, outer, C, inner,
              QN: tl.constexpr, QP: tl.constexpr, BINARY: tl.constexpr, RELU: tl.constexpr, LAYOUT: tl.constexpr,
              T0: tl.constexpr, T1: tl.constexpr, VEC: tl.constexpr, METHOD: tl.constexpr, THREADS: tl.constexpr,
              PARTIAL: tl.constexpr):  # fmt: skip
    """One tile: xhat, and all sums. sums ends with sum |d| and the count of |d| < 0.01 alpha."""
    LEVELS: tl.constexpr = QP - QN + 1
    LANES: tl.constexpr = T0 * T1 // VEC
    o_x, m_x = _tile(i_t, i_c, outer, C, inner, LAYOUT, T0, T1)
    b_x = _load(x, o_x, m_x, PARTIAL)
    b_y, _, b_b, b_xhat = _quantize(b_x, b_step, divisor, clip, QN, QP, BINARY, RELU)
    if xhat is not None:
        _store(xhat, o_x, b_xhat, m_x, PARTIAL)
    b_d = b_y - b_xhat
    b_limit = 0.01 * b_step + tl.zeros_like(b_d)
    if PARTIAL:
        b_b = tl.where(m_x, b_b, NO_CODE)
        b_d = tl.where(m_x, b_d, 0.0)
        b_limit = tl.where(m_x, b_limit, 0.0)
    if s_words is not None:
        b_ends = _add_alpha_sums(b_ends, s_words, b_b, b_d, b_step, m_x, i_c, C, QN, QP, LAYOUT, T0, T1)
    if METHOD == MASKED:
        if INTERPRETED:
            new = _add_bins(sums, b_b, b_d, QN, LEVELS, BINARY, LANES, VEC)
        else:
            new = _add_bins_predicated(sums, b_b, b_d, QN, LEVELS, BINARY, LANES, VEC)
    elif METHOD == CELLS:
        new = ()
        b_slot = tl.minimum(tl.where(b_b > QN, b_b - QN, 0.0), LEVELS + 0.0)
        _add_to_cells(address, b_slot.to(tl.int32), b_d, THREADS)
    else:
        new = _add_bins_fixed(sums, address, inverse_unit, b_b, b_d, m_x, QN, QP, LANES, VEC, PARTIAL)
    b_near = tl.where(tl.abs(b_d) < b_limit, 1.0, 0.0)
    return new + (
        sums[len(new)] + tl.sum(tl.reshape(tl.abs(b_d), [LANES, VEC]), 1),
        sums[len(new) + 1] + tl.sum(tl.reshape(b_near, [LANES, VEC]), 1),
    ), b_ends


@triton.jit
def _lsq_bin_fwd(x, alpha, xhat, partials, words, s_words, s_ends, outer, C, inner, n_splits, n_items, clip, i_p,
                 n_programs, i_row, QN: tl.constexpr, QP: tl.constexpr, BINARY: tl.constexpr, RELU: tl.constexpr,
                 LAYOUT: tl.constexpr, T0: tl.constexpr, T1: tl.constexpr, VEC: tl.constexpr, LP: tl.constexpr,
                 METHOD: tl.constexpr, THREADS: tl.constexpr):  # fmt: skip
    """Program i_p of a tensor's n_programs, which leaves row i_row of partials and words."""
    LEVELS: tl.constexpr = QP - QN + 1
    LANES: tl.constexpr = T0 * T1 // VEC
    n_tiles = _n_tiles(outer, inner, LAYOUT, T0, T1)
    inverse_unit = None
    address = None
    if METHOD == MASKED:
        sums = _zero_sums(3 * LEVELS + 2, LANES)
    elif METHOD == CELLS:
        sums = _zero_sums(2, LANES)
        address = _memory(12 * THREADS * (LEVELS + 1), 4 * THREADS)
        _clear(address, 12 * THREADS * (LEVELS + 1), THREADS)
    else:
        sums = _zero_sums(6, LANES)
        inverse_unit = 1.0 / _unit(alpha, C)
        if INTERPRETED:
            address = words + tl.cast(i_row, tl.int64) * (3 * LEVELS)
        else:
            address = _memory(24 * LEVELS, 16)
            _clear(address, 24 * LEVELS, THREADS)
    # An item is one block of channels and one share of its tiles.
    for i_item in range(i_p, n_items, n_programs):
        i_c = i_item // n_splits
        i_s = i_item % n_splits
        b_step = _steps(alpha, i_c, C, LAYOUT, T0, T1)
        divisor = _divisor(b_step, QN, QP, BINARY, RELU)
        b_ends = (tl.zeros([T0, T1], tl.float32), tl.zeros([T0, T1], tl.float32))  # unused, and gone, without s_words
        for i_t in range(i_s, n_tiles, n_splits):
            sums, b_ends = _bin_tile(x, xhat, sums, address, inverse_unit, b_ends, s_words, i_t, i_c, b_step, divisor,
                                     clip, outer, C, inner, QN, QP, BINARY, RELU, LAYOUT, T0, T1, VEC, METHOD,
                                     THREADS, LAYOUT != FLAT)  # fmt: skip
        if LAYOUT == FLAT:
            if i_s == n_tiles % n_splits:
                sums, b_ends = _bin_tile(x, xhat, sums, address, inverse_unit, b_ends, s_words, n_tiles, i_c, b_step,
                                         divisor, clip, outer, C, inner, QN, QP, BINARY, RELU, LAYOUT, T0, T1, VEC,
                                         METHOD, THREADS, True)  # fmt: skip
        if s_words is not None:
            _store_per_channel(s_ends, b_ends[0], 2 * i_s, i_c, C, LAYOUT, T0, T1)
            _store_per_channel(s_ends, b_ends[1], 2 * i_s + 1, i_c, C, LAYOUT, T0, T1)
    _store_sums(partials, words, sums, address, i_row, LEVELS, LP, METHOD, THREADS)


@triton.jit(do_not_specialize=["outer", "n_splits", "n_items"])
def _lsq_bin_fwd_kernel(
    x,  # [outer, C, inner]
    alpha,  # [C]
    xhat,  # as x; None for bin_loss_fwd
    partials,  # [programs, 4, LP]: n | S | Q | sum |d|, near; with WORDS [programs, 8]: both ends' S, Q | the same
    words,  # [programs, 3, L] int64: (count, S) | Q | fine Q, in fixed point; None but with WORDS
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
    METHOD: tl.constexpr,
    THREADS: tl.constexpr,
):
    i_p = tl.program_id(0)
    _lsq_bin_fwd(x, alpha, xhat, partials, words, s_words, s_ends, outer, C, inner, n_splits, n_items, clip, i_p,
                 tl.num_programs(0), i_p, QN, QP, BINARY, RELU, LAYOUT, T0, T1, VEC, LP, METHOD, THREADS)  # fmt: skip


@triton.jit
def _store_sums(partials, words, sums, address, i_row, LEVELS: tl.constexpr, LP: tl.constexpr, METHOD: tl.constexpr,
                THREADS: tl.constexpr):  # fmt: skip
    """Store a program's rows of partials and words."""
    if METHOD == MASKED and INTERPRETED:
        p_row = partials + tl.cast(i_row, tl.int64) * (4 * LP)
        for j in tl.static_range(3):
            _store_row(p_row + j * LP, sums, j, 3, LEVELS, LP)
        _store_row(p_row + 3 * LP, sums, 3 * LEVELS, 1, 2, LP)
    elif METHOD != WORDS:
        LANES: tl.constexpr = sums[0].shape[0]
        COLUMNS: tl.constexpr = LANES if METHOD == MASKED else THREADS
        o_l = tl.arange(0, LANES)
        if METHOD == CELLS:
            tl.debug_barrier()
        else:
            address = _memory(4 * LANES * (3 * LEVELS + 2), 4 * LANES)
            for k in tl.static_range(LEVELS):
                for j in tl.static_range(3):
                    _write_float(address + 4 * ((3 * k + (j + 2) % 3) * LANES + o_l), sums[3 * k + j])
        # Of the slot that belongs to no bin S and Q are 0, and make room.
        for j in tl.static_range(2):
            _write_float(address + 4 * ((3 * LEVELS + j) * COLUMNS + o_l), sums[len(sums) - 2 + j])
        tl.debug_barrier()
        _store_cells(partials + tl.cast(i_row, tl.int64) * (4 * LP), address, LEVELS, LP, COLUMNS)
    else:
        _store_row(partials + tl.cast(i_row, tl.int64) * 8, sums, 0, 1, 6, 8)
        if not INTERPRETED:
            tl.debug_barrier()
            o_w = tl.arange(0, 4 * LP)
            b_words = _read_word(address + 8 * tl.minimum(o_w, 3 * LEVELS - 1))
            tl.store(words + tl.cast(i_row, tl.int64) * (3 * LEVELS) + o_w, b_words, mask=o_w < 3 * LEVELS)


@triton.jit
def _store_cells(p_row, address, LEVELS: tl.constexpr, LP: tl.constexpr, COLUMNS: tl.constexpr):
    """Store the totals of cells [3 LEVELS + 2, COLUMNS] as n | S | Q | the last two, by one reduction for all."""
    o_j = tl.arange(0, 4 * LP)
    o_k = o_j % LP
    m_bin = o_j < 3 * LP
    m_j = o_k < tl.where(m_bin, LEVELS, 2)
    o_row = tl.where(m_bin, 3 * o_k + (o_j // LP + 2) % 3, 3 * LEVELS + o_k)
    o_t = tl.arange(0, COLUMNS)[:, None]
    # Lanes read rows side by side, each from another bank; the address is a multiple of a row, so that xor moves it.
    p_first = address + 4 * (tl.where(m_j, o_row, 0) * COLUMNS + tl.cdiv(8, LP) * o_j % COLUMNS)
    b_row = tl.sum(_read_float(p_first[None, :] ^ (4 * o_t)), 0)  # [4 LP]
    tl.store(p_row + o_j, tl.where(m_j, b_row, 0.0))


@triton.jit
def _store_row(p_row, sums, FIRST: tl.constexpr, STRIDE: tl.constexpr, COUNT: tl.constexpr, WIDTH: tl.constexpr):
    """Store the totals of sums[FIRST], sums[FIRST + STRIDE], ... as one row, zeros behind them."""
    o_k = tl.arange(0, WIDTH)
    b_row = tl.zeros([WIDTH], tl.float32)
    for k in tl.static_range(COUNT):
        total = sums[FIRST + k * STRIDE]
        b_row = tl.where(o_k == k, tl.sum(total, 0), b_row)
    tl.store(p_row + o_k, b_row)
