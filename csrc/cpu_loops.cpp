// The loops of the CPU kernels. Compiled once per instruction set (QBR_ISA names the table it defines), with the same
// results: every lane does the same operations in the same order everywhere (cpu_simd.h).
// Everything here has internal linkage, so that no AVX-512 copy of a function can end up in the baseline.
#include "cpu_loops.h"

#include <cmath>
#include <cstring>
#include <optional>

#include "cpu_bins.h"
#include "cpu_chunk.h"

namespace qbr::cpu {
namespace {

// The three forms of y and b; each instantiation knows its own at compile time.
enum class Form { plain, binary, relu };

Form form_of(const Quant& q) { return q.binary ? Form::binary : q.relu ? Form::relu : Form::plain; }

template <Form form>
inline VecF activation(VecF x, const Quant& q) {
  return form == Form::relu ? clamp(x, VecF{}, all(q.clip)) : x;
}

struct Code {
  VecF c, b;  // v clamped, and rounded: the code; NaNs for a NaN
};

template <Form form>
inline Code code_of(VecF v, const Quant& q) {
  Code code;
  code.c = clamp(v, all(q.qn), all(q.qp));
  if (form == Form::binary)
    code.b = select(equal(v, v), select(less(v, VecF{}), all(-1.f), all(1.f)), v);
  else
    code.b = (code.c + 12582912.f) - 12582912.f;  // half to even: 1.5 * 2^23 leaves no fraction bits
  return code;
}

// Both loops are pipelined by hand: while they finish one vector they round the next and divide the one after that.
// A vector's way through division, rounding and lookup is longer than a core looks ahead: without this, the loops take
// about twice as long. They read up to kAhead elements beyond the chunk (load_chunk sees to it that they are there).
static_assert(kAhead == 2 * kLanes);

// ---- forward -------------------------------------------------------------------------------------------------------

template <Form form, bool uniform, Collect collect>
void forward_chunk(const float* x, const Steps& steps, const Quant& quant, int n, float* xhat, BinSums* sums) {
  const Quant q = quant;  // a copy: what is written below cannot be one of its floats
  const VecF one_step = all(steps.step);
  const auto step_at = [&](int i) { return uniform ? one_step : load(steps.each + i); };
  const auto y_at = [&](int i) { return activation<form>(load(x + i), q); };
  constexpr int kLevels = collect == Collect::four ? 4 : collect == Collect::eight || collect == Collect::sixteen ? 8 : 1;
  constexpr float kNoCode = 1e9f;
  LevelSums<kLevels> levels;
  VecF distance = {};
  VecI near = {};
  VecF y = y_at(0), next_y = y_at(kLanes);
  VecF b = code_of<form>(y / step_at(0), q).b, next_v = next_y / step_at(kLanes);
  for (int i = 0; i < n; i += kLanes) {
    const VecF last_y = y_at(i + 2 * kLanes), last_v = last_y / step_at(i + 2 * kLanes);
    const VecF next_b = code_of<form>(next_v, q).b;
    const int left = n - i;
    const bool whole = left >= kLanes;
    const VecF step = step_at(i), bs = b * step;
    VecF d = y - bs, code = b;
    y = next_y, next_y = last_y, b = next_b, next_v = last_v;
    if (whole)
      store(xhat + i, bs);
    else
      store_first(xhat + i, bs, left);
    if (collect == Collect::none) continue;
    if (!whole) {
      code = keep_first(code, left, all(collect == Collect::table ? q.qn : kNoCode));
      d = keep_first(d, left, VecF{});
    }
    VecF size = absolute(d);
    distance += size;
    if (!whole) size = keep_first(size, left, all(INFINITY));
    count_where(near, less(size, step * 0.01f));
    if (collect == Collect::table) {
      // The elements before these go into the table meanwhile: their addends are ready, these are not.
      sums->addends[i / kLanes % 2].set(d, sums->entry(to_slot(code - q.qn)));
      if (i) sums->scatter(sums->addends[1 - i / kLanes % 2], kLanes);
    } else {
      levels.template add<true>(code, d, q.qn);
      if (collect == Collect::sixteen) store(sums->codes + i, code), store(sums->distances + i, d);
    }
  }
  if (collect == Collect::none) return;
  sums->add_distances(distance, near);
  if (collect == Collect::table) {
    const int last = (n - 1) / kLanes;
    sums->scatter(sums->addends[last % 2], n - last * kLanes);
  } else {
    sums->add_levels(levels, 0);
  }
  if (collect == Collect::sixteen) {
    LevelSums<8> upper;
    for (int i = 0; i < n; i += kLanes) {
      upper.template add<false>(load(sums->codes + i), load(sums->distances + i), q.qn + 8.f);
    }
    sums->add_levels(upper, 8);
  }
}

using ForwardChunk = void (*)(const float*, const Steps&, const Quant&, int, float*, BinSums*);

template <Form form, bool uniform>
ForwardChunk forward_chunk_of(Collect collect) {
  if constexpr (form == Form::binary) {  // three slots
    return collect == Collect::none ? forward_chunk<form, uniform, Collect::none>
                                    : forward_chunk<form, uniform, Collect::four>;
  } else {
    switch (collect) {
      case Collect::none: return forward_chunk<form, uniform, Collect::none>;
      case Collect::four: return forward_chunk<form, uniform, Collect::four>;
      case Collect::eight: return forward_chunk<form, uniform, Collect::eight>;
      case Collect::sixteen: return forward_chunk<form, uniform, Collect::sixteen>;
      default: return forward_chunk<form, uniform, Collect::table>;
    }
  }
}

template <bool uniform>
ForwardChunk forward_chunk_of(const Quant& q, Collect collect) {
  const Form form = form_of(q);
  return form == Form::plain    ? forward_chunk_of<Form::plain, uniform>(collect)
         : form == Form::binary ? forward_chunk_of<Form::binary, uniform>(collect)
                                : forward_chunk_of<Form::relu, uniform>(collect);
}

void forward(const Input& in, Range range, void* xhat, double* bins) {
  alignas(64) float x_buffer[kPadded], xhat_buffer[kPadded];
  Steps steps;
  const Collect collect = bins ? collect_for(in.levels) : Collect::none;
  const ForwardChunk one_step = forward_chunk_of<true>(in.quant, collect);
  const ForwardChunk a_step_each = forward_chunk_of<false>(in.quant, collect);
  std::optional<BinSums> sums;  // up to 20 KB to clear: not for LSQ alone
  if (bins) sums.emplace(in.levels);
  for (int64_t first = range.begin; first < range.end; first += kChunk) {
    const int n = int(first + kChunk < range.end ? kChunk : range.end - first);
    steps.set(in, first, n);
    const float* x = load_chunk(in, in.x, first, n, x_buffer);
    // Where nobody wants xhat it stays in the buffer: a store costs less than a second copy of every loop.
    float* y = xhat ? result_chunk(in.dtype, xhat, first, xhat_buffer) : xhat_buffer;
    (steps.uniform ? one_step : a_step_each)(x, steps, in.quant, n, y, sums ? &*sums : nullptr);
    if (xhat) store_chunk(in.dtype, xhat, first, n, y);
  }
  if (bins) sums->write(bins);
}

// ---- backward ------------------------------------------------------------------------------------------------------

// Where a chunk's terms of the step's gradient go: by lane into one sum, or one by one.
struct StepTerms {
  VecD sum = {};
  alignas(64) float each[kPadded];
};

template <Form form, bool uniform, bool with_g, bool with_table>
void backward_chunk(const float* x, const float* g, const Steps& steps, const Input& in, const float* table, int n,
                    float* dx, StepTerms& terms) {
  const Quant q = in.quant;
  const int levels = in.levels;
  const VecF one_step = all(steps.step);
  const auto step_at = [&](int i) { return uniform ? one_step : load(steps.each + i); };
  const auto y_at = [&](int i) { return activation<form>(load(x + i), q); };
  VecF sum = {};
  VecF y = y_at(0), next_y = y_at(kLanes);
  VecF v = y / step_at(0), next_v = next_y / step_at(kLanes);
  Code code = code_of<form>(v, q);
  for (int i = 0; i < n; i += kLanes) {
    const VecF last_y = y_at(i + 2 * kLanes), last_v = last_y / step_at(i + 2 * kLanes);
    const Code next_code = code_of<form>(next_v, q);
    const int left = n - i;
    const bool whole = left >= kLanes;
    VecF dy = {}, term = {};
    if (with_g) {
      const VecF gs = load(g + i);
      const Mask inside = equal(code.c, v);
      term = gs * subtract_where(inside, code.b, v);  // an infinite v is outside: no 0 * inf
      dy = gs * select(inside, all(1.f), code.b - code.b);  // 0 outside, a NaN for a NaN
    }
    if (with_table) {
      const VecF d = y - code.b * step_at(i);
      const VecF pull = lookup(table, levels, to_slot(code.b - q.qn)) * d;
      dy = with_g ? dy + pull : pull;
      if (!with_g) term = pull;
    }
    v = next_v, next_v = last_v, y = next_y, next_y = last_y, code = next_code;
    if (uniform)
      sum += whole ? term : keep_first(term, left, VecF{});
    else
      store(terms.each + i, term);
    if (!dx) continue;
    if (form == Form::relu) {  // 0 even where the distance behind it is infinite
      const VecF xs = load(x + i);
      dy = select(above_or_nan(xs, VecF{}), select(not_above(xs, all(q.clip)), dy, VecF{}), VecF{});
    }
    if (whole)
      store(dx + i, dy);
    else
      store_first(dx + i, dy, left);
  }
  if (uniform) add_to(terms.sum, sum);
}

using BackwardChunk = void (*)(const float*, const float*, const Steps&, const Input&, const float*, int, float*,
                               StepTerms&);

template <Form form, bool uniform>
BackwardChunk backward_chunk_of(bool with_g, bool with_table) {
  return !with_table ? backward_chunk<form, uniform, true, false>
         : with_g    ? backward_chunk<form, uniform, true, true>
                     : backward_chunk<form, uniform, false, true>;
}

template <bool uniform>
BackwardChunk backward_chunk_of(const Quant& q, bool with_g, bool with_table) {
  const Form form = form_of(q);
  return form == Form::plain    ? backward_chunk_of<Form::plain, uniform>(with_g, with_table)
         : form == Form::binary ? backward_chunk_of<Form::binary, uniform>(with_g, with_table)
                                : backward_chunk_of<Form::relu, uniform>(with_g, with_table);
}

// The sum of n floats; whole vectors in lanes, the rest after them.
double sum_of(const float* t, int n) {
  VecF lanes = {};
  int i = 0;
  for (; i + kLanes <= n; i += kLanes) lanes += load(t + i);
  VecD wide = {};
  add_to(wide, lanes);
  double sum = sum_lanes(wide);
  for (; i < n; ++i) sum += t[i];
  return sum;
}

void add_step_sums(const float* t, const Layout& layout, int64_t first, int n, double* sums) {
  if (layout.inner == 1) {
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
  alignas(64) float x_buffer[kPadded], g_buffer[kPadded], dx_buffer[kPadded];
  Steps steps;
  StepTerms terms;
  if (step_sums) std::memset(step_sums, 0, sizeof(double) * in.layout.channels);
  const BackwardChunk one_step = backward_chunk_of<true>(in.quant, grad_xhat, table);
  const BackwardChunk a_step_each = backward_chunk_of<false>(in.quant, grad_xhat, table);
  int64_t channel = 0;  // whose terms.sum is
  for (int64_t first = range.begin; first < range.end; first += kChunk) {
    const int n = int(first + kChunk < range.end ? kChunk : range.end - first);
    steps.set(in, first, n);
    if (step_sums && steps.uniform && steps.channel != channel) {
      step_sums[channel] += sum_lanes(terms.sum);
      terms.sum = VecD{};
      channel = steps.channel;
    }
    const float* x = load_chunk(in, in.x, first, n, x_buffer);
    const float* g = grad_xhat ? load_chunk(in, grad_xhat, first, n, g_buffer) : nullptr;
    float* out = dx ? result_chunk(in.dtype, dx, first, dx_buffer) : nullptr;
    (steps.uniform ? one_step : a_step_each)(x, g, steps, in, table, n, out, terms);
    if (dx) store_chunk(in.dtype, dx, first, n, out);
    if (step_sums && !steps.uniform) add_step_sums(terms.each, in.layout, first, n, step_sums);
  }
  if (step_sums) step_sums[channel] += sum_lanes(terms.sum);
}

}  // namespace

extern const Loops QBR_ISA;
const Loops QBR_ISA = {forward, backward};

}  // namespace qbr::cpu
