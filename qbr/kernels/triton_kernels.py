"""Triton kernels: LSQ forward, and the one backward of all three ops. What they share with triton_bins.py, too.

The formulas, and the choices that all backends share, are in README.md here. triton_bins.py holds the forward with
bin sums, triton_finalize.py the small kernels that add up partial sums, triton_backend.py the launchers and the tuning
constants (triton_lists.py those of lists).

x is seen as [outer, C, inner] in storage order, in tiles [T0, T1] of one of three layouts:
    FLAT  one step per tensor: outer elements (C = inner = 1); full tiles carry no mask, which keeps loads 16 bytes wide
    ROWS  T0 channels by T1 of a channel's inner elements
    COLS  inner == 1, channels side by side: T0 of the outer rows by T1 channels
A program has one block of channels (i_c) and one share (i_s of n_splits) of the tiles that hold it.
"""

import triton
import triton.language as tl

FLAT = tl.constexpr(0)
ROWS = tl.constexpr(1)
COLS = tl.constexpr(2)

# 1.5 * 2^23: adding it leaves a float32 no fraction bits, rounded half to even.
ROUND = tl.constexpr(12582912.0)
# Triton's interpreter converts bfloat16 wrongly: it does not round, and loses zeros and subnormals.
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def _tile(i_t, i_c, outer, C, inner, LAYOUT: tl.constexpr, T0: tl.constexpr, T1: tl.constexpr):
    """Offsets and mask of tile i_t of channel block i_c."""
    i_t = tl.cast(i_t, tl.int64)
    o_0 = tl.arange(0, T0)[:, None]  # [T0, 1]
    o_1 = tl.arange(0, T1)[None, :]  # [1, T1]
    if LAYOUT == FLAT:
        o_x = i_t * (T0 * T1) + (o_0 * T1 + o_1)  # [T0, T1]
        m_x = o_x < outer
    elif LAYOUT == ROWS:
        n_pieces = tl.cdiv(inner, T1)
        o_c = i_c * T0 + o_0  # [T0, 1]
        o_i = i_t % n_pieces * T1 + o_1  # [1, T1]
        o_x = (i_t // n_pieces * C + o_c) * inner + o_i
        m_x = (o_c < C) & (o_i < inner)
    else:
        o_r = i_t * T0 + o_0  # [T0, 1]
        o_c = i_c * T1 + o_1  # [1, T1]
        o_x = o_r * C + o_c
        m_x = (o_r < outer) & (o_c < C)
    return o_x, m_x


@triton.jit
def _n_tiles(outer, inner, LAYOUT: tl.constexpr, T0: tl.constexpr, T1: tl.constexpr):
    """Tiles that hold one block of channels; FLAT: the full ones."""
    if LAYOUT == FLAT:
        n_tiles = outer // (T0 * T1)
    elif LAYOUT == ROWS:
        n_tiles = tl.cdiv(inner, T1) * outer
    else:
        n_tiles = tl.cdiv(outer, T0)
    return n_tiles


@triton.jit
def _steps(alpha, i_c, C, LAYOUT: tl.constexpr, T0: tl.constexpr, T1: tl.constexpr):
    """alpha of a block of channels, broadcastable against a tile: scalar, [T0, 1] or [1, T1]."""
    if LAYOUT == FLAT:
        b_step = tl.load(alpha)
    elif LAYOUT == ROWS:
        o_c = i_c * T0 + tl.arange(0, T0)[:, None]  # [T0, 1]
        b_step = tl.load(alpha + o_c, mask=o_c < C, other=1.0)
    else:
        o_c = i_c * T1 + tl.arange(0, T1)[None, :]  # [1, T1]
        b_step = tl.load(alpha + o_c, mask=o_c < C, other=1.0)
    return b_step


@triton.jit
def _divisor(b_step, QN: tl.constexpr, QP: tl.constexpr, BINARY: tl.constexpr, RELU: tl.constexpr):
    """What the short division needs of a block's steps: 1 / alpha in two parts, a bound for x, and whether it is exact.

    It is where alpha is far from under- and overflow and no code hangs on whether a quotient underflows to zero.
    """
    b_inverse = tl.math.div_rn(tl.full([], 1.0, tl.float32) + tl.zeros_like(b_step), b_step)
    b_rest = tl.fma(-b_step, b_inverse, tl.zeros_like(b_step) + 1.0) * b_inverse
    if BINARY or QP == 0 or (QN == 0 and not RELU):
        largest: tl.constexpr = 1.0
    else:
        largest: tl.constexpr = 2.0**60
    quick = ((b_step >= 2.0**-60) & (b_step <= largest)).to(tl.int32)
    if len(b_step.shape) == 2:
        quick = tl.min(tl.min(quick, 1), 0)
    return b_inverse, b_rest, b_step * 2.0**20, quick


@triton.jit
def _divide(b_y, b_step, divisor):
    """y / alpha, correctly rounded.

    The short way takes 7 instructions for a division's dozen, and none of its slow ones: with the reciprocal in two
    parts b_near is within one unit in the last place, so the remainder is exact, and one correction by a correctly
    rounded reciprocal gives the rounded quotient (Markstein 1990). The bound, far outside of every range, keeps
    infinities out of the remainder.
    """
    if INTERPRETED:  # its fma rounds twice
        b_v = tl.math.div_rn(b_y, b_step + tl.zeros_like(b_y))
    else:
        b_inverse, b_rest, b_bound, quick = divisor
        if quick != 0:
            b_a = _clamp(b_y, -b_bound, b_bound)
            b_near = tl.fma(b_a, b_inverse + tl.zeros_like(b_y), b_a * b_rest)
            b_left = tl.fma(-b_near, b_step + tl.zeros_like(b_y), b_a)
            b_v = tl.fma(b_left, b_inverse + tl.zeros_like(b_y), b_near)
        else:
            b_v = tl.math.div_rn(b_y, b_step + tl.zeros_like(b_y))
    return b_v


@triton.jit
def _to_float(b_x):
    if INTERPRETED and b_x.dtype == tl.bfloat16:
        return (b_x.to(tl.int16, bitcast=True).to(tl.int32) << 16).to(tl.float32, bitcast=True)
    else:
        return b_x.to(tl.float32)


@triton.jit
def _from_float(b_y, dtype: tl.constexpr):
    if INTERPRETED and dtype == tl.bfloat16:
        b_bits = b_y.to(tl.int32, bitcast=True)
        b_nearest = b_bits + 0x7FFF + ((b_bits >> 16) & 1)
        return (tl.where(b_y == b_y, b_nearest, b_bits) >> 16).to(tl.int16).to(tl.bfloat16, bitcast=True)
    else:
        return b_y.to(dtype)


@triton.jit
def _load(x, o_x, m_x, MASKED: tl.constexpr):
    if MASKED:
        b_x = tl.load(x + o_x, mask=m_x, other=0.0)
    else:
        b_x = tl.load(x + o_x)
    return _to_float(b_x)


@triton.jit
def _store(y, o_x, b_y, m_x, MASKED: tl.constexpr):
    if MASKED:
        tl.store(y + o_x, _from_float(b_y, y.dtype.element_ty), mask=m_x)
    else:
        tl.store(y + o_x, _from_float(b_y, y.dtype.element_ty))


@triton.jit
def _clamp(b_x, low, high):
    """A NaN stays a NaN."""
    b_x = tl.maximum(b_x, low, propagate_nan=tl.PropagateNan.ALL)
    return tl.minimum(b_x, high, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _quantize(b_x, b_step, divisor, clip, QN: tl.constexpr, QP: tl.constexpr, BINARY: tl.constexpr,
              RELU: tl.constexpr):  # fmt: skip
    """y, v = y / alpha, the code b as a float (NaN where v is NaN) and xhat = b * alpha, all [T0, T1] float32."""
    b_y = b_x
    if RELU:
        b_y = _clamp(b_x, 0.0, clip)
    b_v = _divide(b_y, b_step, divisor)
    if BINARY:
        b_b = tl.where(b_v == b_v, tl.where(b_v >= 0, 1.0, -1.0), b_v)
    else:
        b_b = (_clamp(b_v, QN + 0.0, QP + 0.0) + ROUND) - ROUND
    return b_y, b_v, b_b, b_b * b_step


@triton.jit
def _lsq_dy(b_g, b_v, b_b, QN: tl.constexpr, QP: tl.constexpr):
    """g * in, and g * (b - v * in), an element's share of dalpha."""
    m_in = (b_v >= QN) & (b_v <= QP)
    b_in = tl.where(m_in, 1.0, tl.where(b_v == b_v, 0.0, b_v))
    return b_g * b_in, b_g * (b_b - tl.where(m_in, b_v, 0.0))


@triton.jit
def _through_relu(b_dy, b_x, clip, RELU: tl.constexpr):
    """0 where the ReLU or its clip masks; dy is a NaN already where x is."""
    if RELU:
        b_dy = tl.where((b_x <= 0) | (b_x > clip), 0.0, b_dy)
    return b_dy


@triton.jit
def _lsq_fwd_tile(x, xhat, i_t, i_c, b_step, divisor, clip, outer, C, inner, QN: tl.constexpr, QP: tl.constexpr,
                  BINARY: tl.constexpr, RELU: tl.constexpr, LAYOUT: tl.constexpr, T0: tl.constexpr,
                  T1: tl.constexpr, MASKED: tl.constexpr):  # fmt: skip
    o_x, m_x = _tile(i_t, i_c, outer, C, inner, LAYOUT, T0, T1)
    b_x = _load(x, o_x, m_x, MASKED)
    _, _, _, b_xhat = _quantize(b_x, b_step, divisor, clip, QN, QP, BINARY, RELU)
    _store(xhat, o_x, b_xhat, m_x, MASKED)


@triton.jit
def _lsq_fwd(x, alpha, xhat, outer, C, inner, n_splits, clip, i_p, QN: tl.constexpr, QP: tl.constexpr,
             BINARY: tl.constexpr, RELU: tl.constexpr, LAYOUT: tl.constexpr, T0: tl.constexpr,
             T1: tl.constexpr):  # fmt: skip
    """Program i_p of a tensor's."""
    i_c = i_p // n_splits
    i_s = i_p % n_splits
    b_step = _steps(alpha, i_c, C, LAYOUT, T0, T1)
    divisor = _divisor(b_step, QN, QP, BINARY, RELU)
    n_tiles = _n_tiles(outer, inner, LAYOUT, T0, T1)
    for i_t in range(i_s, n_tiles, n_splits):
        _lsq_fwd_tile(x, xhat, i_t, i_c, b_step, divisor, clip, outer, C, inner,
                      QN, QP, BINARY, RELU, LAYOUT, T0, T1, LAYOUT != FLAT)  # fmt: skip
    if LAYOUT == FLAT:
        if i_s == n_tiles % n_splits:
            _lsq_fwd_tile(x, xhat, n_tiles, i_c, b_step, divisor, clip, outer, C, inner,
                          QN, QP, BINARY, RELU, LAYOUT, T0, T1, True)  # fmt: skip


@triton.jit(do_not_specialize=["outer", "n_splits"])
def _lsq_fwd_kernel(
    x,  # [outer, C, inner]
    alpha,  # [C]
    xhat,  # as x
    outer,
    C,
    inner,
    n_splits,
    clip,
    QN: tl.constexpr,
    QP: tl.constexpr,
    BINARY: tl.constexpr,
    RELU: tl.constexpr,
    LAYOUT: tl.constexpr,
    T0: tl.constexpr,
    T1: tl.constexpr,
):
    _lsq_fwd(x, alpha, xhat, outer, C, inner, n_splits, clip, tl.program_id(0), QN, QP, BINARY, RELU, LAYOUT, T0, T1)


@triton.jit
def _bin_table(grad_loss, bins, p_row, LEVELS: tl.constexpr, LP: tl.constexpr, SELECT: tl.constexpr):
    """float32(2 * grad_loss / n_k): scalars in a tuple (SELECT), or the program's own row [LP] of scratch memory."""
    b_g = 2.0 * tl.load(grad_loss).to(tl.float64)
    if SELECT:
        scales = ()
        for k in tl.static_range(LEVELS):
            scales = scales + ((b_g / tl.maximum(tl.load(bins + k), 1.0)).to(tl.float32),)
        return scales
    else:
        o_k = tl.arange(0, LP)
        b_n = tl.load(bins + o_k, mask=o_k < LEVELS, other=1.0)  # [LP]
        tl.store(p_row + o_k, (b_g / tl.maximum(b_n, 1.0)).to(tl.float32))
        # Threads of this program read what its other threads wrote.
        tl.debug_barrier()
        return p_row


@triton.jit
def _bin_dy(b_y, b_b, b_xhat, scales, QN: tl.constexpr, LEVELS: tl.constexpr, SELECT: tl.constexpr):
    """grad_loss * 2 * d / n_b. A NaN takes the lowest bin's factor; its d makes the product a NaN."""
    if SELECT:
        b_scale = tl.zeros_like(b_y) + scales[0]
        for k in tl.static_range(1, LEVELS):
            b_scale = tl.where(b_b == QN + k, scales[k], b_scale)
    else:
        b_scale = tl.load(scales + tl.where(b_b == b_b, b_b - QN, 0.0).to(tl.int32))
    return b_scale * (b_y - b_xhat)


@triton.jit
def _bwd_tile(g, x, dx, b_dalpha, scales, i_t, i_c, b_step, divisor, clip, outer, C, inner, QN: tl.constexpr,
              QP: tl.constexpr, BINARY: tl.constexpr, RELU: tl.constexpr, LAYOUT: tl.constexpr, T0: tl.constexpr,
              T1: tl.constexpr, MASKED: tl.constexpr, SELECT: tl.constexpr):  # fmt: skip
    o_x, m_x = _tile(i_t, i_c, outer, C, inner, LAYOUT, T0, T1)
    b_x = _load(x, o_x, m_x, MASKED)
    b_y, b_v, b_b, b_xhat = _quantize(b_x, b_step, divisor, clip, QN, QP, BINARY, RELU)
    if g is not None:
        b_dy, b_share = _lsq_dy(_load(g, o_x, m_x, MASKED), b_v, b_b, QN, QP)
        if MASKED:
            b_share = tl.where(m_x, b_share, 0.0)
        b_dalpha += b_share
        if scales is not None:
            b_dy += _bin_dy(b_y, b_b, b_xhat, scales, QN, QP - QN + 1, SELECT)
    else:
        b_dy = _bin_dy(b_y, b_b, b_xhat, scales, QN, QP - QN + 1, SELECT)
    _store(dx, o_x, _through_relu(b_dy, b_x, clip, RELU), m_x, MASKED)
    return b_dalpha


@triton.jit
def _lsq_bin_bwd(g, grad_loss, x, alpha, bins, table, dx, dalpha, outer, C, inner, n_splits, clip, i_p, i_row,
                 QN: tl.constexpr, QP: tl.constexpr, BINARY: tl.constexpr, RELU: tl.constexpr, LAYOUT: tl.constexpr,
                 T0: tl.constexpr, T1: tl.constexpr, SELECT: tl.constexpr, LP: tl.constexpr):  # fmt: skip
    """Program i_p of a tensor's, with row i_row of the scratch table."""
    i_c = i_p // n_splits
    i_s = i_p % n_splits
    b_step = _steps(alpha, i_c, C, LAYOUT, T0, T1)
    divisor = _divisor(b_step, QN, QP, BINARY, RELU)
    n_tiles = _n_tiles(outer, inner, LAYOUT, T0, T1)
    scales = None
    if grad_loss is not None:
        p_row = None if SELECT else table + i_row * LP
        scales = _bin_table(grad_loss, bins, p_row, QP - QN + 1, LP, SELECT)
    b_dalpha = tl.zeros([T0, T1], tl.float32)
    for i_t in range(i_s, n_tiles, n_splits):
        b_dalpha = _bwd_tile(g, x, dx, b_dalpha, scales, i_t, i_c, b_step, divisor, clip, outer, C, inner,
                             QN, QP, BINARY, RELU, LAYOUT, T0, T1, LAYOUT != FLAT, SELECT)  # fmt: skip
    if LAYOUT == FLAT:
        if i_s == n_tiles % n_splits:
            b_dalpha = _bwd_tile(g, x, dx, b_dalpha, scales, n_tiles, i_c, b_step, divisor, clip, outer, C, inner,
                                 QN, QP, BINARY, RELU, LAYOUT, T0, T1, True, SELECT)  # fmt: skip
    if dalpha is not None:
        _store_per_channel(dalpha, b_dalpha, i_s, i_c, C, LAYOUT, T0, T1)


@triton.jit(do_not_specialize=["outer", "n_splits"])
def _lsq_bin_bwd_kernel(
    g,  # gradient of xhat, as x; None for bin_loss_bwd
    grad_loss,  # []; None for lsq_bwd
    x,  # [outer, C, inner]
    alpha,  # [C]
    bins,  # [3 L + 2] float64; None for lsq_bwd
    table,  # scratch [programs, LP]; None with SELECT and for lsq_bwd
    dx,  # as x
    dalpha,  # partial sums [n_splits, C]; None for bin_loss_bwd
    outer,
    C,
    inner,
    n_splits,
    clip,
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
    i_p = tl.program_id(0)
    _lsq_bin_bwd(g, grad_loss, x, alpha, bins, table, dx, dalpha, outer, C, inner, n_splits, clip, i_p, i_p,
                 QN, QP, BINARY, RELU, LAYOUT, T0, T1, SELECT, LP)  # fmt: skip


@triton.jit
def _store_per_channel(partials, b_t, i_r, i_c, C, LAYOUT: tl.constexpr, T0: tl.constexpr, T1: tl.constexpr):
    """Add a tile up by channel and store it in row i_r of partials [rows, C]."""
    p_row = partials + tl.cast(i_r, tl.int64) * C
    if LAYOUT == FLAT:
        tl.store(p_row, tl.sum(tl.sum(b_t, 1), 0))
    elif LAYOUT == ROWS:
        o_c = i_c * T0 + tl.arange(0, T0)
        tl.store(p_row + o_c, tl.sum(b_t, 1), mask=o_c < C)
    else:
        o_c = i_c * T1 + tl.arange(0, T1)
        tl.store(p_row + o_c, tl.sum(b_t, 0), mask=o_c < C)
