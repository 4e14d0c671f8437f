// Products of a few rows with weights that are read where they lie: bound by reading them once.
//
// A load broadcasts four words of a weight row to all rows of x in a vector, of which each has four lanes. So rows of x
// share every load, weights need no packing, and as few as one row of x keeps up with memory. An output is always
// summed up in the same order: a row of x gives the same bits in any company.
//
// Everything is written for 32 vector registers of 16 lanes.
#pragma once
#include <algorithm>

#include "tile_simd.h"

namespace winnow {
namespace WINNOW_ISA {

#if defined(WINNOW_ISA_avx512)
constexpr int kFewTogether = 4;                                  // weight rows that share a load of x
constexpr int kFewVectors = 6;                                   // vectors of x at a time, at most
constexpr int kFewWords = 4, kFewInVector = kLanes / kFewWords;  // words in a broadcast, rows of x in a vector

// Words 4 n .. 4 n + 3 in every four lanes.
static inline Vec splat_four(const void* words) {
  return (Vec)_mm512_broadcast_f32x4(_mm_loadu_ps(static_cast<const float*>(words)));
}

// Lane 4 i + r: the sum of lanes 4 i .. 4 i + 3 of v[r].
static inline Vec sum_fours(const Vec* v) {
  const VecInt place = iota() & 3;
  Vec sums = {};
#pragma GCC unroll 4
  for (int r = 0; r < kFewTogether; ++r) {
    const Vec pairs = v[r] + (Vec)_mm512_permute_ps((__m512)v[r], 0xb1);
    sums = place == r ? pairs + (Vec)_mm512_permute_ps((__m512)pairs, 0x4e) : sums;
  }
  return sums;
}

// kFewTogether weight rows times kVectors * kFewInVector rows of x: tile[rows of x][stride].
template <class Way, int kVectors>
WINNOW_NOINLINE void multiply_few(const typename Way::Input* const* w, int64_t inner, const uint32_t* x, int64_t ahead,
                                  float* tile, int64_t stride) {
  using Input = typename Way::Input;
  constexpr int kStep = kFewWords * Way::kPerWord, kLine = 64 / sizeof(Input);
  Vec acc[kVectors][kFewTogether] = {};
  const auto multiply = [&](const Input* const* from, int64_t k) __attribute__((always_inline)) {
    Vec b[kVectors];
#pragma GCC unroll 8
    for (int j = 0; j < kVectors; ++j) b[j] = load(x + j * kLanes);
    x += kVectors * kLanes;
#pragma GCC unroll 4
    for (int r = 0; r < kFewTogether; ++r) {
      const Vec a = splat_four(from[r] + k);
#pragma GCC unroll 8
      for (int j = 0; j < kVectors; ++j) acc[j][r] = Way::dot(acc[j][r], a, b[j]);
    }
  };
  int64_t k = 0;
  for (; k + kLine <= inner; k += kLine) {
    // Into the second-level cache: the few miss buffers of the first must stay free for loads.
#pragma GCC unroll 4
    for (int r = 0; r < kFewTogether; ++r)
      __builtin_prefetch(reinterpret_cast<const char*>(w[r] + k) + ahead, 0, 2);
#pragma GCC unroll 4
    for (int i = 0; i < kLine; i += kStep) multiply(w, k + i);
  }
  for (; k < inner; k += kStep) {
    Input last[kFewTogether][kStep] = {};  // zero behind the end of a row
    const Input* from[kFewTogether];
    for (int r = 0; r < kFewTogether; ++r) {
      std::copy_n(w[r] + k, std::min<int64_t>(kStep, inner - k), last[r]);
      from[r] = last[r];
    }
    multiply(from, 0);
  }
#pragma GCC unroll 8
  for (int j = 0; j < kVectors; ++j) {
    const Vec sums = sum_fours(acc[j]);
    for (int i = 0; i < kFewInVector; ++i)
      std::memcpy(tile + (j * kFewInVector + i) * stride, reinterpret_cast<const float*>(&sums) + 4 * i, 16);
  }
}

// Few rows of x, packed in groups that are as even as can be: [groups][steps][rows of a group][step].
template <class Way>
class FewRows {
  using Input = typename Way::Input;
  static constexpr int kStep = kFewWords * Way::kPerWord;

 public:
  FewRows(const Input* x, int64_t x_stride, int64_t rows, int64_t inner)
      : x_(x), stride_(x_stride), rows_(rows), inner_(inner) {
    const int64_t all = (rows + kFewInVector - 1) / kFewInVector, least = (all + kFewVectors - 1) / kFewVectors;
    const auto filled = [=](int64_t groups) { return (all + groups - 1) / groups * groups; };
    groups_ = filled(least + 1) < filled(least) ? least + 1 : least;
    vectors_ = (all + groups_ - 1) / groups_;
  }

  // Words of all groups, and rows with those of zeros that fill up the last.
  int64_t words() const { return packed_rows() * ((inner_ + kStep - 1) / kStep) * kFewWords; }
  int64_t packed_rows() const { return groups_ * vectors_ * kFewInVector; }

  void pack(int64_t row, uint32_t* packed) const {
    const int64_t group = vectors_ * kFewInVector, length = row < rows_ ? inner_ : 0, whole = length / kStep * kStep;
    const Input* const from = x_ + row * stride_;
    Input* to = reinterpret_cast<Input*>(packed + row / group * (words() / groups_)) + row % group * kStep;
    int64_t k = 0;
    for (; k < whole; k += kStep, to += group * kStep) std::copy_n(from + k, kStep, to);
    for (; k < inner_; k += kStep, to += group * kStep)
      for (int64_t i = 0; i < kStep; ++i) to[i] = k + i < length ? from[k + i] : Input(0);
  }

  // tile[packed_rows()][stride] of kFewTogether weight rows; `ahead` is how many bytes behind them the next lie.
  void multiply(const Input* const* w, const uint32_t* packed, int64_t ahead, float* tile, int64_t stride) const {
    for (int64_t g = 0; g < groups_; ++g, ahead = 0) {
      const uint32_t* const x = packed + g * (words() / groups_);
      float* const to = tile + g * vectors_ * kFewInVector * stride;
      switch (vectors_) {
        case 1: multiply_few<Way, 1>(w, inner_, x, ahead, to, stride); break;
        case 2: multiply_few<Way, 2>(w, inner_, x, ahead, to, stride); break;
        case 3: multiply_few<Way, 3>(w, inner_, x, ahead, to, stride); break;
        case 4: multiply_few<Way, 4>(w, inner_, x, ahead, to, stride); break;
        case 5: multiply_few<Way, 5>(w, inner_, x, ahead, to, stride); break;
        default: multiply_few<Way, 6>(w, inner_, x, ahead, to, stride);
      }
    }
  }

 private:
  const Input* x_;
  int64_t stride_, rows_, inner_;
  int64_t groups_, vectors_;
};
#endif

}  // namespace WINNOW_ISA
}  // namespace winnow
