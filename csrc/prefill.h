// Attention of many new tokens over one ragged segment (src/winnow/kernels/prefill).
#pragma once
#include "queries_and_entries.h"

namespace winnow {

// Which pairs a call computes, causality and the model's sliding window aside.
enum class PrefillForm : int {
  dense = 0,
  window = 1,  // the first `init` positions and the last `local` ones
  lists = 2,   // row block r of a query head reads the listed units of `unit` entries (blocks, stripes)
};

struct PrefillArgs : QueriesAndEntries {
  const void* v;  // as k
  int64_t v_head, v_entry;
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
