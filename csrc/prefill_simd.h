// Vectors of one instruction set, and the two ways of multiplying that the prefill kernel knows.
//
// Everything is written in GCC/Clang vector extensions, so that one source serves every set; only what
// they cannot say (bf16 dot products, conversions) uses intrinsics.
#pragma once
#include <cstdint>
#include <cstring>

#if defined(WINNOW_ISA_avx512) || defined(WINNOW_ISA_avx2)
#include <immintrin.h>
#endif

namespace winnow {
namespace WINNOW_ISA {

// kLanes floats per vector; micro-tiles of kTileRows rows by kTileVectors vectors fill the registers.
#if defined(WINNOW_ISA_avx512)
constexpr int kLanes = 16, kTileRows = 6, kTileVectors = 4;
#elif defined(WINNOW_ISA_avx2)
constexpr int kLanes = 8, kTileRows = 6, kTileVectors = 2;
#elif defined(__aarch64__)
constexpr int kLanes = 4, kTileRows = 6, kTileVectors = 4;
#else
constexpr int kLanes = 4, kTileRows = 2, kTileVectors = 4;
#endif

// Keys are packed in panels of 16 whatever the vector width.
constexpr int kPanel = 16;
constexpr int kPanelVectors = kPanel / kLanes;
constexpr int kTilePanels = kTileVectors / kPanelVectors;

typedef float Vec __attribute__((vector_size(kLanes * 4)));
typedef int32_t VecInt __attribute__((vector_size(kLanes * 4)));

static inline Vec load(const void* from) {
  Vec v;
  std::memcpy(&v, from, sizeof v);
  return v;
}
static inline void store(void* to, Vec v) { std::memcpy(to, &v, sizeof v); }
static inline Vec splat(float x) { return x - Vec{}; }
// Any 32-bit word in every lane: one float, or a pair of bf16.
static inline Vec splat_word(const uint32_t* from) {
  float x;
  std::memcpy(&x, from, 4);
#if defined(WINNOW_ISA_avx512)
  return (Vec)_mm512_set1_ps(x);
#elif defined(WINNOW_ISA_avx2)
  return (Vec)_mm256_set1_ps(x);
#else
  return Vec{x, x, x, x};
#endif
}
static inline Vec larger(Vec a, Vec b) {
#if defined(WINNOW_ISA_avx512)
  return (Vec)_mm512_max_ps((__m512)a, (__m512)b);
#elif defined(WINNOW_ISA_avx2)
  return (Vec)_mm256_max_ps((__m256)a, (__m256)b);
#else
  return a > b ? a : b;
#endif
}
static inline float sum(Vec v) {
  float total = 0;
  for (int i = 0; i < kLanes; ++i) total += v[i];
  return total;
}
static inline float largest(Vec v) {
  float top = v[0];
  for (int i = 1; i < kLanes; ++i) top = v[i] > top ? v[i] : top;
  return top;
}
static inline bool any_greater(Vec a, Vec b) {
#if defined(WINNOW_ISA_avx512)
  return _mm512_cmp_ps_mask((__m512)a, (__m512)b, _CMP_GT_OQ) != 0;
#elif defined(WINNOW_ISA_avx2)
  return _mm256_movemask_ps(_mm256_cmp_ps((__m256)a, (__m256)b, _CMP_GT_OQ)) != 0;
#else
  const VecInt m = a > b;
  int32_t any = 0;
  for (int i = 0; i < kLanes; ++i) any |= m[i];
  return any != 0;
#endif
}
static inline VecInt iota() {
  VecInt v;
  for (int i = 0; i < kLanes; ++i) v[i] = i;
  return v;
}

// Minimax polynomials (relative error) of 2^f on [-1/2, 1/2], highest power first.
template <int kDegree>
struct Exp2;
template <>
struct Exp2<3> {  // 7.5e-5: well below the rounding of a bf16 weight, 2e-3
  static constexpr float c[] = {5.5171669e-2f, 2.42611122e-1f, 6.93260985e-1f, 9.99928074e-1f};
};
template <>
struct Exp2<4> {  // 2.6e-6
  static constexpr float c[] = {9.57010191e-3f, 5.59178603e-2f, 2.40247448e-1f, 6.93121815e-1f, 9.99999261e-1f};
};
template <>
struct Exp2<5> {  // 7.5e-8
  static constexpr float c[] = {1.3276472e-3f,  9.67554133e-3f, 5.55071327e-2f,
                                2.40221197e-1f, 6.93146967e-1f, 1.00000007f};
};

// 2^t for t below 127; exactly 0 below 2^-126; NaN stays NaN.
template <int kDegree>
static inline Vec exp2v(Vec t) {
  const Vec magic = splat(12582912.f);  // 1.5 * 2^23: adding it leaves the nearest integer in the low bits
  const Vec z = t + magic;
  const Vec f = t - (z - magic);
  Vec p = splat(Exp2<kDegree>::c[0]);
  for (int i = 1; i <= kDegree; ++i) p = p * f + splat(Exp2<kDegree>::c[i]);
  const VecInt bits = (VecInt)p + ((VecInt)z << 23);
#if defined(WINNOW_ISA_avx512)
  const __mmask16 lives = _mm512_cmp_ps_mask((__m512)t, _mm512_set1_ps(-126.f), _CMP_NLT_UQ);
  return (Vec)_mm512_maskz_mov_epi32(lives, (__m512i)bits);
#else
  return (Vec)(bits & ~(VecInt)(t < splat(-126.f)));
#endif
}

typedef uint16_t Bf16;

static inline float to_float(float x) { return x; }
static inline float to_float(Bf16 x) {
  const uint32_t word = static_cast<uint32_t>(x) << 16;
  float f;
  std::memcpy(&f, &word, 4);
  return f;
}
static inline void from_float(float x, float* to) { *to = x; }
static inline void from_float(float x, Bf16* to) {
  uint32_t word;
  std::memcpy(&word, &x, 4);
  if ((word & 0x7fffffffu) > 0x7f800000u) {
    *to = static_cast<Bf16>((word >> 16) | 0x40);  // a NaN must not be rounded into infinity
  } else {
    *to = static_cast<Bf16>((word + 0x7fffu + ((word >> 16) & 1)) >> 16);
  }
}

// How packed 32-bit words multiply. Either one float per word ...
template <class InputT>
struct FloatWords {
  using Input = InputT;
  static constexpr int kPerWord = 1;
  static constexpr int kExpDegree = sizeof(Input) == 4 ? 5 : 4;
  static inline Vec dot(Vec acc, Vec a, Vec b) { return acc + a * b; }
  static inline uint32_t word(const Input* from) {
    const float x = to_float(from[0]);
    uint32_t w;
    std::memcpy(&w, &x, 4);
    return w;
  }
  // One panel of weights (kPanel floats) as words.
  static inline void store_panel(uint32_t* to, const Vec* p) {
    for (int i = 0; i < kPanelVectors; ++i) store(to + i * kLanes, p[i]);
  }
};

// ... or a pair of bf16 that are multiplied and summed into one float lane.
#if defined(WINNOW_ISA_avx512)
struct Bf16Pairs {
  using Input = Bf16;
  static constexpr int kPerWord = 2;
  static constexpr int kExpDegree = 4;
  static inline Vec dot(Vec acc, Vec a, Vec b) {
    return (Vec)_mm512_dpbf16_ps((__m512)acc, (__m512bh)a, (__m512bh)b);
  }
  static inline uint32_t word(const Bf16* from) {
    uint32_t w;
    std::memcpy(&w, from, 4);
    return w;
  }
  static inline void store_panel(uint32_t* to, const Vec* p) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), (__m256i)_mm512_cvtneps_pbh((__m512)p[0]));
  }
};
using Bf16Way = Bf16Pairs;
#else
using Bf16Way = FloatWords<Bf16>;
#endif
using Float32Way = FloatWords<float>;

}  // namespace WINNOW_ISA
}  // namespace winnow
