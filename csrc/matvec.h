// Products of a few rows with a large matrix, out = x @ w^T, bound by reading the weights once.
#pragma once
#include <cstdint>

namespace winnow {

enum class Dtype : int { f32 = 0, bf16 = 1 };

// Strides are in elements; the last dimension of every operand is contiguous.
struct MatvecArgs {
  const void* x;  // [rows, inner]
  const void* w;  // [outer, inner]
  void* out;      // [rows, outer], of the same type as x
  int64_t x_stride, w_stride, out_stride;
  int64_t rows, outer, inner;
  Dtype x_type;
  const float* w_scale;    // [outer], int8 weights only
  const int32_t* row_sum;  // [outer], sum of the codes of a weight row, int8 weights only
};

struct MatvecKernels {
  void (*f32)(const MatvecArgs&);
  void (*bf16)(const MatvecArgs&);
  void (*int8)(const MatvecArgs&);
  // Sum of 32-bit words, modulo 2^32: the fastest way to read memory once, the limit of the others.
  uint32_t (*read_sum)(const void* data, int64_t bytes);
};

}  // namespace winnow
