// The CUDA backend: launches. Kernels are in cuda_lsq.cuh and cuda_bin_fwd.cuh, what they cut x into in cuda_plan.h.
#include <cuda_runtime.h>

#include <algorithm>
#include <atomic>
#include <vector>

#include "cuda_bin_fwd.cuh"
#include "cuda_lsq.cuh"

namespace qbr {
namespace cuda {
namespace {

// A block has this much shared memory, static and dynamic, without asking; kStaticShared is bin_fwd_kernel's `reduce`.
constexpr size_t kOpenShared = 48 * 1024, kStaticShared = kThreads * sizeof(double);

// An attribute of the current device, asked for once; an H100's where it cannot be had.
template <cudaDeviceAttr A, int H100> int attribute() {
  static std::atomic<int> known[64];
  int device = 0, value = 0;
  if (cudaGetDevice(&device) != cudaSuccess || device < 0 || device >= 64) return H100;
  value = known[device].load(std::memory_order_relaxed);
  if (value > 0) return value;
  if (cudaDeviceGetAttribute(&value, A, device) != cudaSuccess || value < 1) value = H100;
  known[device].store(value, std::memory_order_relaxed);
  return value;
}

// The grid, and with it the order of sums, depends on these two of the device alone.
int multiprocessors() { return attribute<cudaDevAttrMultiProcessorCount, 132>(); }
int shared_memory() { return attribute<cudaDevAttrMaxSharedMemoryPerMultiprocessor, 228 * 1024>(); }

// Blocks of bin_fwd_kernel on a multiprocessor: more than fit would run as a second wave. Each has 1 KB set aside.
int bin_fwd_blocks(const Quant& q) {
  const size_t fit = shared_memory() / (bin_shared_bytes(q) + kStaticShared + 1024);
  return int(std::clamp(fit, size_t(1), size_t(blocks_of(method_of(q)))));
}

// f(element type) for a dtype known at run time.
template <class F> auto with_type(DType t, F f) {
  switch (t) {
    case DType::bf16: return f(__nv_bfloat16());
    case DType::f16: return f(__half());
    default: return f(float());
  }
}

// One tensor of a call: what its kernels are told, and what else decides which kernel takes it.
struct Task {
  DType dtype;
  Quant quant;
  Job job;
};
using Tasks = std::vector<Task>;

// The task that reads x, and g if it is there, and writes `out` if it is there; `blocks` of a multiprocessor.
Task task_of(const Item& item, const void* g, void* out, bool deep, int blocks) {
  const auto address = [](const void* p) { return reinterpret_cast<uint64_t>(p); };
  Task task{item.dtype, item.quant, {}};
  Job& job = task.job;
  job.x = item.x, job.g = g, job.out = out, job.alpha = item.alpha;
  job.walk = walk_of(item.layout, element_size(item.dtype), address(item.x), address(g), address(out), deep);
  job.walk.blocks = grid_of(job.walk, multiprocessors(), blocks);
  job.range = Range(item.quant);
  return task;
}

bool per_channel(const Job& job) { return job.walk.cut != Cut::flat; }

// Shares memory out: bytes_of(job) to each.
template <class F> void give_parts(Tasks& tasks, const Scratch& scratch, F bytes_of) {
  size_t total = 0;
  for (const Task& task : tasks) total += align16(bytes_of(task.job));
  if (total == 0) return;
  char* at = static_cast<char*>(scratch(total));
  for (Task& task : tasks) task.job.parts = at, at += align16(bytes_of(task.job));
}

// f(first, last) for each run of tasks with the same kind(task), sorted by it.
template <class Kind, class F> void by_kind(Tasks& tasks, Kind kind, F f) {
  std::stable_sort(tasks.begin(), tasks.end(), [&](const Task& a, const Task& b) { return kind(a) < kind(b); });
  for (const Task *first = tasks.data(), *end = first + tasks.size(); first != end;) {
    const Task* last = std::find_if(first, end, [&](const Task& t) { return kind(t) != kind(*first); });
    f(first, last);
    first = last;
  }
}

// A kernel's forms: of one job, which hands over no 4 KB, and of many.
struct Kernel {
  void (*one)(Jobs<1>);
  void (*many)(Jobs<kJobs>);
};

// Jobs for one kernel, each with the blocks that it takes.
class Batch {
 public:
  void add(const Job& job, int64_t blocks) {
    if (blocks > 0) jobs_.push_back(&job), blocks_.push_back(uint32_t(blocks));
  }
  // One launch for every kJobs of them.
  void launch(const Kernel& kernel, void* stream, size_t shared = 0, int threads = kThreads) const {
    for (size_t first = 0; first < jobs_.size(); first += kJobs) {
      const size_t count = std::min<size_t>(kJobs, jobs_.size() - first);
      const auto start = [&](auto function, auto jobs) {
        uint32_t blocks = 0;
        for (size_t i = 0; i < count; ++i) {
          jobs.job[i] = *jobs_[first + i], jobs.first_block[i] = blocks;
          blocks += blocks_[first + i];
        }
        std::fill(jobs.first_block + count, std::end(jobs.first_block), UINT32_MAX);
        if (shared + kStaticShared > kOpenShared)
          cudaFuncSetAttribute(function, cudaFuncAttributeMaxDynamicSharedMemorySize, int(shared));
        function<<<blocks, threads, shared, static_cast<cudaStream_t>(stream)>>>(jobs);
      };
      if (count == 1) start(kernel.one, Jobs<1>());
      else start(kernel.many, Jobs<kJobs>());
    }
  }

 private:
  std::vector<const Job*> jobs_;
  std::vector<uint32_t> blocks_;
};

template <Grad G> void launch_bwd(Tasks& tasks, const Scratch& scratch, void* stream) {
  constexpr bool sums = G != Grad::bin;
  if (sums) {
    give_parts(tasks, scratch, [](const Job& job) {
      const Walk& w = job.walk;
      return per_channel(job) ? channel_parts(w) * sizeof(float) : w.blocks == 1 ? 0 : w.blocks * sizeof(double);
    });
  }
  Batch tensors, channels;  // the second stages
  by_kind(tasks, [](const Task& t) { return t.dtype; }, [&](const Task* first, const Task* last) {
    Batch batch;
    for (const Task* t = first; t != last; ++t) {
      const Walk& w = t->job.walk;
      batch.add(t->job, w.blocks);
      if (!sums) continue;
      if (per_channel(t->job)) channels.add(t->job, ceil_div(w.channels, kWarps));
      else if (w.blocks != 1) tensors.add(t->job, 1);
    }
    batch.launch(with_type(first->dtype, [](auto type) -> Kernel {
      using T = decltype(type);
      return {bwd_kernel<T, G, 1>, bwd_kernel<T, G, kJobs>};
    }), stream);
  });
  tensors.launch({lsq_dalpha_kernel<1>, lsq_dalpha_kernel<kJobs>}, stream);
  channels.launch({channel_dalpha_kernel<1>, channel_dalpha_kernel<kJobs>}, stream);
}

template <class T> Kernel bin_fwd_of(Method m) {
  switch (m) {
    case Method::binary: return {bin_fwd_kernel<T, Method::binary, 1>, bin_fwd_kernel<T, Method::binary, kJobs>};
    case Method::lanes: return {bin_fwd_kernel<T, Method::lanes, 1>, bin_fwd_kernel<T, Method::lanes, kJobs>};
    default: return {bin_fwd_kernel<T, Method::atomics, 1>, bin_fwd_kernel<T, Method::atomics, kJobs>};
  }
}

// The rows that bin_fwd's blocks left, to bins, losses and gradients of alpha; a block alone has finished by itself.
void launch_finish(const Tasks& tasks, void* stream) {
  Batch folds, finishes;
  Tasks folded = tasks;
  for (size_t i = 0; i < tasks.size(); ++i) {
    const Job& job = tasks[i].job;
    if (job.walk.blocks == 1) continue;
    if (folds_twice(job.range, job.walk.blocks)) {
      folds.add(job, kFoldGroups * ceil_div(bin_columns(job.range), kThreads));
      Job& rest = folded[i].job;
      rest.parts = static_cast<double*>(job.parts) + int64_t(job.walk.blocks) * bin_columns(job.range);
      rest.walk.blocks = kFoldGroups;
    }
    finishes.add(folded[i].job, 1);
  }
  folds.launch({bin_fold_kernel<1>, bin_fold_kernel<kJobs>}, stream);
  finishes.launch({bin_finish_kernel<1>, bin_finish_kernel<kJobs>}, stream, 0, 1024);
}

// -2 sum_k k S_(k,c) / n_k with a step per channel: the counts n_k are needed first, so x is read again; sums over
// channels stay one float each, not one per level.
void write_dloss_dalpha(const Items& items, const Scratch& scratch, void* stream) {
  Tasks tasks;
  for (const Item& item : items) {
    if (!item.dloss_dalpha || item.layout.channels == 1) continue;
    tasks.push_back(task_of(item, nullptr, nullptr, true, kBlocksWide));
    Job& job = tasks.back().job;
    job.bins = item.bins, job.dalpha = item.dloss_dalpha, job.grad_scale = 1.f;
  }
  launch_bwd<Grad::bin_alpha>(tasks, scratch, stream);
}

}  // namespace

int lsq_fwd(const Items& items, void* stream) {
  Tasks tasks;
  for (const Item& item : items) tasks.push_back(task_of(item, nullptr, item.xhat, true, kBlocks));
  by_kind(tasks, [](const Task& t) { return t.dtype; }, [&](const Task* first, const Task* last) {
    Batch batch;
    for (const Task* t = first; t != last; ++t) batch.add(t->job, t->job.walk.blocks);
    batch.launch(with_type(first->dtype, [](auto type) -> Kernel {
      using T = decltype(type);
      return {lsq_fwd_kernel<T, 1>, lsq_fwd_kernel<T, kJobs>};
    }), stream);
  });
  return int(cudaGetLastError());
}

int lsq_bwd(const Items& items, const Scratch& scratch, void* stream) {
  Tasks tasks;
  for (const Item& item : items) {
    tasks.push_back(task_of(item, item.grad_xhat, item.dx, true, kBlocksWide));
    tasks.back().job.dalpha = item.dalpha, tasks.back().job.grad_scale = item.grad_scale;
  }
  launch_bwd<Grad::lsq>(tasks, scratch, stream);
  return int(cudaGetLastError());
}

int bin_fwd(const Items& items, const Scratch& scratch, void* stream) {
  Tasks tasks;
  for (const Item& item : items) {
    tasks.push_back(task_of(item, nullptr, item.xhat, false, bin_fwd_blocks(item.quant)));
    Job& job = tasks.back().job;
    job.loss = item.loss, job.bins = item.bins, job.dalpha = per_channel(job) ? nullptr : item.dloss_dalpha;
  }
  give_parts(tasks, scratch, [](const Job& job) {
    const int rows = job.walk.blocks + (folds_twice(job.range, job.walk.blocks) ? kFoldGroups : 0);
    return size_t(rows) * bin_columns(job.range) * sizeof(double);
  });
  const auto kind = [](const Task& t) { return int(t.dtype) * 3 + int(method_of(t.quant)); };
  by_kind(tasks, kind, [&](const Task* first, const Task* last) {
    Batch batch;
    size_t shared = 0;
    for (const Task* t = first; t != last; ++t) {
      batch.add(t->job, t->job.walk.blocks);
      shared = std::max(shared, bin_shared_bytes(t->quant));
    }
    const Method method = method_of(first->quant);
    const auto kernel = with_type(first->dtype, [&](auto type) { return bin_fwd_of<decltype(type)>(method); });
    batch.launch(kernel, stream, shared);
  });
  launch_finish(tasks, stream);
  write_dloss_dalpha(items, scratch, stream);
  return int(cudaGetLastError());
}

int bin_bwd(const Items& items, const Scratch& scratch, void* stream) {
  Tasks tasks;
  bool with_lsq = false;
  for (const Item& item : items) {
    tasks.push_back(task_of(item, item.grad_xhat, item.dx, true, kBlocksWide));
    Job& job = tasks.back().job;
    job.grad_loss = item.grad_loss, job.bins = item.bins;
    job.dalpha = item.dalpha, job.grad_scale = item.grad_scale;
    with_lsq = item.grad_xhat != nullptr;
  }
  (with_lsq ? launch_bwd<Grad::both> : launch_bwd<Grad::bin>)(tasks, scratch, stream);
  return int(cudaGetLastError());
}

const char* error_string(int code) { return cudaGetErrorString(static_cast<cudaError_t>(code)); }

}  // namespace cuda
}  // namespace qbr
