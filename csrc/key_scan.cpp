// Key scan: quantised keys against quantised queries, 16 entries at a time.
//
// A row of 64 code bytes holds four dimensions of 16 entries (eight in int4), so one dot-product instruction
// advances 16 logits and no horizontal sum is ever needed.
#include "key_scan.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <stdexcept>
#include <vector>

#ifdef _OPENMP
#include <omp.h>
#endif
#if WINNOW_ISA_avx512
#include <immintrin.h>
#endif
#ifdef __GNUC__
#pragma GCC diagnostic ignored "-Wpsabi"  // vectors cross inline functions of this file only
#endif

namespace winnow {
namespace WINNOW_ISA {
namespace {

constexpr int ENTRIES = 16;  // of a block
constexpr int ROW = 64;      // bytes: four codes (or pairs of codes) of each entry of a block
constexpr int MAX_DIM = 256;
constexpr int HEADS = 4;           // query heads per pass
constexpr int64_t CHUNK = 4096;    // entries that a thread takes at once
constexpr int64_t SERIAL_BYTES = 1 << 18;
constexpr float MINUS_INF = -std::numeric_limits<float>::infinity();

using bf16 = uint16_t;

inline float to_float(float x) { return x; }
inline float to_float(bf16 x) {
  const uint32_t bits = static_cast<uint32_t>(x) << 16;
  float out;
  std::memcpy(&out, &bits, 4);
  return out;
}

// Round half to even, for |x| < 2^22.
inline int32_t nearest(float x) {
  const float shifted = x + 12582912.f;
  int32_t bits;
  std::memcpy(&bits, &shifted, 4);
  return bits - 0x4b400000;
}

// Symmetric codes of one vector in -limit .. limit; returns the scale.
template <typename T>
float quantize_vector(const T* x, int dim, int limit, int32_t* code) {
  float top = 0.f;
  for (int d = 0; d < dim; ++d) {
    const float size = std::fabs(to_float(x[d]));
    top = size > top ? size : top;
  }
  const auto most = static_cast<float>(limit);
  const float by = top > 0.f ? most / top : 0.f;
  for (int d = 0; d < dim; ++d) {
    float y = to_float(x[d]) * by;
    y = y < most ? y : most;  // also where rounding of `by` or a NaN would leave the range
    y = y > -most ? y : -most;
    code[d] = nearest(y);
  }
  return top / most;
}

int threads_for(int64_t bytes) {
#ifdef _OPENMP
  if (bytes >= SERIAL_BYTES && !omp_in_parallel()) return omp_get_max_threads();
#endif
  (void)bytes;
  return 1;
}

int64_t block_bytes(const KeyCodes& c) { return ENTRIES * c.dim * c.bits / 8; }

// ---------------------------------------------------------------- quantise

template <typename T>
void quantize_entry(const QuantizeKeysArgs& a, int64_t h, int64_t e) {
  const KeyCodes& c = a.to;
  const auto dim = static_cast<int>(c.dim);
  int32_t code[MAX_DIM];
  const T* row = static_cast<const T*>(a.k) + h * a.k_head + e * a.k_row;
  c.scales[h * c.scales_head + e] = quantize_vector(row, dim, c.bits == 8 ? 127 : 7, code);
  uint8_t* to = c.codes + h * c.codes_head + e / ENTRIES * block_bytes(c) + e % ENTRIES * 4;
  if (c.bits == 8) {
    for (int d = 0; d < dim; d += 4, to += ROW)
      for (int j = 0; j < 4; ++j) to[j] = static_cast<uint8_t>(code[d + j] + 128);
  } else {
    for (int d = 0; d < dim; d += 8, to += ROW)
      for (int j = 0; j < 4; ++j) to[j] = static_cast<uint8_t>((code[d + j] + 8) | (code[d + 4 + j] + 8) << 4);
  }
}

void quantize(const QuantizeKeysArgs& a) {
  int64_t entries = 0;
  for (int64_t h = 0; h < a.to.heads; ++h) {
    if (a.begin[h] < 0 || a.end[h] > a.to.capacity || a.end[h] > a.k_capacity)
      throw std::invalid_argument("quantize_keys: the entries lie outside the reserve");
    entries += std::max(0, a.end[h] - a.begin[h]);
  }
  const int threads = threads_for(entries * a.to.dim * 2);
  const int64_t step = (entries + threads - 1) / threads;  // entries per thread, counted through all heads
  const auto part = [&a](int64_t from, int64_t to) {
    for (int64_t h = 0; h < a.to.heads && to > 0; ++h) {
      const int64_t n = std::max(0, a.end[h] - a.begin[h]);
      for (int64_t i = std::max<int64_t>(from, 0); i < std::min(to, n); ++i)
        a.bf16 ? quantize_entry<bf16>(a, h, a.begin[h] + i) : quantize_entry<float>(a, h, a.begin[h] + i);
      from -= n;
      to -= n;
    }
  };
  if (threads == 1) return part(0, entries);
#pragma omp parallel for num_threads(threads) schedule(static, 1)
  for (int t = 0; t < threads; ++t) part(t * step, std::min(entries, (t + 1) * step));
}

// ---------------------------------------------------------------- scan

// Quantised queries of one KV head, ready for the inner loop.
struct Queries {
  alignas(64) int32_t words[MAX_DIM / 4][HEADS];  // four int8 codes each
  int32_t zero[HEADS];                            // product with the codes' offset, to be subtracted
  float scale[HEADS];
  int heads;

  template <typename T>
  void load(const T* q, int n, int dim, int offset) {
    heads = n;
    for (int g = 0; g < HEADS; ++g) {
      int32_t code[MAX_DIM] = {};
      scale[g] = g < n ? quantize_vector(q + g * dim, dim, 127, code) : 0.f;
      zero[g] = 0;
      for (int d = 0; d < dim; d += 4) {
        int8_t bytes[4];
        for (int j = 0; j < 4; ++j) {
          bytes[j] = static_cast<int8_t>(code[d + j]);
          zero[g] -= offset * code[d + j];
        }
        std::memcpy(&words[d / 4][g], bytes, 4);
      }
    }
  }
};

// Sixteen floats, one per entry of a block; the compiler maps them to what the instruction set has.
typedef float Vec __attribute__((vector_size(64)));

inline Vec load(const float* from) {
  Vec x;
  std::memcpy(&x, from, sizeof x);
  return x;
}

// Products of one block with GB queries: exact integers, in float32, times the query's scale. Blocks are read one
// after the other: two at a time would save broadcasts, but the hardware's prefetcher follows one stream best.
#if WINNOW_ISA_avx512

inline __m512i load_in_order(const uint8_t* from) {
  __m512i x = _mm512_loadu_si512(from);
  asm volatile("" : "+v"(x));
  return x;
}

template <int BITS, int GB>
inline void block_dots(const Queries& q, const uint8_t* codes, int rows, Vec dots[GB]) {
  __m512i even[GB], odd[GB];  // two chains per head hide the instruction's latency
#pragma GCC unroll 4
  for (int g = 0; g < GB; ++g) {
    even[g] = _mm512_set1_epi32(q.zero[g]);
    odd[g] = _mm512_setzero_si512();
  }
  const __m512i low = _mm512_set1_epi8(15);
  for (int r = 0; r < rows; r += BITS == 8 ? 2 : 1) {
    // Measured: 4-bit codes are decoded too slowly for the hardware's prefetcher to run far enough ahead, 8-bit
    // codes are read at its full rate as long as the lines come in order.
    if (BITS == 4) __builtin_prefetch(codes + r * ROW + 2048, 0, 3);
    __m512i x = load_in_order(codes + r * ROW), y;
    if (BITS == 8) {
      y = load_in_order(codes + (r + 1) * ROW);
    } else {
      y = _mm512_and_si512(_mm512_srli_epi16(x, 4), low);
      x = _mm512_and_si512(x, low);
    }
    const int word = BITS == 8 ? r : 2 * r;
#pragma GCC unroll 4
    for (int g = 0; g < GB; ++g) {
      even[g] = _mm512_dpbusd_epi32(even[g], x, _mm512_set1_epi32(q.words[word][g]));
      odd[g] = _mm512_dpbusd_epi32(odd[g], y, _mm512_set1_epi32(q.words[word + 1][g]));
    }
  }
#pragma GCC unroll 4
  for (int g = 0; g < GB; ++g) dots[g] = (Vec)_mm512_cvtepi32_ps(_mm512_add_epi32(even[g], odd[g])) * q.scale[g];
}

#else

template <int BITS, int GB>
inline void block_dots(const Queries& q, const uint8_t* codes, int rows, Vec dots[GB]) {
  int32_t sum[GB][ENTRIES];
  for (int g = 0; g < GB; ++g) std::fill(sum[g], sum[g] + ENTRIES, q.zero[g]);
  for (int r = 0; r < rows; ++r, codes += ROW) {
    for (int half = 0; half < (BITS == 8 ? 1 : 2); ++half) {
      int16_t x[ROW];
      for (int i = 0; i < ROW; ++i)
        x[i] = static_cast<int16_t>(BITS == 8 ? codes[i] : half ? codes[i] >> 4 : codes[i] & 15);
      for (int g = 0; g < GB; ++g) {
        int8_t w[4];
        std::memcpy(w, &q.words[BITS == 8 ? r : 2 * r + half][g], 4);
        for (int i = 0; i < ENTRIES; ++i)
          sum[g][i] += x[4 * i] * w[0] + x[4 * i + 1] * w[1] + x[4 * i + 2] * w[2] + x[4 * i + 3] * w[3];
      }
    }
  }
  for (int g = 0; g < GB; ++g) {
    float exact[ENTRIES];
    for (int i = 0; i < ENTRIES; ++i) exact[i] = static_cast<float>(sum[g][i]);
    dots[g] = load(exact) * q.scale[g];
  }
}

#endif

// Entries first .. last - 1 of head h; `first` is a multiple of ENTRIES.
template <int BITS, int GB, Reduce REDUCE>
void scan_part(const KeyScanArgs& a, const std::vector<Queries>& passes, int64_t h, int64_t first, int64_t last) {
  const KeyCodes& c = a.from;
  const int64_t bytes = block_bytes(c);
  const int rows = static_cast<int>(bytes / ROW);
  const auto count = static_cast<int64_t>(passes.size());
  for (int64_t e = first; e < last; e += ENTRIES) {
    const uint8_t* codes = c.codes + h * c.codes_head + e / ENTRIES * bytes;
    const Vec by = load(c.scales + h * c.scales_head + e);
    const size_t size = static_cast<size_t>(std::min<int64_t>(ENTRIES, last - e)) * sizeof(float);
    Vec best = {};
    for (int64_t p = 0; p < count; ++p) {
      const Queries& q = passes[static_cast<size_t>(p)];
      Vec dots[GB];
      block_dots<BITS, GB>(q, codes, rows, dots);
#pragma GCC unroll 4
      for (int g = 0; g < GB; ++g) {
        if (g >= q.heads) break;
        const Vec x = dots[g] * by;
        if (REDUCE == Reduce::none)
          std::memcpy(a.out + (h * a.group + p * HEADS + g) * a.width + e, &x, size);
        else if (p == 0 && g == 0)
          best = x;
        else
          best = REDUCE == Reduce::sum ? best + x : x > best ? x : best;
      }
    }
    if (REDUCE != Reduce::none) std::memcpy(a.out + h * a.width + e, &best, size);
  }
}

using Part = void (*)(const KeyScanArgs&, const std::vector<Queries>&, int64_t, int64_t, int64_t);

template <int BITS, int GB>
Part choose_part(Reduce reduce) {
  if (reduce == Reduce::none) return scan_part<BITS, GB, Reduce::none>;
  return reduce == Reduce::max ? scan_part<BITS, GB, Reduce::max> : scan_part<BITS, GB, Reduce::sum>;
}

template <int BITS>
void scan_bits(const KeyScanArgs& a) {
  const KeyCodes& c = a.from;
  const int64_t rows = a.reduce == Reduce::none ? a.group : 1;
  int64_t entries = 0;
  struct Chunk {
    int64_t head, first, last;
  };
  std::vector<Chunk> chunks;
  for (int64_t h = 0; h < c.heads; ++h) {
    const int64_t n = a.lengths[h];
    if (n < 0 || n > c.capacity || n > a.width)
      throw std::invalid_argument("key_scan: a length lies outside the reserve");
    entries += n;
    for (int64_t e = 0; e < n; e += CHUNK) chunks.push_back({h, e, std::min(e + CHUNK, n)});
    for (int64_t g = 0; g < rows; ++g) {
      float* out = a.out + (h * rows + g) * a.width;
      std::fill(out + n, out + a.width, MINUS_INF);
    }
  }
  const auto dim = static_cast<int>(c.dim);
  const int64_t count = (a.group + HEADS - 1) / HEADS;
  std::vector<std::vector<Queries>> queries(static_cast<size_t>(c.heads), std::vector<Queries>(count));
  for (int64_t h = 0; h < c.heads; ++h) {
    for (int64_t p = 0; p < count; ++p) {
      const int64_t at = (h * a.group + p * HEADS) * dim;
      const int n = static_cast<int>(std::min<int64_t>(HEADS, a.group - p * HEADS));
      if (a.bf16)
        queries[h][p].load(static_cast<const bf16*>(a.q) + at, n, dim, BITS == 8 ? 128 : 8);
      else
        queries[h][p].load(static_cast<const float*>(a.q) + at, n, dim, BITS == 8 ? 128 : 8);
    }
  }
  const Part part = a.group == 1   ? choose_part<BITS, 1>(a.reduce)
                    : a.group == 2 ? choose_part<BITS, 2>(a.reduce)
                                   : choose_part<BITS, HEADS>(a.reduce);
  const int threads = threads_for(entries * c.dim * c.bits / 8);
  const auto n = static_cast<int64_t>(chunks.size());
  const auto run = [&](int64_t i) {
    part(a, queries[static_cast<size_t>(chunks[i].head)], chunks[i].head, chunks[i].first, chunks[i].last);
  };
  if (threads == 1) {
    for (int64_t i = 0; i < n; ++i) run(i);
  } else {
#pragma omp parallel for num_threads(threads) schedule(dynamic, 1)
    for (int64_t i = 0; i < n; ++i) run(i);
  }
}

void scan(const KeyScanArgs& a) { a.from.bits == 8 ? scan_bits<8>(a) : scan_bits<4>(a); }

}  // namespace

KeyScanKernels key_scan_kernels() { return {quantize, scan}; }

}  // namespace WINNOW_ISA
}  // namespace winnow
