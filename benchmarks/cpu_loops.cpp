// Nanoseconds that the CPU loops take for 16 elements, on one thread and without torch's calls, tasks and allocations.
//
//     python -c "from qbr.kernels import build; print(build.find_torch().root)"      # INC is include/ in there
//     for isa in avx512 avx2 baseline: see the flags _LOOPS in qbr/kernels/build.py
//     g++ -std=c++20 -O3 -fno-math-errno -fno-trapping-math -ffp-contract=off -fopenmp-simd -Wno-psabi -I INC
//         FLAGS -DQBR_ISA=loops_ISA -c csrc/cpu_loops.cpp -o loops.o
//     g++ -std=c++20 -O2 -I INC -DISA=loops_ISA benchmarks/cpu_loops.cpp loops.o -o loops && ./loops [log2_size ...]
#include "../csrc/cpu_loops.h"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <vector>

using namespace qbr;

template <class Run>
double nanoseconds(const Run& run, int64_t numel) {
  std::vector<double> times;
  const int64_t calls = std::max<int64_t>(1, (1 << 16) / numel);
  for (int round = 0; round < 41; ++round) {
    const auto start = std::chrono::steady_clock::now();
    for (int64_t call = 0; call < calls; ++call) run();
    times.push_back(std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count() / calls);
  }
  std::nth_element(times.begin(), times.begin() + 20, times.end());
  return times[20] / numel * 16 * 1e9;
}

uint16_t upper_half(float f) {
  uint32_t bits;
  std::memcpy(&bits, &f, sizeof bits);
  return uint16_t(bits >> 16);
}

void measure(int log2_size) {
  const int64_t numel = int64_t(1) << log2_size;
  std::mt19937 random(1);
  std::normal_distribution<float> normal;
  std::vector<float> x(numel), g(numel), y(numel);
  std::vector<uint16_t> x16(numel), g16(numel);
  for (int64_t i = 0; i < numel; ++i) {
    x[i] = normal(random), g[i] = normal(random);
    x16[i] = upper_half(x[i]), g16[i] = upper_half(g[i]);
  }
  for (const DType dtype : {DType::f32, DType::bf16}) {
    const bool wide = dtype == DType::f32;
    const void* const xs = wide ? static_cast<const void*>(x.data()) : x16.data();
    const void* const gs = wide ? static_cast<const void*>(g.data()) : g16.data();
    for (const int bits : {2, 3, 4, 8}) {
      const float qp = float((1 << (bits - 1)) - 1), alpha = 1.6f / std::sqrt(qp);
      const cpu::Input in{dtype, xs, &alpha, {numel, 1, numel}, {-qp - 1, qp, false, false, INFINITY}, 1 << bits};
      std::vector<double> bins(3 * 256 + 2);
      alignas(64) float table[256];
      for (int k = 0; k < 256; ++k) table[k] = 0.001f * float(k);
      double sum;
      const auto forward = [&](double* to) { cpu::ISA.forward(in, {0, numel}, y.data(), to); };
      const auto backward = [&](const float* pull) { cpu::ISA.backward(in, {0, numel}, gs, pull, y.data(), &sum); };
      std::printf("2^%d %s %d bits: lsq fwd %.1f, bwd %.1f; lsq_bin fwd %.1f, bwd %.1f\n", log2_size,
                  wide ? "float32 " : "bfloat16", bits, nanoseconds([&] { forward(nullptr); }, numel),
                  nanoseconds([&] { backward(nullptr); }, numel), nanoseconds([&] { forward(bins.data()); }, numel),
                  nanoseconds([&] { backward(table); }, numel));
    }
  }
}

int main(int count, char** sizes) {
  if (count == 1) measure(15);
  for (int i = 1; i < count; ++i) measure(std::atoi(sizes[i]));
}
