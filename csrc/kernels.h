// What bindings.cpp calls: four kernels on the CPU (cpu.cpp) and the same four on CUDA (cuda.cu).
//
// Tensors are flat runs of `numel` elements of `dtype` in storage order. Element i has the step
// alpha[(i / inner) % channels]; channels = 1 for one step per tensor. L = qp - qn + 1.
// `bins` is [3 L + 2] float64: n_k | S_k | Q_k | sum |d| | count of |d| < 0.01f alpha.
// Arguments marked "or null" switch a part of the work off at compile time, not per element.
#pragma once
#include <cstddef>
#include <cstdint>

#include "lsq_bin_math.h"

namespace qbr {

enum class DType { f32, bf16, f16 };

struct Layout {
  int64_t numel, channels, inner;
};

namespace cpu {
void lsq_fwd(DType, const void* x, const float* alpha, void* xhat, Layout, Quant);
void lsq_bwd(DType, const void* grad_xhat, const void* x, const float* alpha, void* dx, float* dalpha, Layout, Quant,
             float grad_scale);
// xhat or null (bin_loss alone); dloss_dalpha [channels] or null.
void bin_fwd(DType, const void* x, const float* alpha, void* xhat, float* loss, double* bins, float* dloss_dalpha,
             Layout, Quant);
// grad_xhat and dalpha, both or null (bin_loss alone); grad_loss is one float.
void bin_bwd(DType, const void* grad_xhat, const float* grad_loss, const void* x, const float* alpha,
             const double* bins, void* dx, float* dalpha, Layout, Quant, float grad_scale);
}  // namespace cpu

// The same on a CUDA stream. Device pointers throughout; nothing synchronises. `workspace` is scratch of at least
// workspace_bytes(...) bytes, 16-byte aligned and uninitialised. Each returns the cudaError_t of its launches as an int.
namespace cuda {
enum class Kernel { lsq_bwd, bin_fwd, bin_bwd };
size_t workspace_bytes(Kernel, Layout, Quant, bool alpha_gradient);
int lsq_fwd(DType, const void* x, const float* alpha, void* xhat, Layout, Quant, void* stream);
int lsq_bwd(DType, const void* grad_xhat, const void* x, const float* alpha, void* dx, float* dalpha, Layout, Quant,
            float grad_scale, void* workspace, void* stream);
int bin_fwd(DType, const void* x, const float* alpha, void* xhat, float* loss, double* bins, float* dloss_dalpha,
            Layout, Quant, void* workspace, void* stream);
int bin_bwd(DType, const void* grad_xhat, const float* grad_loss, const void* x, const float* alpha,
            const double* bins, void* dx, float* dalpha, Layout, Quant, float grad_scale, void* workspace,
            void* stream);
const char* error_string(int);
}  // namespace cuda

}  // namespace qbr
