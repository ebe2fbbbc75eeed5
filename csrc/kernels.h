// What bindings.cpp calls: four kernels, each over a list of tensors, on the CPU (cpu.cpp) and on CUDA (cuda.cu).
//
// Tensors are flat runs of `numel` elements of `dtype` in storage order. Element i has the step
// alpha[(i / inner) % channels]; channels = 1 for one step per tensor. L = qp - qn + 1.
// `bins` is [3 L + 2] float64: n_k | S_k | Q_k | sum |d| | count of |d| < 0.01f alpha.
// Arguments marked "or null" switch a part of the work off at compile time, not per element.
#pragma once
#include <cstddef>
#include <cstdint>
#include <functional>
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

// On either device each item's results are those of a call of its own, to the bit. "Or null" is alike in all items.
namespace cpu {
// One parallel region for all items.
void lsq_fwd(const Items&);  // xhat
void lsq_bwd(const Items&);  // grad_xhat, grad_scale -> dx, dalpha
void bin_fwd(const Items&);  // loss, bins; xhat and dloss_dalpha, each or null
void bin_bwd(const Items&);  // grad_loss, bins -> dx; grad_xhat (with grad_scale) and dalpha, both or null
}  // namespace cpu

// The same on a CUDA stream of the current device, with device pointers; nothing synchronises. Items of one dtype (and,
// in bin_fwd, of one Method of cuda_plan.h) share a launch, up to kJobs of them, and all share one for the sums that
// blocks leave. Each returns the cudaError_t of its launches as an int.
namespace cuda {
// So many bytes of device memory, 16-byte aligned and uninitialised, that last until the stream has passed the call.
using Scratch = std::function<void*(size_t bytes)>;
int lsq_fwd(const Items&, void* stream);
int lsq_bwd(const Items&, const Scratch&, void* stream);
int bin_fwd(const Items&, const Scratch&, void* stream);
int bin_bwd(const Items&, const Scratch&, void* stream);
const char* error_string(int);
}  // namespace cuda

}  // namespace qbr
