// Rounding to 8, 4 or 2 bits and back. The format is stated in src/winnow/kernels/quantize/__init__.py.
#pragma once
#include <cstdint>

namespace winnow {

// A tensor [outer, rows, width] whose last dimension is contiguous; strides in elements.
struct Plane {
  void* data;
  int64_t outer_stride, row_stride;
};

struct QuantizeArgs {
  Plane x;      // [outer, rows, width] float32 or bfloat16: read by quantize, written by dequantize
  Plane codes;  // [outer, rows, width * bits / 8] bytes
  Plane scale;  // bfloat16: [outer, rows, width / group] or, by channel, [outer, rows / group, width]
  Plane zero;   // as scale; data is null in the symmetric form
  int64_t outer, rows, width, group;
  int bits;
  bool by_channel, x_is_bf16;
};

struct QuantizeKernels {
  void (*quantize)(const QuantizeArgs&);
  void (*dequantize)(const QuantizeArgs&);
};

}  // namespace winnow
