// bin_fwd: codes, xhat and the bin sums in one pass over x; then the sums of the blocks, the loss and dL_BR/dalpha.
#pragma once
#include "cuda_bins.cuh"

namespace qbr {
namespace cuda {

// rows [count][3 * L + 2], each a block's sums, become bins, the loss and dalpha if it is wanted. By one block.
__device__ __forceinline__ void finish_bins(const Job& job, int count, double* shared) {
  const double* rows = static_cast<const double*>(job.parts);
  const int levels = job.range.levels, columns = 3 * levels + 2, threads = blockDim.x;
  int width = 32;  // of as few threads as the columns need: the other groups read other rows at the same time
  while (width < columns && width < threads) width *= 2;
  const int groups = threads / width;
  const int group = threadIdx.x / width;
  for (int first = 0; first < columns; first += width) {
    const int column = first + threadIdx.x % width;
    double sum = 0;
    if (column < columns) {
#pragma unroll 8
      for (int i = group; i < count; i += groups) sum += rows[int64_t(i) * columns + column];
    }
    shared[threadIdx.x] = sum;
    __syncthreads();
    if (group == 0 && column < columns) {
      for (int i = 1; i < groups; ++i) sum += shared[i * width + threadIdx.x];
      job.bins[column] = sum;
    }
    __syncthreads();
  }
  double loss = 0, slope = 0;
  if (threadIdx.x < levels) {
    const int k = threadIdx.x;
    const double n = job.bins[k], occupied = n < 1 ? 1. : n;
    loss = n > 0 ? job.bins[2 * levels + k] / occupied : 0.;
    slope = (double(job.range.qn) + k) / occupied * job.bins[levels + k];
  }
  loss = block_sum(loss, shared);
  slope = block_sum(slope, shared);
  if (threadIdx.x == 0) {
    *job.loss = float(loss);
    if (job.dalpha) *job.dalpha = float(-2. * slope);
  }
}

// parts: rows [blocks][3 * L + 2]. A block alone finishes by itself.
template <class T, Method M, int N>
__global__ void __launch_bounds__(kThreads, blocks_of(M)) bin_fwd_kernel(const Jobs<N> jobs) {
  extern __shared__ __align__(16) char memory[];
  __shared__ double reduce[kThreads];
  const auto [job, block] = place_of(jobs);
  const T* x = static_cast<const T*>(job.x);
  const Walk w = job.walk;
  const Range range = job.range;
  const bool channels = w.cut != Cut::flat;
  std::conditional_t<M == Method::atomics, Atomics, Lanes> bins(memory, range);
  Distances distances;
  Step step = step_of(channels ? 0.f : __ldg(job.alpha), range);
  if (!channels) bins.begin(step, false);
  int turn = 0;
  for (int64_t tile = block; tile < w.tiles; tile += w.blocks) {
    const Share share = share_of(w, tile);
    if (channels) {
      step = step_of(share.count ? __ldg(job.alpha + share.channel) : 0.f, range);
      bins.begin(step, true);
    }
    const float near = __fmul_rn(0.01f, step.alpha);
    each<false, true>(share, step.quick, x, x, static_cast<T*>(job.out), [&](auto quick, float value, float) {
      const Quantized e = quantize<quick.value, M == Method::binary>(value, step, range);
      bins.add(e.b, e.d);
      distances.add(e.d, near);
      return e.level;
    });
    distances.end_tile();
    bins.end_tile(++turn % kFold == 0);
  }
  double* row = static_cast<double*>(job.parts) + int64_t(block) * (3 * range.levels + 2);
  bins.finish(row, reduce);
  distances.finish(row, range.levels, reduce);
  if (w.blocks == 1) {
    __syncthreads();
    finish_bins(job, 1, reduce);
  }
}

// The last stage, one block a job.
template <int N> __global__ void __launch_bounds__(1024) bin_finish_kernel(const Jobs<N> jobs) {
  __shared__ double shared[1024];
  const Job& job = place_of(jobs).job;
  finish_bins(job, job.walk.blocks, shared);
}

// Many wide rows become kFoldGroups, which lie behind them: a block adds every kFoldGroups-th row for some columns.
template <int N> __global__ void __launch_bounds__(kThreads) bin_fold_kernel(const Jobs<N> jobs) {
  const auto [job, block] = place_of(jobs);
  const int columns = 3 * job.range.levels + 2, count = job.walk.blocks;
  const int column = int(block) / kFoldGroups * kThreads + threadIdx.x, group = int(block) % kFoldGroups;
  if (column >= columns) return;
  double* rows = static_cast<double*>(job.parts);
  double sum = 0;
#pragma unroll 8
  for (int i = group; i < count; i += kFoldGroups) sum += rows[int64_t(i) * columns + column];
  rows[int64_t(count + group) * columns + column] = sum;
}

}  // namespace cuda
}  // namespace qbr
