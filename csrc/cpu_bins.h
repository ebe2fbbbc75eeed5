// The bin sums of one task: n_k, S_k and Q_k for every level, sum |d|, and how many |d| are near a level.
// For cpu_loops.cpp alone; internal linkage, for the reason given there.
#pragma once
#include "cpu_loops.h"
#include "cpu_simd.h"

namespace qbr::cpu {
namespace {

// Up to 8 levels live in registers, one masked sum each; as many again are added up in a second pass; beyond 16 there
// is a table that every element adds to.
enum class Collect { none, four, eight, sixteen, table };

inline Collect collect_for(int levels) {
  return levels <= 4 ? Collect::four : levels <= 8 ? Collect::eight : levels <= 16 ? Collect::sixteen : Collect::table;
}

// The sums of kLevels levels from `first` on, in lanes.
template <int kLevels>
struct LevelSums {
  VecF s[kLevels] = {}, q[kLevels] = {};
  VecI n[kLevels] = {};

  // code: a NaN is in the lowest bin, which is nan_bin's first.
  template <bool nan_bin>
  inline __attribute__((always_inline)) void add(VecF code, VecF d, float first) {
    const VecF square = d * d;
#pragma GCC unroll 8
    for (int k = 0; k < kLevels; ++k) {
      const VecF level = all(first + float(k));
      const Mask in_bin = nan_bin && k == 0 ? equal_or_nan(code, level) : equal(code, level);
      count_where(n[k], in_bin);
      add_where(s[k], in_bin, d);
      add_where(q[k], in_bin, square);
    }
  }
};

typedef float Four __attribute__((vector_size(16)));   // d, d^2, 1, unused; their sums S, Q, n
typedef double Quad __attribute__((vector_size(32)));  // the same

// Sixteen elements on their way into the table.
struct Addends {
  alignas(64) float four[kLanes][4];  // element j's at place(j)
  alignas(64) int32_t entry[kLanes];  // in bytes

  void set(VecF d, VecI where) {
    std::memcpy(entry, &where, sizeof entry);
    const VecF square = d * d;
#if defined(__AVX512F__)
    const __m512d one = (__m512d)_mm512_set1_epi64(0x3f800000);  // 1, 0
    const __m512d low = (__m512d)_mm512_unpacklo_ps(reg(d), reg(square));
    const __m512d high = (__m512d)_mm512_unpackhi_ps(reg(d), reg(square));
    _mm512_store_ps(four[0], (__m512)_mm512_unpacklo_pd(low, one));
    _mm512_store_ps(four[4], (__m512)_mm512_unpackhi_pd(low, one));
    _mm512_store_ps(four[8], (__m512)_mm512_unpacklo_pd(high, one));
    _mm512_store_ps(four[12], (__m512)_mm512_unpackhi_pd(high, one));
#else
    float x[kLanes], xx[kLanes];
    std::memcpy(x, &d, sizeof x);
    std::memcpy(xx, &square, sizeof xx);
    for (int j = 0; j < kLanes; ++j) four[j][0] = x[j], four[j][1] = xx[j], four[j][2] = 1.f, four[j][3] = 0.f;
#endif
  }

  static constexpr int place(int j) {
#if defined(__AVX512F__)
    return j % 4 * 4 + j / 4;  // what unpacking leaves
#else
    return j;
#endif
  }
};

class BinSums {
 public:
  explicit BinSums(int levels)
      : levels_(levels), collect_(collect_for(levels)), ways_(levels <= 64 ? 8 : levels <= 128 ? 4 : 2) {
    if (collect_ != Collect::table) return;
    std::memset(table_, 0, sizeof(Four) * ways_ * levels);
    std::memset(totals_, 0, sizeof(Quad) * levels);
    // Neighbours often share a bin: each goes into a table of its own, so that none waits for the one before it.
    int32_t way[kLanes];
    for (int j = 0; j < kLanes; ++j) way[j] = int(sizeof(Four)) * levels * (j % ways_);
    way_ = load_as<VecI>(way);
  }

  VecI entry(VecI slot) const { return slot * int(sizeof(Four)) + way_; }

  // Two vectors' addends: one on its way in while the other is made.
  Addends addends[2];

  void scatter(const Addends& from, int count) {
    char* const table = reinterpret_cast<char*>(table_);
    const auto add = [&](int j) {
      *reinterpret_cast<Four*>(table + from.entry[j]) += load_as<Four>(from.four[Addends::place(j)]);
    };
    if (count == kLanes) {
#pragma GCC unroll 16
      for (int j = 0; j < kLanes; ++j) add(j);
    } else {
      for (int j = 0; j < count; ++j) add(j);
    }
    if ((in_table_ += count) >= 2048) flush();
  }

  // The table's float sums into double ones, before they have added up so many elements that it shows: 1024 equal
  // ones, where two ways share 2048, are off by 1.5e-5 at most.
  void flush() {
    for (int way = 0; way < ways_; ++way)
      for (int k = 0; k < levels_; ++k) totals_[k] += __builtin_convertvector(table_[way * levels_ + k], Quad);
    std::memset(table_, 0, sizeof(Four) * ways_ * levels_);
    in_table_ = 0;
  }

  // A chunk's codes and distances, for a pass over the levels that did not find room in the first.
  alignas(64) float codes[kChunk + kLanes], distances[kChunk + kLanes];

  // A chunk's sums by lane; float sums become double ones here.
  template <int kLevels>
  inline __attribute__((always_inline)) void add_levels(const LevelSums<kLevels>& sums, int first) {
#pragma GCC unroll 8
    for (int k = 0; k < kLevels; ++k) {
      counts_[first + k] += sums.n[k];
      add_to(sums_[first + k], sums.s[k]);
      add_to(squares_[first + k], sums.q[k]);
    }
  }

  void add_distances(VecF sum, VecI near) {
    add_to(distance_, sum);
    near_ += near;
  }

  void write(double* row) {
    if (collect_ == Collect::table) flush();
    double* const rows[3] = {row, row + levels_, row + 2 * levels_};  // n, S, Q
    for (int k = 0; k < levels_; ++k) {
      if (collect_ != Collect::table) {
        rows[0][k] = double(sum_lanes(counts_[k])), rows[1][k] = sum_lanes(sums_[k]), rows[2][k] = sum_lanes(squares_[k]);
      } else {
        rows[0][k] = totals_[k][2], rows[1][k] = totals_[k][0], rows[2][k] = totals_[k][1];
      }
    }
    row[3 * levels_] = sum_lanes(distance_);
    row[3 * levels_ + 1] = double(sum_lanes(near_));
  }

 private:
  int levels_;
  Collect collect_;
  int ways_, in_table_ = 0;
  VecI way_ = {};
  VecD distance_ = {};
  VecI near_ = {};
  VecD sums_[16] = {}, squares_[16] = {};
  VecI counts_[16] = {};
  alignas(64) Four table_[512];  // [ways, levels]
  alignas(64) Quad totals_[kMaxLevels];
};

}  // namespace
}  // namespace qbr::cpu
