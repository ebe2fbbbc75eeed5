// The scalar formulas of LSQ and bin regularization that host and device share (qbr/kernels/README.md).
#pragma once
#include <cmath>

#ifdef __CUDACC__
#define QBR_HD __host__ __device__ __forceinline__
#else
#define QBR_HD static inline  // internal: cpu_loops.cpp is compiled for several instruction sets
#endif

namespace qbr {

// The integer range and the fused ReLU of one call; clip is +inf for none.
struct Quant {
  float qn, qp;
  bool binary, relu;
  float clip;
};

// y = min(max(x, 0), clip); a NaN stays a NaN.
QBR_HD float relu_clip(float x, float clip) { return x <= 0.f ? 0.f : (x > clip ? clip : x); }

// The ReLU's gradient mask: 0 < x <= clip; NaN for a NaN.
QBR_HD float relu_mask(float x, float clip) { return x != x ? x : ((x > 0.f) & (x <= clip) ? 1.f : 0.f); }

// Round to nearest, ties to even, for |c| <= 2^22: adding 1.5 * 2^23 leaves no fraction bits.
QBR_HD float round_half_even(float c) { return (c + 12582912.f) - 12582912.f; }

// The code of v = y / alpha. A NaN gets qn, so that no index leaves a table.
QBR_HD float code(float v, const Quant& q) {
  if (q.binary) return v >= 0.f ? 1.f : -1.f;
  float c = v > q.qn ? v : q.qn;
  c = c < q.qp ? c : q.qp;
  return round_half_even(c);
}

// qn <= v <= qp, both ends included.
QBR_HD bool inside(float v, const Quant& q) { return (v >= q.qn) & (v <= q.qp); }

}  // namespace qbr
