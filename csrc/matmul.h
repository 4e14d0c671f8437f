// Products of rows with a large matrix, out = x @ w^T + bias. See src/winnow/kernels/matmul.
// The gated one holds gate and then up weights: out = silu(gate) * up, half as wide.
#pragma once
#include "matvec.h"  // Dtype

namespace winnow {

// Strides are in elements; the last dimension of every operand is contiguous, and all have one type.
struct MatmulArgs {
  const void* x;     // [rows, inner]
  const void* w;     // [outer, inner]
  const void* bias;  // [outer] or null
  void* out;         // [rows, outer], gated [rows, outer / 2]
  int64_t x_stride, w_stride, out_stride;
  int64_t rows, outer, inner;
  Dtype type;
};

struct MatmulKernels {
  void (*matmul)(const MatmulArgs&);
  void (*gated)(const MatmulArgs&);
  // The bf16 micro-tile of the products again and again on operands in the first-level cache: what arithmetic
  // alone allows. Every thread does it `times` times; returns the operations of all threads.
  double (*peak)(int64_t times);
};

}  // namespace winnow
