// Attention of one new token over one ragged segment. See src/winnow/kernels/decode/reference.py for the
// meaning of every field; this header only says how it lies in memory.
#pragma once
#include <cstdint>

namespace winnow {

// Keys that are not stored: that of head h at position p is left[p - left_start] . right[h], turned to p.
struct Rebuilt {
  const void* left;  // [n, rank], rows left_row elements apart
  int64_t left_row, left_start;
  const void* right;  // [H, rank, D]; heads right_head elements apart
  int64_t right_head, rank;  // the rank is even
  // Turned by p, channel d is x[d] cosine + x[partner[d]] sine. Angles are those of the multiples of 64 from
  // 64 * coarse_start on, and of 0 to 63: rows of D cosines and D signed sines. No partners: nothing turns.
  const float *coarse, *fine;
  int64_t coarse_start;
  const int32_t* partner;
};

struct DecodeArgs {
  const void* q;  // [H * G, D] contiguous
  const void* k;  // [H, C, D]; strides below, in elements; the last dimension is contiguous
  const void* v;
  int64_t k_head, k_row, v_head, v_row;
  // Bit masks, [H, C, D / 8] bytes with the rows one after the other, or null. With them a row of k (v) holds
  // the values of the elements whose bits are set, in order, and all other elements are zero.
  const uint8_t *k_mask, *v_mask;
  int64_t k_mask_head, v_mask_head;  // bytes
  int64_t kept;                      // values of a row
  const Rebuilt* rebuilt;            // in place of k, or null
  int64_t capacity;        // C
  const int32_t* lengths;  // [H]
  int64_t heads, group, dim;
  bool bf16;  // otherwise float32

  int64_t position, start, window;  // window < 0: none
  const int32_t* positions;         // [H, C] ascending per head, or null: entry e is at start + e
  int64_t positions_head;
  const float* bias;  // [H, C] or null
  int64_t bias_head;
  float scale, softcap;  // softcap 0: none

  const int32_t* indices;  // [rows, N]
  const int32_t* counts;   // [rows]
  int64_t indices_row, listed, rows, page;  // listed is N; rows is H, H * G or, to read all that is visible, 0

  void* out;      // [H * G, D] contiguous, dtype of q
  float* lse;     // [H * G]
  float* logits;  // [H * G, S] or null; filled with -inf by the caller, set where an entry is read
  int64_t logits_head;
  // [H, S] or null: probability that the queries of a KV head give an entry, added to where one is read.
  float* mass;
  int64_t mass_head;
};

struct DecodeKernels {
  // Returns the number of query-entry products. Listed entries that are not visible are skipped. Throws
  // std::invalid_argument where a length exceeds the reserve or a count the list.
  int64_t (*decode)(const DecodeArgs&);
};

}  // namespace winnow
