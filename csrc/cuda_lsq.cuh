// The elementwise kernels: lsq_fwd, and the backwards lsq_bwd and bin_bwd with their sums over the steps.
#pragma once
#include "cuda_walk.cuh"

namespace qbr {
namespace cuda {

template <class T, int N>
__global__ void __launch_bounds__(kThreads, kBlocks) lsq_fwd_kernel(const Jobs<N> jobs) {
  const auto [job, block] = place_of(jobs);
  const T* x = static_cast<const T*>(job.x);
  const Walk w = job.walk;
  const Range range = job.range;
  for (int64_t tile = block; tile < w.tiles; tile += w.blocks) {
    const Share share = share_of(w, tile);
    if (share.count == 0) continue;
    const Step step = step_of(__ldg(job.alpha + share.channel), range);
    each<false, false>(share, step.quick, x, x, static_cast<T*>(job.out), [&](auto quick, float value, float) {
      return quantize<quick.value>(value, step, range).level;
    });
  }
}

// What a backward computes: dx and dalpha of LSQ, dx of BR, or both; or only the sums that give dL_BR/dalpha_c.
enum class Grad { lsq = 0, bin = 1, both = 2, bin_alpha = 3 };

// The entry of each code: 2 * grad_loss / n_k for dx, -2 * k / n_k for dalpha.
template <Grad G>
__device__ __forceinline__ void fill_table(float* table, const float* grad_loss, const double* bins, const Range& r) {
  for (int k = threadIdx.x; k < r.levels; k += kThreads) {
    const double n = bins[k] < 1 ? 1. : bins[k];
    table[k] = float(G == Grad::bin_alpha ? -2. * (double(r.qn) + k) / n : 2. * double(*grad_loss) / n);
  }
  __syncthreads();
}

// parts: per tensor [blocks] double; per channel [channel_parts] float, of units or of thread columns.
// A block alone writes dalpha itself.
template <class T, Grad G, int N>
__global__ void __launch_bounds__(kThreads, kBlocksWide) bwd_kernel(const Jobs<N> jobs) {
  constexpr bool with_lsq = G == Grad::lsq || G == Grad::both, with_sum = G != Grad::bin;
  __shared__ double reduce[kWarps];
  __shared__ float table[G == Grad::lsq ? 1 : 256];
  const auto [job, block] = place_of(jobs);
  const T *x = static_cast<const T*>(job.x), *g = static_cast<const T*>(job.g);
  const Walk w = job.walk;
  const Range range = job.range;
  const bool channels = w.cut != Cut::flat;
  if (G != Grad::lsq) fill_table<G>(table, job.grad_loss, job.bins, range);
  double total = 0;
  for (int64_t tile = block; tile < w.tiles; tile += w.blocks) {
    const Share share = share_of(w, tile);
    const Step step = step_of(__ldg(job.alpha + share.channel), range);
    float sum = 0.f;
    each<with_lsq, G == Grad::bin_alpha>(share, step.quick, x, g, static_cast<T*>(job.out),
                                         [&](auto quick, float value, float grad) {
      const Quantized e = quantize<quick.value>(value, step, range);
      float dy = 0.f;
      if (with_lsq) {
        // c differs from v outside of the range and for a NaN; c * 0 passes the NaN on.
        const bool inside = e.c == e.v;
        dy = inside ? grad : __fmaf_rn(e.c, 0.f, __fmul_rn(grad, 0.f));
        sum = __fmaf_rn(grad, __fsub_rn(e.b, inside ? e.v : 0.f), sum);
      }
      if (G != Grad::lsq) {
        const float entry = table[slot_of(e.b, range)];
        if (G == Grad::bin_alpha) sum = __fmaf_rn(entry, e.d, sum);
        else dy = with_lsq ? __fadd_rn(dy, __fmul_rn(entry, e.d)) : __fmul_rn(entry, e.d);
      }
      return relu_masks(value, range) ? 0.f : dy;
    });
    if (!with_sum) continue;
    if (!channels) total += sum;
    else if (w.cut == Cut::columns) static_cast<float*>(job.parts)[tile * kThreads + threadIdx.x] = sum;
    else {
      sum = warp_sum(sum);
      if (threadIdx.x % 32 == 0 && share.unit >= 0) static_cast<float*>(job.parts)[share.unit] = sum;
    }
  }
  if (with_sum && !channels) {
    total = block_sum(total, reduce);
    if (threadIdx.x != 0) return;
    if (w.blocks == 1) job.dalpha[0] = float(total * double(job.grad_scale));
    else static_cast<double*>(job.parts)[block] = total;
  }
}

// The second stage of one step per tensor, one block a job: dalpha = grad_scale * sum over the blocks, in their order.
template <int N> __global__ void __launch_bounds__(kThreads) lsq_dalpha_kernel(const Jobs<N> jobs) {
  __shared__ double reduce[kWarps];
  const Job& job = place_of(jobs).job;
  const double* parts = static_cast<const double*>(job.parts);
  double sum = 0;
  for (uint32_t i = threadIdx.x; i < job.walk.blocks; i += kThreads) sum += parts[i];
  sum = block_sum(sum, reduce);
  if (threadIdx.x == 0) job.dalpha[0] = float(sum * double(job.grad_scale));
}

// The second stage of one step per channel: a warp adds its channel's parts in a fixed order.
template <int N> __global__ void __launch_bounds__(kThreads) channel_dalpha_kernel(const Jobs<N> jobs) {
  const auto [job, block] = place_of(jobs);
  const float* parts = static_cast<const float*>(job.parts);
  const Walk w = job.walk;
  const int64_t channel = int64_t(block) * kWarps + threadIdx.x / 32;
  if (channel >= w.channels) return;
  double sum = 0;
  if (w.tiles == 0) {
    // No elements, no parts.
  } else if (w.cut == Cut::rows) {
    for (int64_t i = threadIdx.x % 32; i < w.outer * w.segments; i += 32) {
      const int64_t above = divide(i, w.segments);
      sum += parts[(above * w.channels + channel) * w.segments + (i - above * w.segments)];
    }
  } else {
    const int64_t columns = w.inner * w.abreast;
    for (int64_t i = threadIdx.x % 32; i < columns * w.strips; i += 32) {
      const int64_t strip = divide(i, columns), rest = i - strip * columns, beside = divide(rest, w.inner);
      const int64_t column = channel * w.inner + (rest - beside * w.inner);
      const int64_t tile = column / kThreads * w.strips + strip;
      sum += parts[tile * kThreads + column % kThreads + beside * w.width];
    }
  }
  sum = warp_sum(sum);
  if (threadIdx.x % 32 == 0) job.dalpha[channel] = float(sum * double(job.grad_scale));
}

}  // namespace cuda
}  // namespace qbr
