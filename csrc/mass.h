// Attention mass: column sums of the attention matrix over one ragged segment (src/winnow/kernels/mass).
#pragma once
#include <cstdint>

#include "prefill.h"

namespace winnow {

// As PrefillArgs, without values and forms. All strides count elements.
struct MassArgs {
  PrefillDtype dtype;
  int64_t tokens, kv_heads, group, depth;  // T, H, G, D
  const void* q;                           // [T, H * G, D]
  int64_t q_token, q_head;
  const void* k;  // [H, C, D]
  int64_t k_head, k_entry;
  const int32_t* lengths;          // [H]
  const int32_t* query_positions;  // [T], ascending
  int64_t start;                   // position of entry 0 where `positions` is null
  const int32_t* positions;        // [H, C], ascending
  int64_t positions_head;
  const float* bias;  // [H, C] or null
  int64_t bias_head;
  float scale;       // > 0
  float softcap;     // 0: none
  int64_t sliding;   // the model's window; 0: none
  const float* lse;  // [T, H * G]
  int64_t lse_token, lse_head;
  float* mass;  // [H * G, width] contiguous; written whole
  int64_t width;  // the longest head
};

struct MassKernels {
  void (*mass)(const MassArgs&);
};

}  // namespace winnow
