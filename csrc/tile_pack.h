// Packing 16 rows at a time into panels that are read with full vectors.
#pragma once
#include "tile_simd.h"

namespace winnow {
namespace WINNOW_ISA {

// Words of a K panel, and of a V panel: the same.
template <class Way>
static inline int panel_words(int D) {
  return kPanel * D / Way::kPerWord;
}

#if defined(WINNOW_ISA_avx512)
// Up to 16 words of 16 rows, transposed: word w of every row lies at out + stride * w.
static inline void transpose_words(const uint32_t* const* rows, int words, uint32_t* out, int stride) {
  const __mmask16 mask = static_cast<__mmask16>((1u << words) - 1);
  __m512i r[16], t[16];
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i)
    r[i] = _mm512_maskz_loadu_epi32(mask, rows[i]);
#pragma GCC unroll 8
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
    t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 16; i += 4) {  // r[i + c]: in its 128-bit lane n, word 4 n + c of rows i .. i + 3
    r[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
    r[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
    r[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
    r[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
  }
#pragma GCC unroll 4
  for (int c = 0; c < 4; ++c) {
    const __m512i even0 = _mm512_shuffle_i32x4(r[c], r[4 + c], 0x88);
    const __m512i odd0 = _mm512_shuffle_i32x4(r[c], r[4 + c], 0xdd);
    const __m512i even1 = _mm512_shuffle_i32x4(r[8 + c], r[12 + c], 0x88);
    const __m512i odd1 = _mm512_shuffle_i32x4(r[8 + c], r[12 + c], 0xdd);
    t[c] = _mm512_shuffle_i32x4(even0, even1, 0x88);
    t[4 + c] = _mm512_shuffle_i32x4(odd0, odd1, 0x88);
    t[8 + c] = _mm512_shuffle_i32x4(even0, even1, 0xdd);
    t[12 + c] = _mm512_shuffle_i32x4(odd0, odd1, 0xdd);
  }
  if (words == 16) {
#pragma GCC unroll 16
    for (int w = 0; w < 16; ++w) _mm512_storeu_si512(out + w * stride, t[w]);
  } else {
    for (int w = 0; w < words; ++w) _mm512_storeu_si512(out + w * stride, t[w]);
  }
}
#endif

// `rows` are 16 vectors of D (of zeros where there is no such row); their words lie `stride` apart in the panel.
template <class Way>
static void pack_keys(const typename Way::Input* const* rows, int D, uint32_t* panel, int stride = kPanel) {
  const int words = D / Way::kPerWord;
#if defined(WINNOW_ISA_avx512)
  // Here every input is read as the words it already consists of.
  static_assert(sizeof(typename Way::Input) * Way::kPerWord == 4, "no conversion");
  for (int w = 0; w < words; w += kPanel) {
    const uint32_t* from[kPanel];
    for (int e = 0; e < kPanel; ++e) from[e] = reinterpret_cast<const uint32_t*>(rows[e]) + w;
    transpose_words(from, words - w < kPanel ? words - w : kPanel, panel + w * stride, stride);
  }
#else
  for (int w = 0; w < words; ++w)
    for (int e = 0; e < kPanel; ++e) panel[w * stride + e] = Way::word(rows[e] + w * Way::kPerWord);
#endif
}

template <class Input>
static void pack_values(const Input* const* rows, int D, uint32_t* panel, FloatWords<Input>) {
  for (int e = 0; e < kPanel; ++e) FloatWords<Input>::copy(panel + e * D, rows[e], D);
}

#if defined(WINNOW_ISA_avx512)
static void pack_values(const Bf16* const* rows, int D, uint32_t* panel, Bf16Pairs) {
  // Interleaves the first (last) 16 of 32 values of two rows.
  const __m512i first = _mm512_set_epi16(47, 15, 46, 14, 45, 13, 44, 12, 43, 11, 42, 10, 41, 9, 40, 8, 39, 7, 38, 6,
                                         37, 5, 36, 4, 35, 3, 34, 2, 33, 1, 32, 0);
  const __m512i last = _mm512_add_epi16(first, _mm512_set1_epi16(16));
  for (int e = 0; e < kPanel; e += 2, panel += D)
    for (int d = 0; d < D; d += 32) {
      const bool full = D - d >= 32;
      const __mmask32 mask = full ? 0xffffffffu : 0xffffu;
      const __m512i even = _mm512_maskz_loadu_epi16(mask, rows[e] + d);
      const __m512i odd = _mm512_maskz_loadu_epi16(mask, rows[e + 1] + d);
      _mm512_storeu_si512(panel + d, _mm512_permutex2var_epi16(even, first, odd));
      if (full) _mm512_storeu_si512(panel + d + 16, _mm512_permutex2var_epi16(even, last, odd));
    }
}
#endif

}  // namespace WINNOW_ISA
}  // namespace winnow
