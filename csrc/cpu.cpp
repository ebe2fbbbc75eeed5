// The CPU kernels of kernels.h: cuts tensors into tasks, gives them to torch's thread pool, adds up what they return.
// Tasks depend on each tensor's size alone and their rows are added in order: the same bits for any number of threads,
// and for a tensor alone or in a list.
#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <memory>
#include <string_view>
#include <vector>

#include <torch/csrc/stable/c/shim.h>
#include <torch/headeronly/util/Exception.h>
#include <torch/headeronly/util/shim_utils.h>

#include "cpu_loops.h"

namespace qbr::cpu {
namespace {

// Less than this is not worth a thread's wake-up.
constexpr int64_t kMinTask = 16 * kChunk;
constexpr int64_t kMaxTasks = 256;

// The best that this machine has, or what QBR_CPU_ISA names: baseline, avx2 or avx512 (to compare or to debug them).
const Loops& choose_loops() {
  const char* const named = std::getenv("QBR_CPU_ISA");
  const std::string_view wanted = named ? named : "";
#ifdef QBR_X86_LOOPS
  __builtin_cpu_init();
  const bool avx2 =
      __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (avx512 && (wanted.empty() || wanted == "avx512")) return loops_avx512;
  if (avx2 && (wanted.empty() || wanted == "avx2")) return loops_avx2;
#endif
  STD_TORCH_CHECK(wanted.empty() || wanted == "baseline", "QBR_CPU_ISA=", wanted,
                  ": expected baseline, avx2 or avx512, as far as this machine has it; unset it for the best");
  return loops_baseline;
}

const Loops& loops() {
  static const Loops& chosen = choose_loops();
  return chosen;
}

// The tasks of a list of tensors, each with a row of doubles to leave its sums in.
class Tasks {
 public:
  // widths: how many doubles a row of each tensor has.
  Tasks(const std::vector<int64_t>& numels, const std::vector<int64_t>& widths) {
    for (size_t item = 0; item < numels.size(); ++item) {
      const int64_t numel = numels[item], width = widths[item];
      items_.push_back({rows_length_, width, 0});
      if (numel == 0) continue;
      int64_t wanted = std::clamp<int64_t>(numel / kMinTask, 1, kMaxTasks);
      // All rows together stay smaller than the tensor, even where it has a step for every few elements.
      if (width) wanted = std::min(wanted, std::max<int64_t>(1, numel / (4 * width)));
      const int64_t length = (numel + wanted * kChunk - 1) / (wanted * kChunk) * kChunk;
      for (int64_t begin = 0; begin < numel; begin += length) {
        tasks_.push_back({item, {begin, std::min(begin + length, numel)}, rows_length_});
        rows_length_ += width;
        ++items_.back().count;
      }
    }
    rows_.reset(new double[rows_length_]);
  }

  // work(item, range, row) for every task. A thread that is done takes the next task, wherever it belongs.
  template <class Work>
  void run(const Work& work) {
    loops();  // an error in choosing them is to be told here, not from inside a thread
    struct Context {
      const Tasks* tasks;
      const Work* work;
      std::atomic<size_t> next;
    } context{this, &work, {0}};
    auto take = [](int64_t, int64_t, void* opaque) {
      Context& c = *static_cast<Context*>(opaque);
      for (size_t i; (i = c.next.fetch_add(1)) < c.tasks->tasks_.size();) {
        const Task& task = c.tasks->tasks_[i];
        (*c.work)(task.item, task.range, c.tasks->rows_.get() + task.row);
      }
    };
    // As many ranges as there are tasks: torch gives them to no more threads than that.
    TORCH_ERROR_CODE_CHECK(torch_parallel_for(0, int64_t(tasks_.size()), 1, take, &context));
  }

  // The sum of an item's rows, in their order.
  void add_up(size_t item, double* total) const {
    const Rows& rows = items_[item];
    std::fill_n(total, rows.width, 0.0);
    for (int64_t i = 0; i < rows.count; ++i)
      for (int64_t j = 0; j < rows.width; ++j) total[j] += rows_[rows.first_row + i * rows.width + j];
  }

 private:
  struct Task {
    size_t item;
    Range range;
    int64_t row;
  };
  struct Rows {
    int64_t first_row, width, count;
  };
  std::vector<Task> tasks_;
  std::vector<Rows> items_;
  int64_t rows_length_ = 0;
  std::unique_ptr<double[]> rows_;
};

Input input_of(const Item& item) {
  const Quant& q = item.quant;
  return {item.dtype, item.x, item.alpha, item.layout, q, int(q.qp - q.qn) + 1};
}

template <class Each>
auto list_of(const Items& items, Each each) {
  std::vector<decltype(each(items[0]))> list;
  list.reserve(items.size());
  for (const Item& item : items) list.push_back(each(item));
  return list;
}

std::vector<int64_t> numels(const Items& items) {
  return list_of(items, [](const Item& item) { return item.layout.numel; });
}

// What d is multiplied with, by slot.
struct alignas(64) Table {
  float entry[kMaxLevels] = {};
};

// Where a tensor's step sums go, times scale; out is [channels] or null.
struct StepGradient {
  float* out;
  double scale;
};

// The backward loops over tensors; a table for each, or none.
void run_backward(const Items& items, const std::vector<Table>& tables, bool with_dx,
                  const std::vector<StepGradient>& gradients) {
  std::vector<int64_t> widths;
  for (size_t i = 0; i < items.size(); ++i) widths.push_back(gradients[i].out ? items[i].layout.channels : 0);
  Tasks tasks(numels(items), widths);
  tasks.run([&](size_t i, Range range, double* row) {
    loops().backward(input_of(items[i]), range, items[i].grad_xhat, tables.empty() ? nullptr : tables[i].entry,
                     with_dx ? items[i].dx : nullptr, gradients[i].out ? row : nullptr);
  });
  std::vector<double> sums;
  for (size_t i = 0; i < items.size(); ++i) {
    if (!gradients[i].out) continue;
    sums.resize(widths[i]);
    tasks.add_up(i, sums.data());
    for (int64_t c = 0; c < widths[i]; ++c) gradients[i].out[c] = float(gradients[i].scale * sums[c]);
  }
}

double per_distance(const Item& item, int k) {  // -2 k / n_k
  return -2.0 * (double(item.quant.qn) + k) / std::max(item.bins[k], 1.0);
}

// dL/dalpha_c = -2 sum_k k S_(k,c) / n_k. With one step S_k is at hand; with many, a second read of x is cheaper than
// a table of sums for every channel and level in every task.
void write_dloss_dalpha(const Items& items) {
  Items many;
  std::vector<Table> tables;
  for (const Item& item : items) {
    if (!item.dloss_dalpha) continue;
    const int levels = input_of(item).levels;
    if (item.layout.channels == 1) {
      double sum = 0;
      for (int k = 0; k < levels; ++k) sum += per_distance(item, k) * item.bins[levels + k];
      *item.dloss_dalpha = float(sum);
    } else {
      many.push_back(item);
      many.back().grad_xhat = nullptr;
      tables.emplace_back();
      for (int k = 0; k < levels; ++k) tables.back().entry[k] = float(per_distance(item, k));
    }
  }
  if (many.empty()) return;
  run_backward(many, tables, false,
               list_of(many, [](const Item& item) { return StepGradient{item.dloss_dalpha, 1.0}; }));
}

}  // namespace

void lsq_fwd(const Items& items) {
  Tasks tasks(numels(items), std::vector<int64_t>(items.size(), 0));
  tasks.run([&](size_t i, Range range, double*) { loops().forward(input_of(items[i]), range, items[i].xhat, nullptr); });
}

void lsq_bwd(const Items& items) {
  run_backward(items, {}, true, list_of(items, [](const Item& item) {
                 return StepGradient{item.dalpha, item.grad_scale};
               }));
}

void bin_fwd(const Items& items) {
  Tasks tasks(numels(items), list_of(items, [](const Item& item) { return int64_t(3 * input_of(item).levels + 2); }));
  tasks.run([&](size_t i, Range range, double* row) { loops().forward(input_of(items[i]), range, items[i].xhat, row); });
  for (size_t i = 0; i < items.size(); ++i) {
    const Item& item = items[i];
    const int levels = input_of(item).levels;
    tasks.add_up(i, item.bins);
    double sum = 0;
    for (int k = 0; k < levels; ++k)
      if (item.bins[k] > 0) sum += item.bins[2 * levels + k] / item.bins[k];
    *item.loss = float(sum);
  }
  write_dloss_dalpha(items);
}

void bin_bwd(const Items& items) {
  std::vector<Table> tables(items.size());
  for (size_t i = 0; i < items.size(); ++i)
    for (int k = 0; k < input_of(items[i]).levels; ++k)
      tables[i].entry[k] = float(2.0 * double(*items[i].grad_loss) / std::max(items[i].bins[k], 1.0));
  run_backward(items, tables, true, list_of(items, [](const Item& item) {
                 return StepGradient{item.dalpha, item.grad_scale};
               }));
}

}  // namespace qbr::cpu
