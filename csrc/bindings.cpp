// Registers the kernels of kernels.h for the ops of qbr/ops.py: LibTorch's stable ABI only, no Python symbols.
// Arguments are checked and explained in Python; the checks here keep a raw call from touching memory out of bounds.
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <tuple>
#include <utility>
#include <vector>

#include "bindings_call.h"

#ifdef QBR_WITH_CUDA
// Only a CUDA build of torch has it; weak, so that one binary also loads beside a CPU-only build.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device_index, void** stream);
#endif

namespace qbr {
namespace {

template <class T>
T* out(const Tensor& t) {
  return static_cast<T*>(t.mutable_data_ptr());
}

using Calls = std::vector<Call>;
using Tensors = std::vector<Tensor>;

Item item_of(const Call& c) {
  return {.dtype = c.dtype, .x = c.x.const_data_ptr(), .alpha = c.step(), .layout = c.layout, .quant = c.quant};
}

Items items_of(const Calls& calls) {
  Items items;
  items.reserve(calls.size());
  for (const Call& c : calls) items.push_back(item_of(c));
  return items;
}

// What the ops are written against, once for either device: the kernels on the CPU...
struct OnCPU {
  static void lsq_fwd(const Calls&, const Items& items) { cpu::lsq_fwd(items); }
  static void lsq_bwd(const Calls&, const Items& items) { cpu::lsq_bwd(items); }
  static void bin_fwd(const Calls&, const Items& items) { cpu::bin_fwd(items); }
  static void bin_bwd(const Calls&, const Items& items) { cpu::bin_bwd(items); }
};

#ifdef QBR_WITH_CUDA
// ... and on CUDA, with scratch memory and on the current stream of the tensors' device.
class OnCUDA {
 public:
  static void lsq_fwd(const Calls& calls, const Items& items) {
    run(calls, [&](const cuda::Scratch&, void* stream) { return cuda::lsq_fwd(items, stream); });
  }
  static void lsq_bwd(const Calls& calls, const Items& items) {
    run(calls, [&](const cuda::Scratch& scratch, void* stream) { return cuda::lsq_bwd(items, scratch, stream); });
  }
  static void bin_fwd(const Calls& calls, const Items& items) {
    run(calls, [&](const cuda::Scratch& scratch, void* stream) { return cuda::bin_fwd(items, scratch, stream); });
  }
  static void bin_bwd(const Calls& calls, const Items& items) {
    run(calls, [&](const cuda::Scratch& scratch, void* stream) { return cuda::bin_bwd(items, scratch, stream); });
  }

 private:
  template <class Launch> static void run(const Calls& calls, const Launch& launch) {
    if (calls.empty()) return;
    STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream, "a CUDA tensor, but this torch has no CUDA streams");
    const Tensor& on = calls[0].x;
    const torch::stable::accelerator::DeviceGuard guard(on.get_device_index());
    void* stream = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(on.get_device_index(), &stream));
    // From torch's caching allocator, which keeps it for this stream until the kernels are done.
    Tensors kept;
    const cuda::Scratch scratch = [&](size_t bytes) {
      kept.push_back(empty(int64_t(bytes), aoti_torch_dtype_uint8(), on));
      return kept.back().mutable_data_ptr();
    };
    const int error = launch(scratch, stream);
    STD_TORCH_CHECK(error == 0, "a CUDA kernel could not be launched: ", cuda::error_string(error));
  }
};
#endif

// ---- over lists ----------------------------------------------------------------------------------------------------

template <class On>
Tensors lsq_fwd(const Calls& calls) {
  Items items = items_of(calls);
  Tensors xhats;
  for (size_t i = 0; i < calls.size(); ++i) {
    xhats.push_back(like(calls[i].x));
    items[i].xhat = xhats[i].mutable_data_ptr();
  }
  On::lsq_fwd(calls, items);
  return xhats;
}

template <class On>
std::tuple<Tensors, Tensors> lsq_bwd(const Tensors& grad_xhats, const Calls& calls, const std::vector<double>& scales) {
  Items items = items_of(calls);
  Tensors grads, dxs, dalphas;
  for (size_t i = 0; i < calls.size(); ++i) {
    grads.push_back(calls[i].laid_out(grad_xhats[i]));
    dxs.push_back(like(calls[i].x)), dalphas.push_back(like(calls[i].alpha));
    items[i].grad_xhat = grads[i].const_data_ptr(), items[i].grad_scale = float(scales[i]);
    items[i].dx = dxs[i].mutable_data_ptr(), items[i].dalpha = out<float>(dalphas[i]);
  }
  On::lsq_bwd(calls, items);
  return {std::move(dxs), std::move(dalphas)};
}

// xhats: empty without with_xhat.
template <class On>
std::tuple<Tensors, Tensors, Tensors, Tensors> bin_fwd(const Calls& calls, bool with_xhat, bool backprop_to_alpha) {
  Items items = items_of(calls);
  Tensors xhats, losses, bins, dloss_dalphas;
  for (size_t i = 0; i < calls.size(); ++i) {
    const Call& c = calls[i];
    losses.push_back(empty_scalar(aoti_torch_dtype_float32(), c.x));
    bins.push_back(empty(c.bins_length(), aoti_torch_dtype_float64(), c.x));
    dloss_dalphas.push_back(backprop_to_alpha ? like(c.alpha) : empty(0, aoti_torch_dtype_float32(), c.x));
    items[i].loss = out<float>(losses[i]), items[i].bins = out<double>(bins[i]);
    if (backprop_to_alpha) items[i].dloss_dalpha = out<float>(dloss_dalphas[i]);
    if (!with_xhat) continue;
    xhats.push_back(like(c.x));
    items[i].xhat = xhats[i].mutable_data_ptr();
  }
  On::bin_fwd(calls, items);
  return {std::move(xhats), std::move(losses), std::move(bins), std::move(dloss_dalphas)};
}

// grad_xhats and scales, or neither: dalphas is empty then.
template <class On>
std::tuple<Tensors, Tensors> bin_bwd(const Tensors* grad_xhats, const Tensors& grad_losses, const Calls& calls,
                                     const Tensors& bins, const std::vector<double>* scales) {
  Items items = items_of(calls);
  Tensors grads, dxs, dalphas;
  for (size_t i = 0; i < calls.size(); ++i) {
    calls[i].check_grad_loss(grad_losses[i]);
    calls[i].check_bins(bins[i]);
    items[i].grad_loss = static_cast<const float*>(grad_losses[i].const_data_ptr());
    items[i].bins = static_cast<double*>(const_cast<void*>(bins[i].const_data_ptr()));
    dxs.push_back(like(calls[i].x));
    items[i].dx = dxs[i].mutable_data_ptr();
    if (!grad_xhats) continue;
    grads.push_back(calls[i].laid_out((*grad_xhats)[i]));
    dalphas.push_back(like(calls[i].alpha));
    items[i].grad_xhat = grads[i].const_data_ptr(), items[i].grad_scale = float((*scales)[i]);
    items[i].dalpha = out<float>(dalphas[i]);
  }
  On::bin_bwd(calls, items);
  return {std::move(dxs), std::move(dalphas)};
}

// ---- ops over one tensor -------------------------------------------------------------------------------------------

template <class On>
Tensor one_lsq_fwd(Tensor x, Tensor alpha, int64_t qn, int64_t qp, bool binary, int64_t channel_axis, bool relu,
                   double clip) {
  return lsq_fwd<On>({Call(x, alpha, qn, qp, binary, channel_axis, relu, clip)})[0];
}

template <class On>
std::tuple<Tensor, Tensor> one_lsq_bwd(Tensor grad_xhat, Tensor x, Tensor alpha, int64_t qn, int64_t qp, bool binary,
                                       int64_t channel_axis, bool relu, double clip, double grad_scale) {
  const auto [dx, dalpha] =
      lsq_bwd<On>({grad_xhat}, {Call(x, alpha, qn, qp, binary, channel_axis, relu, clip)}, {grad_scale});
  return {dx[0], dalpha[0]};
}

template <class On>
std::tuple<Tensor, Tensor, Tensor> one_bin_loss_fwd(Tensor x, Tensor alpha, int64_t qn, int64_t qp, bool binary,
                                                    int64_t channel_axis, bool relu, double clip,
                                                    bool backprop_to_alpha) {
  const auto [_, loss, bins, dloss_dalpha] =
      bin_fwd<On>({Call(x, alpha, qn, qp, binary, channel_axis, relu, clip)}, false, backprop_to_alpha);
  return {loss[0], bins[0], dloss_dalpha[0]};
}

template <class On>
std::tuple<Tensor, Tensor, Tensor, Tensor> one_lsq_bin_fwd(Tensor x, Tensor alpha, int64_t qn, int64_t qp, bool binary,
                                                           int64_t channel_axis, bool relu, double clip,
                                                           bool backprop_to_alpha) {
  const auto [xhat, loss, bins, dloss_dalpha] =
      bin_fwd<On>({Call(x, alpha, qn, qp, binary, channel_axis, relu, clip)}, true, backprop_to_alpha);
  return {xhat[0], loss[0], bins[0], dloss_dalpha[0]};
}

template <class On>
Tensor one_bin_loss_bwd(Tensor grad_loss, Tensor x, Tensor alpha, Tensor bins, int64_t qn, int64_t qp, bool binary,
                        int64_t channel_axis, bool relu, double clip) {
  const Calls calls{Call(x, alpha, qn, qp, binary, channel_axis, relu, clip)};
  return std::get<0>(bin_bwd<On>(nullptr, {grad_loss}, calls, {bins}, nullptr))[0];
}

template <class On>
std::tuple<Tensor, Tensor> one_lsq_bin_bwd(Tensor grad_xhat, Tensor grad_loss, Tensor x, Tensor alpha, Tensor bins,
                                           int64_t qn, int64_t qp, bool binary, int64_t channel_axis, bool relu,
                                           double clip, double grad_scale) {
  const Tensors grad_xhats{grad_xhat};
  const std::vector<double> scales{grad_scale};
  const auto [dx, dalpha] = bin_bwd<On>(&grad_xhats, {grad_loss},
                                        {Call(x, alpha, qn, qp, binary, channel_axis, relu, clip)}, {bins}, &scales);
  return {dx[0], dalpha[0]};
}

// ---- ops over lists ------------------------------------------------------------------------------------------------

void check_length(const char* name, size_t length, size_t expected) {
  STD_TORCH_CHECK(length == expected, name, " has ", length, " elements: expected ", expected);
}

// ranges: qn, qp, binary and channel_axis of each tensor in turn.
Calls calls_of(const Tensors& xs, const Tensors& alphas, const std::vector<int64_t>& ranges, bool relu, double clip) {
  check_length("alphas", alphas.size(), xs.size());
  check_length("ranges", ranges.size(), 4 * xs.size());
  Calls calls;
  calls.reserve(xs.size());
  for (size_t i = 0; i < xs.size(); ++i) {
    const int64_t* r = ranges.data() + 4 * i;
    calls.emplace_back(xs[i], alphas[i], r[0], r[1], r[2] != 0, r[3], relu, clip);
    calls[i].same_device("xs[0]", xs[0]);
  }
  return calls;
}

template <class On>
Tensors foreach_lsq_fwd(Tensors xs, Tensors alphas, std::vector<int64_t> ranges, bool relu, double clip) {
  return lsq_fwd<On>(calls_of(xs, alphas, ranges, relu, clip));
}

template <class On>
std::tuple<Tensors, Tensors> foreach_lsq_bwd(Tensors grad_xhats, Tensors xs, Tensors alphas,
                                             std::vector<int64_t> ranges, bool relu, double clip,
                                             std::vector<double> grad_scales) {
  check_length("grad_xhats", grad_xhats.size(), xs.size());
  check_length("grad_scales", grad_scales.size(), xs.size());
  return lsq_bwd<On>(grad_xhats, calls_of(xs, alphas, ranges, relu, clip), grad_scales);
}

template <class On>
std::tuple<Tensors, Tensors, Tensors> foreach_bin_loss_fwd(Tensors xs, Tensors alphas, std::vector<int64_t> ranges,
                                                           bool relu, double clip, bool backprop_to_alpha) {
  auto [_, losses, bins, dloss_dalphas] =
      bin_fwd<On>(calls_of(xs, alphas, ranges, relu, clip), false, backprop_to_alpha);
  return {std::move(losses), std::move(bins), std::move(dloss_dalphas)};
}

template <class On>
Tensors foreach_bin_loss_bwd(Tensors grad_losses, Tensors xs, Tensors alphas, Tensors bins, std::vector<int64_t> ranges,
                             bool relu, double clip) {
  check_length("grad_losses", grad_losses.size(), xs.size());
  check_length("bins", bins.size(), xs.size());
  return std::get<0>(bin_bwd<On>(nullptr, grad_losses, calls_of(xs, alphas, ranges, relu, clip), bins, nullptr));
}

template <class On>
std::tuple<Tensors, Tensors, Tensors, Tensors> foreach_lsq_bin_fwd(Tensors xs, Tensors alphas,
                                                                   std::vector<int64_t> ranges, bool relu, double clip,
                                                                   bool backprop_to_alpha) {
  return bin_fwd<On>(calls_of(xs, alphas, ranges, relu, clip), true, backprop_to_alpha);
}

template <class On>
std::tuple<Tensors, Tensors> foreach_lsq_bin_bwd(Tensors grad_xhats, Tensors grad_losses, Tensors xs, Tensors alphas,
                                                 Tensors bins, std::vector<int64_t> ranges, bool relu, double clip,
                                                 std::vector<double> grad_scales) {
  check_length("grad_xhats", grad_xhats.size(), xs.size());
  check_length("grad_losses", grad_losses.size(), xs.size());
  check_length("bins", bins.size(), xs.size());
  check_length("grad_scales", grad_scales.size(), xs.size());
  return bin_bwd<On>(&grad_xhats, grad_losses, calls_of(xs, alphas, ranges, relu, clip), bins, &grad_scales);
}

template <class On>
void implement(torch::stable::detail::StableLibrary& m) {
  m.impl("lsq_fwd", TORCH_BOX(&one_lsq_fwd<On>));
  m.impl("lsq_bwd", TORCH_BOX(&one_lsq_bwd<On>));
  m.impl("bin_loss_fwd", TORCH_BOX(&one_bin_loss_fwd<On>));
  m.impl("bin_loss_bwd", TORCH_BOX(&one_bin_loss_bwd<On>));
  m.impl("lsq_bin_fwd", TORCH_BOX(&one_lsq_bin_fwd<On>));
  m.impl("lsq_bin_bwd", TORCH_BOX(&one_lsq_bin_bwd<On>));
  m.impl("foreach_lsq_fwd", TORCH_BOX(&foreach_lsq_fwd<On>));
  m.impl("foreach_lsq_bwd", TORCH_BOX(&foreach_lsq_bwd<On>));
  m.impl("foreach_bin_loss_fwd", TORCH_BOX(&foreach_bin_loss_fwd<On>));
  m.impl("foreach_bin_loss_bwd", TORCH_BOX(&foreach_bin_loss_bwd<On>));
  m.impl("foreach_lsq_bin_fwd", TORCH_BOX(&foreach_lsq_bin_fwd<On>));
  m.impl("foreach_lsq_bin_bwd", TORCH_BOX(&foreach_lsq_bin_bwd<On>));
}

}  // namespace
}  // namespace qbr

STABLE_TORCH_LIBRARY_IMPL(qbr_native, CPU, m) { qbr::implement<qbr::OnCPU>(m); }
#ifdef QBR_WITH_CUDA
STABLE_TORCH_LIBRARY_IMPL(qbr_native, CUDA, m) { qbr::implement<qbr::OnCUDA>(m); }
#endif
