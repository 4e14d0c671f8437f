// Vectors of floats and the conversions between them and narrower integers. The arithmetic is left to
// GCC/Clang vector extensions; the conversions are not, because GCC 12 takes them apart lane by lane.
#pragma once
#include <cstdint>
#include <cstring>

#if WINNOW_ISA_avx512 || WINNOW_ISA_avx2
#include <immintrin.h>
#endif

namespace winnow {
namespace WINNOW_ISA {
namespace {

#if WINNOW_ISA_avx512
constexpr int kBytes = 64;
#elif WINNOW_ISA_avx2
constexpr int kBytes = 32;
#else
constexpr int kBytes = 16;
#endif
constexpr int kLanes = kBytes / 4;

typedef float F __attribute__((vector_size(kBytes)));
typedef int32_t I __attribute__((vector_size(kBytes)));
typedef uint32_t U __attribute__((vector_size(kBytes)));
typedef uint16_t Words __attribute__((vector_size(kBytes)));

template <class V, class T>
inline V load(const T* p) {
  V v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

template <class V, class T>
inline void store(T* p, V v) {
  std::memcpy(p, &v, sizeof v);
}

// Zero-extended loads, and stores of the low part of every lane.
#if WINNOW_ISA_avx512
inline U from_bytes(const uint8_t* p) { return (U)_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)p)); }
inline U from_words(const uint16_t* p) { return (U)_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p)); }
inline Words words_from_bytes(const uint8_t* p) {
  return (Words)_mm512_cvtepu8_epi16(_mm256_loadu_si256((const __m256i*)p));
}
inline void to_bytes(uint8_t* p, U v) { _mm_storeu_si128((__m128i*)p, _mm512_cvtepi32_epi8((__m512i)v)); }
inline void to_words(uint16_t* p, U v) { _mm256_storeu_si256((__m256i*)p, _mm512_cvtepi32_epi16((__m512i)v)); }
inline void words_to_bytes(uint8_t* p, Words v) {
  _mm256_storeu_si256((__m256i*)p, _mm512_cvtepi16_epi8((__m512i)v));
}
inline F least(F a, F b) { return _mm512_min_ps(a, b); }
inline F largest(F a, F b) { return _mm512_max_ps(a, b); }
#elif WINNOW_ISA_avx2
inline U from_bytes(const uint8_t* p) { return (U)_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)p)); }
inline U from_words(const uint16_t* p) { return (U)_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p)); }
inline Words words_from_bytes(const uint8_t* p) {
  return (Words)_mm256_cvtepu8_epi16(_mm_loadu_si128((const __m128i*)p));
}
inline void words_to_bytes(uint8_t* p, Words v) {
  const __m256i low = (__m256i)(v & 0xff);  // packing saturates
  _mm_storeu_si128((__m128i*)p, _mm_packus_epi16(_mm256_castsi256_si128(low), _mm256_extracti128_si256(low, 1)));
}
inline void to_words(uint16_t* p, U v) {
  const __m256i low = (__m256i)(v & 0xffffu);
  _mm_storeu_si128((__m128i*)p, _mm_packus_epi32(_mm256_castsi256_si128(low), _mm256_extracti128_si256(low, 1)));
}
inline void to_bytes(uint8_t* p, U v) {
  const __m256i low = (__m256i)(v & 0xffu);
  const __m128i words = _mm_packus_epi32(_mm256_castsi256_si128(low), _mm256_extracti128_si256(low, 1));
  _mm_storel_epi64((__m128i*)p, _mm_packus_epi16(words, words));
}
inline F least(F a, F b) { return _mm256_min_ps(a, b); }
inline F largest(F a, F b) { return _mm256_max_ps(a, b); }
#else
inline U from_bytes(const uint8_t* p) {
  U v;
  for (int i = 0; i < kLanes; ++i) v[i] = p[i];
  return v;
}
inline U from_words(const uint16_t* p) {
  U v;
  for (int i = 0; i < kLanes; ++i) v[i] = p[i];
  return v;
}
inline Words words_from_bytes(const uint8_t* p) {
  Words v;
  for (int i = 0; i < 2 * kLanes; ++i) v[i] = p[i];
  return v;
}
inline void to_bytes(uint8_t* p, U v) {
  for (int i = 0; i < kLanes; ++i) p[i] = uint8_t(v[i]);
}
inline void to_words(uint16_t* p, U v) {
  for (int i = 0; i < kLanes; ++i) p[i] = uint16_t(v[i]);
}
inline void words_to_bytes(uint8_t* p, Words v) {
  for (int i = 0; i < 2 * kLanes; ++i) p[i] = uint8_t(v[i]);
}
inline F least(F a, F b) { return a < b ? a : b; }
inline F largest(F a, F b) { return a > b ? a : b; }
#endif

// Lane numbers 0, 2, 4, .. of two vectors side by side, and interleaving them again.
struct Lanes {
  I even, odd, low, high;
  Lanes() {
    for (int i = 0; i < kLanes; ++i) {
      even[i] = 2 * i, odd[i] = 2 * i + 1;
      low[i] = i / 2 + i % 2 * kLanes, high[i] = low[i] + kLanes / 2;
    }
  }
};

inline F shuffle(F a, F b, I lanes) {
#if defined(__clang__)
  F out;
  for (int i = 0; i < kLanes; ++i) out[i] = lanes[i] < kLanes ? a[lanes[i]] : b[lanes[i] - kLanes];
  return out;
#else
  return __builtin_shuffle(a, b, lanes);
#endif
}

// 2 * kLanes consecutive values as those at even places and those at odd ones: neighbouring codes, which
// share a byte, are then in the same lane, and neighbouring bfloat16 are the two halves of one.
struct Pairs {
  F even, odd;
};

inline Pairs load_pairs(const uint16_t* p) {
  const U two = load<U>(p);
  return {(F)(two << 16), (F)(two & 0xffff0000u)};
}
inline Pairs load_pairs(const float* p) {
  const Lanes lanes;
  const F a = load<F>(p), b = load<F>(p + kLanes);
  return {shuffle(a, b, lanes.even), shuffle(a, b, lanes.odd)};
}

inline U rounded_bf16(F v) {  // in the high half of each lane, to nearest even; values are finite
  const U b = (U)v;
  return b + 0x7fffu + ((b >> 16) & 1);
}
inline void store_pairs(uint16_t* p, Pairs v) {
  store(p, (rounded_bf16(v.even) >> 16) | (rounded_bf16(v.odd) & 0xffff0000u));
}
inline void store_pairs(float* p, Pairs v) {
  const Lanes lanes;
  store(p, shuffle(v.even, v.odd, lanes.low));
  store(p + kLanes, shuffle(v.even, v.odd, lanes.high));
}

// Reduces each of kLanes vectors to one value: v[0] holds them in order.
template <class Op>
inline void reduce_each(F* v, Op op) {
  const Lanes lanes;
  for (int n = kLanes / 2; n; n /= 2)
    for (int g = 0; g < n; ++g)
      v[g] = op(shuffle(v[2 * g], v[2 * g + 1], lanes.even), shuffle(v[2 * g], v[2 * g + 1], lanes.odd));
}

}  // namespace
}  // namespace WINNOW_ISA
}  // namespace winnow
