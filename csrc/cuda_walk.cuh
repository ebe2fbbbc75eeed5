// What all CUDA kernels share: element types, the elements of a thread in a tile (see cuda_plan.h), and the scalar
// arithmetic in intrinsics, so that no compiler flag changes a result.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <type_traits>

#include "cuda_plan.h"

namespace qbr {
namespace cuda {

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ __forceinline__ float to_float(__half x) { return __half2float(x); }
template <class T> __device__ __forceinline__ T from_float(float x);
template <> __device__ __forceinline__ float from_float(float x) { return x; }
template <> __device__ __forceinline__ __nv_bfloat16 from_float(float x) { return __float2bfloat16_rn(x); }
template <> __device__ __forceinline__ __half from_float(float x) { return __float2half_rn(x); }

// 16 bytes of elements.
template <class T> struct Pack {
  static constexpr int size = 16 / sizeof(T);
  uint4 bits;
  __device__ __forceinline__ float get(int i) const {
    const uint32_t word = (&bits.x)[i * sizeof(T) / 4];
    if constexpr (sizeof(T) == 4) return __uint_as_float(word);
    if constexpr (std::is_same_v<T, __nv_bfloat16>) return __uint_as_float(i & 1 ? word & 0xffff0000u : word << 16);
    if constexpr (std::is_same_v<T, __half>) return __half2float(__ushort_as_half(i & 1 ? word >> 16 : word & 0xffffu));
  }
  // Elements i and i + 1 (i even), or i alone for float.
  __device__ __forceinline__ void set(int i, float a, float b) {
    uint32_t& word = (&bits.x)[i * sizeof(T) / 4];
    if constexpr (sizeof(T) == 4) {
      word = __float_as_uint(a);
      (&bits.x)[i + 1] = __float_as_uint(b);
    } else if constexpr (std::is_same_v<T, __nv_bfloat16>) {
      const __nv_bfloat162 pair = __floats2bfloat162_rn(a, b);
      word = reinterpret_cast<const uint32_t&>(pair);
    } else {
      const __half2 pair = __floats2half2_rn(a, b);
      word = reinterpret_cast<const uint32_t&>(pair);
    }
  }
};

// min and max that keep a NaN.
__device__ __forceinline__ float max_nan(float a, float b) {
  float r;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(r) : "f"(a), "f"(b));
  return r;
}
__device__ __forceinline__ float min_nan(float a, float b) {
  float r;
  asm("min.NaN.f32 %0, %1, %2;" : "=f"(r) : "f"(a), "f"(b));
  return r;
}

// Where the ReLU's gradient is 0. A comparison with NaN is false: without a ReLU that is nowhere.
__device__ __forceinline__ bool relu_masks(float x, const Range& r) { return (x <= r.masked) | (x > r.high); }

// A step and its reciprocal in two parts, for the short division.
struct Step {
  float alpha, inverse, inverse_rest, limit;
  bool quick;  // the short division is exact: alpha is far from under- and overflow, codes are far below the limit, and
               // none hangs on whether a quotient underflows to zero
};

__device__ __forceinline__ Step step_of(float alpha, const Range& r) {
  Step s;
  s.alpha = alpha;
  s.inverse = __frcp_rn(alpha);
  s.inverse_rest = __fmul_rn(__fmaf_rn(-alpha, s.inverse, 1.f), s.inverse);
  s.limit = __fmul_rn(alpha, 0x1p20f);
  s.quick = alpha >= 0x1p-60f && alpha <= r.quick;
  return s;
}

// y / alpha, correctly rounded. The short way takes 6 operations for 10 and no branch: with the reciprocal in two parts
// `near` is within one unit in the last place, so the remainder is exact, and one correction by a correctly rounded
// reciprocal gives the rounded quotient (Markstein 1990). The limit, far outside of every
// range, keeps infinities out of the remainder.
template <bool Quick> __device__ __forceinline__ float quotient(float y, const Step& s) {
  if (!Quick) return __fdiv_rn(y, s.alpha);
  const float a = min_nan(max_nan(y, -s.limit), s.limit);
  const float near = __fmaf_rn(a, s.inverse, __fmul_rn(a, s.inverse_rest));
  return __fmaf_rn(__fmaf_rn(-near, s.alpha, a), s.inverse, near);
}

// One element. v, c and b are NaN where x or alpha makes them so.
struct Quantized {
  float v;      // y / alpha
  float c;      // v clamped to [qn, qp]
  float b;      // the code
  float level;  // b * alpha, rounded to float32
  float d;      // y - level
};

// Without Binary the codes are known not to be binary.
template <bool Quick, bool Binary = true>
__device__ __forceinline__ Quantized quantize(float x, const Step& s, const Range& r) {
  Quantized e;
  const float y = min_nan(max_nan(x, r.low), r.high);
  e.v = quotient<Quick>(y, s);
  e.c = min_nan(max_nan(e.v, r.qn), r.qp);
  e.b = __fsub_rn(__fadd_rn(e.c, 12582912.f), 12582912.f);
  if (Binary) {
    const float below = min_nan(e.b, r.below);  // outside of the choice, which would branch around it
    e.b = e.v >= r.split ? 1.f : below;
  }
  e.level = __fmul_rn(e.b, s.alpha);
  e.d = __fsub_rn(y, e.level);
  return e;
}

// The slot of a code in a table; 0 for a NaN, which the conversion turns into 0. Never outside [0, qp - qn].
__device__ __forceinline__ int slot_of(float b, const Range& r) { return __float2int_rn(__fsub_rn(b, r.qn)); }

// A block's job, and which of the job's blocks it is.
struct Place {
  const Job& job;
  uint32_t block;
};

// Even for one job the index is no constant (it is 0, the grid having one row): what is known to lie at a fixed place
// in constant memory is loaded anew for each element, 3 % more instructions, though registers are left for it.
template <int N> __device__ __forceinline__ Place place_of(const Jobs<N>& jobs) {
  uint32_t i = N == 1 ? blockIdx.y : 0;
#pragma unroll
  for (int k = 1; k < N; ++k) i += blockIdx.x >= jobs.first_block[k];
  return {jobs.job[i], blockIdx.x - jobs.first_block[i]};
}

// 64-bit division takes five times as long, and few tensors need it.
__device__ __forceinline__ int64_t divide(int64_t a, int64_t b) {
  return ((a | b) >> 32) == 0 ? int64_t(uint32_t(a) / uint32_t(b)) : a / b;
}

// The elements of one thread in one tile: at, at + stride, ..., `count` of them; or, where `full`, kDepth elements in
// packs, a warp's packs lying side by side from `begin`.
struct Share {
  int64_t begin, at, stride;
  int64_t channel;
  int64_t unit;  // the warp's; -1 past the end
  int count;
  bool full;
};

__device__ __forceinline__ Share share_of(const Walk& w, int64_t tile) {
  Share s;
  const int lane = threadIdx.x % 32;
  s.channel = 0, s.full = false, s.count = 0, s.stride = 32, s.unit = -1, s.begin = s.at = 0;
  if (w.cut == Cut::columns) {
    const int64_t across = divide(tile, w.strips), strip = tile - across * w.strips;
    int64_t column = across * kThreads + threadIdx.x;
    int64_t row = strip * w.depth * w.abreast;
    bool active = column < w.width;
    if (w.abreast > 1) {
      const int width = int(w.width), beside = int(threadIdx.x) / width;
      column = int(threadIdx.x) - beside * width;
      row += beside;
      active = beside < w.abreast;
    }
    if (active && row < w.outer) {
      const int64_t left = divide(w.outer - row + w.abreast - 1, w.abreast);
      s.count = int(left < w.depth ? left : w.depth);
      s.channel = divide(column, w.inner);
      s.at = row * w.width + column;
      s.stride = w.abreast * w.width;
    }
    return s;
  }
  const int64_t unit = tile * kWarps + threadIdx.x / 32;
  if (unit >= w.units) return s;
  s.unit = unit;
  int64_t first = 0, end = w.inner, begin = w.origin + unit * kUnit;
  if (w.cut == Cut::rows) {
    const int64_t row = divide(unit, w.segments);
    s.channel = row - divide(row, w.channels) * w.channels;
    first = row * w.inner, end = first + w.inner;
    begin = first + (unit - row * w.segments) * kUnit;
  }
  s.full = w.vector && begin >= first && begin + kUnit <= end;
  s.begin = begin > first ? begin : first;
  end = begin + kUnit < end ? begin + kUnit : end;
  s.at = s.begin + lane;
  s.count = s.at < end ? int(end - s.at + 31) / 32 : 0;
  return s;
}

// out[i] = f(quick, x[i], g[i]) over a thread's share; g is read where WithG; only where MayBeNull can out be
// null. Packs only come with the short division: what cannot have it goes one by one, and the code stays small.
template <bool WithG, bool MayBeNull, class T, class F>
__device__ __forceinline__ void each(const Share& s, bool quick, const T* __restrict__ x, const T* __restrict__ g,
                                     T* __restrict__ out, F f) {
  if (s.full && quick) {
    constexpr int packs = kDepth / Pack<T>::size;
    const int64_t at = s.begin + (threadIdx.x % 32) * Pack<T>::size;
    Pack<T> px[packs], pg[packs];
#pragma unroll
    for (int k = 0; k < packs; ++k) {
      px[k].bits = __ldg(reinterpret_cast<const uint4*>(x + at + k * 32 * Pack<T>::size));
      if (WithG) pg[k].bits = __ldg(reinterpret_cast<const uint4*>(g + at + k * 32 * Pack<T>::size));
    }
#pragma unroll
    for (int k = 0; k < packs; ++k) {
#pragma unroll
      for (int i = 0; i < Pack<T>::size; i += 2) {
        const float a = f(std::true_type(), px[k].get(i), WithG ? pg[k].get(i) : 0.f);
        const float b = f(std::true_type(), px[k].get(i + 1), WithG ? pg[k].get(i + 1) : 0.f);
        px[k].set(i, a, b);
      }
      if (!MayBeNull) *reinterpret_cast<uint4*>(out + at + k * 32 * Pack<T>::size) = px[k].bits;
    }
    if constexpr (MayBeNull) {
      if (!out) return;
#pragma unroll
      for (int k = 0; k < packs; ++k) *reinterpret_cast<uint4*>(out + at + k * 32 * Pack<T>::size) = px[k].bits;
    }
    return;
  }
  constexpr int batch = 4;  // loads in flight
  for (int k = 0; k < s.count; k += batch) {
    const int64_t at = s.at + k * s.stride;
    T vx[batch], vg[batch];
#pragma unroll
    for (int j = 0; j < batch; ++j) {
      if (k + j >= s.count) break;
      vx[j] = __ldg(x + at + j * s.stride);
      if (WithG) vg[j] = __ldg(g + at + j * s.stride);
    }
#pragma unroll
    for (int j = 0; j < batch; ++j) {
      if (k + j >= s.count) break;
      const float value = f(std::false_type(), to_float(vx[j]), WithG ? to_float(vg[j]) : 0.f);
      if (!MayBeNull || out) out[at + j * s.stride] = from_float<T>(value);
    }
  }
}

// The sum of `value` over the warp, the same bits in every lane.
template <class V> __device__ __forceinline__ V warp_sum(V value) {
#pragma unroll
  for (int i = 16; i > 0; i /= 2) value += __shfl_xor_sync(0xffffffffu, value, i);
  return value;
}

// The sum over the block, in thread 0; `shared` holds a double per warp. Barriers before its use and after.
__device__ __forceinline__ double block_sum(double value, double* shared) {
  value = warp_sum(value);
  __syncthreads();
  if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = value;
  __syncthreads();
  double sum = 0;
  if (threadIdx.x == 0) {
    for (int i = 0; i < int(blockDim.x / 32); ++i) sum += shared[i];
  }
  __syncthreads();
  return sum;
}

}  // namespace cuda
}  // namespace qbr
