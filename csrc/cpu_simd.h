// Sixteen floats at a time, in as many registers as the instruction set needs: one with AVX-512, two with AVX2, four
// in the baseline. Lane by lane all do the same IEEE operations, so that results do not depend on the machine.
// For cpu_loops.cpp alone; internal linkage, for the reason given there.
#pragma once
#include <cstdint>
#include <cstring>

#if defined(__SSE2__)
#include <immintrin.h>
#endif

namespace qbr::cpu {
namespace {

constexpr int kLanes = 16;
#if defined(__AVX512F__)
constexpr int kWidth = 16;  // floats in a register
#elif defined(__AVX2__)
constexpr int kWidth = 8;
#else
constexpr int kWidth = 4;
#endif

typedef float RegF __attribute__((vector_size(4 * kWidth)));
typedef int32_t RegI __attribute__((vector_size(4 * kWidth)));
typedef double RegD __attribute__((vector_size(4 * kWidth)));

template <class Reg, int kParts>
struct Pack {
  Reg part[kParts];
};
using VecF = Pack<RegF, kLanes / kWidth>;
using VecI = Pack<RegI, kLanes / kWidth>;
using VecD = Pack<RegD, 2 * kLanes / kWidth>;

// each(a.part[i], b.part[i], ...) for every register.
template <class Each, class First, class... Rest>
inline auto by_part(Each each, const First& a, const Rest&... rest) {
  constexpr int parts = sizeof(a.part) / sizeof(a.part[0]);
  Pack<decltype(each(a.part[0], rest.part[0]...)), parts> result;
#pragma GCC unroll 4
  for (int i = 0; i < parts; ++i) result.part[i] = each(a.part[i], rest.part[i]...);
  return result;
}

#define QBR_OPERATOR(op)                                         \
  template <class R, int n>                                      \
  inline Pack<R, n> operator op(Pack<R, n> a, Pack<R, n> b) {    \
    return by_part([](R x, R y) -> R { return x op y; }, a, b);  \
  }                                                              \
  template <class R, int n, class T>                             \
  inline Pack<R, n> operator op(Pack<R, n> a, T b) {             \
    return by_part([b](R x) -> R { return x op b; }, a);         \
  }
QBR_OPERATOR(+)
QBR_OPERATOR(-)
QBR_OPERATOR(*)
QBR_OPERATOR(/)
QBR_OPERATOR(&)
#undef QBR_OPERATOR

template <class R, int n>
inline void operator+=(Pack<R, n>& a, Pack<R, n> b) { a = a + b; }

template <class V, class T>
inline V load_as(const T* p) {
  V v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

inline VecF load(const float* p) { return load_as<VecF>(p); }
inline void store(float* p, VecF v) { std::memcpy(p, &v, sizeof v); }
inline VecF all(float f) {  // f - 0, for f + 0 loses the sign of -0
  return by_part([f](RegF zero) -> RegF { return f - zero; }, VecF{});
}
inline VecF absolute(VecF v) { return by_part([](RegF x) { return (RegF)((RegI)x & 0x7fffffff); }, v); }

#if defined(__AVX512F__)

struct Mask {
  __mmask16 m;
};
inline __m512 reg(VecF v) { return (__m512)v.part[0]; }
inline VecF vec(__m512 v) { return {{(RegF)v}}; }

inline __mmask16 first_lanes(int count) { return __mmask16((1u << count) - 1); }
inline void store_first(float* p, VecF v, int count) { _mm512_mask_storeu_ps(p, first_lanes(count), reg(v)); }
inline VecF keep_first(VecF v, int count, VecF rest) {
  return vec(_mm512_mask_mov_ps(reg(rest), first_lanes(count), reg(v)));
}

inline Mask equal(VecF a, VecF b) { return {_mm512_cmp_ps_mask(reg(a), reg(b), _CMP_EQ_OQ)}; }
inline Mask equal_or_nan(VecF a, VecF b) { return {_mm512_cmp_ps_mask(reg(a), reg(b), _CMP_EQ_UQ)}; }
inline Mask less(VecF a, VecF b) { return {_mm512_cmp_ps_mask(reg(a), reg(b), _CMP_LT_OQ)}; }
inline Mask above_or_nan(VecF a, VecF b) { return {_mm512_cmp_ps_mask(reg(a), reg(b), _CMP_NLE_UQ)}; }
inline Mask not_above(VecF a, VecF b) { return {_mm512_cmp_ps_mask(reg(a), reg(b), _CMP_NGT_UQ)}; }
inline VecF select(Mask m, VecF yes, VecF no) { return vec(_mm512_mask_mov_ps(reg(no), m.m, reg(yes))); }
inline VecF subtract_where(Mask m, VecF a, VecF b) { return vec(_mm512_mask_sub_ps(reg(a), m.m, reg(a), reg(b))); }
inline void add_where(VecF& sum, Mask m, VecF x) { sum = vec(_mm512_mask_add_ps(reg(sum), m.m, reg(sum), reg(x))); }
inline void count_where(VecI& n, Mask m) {
  const __m512i old = (__m512i)n.part[0];
  n.part[0] = (RegI)_mm512_mask_add_epi32(old, m.m, old, _mm512_set1_epi32(1));
}

#else

using Mask = VecI;

inline void store_first(float* p, VecF v, int count) { std::memcpy(p, &v, sizeof(float) * count); }
inline VecF keep_first(VecF v, int count, VecF rest) {
  std::memcpy(&rest, &v, sizeof(float) * count);
  return rest;
}

inline Mask equal(VecF a, VecF b) { return by_part([](RegF x, RegF y) { return (RegI)(x == y); }, a, b); }
inline Mask equal_or_nan(VecF a, VecF b) { return by_part([](RegF x, RegF y) { return ~(RegI)((x < y) | (x > y)); }, a, b); }
inline Mask less(VecF a, VecF b) { return by_part([](RegF x, RegF y) { return (RegI)(x < y); }, a, b); }
inline Mask above_or_nan(VecF a, VecF b) { return by_part([](RegF x, RegF y) { return ~(RegI)(x <= y); }, a, b); }
inline Mask not_above(VecF a, VecF b) { return by_part([](RegF x, RegF y) { return ~(RegI)(x > y); }, a, b); }
inline VecF select(Mask m, VecF yes, VecF no) {
  return by_part([](RegI where, RegF x, RegF y) { return (RegF)((where & (RegI)x) | (~where & (RegI)y)); }, m, yes, no);
}
inline VecF where(Mask m, VecF x) { return by_part([](RegI where, RegF y) { return (RegF)(where & (RegI)y); }, m, x); }
inline VecF subtract_where(Mask m, VecF a, VecF b) { return a - where(m, b); }
inline void add_where(VecF& sum, Mask m, VecF x) { sum += where(m, x); }
inline void count_where(VecI& n, Mask m) { n = n - m; }

#endif

// min(max(v, low), high), a NaN staying one: SSE's max and min return their second operand for it.
inline VecF clamp(VecF v, VecF low, VecF high) {
  return by_part(
      [](RegF x, RegF from, RegF to) {
#if defined(__AVX512F__)
        return (RegF)_mm512_min_ps((__m512)to, _mm512_max_ps((__m512)from, (__m512)x));
#elif defined(__AVX2__)
        return (RegF)_mm256_min_ps((__m256)to, _mm256_max_ps((__m256)from, (__m256)x));
#elif defined(__SSE2__)
        return (RegF)_mm_min_ps((__m128)to, _mm_max_ps((__m128)from, (__m128)x));
#else
        x = x < from ? from : x;
        return x > to ? to : x;
#endif
      },
      v, low, high);
}

// The integers of whole floats; 0 for a negative one and for a NaN.
inline VecI to_slot(VecF t) {
  return by_part(
      [](RegF x) {
#if defined(__AVX512F__)
        return (RegI)_mm512_cvttps_epi32(_mm512_max_ps((__m512)x, _mm512_setzero_ps()));
#else
        return __builtin_convertvector((RegF)((RegI)x & (RegI)(x > 0.f)), RegI);
#endif
      },
      t);
}

#if defined(__AVX512F__)
// The entry k % 32 of table[first, first + 32), or by further bits of k of one of the `count` entries from there on.
template <int count>
inline __m512 permuted(const float* table, __m512i k) {
  if constexpr (count == 32) {
    return _mm512_permutex2var_ps(_mm512_load_ps(table), k, _mm512_load_ps(table + 16));
  } else {
    const __mmask16 upper = _mm512_test_epi32_mask(k, _mm512_set1_epi32(count / 2));
    return _mm512_mask_blend_ps(upper, permuted<count / 2>(table, k), permuted<count / 2>(table + count / 2, k));
  }
}
#endif

// table[slot]; the table has room for a power of two of entries, 16 at least, and is aligned to 64 bytes.
inline VecF lookup(const float* table, int levels, VecI slot) {
#if defined(__AVX512F__)
  // Permutations: a gather takes nearly twice as long for 256 entries (benchmarks/NOTES.md).
  const __m512i k = (__m512i)slot.part[0];
  if (levels <= 16) return vec(_mm512_permutexvar_ps(k, _mm512_load_ps(table)));
  if (levels <= 64) return vec(permuted<64>(table, k));
  return vec(permuted<256>(table, k));
#elif defined(__AVX2__)
  return by_part(
      [table, levels](RegI part) {
        const __m256i k = (__m256i)part;
        if (levels > 16) return (RegF)_mm256_i32gather_ps(table, k, 4);
        const __m256 low = _mm256_permutevar8x32_ps(_mm256_load_ps(table), k);
        const __m256 high = _mm256_permutevar8x32_ps(_mm256_load_ps(table + 8), k);
        return (RegF)_mm256_blendv_ps(low, high, _mm256_castsi256_ps(_mm256_slli_epi32(k, 28)));  // by bit 3 of k
      },
      slot);
#else
  (void)levels;
  int32_t k[kLanes];
  std::memcpy(k, &slot, sizeof k);
  VecF t;
  float each[kLanes];
  for (int j = 0; j < kLanes; ++j) each[j] = table[k[j]];
  std::memcpy(&t, each, sizeof t);
  return t;
#endif
}

// A half of a register as doubles; by registers alone, or the sums that pass through here would live in memory.
template <int half>
inline RegD widen(RegF x) {
#if defined(__AVX512F__)
  return (RegD)_mm512_cvtps_pd(half ? _mm512_extractf32x8_ps((__m512)x, 1) : _mm512_castps512_ps256((__m512)x));
#elif defined(__AVX2__)
  return (RegD)_mm256_cvtps_pd(half ? _mm256_extractf128_ps((__m256)x, 1) : _mm256_castps256_ps128((__m256)x));
#elif defined(__SSE2__)
  return (RegD)_mm_cvtps_pd(half ? _mm_movehl_ps((__m128)x, (__m128)x) : (__m128)x);
#else
  return RegD{double(x[2 * half]), double(x[2 * half + 1])};
#endif
}

inline void add_to(VecD& sum, VecF x) {
#pragma GCC unroll 4
  for (int i = 0; i < kLanes / kWidth; ++i) {
    sum.part[2 * i] += widen<0>(x.part[i]);
    sum.part[2 * i + 1] += widen<1>(x.part[i]);
  }
}

inline double sum_lanes(const VecD& v) {
  double lane[kLanes], s = 0;
  std::memcpy(lane, &v, sizeof lane);
  for (int j = 0; j < kLanes; ++j) s += lane[j];
  return s;
}

inline int64_t sum_lanes(const VecI& v) {
  int32_t lane[kLanes];
  std::memcpy(lane, &v, sizeof lane);
  int64_t s = 0;
  for (int j = 0; j < kLanes; ++j) s += lane[j];
  return s;
}

}  // namespace
}  // namespace qbr::cpu
