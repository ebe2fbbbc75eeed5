// Sums over the bins, per block: n_k, S_k = sum d, Q_k = sum d^2, sum |d|, and how many |d| < 0.01f * alpha.
//
// Two ways, by the number of levels L. Each gives the same bits on every run:
//   Lanes    L <= 16   a table [L][256] in shared memory, every thread alone in its column
//   Atomics  L <= 256  integer atomics in shared memory on fixed-point distances: integers add in any order
// Lanes takes 33 machine instructions an element at any L; masked sums in registers took 38 at L = 4, and 3 to 4 more
// with each level. Float sums run over at most kFold tiles of a thread before they go to double.
#pragma once
#include "cuda_walk.cuh"

namespace qbr {
namespace cuda {

constexpr int kFold = 8;  // 128 elements of a thread: at worst 128 * 2^-24 relative, and counts are exact

// |d| and nearness, the same in all ways: float within a tile, double from tile to tile.
struct Distances {
  float tile = 0.f;
  double sum = 0;
  uint32_t near = 0;
  __device__ __forceinline__ void add(float d, float limit) {
    tile += fabsf(d);
    near += fabsf(d) < limit;
  }
  __device__ __forceinline__ void end_tile() {
    sum += tile;
    tile = 0.f;
  }
  __device__ __forceinline__ void finish(double* row, int levels, double* reduce) {
    const double distance = block_sum(sum, reduce), count = block_sum(double(near), reduce);
    if (threadIdx.x == 0) row[3 * levels] = distance, row[3 * levels + 1] = count;
  }
};

struct Lanes {
  static constexpr int kSlot = 3 * kThreads;  // from a slot's cells to the next's: S, Q and n, a word of each thread
  const Range& range;
  const int levels;
  float* cells;  // the thread's own of slot 0

  __device__ __forceinline__ Lanes(char* memory, const Range& r)
      : range(r), levels(r.levels), cells(reinterpret_cast<float*>(memory) + threadIdx.x) {
    double* mine = totals();
    for (int i = threadIdx.x % 32; i < 3 * levels; i += 32) mine[i] = 0;
    clear();
  }
  // The warp's n, S and Q [3 * levels]; the warps' are added in their order at the end.
  __device__ __forceinline__ double* totals() const {
    return reinterpret_cast<double*>(cells - threadIdx.x + levels * kSlot) + threadIdx.x / 32 * 3 * levels;
  }
  __device__ __forceinline__ void clear() {
#pragma unroll 4
    for (int k = 0; k < 3 * levels; ++k) cells[k * kThreads] = 0.f;
  }
  __device__ __forceinline__ void begin(const Step&, bool) {}
  __device__ __forceinline__ void add(float b, float d) {
    float* cell = cells + slot_of(b, range) * kSlot;
    cell[0] = __fadd_rn(cell[0], d);
    cell[kThreads] = __fmaf_rn(d, d, cell[kThreads]);
    cell[2 * kThreads] = __fadd_rn(cell[2 * kThreads], 1.f);
  }
  // Each lane adds up one slot over half the warp's columns, starting at a column, and so a bank, of its own.
  __device__ __forceinline__ void end_tile(bool fold) {
    if (!fold) return;
    const int lane = threadIdx.x % 32, slot = lane % 16;
    __syncwarp();
    float s = 0.f, q = 0.f, n = 0.f;
    if (slot < levels) {
      const float* first = cells - slot + slot * kSlot;
#pragma unroll 4
      for (int k = 0; k < 16; ++k) {
        const float* cell = first + (k + lane) % 16;
        s += cell[0], q += cell[kThreads], n += cell[2 * kThreads];
      }
    }
    __syncwarp();
    clear();
    s += __shfl_xor_sync(0xffffffffu, s, 16);
    q += __shfl_xor_sync(0xffffffffu, q, 16);
    n += __shfl_xor_sync(0xffffffffu, n, 16);
    double* mine = totals();
    if (lane < levels) mine[slot] += n, mine[levels + slot] += s, mine[2 * levels + slot] += q;
  }
  __device__ __forceinline__ void finish(double* row, double*) {
    end_tile(true);
    __syncthreads();
    const double* first = totals() - threadIdx.x / 32 * 3 * levels;
    for (int i = threadIdx.x; i < 3 * levels; i += kThreads) {
      double sum = 0;
      for (int warp = 0; warp < kWarps; ++warp) sum += first[warp * 3 * levels + i];
      row[i] = sum;
    }
  }
};

// Distances in fixed point, r = d * 2^-e for alpha < 2^(e+1): |r| < 1 within the range, but for rounding. Each of 8 tiers
// holds two powers of two of |r|, 16 bits or more of r and 15 of r^2, so that small distances keep their precision: below
// 2^18 and 2^19, of which a tile's 4096 fit in 32 bits. Thread k owns slot k: it moves each tile's integers to doubles.
// Distances that do not fit, beyond the ends of the range, go to floats of their own; a NaN only poisons its slot.
struct Atomics {
  static constexpr int kTiers = 8;
  const Range& range;
  const int levels;
  uint32_t* count;   // [levels]
  int* s;            // [kTiers][levels]
  uint32_t* q;       // [kTiers][levels]
  uint32_t* poison;  // [levels]: a NaN inside of the range, which only an infinite alpha can make
  int* peak;         // e of the block's largest finite step
  float scale = 0.f, unscale = 0.f;
  unsigned long long total_n = 0;
  double total_s = 0, total_q = 0;
  float end_s[2] = {}, end_q[2] = {};
  double total_end_s[2] = {}, total_end_q[2] = {};

  __device__ __forceinline__ Atomics(char* memory, const Range& r) : range(r), levels(r.levels) {
    const int l = levels;
    count = reinterpret_cast<uint32_t*>(memory);
    s = reinterpret_cast<int*>(count + l);
    q = reinterpret_cast<uint32_t*>(s + kTiers * l);
    poison = q + kTiers * l;
    peak = reinterpret_cast<int*>(poison + l);
    for (int i = threadIdx.x; i <= (2 * kTiers + 2) * l; i += kThreads) count[i] = 0;
    __syncthreads();
  }
  __device__ __forceinline__ void begin(const Step& step, bool varies) {
    int e = int(__float_as_uint(step.alpha) >> 23 & 255u);
    e = e == 255 ? 0 : e;
    if (varies) {
      e = __reduce_max_sync(0xffffffffu, e);
      if (threadIdx.x % 32 == 0) atomicMax(peak, e);
      __syncthreads();
      e = *peak;
    }
    // Within the normal numbers: at the largest steps |r| < 2 instead, which fits too.
    e = min(max(e, 1), 253);
    scale = __uint_as_float(uint32_t(254 - e) << 23);
    unscale = __uint_as_float(uint32_t(e) << 23);
  }
  __device__ __forceinline__ void add(float b, float d) {
    const int slot = slot_of(b, range);
    atomicAdd(&count[slot], 1u);
    const float r = __fmul_rn(d, scale);
    if (!(fabsf(r) < 2.f)) {
      if (slot == 0) end_s[0] += d, end_q[0] += d * d;
      else if (slot == levels - 1) end_s[1] += d, end_q[1] += d * d;
      else atomicOr(&poison[slot], 1u);
    } else if (r != 0.f) {
      const int tier = min(int(127u - (__float_as_uint(r) >> 23 & 255u)) >> 1, kTiers - 1);
      const float up = __uint_as_float(uint32_t(127 + 17 + 2 * tier) << 23);
      const float fixed = __fmul_rn(r, up), square = __fmul_rn(__fmul_rn(fixed, fixed), 0x1p-17f);
      const int at = tier * levels + slot;
      // Both lie within 2^19: adding 1.5 * 2^23 rounds them to integers in the low bits.
      atomicAdd(&s[at], int(__float_as_uint(__fadd_rn(fixed, 12582912.f)) - 0x4b400000u));
      atomicAdd(&q[at], __float_as_uint(__fadd_rn(square, 12582912.f)) - 0x4b400000u);
    }
  }
  __device__ __forceinline__ void end_tile(bool) {
    __syncthreads();
    if (threadIdx.x < levels) {
      const int k = threadIdx.x;
      total_n += count[k];
      count[k] = 0;
      double tile_s = 0, tile_q = 0;
#pragma unroll
      for (int tier = kTiers - 1; tier >= 0; --tier) {
        const int at = tier * levels + k;
        tile_s = tile_s * 0.25 + s[at], tile_q = tile_q * 0.0625 + q[at];
        s[at] = 0, q[at] = 0;
      }
      const double unit = unscale;
      total_s += tile_s * unit * 0x1p-17;
      total_q += tile_q * unit * unit * 0x1p-17;
    }
    if (threadIdx.x == 0) *peak = 0;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      total_end_s[i] += end_s[i], total_end_q[i] += end_q[i];
      end_s[i] = end_q[i] = 0.f;
    }
    __syncthreads();
  }
  __device__ __forceinline__ void finish(double* row, double* reduce) {
    const int k = threadIdx.x;
    if (k < levels && poison[k]) total_s = total_q = NAN;
    if (k < levels) row[k] = double(total_n), row[levels + k] = total_s, row[2 * levels + k] = total_q;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const double end_sum = block_sum(total_end_s[i], reduce), end_square = block_sum(total_end_q[i], reduce);
      const int slot = i * (levels - 1);
      if (k == 0) row[levels + slot] += end_sum, row[2 * levels + slot] += end_square;
    }
  }
};

}  // namespace cuda
}  // namespace qbr
