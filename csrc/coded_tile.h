// Codes of 8, 4 or 2 bits as numbers: a page of rows becomes a block that the inner loops of decode_tile.h read.
#pragma once
#include "decode_tile.h"

namespace winnow {
namespace WINNOW_ISA {
namespace {

// Codes count from here, which halves what rounding a factor costs. Exact in bfloat16, as is every difference.
inline float centre(int bits) { return bits == 8 ? 128.f : bits == 4 ? 7.5f : 1.5f; }

inline void exactly(float x, float* out) { *out = x; }
inline void exactly(float x, bf16* out) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  *out = static_cast<bf16>(bits >> 16);
}

// to[d] = code[d] - centre
template <int bits, typename T>
inline void numbers(const uint8_t* codes, int dim, T* to) {
  constexpr int per = 8 / bits;
  const float middle = centre(bits);
  for (int i = 0; i < dim / per; ++i)
    for (int k = 0; k < per; ++k)
      exactly(static_cast<float>(codes[i] >> bits * k & ((1 << bits) - 1)) - middle, to + i * per + k);
}

#if WINNOW_ISA_avx512
// Word w of 32 is in byte w * bits / 8 of its row, `shift[w]` bits up; the five lowest bits of what is found
// there are a place of `number`, which repeats itself because only the lowest `bits` of them are the code.
template <int bits>
struct Lookup {
  alignas(64) uint8_t byte[64] = {};
  alignas(64) uint16_t shift[32] = {}, number[32] = {};
  Lookup() {
    for (int w = 0; w < 32; ++w) {
      byte[2 * w] = byte[2 * w + 1] = static_cast<uint8_t>(w * bits / 8);
      shift[w] = static_cast<uint16_t>(w * bits % 8);
      exactly(static_cast<float>(w & ((1 << bits) - 1)) - centre(bits), &number[w]);
    }
  }
};

// The bytes of `count` channels, 32 or 16, in the low half of a register.
template <int bits>
inline __m128i bytes_of(const uint8_t* codes, int count) {
  if (count * bits == 128) return _mm_loadu_si128((const __m128i*)codes);
  if (count * bits == 64) return _mm_loadl_epi64((const __m128i*)codes);
  int32_t four;
  std::memcpy(&four, codes, 4);
  return _mm_cvtsi32_si128(four);
}

template <int bits>
inline void numbers_avx512(const uint8_t* codes, int64_t from, int dim, bf16* rows, int to) {
  static const Lookup<bits> lookup;
  const __m512i byte = _mm512_load_si512(lookup.byte), shift = _mm512_load_si512(lookup.shift);
  const __m512i number = _mm512_load_si512(lookup.number);
  const auto at = [&](const uint8_t* row, int count) {
    const __m512i found = _mm512_permutexvar_epi8(byte, _mm512_castsi128_si512(bytes_of<bits>(row, count)));
    return _mm512_permutexvar_epi16(_mm512_srlv_epi16(found, shift), number);
  };
  for (int i = 0; i < BLOCK; ++i, codes += from, rows += to) {
    int d = 0;
    for (; d + 32 <= dim; d += 32) _mm512_storeu_si512(rows + d, at(codes + d * bits / 8, 32));
    if (d < dim) _mm256_storeu_si256((__m256i*)(rows + d), _mm512_castsi512_si256(at(codes + d * bits / 8, 16)));
  }
}

template <>
inline void numbers<8, bf16>(const uint8_t* codes, int dim, bf16* to) {
  const auto wide = [codes](int d) {
    const __m128i sixteen = _mm_xor_si128(_mm_loadu_si128((const __m128i*)(codes + d)), _mm_set1_epi8(-128));
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(sixteen));
  };
  int d = 0;
  for (; d + 32 <= dim; d += 32) _mm512_storeu_si512(to + d, (__m512i)_mm512_cvtne2ps_pbh(wide(d + 16), wide(d)));
  if (d < dim) _mm256_storeu_si256((__m256i*)(to + d), (__m256i)_mm512_cvtneps_pbh(wide(d)));
}
#endif

// BLOCK rows of codes, `from` bytes apart, as rows `to` elements apart.
template <typename T>
inline void numbers_of(int bits, const uint8_t* codes, int64_t from, int dim, T* rows, int to) {
  const auto all = [&](auto one) {
    for (int i = 0; i < BLOCK; ++i) one(codes + i * from, dim, rows + i * to);
  };
  if (bits == 8) return all(numbers<8, T>);
  if (bits == 4) return all(numbers<4, T>);
  all(numbers<2, T>);
}

#if WINNOW_ISA_avx512
template <>
inline void numbers_of<bf16>(int bits, const uint8_t* codes, int64_t from, int dim, bf16* rows, int to) {
  if (bits == 4) return numbers_avx512<4>(codes, from, dim, rows, to);
  if (bits == 2) return numbers_avx512<2>(codes, from, dim, rows, to);
  for (int i = 0; i < BLOCK; ++i) numbers<8>(codes + i * from, dim, rows + i * to);
}
#endif

// Every one of BLOCK numbers HEADS times.
inline void spread(const float* from, float* to) {
#if WINNOW_ISA_avx512
  const __m512i four = _mm512_srli_epi32(_mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15), 2);
  for (int i = 0; i < BLOCK; i += 4) {
    const __m512 x = _mm512_castps128_ps512(_mm_loadu_ps(from + i));
    _mm512_storeu_ps(to + i * HEADS, _mm512_permutexvar_ps(four, x));
  }
#else
  for (int i = 0; i < BLOCK; ++i) std::fill(to + i * HEADS, to + (i + 1) * HEADS, from[i]);
#endif
}

}  // namespace
}  // namespace WINNOW_ISA
}  // namespace winnow
