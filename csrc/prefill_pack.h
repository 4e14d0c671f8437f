// Packing 16 entries of keys and values into the panels that prefill_tile.h reads.
#pragma once
#include "prefill_simd.h"

namespace winnow {
namespace WINNOW_ISA {

// Words of a K panel, and of a V panel: the same.
template <class Way>
static inline int panel_words(int D) {
  return kPanel * D / Way::kPerWord;
}

// `rows` are the 16 entries' vectors of D; null stands for zeros (no such entry).
template <class Way>
static void pack_keys(const typename Way::Input* const* rows, int D, uint32_t* panel) {
  const int words = D / Way::kPerWord;
  for (int e = 0; e < kPanel; ++e) {
    const typename Way::Input* row = rows[e];
    if (row == nullptr) {
      for (int w = 0; w < words; ++w) panel[w * kPanel + e] = 0;
    } else {
      for (int w = 0; w < words; ++w) panel[w * kPanel + e] = Way::word(row + w * Way::kPerWord);
    }
  }
}

template <class Input>
static void pack_values(const Input* const* rows, int D, uint32_t* panel, FloatWords<Input>) {
  for (int e = 0; e < kPanel; ++e)
    for (int d = 0; d < D; ++d)
      panel[e * D + d] = rows[e] == nullptr ? 0 : FloatWords<Input>::word(rows[e] + d);
}

#if defined(WINNOW_ISA_avx512)
static void pack_values(const Bf16* const* rows, int D, uint32_t* panel, Bf16Pairs) {
  for (int e = 0; e < kPanel; e += 2)
    for (int d = 0; d < D; d += 16) {
      const __m256i none = _mm256_setzero_si256();
      const __m256i even = rows[e] == nullptr ? none : _mm256_loadu_si256(reinterpret_cast<const __m256i*>(rows[e] + d));
      const __m256i odd =
          rows[e + 1] == nullptr ? none : _mm256_loadu_si256(reinterpret_cast<const __m256i*>(rows[e + 1] + d));
      const __m512i pairs =
          _mm512_or_si512(_mm512_cvtepu16_epi32(even), _mm512_slli_epi32(_mm512_cvtepu16_epi32(odd), 16));
      _mm512_storeu_si512(panel + e / 2 * D + d, pairs);
    }
}
#endif

template <class Way>
static inline void pack_panel(const typename Way::Input* const* k_rows, const typename Way::Input* const* v_rows,
                              int D, uint32_t* k_panel, uint32_t* v_panel) {
  pack_keys<Way>(k_rows, D, k_panel);
  pack_values(v_rows, D, v_panel, Way{});
}

}  // namespace WINNOW_ISA
}  // namespace winnow
