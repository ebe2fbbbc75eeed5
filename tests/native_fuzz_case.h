// One call's inputs from a fuzzer's bytes, in buffers that end where the tensor ends, and the scalar formulas of
// qbr/kernels/README.md for each element. For native_fuzz.cpp alone.
#pragma once
#include <algorithm>
#include <array>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "../csrc/kernels.h"

using namespace qbr;

using Genome = std::array<uint8_t, 56>;  // five for the call, seventeen for each of up to three tensors
Genome current;

[[noreturn]] void fail(const char* what, double got = 0, double expected = 0) {
  std::string hex;
  for (const uint8_t byte : current) hex += "0123456789abcdef"[byte >> 4], hex += "0123456789abcdef"[byte & 15];
  std::printf("FAILED: %s: %.9g, expected %.9g\nnative_fuzz one %s\n", what, got, expected, hex.c_str());
  std::fflush(stdout);
  std::abort();
}

void check(bool holds, const char* what, double got = 0, double expected = 0) {
  if (!holds) fail(what, got, expected);
}

constexpr float kInf = std::numeric_limits<float>::infinity(), kNaN = std::numeric_limits<float>::quiet_NaN();
const float kSteps[] = {0.3f, 0.013f, 1.f, 3e-5f, 40.f, 0.f, -0.f, -0.3f, 1e-42f, 1e-38f, 3e38f, kInf, -kInf, kNaN};
const float kClips[] = {kInf, 1.f, 2.5f, 0.f, 1e-41f, 6.f, -1.f, kNaN};
const int64_t kSizes[] = {1,  3,  15,  16,   17,   31,   33,   47,   63,   64,
                          65, 95, 100, 1023, 1024, 1025, 1040, 1071, 2049, 4097};

struct Reader {
  const uint8_t* at;
  uint32_t operator()(uint32_t below) { return *at++ % below; }
};

// Memory of exactly so many bytes behind `offset` others, which nobody may change.
struct Buffer {
  size_t offset, bytes;
  std::unique_ptr<char[]> memory;
  Buffer(size_t count, size_t size, size_t skipped) : offset(skipped * size), bytes(count * size) {
    memory.reset(new char[offset + bytes]);
    std::memset(memory.get(), 0xa5, offset + bytes);
  }
  template <class T = char>
  T* data() {
    return reinterpret_cast<T*>(memory.get() + offset);
  }
  void check_prefix() const {
    for (size_t i = 0; i < offset; ++i) check(uint8_t(memory[i]) == 0xa5, "a write before the tensor");
  }
};

float half_to_float(uint16_t h) {
  _Float16 f;
  std::memcpy(&f, &h, 2);
  return float(f);
}

uint16_t float_to_half(float f) {
  const _Float16 h = _Float16(f);
  uint16_t bits;
  std::memcpy(&bits, &h, 2);
  return bits;
}

float get(DType dtype, const void* data, int64_t i) {
  if (dtype == DType::f32) return static_cast<const float*>(data)[i];
  const uint16_t h = static_cast<const uint16_t*>(data)[i];
  if (dtype == DType::f16) return half_to_float(h);
  const uint32_t bits = uint32_t(h) << 16;
  float f;
  std::memcpy(&f, &bits, 4);
  return f;
}

// f rounded to the dtype, to the nearest and from ties to even.
uint16_t rounded_bits(DType dtype, float f) {
  if (dtype == DType::f16) return float_to_half(f);
  uint32_t bits;
  std::memcpy(&bits, &f, 4);
  if (std::isnan(f)) return 0x7fc0;
  const uint32_t below = bits & 0xffff, upper = bits >> 16;
  return uint16_t(upper + (below > 0x8000 || (below == 0x8000 && (upper & 1))));
}

void put(DType dtype, void* data, int64_t i, float f) {
  if (dtype == DType::f32)
    static_cast<float*>(data)[i] = f;
  else
    static_cast<uint16_t*>(data)[i] = rounded_bits(dtype, f);
}

float rounded(DType dtype, float f) {
  if (dtype == DType::f32) return f;
  const uint16_t bits = rounded_bits(dtype, f);
  return get(dtype, &bits, 0);
}

bool same(float a, float b) { return a == b || (std::isnan(a) && std::isnan(b)); }

// One tensor of a call, its buffers, and what formulas say of it.
struct Tensor {
  Item item{};
  int levels;
  bool plain_clip;  // one that the ops' checks let pass: the formulas have no word on others
  std::vector<Buffer> buffers;
  std::vector<float> code, v, y, d, alpha_of;  // each element's
  std::vector<int> slot;

  void* buffer(int64_t count, size_t size, size_t skipped = 0) {
    buffers.emplace_back(count, size, skipped);
    return buffers.back().data();
  }

  explicit Tensor(Reader read) {
    item.dtype = DType(read(3));
    const uint32_t kind = read(12), bits = 1 + read(8), sign = read(2);
    Quant& q = item.quant;
    const float half = float(1 << (bits - 1));
    q.qn = sign ? -half : 0, q.qp = sign ? half - 1 : 2 * half - 1;
    if (kind == 0) q.qn = -1, q.qp = 1, q.binary = true;
    if (kind == 1) q.qn = -1, q.qp = 1;
    if (kind == 2) q.qn = q.qp = float(int(bits) - 4);
    if (kind == 3) q.qp = 4194304.f, q.qn = q.qp - 2 * half + 1;
    if (kind == 4) q.qn = -4194304.f, q.qp = q.qn + 2 * half - 1;
    levels = int(q.qp - q.qn) + 1;
    const uint32_t relu = read(4), clip = read(24);
    q.relu = !q.binary && relu == 0;
    q.clip = kClips[clip < 8 ? clip : clip % 3];
    plain_clip = q.clip >= 0;

    const uint32_t geometry = read(8), size = read(24), many = read(256), more = read(256);
    int64_t numel = size < 20 ? kSizes[size] : size == 20 ? 0 : size == 21 ? 33000 + 97 * many : 1 + many * 19 + more;
    int64_t channels = 1, inner = std::max<int64_t>(numel, 1);
    if (geometry >= 3) {
      const int64_t inners[] = {1, 1 + more % 9, 1024 + more, 16 * (1 + more % 4), 1 + more * 5};
      inner = inners[geometry - 3];
      channels = 1 + (geometry == 3 ? many + more : geometry == 5 ? many % 4 : many % 80);
      channels = std::min(channels, std::max<int64_t>(1, 4096 / inner));
      if (size == 20 && many % 2) channels = 0;
      numel = channels ? std::max<int64_t>(numel / (channels * inner), size == 20 ? 0 : 1) * channels * inner : 0;
      if (channels == 1) inner = std::max<int64_t>(numel, 1);
    }
    item.layout = {numel, channels, inner};
    const uint32_t offset = read(8), step = read(32), content = read(256), seed = read(256), seed2 = read(256);
    const uint32_t to = read(3);
    const size_t width = item.dtype == DType::f32 ? 4 : 2;
    buffers.reserve(12);

    std::minstd_rand random(1 + seed + 256 * seed2);
    const auto uniform = [&] { return float(random() % 65536) / 65536.f; };
    float* alpha = static_cast<float*>(buffer(channels, 4));
    const float base = kSteps[step < 14 ? step : step % 5];
    for (int64_t c = 0; c < channels; ++c) {
      alpha[c] = base * (1.f + float(c % 7) / 8.f);
      if (content & 64 && random() % 16 == 0) alpha[c] = kSteps[random() % 14];
    }
    item.alpha = alpha;
    void* x = buffer(numel, width, offset);
    void* g = buffer(numel, width, offset / 2);
    const float around = std::isfinite(base) && base != 0 ? base : 1.f;
    const float middle = (q.qn + q.qp) / 2, span = (q.qp - q.qn) / 2 + 2;
    for (int64_t i = 0; i < numel; ++i) {
      const uint32_t what = random() % 64;
      float f = (middle + span * (2 * uniform() - 1)) * around;
      if (content & 1 && what < 12) f = (middle + std::floor(span * (2 * uniform() - 1)) + 0.5f) * around;  // ties
      if (content & 2 && what < 4) f = what == 0 ? kNaN : what == 1 ? kInf : what == 2 ? -kInf : 3e38f;
      if (content & 4 && what < 20) f = what < 7 ? 0.f : what < 13 ? -0.f : 1e-41f;
      if (content & 8) f = middle * around;  // all in one bin
      put(item.dtype, x, i, f);
      put(item.dtype, g, i, content & 16 && what > 61 ? (what == 62 ? kInf : kNaN) : 2 * uniform() - 1);
      if (content & 32 && width == 2) static_cast<uint16_t*>(x)[i] = uint16_t(random() >> 8);  // any bits
    }
    item.x = x, item.grad_xhat = g, item.grad_scale = content & 128 ? 0.f : 0.37f;
    item.xhat = buffer(numel, width, to), item.dx = buffer(numel, width, 2 * to);
    item.loss = static_cast<float*>(buffer(1, 4)), item.bins = static_cast<double*>(buffer(3 * levels + 2, 8));
    item.dloss_dalpha = static_cast<float*>(buffer(channels, 4));
    item.dalpha = static_cast<float*>(buffer(channels, 4));
    float* grad_loss = static_cast<float*>(buffer(1, 4));
    *grad_loss = content % 5 == 0 ? kSteps[seed % 14] : 0.5f;
    item.grad_loss = grad_loss;
    if (plain_clip) quantize();
  }

  // The forward formulas, an element at a time.
  void quantize() {
    const Quant& q = item.quant;
    const Layout& t = item.layout;
    for (int64_t i = 0; i < t.numel; ++i) {
      const float a = item.alpha[i / t.inner % t.channels];
      float f = get(item.dtype, item.x, i);
      if (q.relu && !std::isnan(f)) f = std::min(std::max(f, 0.f), q.clip);
      const float w = f / a;
      const float c = std::isnan(w) ? w : std::min(std::max(w, q.qn), q.qp);
      const float b = std::isnan(w) ? w : q.binary ? (w < 0 ? -1.f : 1.f) : std::nearbyint(c);
      const float bs = b * a;
      alpha_of.push_back(a), y.push_back(f), v.push_back(w), code.push_back(b), d.push_back(f - bs);
      slot.push_back(std::isnan(b) ? 0 : int(b - q.qn));
    }
  }

  bool inside(int64_t i) const { return v[i] >= item.quant.qn && v[i] <= item.quant.qp; }

  float through_relu(int64_t i, float dy) const {
    const float x = get(item.dtype, item.x, i);
    return item.quant.relu && (x <= 0 || x > item.quant.clip) ? 0.f : dy;
  }

  void check_xhat() const {
    if (!plain_clip) return;
    for (int64_t i = 0; i < item.layout.numel; ++i) {
      const float got = get(item.dtype, item.xhat, i), expected = rounded(item.dtype, code[i] * alpha_of[i]);
      check(same(got, expected), "xhat", got, expected);
    }
  }

  void check_prefixes() const {
    for (const Buffer& each : buffers) each.check_prefix();
  }
};
