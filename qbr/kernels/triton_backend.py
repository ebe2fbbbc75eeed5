"""The Triton backend: launchers of the kernels in triton_kernels.py, triton_bins.py and triton_finalize.py.

Lists of tensors have launchers of their own, in triton_lists.py, with a constant for their length; every other tuning
constant stands here. Nothing synchronises with the device, but for a list whose sizes are new, once; how work is
divided depends on sizes, dtype and device alone: the same input gives the same bits.
"""

from __future__ import annotations

import importlib
from contextlib import nullcontext
from functools import cache, lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from qbr.kernels import BackendUnavailable, check_dense, laid_out_like

DTYPES = (torch.float32, torch.bfloat16, torch.float16)

NUM_WARPS = 4
# One 16-byte load per thread and tile: more would cost the bin sums their registers.
VECTOR_BYTES = 16
# Programs on a multiprocessor, one wave at most: 8 fit in an H100's registers and shared memory, of 16-bit elements 6.
PROGRAMS_PER_SM = 8
HALF_PROGRAMS_PER_SM = 6
# What a program does around its tiles costs up to 2.5 of them: a program has 4, but 4 programs a multiprocessor go
# first, whose 16 warps have 8 KB in flight: about what memory's latency takes.
TILES_PER_PROGRAM = 4
LEAST_PROGRAMS_PER_SM = 4
# Masked sums take 4 instructions a level and 3 registers; cells 19 instructions at any number of levels, and 12 bytes
# of shared memory a level and thread: 26 KB a block at 16 levels.
MASKED_LEVELS = 4
CELL_LEVELS = 16
MASKED, CELLS, WORDS = range(3)  # triton_bins.py's methods
# A program sums about this many elements, at most twice: float32 counts stay exact, fixed-point sums in their words.
ELEMENTS_PER_PROGRAM = 1 << 18
# A program of fixed-point words leaves 6 KB for the second stage to add up: fewer programs, more warps.
WORDS_PROGRAMS_PER_SM = 2
WORDS_NUM_WARPS = 8
# Registers of a thread of the fused forward of 16-bit elements with one step, by method. Without a bound Triton 3.6
# takes more, which leaves 5, 5 and 1 blocks on an H100's multiprocessor, and with it 6, 6 and 2: benchmarks/NOTES.md.
HALF_REGISTERS = (80, 80, 128)
# Backward selects among up to this many factors in registers, and gathers from a cached table beyond.
SELECT_LEVELS = 4
# A row of channels that lie side by side: 128 of them fill whole cache lines in every dtype.
COLUMNS = 128
# The interpreter costs per program and operation, not per element.
INTERPRETER_TILE = 1 << 16
INTERPRETER_PROGRAMS = 3
# Elements of the tile in which the second stages of alpha's gradient add their rows up.
FINAL_TILE = 1024
# Its channels, side by side: 8 of them fill a sector of 32 bytes, and leave the tile 128 rows at a time.
FINAL_COLUMNS = 8
# One program adds the rows of bins up, and waits for memory once for every tile: of 32 elements a thread with 8 warps.
# Words, three sums of 8 elements and 124 registers a thread, take 16 warps: half the turns for a sixth more to issue.
BINS_TILE, BINS_NUM_WARPS = 8192, 8
BINS_WORDS_TILE, BINS_WORDS_NUM_WARPS = 4096, 16


def load(device_type: str) -> None:
    """Import the kernels; raise BackendUnavailable, with the remedy, where they cannot run."""
    try:
        importlib.import_module("triton")
    except ModuleNotFoundError as error:
        if error.name != "triton":  # one that is there and broken
            raise
        raise BackendUnavailable(
            "Triton is not installed: pip install triton (Linux; PyTorch's CUDA builds bring it)"
        ) from error
    if device_type not in ("cuda", "cpu"):
        raise BackendUnavailable(f"the Triton kernels run on cuda, not on {device_type}; use backend='reference'")
    if device_type == "cpu" and not _kernels().interpreted:
        raise BackendUnavailable(
            "on the CPU, Triton kernels run in Triton's interpreter only: set TRITON_INTERPRET=1 before the first "
            "import of triton; use backend='native' or 'reference' otherwise"
        )


class _Kernels(NamedTuple):
    lsq_fwd: object
    lsq_bin_fwd: object
    lsq_bin_bwd: object
    sum_rows: object
    bins: object
    dloss_dalpha: object
    lsq_fwd_list: object
    lsq_bin_fwd_list: object
    lsq_bin_bwd_list: object
    sum_rows_list: object
    bins_list: object
    dloss_dalpha_list: object
    interpreted: bool


@cache
def _kernels() -> _Kernels:
    from triton.runtime.jit import JITFunction

    from qbr.kernels import triton_bins, triton_finalize, triton_kernels, triton_list_kernels

    kernels = (
        triton_kernels._lsq_fwd_kernel,
        triton_bins._lsq_bin_fwd_kernel,
        triton_kernels._lsq_bin_bwd_kernel,
        triton_finalize._sum_rows_kernel,
        triton_finalize._bins_kernel,
        triton_finalize._dloss_dalpha_kernel,
        triton_list_kernels._lsq_fwd_list_kernel,
        triton_list_kernels._lsq_bin_fwd_list_kernel,
        triton_list_kernels._lsq_bin_bwd_list_kernel,
        triton_list_kernels._sum_rows_list_kernel,
        triton_list_kernels._bins_list_kernel,
        triton_list_kernels._dloss_dalpha_list_kernel,
    )
    return _Kernels(*kernels, interpreted=not isinstance(kernels[0], JITFunction))


class Plan(NamedTuple):
    """How a tensor is divided: x as [outer, channels, inner] in tiles [t0, t1] of one layout."""

    outer: int
    channels: int
    inner: int
    layout: int  # 0 FLAT, 1 ROWS, 2 COLS
    t0: int
    t1: int
    vec: int  # elements of a tile that lie together and that one thread adds up
    blocks: int  # of channels
    splits: int  # shares of the tiles of one block of channels
    programs: int  # of the kernel that loops over blocks x splits; the others have one for each


def _power_of_two(n: int) -> int:
    return 1 << max(n - 1, 0).bit_length()


def plan(numel: int, channels: int, inner: int, vec: int, tile: int, least: int, most: int) -> Plan:
    """Divide numel > 0 elements into tiles of `tile`, a power of two, for about `least` to `most` programs.

    A tile has tile / vec elements at least, one for each thread: Triton repeats what smaller ones hold, and each copy
    would be added to the bins.
    """
    threads = tile // vec
    if channels == 1:
        outer, inner, layout = numel, 1, 0
        t0, t1, blocks = tile // vec, vec, 1
        tiles = -(-numel // tile)
    elif inner > 1:
        outer, layout = numel // (channels * inner), 1
        t1 = min(tile, _power_of_two(inner))
        t0 = min(tile // t1, max(_power_of_two(channels), vec, threads // t1))
        blocks = -(-channels // t0)
        tiles = outer * -(-inner // t1)
    else:
        outer, layout = numel // channels, 2
        t1 = min(tile, COLUMNS, _power_of_two(channels))
        t0 = min(tile // t1, max(_power_of_two(outer), vec, threads // t1))
        blocks = -(-channels // t1)
        tiles = -(-outer // t0)
    tile = t0 * t1
    programs = max(least, min(most, blocks * tiles // TILES_PER_PROGRAM))
    longest = max(ELEMENTS_PER_PROGRAM // tile, 1)  # tiles of one program
    splits = min(tiles, max(-(-programs // blocks), -(-tiles // longest)))
    tiles_per_item = -(-tiles // splits)
    items = blocks * splits
    items_per_program = max(longest // tiles_per_item, 1)
    count = min(items, max(programs, -(-items // items_per_program)))
    return Plan(outer, channels, inner, layout, t0, t1, vec, blocks, splits, count)


@lru_cache(maxsize=4096)
def _plan(numel, channels, inner, itemsize, device: torch.device, least: int, most: int, num_warps: int) -> Plan:
    if _kernels().interpreted:
        tile = max(min(_power_of_two(numel) // 2, INTERPRETER_TILE), 64)
        return plan(numel, channels, inner, tile // 64, tile, INTERPRETER_PROGRAMS, INTERPRETER_PROGRAMS)
    vec, count = VECTOR_BYTES // itemsize, _multiprocessors(device)
    return plan(numel, channels, inner, vec, 32 * num_warps * vec, least * count, most * count)


def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def _plan_of(x: Tensor, alpha: Tensor, channel_axis: int, method: int | None = None, least: int = 0) -> Plan:
    """The division for a method of the forward with bins, or another kernel; least: programs on a multiprocessor."""
    check_dense(x)
    channels = alpha.numel()
    inner = x.stride(channel_axis) if channel_axis >= 0 and channels > 1 else 1
    most = PROGRAMS_PER_SM if x.element_size() == 4 else HALF_PROGRAMS_PER_SM
    if method == WORDS:
        most = WORDS_PROGRAMS_PER_SM
    least = least or min(LEAST_PROGRAMS_PER_SM, most)
    return _plan(x.numel(), channels, inner, x.element_size(), x.device, least, most, _num_warps(method))


def _on_device_of(x: Tensor):
    """Triton launches on the current device and its current stream."""
    if x.device.type != "cuda" or x.device.index == torch.cuda.current_device():
        return nullcontext()
    return torch.cuda.device(x.device)


def _tile_options(p: Plan, num_warps: int = NUM_WARPS) -> dict:
    return dict(LAYOUT=p.layout, T0=p.t0, T1=p.t1, **_options(num_warps))


def _options(num_warps: int = NUM_WARPS) -> dict:
    # A fused multiply-add would round b * alpha differently from xhat.
    return dict(num_warps=num_warps, enable_fp_fusion=False)


def _bins_options(method: int, lp: int) -> dict:
    if method == WORDS:
        return dict(BR=BINS_WORDS_TILE // lp, **_options(BINS_WORDS_NUM_WARPS))
    return dict(BR=BINS_TILE // (4 * lp), **_options(BINS_NUM_WARPS))


def lsq_fwd(x, alpha, qn, qp, binary, channel_axis, relu, clip):
    xhat = torch.empty_like(x)
    if x.numel():
        # No sums, hence no reason to bound the programs: one tile each.
        p = _plan_of(x, alpha, channel_axis, least=1 << 24)
        with _on_device_of(x):
            _kernels().lsq_fwd[(p.blocks * p.splits,)](
                x, alpha, xhat, p.outer, p.channels, p.inner, p.splits, clip,
                QN=qn, QP=qp, BINARY=binary, RELU=relu, **_tile_options(p),
            )  # fmt: skip
    return xhat


def lsq_bwd(grad_xhat, x, alpha, qn, qp, binary, channel_axis, relu, clip, grad_scale):
    return _bwd(grad_xhat, None, x, alpha, None, qn, qp, binary, channel_axis, relu, clip, grad_scale)


def bin_loss_fwd(x, alpha, qn, qp, binary, channel_axis, relu, clip, backprop_to_alpha):
    return _bin_fwd(None, x, alpha, qn, qp, binary, channel_axis, relu, clip, backprop_to_alpha)


def bin_loss_bwd(grad_loss, x, alpha, bins, qn, qp, binary, channel_axis, relu, clip):
    return _bwd(None, grad_loss, x, alpha, bins, qn, qp, binary, channel_axis, relu, clip, 0.0)[0]


def lsq_bin_fwd(x, alpha, qn, qp, binary, channel_axis, relu, clip, backprop_to_alpha):
    xhat = torch.empty_like(x)
    return xhat, *_bin_fwd(xhat, x, alpha, qn, qp, binary, channel_axis, relu, clip, backprop_to_alpha)


def lsq_bin_bwd(grad_xhat, grad_loss, x, alpha, bins, qn, qp, binary, channel_axis, relu, clip, grad_scale):
    return _bwd(grad_xhat, grad_loss, x, alpha, bins, qn, qp, binary, channel_axis, relu, clip, grad_scale)


def _bin_method(levels: int) -> int:
    if levels > CELL_LEVELS:
        return WORDS
    return MASKED if levels <= MASKED_LEVELS or _kernels().interpreted else CELLS


def _num_warps(method: int | None) -> int:
    """The warps of a program of a method of the forward with bins; None: of any other kernel."""
    return WORDS_NUM_WARPS if method == WORDS else NUM_WARPS


def _columns(channels: int) -> int:
    """Channels that one program of a second stage adds up."""
    return 1 if channels == 1 else FINAL_COLUMNS


def _bin_fwd(xhat, x, alpha, qn, qp, binary, channel_axis, relu, clip, backprop_to_alpha):
    """loss, bins, dloss_dalpha; writes xhat unless that is None."""
    levels = qp - qn + 1
    if x.numel() == 0:
        return alpha.new_zeros(()), alpha.new_zeros(3 * levels + 2, dtype=torch.float64), (
            torch.zeros_like(alpha) if backprop_to_alpha else alpha.new_empty(0)
        )  # fmt: skip
    method = _bin_method(levels)
    num_warps = _num_warps(method)
    p = _plan_of(x, alpha, channel_axis, method)
    lp = max(_power_of_two(levels), 2)
    kernels = _kernels()
    loss = alpha.new_empty(())
    bins = alpha.new_empty(3 * levels + 2, dtype=torch.float64)
    dloss_dalpha = alpha.new_empty(alpha.shape if backprop_to_alpha else (0,))
    partials = alpha.new_empty(p.programs, 8 if method == WORDS else 4 * lp)
    words = alpha.new_empty((p.programs, 3, levels), dtype=torch.int64) if method == WORDS else None
    if words is not None and kernels.interpreted:
        words.zero_()
    s_words = s_ends = None
    if backprop_to_alpha and p.channels > 1:
        s_words = alpha.new_zeros((levels, p.channels), dtype=torch.int64)
        s_ends = alpha.new_empty(p.splits, 2, p.channels)
    bound = dict(maxnreg=HALF_REGISTERS[method]) if x.element_size() == 2 and p.channels == 1 else {}
    one_step = dloss_dalpha if backprop_to_alpha and p.channels == 1 else None
    with _on_device_of(x):
        kernels.lsq_bin_fwd[(p.programs,)](
            x, alpha, xhat, partials, words, s_words, s_ends, p.outer, p.channels, p.inner, p.splits,
            p.blocks * p.splits, clip, QN=qn, QP=qp, BINARY=binary, RELU=relu, VEC=p.vec, LP=lp,
            METHOD=method, THREADS=32 * num_warps, **_tile_options(p, num_warps), **bound,
        )  # fmt: skip
        kernels.bins[(1,)](
            partials, words, alpha, loss, bins, one_step, p.programs, p.channels,
            QN=qn, LEVELS=levels, LP=lp, **_bins_options(method, lp),
        )  # fmt: skip
        if s_words is not None:
            bc = FINAL_COLUMNS
            kernels.dloss_dalpha[(-(-p.channels // bc),)](
                bins, alpha, s_words, s_ends, dloss_dalpha, p.channels, p.splits, QN=qn, LEVELS=levels,
                BR=FINAL_TILE // bc, BC=bc, **_options(),
            )  # fmt: skip
    return loss, bins, dloss_dalpha


def _bwd(grad_xhat, grad_loss, x, alpha, bins, qn, qp, binary, channel_axis, relu, clip, grad_scale):
    """dx and dalpha (None without grad_xhat)."""
    dx = torch.empty_like(x)
    if x.numel() == 0:
        return dx, torch.zeros_like(alpha)
    if grad_xhat is not None:
        grad_xhat = laid_out_like(grad_xhat, x)
    p = _plan_of(x, alpha, channel_axis)
    levels = qp - qn + 1
    lp = _power_of_two(levels)
    select = levels <= SELECT_LEVELS
    programs = p.blocks * p.splits
    table = None if select or grad_loss is None else alpha.new_empty(programs, lp)
    partials = None if grad_xhat is None else alpha.new_empty(p.splits, p.channels)
    dalpha = None if grad_xhat is None else torch.empty_like(alpha)
    kernels = _kernels()
    with _on_device_of(x):
        kernels.lsq_bin_bwd[(programs,)](
            grad_xhat, grad_loss, x, alpha, bins, table, dx, partials, p.outer, p.channels, p.inner, p.splits, clip,
            QN=qn, QP=qp, BINARY=binary, RELU=relu, SELECT=select, LP=lp, **_tile_options(p),
        )  # fmt: skip
        if dalpha is not None:
            if kernels.interpreted:  # it would take a float as it is, where a compiled kernel takes a float32
                grad_scale = torch.tensor(grad_scale, dtype=torch.float32).item()
            bc = _columns(p.channels)
            kernels.sum_rows[(-(-p.channels // bc),)](
                partials, dalpha, p.splits, p.channels, grad_scale, BR=FINAL_TILE // bc, BC=bc, **_options(),
            )  # fmt: skip
    return dx, dalpha
