// Attention mass: column sums of the attention matrix over one ragged segment (src/winnow/kernels/mass).
#pragma once
#include <cstdint>

#include "queries_and_entries.h"

namespace winnow {

struct MassArgs : QueriesAndEntries {
  const float* lse;  // [T, H * G]
  int64_t lse_token, lse_head;
  float* mass;  // [H * G, width] contiguous; written whole
  int64_t width;  // the longest head
};

struct MassKernels {
  void (*mass)(const MassArgs&);
};

}  // namespace winnow
