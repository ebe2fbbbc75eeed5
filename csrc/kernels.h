// What bindings.cpp calls: four kernels on the CPU (cpu.cpp), each over a list of tensors, and the same four on CUDA
// (cuda.cu), one tensor at a time.
//
// Tensors are flat runs of `numel` elements of `dtype` in storage order. Element i has the step
// alpha[(i / inner) % channels]; channels = 1 for one step per tensor. L = qp - qn + 1.
// `bins` is [3 L + 2] float64: n_k | S_k | Q_k | sum |d| | count of |d| < 0.01f alpha.
// Arguments marked "or null" switch a part of the work off at compile time, not per element.
#pragma once
#include <cstddef>
#include <cstdint>
#include <vector>

namespace qbr {

// The integer range and the fused ReLU of one call; clip is +inf for none.
struct Quant {
  float qn, qp;
  bool binary, relu;
  float clip;
};

enum class DType { f32, bf16, f16 };

struct Layout {
  int64_t numel, channels, inner;
};

namespace cpu {
// One tensor's share of a call. Each kernel names what it reads and writes of it; the rest is not looked at.
struct Item {
  DType dtype;
  const void* x;
  const float* alpha;
  Layout layout;
  Quant quant;
  void* xhat;
  float* loss;
  double* bins;
  float* dloss_dalpha;  // [channels]
  const void* grad_xhat;
  const float* grad_loss;
  void* dx;
  float* dalpha;  // [channels]
  float grad_scale;
};
using Items = std::vector<Item>;

// One parallel region for all items; each item's results are those of a call of its own, to the bit.
void lsq_fwd(const Items&);  // xhat
void lsq_bwd(const Items&);  // grad_xhat, grad_scale -> dx, dalpha
void bin_fwd(const Items&);  // loss, bins; xhat and dloss_dalpha, each or null
void bin_bwd(const Items&);  // grad_loss, bins -> dx; grad_xhat (with grad_scale) and dalpha, both or null
}  // namespace cpu

// The same on a CUDA stream. Device pointers throughout; nothing synchronises. `workspace` is scratch of at least
// workspace_bytes(...) bytes, 16-byte aligned and uninitialised. Each returns the cudaError_t of its launches as an int.
namespace cuda {
enum class Kernel { lsq_bwd, bin_fwd, bin_bwd };
size_t workspace_bytes(Kernel, Layout, Quant, bool alpha_gradient);
int lsq_fwd(DType, const void* x, const float* alpha, void* xhat, Layout, Quant, void* stream);
int lsq_bwd(DType, const void* grad_xhat, const void* x, const float* alpha, void* dx, float* dalpha, Layout, Quant,
            float grad_scale, void* workspace, void* stream);
// xhat or null (bin_loss alone); dloss_dalpha [channels] or null.
int bin_fwd(DType, const void* x, const float* alpha, void* xhat, float* loss, double* bins, float* dloss_dalpha,
            Layout, Quant, void* workspace, void* stream);
// grad_xhat and dalpha, both or null (bin_loss alone); grad_loss is one float.
int bin_bwd(DType, const void* grad_xhat, const float* grad_loss, const void* x, const float* alpha,
            const double* bins, void* dx, float* dalpha, Layout, Quant, float grad_scale, void* workspace,
            void* stream);
const char* error_string(int);
}  // namespace cuda

}  // namespace qbr
