// What every kernel of many queries over one ragged segment is told (src/winnow/kernels/operands.py).
#pragma once
#include <cstdint>

namespace winnow {

enum class QueryDtype : int { float32 = 0, bfloat16 = 1 };

// All strides count elements; the last dimension of every operand is contiguous.
struct QueriesAndEntries {
  QueryDtype dtype;
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
  float scale;      // > 0
  float softcap;    // 0: none
  int64_t sliding;  // the model's window; 0: none
};

}  // namespace winnow
