// A chunk of the CPU loops: the three storage types, and each element's step.
// For cpu_loops.cpp alone; internal linkage, for the reason given there.
#pragma once
#include <cstdint>
#include <cstring>

#include "cpu_loops.h"
#include "cpu_simd.h"

namespace qbr::cpu {
namespace {

constexpr int kAhead = 2 * kLanes;  // elements that the loops read beyond the chunk's last vector
constexpr int kPadded = kChunk + kLanes + kAhead;

// ---- storage types -------------------------------------------------------------------------------------------------

inline float from_bits(uint32_t u) {
  float f;
  std::memcpy(&f, &u, 4);
  return f;
}

inline uint32_t to_bits(float f) {
  uint32_t u;
  std::memcpy(&u, &f, 4);
  return u;
}

struct BF16 {
  static float load(uint16_t h) { return from_bits(uint32_t(h) << 16); }
  static uint16_t store(float f) {
    uint32_t u = to_bits(f);
    uint32_t rounded = (u + 0x7fff + ((u >> 16) & 1)) >> 16;  // nearest, ties to even
    return uint16_t((u & 0x7fffffff) > 0x7f800000 ? 0x7fc0 : rounded);
  }
#if defined(__AVX512F__)
  static __m512 load(__m256i h) { return (__m512)_mm512_slli_epi32(_mm512_cvtepu16_epi32(h), 16); }
  static __m256i store(__m512 f) {
    const __m512i u = (__m512i)f, odd = _mm512_and_si512(_mm512_srli_epi32(u, 16), _mm512_set1_epi32(1));
    const __m512i rounded = _mm512_srli_epi32(_mm512_add_epi32(_mm512_add_epi32(u, _mm512_set1_epi32(0x7fff)), odd), 16);
    const __mmask16 nan = _mm512_cmp_ps_mask(f, f, _CMP_UNORD_Q);
    return _mm512_cvtepi32_epi16(_mm512_mask_mov_epi32(rounded, nan, _mm512_set1_epi32(0x7fc0)));
  }
#endif
};

struct F16 {
  static float load(uint16_t h) {
    uint32_t magnitude = h & 0x7fff, exponent = h & 0x7c00;
    uint32_t normal = (magnitude << 13) + (112u << 23);
    if (exponent == 0x7c00) normal += 112u << 23;  // infinity and NaN
    // A subnormal is its integer times 2^-24: no subnormal float takes part, flushed to zero or not.
    uint32_t subnormal = to_bits(float(int32_t(magnitude)) * 0x1p-24f);
    return from_bits((exponent == 0 ? subnormal : normal) | uint32_t(h & 0x8000) << 16);
  }
  static uint16_t store(float f) {
    uint32_t u = to_bits(f), a = u & 0x7fffffff;
    uint32_t normal = (a - (112u << 23) + 0xfff + ((a >> 13) & 1)) >> 13;
    uint32_t subnormal = to_bits(from_bits(a) + 0.5f) - 0x3f000000;  // 0.5 has the spacing of half's subnormals
    uint32_t h = a < 0x38800000 ? subnormal : normal;
    h = a >= 0x47800000 ? 0x7c00 : h;
    h = a > 0x7f800000 ? 0x7e00 : h;
    return uint16_t(h | (u >> 16 & 0x8000));
  }
#if defined(__AVX512F__)
  static __m512 load(__m256i h) { return _mm512_cvtph_ps(h); }
  static __m256i store(__m512 f) { return _mm512_cvtps_ph(f, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
#endif
};

// n values of Half as floats and back; the last few, and all without AVX-512, one by one.
template <class Half>
void load_halves(const uint16_t* __restrict h, int n, float* __restrict f) {
  int i = 0;
#if defined(__AVX512F__)
  for (; i + kLanes <= n; i += kLanes) _mm512_storeu_ps(f + i, Half::load(_mm256_loadu_si256((const __m256i*)(h + i))));
#endif
#pragma omp simd
  for (int j = i; j < n; ++j) f[j] = Half::load(h[j]);
}

template <class Half>
void store_halves(const float* __restrict f, int n, uint16_t* __restrict h) {
  int i = 0;
#if defined(__AVX512F__)
  for (; i + kLanes <= n; i += kLanes) _mm256_storeu_si256((__m256i*)(h + i), Half::store(_mm512_loadu_ps(f + i)));
#endif
#pragma omp simd
  for (int j = i; j < n; ++j) h[j] = Half::store(f[j]);
}

// n elements from `first` on as floats, readable up to the end of the vector kAhead beyond them: where they lie if those
// are elements too, else in `buffer`, with zeros behind them.
const float* load_chunk(const Input& in, const void* data, int64_t first, int n, float* __restrict buffer) {
  if (in.dtype == DType::f32) {
    const float* lying = static_cast<const float*>(data) + first;
    if (first + n + kLanes + kAhead <= in.layout.numel) return lying;
    std::memcpy(buffer, lying, sizeof(float) * n);
  } else {
    const uint16_t* __restrict h = static_cast<const uint16_t*>(data) + first;
    in.dtype == DType::bf16 ? load_halves<BF16>(h, n, buffer) : load_halves<F16>(h, n, buffer);
  }
  std::memset(buffer + n, 0, sizeof(float) * (kLanes + kAhead));
  return buffer;
}

// Where results are to be written as floats, and store_chunk, which takes them from there.
float* result_chunk(DType dtype, void* data, int64_t first, float* buffer) {
  return dtype == DType::f32 ? static_cast<float*>(data) + first : buffer;
}

void store_chunk(DType dtype, void* data, int64_t first, int n, const float* __restrict buffer) {
  if (dtype == DType::f32) return;
  uint16_t* __restrict h = static_cast<uint16_t*>(data) + first;
  dtype == DType::bf16 ? store_halves<BF16>(buffer, n, h) : store_halves<F16>(buffer, n, h);
}

// ---- steps ---------------------------------------------------------------------------------------------------------

// The runs of equal step that a chunk covers: visit(offset in the chunk, length, channel).
template <class Visit>
inline void for_each_run(const Layout& layout, int64_t first, int n, Visit visit) {
  int64_t run = first / layout.inner, channel = run % layout.channels;
  int64_t length = (run + 1) * layout.inner - first;
  for (int o = 0; o < n;) {
    int m = length < n - o ? int(length) : n - o;
    visit(o, m, channel);
    o += m;
    length = layout.inner;
    if (++channel == layout.channels) channel = 0;
  }
}

// inner = 1: the runs of successive channels: visit(offset in the chunk, length, first channel).
template <class Visit>
inline void for_each_row(const Layout& layout, int64_t first, int n, Visit visit) {
  int64_t channel = first % layout.channels;
  for (int o = 0; o < n;) {
    int64_t left = layout.channels - channel;
    int m = left < n - o ? int(left) : n - o;
    visit(o, m, channel);
    o += m;
    channel = 0;
  }
}

// A chunk's steps: one for all of it, or one for each element.
struct Steps {
  bool uniform;
  int64_t channel;
  float step;
  alignas(64) float each[kPadded] = {};  // what lies beyond the last element is read, too

  void set(const Input& in, int64_t first, int n) {
    const Layout& layout = in.layout;
    int64_t run = layout.channels == 1 ? 0 : first / layout.inner;
    uniform = layout.channels == 1 || first + n <= (run + 1) * layout.inner;
    channel = layout.channels == 1 ? 0 : run % layout.channels;
    step = in.alpha[channel];
    if (uniform) return;
    if (layout.inner == 1) {
      for_each_row(layout, first, n, [&](int o, int m, int64_t c) { std::memcpy(each + o, in.alpha + c, 4 * m); });
    } else {
      for_each_run(layout, first, n, [&](int o, int m, int64_t c) {
        float a = in.alpha[c];
        for (int i = 0; i < m; ++i) each[o + i] = a;
      });
    }
  }
};

}  // namespace
}  // namespace qbr::cpu
