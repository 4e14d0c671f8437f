// Keys that are stored as a product: rows of them, turned to their positions, for the inner loops of decode_tile.h.
#pragma once
#include <type_traits>

#include "decode.h"
#include "decode_tile.h"
#include "scratch.h"

namespace winnow {
namespace WINNOW_ISA {
namespace {

constexpr int TURN_PAGE = 64;  // positions between two rows of the coarse table

#if WINNOW_ISA_avx512
// LEFT rows on NB * 16 columns of the packed right factor, from `column` on.
constexpr int LEFT = 6;
template <int NB>
WINNOW_NOINLINE void product_avx512(const bf16* const* left, const uint32_t* right, int64_t pairs, int dim, int column,
                                    float* to) {
  __m512 acc[LEFT][NB];
#pragma GCC unroll 6
  for (int i = 0; i < LEFT; ++i)
#pragma GCC unroll 4
    for (int b = 0; b < NB; ++b) acc[i][b] = _mm512_setzero_ps();
  for (int64_t j = 0; j < pairs; ++j) {
    __m512bh column_of[NB];
#pragma GCC unroll 4
    for (int b = 0; b < NB; ++b) column_of[b] = as_bh(_mm512_loadu_si512(right + j * dim + column + 16 * b));
#pragma GCC unroll 6
    for (int i = 0; i < LEFT; ++i) {
      int32_t pair;
      std::memcpy(&pair, left[i] + 2 * j, 4);
      const __m512bh both = as_bh(_mm512_set1_epi32(pair));
#pragma GCC unroll 4
      for (int b = 0; b < NB; ++b) acc[i][b] = _mm512_dpbf16_ps(acc[i][b], column_of[b], both);
    }
  }
#pragma GCC unroll 6
  for (int i = 0; i < LEFT; ++i)
#pragma GCC unroll 4
    for (int b = 0; b < NB; ++b) _mm512_storeu_ps(to + i * dim + column + 16 * b, acc[i][b]);
}
#else
constexpr int LEFT = 1;
#endif

template <typename T>
class Rebuild {
 public:
  explicit Rebuild(const DecodeArgs& a) : a_(a), r_(*a.rebuilt), dim_(static_cast<int>(a.dim)) {}

  // Rows of K at n positions of a head, one behind the other.
  void rows(int64_t head, const int64_t* positions, int n, T* to) {
    if (head != head_) pack(head);
    const T* left[BLOCK + LEFT];
    for (int i = 0; i < BLOCK + LEFT; ++i) {
      const int64_t row = positions[std::min(i, n - 1)] - r_.left_start;
      left[i] = static_cast<const T*>(r_.left) + row * r_.left_row;
    }
    for (int i = 0; i < n; i += LEFT) multiply(left + i, wide_ + i * dim_);
    for (int i = 0; i < n; ++i) turn(wide_ + i * dim_, positions[i], to + i * dim_);
  }

 private:
#if WINNOW_ISA_avx512
  static constexpr bool PAIRS = std::is_same<T, bf16>::value;
#else
  static constexpr bool PAIRS = false;
#endif

  // Two rows of the right factor side by side, as the dot product of pairs wants them.
  void pack(int64_t head) {
    head_ = head;
    right_ = static_cast<const T*>(r_.right) + head * r_.right_head;
    if constexpr (PAIRS) {
      auto* to = reinterpret_cast<uint32_t*>(packed_.take(r_.rank * dim_ * 2));
      for (int64_t j = 0; j < r_.rank; j += 2)
        for (int d = 0; d < dim_; ++d)
          *to++ = right_[j * dim_ + d] | static_cast<uint32_t>(right_[(j + 1) * dim_ + d]) << 16;
    }
  }

  void multiply(const T* const* left, float* to) {
    if constexpr (PAIRS) {
#if WINNOW_ISA_avx512
      const auto* right = reinterpret_cast<const uint32_t*>(packed_.take(0));
      for (int d = 0; d < dim_; d += 64) {
        switch (std::min(4, (dim_ - d) / 16)) {
          case 1: product_avx512<1>(left, right, r_.rank / 2, dim_, d, to); break;
          case 2: product_avx512<2>(left, right, r_.rank / 2, dim_, d, to); break;
          case 3: product_avx512<3>(left, right, r_.rank / 2, dim_, d, to); break;
          default: product_avx512<4>(left, right, r_.rank / 2, dim_, d, to);
        }
      }
#endif
    } else {
      for (int i = 0; i < LEFT; ++i, to += dim_) {
        std::fill(to, to + dim_, 0.f);
        for (int64_t j = 0; j < r_.rank; ++j) {
          const float by = to_float(left[i][j]);
          const T* row = right_ + j * dim_;
          for (int d = 0; d < dim_; ++d) to[d] += by * to_float(row[d]);
        }
      }
    }
  }

  // The angle of a position is the sum of two that are in tables.
  void turn(const float* x, int64_t position, T* to) const {
    if (!r_.partner) {
      for (int d = 0; d < dim_; ++d) rounded(x[d], to + d);
      return;
    }
    const float* a = r_.coarse + (position / TURN_PAGE - r_.coarse_start) * 2 * dim_;
    const float* b = r_.fine + position % TURN_PAGE * 2 * dim_;
    alignas(64) float other[MAX_DIM], sum[MAX_DIM];
    for (int d = 0; d < dim_; ++d) other[d] = x[r_.partner[d]];
    for (int d = 0; d < dim_; ++d) {
      const float cosine = a[d] * b[d] - a[dim_ + d] * b[dim_ + d];
      const float sine = a[dim_ + d] * b[d] + a[d] * b[dim_ + d];
      sum[d] = x[d] * cosine + other[d] * sine;
    }
    for (int d = 0; d < dim_; ++d) rounded(sum[d], to + d);
  }

  const DecodeArgs& a_;
  const Rebuilt& r_;
  const int dim_;
  int64_t head_ = -1;
  const T* right_ = nullptr;
  Scratch packed_;
  alignas(64) float wide_[(BLOCK + LEFT) * MAX_DIM];
};

}  // namespace
}  // namespace WINNOW_ISA
}  // namespace winnow
