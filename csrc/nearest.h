// For some rows of a matrix the most similar of others, by cosine. See src/winnow/kernels/nearest.
#pragma once
#include <cstdint>

#include "queries_and_entries.h"

namespace winnow {

struct NearestArgs {
  QueryDtype dtype;
  const void* x;  // [C, D], the last dimension contiguous
  int64_t stride, depth;
  const int64_t* rows;  // [R] numbers of rows of x
  int64_t n_rows;
  const int64_t* hosts;  // [M] the same, at least one
  int64_t n_hosts;
  float* cosine;   // [R] the largest
  int64_t* host;   // [R] which host it is with: an index into `hosts`, the first of equal ones
};

struct NearestKernels {
  void (*nearest)(const NearestArgs&);
};

}  // namespace winnow
