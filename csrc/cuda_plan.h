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
constexpr int kBlocks = 4;           // of a multiprocessor: 64 registers a thread, and 16 levels by lanes fit
constexpr int kBlocksWide = 3;       // where 80 registers are needed: backward holds x and g, atomics their totals
constexpr int kMaxColumnDepth = 128;  // of a thread in columns where it may exceed kDepth: bounds float rounding
constexpr int kMinRow = 64;          // shorter rows leave most of a warp idle: go by columns
constexpr int kFoldGroups = 16;      // rows left after the first stage of folding many wide rows

// One call's range, ready for the elements: a kernel's argument, since operands in constant memory take no registers.
// Without a ReLU low and high let everything pass.
struct Range {
  int levels;
  float qn, qp, low, high, masked;
  float split, below;  // binary: codes are `below` until `split` and 1 from there; else they change nothing
  bool sign_matters;
  explicit Range(const Quant& q)
      : levels(int(q.qp - q.qn) + 1), qn(q.qn), qp(q.qp), low(q.relu ? 0.f : -INFINITY),
        high(q.relu ? q.clip : INFINITY), masked(q.relu ? 0.f : NAN), split(q.binary ? 0.f : NAN),
        below(q.binary ? -1.f : INFINITY),
        sign_matters(q.binary || qp == 0.f || (qn == 0.f && !q.relu)) {}
};

// What the kernels need to find their elements.
struct Walk {
  int64_t numel, channels, inner, outer;
  int64_t tiles;
  int64_t units, segments;  // flat, rows: how many in all, and in one row
  int64_t width, strips;    // columns: channels * inner, and how many tiles lie below each other
  int32_t origin;           // flat: where the first unit starts, <= 0, so that units lie on 16-byte boundaries
  int32_t depth;            // columns: elements of a thread in one tile
  int32_t abreast;          // columns: rows that a block reads at once, > 1 where they are short
  bool by_column;
  bool vector;              // units within bounds move in 16-byte accesses
};

// How bin_fwd accumulates (cuda_bins.cuh); binary codes go by lanes too.
enum class Method { binary, lanes, atomics };

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
constexpr int blocks_of(Method m) { return m == Method::atomics ? kBlocksWide : kBlocks; }
inline int levels(const Quant& q) { return int(q.qp - q.qn) + 1; }
inline int bin_columns(const Quant& q) { return 3 * levels(q) + 2; }
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
  w.numel = t.numel, w.channels = t.channels, w.inner = t.inner;
  w.depth = kDepth, w.abreast = 1, w.outer = 1, w.segments = 1, w.strips = 1;
  if (t.numel == 0) return w;
  const int64_t vec = 16 / size, shift = int64_t(x % 16) / size;
  const bool alike = (!g || g % 16 == x % 16) && (!out || out % 16 == x % 16) && x % size == 0;
  if (t.channels == 1) {
    w.inner = t.numel;
    w.vector = alike;
    w.origin = alike ? -int32_t(shift) : 0;
    w.segments = w.units = ceil_div(t.numel - w.origin, kUnit);
    w.tiles = ceil_div(w.units, kWarps);
    return w;
  }
  w.outer = t.numel / (t.channels * t.inner);
  if (t.inner >= kMinRow) {
    w.vector = alike && shift == 0 && t.inner % vec == 0;
    w.segments = ceil_div(t.inner, kUnit);
    w.units = w.outer * t.channels * w.segments;
    w.tiles = ceil_div(w.units, kWarps);
    return w;
  }
  w.by_column = true;
  w.width = t.channels * t.inner;
  w.abreast = w.width < kThreads ? int32_t(kThreads / w.width) : 1;
  const int64_t across = ceil_div(w.width, kThreads);
  if (deep) {
    const int64_t wanted = ceil_div(ceil_div(w.outer, w.abreast) * across, 1024);
    w.depth = int32_t(wanted < kDepth ? kDepth : wanted > kMaxColumnDepth ? kMaxColumnDepth : wanted);
  }
  w.strips = ceil_div(w.outer, int64_t(w.depth) * w.abreast);
  w.tiles = across * w.strips;
  return w;
}

// All blocks at once: more would only add rows to sum.
inline int grid_of(const Walk& w, int sms, int blocks) {
  const int64_t most = int64_t(sms) * blocks;
  return int(w.tiles < most ? w.tiles : most);
}

// Sums over a channel leave the main kernel as one float per unit or thread column, numbered within the workspace.
inline int64_t channel_parts(const Walk& w) { return w.by_column ? w.tiles * kThreads : w.units; }

// bin_fwd's rows are folded in two steps where one block would take long over them.
inline bool folds_twice(const Quant& q, int grid) { return levels(q) > 16 && grid > 2 * kFoldGroups; }

inline size_t workspace_bytes_of(Kernel kernel, const Layout& t, const Quant& q, bool alpha_gradient, int sms) {
  // The widest misalignment, so that the answer holds for any pointers.
  const Walk flat = walk_of(t, 2, 14, 0, 0, true);
  size_t bytes = 16;
  if (kernel == Kernel::bin_fwd) {
    // Its own walk is never deep, so it may have more tiles.
    const int grid = grid_of(walk_of(t, 2, 14, 0, 0, false), sms, blocks_of(method_of(q)));
    bytes += align16(size_t(grid) * bin_columns(q) * sizeof(double));
    if (folds_twice(q, grid)) bytes += align16(size_t(kFoldGroups) * bin_columns(q) * sizeof(double));
    if (alpha_gradient && t.channels > 1) bytes += align16(channel_parts(flat) * sizeof(float));
  } else if (alpha_gradient) {
    bytes += t.channels > 1 ? channel_parts(flat) * sizeof(float) : grid_of(flat, sms, kBlocksWide) * sizeof(double);
  }
  return bytes;
}

}  // namespace cuda
}  // namespace qbr
