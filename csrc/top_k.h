// Exact selection of the k largest scores of every row. See src/winnow/kernels/top_k/reference.py.
#pragma once
#include <cstdint>

namespace winnow {

struct TopKArgs {
  const float* scores;     // [R, S]
  int64_t rows, row_stride, width;
  const int32_t* lengths;  // [R] valid scores per row
  const int32_t* k;        // [R] how many to select
  int32_t* indices;        // [R, N] ascending, -1 behind the count
  int64_t listed;          // N, at least every k
  int32_t* counts;         // [R] how many were selected
};

struct TopKKernels {
  // Throws std::invalid_argument where a length or a k lies outside its row.
  void (*top_k)(const TopKArgs&);
};

}  // namespace winnow
