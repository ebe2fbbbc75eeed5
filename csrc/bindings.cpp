// Registers the kernels of kernels.h for the ops of qbr/ops.py: LibTorch's stable ABI only, no Python symbols.
// Arguments are checked and explained in Python; the checks here keep a raw call from touching memory out of bounds.
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <tuple>
#include <vector>

#include "kernels.h"

#ifdef QBR_WITH_CUDA
// Only a CUDA build of torch has it; weak, so that one binary also loads beside a CPU-only build.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device_index, void** stream);
#endif

namespace qbr {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kMaxLevels = 256;         // qbr.spec.MAX_LEVELS
constexpr int64_t kMaxCode = 1 << 22;       // round_half_even's range

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

bool same_layout(const Tensor& a, const Tensor& b) {
  if (a.dim() != b.dim()) return false;
  for (int64_t d = 0; d < a.dim(); ++d)
    if (a.size(d) != b.size(d) || (a.size(d) != 1 && a.numel() != 0 && a.stride(d) != b.stride(d))) return false;
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

  void check_grad_xhat(const Tensor& g) const {
    same_device("grad_xhat", g);
    STD_TORCH_CHECK(dtype_of(g) == dtype_of(x) && same_layout(g, x),
                    "grad_xhat differs from x in dtype, shape or strides: pass torch.empty_like(x).copy_(grad_xhat)");
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

template <class T>
T* out(const Tensor& t) {
  return static_cast<T*>(t.mutable_data_ptr());
}

// What the ops are written against, once for either device: the kernels on the CPU...
struct OnCPU {
  explicit OnCPU(const Call&) {}
  template <class... Args>
  void lsq_fwd(const Call&, Args... args) { cpu::lsq_fwd(args...); }
  template <class... Args>
  void lsq_bwd(const Call&, Args... args) { cpu::lsq_bwd(args...); }
  template <class... Args>
  void bin_fwd(const Call&, bool, Args... args) { cpu::bin_fwd(args...); }
  template <class... Args>
  void bin_bwd(const Call&, bool, Args... args) { cpu::bin_bwd(args...); }
};

#ifdef QBR_WITH_CUDA
// ... and on CUDA, where they also take scratch memory and the current stream of x's device.
class OnCUDA {
 public:
  explicit OnCUDA(const Call& call) : guard_(call.x.get_device_index()) {
    STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream, "a CUDA tensor, but this torch has no CUDA streams");
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(call.x.get_device_index(), &stream_));
  }
  template <class... Args>
  void lsq_fwd(const Call&, Args... args) { check(cuda::lsq_fwd(args..., stream_)); }
  template <class... Args>
  void lsq_bwd(const Call& call, Args... args) {
    const Tensor scratch = workspace(call, cuda::Kernel::lsq_bwd, true);
    check(cuda::lsq_bwd(args..., scratch.mutable_data_ptr(), stream_));
  }
  template <class... Args>
  void bin_fwd(const Call& call, bool alpha_gradient, Args... args) {
    const Tensor scratch = workspace(call, cuda::Kernel::bin_fwd, alpha_gradient);
    check(cuda::bin_fwd(args..., scratch.mutable_data_ptr(), stream_));
  }
  template <class... Args>
  void bin_bwd(const Call& call, bool alpha_gradient, Args... args) {
    const Tensor scratch = workspace(call, cuda::Kernel::bin_bwd, alpha_gradient);
    check(cuda::bin_bwd(args..., scratch.mutable_data_ptr(), stream_));
  }

 private:
  // From torch's caching allocator, which keeps it for this stream until the kernels are done.
  static Tensor workspace(const Call& call, cuda::Kernel kernel, bool alpha_gradient) {
    const size_t bytes = cuda::workspace_bytes(kernel, call.layout, call.quant, alpha_gradient);
    return empty(int64_t(bytes ? bytes : 16), aoti_torch_dtype_uint8(), call.x);
  }
  static void check(int error) {
    STD_TORCH_CHECK(error == 0, "a CUDA kernel could not be launched: ", cuda::error_string(error));
  }
  torch::stable::accelerator::DeviceGuard guard_;
  void* stream_ = nullptr;
};
#endif

template <class On>
Tensor lsq_fwd(Tensor x, Tensor alpha, int64_t qn, int64_t qp, bool binary, int64_t channel_axis, bool relu,
               double clip) {
  const Call c(x, alpha, qn, qp, binary, channel_axis, relu, clip);
  const Tensor xhat = like(c.x);
  On(c).lsq_fwd(c, c.dtype, c.x.const_data_ptr(), c.step(), xhat.mutable_data_ptr(), c.layout, c.quant);
  return xhat;
}

template <class On>
std::tuple<Tensor, Tensor> lsq_bwd(Tensor grad_xhat, Tensor x, Tensor alpha, int64_t qn, int64_t qp, bool binary,
                                   int64_t channel_axis, bool relu, double clip, double grad_scale) {
  const Call c(x, alpha, qn, qp, binary, channel_axis, relu, clip);
  c.check_grad_xhat(grad_xhat);
  const Tensor dx = like(c.x), dalpha = like(c.alpha);
  On(c).lsq_bwd(c, c.dtype, grad_xhat.const_data_ptr(), c.x.const_data_ptr(), c.step(), dx.mutable_data_ptr(),
                out<float>(dalpha), c.layout, c.quant, float(grad_scale));
  return {dx, dalpha};
}

// xhat or null.
template <class On>
std::tuple<Tensor, Tensor, Tensor> bin_fwd(const Call& c, const Tensor* xhat, bool backprop_to_alpha) {
  const Tensor loss = empty_scalar(aoti_torch_dtype_float32(), c.x);
  const Tensor bins = empty(c.bins_length(), aoti_torch_dtype_float64(), c.x);
  const Tensor dloss_dalpha = backprop_to_alpha ? like(c.alpha) : empty(0, aoti_torch_dtype_float32(), c.x);
  On(c).bin_fwd(c, backprop_to_alpha, c.dtype, c.x.const_data_ptr(), c.step(),
                xhat ? xhat->mutable_data_ptr() : nullptr, out<float>(loss), out<double>(bins),
                backprop_to_alpha ? out<float>(dloss_dalpha) : nullptr, c.layout, c.quant);
  return {loss, bins, dloss_dalpha};
}

template <class On>
std::tuple<Tensor, Tensor, Tensor> bin_loss_fwd(Tensor x, Tensor alpha, int64_t qn, int64_t qp, bool binary,
                                                int64_t channel_axis, bool relu, double clip, bool backprop_to_alpha) {
  return bin_fwd<On>(Call(x, alpha, qn, qp, binary, channel_axis, relu, clip), nullptr, backprop_to_alpha);
}

template <class On>
std::tuple<Tensor, Tensor, Tensor, Tensor> lsq_bin_fwd(Tensor x, Tensor alpha, int64_t qn, int64_t qp, bool binary,
                                                       int64_t channel_axis, bool relu, double clip,
                                                       bool backprop_to_alpha) {
  const Call c(x, alpha, qn, qp, binary, channel_axis, relu, clip);
  const Tensor xhat = like(c.x);
  const auto [loss, bins, dloss_dalpha] = bin_fwd<On>(c, &xhat, backprop_to_alpha);
  return {xhat, loss, bins, dloss_dalpha};
}

// grad_xhat and dalpha, both or null.
template <class On>
Tensor bin_bwd(const Call& c, const Tensor* grad_xhat, const Tensor& grad_loss, const Tensor& bins,
               const Tensor* dalpha, double grad_scale) {
  c.check_grad_loss(grad_loss);
  c.check_bins(bins);
  const Tensor dx = like(c.x);
  On(c).bin_bwd(c, dalpha != nullptr, c.dtype, grad_xhat ? grad_xhat->const_data_ptr() : nullptr,
                static_cast<const float*>(grad_loss.const_data_ptr()), c.x.const_data_ptr(), c.step(),
                static_cast<const double*>(bins.const_data_ptr()), dx.mutable_data_ptr(),
                dalpha ? out<float>(*dalpha) : nullptr, c.layout, c.quant, float(grad_scale));
  return dx;
}

template <class On>
Tensor bin_loss_bwd(Tensor grad_loss, Tensor x, Tensor alpha, Tensor bins, int64_t qn, int64_t qp, bool binary,
                    int64_t channel_axis, bool relu, double clip) {
  const Call c(x, alpha, qn, qp, binary, channel_axis, relu, clip);
  return bin_bwd<On>(c, nullptr, grad_loss, bins, nullptr, 0.0);
}

template <class On>
std::tuple<Tensor, Tensor> lsq_bin_bwd(Tensor grad_xhat, Tensor grad_loss, Tensor x, Tensor alpha, Tensor bins,
                                       int64_t qn, int64_t qp, bool binary, int64_t channel_axis, bool relu,
                                       double clip, double grad_scale) {
  const Call c(x, alpha, qn, qp, binary, channel_axis, relu, clip);
  c.check_grad_xhat(grad_xhat);
  const Tensor dalpha = like(c.alpha);
  const Tensor dx = bin_bwd<On>(c, &grad_xhat, grad_loss, bins, &dalpha, grad_scale);
  return {dx, dalpha};
}

template <class On>
void implement(torch::stable::detail::StableLibrary& m) {
  m.impl("lsq_fwd", TORCH_BOX(&lsq_fwd<On>));
  m.impl("lsq_bwd", TORCH_BOX(&lsq_bwd<On>));
  m.impl("bin_loss_fwd", TORCH_BOX(&bin_loss_fwd<On>));
  m.impl("bin_loss_bwd", TORCH_BOX(&bin_loss_bwd<On>));
  m.impl("lsq_bin_fwd", TORCH_BOX(&lsq_bin_fwd<On>));
  m.impl("lsq_bin_bwd", TORCH_BOX(&lsq_bin_bwd<On>));
}

}  // namespace
}  // namespace qbr

STABLE_TORCH_LIBRARY_IMPL(qbr_native, CPU, m) { qbr::implement<qbr::OnCPU>(m); }
#ifdef QBR_WITH_CUDA
STABLE_TORCH_LIBRARY_IMPL(qbr_native, CUDA, m) { qbr::implement<qbr::OnCUDA>(m); }
#endif
