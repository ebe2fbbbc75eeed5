// csrc's CPU kernels without torch, under sanitizers: benchmarks/sanitize.py builds it. Every call's buffers end where
// the tensor ends, its results are held against scalar formulas, and what a fuzzer keeps is what reached new code.
//
//     native_fuzz matrix EVERY       dtypes x ranges x geometries x ops, hostile steps; every so-manieth call; prints a
//                                    digest of the results
//     native_fuzz fuzz SEED COUNT    so many executions, guided by edges where csrc has -fsanitize-coverage=trace-pc
//     native_fuzz one HEX            one execution, as a failure names it
#include <chrono>

#include "native_fuzz_case.h"

// What cpu.cpp asks of torch: its tasks are taken by whoever calls, so one caller does them all.
extern "C" int32_t torch_parallel_for(int64_t begin, int64_t end, int64_t, void (*work)(int64_t, int64_t, void*),
                                      void* context) {
  if (begin < end) work(begin, end, context);
  return 0;
}

// ---- what was reached ----------------------------------------------------------------------------------------------

namespace coverage {
constexpr size_t kEdges = 1 << 20;
extern "C" char __executable_start, etext;
std::vector<uint8_t> blocks;  // by address
std::vector<uint8_t> hits(kEdges), seen(kEdges);  // this execution's; the buckets of hit counts that any had
std::vector<uint32_t> touched;
uintptr_t previous = 0;

uint8_t bucket(uint8_t n) {
  return n < 4 ? uint8_t(1 << (n - 1)) : n < 8 ? 8 : n < 16 ? 16 : n < 32 ? 32 : n < 128 ? 64 : 128;
}

bool news() {  // and forgets the execution
  bool found = false;
  for (const uint32_t edge : touched) {
    const uint8_t b = bucket(hits[edge]);
    found |= !(seen[edge] & b);
    seen[edge] |= b, hits[edge] = 0;
  }
  touched.clear(), previous = 0;
  return found;
}
}  // namespace coverage

extern "C" void __sanitizer_cov_trace_pc() {
  using namespace coverage;
  if (blocks.empty()) return;
  const uintptr_t block = uintptr_t(__builtin_return_address(0)) - uintptr_t(&__executable_start);
  blocks[block] = 1;
  const uint32_t edge = uint32_t((block * 0x9E3779B97F4A7C15u ^ previous * 0xC2B2AE3D27D4EB4Fu) >> 40) % kEdges;
  if (!hits[edge]) touched.push_back(edge);
  if (hits[edge] < 255) ++hits[edge];
  previous = block;
}

// ---- what results are held against --------------------------------------------------------------------------

// A sum of floats in any order, and of as many in one of them as csrc adds up before it widens.
struct Sum {
  double sum = 0, size = 0;
  void add(double term) { sum += term, size += std::abs(term); }
  void check_is(double got, const char* what, double factor = 1) const {
    if (size * std::abs(factor) < 1e30)  // beyond, or where a term is not finite, floats overflow at will
      check(std::abs(got - sum * factor) <= 1.3e-4 * size * std::abs(factor) + 1e-36, what, got, sum * factor);
  }
};

void check_bins(const Tensor& t, bool with_alpha) {
  const double* bins = t.item.bins;
  const int levels = t.levels;
  const int64_t numel = t.item.layout.numel, channels = t.item.layout.channels;
  double counted = 0;
  for (int k = 0; k < levels; ++k) check(bins[k] >= 0, "a count below 0", bins[k]), counted += bins[k];
  check(counted == double(numel), "the sum of the counts", counted, double(numel));
  check(!(*t.item.loss < 0), "a loss below 0", *t.item.loss);
  if (!t.plain_clip) return;
  std::vector<int64_t> n(levels);
  std::vector<Sum> s(levels), squares(levels);
  Sum distance;
  int64_t near = 0;
  for (int64_t i = 0; i < numel; ++i) {
    const int k = t.slot[i];
    const float square = t.d[i] * t.d[i];
    ++n[k], s[k].add(t.d[i]), squares[k].add(square), distance.add(std::abs(t.d[i]));
    near += std::abs(t.d[i]) < t.alpha_of[i] * 0.01f;
  }
  Sum loss;
  bool finite = true;
  for (int k = 0; k < levels; ++k) {
    check(bins[k] == double(n[k]), "a count", bins[k], double(n[k]));
    s[k].check_is(bins[levels + k], "S");
    squares[k].check_is(bins[2 * levels + k], "Q");
    if (n[k]) loss.add(squares[k].sum / double(n[k]));
    finite &= squares[k].size < 1e30 && s[k].size < 1e30;
  }
  distance.check_is(bins[3 * levels], "sum |d|");
  check(bins[3 * levels + 1] == double(near), "the count of near elements", bins[3 * levels + 1], double(near));
  if (finite) loss.check_is(*t.item.loss, "loss");
  if (!with_alpha || !finite) return;
  std::vector<Sum> gradient(channels);
  for (int64_t i = 0; i < numel; ++i) {
    const int k = t.slot[i];
    gradient[i / t.item.layout.inner % channels].add(-2.0 * (double(t.item.quant.qn) + k) / double(n[k]) * t.d[i]);
  }
  for (int64_t c = 0; c < channels; ++c) gradient[c].check_is(t.item.dloss_dalpha[c], "dloss_dalpha");
}

// bins: those that the forward left, or any that a raw call may bring.
void check_gradients(const Tensor& t, bool with_g, bool with_bins) {
  if (!t.plain_clip) return;
  std::vector<Sum> gradient(t.item.layout.channels);
  for (int64_t i = 0; i < t.item.layout.numel; ++i) {
    const float g = with_g ? get(t.item.dtype, t.item.grad_xhat, i) : 0.f;
    const float mask = std::isnan(t.v[i]) ? kNaN : t.inside(i) ? 1.f : 0.f;
    float dy = g * mask;
    if (with_bins) {
      const float pull = float(2.0 * double(*t.item.grad_loss) / std::max(t.item.bins[t.slot[i]], 1.0)) * t.d[i];
      dy = with_g ? dy + pull : pull;
    }
    const float got = get(t.item.dtype, t.item.dx, i), expected = rounded(t.item.dtype, t.through_relu(i, dy));
    check(same(got, expected), "dx", got, expected);
    const float term = g * (mask == 0 ? t.code[i] : t.code[i] - t.v[i]);
    gradient[i / t.item.layout.inner % t.item.layout.channels].add(term);
  }
  if (!with_g) return;
  for (size_t c = 0; c < gradient.size(); ++c) gradient[c].check_is(t.item.dalpha[c], "dalpha", t.item.grad_scale);
}

uint64_t digest = 14695981039346656037u;

void digest_of(const Tensor& t) {
  const auto mix = [](uint64_t bits) { digest = (digest ^ bits) * 1099511628211u; };
  const auto value = [&](double f) {
    uint64_t bits;
    std::memcpy(&bits, &f, 8);
    mix(std::isnan(f) ? 1 : bits);
  };
  for (int64_t i = 0; i < t.item.layout.numel; ++i)
    value(t.item.xhat ? get(t.item.dtype, t.item.xhat, i) : 0), value(get(t.item.dtype, t.item.dx, i));
  for (int64_t c = 0; c < t.item.layout.channels; ++c) value(t.item.dalpha ? t.item.dalpha[c] : 0);
  for (int k = 0; k < 3 * t.levels + 2; ++k) value(t.item.bins[k]);
}

void execute(const Genome& genome, bool with_digest = false) {
  current = genome;
  Reader read{genome.data()};
  const uint32_t op = read(7), listed = read(16), hostile = read(256), seed = read(256), hostile_kind = read(6);
  std::vector<Tensor> tensors;
  for (uint32_t i = 0; i < (listed < 12 ? 1u : listed - 11); ++i)
    if (i < 3) tensors.emplace_back(Reader{genome.data() + 5 + 17 * i});
  const bool lsq = op == 0, with_alpha = op == 2 || op == 4, with_g = op == 0 || op >= 3, with_bins = !lsq;
  Items items;
  for (Tensor& t : tensors) {
    if (op == 1 || op == 2) t.item.xhat = nullptr, t.item.grad_xhat = nullptr, t.item.dalpha = nullptr;
    if (!with_alpha) t.item.dloss_dalpha = nullptr;
    items.push_back(t.item);
  }
  (lsq ? cpu::lsq_fwd : cpu::bin_fwd)(items);
  for (Tensor& t : tensors) {
    if (t.item.xhat) t.check_xhat();
    if (with_bins) check_bins(t, with_alpha);
    if (with_bins && op >= 5 && hostile % 2) {  // a table that no forward has made
      const double bad[] = {0, -3, 0.5, 1e300, std::numeric_limits<double>::quiet_NaN(), 1e-300};
      for (int k = 0; k < t.levels; ++k)
        if ((k + seed) % 3 == 0) t.item.bins[k] = bad[(hostile_kind + k) % 6];
    }
  }
  (lsq ? cpu::lsq_bwd : cpu::bin_bwd)(items);
  for (Tensor& t : tensors) {
    check_gradients(t, with_g, with_bins);
    t.check_prefixes();
    if (with_digest) digest_of(t);
  }
}

// ---- the two ways to run -------------------------------------------------------------------------------------------

int matrix(int every) {
  int calls = 0, left_out = 0;
  std::minstd_rand random(7);
  Genome genome{};
  uint8_t* const t = genome.data() + 5;  // dtype, kind, bits, sign, relu, clip | geometry, size, many, more | ...
  const auto call = [&] {
    if (++left_out < every) return;
    execute(genome, true), ++calls, left_out = 0;
  };
  const auto fill = [&] {
    for (uint8_t& byte : genome) byte = uint8_t(random() >> 8);
    genome[1] = uint8_t(random() % 16 < 14 ? 0 : 12 + random() % 3), genome[2] |= 1;
  };
  for (int dtype = 0; dtype < 3; ++dtype)
    for (int bits = 0; bits < 8; ++bits)
      for (int form = 0; form < 6; ++form)  // signed, unsigned, relu, binary or ternary, one level, far from 0
        for (int geometry = 2; geometry < 8; ++geometry)
          for (int op = 0; op < 7; ++op) {
            fill();
            genome[0] = uint8_t(op), t[0] = uint8_t(dtype), t[2] = uint8_t(bits), t[3] = form == 0 || form > 2;
            t[1] = uint8_t(form < 3 ? 5 : form == 3 ? bits % 2 : form == 4 ? 2 : 3 + bits % 2);
            t[4] = form == 2 ? 0 : 1, t[6] = uint8_t(geometry);
            t[7] = uint8_t(random() % 21 + 3 * (random() % 400 == 0));
            t[11] = uint8_t(14 + random() % 5);
            call();
          }
  for (uint32_t step = 0; step < 14; ++step)  // every hostile step, with NaN and infinities among x
    for (int bits = 0; bits < 8; ++bits)
      for (int kind = 0; kind < 6; ++kind)
        for (int op = 0; op < 7; ++op) {
          fill();
          genome[0] = uint8_t(op), t[1] = uint8_t(kind), t[2] = uint8_t(bits), t[7] = uint8_t(random() % 20);
          t[11] = uint8_t(step), t[12] |= 3;
          call();
        }
  std::printf("matrix: %d calls, digest %016llx\n", calls, static_cast<unsigned long long>(digest));
  return 0;
}

int fuzz(unsigned seed, long count) {
  using namespace coverage;
  blocks.assign(size_t(&etext - &__executable_start), 0);
  std::mt19937 random(seed);
  std::vector<Genome> corpus;
  const auto start = std::chrono::steady_clock::now();
  for (long i = 0; i < count; ++i) {
    Genome genome;
    if (corpus.empty() || random() % 16 == 0) {
      for (uint8_t& byte : genome) byte = uint8_t(random());
    } else {
      genome = corpus[random() % corpus.size()];
      if (random() % 4 == 0) {  // the rest of another one
        const Genome& other = corpus[random() % corpus.size()];
        const size_t from = random() % genome.size();
        std::copy(other.begin() + from, other.end(), genome.begin() + from);
      }
      for (uint32_t n = 1 + random() % 6; n; --n) {
        uint8_t& byte = genome[random() % genome.size()];
        const uint32_t how = random() % 3;
        byte = uint8_t(how == 0 ? random() : how == 1 ? byte + 1 - 2 * (random() & 1) : byte ^ 1 << random() % 8);
      }
    }
    // Long tensors take most of the time: one in 8 of those of several chunks stays, and one in 512 of several tasks.
    for (size_t at = 5; at + 17 <= genome.size(); at += 17) {
      uint8_t& size = genome[at + 7];
      if (size % 24 == 21 ? random() % 512 != 0 : size % 24 > 12 && random() % 8 != 0) size = uint8_t(random() % 13);
    }
    execute(genome);
    if (news()) corpus.push_back(genome);
  }
  const double seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  const auto reached = [](const std::vector<uint8_t>& v) {
    return v.size() - size_t(std::count(v.begin(), v.end(), 0));
  };
  std::printf("fuzz: seed %u, %ld executions, %zu blocks, %zu edges, %zu inputs kept, %.0f s\n", seed, count,
              reached(blocks), reached(seen), corpus.size(), seconds);
  return 0;
}

int main(int count, char** words) {
  const std::string mode = count > 1 ? words[1] : "";
  if (mode == "matrix" && count == 3) return matrix(std::atoi(words[2]));
  if (mode == "fuzz" && count == 4) return fuzz(unsigned(std::atoi(words[2])), std::atol(words[3]));
  if (mode == "one" && count == 3 && std::strlen(words[2]) == 2 * sizeof(Genome)) {
    Genome genome;
    for (size_t i = 0; i < genome.size(); ++i)
      genome[i] = uint8_t(std::stoi(std::string(words[2] + 2 * i, 2), nullptr, 16));
    execute(genome);
    return 0;
  }
  std::fprintf(stderr, "native_fuzz matrix EVERY | fuzz SEED COUNT | one HEX\n");
  return 2;
}
