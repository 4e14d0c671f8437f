// Each thread walks a contiguous panel of weight rows, a few rows at a time, and up to eight rows of x
// share each load of a weight.
//
// Vectors are GCC/Clang vector extensions, so one source serves AVX-512, AVX2 and any other machine;
// only the two instructions that the extensions cannot express (bf16 and int8 dot products) are
// intrinsics.
#include "matvec.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <vector>

#if WINNOW_ISA_avx512 || WINNOW_ISA_avx2
#include <immintrin.h>
#endif
#ifdef _OPENMP
#include <omp.h>
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
constexpr int64_t kAhead = 16384;          // bytes that a prefetch runs ahead of the loads, at least
constexpr int64_t kSerialBytes = 1 << 16;  // below this, waking a second thread costs more than it gives
constexpr int kMaxRows = 8;
constexpr int kSums = kBytes == 64 ? 24 : 12;  // vector registers that hold sums, of 32 and 16

// Into the second-level cache: the few miss buffers of the first level must stay free for loads, or
// arithmetic and memory take turns instead of overlapping (a third of the bandwidth, measured).
inline void prefetch(const void* p, int64_t ahead) {
  __builtin_prefetch(static_cast<const char*>(p) + ahead, 0, 2);
}

typedef float F __attribute__((vector_size(kBytes)));
typedef uint32_t U __attribute__((vector_size(kBytes)));
typedef int32_t I __attribute__((vector_size(kBytes)));

template <class V, class T>
inline V load(const T* p) {
  V v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

#if WINNOW_ISA_avx512
inline float lane_sum(F v) { return _mm512_reduce_add_ps(v); }
inline int32_t lane_sum(I v) { return _mm512_reduce_add_epi32((__m512i)v); }
inline uint32_t lane_sum(U v) { return uint32_t(lane_sum((I)v)); }
#else
template <class V>
inline auto lane_sum(V v) {
  auto total = v[0];
  for (int i = 1; i < kLanes; ++i) total += v[i];
  return total;
}
#endif

inline float to_float(uint16_t b) {
  const uint32_t bits = uint32_t(b) << 16;
  float f;
  std::memcpy(&f, &bits, 4);
  return f;
}

inline uint16_t to_bf16(float f) {  // round to nearest even; NaN stays NaN
  uint32_t bits;
  std::memcpy(&bits, &f, 4);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return uint16_t((bits >> 16) | 0x40);
  return uint16_t((bits + 0x7fffu + ((bits >> 16) & 1)) >> 16);
}

// Row r of x in float32: in place, or widened into scratch that the next call overwrites.
const float* float_row(const MatvecArgs& a, int64_t r) {
  if (a.x_type == Dtype::f32) return static_cast<const float*>(a.x) + r * a.x_stride;
  static thread_local std::vector<float> scratch;
  scratch.resize(size_t(a.inner));
  const uint16_t* from = static_cast<const uint16_t*>(a.x) + r * a.x_stride;
  for (int64_t k = 0; k < a.inner; ++k) scratch[k] = to_float(from[k]);
  return scratch.data();
}

// Calls put(block, i, k) for every element k = block * step + i of a row.
template <int step, class Put>
inline void by_steps(int64_t inner, Put put) {
  int64_t block = 0, k = 0;
  for (; k + step <= inner; k += step, ++block)
    for (int i = 0; i < step; ++i) put(block, i, k + i);
  for (int i = 0; k + i < inner; ++i) put(block, i, k + i);
}

// ---- One struct per pair of types: how `step` weights of a row meet the same elements of x.
// `pack` lays one row of x out step by step, `jump` apart (the steps of all rows are interleaved, so
// that they do not compete for the same few sets of the cache); the caller zeroed what lies behind the
// end of the row. Its return value is a factor that `finish` gets back.

struct F32Weights {
  using W = float;
  using X = float;
  using Acc = F;
  static constexpr int step = kLanes;
  static float pack(const MatvecArgs& a, int64_t r, X* x, int64_t jump) {
    const float* from = float_row(a, r);
    by_steps<step>(a.inner, [=](int64_t block, int i, int64_t k) { x[block * jump + i] = from[k]; });
    return 1.0f;
  }
  using Weights = F;
  static Weights weights(const W* w) { return load<F>(w); }
  static void dot(Acc& acc, Weights w, const X* x) { acc += w * load<F>(x); }
  static float finish(const MatvecArgs&, int64_t, Acc acc, float) { return lane_sum(acc); }
};

// bf16 weights widened in registers: a 32-bit lane holds two of them, the even one in its low half.
// x is packed to match, the even elements of a step first.
struct WidenedBf16Weights {
  using W = uint16_t;
  using X = float;
  using Acc = F;
  static constexpr int step = 2 * kLanes;
  static float pack(const MatvecArgs& a, int64_t r, X* x, int64_t jump) {
    const float* from = float_row(a, r);
    by_steps<step>(a.inner, [=](int64_t block, int i, int64_t k) {
      x[block * jump + i % 2 * kLanes + i / 2] = from[k];
    });
    return 1.0f;
  }
  struct Weights {
    F even, odd;
  };
  static Weights weights(const W* w) {
    const U pair = load<U>(w);
    return {(F)(pair << 16), (F)(pair & 0xffff0000u)};
  }
  static void dot(Acc& acc, Weights w, const X* x) {
    acc += w.even * load<F>(x);
    acc += w.odd * load<F>(x + kLanes);
  }
  static float finish(const MatvecArgs&, int64_t, Acc acc, float) { return lane_sum(acc); }
};

#if WINNOW_ISA_avx512
struct Bf16Weights {
  using W = uint16_t;
  using X = uint16_t;
  using Acc = __m512;
  static constexpr int step = 2 * kLanes;
  static float pack(const MatvecArgs& a, int64_t r, X* x, int64_t jump) {
    const uint16_t* from = static_cast<const uint16_t*>(a.x) + r * a.x_stride;
    for (int64_t k = 0; k < a.inner; k += step, x += jump)
      std::memcpy(x, from + k, size_t(std::min<int64_t>(step, a.inner - k)) * 2);
    return 1.0f;
  }
  using Weights = __m512bh;
  static Weights weights(const W* w) { return (__m512bh)_mm512_loadu_si512(w); }
  static void dot(Acc& acc, Weights w, const X* x) { acc = _mm512_dpbf16_ps(acc, w, weights(x)); }
  static float finish(const MatvecArgs&, int64_t, Acc acc, float) { return _mm512_reduce_add_ps(acc); }
};
#endif

// x quantised to 8 bits with one scale per row. The products and sums are exact integers, so every
// instruction set gives the same result.
struct Int8Weights {
  using W = int8_t;
  using Acc = I;
#if WINNOW_ISA_avx512
  using X = uint8_t;  // the instruction multiplies unsigned by signed: x is stored with 128 added
  static constexpr int offset = 128, step = 64;
#else
  using X = int16_t;
  static constexpr int offset = 0, step = 16;
#endif
  static float pack(const MatvecArgs& a, int64_t r, X* x, int64_t jump) {
    const float* from = float_row(a, r);
    // As integers, the magnitudes of floats are in order, and infinity and NaN lie above all others.
    uint32_t top_bits = 0;
    for (int64_t k = 0; k < a.inner; ++k) {
      uint32_t bits;
      std::memcpy(&bits, from + k, 4);
      top_bits = std::max(top_bits, bits & 0x7fffffffu);
    }
    if (top_bits >= 0x7f800000u) return std::numeric_limits<float>::quiet_NaN();  // the outputs say so
    float top;
    std::memcpy(&top, &top_bits, 4);
    const float factor = top > 0.0f ? 127.0f / top : 0.0f;
    by_steps<step>(a.inner, [=](int64_t block, int i, int64_t k) {
      x[block * jump + i] = X(int(std::nearbyint(from[k] * factor)) + offset);
    });
    return top / 127.0f;
  }
#if WINNOW_ISA_avx512
  using Weights = __m512i;
  static Weights weights(const W* w) { return _mm512_loadu_si512(w); }
  static void dot(Acc& acc, Weights w, const X* x) {
    acc = (I)_mm512_dpbusd_epi32((__m512i)acc, _mm512_loadu_si512(x), w);
  }
#elif WINNOW_ISA_avx2
  using Weights = __m256i;
  static Weights weights(const W* w) {
    return _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(w)));
  }
  static void dot(Acc& acc, Weights w, const X* x) {
    acc += (I)_mm256_madd_epi16(w, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x)));
  }
#else
  using Weights = const W*;
  static Weights weights(const W* w) { return w; }
  static void dot(Acc& acc, Weights w, const X* x) {
    int32_t lanes[kLanes] = {};
    for (int i = 0; i < step; ++i) lanes[i % kLanes] += int32_t(w[i]) * x[i];
    acc += load<I>(lanes);
  }
#endif
  static float finish(const MatvecArgs& a, int64_t n, Acc acc, float x_scale) {
    const int32_t total = lane_sum(acc) - offset * a.row_sum[n];
    return float(total) * (x_scale * a.w_scale[n]);
  }
};

template <class Op>
struct Packed {
  std::vector<typename Op::X> x;  // [steps, rows, step]
  float factor[kMaxRows];
};

inline void store(const MatvecArgs& a, int64_t r, int64_t n, float value) {
  const int64_t i = r * a.out_stride + n;
  if (a.x_type == Dtype::f32) {
    static_cast<float*>(a.out)[i] = value;
  } else {
    static_cast<uint16_t*>(a.out)[i] = to_bf16(value);
  }
}

// All R rows of x times N weight rows that start at `n`.
template <class Op, int R, int N>
inline void rows(const MatvecArgs& a, const Packed<Op>& packed, int64_t n) {
  // Chains per output hide the latency of the dot product; with several outputs they do that.
  constexpr int chains = R * N == 1 ? 4 : R * N <= 3 ? 2 : 1;
  constexpr int stride = chains * Op::step;
  const typename Op::X* x = packed.x.data();
  const typename Op::W* w = static_cast<const typename Op::W*>(a.w) + n * a.w_stride;
  // Whole groups of N rows ahead, so that each of the N streams finds its own next row prefetched.
  const int64_t group = N * a.w_stride * int64_t(sizeof *w), ahead = (kAhead + group - 1) / group * group;
  typename Op::Acc acc[N][R][chains] = {};
  int64_t k = 0;
  for (; k + stride <= a.inner; k += stride) {
    for (int c = 0; c < chains; ++c) {
      const int64_t at = k + c * Op::step;
      typename Op::Weights weights[N];
      for (int m = 0; m < N; ++m) {
        prefetch(w + m * a.w_stride + at, ahead);
        weights[m] = Op::weights(w + m * a.w_stride + at);
      }
      for (int r = 0; r < R; ++r)
        for (int m = 0; m < N; ++m) Op::dot(acc[m][r][c], weights[m], x + at * R + r * Op::step);
    }
  }
  for (; k < a.inner; k += Op::step) {
    for (int m = 0; m < N; ++m) {
      typename Op::W last[Op::step] = {};  // zero behind the end of the row
      std::memcpy(last, w + m * a.w_stride + k, size_t(std::min<int64_t>(Op::step, a.inner - k)) * sizeof *w);
      const auto weights = Op::weights(last);
      for (int r = 0; r < R; ++r) Op::dot(acc[m][r][0], weights, x + k * R + r * Op::step);
    }
  }
  for (int m = 0; m < N; ++m) {
    for (int r = 0; r < R; ++r) {
      for (int c = 1; c < chains; ++c) acc[m][r][0] += acc[m][r][c];
      store(a, r, n + m, Op::finish(a, n + m, acc[m][r][0], packed.factor[r]));
    }
  }
}

// Weight rows begin..end - 1, several at a time, so that a load of x serves them all, as many as the
// registers hold sums for.
template <class Op, int R>
void panel(const MatvecArgs& a, const Packed<Op>& packed, int64_t begin, int64_t end) {
  constexpr int together = std::min(4, std::max(1, kSums / R));
  int64_t n = begin;
  for (; n + together <= end; n += together) rows<Op, R, together>(a, packed, n);
  for (; n < end; ++n) rows<Op, R, 1>(a, packed, n);
}

template <class Op>
void panel_of(const MatvecArgs& a, const Packed<Op>& packed, int64_t begin, int64_t end) {
  switch (a.rows) {
    case 1: return panel<Op, 1>(a, packed, begin, end);
    case 2: return panel<Op, 2>(a, packed, begin, end);
    case 3: return panel<Op, 3>(a, packed, begin, end);
    case 4: return panel<Op, 4>(a, packed, begin, end);
    case 5: return panel<Op, 5>(a, packed, begin, end);
    case 6: return panel<Op, 6>(a, packed, begin, end);
    case 7: return panel<Op, 7>(a, packed, begin, end);
    default: return panel<Op, 8>(a, packed, begin, end);
  }
}

template <class Op>
void run(const MatvecArgs& a) {
  static thread_local Packed<Op> packed;
  const int64_t steps = (a.inner + Op::step - 1) / Op::step;
  packed.x.assign(size_t(steps * a.rows * Op::step), 0);
  for (int64_t r = 0; r < a.rows; ++r)
    packed.factor[r] = Op::pack(a, r, packed.x.data() + r * Op::step, a.rows * Op::step);
  const Packed<Op>& shared = packed;
  const bool serial = a.outer * a.inner * int64_t(sizeof(typename Op::W)) < kSerialBytes;
#pragma omp parallel if (!serial)
  {
#ifdef _OPENMP
    const int64_t threads = omp_get_num_threads(), me = omp_get_thread_num();
#else
    const int64_t threads = 1, me = 0;
#endif
    panel_of<Op>(a, shared, a.outer * me / threads, a.outer * (me + 1) / threads);
  }
}

// More rows than one pass takes: the weights are read once per group of kMaxRows.
template <class Op>
void run_all(const MatvecArgs& a) {
  const int64_t size = a.x_type == Dtype::f32 ? 4 : 2;
  for (int64_t first = 0; first < a.rows; first += kMaxRows) {
    MatvecArgs part = a;
    part.rows = std::min<int64_t>(kMaxRows, a.rows - first);
    part.x = static_cast<const char*>(a.x) + first * a.x_stride * size;
    part.out = static_cast<char*>(a.out) + first * a.out_stride * size;
    run<Op>(part);
  }
}

void matvec_bf16(const MatvecArgs& a) {
#if WINNOW_ISA_avx512
  if (a.x_type == Dtype::bf16) return run_all<Bf16Weights>(a);
#endif
  run_all<WidenedBf16Weights>(a);
}

uint32_t sum_range(const char* p, int64_t vectors) {
  U sum[8] = {};
  int64_t i = 0;
  for (; i + 8 <= vectors; i += 8) {
    for (int c = 0; c < 8; ++c) {
      prefetch(p + (i + c) * kBytes, kAhead);
      sum[c] += load<U>(p + (i + c) * kBytes);
    }
  }
  for (; i < vectors; ++i) sum[0] += load<U>(p + i * kBytes);
  for (int c = 1; c < 8; ++c) sum[0] += sum[c];
  return lane_sum(sum[0]);
}

uint32_t read_sum(const void* data, int64_t bytes) {
  const char* p = static_cast<const char*>(data);
  const int64_t vectors = bytes / kBytes;
  uint32_t total = 0;
#pragma omp parallel reduction(+ : total)
  {
#ifdef _OPENMP
    const int64_t threads = omp_get_num_threads(), me = omp_get_thread_num();
#else
    const int64_t threads = 1, me = 0;
#endif
    const int64_t begin = vectors * me / threads, end = vectors * (me + 1) / threads;
    total += sum_range(p + begin * kBytes, end - begin);
  }
  for (int64_t at = vectors * kBytes; at + 4 <= bytes; at += 4) {
    uint32_t word;
    std::memcpy(&word, p + at, 4);
    total += word;
  }
  return total;
}

}  // namespace

MatvecKernels matvec_kernels() {
  return {run_all<F32Weights>, matvec_bf16, run_all<Int8Weights>, read_sum};
}

}  // namespace WINNOW_ISA
}  // namespace winnow
