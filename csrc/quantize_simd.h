// Vectors of floats and the conversions between them and narrower integers. The arithmetic is left to
// GCC/Clang vector extensions; the conversions are not, because GCC 12 takes them apart lane by lane.
#pragma once
#include <cstdint>
#include <cstring>
#include <initializer_list>
#include <utility>

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

// Zero-extended loads and narrowing stores. In a lane lie two neighbouring codes, the first in its low bits:
// `widened` reads a vector of them, `narrow_four` packs four vectors, one behind the other.
#if WINNOW_ISA_avx512
inline Words words_from_bytes(const uint8_t* p) {
  return (Words)_mm512_cvtepu8_epi16(_mm256_loadu_si256((const __m256i*)p));
}
inline void words_to_bytes(uint8_t* p, Words v) {
  _mm256_storeu_si256((__m256i*)p, _mm512_cvtepi16_epi8((__m512i)v));
}

template <int bits>
inline U widened(const uint8_t* p) {
  if constexpr (bits == 8) return (U)_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p));
  if constexpr (bits == 4) return (U)_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)p));
  const __m512i two = _mm512_cvtepu8_epi64(_mm_loadl_epi64((const __m128i*)p));  // lanes to a byte
  return (U)_mm512_or_si512(two, _mm512_slli_epi64(two, 28)) & 15u;
}

// Where byte j of vector g is, if every `step` bytes hold one of each vector.
template <int step>
struct Order {
  alignas(64) uint8_t at[64] = {};
  constexpr Order() {
    for (int i = 0; i < 256 / step; ++i) at[i] = uint8_t(i % (64 / step) * step + i / (64 / step));
  }
};

struct EvenWords {
  alignas(64) uint16_t at[32] = {};
  constexpr EvenWords() {
    for (int i = 0; i < 32; ++i) at[i] = uint16_t(2 * i);
  }
};

template <int bits>
inline void narrow_four(uint8_t* p, U a, U b, U c, U d) {
  if constexpr (bits == 8) {
    static constexpr EvenWords words;
    const __m512i even = _mm512_load_si512(words.at);
    _mm512_storeu_si512(p, _mm512_permutex2var_epi16((__m512i)a, even, (__m512i)b));
    _mm512_storeu_si512(p + 64, _mm512_permutex2var_epi16((__m512i)c, even, (__m512i)d));
    return;
  }
  static constexpr Order<bits == 4 ? 4 : 8> order;
  __m512i all = (__m512i)(a | b << 8 | c << 16 | d << 24);
  if constexpr (bits == 2) all = _mm512_or_si512(all, _mm512_srli_epi64(all, 28));
  all = _mm512_permutexvar_epi8(_mm512_load_si512(order.at), all);
  if constexpr (bits == 4) _mm512_storeu_si512(p, all);
  if constexpr (bits == 2) _mm256_storeu_si256((__m256i*)p, _mm512_castsi512_si256(all));
}
inline F least(F a, F b) { return _mm512_min_ps(a, b); }
inline F largest(F a, F b) { return _mm512_max_ps(a, b); }
#elif WINNOW_ISA_avx2
inline Words words_from_bytes(const uint8_t* p) {
  return (Words)_mm256_cvtepu8_epi16(_mm_loadu_si128((const __m128i*)p));
}
inline void words_to_bytes(uint8_t* p, Words v) {
  const __m256i low = (__m256i)(v & 0xff);  // packing saturates
  _mm_storeu_si128((__m128i*)p, _mm_packus_epi16(_mm256_castsi256_si128(low), _mm256_extracti128_si256(low, 1)));
}

template <int bits>
inline U widened(const uint8_t* p) {
  if constexpr (bits == 8) return (U)_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p));
  if constexpr (bits == 4) return (U)_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)p));
  const __m256i two = _mm256_cvtepu8_epi64(_mm_cvtsi32_si128(load<int32_t>(p)));  // lanes to a byte
  return (U)_mm256_or_si256(two, _mm256_slli_epi64(two, 28)) & 15u;
}

template <int bits>
inline void narrow_four(uint8_t* p, U a, U b, U c, U d) {
  if constexpr (bits == 8) {
    const __m256i ab = _mm256_packus_epi32((__m256i)a, (__m256i)b), cd = _mm256_packus_epi32((__m256i)c, (__m256i)d);
    _mm256_storeu_si256((__m256i*)p, _mm256_permute4x64_epi64(ab, 0xd8));
    _mm256_storeu_si256((__m256i*)(p + 32), _mm256_permute4x64_epi64(cd, 0xd8));
    return;
  }
  // Bytes of one vector together within each half, then the halves.
  __m256i all = (__m256i)(a | b << 8 | c << 16 | d << 24);
  if constexpr (bits == 4) {
    const __m128i order = _mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    all = _mm256_shuffle_epi8(all, _mm256_broadcastsi128_si256(order));
    all = _mm256_permutevar8x32_epi32(all, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
    _mm256_storeu_si256((__m256i*)p, all);
  }
  if constexpr (bits == 2) {
    all = _mm256_or_si256(all, _mm256_srli_epi64(all, 28));
    const __m128i order = _mm_setr_epi8(0, 8, 1, 9, 2, 10, 3, 11, -1, -1, -1, -1, -1, -1, -1, -1);
    all = _mm256_shuffle_epi8(all, _mm256_broadcastsi128_si256(order));
    const __m128i both = _mm_unpacklo_epi16(_mm256_castsi256_si128(all), _mm256_extracti128_si256(all, 1));
    _mm_storeu_si128((__m128i*)p, both);
  }
}
inline F least(F a, F b) { return _mm256_min_ps(a, b); }
inline F largest(F a, F b) { return _mm256_max_ps(a, b); }
#else
inline Words words_from_bytes(const uint8_t* p) {
  Words v;
  for (int i = 0; i < 2 * kLanes; ++i) v[i] = p[i];
  return v;
}
inline void words_to_bytes(uint8_t* p, Words v) {
  for (int i = 0; i < 2 * kLanes; ++i) p[i] = uint8_t(v[i]);
}

template <int bits>
inline U widened(const uint8_t* p) {
  U v;
  for (int i = 0; i < kLanes; ++i) {
    if (bits == 8) v[i] = p[2 * i] | uint32_t(p[2 * i + 1]) << 8;
    if (bits == 4) v[i] = p[i];
    if (bits == 2) v[i] = p[i / 2] >> i % 2 * 4 & 15;
  }
  return v;
}

template <int bits>
inline void narrow_four(uint8_t* p, U a, U b, U c, U d) {
  for (const U& v : {a, b, c, d}) {
    for (int i = 0; i < kLanes; ++i) {
      if (bits == 8) *p++ = uint8_t(v[i]), *p++ = uint8_t(v[i] >> 8);
      if (bits == 4) *p++ = uint8_t(v[i]);
      if (bits == 2 && i % 2) *p++ = uint8_t(v[i - 1] | v[i] << 4);
    }
  }
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

struct Bounds {
  F low, high;
};

// One half of the lanes of two vectors, so that lanes of the other half, `odd`, belong to the same of the n
// groups that the result will tell apart. Lanes keep to their 128 bits while they can: crossing them is slow.
template <int n, int odd>
constexpr int half_lane(int i) {
  constexpr int kParts = kLanes / 4;  // of 128 bits
  const int part = i / 4, lane = i % 4;
  if constexpr (n == 2) {
    return lane % 2 * kLanes + part * 4 + lane / 2 + 2 * odd;
  } else if constexpr (n == 4) {
    return lane / 2 * kLanes + part * 4 + lane % 2 + 2 * odd;
  } else {
    return part / (kParts / 2) * kLanes + (part % (kParts / 2) * 2 + odd) * 4 + lane;
  }
}
template <int n, int odd, int... i>
inline F half(F a, F b, std::integer_sequence<int, i...>) {
#if defined(__clang__)
  return __builtin_shufflevector(a, b, half_lane<n, odd>(i)...);
#else
  return __builtin_shuffle(a, b, I{half_lane<n, odd>(i)...});
#endif
}

// Smallest and largest value of each of n vectors, in order, of which `leaf` gives those at i, lane by lane.
// Depth first, so that what is halfway stays in registers.
template <int n, class Leaf>
inline __attribute__((always_inline)) Bounds reduced(const Leaf& leaf, int i = 0) {
  if constexpr (n == 1) {
    return leaf(i);
  } else {
    constexpr std::make_integer_sequence<int, kLanes> lanes;
    const Bounds a = reduced<n / 2>(leaf, i), b = reduced<n / 2>(leaf, i + n / 2);
    return {least(half<n, 0>(a.low, b.low, lanes), half<n, 1>(a.low, b.low, lanes)),
            largest(half<n, 0>(a.high, b.high, lanes), half<n, 1>(a.high, b.high, lanes))};
  }
}

}  // namespace
}  // namespace WINNOW_ISA
}  // namespace winnow
