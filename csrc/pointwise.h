// What lies between the matrix products of a Llama-shaped layer: cheap, but many calls per token.
#pragma once
#include <cstdint>

#include "matvec.h"  // Dtype

namespace winnow {

// x += delta (where there is one), rounded to its type; out = x / rms(x) * weight. Rows are dense.
struct NormArgs {
  void* x;            // [rows, width], updated in place
  const void* delta;  // [rows, width] or null
  const void* weight;  // [width]
  void* out;          // [rows, width]
  int64_t rows, width;
  float eps;
  Dtype type;
};

// Turns the first `query_heads + key_heads` heads of every row in place: (a, b) of the two halves of a
// head become (a cos - b sin, b cos + a sin). Before that, where weights are given, each head is
// divided by its root mean square and weighted.
struct RotateArgs {
  void* heads;            // [rows, at least (query_heads + key_heads) * depth]
  const float* cos;       // [rows, depth / 2]
  const float* sin;       // [rows, depth / 2]
  const void* q_weight;   // [depth] or null
  const void* k_weight;   // [depth] or null
  int64_t rows, row_stride, query_heads, key_heads, depth;
  float eps;
  Dtype type;
};

// out = silu(gate) * up, where a row holds gate and then up.
struct SiluArgs {
  const void* gate_up;  // [rows, 2 * width]
  void* out;            // [rows, width]
  int64_t rows, width;
  Dtype type;
};

struct PointwiseKernels {
  void (*norm)(const NormArgs&);
  void (*rotate)(const RotateArgs&);
  void (*silu)(const SiluArgs&);
};

}  // namespace winnow
