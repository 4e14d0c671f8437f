// Inner loops of decode attention: a block of rows against up to HEADS query heads of one KV head.
//
// Rows are handed over as pointers, so that a dense range, a list of entries and a list of pages are one
// code path; a second array of pointers says what will be read next and is only prefetched.
#pragma once
#include <algorithm>
#include <cstdint>
#include <cstring>

#if WINNOW_ISA_avx512
#include <immintrin.h>
#endif
#ifdef __GNUC__
#pragma GCC diagnostic ignored "-Wpsabi"  // vectors cross inline functions of this file only
#endif

namespace winnow {
namespace WINNOW_ISA {
namespace {

// Inlined into their callers these loops lose registers and the order of their loads.
#ifdef __GNUC__
#define WINNOW_NOINLINE __attribute__((noinline))
#else
#define WINNOW_NOINLINE
#endif

constexpr int HEADS = 4;      // query heads per pass; logits and probabilities lie as [entry][HEADS]
constexpr int BLOCK = 64;     // rows per call of the inner loops
constexpr int MAX_DIM = 256;

using bf16 = uint16_t;

inline float to_float(float x) { return x; }
inline float to_float(bf16 x) {
  uint32_t bits = static_cast<uint32_t>(x) << 16;
  float out;
  std::memcpy(&out, &bits, 4);
  return out;
}

inline void from_float(float x, float* out) { *out = x; }
inline void from_float(float x, bf16* out) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  if ((bits & 0x7fffffffu) > 0x7f800000u) {
    *out = static_cast<bf16>((bits >> 16) | 64);  // a NaN stays a NaN
    return;
  }
  *out = static_cast<bf16>((bits + 0x7fffu + ((bits >> 16) & 1)) >> 16);
}

// To nearest even; x is finite. Without the branch of from_float, so that loops over it become vectors.
inline void rounded(float x, float* out) { *out = x; }
inline void rounded(float x, bf16* out) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  *out = static_cast<bf16>((bits + 0x7fffu + ((bits >> 16) & 1)) >> 16);
}

// Sixteen floats: four entries of HEADS heads. The compiler maps them to what the instruction set has.
constexpr int LANES = 16;
typedef float Vec __attribute__((vector_size(64)));
typedef int32_t VecInt __attribute__((vector_size(64)));

inline Vec splat(float x) { return Vec{} + x; }
inline Vec load(const float* from) {
  Vec x;
  std::memcpy(&x, from, sizeof x);
  return x;
}
inline void store(float* to, Vec x) { std::memcpy(to, &x, sizeof x); }
inline Vec larger(Vec x, Vec y) { return x > y ? x : y; }

// 2^x for x <= 127 with a relative error near 1e-7; 0 below 2^-126 and for -inf; NaN stays NaN.
inline Vec exp2_fast(Vec x) {
  x = x < -150.f ? splat(-150.f) : x;
  const Vec shifted = x + 12582912.f;  // 1.5 * 2^23: the low bits now hold round(x)
  const VecInt k = (VecInt)shifted - 0x4b400000;
  const Vec f = x - (shifted - 12582912.f);
  // Taylor series of exp(f ln 2) on [-1/2, 1/2]
  Vec p = f * 1.5252734e-5f + 1.5403530e-4f;
  p = p * f + 1.3333558e-3f;
  p = p * f + 9.6181291e-3f;
  p = p * f + 5.5504109e-2f;
  p = p * f + 2.4022651e-1f;
  p = p * f + 6.9314718e-1f;
  p = p * f + 1.f;
  const VecInt exponent = k > -127 ? (k + 127) << 23 : VecInt{};
  return p * (Vec)exponent;
}
inline float exp2_fast(float x) { return exp2_fast(splat(x))[0]; }

// Into the second-level cache: it keeps more requests in flight than the first, which scattered rows, each
// a miss of its own, need. Bare reading of 5 % of 64K rows took 0.54 ms so, 0.95 ms by the first level.
inline void prefetch_row(const void* row, int bytes) {
  const char* at = static_cast<const char*>(row);
  for (int i = 0; i < bytes; i += 64) __builtin_prefetch(at + i, 0, 2);
}

// ---------------------------------------------------------------- bit masks

// Writes `dim` elements: the next packed value where a bit of the mask is set, zero elsewhere. Reads nothing behind
// the `kept` values of the row, unless it may (`past`): up to OVERRUN bytes then, which decide nothing.
constexpr int OVERRUN = 64;

template <typename T>
inline void expand_portable(const T* from, const uint8_t* mask, int dim, T* to) {
  for (int d = 0; d < dim; ++d) {
    const bool set = mask[d / 8] >> (d % 8) & 1;
    to[d] = set ? *from : T{};
    from += set;
  }
}

#if WINNOW_ISA_avx512
template <bool past>
inline void expand_row(const float* from, int kept, const uint8_t* mask, int dim, float* to) {
  const float* end = from + kept;
  for (int d = 0; d < dim; d += 16) {
    uint16_t bits;
    std::memcpy(&bits, mask + d / 8, 2);
    const auto n = static_cast<int>(end - from);
    const __mmask16 there = past || n >= 16 ? 0xffff : static_cast<__mmask16>((1u << n) - 1);
    _mm512_storeu_ps(to + d, _mm512_maskz_expand_ps(bits, _mm512_maskz_loadu_ps(there, from)));
    from += __builtin_popcount(bits);
  }
}

template <bool past>
inline void expand_row(const bf16* from, int kept, const uint8_t* mask, int dim, bf16* to) {
  const bf16* end = from + kept;
  int d = 0;
  for (; d + 32 <= dim; d += 32) {
    uint32_t bits;
    std::memcpy(&bits, mask + d / 8, 4);
    const auto n = static_cast<int>(end - from);
    const __mmask32 there = past || n >= 32 ? 0xffffffffu : (1u << n) - 1;
    _mm512_storeu_si512(to + d, _mm512_maskz_expand_epi16(bits, _mm512_maskz_loadu_epi16(there, from)));
    from += __builtin_popcount(bits);
  }
  if (d < dim) expand_portable(from, mask + d / 8, dim - d, to + d);
}
#else
template <bool past, typename T>
inline void expand_row(const T* from, int, const uint8_t* mask, int dim, T* to) {
  expand_portable(from, mask, dim, to);
}
#endif

// ---------------------------------------------------------------- portable

// Queries of one pass, HEADS rows; absent heads are zero.
template <typename T>
struct Queries {
  alignas(64) float q[HEADS][MAX_DIM];
  void load(const T* from, int heads, int dim) {
    for (int g = 0; g < HEADS; ++g)
      for (int d = 0; d < dim; ++d) q[g][d] = g < heads ? to_float(from[g * dim + d]) : 0.f;
  }
};

// Weighted sums of V rows of one pass.
template <typename T>
struct Sums {
  alignas(64) float acc[HEADS][MAX_DIM];
  void clear() { std::memset(acc, 0, sizeof acc); }
  void rescale(const float* by, int dim) {
    for (int g = 0; g < HEADS; ++g)
      for (int d = 0; d < dim; ++d) acc[g][d] *= by[g];
  }
  void natural(float* out, int g, int dim) const { std::copy(acc[g], acc[g] + dim, out); }
};

// logits[i][g] = q[g] . rows[i]
template <typename T>
void tile_logits(const Queries<T>& queries, const T* const* rows, const T* const* ahead, int n, int heads, int dim,
                 float* logits) {
  for (int i = 0; i < n; ++i) {
    if (ahead) prefetch_row(ahead[i], dim * static_cast<int>(sizeof(T)));
    alignas(64) float row[MAX_DIM];
    for (int d = 0; d < dim; ++d) row[d] = to_float(rows[i][d]);
    for (int g = 0; g < HEADS; ++g) {
      float sum = 0.f;
      if (g < heads) {
#pragma omp simd reduction(+ : sum)
        for (int d = 0; d < dim; ++d) sum += queries.q[g][d] * row[d];
      }
      logits[i * HEADS + g] = sum;
    }
  }
}

// sums[g] += sum_i p[i][g] * rows[i]; n is a multiple of 4
template <typename T>
void tile_values(Sums<T>& sums, const float* p, const T* const* rows, const T* const* ahead, int n, int heads,
                 int dim) {
  for (int i = 0; i < n; i += 4) {
    alignas(64) float row[4][MAX_DIM];
    for (int j = 0; j < 4; ++j) {
      if (ahead) prefetch_row(ahead[i + j], dim * static_cast<int>(sizeof(T)));
      for (int d = 0; d < dim; ++d) row[j][d] = to_float(rows[i + j][d]);
    }
    for (int g = 0; g < heads; ++g) {
      const float p0 = p[i * HEADS + g], p1 = p[(i + 1) * HEADS + g];
      const float p2 = p[(i + 2) * HEADS + g], p3 = p[(i + 3) * HEADS + g];
      float* acc = sums.acc[g];
#pragma omp simd
      for (int d = 0; d < dim; ++d) acc[d] += (p0 * row[0][d] + p1 * row[1][d]) + (p2 * row[2][d] + p3 * row[3][d]);
    }
  }
}

// ---------------------------------------------------------------- AVX-512 with bf16 dot products
#if WINNOW_ISA_avx512

template <>
struct Queries<bf16> {
  alignas(64) bf16 q[HEADS][MAX_DIM];
  void load(const bf16* from, int heads, int dim) {
    std::memset(q, 0, sizeof q);
    for (int g = 0; g < heads; ++g) std::copy(from + g * dim, from + (g + 1) * dim, q[g]);
  }
};

// Pairs of rows are interleaved inside 128-bit lanes before the dot product, so that accumulator 2b holds
// dims 32b + 8 lane + (0..3) and 2b + 1 holds 32b + 8 lane + (4..7); natural() undoes this once per chunk.
template <>
struct Sums<bf16> {
  alignas(64) float acc[HEADS][MAX_DIM];
  void clear() { std::memset(acc, 0, sizeof acc); }
  void rescale(const float* by, int dim) {
    const int padded = (dim + 31) / 32 * 32;
    for (int g = 0; g < HEADS; ++g)
      for (int d = 0; d < padded; ++d) acc[g][d] *= by[g];
  }
  void natural(float* out, int g, int dim) const {
    for (int d = 0; d < dim; d += 8) {
      const float* from = &acc[g][d / 32 * 32 + d % 32 / 2];
      std::copy(from, from + 4, out + d);
      std::copy(from + 16, from + 20, out + d + 4);
    }
  }
};

// Lines in ascending order keep the hardware's prefetcher at full rate; left alone, compilers interleave two rows.
inline __m512i load_in_order(const bf16* from, __mmask32 valid) {
  __m512i x = valid == 0xffffffffu ? _mm512_loadu_si512(from) : _mm512_maskz_loadu_epi16(valid, from);
  asm volatile("" : "+v"(x));
  return x;
}

inline __m512bh as_bh(__m512i x) { return (__m512bh)x; }

// Steps of a transposing horizontal sum. In every 128-bit lane: [a, a, b, b], each a sum of two.
inline __m512 fold_pair(__m512 a, __m512 b) {
  return _mm512_add_ps(_mm512_mask_blend_ps(0xcccc, a, b), _mm512_shuffle_ps(a, b, 0x4e));
}

// Four heads' accumulators of one entry -> every 128-bit lane holds one part of the four heads' sums.
inline __m512 fold_heads(__m512 a, __m512 b, __m512 c, __m512 d) {
  const __m512 ab = fold_pair(a, b), cd = fold_pair(c, d);
  return _mm512_add_ps(_mm512_shuffle_ps(ab, cd, 0x88), _mm512_shuffle_ps(ab, cd, 0xdd));
}

inline __m512 fold_lanes(__m512 a, __m512 b) {
  return _mm512_add_ps(_mm512_mask_blend_ps(0xff00, a, b), _mm512_shuffle_f32x4(a, b, 0x4e));
}

// Four such vectors, of four entries -> one whose 128-bit lane j is entry j.
inline __m512 fold_entries(__m512 a, __m512 b, __m512 c, __m512 d) {
  const __m512 ab = fold_lanes(a, b), cd = fold_lanes(c, d);
  return _mm512_add_ps(_mm512_shuffle_f32x4(ab, cd, 0x88), _mm512_shuffle_f32x4(ab, cd, 0xdd));
}

template <int NB, int GB>
WINNOW_NOINLINE void logits_avx512(const Queries<bf16>& queries, const bf16* const* rows, const bf16* const* ahead, int n,
                   __mmask32 last, float* logits) {
  __m512bh q[GB][NB];
  for (int g = 0; g < GB; ++g)
    for (int b = 0; b < NB; ++b) q[g][b] = as_bh(_mm512_loadu_si512(&queries.q[g][32 * b]));
  for (int i = 0; i < n; i += 4) {
    __m512 entry[4];
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) {
      const bf16* row = rows[i + j];
      if (ahead) prefetch_row(ahead[i + j], 64 * NB);
      __m512 acc[GB];
#pragma GCC unroll 4
      for (int g = 0; g < GB; ++g) acc[g] = _mm512_setzero_ps();
#pragma GCC unroll 8
      for (int b = 0; b < NB; ++b) {
        const __m512bh x = as_bh(load_in_order(row + 32 * b, b + 1 < NB ? 0xffffffffu : last));
#pragma GCC unroll 4
        for (int g = 0; g < GB; ++g) acc[g] = _mm512_dpbf16_ps(acc[g], x, q[g][b]);
      }
      entry[j] = fold_heads(acc[0], acc[GB > 1 ? 1 : 0], acc[GB > 2 ? 2 : 0], acc[GB > 3 ? 3 : 0]);
    }
    _mm512_storeu_ps(logits + i * HEADS, fold_entries(entry[0], entry[1], entry[2], entry[3]));
  }
}

template <int GB>
void logits_by_dim(const Queries<bf16>& queries, const bf16* const* rows, const bf16* const* ahead, int n, int dim,
                   float* logits) {
  const __mmask32 last = dim % 32 ? 0xffffu : 0xffffffffu;
  switch ((dim + 31) / 32) {
    case 1: return logits_avx512<1, GB>(queries, rows, ahead, n, last, logits);
    case 2: return logits_avx512<2, GB>(queries, rows, ahead, n, last, logits);
    case 3: return logits_avx512<3, GB>(queries, rows, ahead, n, last, logits);
    case 4: return logits_avx512<4, GB>(queries, rows, ahead, n, last, logits);
    case 5: return logits_avx512<5, GB>(queries, rows, ahead, n, last, logits);
    case 6: return logits_avx512<6, GB>(queries, rows, ahead, n, last, logits);
    case 7: return logits_avx512<7, GB>(queries, rows, ahead, n, last, logits);
    default: return logits_avx512<8, GB>(queries, rows, ahead, n, last, logits);
  }
}

// n is a multiple of 4
template <>
void tile_logits<bf16>(const Queries<bf16>& queries, const bf16* const* rows, const bf16* const* ahead, int n,
                       int heads, int dim, float* logits) {
  if (heads == 1) return logits_by_dim<1>(queries, rows, ahead, n, dim, logits);
  if (heads == 2) return logits_by_dim<2>(queries, rows, ahead, n, dim, logits);
  return logits_by_dim<4>(queries, rows, ahead, n, dim, logits);
}

// GB heads and NB * 32 dims of every row: 16 accumulators stay in registers.
template <int NB, int GB>
WINNOW_NOINLINE void values_avx512(Sums<bf16>& sums, const uint32_t* pairs, const bf16* const* rows, const bf16* const* ahead, int n,
                   int head, int block, __mmask32 last) {
  __m512 lo[GB][NB], hi[GB][NB];
#pragma GCC unroll 4
  for (int g = 0; g < GB; ++g)
#pragma GCC unroll 4
    for (int b = 0; b < NB; ++b) {
      lo[g][b] = _mm512_load_ps(&sums.acc[head + g][32 * (block + b)]);
      hi[g][b] = _mm512_load_ps(&sums.acc[head + g][32 * (block + b) + 16]);
    }
  for (int i = 0; i < n; i += 2) {
    const bf16* row0 = rows[i] + 32 * block;
    const bf16* row1 = rows[i + 1] + 32 * block;
    if (ahead) {
      prefetch_row(ahead[i] + 32 * block, 64 * NB);
      prefetch_row(ahead[i + 1] + 32 * block, 64 * NB);
    }
    const uint32_t* p = pairs + i / 2 * HEADS + head;
    __m512i x[NB], y[NB];
#pragma GCC unroll 4
    for (int b = 0; b < NB; ++b) x[b] = load_in_order(row0 + 32 * b, b + 1 < NB ? 0xffffffffu : last);
#pragma GCC unroll 4
    for (int b = 0; b < NB; ++b) y[b] = load_in_order(row1 + 32 * b, b + 1 < NB ? 0xffffffffu : last);
#pragma GCC unroll 4
    for (int b = 0; b < NB; ++b) {
      const __m512bh low = as_bh(_mm512_unpacklo_epi16(x[b], y[b])), high = as_bh(_mm512_unpackhi_epi16(x[b], y[b]));
#pragma GCC unroll 4
      for (int g = 0; g < GB; ++g) {
        const __m512bh w = as_bh(_mm512_set1_epi32(static_cast<int>(p[g])));
        lo[g][b] = _mm512_dpbf16_ps(lo[g][b], low, w);
        hi[g][b] = _mm512_dpbf16_ps(hi[g][b], high, w);
      }
    }
  }
#pragma GCC unroll 4
  for (int g = 0; g < GB; ++g)
#pragma GCC unroll 4
    for (int b = 0; b < NB; ++b) {
      _mm512_store_ps(&sums.acc[head + g][32 * (block + b)], lo[g][b]);
      _mm512_store_ps(&sums.acc[head + g][32 * (block + b) + 16], hi[g][b]);
    }
}

// All heads of NB * 32 dims. Where one pass cannot hold them, a few whole rows are read in order and then
// again from L1: long passes, or passes over a part of each row, leave the hardware's prefetcher idle.
template <int NB>
void values_by_head(Sums<bf16>& sums, const uint32_t* pairs, const bf16* const* rows, const bf16* const* ahead, int n,
                    int heads, int block, __mmask32 last) {
  constexpr int GB = NB <= 2 ? 4 : 2;
  const int most = heads <= GB ? n : 16;
  for (int i = 0; i < n; i += most) {
    const int step = std::min(most, n - i);
    const bf16* const* hint = ahead ? ahead + i : nullptr;  // the first pass prefetches
    int g = 0;
    for (; g + GB <= heads; g += GB, hint = nullptr)
      values_avx512<NB, GB>(sums, pairs + i / 2 * HEADS, rows + i, hint, step, g, block, last);
    for (; g < heads; ++g, hint = nullptr)
      values_avx512<NB, 1>(sums, pairs + i / 2 * HEADS, rows + i, hint, step, g, block, last);
  }
}

// n is a multiple of 8
template <>
void tile_values<bf16>(Sums<bf16>& sums, const float* p, const bf16* const* rows, const bf16* const* ahead, int n,
                       int heads, int dim) {
  // Probabilities of entries (2i, 2i + 1) of one head become one 32-bit word: pairs[i][HEADS].
  alignas(64) uint32_t pairs[BLOCK / 2 * HEADS];
  alignas(64) static const uint16_t order[32] = {0,  4,  1,  5,  2,  6,  3,  7,  8,  12, 9,  13, 10, 14, 11, 15,
                                                 16, 20, 17, 21, 18, 22, 19, 23, 24, 28, 25, 29, 26, 30, 27, 31};
  const __m512i pick = _mm512_load_si512(order);
  for (int i = 0; i < n; i += 8) {
    const __m512bh packed = _mm512_cvtne2ps_pbh(_mm512_loadu_ps(p + i * HEADS + 16), _mm512_loadu_ps(p + i * HEADS));
    _mm512_store_si512(pairs + i / 2 * HEADS, _mm512_permutexvar_epi16(pick, (__m512i)packed));
  }
  const int blocks = (dim + 31) / 32;
  const __mmask32 whole = 0xffffffffu, odd = dim % 32 ? 0xffffu : whole;
  for (int b = 0; b < blocks; b += 4) {
    const __mmask32 last = b + 4 < blocks ? whole : odd;
    switch (std::min(4, blocks - b)) {
      case 1: values_by_head<1>(sums, pairs, rows, ahead, n, heads, b, last); break;
      case 2: values_by_head<2>(sums, pairs, rows, ahead, n, heads, b, last); break;
      case 3: values_by_head<3>(sums, pairs, rows, ahead, n, heads, b, last); break;
      default: values_by_head<4>(sums, pairs, rows, ahead, n, heads, b, last);
    }
  }
}

#endif  // WINNOW_ISA_avx512

}  // namespace
}  // namespace WINNOW_ISA
}  // namespace winnow
