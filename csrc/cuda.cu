// The CUDA backend: launches. Kernels are in cuda_lsq.cuh and cuda_bin_fwd.cuh, what they cut x into in cuda_plan.h.
#include <cuda_runtime.h>

#include <atomic>

#include "cuda_bin_fwd.cuh"
#include "cuda_lsq.cuh"

namespace qbr {
namespace cuda {
namespace {

constexpr int kOpenShared = 48 * 1024;  // more dynamic shared memory must be asked for

// Multiprocessors of the current device; the grid, and with it the order of sums, depends on no more of it.
int multiprocessors() {
  static std::atomic<int> known[64];
  int device = 0, count = 0;
  if (cudaGetDevice(&device) != cudaSuccess || device < 0 || device >= 64) return 132;
  count = known[device].load(std::memory_order_relaxed);
  if (count > 0) return count;
  if (cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device) != cudaSuccess || count < 1) count = 132;
  known[device].store(count, std::memory_order_relaxed);
  return count;
}

// f(element type) for a dtype known at run time.
template <class F> void with_type(DType t, F f) {
  switch (t) {
    case DType::f32: return f(float());
    case DType::bf16: return f(__nv_bfloat16());
    case DType::f16: return f(__half());
  }
}

uint64_t address(const void* p) { return reinterpret_cast<uint64_t>(p); }

// Part of the workspace, in order.
struct Scratch {
  char* at;
  template <class V> V* take(size_t count) {
    V* p = reinterpret_cast<V*>(at);
    at += align16(count * sizeof(V));
    return p;
  }
};

template <Grad G>
void launch_bwd(DType dtype, const void* g, const float* grad_loss, const void* x, const float* alpha,
                const double* bins, void* dx, float* dalpha, const Layout& layout, const Quant& quant, float grad_scale,
                void* workspace, cudaStream_t stream) {
  const bool sums = G != Grad::bin, channels = layout.channels != 1;
  const Walk w = walk_of(layout, element_size(dtype), address(x), address(g), address(dx), true);
  const int grid = grid_of(w, multiprocessors(), kBlocksWide);
  if (grid > 0) {
    with_type(dtype, [&](auto type) {
      using T = decltype(type);
      auto kernel = channels ? bwd_kernel<T, G, true> : bwd_kernel<T, G == Grad::bin_alpha ? Grad::lsq : G, false>;
      kernel<<<grid, kThreads, 0, stream>>>(static_cast<const T*>(g), grad_loss, static_cast<const T*>(x), alpha, bins,
                                            static_cast<T*>(dx), workspace, dalpha, grad_scale, w, Range(quant));
    });
  }
  if (!sums) return;
  if (!channels && grid != 1) {
    lsq_dalpha_kernel<<<1, kThreads, 0, stream>>>(static_cast<const double*>(workspace), grid, grad_scale, dalpha);
  } else if (channels && layout.channels > 0) {
    channel_dalpha_kernel<<<int(ceil_div(layout.channels, kWarps)), kThreads, 0, stream>>>(
        static_cast<const float*>(workspace), w, grad_scale, dalpha);
  }
}

template <class T, Method M>
void launch_bins(const void* x, const float* alpha, void* xhat, double* rows, const BinResults& results, const Walk& w,
                 const Quant& quant, int grid, cudaStream_t stream) {
  auto kernel = w.channels != 1 ? bin_fwd_kernel<T, M, true> : bin_fwd_kernel<T, M, false>;
  const size_t shared = bin_shared_bytes(quant);
  if (shared > kOpenShared) cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(shared));
  kernel<<<grid, kThreads, shared, stream>>>(static_cast<const T*>(x), alpha, static_cast<T*>(xhat), rows, results.loss,
                                             results.bins, results.dloss_dalpha, w, Range(quant));
}

}  // namespace

size_t workspace_bytes(Kernel kernel, Layout layout, Quant quant, bool alpha_gradient) {
  return workspace_bytes_of(kernel, layout, quant, alpha_gradient, multiprocessors());
}

int lsq_fwd(DType dtype, const void* x, const float* alpha, void* xhat, Layout layout, Quant quant, void* stream) {
  const Walk w = walk_of(layout, element_size(dtype), address(x), 0, address(xhat), true);
  const int grid = grid_of(w, multiprocessors(), kBlocks);
  if (grid == 0) return 0;
  with_type(dtype, [&](auto type) {
    using T = decltype(type);
    auto kernel = layout.channels != 1 ? lsq_fwd_kernel<T, true> : lsq_fwd_kernel<T, false>;
    kernel<<<grid, kThreads, 0, static_cast<cudaStream_t>(stream)>>>(static_cast<const T*>(x), alpha,
                                                                     static_cast<T*>(xhat), w, Range(quant));
  });
  return int(cudaGetLastError());
}

int lsq_bwd(DType dtype, const void* grad_xhat, const void* x, const float* alpha, void* dx, float* dalpha,
            Layout layout, Quant quant, float grad_scale, void* workspace, void* stream) {
  launch_bwd<Grad::lsq>(dtype, grad_xhat, nullptr, x, alpha, nullptr, dx, dalpha, layout, quant, grad_scale, workspace,
                        static_cast<cudaStream_t>(stream));
  return int(cudaGetLastError());
}

int bin_fwd(DType dtype, const void* x, const float* alpha, void* xhat, float* loss, double* bins, float* dloss_dalpha,
            Layout layout, Quant quant, void* workspace, void* stream_) {
  const cudaStream_t stream = static_cast<cudaStream_t>(stream_);
  const Walk w = walk_of(layout, element_size(dtype), address(x), 0, address(xhat), false);
  const int grid = grid_of(w, multiprocessors(), blocks_of(method_of(quant))), columns = bin_columns(quant);
  const bool per_channel = layout.channels != 1;
  const BinResults results{loss, bins, per_channel ? nullptr : dloss_dalpha};
  Scratch scratch{static_cast<char*>(workspace)};
  double* rows = scratch.take<double>(size_t(grid) * columns);
  if (grid > 0) {
    with_type(dtype, [&](auto type) {
      using T = decltype(type);
      auto launch = launch_bins<T, Method::lanes>;
      if (method_of(quant) == Method::binary) launch = launch_bins<T, Method::binary>;
      if (method_of(quant) == Method::atomics) launch = launch_bins<T, Method::atomics>;
      launch(x, alpha, xhat, rows, results, w, quant, grid, stream);
    });
  }
  if (grid != 1) {
    int count = grid;
    if (folds_twice(quant, grid)) {
      double* folded = scratch.take<double>(size_t(kFoldGroups) * columns);
      const dim3 blocks(unsigned(ceil_div(columns, kThreads)), kFoldGroups);
      bin_fold_kernel<<<blocks, kThreads, 0, stream>>>(rows, grid, columns, folded);
      rows = folded, count = kFoldGroups;
    }
    bin_finish_kernel<<<1, 1024, 0, stream>>>(rows, count, loss, bins, results.dloss_dalpha, Range(quant));
  }
  if (per_channel && dloss_dalpha) {
    // The counts n_k are needed first, so x is read again; sums over channels stay one float each, not one per level.
    launch_bwd<Grad::bin_alpha>(dtype, nullptr, nullptr, x, alpha, bins, nullptr, dloss_dalpha, layout, quant, 1.f,
                                workspace, stream);
  }
  return int(cudaGetLastError());
}

int bin_bwd(DType dtype, const void* grad_xhat, const float* grad_loss, const void* x, const float* alpha,
            const double* bins, void* dx, float* dalpha, Layout layout, Quant quant, float grad_scale, void* workspace,
            void* stream) {
  auto launch = grad_xhat ? launch_bwd<Grad::both> : launch_bwd<Grad::bin>;
  launch(dtype, grad_xhat, grad_loss, x, alpha, bins, dx, dalpha, layout, quant, grad_scale, workspace,
         static_cast<cudaStream_t>(stream));
  return int(cudaGetLastError());
}

const char* error_string(int code) { return cudaGetErrorString(static_cast<cudaError_t>(code)); }

}  // namespace cuda
}  // namespace qbr
