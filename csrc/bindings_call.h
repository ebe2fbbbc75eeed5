// One call's arguments as the ops get them, checked and put into the kernels' terms; and fresh tensors for its results.
// For bindings.cpp alone. What people see is checked and explained in Python (qbr/arguments.py).
#pragma once
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <vector>

#include "kernels.h"

namespace qbr {
namespace {

using torch::stable::Tensor;

constexpr int64_t kMaxLevels = 256;         // qbr.spec.MAX_LEVELS
constexpr int64_t kMaxCode = 1 << 22;       // what rounding by adding 1.5 * 2^23 is right for

int32_t dtype_of(const Tensor& t) {
  int32_t dtype;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(t.get(), &dtype));
  return dtype;
}

int32_t device_type_of(const Tensor& t) {
  int32_t type;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(t.get(), &type));
  return type;
}

// The strides are a permutation of a contiguous tensor's: storage order visits every element once, without gaps.
bool is_dense(const Tensor& t) {
  if (t.is_contiguous()) return true;
  const auto sizes = t.sizes(), strides = t.strides();
  int64_t expected = 1, seen = 0, wanted = 0;
  for (int64_t d = 0; d < t.dim(); ++d) wanted += sizes[d] != 1;
  while (seen < wanted) {
    int64_t next = -1;
    for (int64_t d = 0; d < t.dim(); ++d)
      if (sizes[d] != 1 && strides[d] == expected) next = d;
    if (next < 0) return false;
    expected *= sizes[next];
    ++seen;
  }
  return true;
}

bool same_sizes(const Tensor& a, const Tensor& b) {
  if (a.dim() != b.dim()) return false;
  for (int64_t d = 0; d < a.dim(); ++d)
    if (a.size(d) != b.size(d)) return false;
  return true;
}

// Of tensors of the same sizes.
bool same_layout(const Tensor& a, const Tensor& b) {
  for (int64_t d = 0; d < a.dim(); ++d)
    if (a.size(d) != 1 && a.numel() != 0 && a.stride(d) != b.stride(d)) return false;
  return true;
}

Tensor empty(const std::vector<int64_t>& sizes, const std::vector<int64_t>& strides, int32_t dtype, const Tensor& on) {
  AtenTensorHandle handle;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(int64_t(sizes.size()), sizes.data(), strides.data(), dtype,
                                                  device_type_of(on), on.get_device_index(), &handle));
  return Tensor(handle);
}

Tensor empty(int64_t count, int32_t dtype, const Tensor& on) { return empty({count}, {1}, dtype, on); }

Tensor empty_scalar(int32_t dtype, const Tensor& on) { return empty({}, {}, dtype, on); }

// Uninitialised, with the sizes, strides and dtype of t.
Tensor like(const Tensor& t) {
  const auto sizes = t.sizes(), strides = t.strides();
  return empty({sizes.begin(), sizes.end()}, {strides.begin(), strides.end()}, dtype_of(t), t);
}

// One call's checked arguments in the kernels' terms.
struct Call {
  Tensor x, alpha;
  DType dtype;
  Layout layout;
  Quant quant;
  int64_t levels;

  Call(const Tensor& x_, const Tensor& alpha_, int64_t qn, int64_t qp, bool binary, int64_t channel_axis, bool relu,
       double clip)
      : x(x_), alpha(alpha_) {
    STD_TORCH_CHECK(qn <= qp && qp - qn < kMaxLevels && -kMaxCode <= qn && qp <= kMaxCode, "qn=", qn, ", qp=", qp,
                    ": expected qn <= qp, at most ", kMaxLevels, " levels, and codes within ", kMaxCode);
    STD_TORCH_CHECK(!binary || (qn == -1 && qp == 1), "binary with qn=", qn, ", qp=", qp, ": expected -1 and 1");
    STD_TORCH_CHECK(is_dense(x), "x is not dense: pass x.contiguous()");
    STD_TORCH_CHECK(-1 <= channel_axis && channel_axis < x.dim(), "channel_axis=", channel_axis, " of an x with ",
                    x.dim(), " dimensions: expected -1 or one of them");
    const int32_t type = dtype_of(x);
    STD_TORCH_CHECK(type == aoti_torch_dtype_float32() || type == aoti_torch_dtype_bfloat16() ||
                        type == aoti_torch_dtype_float16(),
                    "x has a dtype that this backend does not take: expected float32, bfloat16 or float16");
    dtype = type == aoti_torch_dtype_float32() ? DType::f32
            : type == aoti_torch_dtype_bfloat16() ? DType::bf16 : DType::f16;
    levels = qp - qn + 1;
    layout = {x.numel(), channel_axis < 0 ? 1 : x.size(channel_axis), 1};
    // The stride of a dimension of size 1 is arbitrary, and one channel needs none.
    layout.inner = layout.channels == 1 ? std::max<int64_t>(layout.numel, 1) : std::max<int64_t>(x.stride(channel_axis), 1);
    quant = {float(qn), float(qp), binary, relu, float(clip)};
    same_device("alpha", alpha);
    STD_TORCH_CHECK(dtype_of(alpha) == aoti_torch_dtype_float32() && alpha.numel() == layout.channels &&
                        alpha.is_contiguous(),
                    "alpha has ", alpha.numel(), " elements: expected ", layout.channels, " of float32, contiguous");
  }

  void same_device(const char* name, const Tensor& t) const {
    STD_TORCH_CHECK(device_type_of(t) == device_type_of(x) && t.get_device_index() == x.get_device_index(), name,
                    " is on another device than x: move it there");
  }

  // grad_xhat in x's dtype and strides: code that inductor has compiled may lay the two out differently.
  Tensor laid_out(const Tensor& grad_xhat) const {
    same_device("grad_xhat", grad_xhat);
    STD_TORCH_CHECK(same_sizes(grad_xhat, x), "grad_xhat has another shape than x");
    if (dtype_of(grad_xhat) == dtype_of(x) && same_layout(grad_xhat, x)) return grad_xhat;
    Tensor copy = like(x);
    TORCH_ERROR_CODE_CHECK(aoti_torch_copy_(copy.get(), grad_xhat.get(), 0));
    return copy;
  }

  void check_grad_loss(const Tensor& g) const {
    same_device("grad_loss", g);
    STD_TORCH_CHECK(dtype_of(g) == aoti_torch_dtype_float32() && g.numel() == 1, "grad_loss has ", g.numel(),
                    " elements: expected one of float32");
  }

  void check_bins(const Tensor& bins) const {
    same_device("bins", bins);
    STD_TORCH_CHECK(dtype_of(bins) == aoti_torch_dtype_float64() && bins.numel() == bins_length() &&
                        bins.is_contiguous(),
                    "bins has ", bins.numel(), " elements: expected ", bins_length(), " of float64, contiguous");
  }

  int64_t bins_length() const { return 3 * levels + 2; }
  const float* step() const { return static_cast<const float*>(alpha.const_data_ptr()); }
};

}  // namespace
}  // namespace qbr
