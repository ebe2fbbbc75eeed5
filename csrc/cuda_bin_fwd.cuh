// bin_fwd: codes, xhat and the bin sums in one pass over x; then the sums of the blocks, the loss and dL_BR/dalpha.
#pragma once
#include "cuda_bins.cuh"

namespace qbr {
namespace cuda {

// Where the results go; dloss_dalpha only with one step per tensor, else null.
struct BinResults {
  float* loss;
  double* bins;
  float* dloss_dalpha;
};

// rows [count][3 * L + 2], each a block's sums, become bins, the loss and dloss_dalpha. By one block.
__device__ __forceinline__ void finish_bins(const double* rows, int count, const BinResults& results,
                                            const Range& range, double* shared) {
  const int levels = range.levels, columns = 3 * levels + 2, threads = blockDim.x;
  const int width = columns <= threads / 4 ? threads / 4 : threads, groups = threads / width;
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
      results.bins[column] = sum;
    }
    __syncthreads();
  }
  double loss = 0, slope = 0;
  if (threadIdx.x < levels) {
    const int k = threadIdx.x;
    const double n = results.bins[k], occupied = n < 1 ? 1. : n;
    loss = n > 0 ? results.bins[2 * levels + k] / occupied : 0.;
    slope = (double(range.qn) + k) / occupied * results.bins[levels + k];
  }
  loss = block_sum(loss, shared);
  slope = block_sum(slope, shared);
  if (threadIdx.x == 0) {
    *results.loss = float(loss);
    if (results.dloss_dalpha) *results.dloss_dalpha = float(-2. * slope);
  }
}

// rows [grid][3 * L + 2]. A grid of one block finishes by itself.
template <class T, Method M, bool Channels>
__global__ void __launch_bounds__(kThreads, blocks_of(M))
bin_fwd_kernel(const T* __restrict__ x, const float* __restrict__ alpha, T* __restrict__ xhat, double* rows,
               float* loss, double* sums, float* dloss_dalpha, Walk w, Range range) {
  extern __shared__ __align__(16) char memory[];
  __shared__ double reduce[kThreads];
  const int levels = range.levels;
  std::conditional_t<M == Method::atomics, Atomics, Lanes> bins(memory, range);
  Distances distances;
  Step step = step_of(Channels ? 0.f : alpha[0], range);
  if (!Channels) bins.begin(step, false);
  int turn = 0;
  for (int64_t tile = blockIdx.x; tile < w.tiles; tile += gridDim.x) {
    const Share share = share_of<Channels>(w, tile);
    if (Channels) {
      step = step_of(share.count ? alpha[share.channel] : 0.f, range);
      bins.begin(step, true);
    }
    const float near = __fmul_rn(0.01f, step.alpha);
    each<false, true>(share, step.quick, x, x, xhat, [&](auto quick, float value, float) {
      const Quantized e = quantize<quick.value, M == Method::binary>(value, step, range);
      bins.add(e.b, e.d);
      distances.add(e.d, near);
      return e.level;
    });
    distances.end_tile();
    bins.end_tile(++turn % kFold == 0);
  }
  double* row = rows + int64_t(blockIdx.x) * (3 * levels + 2);
  bins.finish(row, reduce);
  distances.finish(row, levels, reduce);
  if (gridDim.x == 1) {
    __syncthreads();
    finish_bins(row, 1, {loss, sums, dloss_dalpha}, range, reduce);
  }
}

// The last stage, one block.
__global__ void __launch_bounds__(1024)
bin_finish_kernel(const double* rows, int count, float* loss, double* sums, float* dloss_dalpha, Range range) {
  __shared__ double shared[1024];
  finish_bins(rows, count, {loss, sums, dloss_dalpha}, range, shared);
}

// Many wide rows become kFoldGroups: block (i, j) adds every kFoldGroups-th row from j on.
__global__ void __launch_bounds__(kThreads)
bin_fold_kernel(const double* __restrict__ rows, int count, int columns, double* __restrict__ folded) {
  const int column = blockIdx.x * kThreads + threadIdx.x;
  if (column >= columns) return;
  double sum = 0;
#pragma unroll 8
  for (int i = blockIdx.y; i < count; i += kFoldGroups) sum += rows[int64_t(i) * columns + column];
  folded[int64_t(blockIdx.y) * columns + column] = sum;
}

}  // namespace cuda
}  // namespace qbr
