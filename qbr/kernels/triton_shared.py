"""Bin sums in shared memory, for the Triton kernels: Triton has no shared memory to index, so these are inline PTX.

A kernel asks for its block's memory once, by ``_memory``, and passes the address on. Two kinds of table lie there:
    cells  [levels + 1, 3, threads] float32: S, Q and n of each bin, every thread alone in its column: no atomics
    words  [3, levels] int64: (count, S) | Q | fine Q of each bin in fixed point; integers add up in any order
Cells have one slot more than there are levels, for positions that belong to no bin. Sums of registers take the form of
cells before they are added up across threads. Triton's interpreter has no inline PTX: there, words are added to in
global memory.
"""

import triton
import triton.language as tl

from qbr.kernels.triton_kernels import INTERPRETED

# Add d, d * d and 1 to the calling thread's cells of a slot. Operands: a dummy; address of the table, slot, d, bytes
# from slot to slot, from S to Q, from S to n.
_ADD_TO_CELLS = tl.constexpr("""{
    .reg .u32 a;
    .reg .f32 s, q, n;
    mov.u32 a, %tid.x;
    shl.b32 a, a, 2;
    mad.lo.u32 a, $2, $4, a;
    add.u32 a, a, $1;
    add.u32 $0, a, $5;
    ld.shared.f32 s, [a];
    ld.shared.f32 q, [$0];
    add.u32 $0, a, $6;
    ld.shared.f32 n, [$0];
    add.f32 s, s, $3;
    fma.rn.f32 q, $3, $3, q;
    add.f32 n, n, 0f3F800000;
    st.shared.f32 [$0], n;
    add.u32 $0, a, $5;
    st.shared.f32 [$0], q;
    st.shared.f32 [a], s;
}""")
# Add an int64 to a word; 64-bit atomics of shared memory are loops, two of 32 bits and the carry between them are not.
# Neither is done for 0: the low half is 0 at the outermost levels (every zero behind a ReLU), a square's high half near
# any level.
_ADD_TO_WORD = tl.constexpr("""{
    .reg .pred p;
    .reg .u32 low, high, old;
    mov.b64 {low, high}, $2;
    setp.ne.u32 p, low, 0;
    mov.u32 old, 0;
    @p atom.shared.add.u32 old, [$1], low;
    add.u32 low, low, old;
    setp.lt.u32 p, low, old;
    @p add.u32 high, high, 1;
    setp.ne.u32 p, high, 0;
    @p red.shared.add.u32 [$1+4], high;
    mov.u32 $0, low;
}""")


@triton.jit
def _memory(BYTES: tl.constexpr, ALIGN: tl.constexpr):
    """The address, in shared space, of this block's memory: once in a kernel."""
    return tl.inline_asm_elementwise(
        f"{{ .shared .align {ALIGN} .b8 qbr_memory[{(BYTES + 15) // 16 * 16}]; "
        f"mov.u32 $0, qbr_memory; add.u32 $0, $0, $1; }}",
        "=r,r", [0], tl.int32, False, 1,
    )  # fmt: skip


@triton.jit
def _clear(address, BYTES: tl.constexpr, THREADS: tl.constexpr):
    """Zero the memory, 16 bytes at a time, and wait for every thread to have done so."""
    o_t = tl.arange(0, THREADS)
    last: tl.constexpr = (BYTES + 15) // 16 - 1
    for i in tl.static_range(last // THREADS + 1):
        o_b = 16 * tl.minimum(i * THREADS + o_t, last)
        tl.inline_asm_elementwise(
            "st.shared.v4.u32 [$1], {0, 0, 0, 0}; mov.u32 $0, 0;", "=r,r", [address + o_b], tl.int32, False, 1
        )  # fmt: skip
    tl.debug_barrier()


@triton.jit
def _add_to_cells(address, b_slot, b_d, THREADS: tl.constexpr):
    tl.inline_asm_elementwise(
        _ADD_TO_CELLS, "=&r,r,r,f,n,n,n",
        [address, b_slot, b_d, 12 * THREADS, 4 * THREADS, 8 * THREADS], tl.int32, False, 1,
    )  # fmt: skip


@triton.jit
def _add_to_words(address, o_w, b_word):
    if INTERPRETED:
        tl.atomic_add(address + o_w, b_word)
    else:
        tl.inline_asm_elementwise(_ADD_TO_WORD, "=&r,r,l", [address + 8 * o_w, b_word], tl.int32, False, 1)


@triton.jit
def _read_float(b_address):
    return tl.inline_asm_elementwise("ld.shared.f32 $0, [$1];", "=f,r", [b_address], tl.float32, False, 1)


@triton.jit
def _write_float(b_address, b_x):
    tl.inline_asm_elementwise(
        "st.shared.f32 [$1], $2; mov.u32 $0, 0;", "=r,r,f", [b_address, b_x], tl.int32, False, 1
    )  # fmt: skip


@triton.jit
def _read_word(b_address):
    return tl.inline_asm_elementwise("ld.shared.u64 $0, [$1];", "=l,r", [b_address], tl.int64, False, 1)
