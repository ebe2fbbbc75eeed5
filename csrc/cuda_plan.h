// What the CUDA launches decide: how a tensor is cut into tiles, and which kernel takes it. Plain host arithmetic.
//
// A tile is the work of one block between two looks at its loop: 16 elements of each of 256 threads. Its elements come
//   flat     one step per tensor: 8 warps take 8 consecutive units of 512 elements
//   rows     one step per channel, long rows: as flat, but a unit ends where its row of `inner` elements ends
//   columns  one step per channel, short rows: x seen as [outer, channels * inner], a thread goes down one column
// so every thread meets one step per tile, and every sum over a channel is a sum of whole units or thread columns.
#pragma once
#include <cmath>

#include "kernels.h"

namespace qbr {
namespace cuda {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr int kDepth = 16;           // elements of a thread in one tile: 64 bytes of float32 in flight
constexpr int kUnit = 32 * kDepth;   // elements of a warp in one tile
constexpr int kBlocks = 4;           // of a multiprocessor: 64 registers a thread
constexpr int kBlocksWide = 3;       // where 80 registers are needed: backward holds x and g, atomics their totals
constexpr int kMaxColumnDepth = 128;  // of a thread in columns where it may exceed kDepth: bounds float rounding
constexpr int kMinRow = 64;          // shorter rows leave most of a warp idle: go by columns
constexpr int kFoldGroups = 16;      // rows left after the first stage of folding many wide rows

// One call's range, ready for the elements. Without a ReLU low and high let everything pass.
struct Range {
  int levels;
  float qn, qp, low, high, masked;
  float split, below;  // binary: codes are `below` until `split` and 1 from there; else they change nothing
  float quick;         // the largest step for which the short division is exact (step_of); below 0 for none
  Range() = default;
  explicit Range(const Quant& q)
      : levels(int(q.qp - q.qn) + 1), qn(q.qn), qp(q.qp), low(q.relu ? 0.f : -INFINITY),
        high(q.relu ? q.clip : INFINITY), masked(q.relu ? 0.f : NAN), split(q.binary ? 0.f : NAN),
        below(q.binary ? -1.f : INFINITY) {
    // Beyond 1 a quotient may underflow to zero, which takes its sign.
    const bool sign_matters = q.binary || qp == 0.f || (qn == 0.f && !q.relu);
    quick = std::fmax(std::fabs(qn), std::fabs(qp)) >= 0x1p19f ? -1.f : sign_matters ? 1.f : 0x1p60f;
  }
};

enum class Cut : uint8_t { flat, rows, columns };

// What the kernels need to find their elements.
struct Walk {
  int64_t channels, inner, outer;
  int64_t tiles;
  union {
    int64_t units;  // flat, rows: how many in all
    int64_t width;  // columns: channels * inner
  };
  union {
    int64_t segments;  // flat, rows: units in one row
    int64_t strips;    // columns: how many tiles lie below each other
  };
  uint32_t blocks;  // that share the tiles; each takes every blocks-th
  int32_t origin;   // flat: where the first unit starts, <= 0, so that units lie on 16-byte boundaries
  int16_t depth;    // columns: elements of a thread in one tile
  int16_t abreast;  // columns: rows that a block reads at once, > 1 where they are short
  Cut cut;
  bool vector;      // units within bounds move in 16-byte accesses
};

// What a kernel is told of one tensor; what it does not use is not set. Each thread block works on one job.
struct Job {
  const void *x, *g;  // g: the gradient of xhat
  void* out;          // xhat or dx
  const float* alpha;
  float* dalpha;  // the gradient of alpha that the call gives: LSQ's backward, BR's forward
  float* loss;
  const float* grad_loss;
  double* bins;
  void* parts;  // scratch: what the blocks leave for the next stage
  Walk walk;
  Range range;
  float grad_scale;
};

// A kernel's parameter: jobs, of which each block finds its own.
template <int N> struct Jobs {
  Job job[N];
  uint32_t first_block[N];
};
// As many as fit into the 4 KB that every driver takes: the 21 weights of ResNet-18 do.
constexpr int kJobs = 4096 / (sizeof(Job) + sizeof(uint32_t));
static_assert(kJobs >= 21 && sizeof(Jobs<kJobs>) <= 4096);

// How bin_fwd accumulates (cuda_bins.cuh); binary codes go by lanes too.
enum class Method { binary, lanes, atomics };

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
constexpr int blocks_of(Method m) { return m == Method::atomics ? kBlocksWide : kBlocks; }
inline int levels(const Quant& q) { return int(q.qp - q.qn) + 1; }
inline int bin_columns(const Range& r) { return 3 * r.levels + 2; }
inline int element_size(DType t) { return t == DType::f32 ? 4 : 2; }
inline size_t align16(size_t bytes) { return (bytes + 15) / 16 * 16; }

inline Method method_of(const Quant& q) {
  if (q.binary) return Method::binary;
  return levels(q) <= 16 ? Method::lanes : Method::atomics;
}

// Dynamic shared memory of bin_fwd_kernel: the two accumulators of cuda_bins.cuh.
inline size_t bin_shared_bytes(const Quant& q) {
  const size_t n = levels(q);
  if (method_of(q) == Method::atomics) return (18 * n + 1) * sizeof(uint32_t);
  return 3 * n * (kThreads * sizeof(float) + kWarps * sizeof(double));
}

// The walk for elements of `size` bytes at these addresses (0 for a tensor that is absent). With `deep` a thread may
// take more than kDepth elements of a column, which keeps the sums over channels few.
inline Walk walk_of(const Layout& t, int size, uint64_t x, uint64_t g, uint64_t out, bool deep) {
  Walk w{};
  w.channels = t.channels, w.inner = t.inner;
  w.depth = kDepth, w.abreast = 1, w.outer = 1, w.segments = 1, w.strips = 1;
  w.cut = t.channels == 1 ? Cut::flat : t.inner >= kMinRow ? Cut::rows : Cut::columns;
  if (t.numel == 0) return w;
  const int64_t vec = 16 / size, shift = int64_t(x % 16) / size;
  const bool alike = (!g || g % 16 == x % 16) && (!out || out % 16 == x % 16) && x % size == 0;
  if (w.cut == Cut::flat) {
    w.inner = t.numel;
    w.vector = alike;
    w.origin = alike ? -int32_t(shift) : 0;
    w.segments = w.units = ceil_div(t.numel - w.origin, kUnit);
    w.tiles = ceil_div(w.units, kWarps);
    return w;
  }
  w.outer = t.numel / (t.channels * t.inner);
  if (w.cut == Cut::rows) {
    w.vector = alike && shift == 0 && t.inner % vec == 0;
    w.segments = ceil_div(t.inner, kUnit);
    w.units = w.outer * t.channels * w.segments;
    w.tiles = ceil_div(w.units, kWarps);
    return w;
  }
  w.width = t.channels * t.inner;
  w.abreast = w.width < kThreads ? int16_t(kThreads / w.width) : 1;
  const int64_t across = ceil_div(w.width, kThreads);
  if (deep) {
    const int64_t wanted = ceil_div(ceil_div(w.outer, w.abreast) * across, 1024);
    w.depth = int16_t(wanted < kDepth ? kDepth : wanted > kMaxColumnDepth ? kMaxColumnDepth : wanted);
  }
  w.strips = ceil_div(w.outer, int64_t(w.depth) * w.abreast);
  w.tiles = across * w.strips;
  return w;
}

// All blocks of a tensor at once: more would only add rows to sum. In a list they are as many as in a call of one, so
// that the sums are the same.
inline int grid_of(const Walk& w, int sms, int blocks) {
  const int64_t most = int64_t(sms) * blocks;
  return int(w.tiles < most ? w.tiles : most);
}

// Sums over a channel leave the main kernel as one float per unit or thread column, numbered within the workspace.
inline int64_t channel_parts(const Walk& w) { return w.cut == Cut::columns ? w.tiles * kThreads : w.units; }

// bin_fwd's rows are folded in two steps where one block would take long over them.
inline bool folds_twice(const Range& r, int blocks) { return r.levels > 16 && blocks > 2 * kFoldGroups; }

}  // namespace cuda
}  // namespace qbr
