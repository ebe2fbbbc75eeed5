// What cpu.cpp (tasks, tables, final sums) asks of cpu_loops.cpp (the loops, compiled once per instruction set).
#pragma once
#include <cstdint>

#include "kernels.h"

namespace qbr::cpu {

// Elements that are worked on at a time: what the loops read and write of them stays in a first-level cache.
constexpr int64_t kChunk = 1024;
constexpr int kMaxLevels = 256;

struct Input {
  DType dtype;
  const void* x;
  const float* alpha;
  Layout layout;
  Quant quant;
  int levels;
};

// Elements [begin, end) of one task; begin is a multiple of kChunk.
struct Range {
  int64_t begin, end;
};

struct Loops {
  // xhat or null. bins or null: this task's [3 L + 2] row, overwritten.
  void (*forward)(const Input&, Range, void* xhat, double* bins);
  // dx = g * in + table[code] * d, each term only if its input is given; dx or null.
  // step_sums or null: this task's [channels] row, overwritten: of g * (b - v * in) if g is given, else of table[code] * d.
  void (*backward)(const Input&, Range, const void* grad_xhat, const float* table, void* dx, double* step_sums);
};

extern const Loops loops_baseline, loops_avx2, loops_avx512;

}  // namespace qbr::cpu
