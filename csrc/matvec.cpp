// What is of one type on both sides goes to matmul.cpp where there is AVX-512. Otherwise, and for 8-bit weights:
// Each thread walks a contiguous panel of weight rows, and up to eight rows of x share each load of a
// weight. While x leaves room in the first-level cache the weights are read in one stream, row by row,
// which is how the processor prefetches best; otherwise several weight rows share each load of x.
//
// Vectors are GCC/Clang vector extensions, so one source serves AVX-512, AVX2 and any other machine;
// only the one instruction that the extensions cannot express (8-bit dot products) is an intrinsic.
#include "kernels.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <vector>

#include "scratch.h"

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
constexpr int64_t kSerialBytes = 1 << 16;  // below this, waking a second thread costs more than it gives
constexpr int kMaxRows = 8;
constexpr int kSums = kBytes == 64 ? 24 : 12;    // vector registers that hold sums, of 32 and 16
constexpr int kTogether = kBytes == 64 ? 8 : 4;  // weight rows that share a load of x, at most
constexpr int64_t kAhead = 16384;                // bytes that a prefetch runs ahead of the loads, at least

// What may be read in one stream: rows of x above which loading x anew for every weight row takes longest,
// and bytes of x and a weight row that stay in the first-level cache together. A stream has one chain of
// additions per row of x; where vectors are narrow, their latency takes longer than the memory.
// The processor prefetches a stream by itself and its loads run ahead, the further the fewer rows of x there
// are: ours need not go far, and do harm where they do.
constexpr int kStreamRows = kBytes == 64 ? 4 : 0;
constexpr int64_t kStreamBytes = 24 << 10, kStreamAhead = 8192, kStreamAheadAlone = 4096;

// Where x is larger than this it starts so many bytes behind the start of a cache line. From the second-level
// cache, loads that reach into the next line are faster (up to a fifth, measured): each announces the next.
constexpr int64_t kOnLineBytes = 16 << 10, kOffLine = 16;

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

template <class V>
inline auto lane_sum(V v) {
  auto total = v[0];
  for (int i = 1; i < kLanes; ++i) total += v[i];
  return total;
}

// Lane i of the result is the sum of the lanes of v[i].
template <class V>
inline V lane_sums(const V* v) {
  V sums;
#if WINNOW_ISA_avx512
  // Halves the number of vectors again and again, adding neighbours of two vectors laid end to end.
  const __m512i even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
  const __m512i odd = _mm512_add_epi32(even, _mm512_set1_epi32(1));
  V left[kLanes];
  std::copy_n(v, kLanes, left);
  for (int n = kLanes / 2; n > 0; n /= 2) {
    for (int i = 0; i < n; ++i) {
      const __m512i a = (__m512i)left[2 * i], b = (__m512i)left[2 * i + 1];
      left[i] = (V)_mm512_permutex2var_epi32(a, even, b) + (V)_mm512_permutex2var_epi32(a, odd, b);
    }
  }
  sums = left[0];
#else
  for (int i = 0; i < kLanes; ++i) sums[i] = lane_sum(v[i]);
#endif
  return sums;
}

inline float to_float(uint16_t b) {
  const uint32_t bits = uint32_t(b) << 16;
  float f;
  std::memcpy(&f, &bits, 4);
  return f;
}

inline uint16_t to_bf16(float f) {  // round to nearest even; NaN stays NaN
  uint32_t bits;
  std::memcpy(&bits, &f, 4);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1)) >> 16, quiet = (bits >> 16) | 0x40;
  return uint16_t((bits & 0x7fffffffu) > 0x7f800000u ? quiet : rounded);
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
// end of the row. Its return value is a factor that `finish` gets back, which turns the sums of weight rows
// n..n + count - 1 into outputs.

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
  static F finish(const MatvecArgs&, int64_t, int, F sums, float) { return sums; }
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
  static F finish(const MatvecArgs&, int64_t, int, F sums, float) { return sums; }
};

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
  static F finish(const MatvecArgs& a, int64_t n, int count, I sums, float x_scale) {
    // Those of the next rows: one line in so many weights that no prefetcher of the processor expects it.
    __builtin_prefetch(a.w_scale + n + count);
    __builtin_prefetch(a.row_sum + n + count);
    F values = {};
    for (int i = 0; i < count; ++i)
      values[i] = float(sums[i] - offset * a.row_sum[n + i]) * (x_scale * a.w_scale[n + i]);
    return values;
  }
};

template <class Op>
struct Packed {
  typename Op::X* x;  // [steps, rows, step]
  float factor[kMaxRows];
  bool stream;  // how the weights are to be read
};

inline void store(const MatvecArgs& a, int64_t r, int64_t n, int count, F values) {
  const int64_t at = r * a.out_stride + n;
  if (a.x_type == Dtype::f32) {
    std::memcpy(static_cast<float*>(a.out) + at, &values, size_t(count) * sizeof(float));
  } else {
    for (int i = 0; i < count; ++i) static_cast<uint16_t*>(a.out)[at + i] = to_bf16(values[i]);
  }
}

// Of 32 vector registers none is short when the caller's code surrounds the loop; of 16 some are.
#if WINNOW_ISA_avx512
#define WINNOW_ROWS inline
#else
#define WINNOW_ROWS __attribute__((noinline))
#endif

// All R rows of x times N weight rows that start at `n`; sums[r] gets those of row r, lanes not yet added.
// One chain of additions per output whatever R and N are: a row of x gives the same bits in any company.
template <class Op, int R, int N>
WINNOW_ROWS void rows(const MatvecArgs& a, const Packed<Op>& packed, int64_t n, int64_t ahead,
                      typename Op::Acc (*sums)[kLanes], int at) {
  // Of a short loop, few instructions may be counters, for the processor to see many loads ahead.
  constexpr int64_t stride = (N == 1 ? 4 : 1) * Op::step;
  const typename Op::X* x = packed.x;
  const typename Op::W* w = static_cast<const typename Op::W*>(a.w) + n * a.w_stride;
  typename Op::Acc acc[N][R] = {};
  int64_t first = 0;
  for (; first + stride <= a.inner; first += stride) {
    for (int64_t k = first; k < first + stride; k += Op::step) {
      typename Op::Weights weights[N];
      for (int m = 0; m < N; ++m) {
        prefetch(w + m * a.w_stride + k, ahead);
        weights[m] = Op::weights(w + m * a.w_stride + k);
      }
      for (int r = 0; r < R; ++r)
        for (int m = 0; m < N; ++m) Op::dot(acc[m][r], weights[m], x + k * R + r * Op::step);
    }
  }
  for (int64_t k = first; k < a.inner; k += Op::step) {
    for (int m = 0; m < N; ++m) {
      typename Op::W last[Op::step] = {};  // zero behind the end of the row
      std::memcpy(last, w + m * a.w_stride + k, size_t(std::min<int64_t>(Op::step, a.inner - k)) * sizeof *w);
      const auto weights = Op::weights(last);
      for (int r = 0; r < R; ++r) Op::dot(acc[m][r], weights, x + k * R + r * Op::step);
    }
  }
  for (int m = 0; m < N; ++m)
    for (int r = 0; r < R; ++r) sums[r][at + m] = acc[m][r];
}

// Weight rows begin..end - 1, N at a time. Many are read before their sums are added up, scaled and stored:
// after every row, that would hold up the loads of the next.
template <class Op, int R, int N>
void panel(const MatvecArgs& a, const Packed<Op>& packed, int64_t begin, int64_t end, int64_t ahead) {
  constexpr int64_t group = kLanes / N * N;
  typename Op::Acc sums[R][kLanes] = {};
  for (int64_t n = begin; n < end; n += group) {
    const int count = int(std::min(group, end - n));
    int at = 0;
    for (; at + N <= count; at += N) rows<Op, R, N>(a, packed, n + at, ahead, sums, at);
    for (; at < count; ++at) rows<Op, R, 1>(a, packed, n + at, ahead, sums, at);
    for (int r = 0; r < R; ++r)
      store(a, r, n, count, Op::finish(a, n, count, lane_sums(sums[r]), packed.factor[r]));
  }
}

template <class Op, int R>
void panel_of(const MatvecArgs& a, const Packed<Op>& packed, int64_t begin, int64_t end) {
  if constexpr (R <= kStreamRows) {
    constexpr int64_t ahead = R == 1 ? kStreamAheadAlone : kStreamAhead;
    if (packed.stream) return panel<Op, R, 1>(a, packed, begin, end, ahead);
  }
  // A load of x serves as many weight rows as the registers hold sums for. Prefetches run whole groups of
  // them ahead, so that each of the N streams finds its own next row.
  constexpr int N = std::min(kTogether, std::max(1, kSums / R));
  panel<Op, R, N>(a, packed, begin, end, round_up(kAhead, N * a.w_stride * int64_t(sizeof(typename Op::W))));
}

template <class Op>
void panel_of(const MatvecArgs& a, const Packed<Op>& packed, int64_t begin, int64_t end) {
  switch (a.rows) {
    case 1: return panel_of<Op, 1>(a, packed, begin, end);
    case 2: return panel_of<Op, 2>(a, packed, begin, end);
    case 3: return panel_of<Op, 3>(a, packed, begin, end);
    case 4: return panel_of<Op, 4>(a, packed, begin, end);
    case 5: return panel_of<Op, 5>(a, packed, begin, end);
    case 6: return panel_of<Op, 6>(a, packed, begin, end);
    case 7: return panel_of<Op, 7>(a, packed, begin, end);
    default: return panel_of<Op, 8>(a, packed, begin, end);
  }
}

// x as the kernel wants it, until the thread's next call. Every thread packs for itself, which takes no
// longer than waiting for one that does, and leaves the result in its own cache.
template <class Op>
Packed<Op> pack(const MatvecArgs& a) {
  using X = typename Op::X;
  static thread_local Scratch scratch;
  const int64_t steps = (a.inner + Op::step - 1) / Op::step, jump = a.rows * Op::step;
  const int64_t bytes = steps * jump * int64_t(sizeof(X));
  const int64_t weight_row = a.w_stride * int64_t(sizeof(typename Op::W));
  Packed<Op> packed;
  packed.stream = a.rows <= kStreamRows && bytes + weight_row <= kStreamBytes;
  packed.x = reinterpret_cast<X*>(scratch.take(bytes + kOffLine) + (bytes > kOnLineBytes ? kOffLine : 0));
  if (a.inner % Op::step != 0) std::fill_n(packed.x + (steps - 1) * jump, jump, X(0));
  for (int64_t r = 0; r < a.rows; ++r) packed.factor[r] = Op::pack(a, r, packed.x + r * Op::step, jump);
  return packed;
}

template <class Op>
void run(const MatvecArgs& a) {
  const bool serial = a.outer * a.inner * int64_t(sizeof(typename Op::W)) < kSerialBytes;
#pragma omp parallel if (!serial)
  {
#ifdef _OPENMP
    const int64_t threads = omp_get_num_threads(), me = omp_get_thread_num();
#else
    const int64_t threads = 1, me = 0;
#endif
    // Whole vectors of outputs, so that no two threads write the same line of the cache.
    const int64_t vectors = (a.outer + kLanes - 1) / kLanes;
    const int64_t begin = vectors * me / threads * kLanes, end = vectors * (me + 1) / threads * kLanes;
    if (begin < a.outer) panel_of<Op>(a, pack<Op>(a), begin, std::min(end, a.outer));
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

template <class Op, Dtype type>
void run_floats(const MatvecArgs& a) {
#if WINNOW_ISA_avx512
  if (a.x_type == type && a.inner > 0)
    return table()->matmul.matmul(
        {a.x, a.w, nullptr, a.out, a.x_stride, a.w_stride, a.out_stride, a.rows, a.outer, a.inner, type});
#endif
  run_all<Op>(a);
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
  return {run_floats<F32Weights, Dtype::f32>, run_floats<WidenedBf16Weights, Dtype::bf16>, run_all<Int8Weights>,
          read_sum};
}

}  // namespace WINNOW_ISA
}  // namespace winnow
