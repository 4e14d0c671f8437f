// Attention of one new token over entries in 8, 4 or 2 bits. See src/winnow/kernels/coded_decode/form.py for the
// meaning of every table; this header only says how it lies in memory.
#pragma once
#include <cstdint>

#include "quantize.h"

namespace winnow {

constexpr int64_t CODED_PAGE = 64;  // entries

struct CodedArgs {
  const void* q;  // [H * G, D] contiguous
  bool bf16;      // of queries, extremes and result; otherwise float32
  int64_t heads, group, dim;
  int bits;
  int64_t rank, values;  // rank of what rounding lost, 0 where it is not kept; groups of V's channels

  // Tables [H, rows, width], bfloat16 but for codes, places (bytes) and extremes; absent ones are null.
  Plane k_codes, k_scale, k_zero;  // codes: a row per entry; scale and zero: [D] per page, or [1] per entry
  Plane v_codes, v_scale, v_zero;  // scale and zero: [values] per entry
  Plane v_channel;                 // [D] per batch
  Plane k_left, k_right, v_left, v_right;           // [rank] per entry, [D, rank] per batch
  Plane k_extremes, k_where, v_extremes, v_where;   // [2, D] per page, [2] per entry
  Plane batches;                                    // int32, [1] per page
  bool k_by_entry, k_by_batch;                      // which row K's scale and zero have; neither: one per page

  const int32_t* lengths;  // [H], multiples of CODED_PAGE
  int64_t capacity;
  int64_t position, start, window;  // window < 0: none
  const int32_t* positions;         // [H, C] ascending per head, or null: entry e is at start + e
  int64_t positions_head;
  float scale;

  void* out;   // [H * G, D] contiguous, dtype of q
  float* lse;  // [H * G]
};

struct CodedKernels {
  // Returns the number of query-entry products. Throws std::invalid_argument where a length exceeds the reserve or
  // fills no pages.
  int64_t (*decode)(const CodedArgs&);
};

}  // namespace winnow
