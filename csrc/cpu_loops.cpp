// The loops of the CPU kernels. Compiled once per instruction set (QBR_ISA names the table it defines), with the same
// results: elementwise loops are left to the vectorizer, sums run in 16 lanes of our own on every instruction set.
// Everything here has internal linkage, so that no AVX-512 copy of a function can end up in the baseline.
#include "cpu_loops.h"

#include <cstring>

#include "cpu_chunk.h"

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace qbr::cpu {
namespace {

// The three forms of y and b; each instantiation knows its own at compile time.
enum class Form { plain, binary, relu };

Form form_of(const Quant& q) { return q.binary ? Form::binary : q.relu ? Form::relu : Form::plain; }

// What one element comes to.
struct Element {
  float v, c, b, bs, d;  // y / s; the code, NaN's being qn; the code or NaN; b * s; y - b * s
};

template <Form form>
inline Element quantize(float x, float s, Quant q) {
  q.binary = form == Form::binary;
  float y = form == Form::relu ? relu_clip(x, q.clip) : x;
  Element e;
  e.v = y / s;
  e.c = code(e.v, q);
  e.b = e.v != e.v ? e.v : e.c;
  e.bs = e.b * s;
  e.d = y - e.bs;
  return e;
}

// ---- forward -------------------------------------------------------------------------------------------------------

template <Form form, bool uniform, bool with_xhat, bool with_bins>
void quantize_chunk(const float* x, const Steps& steps, Quant q, int n, float* __restrict xhat, float* __restrict codes,
                    float* __restrict d) {
  const float step = steps.step;
  const float* __restrict each = steps.each;
#pragma omp simd
  for (int i = 0; i < n; ++i) {
    Element e = quantize<form>(x[i], uniform ? step : each[i], q);
    if (with_xhat) xhat[i] = e.bs;
    if (with_bins) codes[i] = e.c, d[i] = e.d;
  }
}

using QuantizeChunk = void (*)(const float*, const Steps&, Quant, int, float*, float*, float*);

template <bool uniform, bool with_xhat, bool with_bins>
QuantizeChunk quantize_chunk_of(Form form) {
  return form == Form::plain    ? quantize_chunk<Form::plain, uniform, with_xhat, with_bins>
         : form == Form::binary ? quantize_chunk<Form::binary, uniform, with_xhat, with_bins>
                                : quantize_chunk<Form::relu, uniform, with_xhat, with_bins>;
}

template <bool uniform>
QuantizeChunk quantize_chunk_of(Form form, bool with_xhat, bool with_bins) {
  return !with_bins  ? quantize_chunk_of<uniform, true, false>(form)
         : with_xhat ? quantize_chunk_of<uniform, true, true>(form)
                     : quantize_chunk_of<uniform, false, true>(form);
}

// The bin sums of a task. Up to 16 levels one masked pass for every four of them; beyond, a table.
class BinSums {
 public:
  BinSums(const Quant& q, int levels) : qn_(q.qn), levels_(levels), masked_(levels <= kMasked) {}

  // codes and d hold n elements and room for a vector more; the room is overwritten.
  void add(float* codes, float* d, const Steps& steps, int n) {
    const int padded = (n + kLanes - 1) / kLanes * kLanes;
    for (int i = n; i < padded; ++i) codes[i] = __builtin_nanf(""), d[i] = 0.f;  // in no bin
    if (masked_) {
      for (int first = 0; first < levels_; first += kGroup) add_masked(codes, d, first, padded);
    } else {
      add_scattered(codes, d, n);
    }
    add_distances(d, steps, n, padded);
  }

  void write(double* row) const {
    for (int k = 0; k < levels_; ++k) {
      double n = 0, s = 0, q = 0;
      if (masked_) {
        for (int j = 0; j < kLanes; ++j) n += counts_[k][j];
        s = sum_lanes(sums_[k]);
        q = sum_lanes(squares_[k]);
      } else {
        for (int way = 0; way < kWays; ++way) {
          n += scattered_n_[way][k];
          s += scattered_[way][k][0];
          q += scattered_[way][k][1];
        }
      }
      row[k] = n;
      row[levels_ + k] = s;
      row[2 * levels_ + k] = q;
    }
    row[3 * levels_] = sum_lanes(distance_);
    double near = 0;
    for (int j = 0; j < kLanes; ++j) near += near_[j];
    row[3 * levels_ + 1] = near - near_padding_;
  }

 private:
  static constexpr int kMasked = 16, kGroup = 4;
  static constexpr int kWays = 4;  // neighbours often share a bin: four tables, so that they need not wait for it

  void add_masked(const float* codes, const float* d, int first, int padded) {
    VecF s[kGroup] = {}, q[kGroup] = {};
    VecI n[kGroup] = {};
    const float k = qn_ + float(first);
    for (int i = 0; i < padded; i += kLanes) {
      const VecF c = load(codes + i), x = load(d + i), xx = x * x;
#pragma GCC unroll 4
      for (int j = 0; j < kGroup; ++j) {
        const VecI in_bin = c == k + float(j);
        s[j] = in_bin ? s[j] + x : s[j];
        q[j] = in_bin ? q[j] + xx : q[j];
        n[j] -= in_bin;
      }
    }
    for (int j = 0; j < kGroup; ++j) {
      sums_[first + j] += __builtin_convertvector(s[j], VecD);
      squares_[first + j] += __builtin_convertvector(q[j], VecD);
      counts_[first + j] += n[j];
    }
  }

  void add_scattered(const float* codes, const float* d, int n) {
    for (int i = 0; i < n; ++i) {
      const int way = i % kWays, k = int(codes[i] - qn_);
      const double x = d[i];
      scattered_[way][k] += Pair{x, x * x};
      ++scattered_n_[way][k];
    }
  }

  void add_distances(const float* d, const Steps& steps, int n, int padded) {
    VecF sum = {};
    VecI near = {};
    const VecF zero = {};
    const float limit = 0.01f * steps.step;
    for (int i = 0; i < padded; i += kLanes) {
      VecF x = load(d + i);
      x = x < zero ? -x : x;
      sum += x;
      near -= x < (steps.uniform ? zero + limit : 0.01f * load(steps.each + i));
    }
    for (int i = n; i < padded; ++i) near_padding_ += 0.f < (steps.uniform ? limit : 0.01f * steps.each[i]);
    distance_ += __builtin_convertvector(sum, VecD);
    near_ += near;
  }

  float qn_;
  int levels_;
  bool masked_;
  double near_padding_ = 0;  // places of the padding that were counted as near
  VecD distance_ = {};
  VecI near_ = {};
  VecD sums_[kMasked] = {}, squares_[kMasked] = {};
  VecI counts_[kMasked] = {};
  Pair scattered_[kWays][kMaxLevels] = {};
  uint32_t scattered_n_[kWays][kMaxLevels] = {};
};

void forward(const Input& in, Range range, void* xhat, double* bins) {
  alignas(64) float x_buffer[kPadded], xhat_buffer[kPadded], codes[kPadded], d[kPadded];
  Steps steps = {};
  BinSums sums(in.quant, in.levels);
  const Form form = form_of(in.quant);
  const QuantizeChunk one_step = quantize_chunk_of<true>(form, xhat, bins);
  const QuantizeChunk a_step_each = quantize_chunk_of<false>(form, xhat, bins);
  for (int64_t first = range.begin; first < range.end; first += kChunk) {
    const int n = int(first + kChunk < range.end ? kChunk : range.end - first);
    steps.set(in, first, n);
    const float* x = load_chunk(in.dtype, in.x, first, n, x_buffer);
    float* y = xhat ? result_chunk(in.dtype, xhat, first, xhat_buffer) : nullptr;
    (steps.uniform ? one_step : a_step_each)(x, steps, in.quant, n, y, codes, d);
    if (xhat) store_chunk(in.dtype, xhat, first, n, y);
    if (bins) sums.add(codes, d, steps, n);
  }
  if (bins) sums.write(bins);
}

// ---- backward ------------------------------------------------------------------------------------------------------

// A chunk's intermediate results, from the pass that divides to the pass that writes dx.
struct Partial {
  alignas(64) float x[kPadded], g[kPadded], dx[kPadded];
  alignas(64) float d[kPadded], task[kPadded], pull[kPadded], to_step[kPadded];
  alignas(64) int32_t slot[kPadded];
};

// task = g * in, to_step = g * (b - v * in), slot and d.
template <Form form, bool uniform, bool with_g, bool with_table>
void differentiate_chunk(const float* x, const float* g, const Steps& steps, Quant q, int n, Partial& p) {
  const float step = steps.step;
  const float* __restrict each = steps.each;
  float* __restrict task = p.task;
  float* __restrict to_step = p.to_step;
  float* __restrict d = p.d;
  int32_t* __restrict slot = p.slot;
#pragma omp simd
  for (int i = 0; i < n; ++i) {
    Element e = quantize<form>(x[i], uniform ? step : each[i], q);
    if (with_g) {
      const float in = e.v != e.v ? e.v : inside(e.v, q) ? 1.f : 0.f;
      const float v_inside = in == 0.f ? 0.f : e.v;  // an infinite v is outside, and 0 * inf would be a NaN
      task[i] = g[i] * in;
      to_step[i] = g[i] * (e.b - v_inside);
    }
    if (with_table) slot[i] = int32_t(e.c - q.qn), d[i] = e.d;
  }
}

using DifferentiateChunk = void (*)(const float*, const float*, const Steps&, Quant, int, Partial&);

template <bool uniform, bool with_g, bool with_table>
DifferentiateChunk differentiate_chunk_of(Form form) {
  return form == Form::plain    ? differentiate_chunk<Form::plain, uniform, with_g, with_table>
         : form == Form::binary ? differentiate_chunk<Form::binary, uniform, with_g, with_table>
                                : differentiate_chunk<Form::relu, uniform, with_g, with_table>;
}

template <bool uniform>
DifferentiateChunk differentiate_chunk_of(Form form, bool with_g, bool with_table) {
  return !with_table ? differentiate_chunk_of<uniform, true, false>(form)
         : with_g    ? differentiate_chunk_of<uniform, true, true>(form)
                     : differentiate_chunk_of<uniform, false, true>(form);
}

// pull = table[slot] * d; the table has room for 16 entries at least.
void pull_chunk(const float* table, int levels, int n, Partial& p) {
  int i = 0;
#if defined(__AVX512F__)
  const __m512 low = _mm512_loadu_ps(table);
  for (; i < n; i += 16) {
    const __m512i k = _mm512_load_si512(p.slot + i);
    const __m512 t = levels <= 16 ? _mm512_permutexvar_ps(k, low) : _mm512_i32gather_ps(k, table, 4);
    _mm512_store_ps(p.pull + i, _mm512_mul_ps(t, _mm512_load_ps(p.d + i)));
  }
#elif defined(__AVX2__)
  const __m256 low = _mm256_loadu_ps(table), high = _mm256_loadu_ps(table + 8);
  for (; i < n; i += 8) {
    const __m256i k = _mm256_load_si256(reinterpret_cast<const __m256i*>(p.slot + i));
    __m256 t;
    if (levels <= 16) {
      const __m256 upper = _mm256_castsi256_ps(_mm256_slli_epi32(k, 28));  // bit 3 of the slot as the sign
      t = _mm256_blendv_ps(_mm256_permutevar8x32_ps(low, k), _mm256_permutevar8x32_ps(high, k), upper);
    } else {
      t = _mm256_i32gather_ps(table, k, 4);
    }
    _mm256_store_ps(p.pull + i, _mm256_mul_ps(t, _mm256_load_ps(p.d + i)));
  }
#else
  (void)levels;
  for (; i < n; ++i) p.pull[i] = table[p.slot[i]] * p.d[i];
#endif
}

template <bool relu, bool with_g, bool with_table>
void combine_chunk(const float* x, float clip, int n, const Partial& p, float* __restrict dx) {
  const float* __restrict task = p.task;
  const float* __restrict pull = p.pull;
#pragma omp simd
  for (int i = 0; i < n; ++i) {
    float dy = with_g && with_table ? task[i] + pull[i] : with_g ? task[i] : pull[i];
    if (relu) {
      const float passes = relu_mask(x[i], clip);
      dy = passes == 0.f ? 0.f : dy * passes;  // 0 even where the distance behind it is infinite
    }
    dx[i] = dy;
  }
}

using CombineChunk = void (*)(const float*, float, int, const Partial&, float*);

template <bool relu>
CombineChunk combine_chunk_of(bool with_g, bool with_table) {
  return !with_table ? combine_chunk<relu, true, false>
         : with_g    ? combine_chunk<relu, true, true>
                     : combine_chunk<relu, false, true>;
}

// The sum of n floats; whole vectors in lanes, the rest after them.
double sum_of(const float* t, int n) {
  VecF lanes = {};
  int i = 0;
  for (; i + kLanes <= n; i += kLanes) lanes += load(t + i);
  double sum = 0;
  for (int j = 0; j < kLanes; ++j) sum += lanes[j];
  for (; i < n; ++i) sum += t[i];
  return sum;
}

void add_step_sums(const float* t, const Layout& layout, const Steps& steps, int64_t first, int n, double* sums) {
  if (steps.uniform) {
    sums[steps.channel] += sum_of(t, n);
  } else if (layout.inner == 1) {
    for_each_row(layout, first, n, [&](int o, int m, int64_t c) {
      double* __restrict row = sums + c;
#pragma omp simd
      for (int i = 0; i < m; ++i) row[i] += t[o + i];
    });
  } else {
    for_each_run(layout, first, n, [&](int o, int m, int64_t c) { sums[c] += sum_of(t + o, m); });
  }
}

void backward(const Input& in, Range range, const void* grad_xhat, const float* table, void* dx, double* step_sums) {
  Partial p;
  Steps steps = {};
  std::memset(p.slot, 0, sizeof p.slot);  // what lies beyond the last element is looked up too
  if (step_sums) std::memset(step_sums, 0, sizeof(double) * in.layout.channels);
  const Form form = form_of(in.quant);
  const bool with_g = grad_xhat, with_table = table;
  const DifferentiateChunk one_step = differentiate_chunk_of<true>(form, with_g, with_table);
  const DifferentiateChunk a_step_each = differentiate_chunk_of<false>(form, with_g, with_table);
  const CombineChunk combine =
      form == Form::relu ? combine_chunk_of<true>(with_g, with_table) : combine_chunk_of<false>(with_g, with_table);
  for (int64_t first = range.begin; first < range.end; first += kChunk) {
    const int n = int(first + kChunk < range.end ? kChunk : range.end - first);
    steps.set(in, first, n);
    const float* x = load_chunk(in.dtype, in.x, first, n, p.x);
    const float* g = with_g ? load_chunk(in.dtype, grad_xhat, first, n, p.g) : nullptr;
    (steps.uniform ? one_step : a_step_each)(x, g, steps, in.quant, n, p);
    if (with_table) pull_chunk(table, in.levels, n, p);
    if (dx) {
      float* out = result_chunk(in.dtype, dx, first, p.dx);
      combine(x, in.quant.clip, n, p, out);
      store_chunk(in.dtype, dx, first, n, out);
    }
    if (step_sums) add_step_sums(with_g ? p.to_step : p.pull, in.layout, steps, first, n, step_sums);
  }
}

}  // namespace

extern const Loops QBR_ISA;
const Loops QBR_ISA = {forward, backward};

}  // namespace qbr::cpu
