// The CPU kernels of kernels.h: cuts a tensor into tasks, gives them to torch's thread pool, adds up what they return.
// Tasks depend on the tensor's size alone and their rows are added in order: the same bits for any number of threads.
#include <algorithm>
#include <memory>
#include <vector>

#include <torch/csrc/stable/c/shim.h>
#include <torch/headeronly/util/shim_utils.h>

#include "cpu_loops.h"

namespace qbr::cpu {
namespace {

// Less than this is not worth a thread's wake-up.
constexpr int64_t kMinTask = 16 * kChunk;
constexpr int64_t kMaxTasks = 256;

const Loops& choose_loops() {
#ifdef QBR_X86_LOOPS
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl"))
    return loops_avx512;
  if (__builtin_cpu_supports("avx2")) return loops_avx2;
#endif
  return loops_baseline;
}

const Loops& loops() {
  static const Loops& chosen = choose_loops();
  return chosen;
}

// The tasks of a tensor, each with a row of `width` doubles to leave its sums in.
class Tasks {
 public:
  Tasks(int64_t numel, int64_t width) : numel_(numel), width_(width) {
    int64_t wanted = std::clamp<int64_t>(numel / kMinTask, 1, kMaxTasks);
    // All rows together stay smaller than the tensor, even where it has a step for every few elements.
    if (width) wanted = std::min(wanted, std::max<int64_t>(1, numel / (4 * width)));
    length_ = (numel + wanted * kChunk - 1) / (wanted * kChunk) * kChunk;
    count_ = (numel + length_ - 1) / length_;
    rows_.reset(new double[count_ * width]);
  }

  // work(range, row) for every task, on all threads.
  template <class Work>
  void run(const Work& work) {
    struct Context {
      const Tasks* tasks;
      const Work* work;
    } context{this, &work};
    auto some = [](int64_t begin, int64_t end, void* opaque) {
      const Context& c = *static_cast<const Context*>(opaque);
      for (int64_t i = begin; i < end; ++i) {
        const Range range{i * c.tasks->length_, std::min((i + 1) * c.tasks->length_, c.tasks->numel_)};
        (*c.work)(range, c.tasks->rows_.get() + i * c.tasks->width_);
      }
    };
    TORCH_ERROR_CODE_CHECK(torch_parallel_for(0, count_, 1, some, &context));
  }

  // The rows' sum, in their order.
  void add_up(double* total) const {
    std::fill_n(total, width_, 0.0);
    for (int64_t i = 0; i < count_; ++i)
      for (int64_t j = 0; j < width_; ++j) total[j] += rows_[i * width_ + j];
  }

 private:
  int64_t numel_, width_, length_, count_;
  std::unique_ptr<double[]> rows_;
};

Input input_of(DType dtype, const void* x, const float* alpha, const Layout& layout, const Quant& quant) {
  return {dtype, x, alpha, layout, quant, int(quant.qp - quant.qn) + 1};
}

// The backward loops over a whole tensor; step_sums [channels] or null.
void run_backward(const Input& in, const void* grad_xhat, const float* table, void* dx, double* step_sums) {
  Tasks tasks(in.layout.numel, step_sums ? in.layout.channels : 0);
  tasks.run([&](Range range, double* row) {
    loops().backward(in, range, grad_xhat, table, dx, step_sums ? row : nullptr);
  });
  if (step_sums) tasks.add_up(step_sums);
}

void write_dalpha(const std::vector<double>& step_sums, double scale, float* dalpha) {
  for (size_t c = 0; c < step_sums.size(); ++c) dalpha[c] = float(scale * step_sums[c]);
}

// dL/dalpha_c = -2 sum_k k S_(k,c) / n_k. With one step S_k is at hand; with many, a second read of x is cheaper than
// a table of sums for every channel and level in every task.
void write_dloss_dalpha(const Input& in, const double* bins, float* dloss_dalpha) {
  const int levels = in.levels;
  std::vector<double> per_distance(levels);
  for (int k = 0; k < levels; ++k) per_distance[k] = -2.0 * (double(in.quant.qn) + k) / std::max(bins[k], 1.0);
  std::vector<double> sums(in.layout.channels);
  if (in.layout.channels == 1) {
    for (int k = 0; k < levels; ++k) sums[0] += per_distance[k] * bins[levels + k];
  } else {
    float table[kMaxLevels] = {};
    std::copy(per_distance.begin(), per_distance.end(), table);
    run_backward(in, nullptr, table, nullptr, sums.data());
  }
  write_dalpha(sums, 1.0, dloss_dalpha);
}

}  // namespace

void lsq_fwd(DType dtype, const void* x, const float* alpha, void* xhat, Layout layout, Quant quant) {
  if (layout.numel == 0) return;
  const Input in = input_of(dtype, x, alpha, layout, quant);
  Tasks(layout.numel, 0).run([&](Range range, double*) { loops().forward(in, range, xhat, nullptr); });
}

void lsq_bwd(DType dtype, const void* grad_xhat, const void* x, const float* alpha, void* dx, float* dalpha,
             Layout layout, Quant quant, float grad_scale) {
  std::vector<double> sums(layout.channels);
  if (layout.numel != 0)
    run_backward(input_of(dtype, x, alpha, layout, quant), grad_xhat, nullptr, dx, sums.data());
  write_dalpha(sums, grad_scale, dalpha);
}

void bin_fwd(DType dtype, const void* x, const float* alpha, void* xhat, float* loss, double* bins,
             float* dloss_dalpha, Layout layout, Quant quant) {
  const Input in = input_of(dtype, x, alpha, layout, quant);
  const int levels = in.levels;
  if (layout.numel == 0) {
    std::fill_n(bins, 3 * levels + 2, 0.0);
  } else {
    Tasks tasks(layout.numel, 3 * levels + 2);
    tasks.run([&](Range range, double* row) { loops().forward(in, range, xhat, row); });
    tasks.add_up(bins);
  }
  double sum = 0;
  for (int k = 0; k < levels; ++k)
    if (bins[k] > 0) sum += bins[2 * levels + k] / bins[k];
  *loss = float(sum);
  if (!dloss_dalpha) return;
  if (layout.numel == 0)
    std::fill_n(dloss_dalpha, layout.channels, 0.f);
  else
    write_dloss_dalpha(in, bins, dloss_dalpha);
}

void bin_bwd(DType dtype, const void* grad_xhat, const float* grad_loss, const void* x, const float* alpha,
             const double* bins, void* dx, float* dalpha, Layout layout, Quant quant, float grad_scale) {
  const Input in = input_of(dtype, x, alpha, layout, quant);
  float table[kMaxLevels] = {};
  for (int k = 0; k < in.levels; ++k) table[k] = float(2.0 * double(*grad_loss) / std::max(bins[k], 1.0));
  std::vector<double> sums(dalpha ? layout.channels : 0);
  if (layout.numel != 0) run_backward(in, grad_xhat, table, dx, dalpha ? sums.data() : nullptr);
  if (dalpha) write_dalpha(sums, grad_scale, dalpha);
}

}  // namespace qbr::cpu
