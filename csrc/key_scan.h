// Approximate logits from a quantised copy of the keys. The layout of the codes is described, and its meaning
// defined, in src/winnow/kernels/key_scan/reference.py.
#pragma once
#include <cstdint>

namespace winnow {

// The quantised copy of one layer's keys: blocks of 16 entries, `codes_head` bytes per head.
struct KeyCodes {
  uint8_t* codes;
  int64_t codes_head;
  float* scales;  // [H, capacity], `scales_head` floats per head
  int64_t scales_head;
  int64_t capacity;  // entries, a multiple of 16
  int64_t heads, dim;
  int bits;  // 8 or 4
};

struct QuantizeKeysArgs {
  KeyCodes to;
  const void* k;  // [H, C, D]; strides in elements, the last dimension contiguous
  int64_t k_head, k_row, k_capacity;
  bool bf16;  // otherwise float32
  const int32_t* begin;  // [H] entries begin .. end - 1 of each head are written
  const int32_t* end;    // [H]
};

enum class Reduce { none, max, sum };

struct KeyScanArgs {
  KeyCodes from;
  const void* q;  // [H * G, D] contiguous
  bool bf16;
  int64_t group;
  const int32_t* lengths;  // [H]
  Reduce reduce;
  float* out;  // [H, S], or [H * G, S] without reduction; -inf behind the length
  int64_t width;  // S
};

// Both throw std::invalid_argument where a range of entries lies outside the reserve.
struct KeyScanKernels {
  void (*quantize)(const QuantizeKeysArgs&);
  void (*scan)(const KeyScanArgs&);
};

}  // namespace winnow
