// Attention of one new token over one ragged segment. See src/winnow/kernels/decode/reference.py for the
// meaning of every field; this header only says how it lies in memory.
#pragma once
#include <cstdint>

namespace winnow {

struct DecodeArgs {
  const void* q;  // [H * G, D] contiguous
  const void* k;  // [H, C, D]; strides below, in elements; the last dimension is contiguous
  const void* v;
  int64_t k_head, k_row, v_head, v_row;
  const int32_t* lengths;  // [H]
  int64_t heads, group, dim;
  bool bf16;  // otherwise float32

  int64_t position, start, window;  // window < 0: none
  const int32_t* positions;         // [H, C] ascending per head, or null: entry e is at start + e
  int64_t positions_head;
  const float* bias;  // [H, C] or null
  int64_t bias_head;
  float scale, softcap;  // softcap 0: none

  const int32_t* indices;  // [rows, N] or null: everything visible
  const int32_t* counts;   // [rows]
  int64_t indices_row, rows, page;  // rows is H or H * G

  void* out;      // [H * G, D] contiguous, dtype of q
  float* lse;     // [H * G]
  float* logits;  // [H * G, S] or null; filled with -inf by the caller, set where an entry is read
  int64_t logits_head;
};

struct DecodeKernels {
  // Returns the number of query-entry products.
  int64_t (*decode)(const DecodeArgs&);
};

}  // namespace winnow
