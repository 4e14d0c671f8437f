// Vectors of one instruction set, and the two ways of multiplying that the kernels bound by products know.
//
// Everything is written in GCC/Clang vector extensions, so that one source serves every set; only what
// they cannot say (bf16 dot products, conversions) uses intrinsics.
#pragma once
#include <cstdint>
#include <cstring>

#if defined(WINNOW_ISA_avx512) || defined(WINNOW_ISA_avx2)
#include <immintrin.h>
#endif

// Loops that fill the register file are kept apart: inlined side by side they spill, and a profile shows nothing.
#define WINNOW_NOINLINE __attribute__((noinline)) static

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

constexpr float kLog2E = 1.44269504088896341f;

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
#if defined(WINNOW_ISA_avx512)
  return _mm512_reduce_add_ps((__m512)v);
#else
  float total = 0;
  for (int i = 0; i < kLanes; ++i) total += v[i];
  return total;
#endif
}
static inline float largest(Vec v) {
#if defined(WINNOW_ISA_avx512)
  return _mm512_reduce_max_ps((__m512)v);
#else
  float top = v[0];
  for (int i = 1; i < kLanes; ++i) top = v[i] > top ? v[i] : top;
  return top;
#endif
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

// Minimax polynomials (relative error) of 2^f, highest power first: f in [0, 1) on AVX-512, which has an
// instruction for the fraction and one for the power of two, and in [-1/2, 1/2] elsewhere.
template <int kDegree>
struct Exp2;
#if defined(WINNOW_ISA_avx512)
template <>
struct Exp2<3> {
  static constexpr float c[] = {7.80245226e-2f, 2.26067155e-1f, 6.9583354e-1f, 9.99925219e-1f};
};
template <>
struct Exp2<5> {
  static constexpr float c[] = {1.87757668e-3f, 8.98934009e-3f, 5.58263181e-2f,
                                2.40153617e-1f, 6.93153073e-1f, 9.99999925e-1f};
};
#else
template <>
struct Exp2<3> {
  static constexpr float c[] = {5.5171669e-2f, 2.42611122e-1f, 6.93260985e-1f, 9.99928074e-1f};
};
template <>
struct Exp2<5> {
  static constexpr float c[] = {1.3276472e-3f,  9.67554133e-3f, 5.55071327e-2f,
                                2.40221197e-1f, 6.93146967e-1f, 1.00000007f};
};
#endif

template <int kDegree>
static inline Vec exp2_fraction(Vec f) {
  Vec p = splat(Exp2<kDegree>::c[0]);
#pragma GCC unroll 8
  for (int i = 1; i <= kDegree; ++i) p = p * f + splat(Exp2<kDegree>::c[i]);
  return p;
}

// 2^t for t below 127, 0 far below; NaN stays NaN. Relative error 7.5e-8 at degree 5; 7.5e-5 at degree 3,
// well below the rounding of a bf16 weight (2e-3).
template <int kDegree>
static inline Vec exp2v(Vec t) {
#if defined(WINNOW_ISA_avx512)
  const Vec f = (Vec)_mm512_reduce_ps((__m512)t, 0x9);  // t - floor(t), and 0 for -inf
  return (Vec)_mm512_scalef_ps((__m512)exp2_fraction<kDegree>(f), (__m512)t);
#else
  const Vec magic = splat(12582912.f);  // 1.5 * 2^23: adding it leaves the nearest integer in the low bits
  const Vec z = t + magic;
  const VecInt bits = (VecInt)exp2_fraction<kDegree>(t - (z - magic)) + ((VecInt)z << 23);
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

// kLanes results to the caller's dtype.
static inline void store_as(float* to, Vec v) { store(to, v); }
static inline void store_as(Bf16* to, Vec v) {
#if defined(WINNOW_ISA_avx512)
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), (__m256i)_mm512_cvtneps_pbh((__m512)v));
#else
  for (int i = 0; i < kLanes; ++i) from_float(v[i], to + i);
#endif
}

// How packed 32-bit words multiply. Either one float per word ...
template <class InputT>
struct FloatWords {
  using Input = InputT;
  static constexpr int kPerWord = 1;
  static constexpr int kExpDegree = sizeof(Input) == 4 ? 5 : 3;
  static inline Vec dot(Vec acc, Vec a, Vec b) { return acc + a * b; }
  static inline uint32_t word(const Input* from) {
    const float x = to_float(from[0]);
    uint32_t w;
    std::memcpy(&w, &x, 4);
    return w;
  }
  static inline void copy(uint32_t* to, const Input* from, int count) {
    for (int i = 0; i < count; ++i) to[i] = word(from + i);
  }
  // N panels of weights as words.
  template <int N>
  static inline void store_panels(uint32_t* to, const Vec* p) {
    for (int i = 0; i < N * kPanelVectors; ++i) store(to + i * kLanes, p[i]);
  }
};

// ... or a pair of bf16 that are multiplied and summed into one float lane.
#if defined(WINNOW_ISA_avx512)
struct Bf16Pairs {
  using Input = Bf16;
  static constexpr int kPerWord = 2;
  static constexpr int kExpDegree = 3;
  static inline Vec dot(Vec acc, Vec a, Vec b) {
    return (Vec)_mm512_dpbf16_ps((__m512)acc, (__m512bh)a, (__m512bh)b);
  }
  static inline uint32_t word(const Bf16* from) {
    uint32_t w;
    std::memcpy(&w, from, 4);
    return w;
  }
  static inline void copy(uint32_t* to, const Bf16* from, int count) { std::memcpy(to, from, 2 * count); }
  template <int N>
  static inline void store_panels(uint32_t* to, const Vec* p) {
    if constexpr (N == 2)
      _mm512_storeu_si512(to, (__m512i)_mm512_cvtne2ps_pbh((__m512)p[1], (__m512)p[0]));
    else
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
