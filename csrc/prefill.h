// Attention of many new tokens over one ragged segment (src/winnow/kernels/prefill).
#pragma once
#include <cstdint>

namespace winnow {

enum class PrefillDtype : int { float32 = 0, bfloat16 = 1 };

// Which pairs a call computes, causality and the model's sliding window aside.
enum class PrefillForm : int {
  dense = 0,
  window = 1,  // the first `init` positions and the last `local` ones
  lists = 2,   // row block r of a query head reads the listed units of `unit` entries (blocks, stripes)
};

// All strides count elements; the last dimension of every operand is contiguous.
struct PrefillArgs {
  PrefillDtype dtype;
  int64_t tokens, kv_heads, group, depth;  // T, H, G, D
  const void* q;                           // [T, H * G, D]
  int64_t q_token, q_head;
  const void* k;  // [H, C, D]
  int64_t k_head, k_entry;
  const void* v;
  int64_t v_head, v_entry;
  const int32_t* lengths;          // [H]
  const int32_t* query_positions;  // [T], ascending
  int64_t start;                   // position of entry 0 where `positions` is null
  const int32_t* positions;        // [H, C], ascending
  int64_t positions_head;
  const float* bias;  // [H, C] or null
  int64_t bias_head;
  float scale;      // > 0
  float softcap;    // 0: none
  int64_t sliding;  // the model's window; 0: none
  PrefillForm form;
  int64_t init, local, align;       // window
  int64_t rows, phase, unit;        // lists: row t belongs to list (t + phase) / rows
  const int32_t* offsets;           // [H * G, lists + 1]
  int64_t offsets_head;
  const int32_t* columns;  // ascending within a list
  int64_t n_columns;
  void* out;               // [T, H * G, D] contiguous
  float* lse;              // [T, H * G] contiguous
  float* row_max;          // as lse, or null
};

struct PrefillKernels {
  // Returns the number of visible query-key pairs, summed over query heads.
  int64_t (*prefill)(const PrefillArgs&);
};

}  // namespace winnow
