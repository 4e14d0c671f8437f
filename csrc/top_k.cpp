// Top-k: one pass over a row keeps the candidates above a threshold that a sample suggests, a quickselect
// over the candidates finds the exact k-th largest, and a pass over them writes the indices.
//
// A sample only decides how many candidates there are, never which are chosen: where it was misleading and
// fewer than k candidates remain, the pass is repeated with another sample, and then without a threshold.
#include "top_k.h"

#include <algorithm>
#include <atomic>
#include <cassert>
#include <cmath>
#include <limits>
#include <stdexcept>
#include <vector>

#ifdef _OPENMP
#include <omp.h>
#endif
#if WINNOW_ISA_avx512
#include <immintrin.h>
#endif

namespace winnow {
namespace WINNOW_ISA {
namespace {

constexpr int64_t RUN = 16;            // a sampled run: what one line of the cache holds
constexpr int64_t SAMPLE = 64 * RUN;
constexpr int64_t AHEAD = 2048;        // scores between what is read and what is fetched
constexpr int64_t SAMPLE_FROM = 8192;  // shorter rows are candidates as a whole
constexpr int64_t SMALL = 64;          // candidates that are ranked outright
constexpr int64_t SERIAL_BYTES = 1 << 18;
constexpr int SLACK = 16;              // vector stores may write this far behind the last value
constexpr float LOWEST = std::numeric_limits<float>::lowest();  // -inf and NaN are never candidates

#if WINNOW_ISA_avx512

// Appends (x[i], i) for all x[i] >= least; returns how many.
int64_t collect(const float* x, int64_t n, float least, float* value, int32_t* index) {
  const __m512 bound = _mm512_set1_ps(least);
  __m512i at = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  const __m512i step = _mm512_set1_epi32(16);
  int64_t count = 0;
  for (int64_t i = 0; i < n; i += 16) {
    if (i + AHEAD < n) __builtin_prefetch(x + i + AHEAD, 0, 2);
    const auto valid = static_cast<__mmask16>(n - i >= 16 ? 0xffff : (1u << (n - i)) - 1);
    const __m512 v = _mm512_maskz_loadu_ps(valid, x + i);
    const __mmask16 take = _mm512_mask_cmp_ps_mask(valid, v, bound, _CMP_GE_OQ);
    // Without a branch: at usual densities whether any is taken cannot be predicted.
    _mm512_storeu_ps(value + count, _mm512_maskz_compress_ps(take, v));
    _mm512_storeu_si512(index + count, _mm512_maskz_compress_epi32(take, at));
    count += __builtin_popcount(take);
    at = _mm512_add_epi32(at, step);
  }
  return count;
}

// Splits x into what is above and what is below the pivot.
void split(const float* x, int64_t n, float pivot, float* above, int64_t* n_above, float* below, int64_t* n_below) {
  const __m512 bound = _mm512_set1_ps(pivot);
  int64_t a = 0, b = 0;
  for (int64_t i = 0; i < n; i += 16) {
    const auto valid = static_cast<__mmask16>(n - i >= 16 ? 0xffff : (1u << (n - i)) - 1);
    const __m512 v = _mm512_maskz_loadu_ps(valid, x + i);
    const __mmask16 more = _mm512_mask_cmp_ps_mask(valid, v, bound, _CMP_GT_OQ);
    const __mmask16 less = _mm512_mask_cmp_ps_mask(valid, v, bound, _CMP_LT_OQ);
    _mm512_storeu_ps(above + a, _mm512_maskz_compress_ps(more, v));
    _mm512_storeu_ps(below + b, _mm512_maskz_compress_ps(less, v));
    a += __builtin_popcount(more);
    b += __builtin_popcount(less);
  }
  *n_above = a;
  *n_below = b;
}

// Writes the indices of all values above `least`, and of those equal to it but for the first `skip`.
int64_t emit(const float* value, const int32_t* index, int64_t n, float least, int64_t skip, int32_t* to) {
  const __m512 bound = _mm512_set1_ps(least);
  int64_t count = 0;
  for (int64_t i = 0; i < n; i += 16) {
    const auto valid = static_cast<__mmask16>(n - i >= 16 ? 0xffff : (1u << (n - i)) - 1);
    const __m512 v = _mm512_maskz_loadu_ps(valid, value + i);
    uint32_t equal = _mm512_mask_cmp_ps_mask(valid, v, bound, _CMP_EQ_OQ);
    for (; skip > 0 && equal; --skip) equal &= equal - 1;
    const auto take = static_cast<__mmask16>(_mm512_mask_cmp_ps_mask(valid, v, bound, _CMP_GT_OQ) | equal);
    const __m512i picked = _mm512_maskz_compress_epi32(take, _mm512_maskz_loadu_epi32(valid, index + i));
    const int found = __builtin_popcount(take);
    // The row ends where the last index does: no store may reach behind it.
    _mm512_mask_storeu_epi32(to + count, static_cast<__mmask16>((1u << found) - 1), picked);
    count += found;
  }
  return count;
}

#else

int64_t collect(const float* x, int64_t n, float least, float* value, int32_t* index) {
  int64_t count = 0;
  for (int64_t i = 0; i < n; ++i) {
    value[count] = x[i];
    index[count] = static_cast<int32_t>(i);
    count += x[i] >= least;
  }
  return count;
}

void split(const float* x, int64_t n, float pivot, float* above, int64_t* n_above, float* below, int64_t* n_below) {
  int64_t a = 0, b = 0;
  for (int64_t i = 0; i < n; ++i) {
    const float v = x[i];
    above[a] = v;
    below[b] = v;
    a += v > pivot;
    b += v < pivot;
  }
  *n_above = a;
  *n_below = b;
}

int64_t emit(const float* value, const int32_t* index, int64_t n, float least, int64_t skip, int32_t* to) {
  int64_t count = 0;
  for (int64_t i = 0; i < n; ++i) {
    const bool equal = value[i] == least;
    if (value[i] > least || (equal && skip <= 0)) to[count++] = index[i];
    skip -= equal;
  }
  return count;
}

#endif

struct Kth {
  float value;
  int64_t above, equal;  // how many values are larger, and how many the same
};

class Selector {
 public:
  // Fetches what `run` reads first of a row of n scores: a few lines far apart, which take longer to arrive
  // than a tenth of the row in one stream, and the beginning. (Inlined, because GCC drops calls that do nothing
  // but fetch.)
  static inline __attribute__((always_inline)) void fetch(const float* x, int64_t n) {
    if (n < SAMPLE_FROM) return;
    for (int64_t i = 0; i < SAMPLE / RUN; ++i) {
      const float* from = x + place(i, SAMPLE / RUN, n, RUN);
      __builtin_prefetch(from, 0, 2);
      __builtin_prefetch(from + RUN - 1, 0, 2);
    }
    for (int64_t i = 0; i < AHEAD; i += RUN) __builtin_prefetch(x + i, 0, 2);
  }

  // Indices of the k largest of x[0..n), ascending; returns how many there were. The row that comes next,
  // or null, is fetched where nothing else keeps memory busy.
  int64_t run(const float* x, int64_t n, int64_t k, int32_t* to, const float* next, int64_t next_n) {
    if (k <= 0 || n <= 0) return 0;
    reserve(n);
    // Runs cost few lines of memory, but neighbours may be alike: the second guess, once the row is in the
    // cache, samples single scores.
    float threshold = suggest<RUN>(x, n, k);
    int64_t count = collect(x, n, threshold, value_.data(), index_.data());
    if (count < k && threshold > LOWEST) {
      threshold = suggest<1>(x, n, k);
      count = collect(x, n, threshold, value_.data(), index_.data());
    }
    if (count < k && threshold > LOWEST) count = collect(x, n, LOWEST, value_.data(), index_.data());
    if (next) fetch(next, next_n);
    if (count <= k) {
      std::copy(index_.begin(), index_.begin() + count, to);
      return count;
    }
    const Kth kth = select(value_.data(), count, k);
    // Of equal scores the more recent entries, those with larger indices, are taken.
    return emit(value_.data(), index_.data(), count, kth.value, kth.above + kth.equal - k, to);
  }

 private:
  void reserve(int64_t n) {
    const auto size = static_cast<size_t>(n + SLACK);
    if (value_.size() >= size) return;
    value_.resize(size);
    index_.resize(size);
    for (auto& buffer : parts_) buffer.resize(size);
  }

  // Where sample i of `samples` of a row of n scores begins: at random within its part of the row, against
  // scores that repeat.
  static int64_t place(int64_t i, int64_t samples, int64_t n, int64_t run) {
    const int64_t part = n / samples;
    const uint32_t jitter = (static_cast<uint32_t>(i) + 1) * 2654435769u >> 8;
    return i * part + static_cast<int64_t>(jitter % static_cast<uint32_t>(part - run + 1));
  }

  // A score that very likely has more than k, but not many more, scores at or above it.
  template <int64_t run>
  float suggest(const float* x, int64_t n, int64_t k) {
    if (n < SAMPLE_FROM) return LOWEST;
    const double expected = static_cast<double>(k) * SAMPLE / static_cast<double>(n);
    const auto rank = static_cast<int64_t>(expected + 4 * std::sqrt(expected) + 4);
    if (rank >= SAMPLE / 2) return LOWEST;
    int64_t count = 0;
    for (int64_t i = 0; i < SAMPLE / run; ++i) {
      const float* from = x + place(i, SAMPLE / run, n, run);
      for (int64_t j = 0; j < run; ++j) {
        value_[static_cast<size_t>(count)] = from[j];
        count += from[j] >= LOWEST;
      }
    }
    return count < rank ? LOWEST : select(value_.data(), count, rank).value;
  }

  // The k-th largest of x[0..n), 0 < k <= n, without changing x.
  Kth select(const float* x, int64_t n, int64_t k) {
    int64_t above = 0;  // values already known to be larger than all that is left
    int from = 0;       // which pair of buffers the next split may overwrite
    while (n > SMALL) {
      const float pivot = choose(x, n, k - above);
      float *more = parts_[from].data(), *less = parts_[from + 1].data();
      int64_t n_more, n_less;
      split(x, n, pivot, more, &n_more, less, &n_less);
      const int64_t equal = n - n_more - n_less;
      if (k <= above + n_more) {
        x = more;
        n = n_more;
      } else if (k <= above + n_more + equal) {
        return {pivot, above + n_more, equal};
      } else {
        above += n_more + equal;
        x = less;
        n = n_less;
      }
      from = 2 - from;
    }
    float small[SMALL];
    std::copy(x, x + n, small);
    std::fill(small + n, small + SMALL, -std::numeric_limits<float>::infinity());
    const Kth kth = ranked(small, k - above);
    return {kth.value, above + kth.above, kth.equal};
  }

  // One of the values, near the one of the wanted rank.
  static float choose(const float* x, int64_t n, int64_t rank) {
    constexpr int64_t FEW = 32;
    float few[FEW];
    for (int64_t i = 0; i < FEW; ++i) few[i] = x[i * n / FEW];
    return ranked(few, std::min(FEW, rank * FEW / n + 1)).value;
  }

  // The k-th largest of a few values, 0 < k <= size. Counting is many comparisons, but sorting as few is slower
  // for the branches that nothing can predict.
  template <int size>
  static Kth ranked(const float (&x)[size], int64_t k) {
    for (int i = 0;; ++i) {
      assert(i < size);
      int32_t above = 0, equal = 0;
      for (int j = 0; j < size; ++j) {
        above += x[j] > x[i];
        equal += x[j] == x[i];
      }
      if (above < k && k <= above + equal) return {x[i], above, equal};
    }
  }

  std::vector<float> value_;
  std::vector<int32_t> index_;
  std::vector<float> parts_[4];
};

void top_k(const TopKArgs& a) {
  int64_t work = 0;
  for (int64_t r = 0; r < a.rows; ++r) {
    if (a.lengths[r] < 0 || a.lengths[r] > a.width) throw std::invalid_argument("top_k: a length lies outside its row");
    if (a.k[r] > a.listed) throw std::invalid_argument("top_k: a k exceeds the list");
    work += a.lengths[r];
  }
  std::atomic<int64_t> rows{0};
  // Each thread takes a row and knows the one that it will take then.
  const auto run = [&a, &rows] {
    static thread_local Selector selector;  // its buffers outlive the call: they are as long as a row
    for (int64_t r = rows++, next; r < a.rows; r = next) {
      next = rows++;
      const bool more = next < a.rows;
      int32_t* to = a.indices + r * a.listed;
      const int64_t count = selector.run(a.scores + r * a.row_stride, a.lengths[r], a.k[r], to,
                                         more ? a.scores + next * a.row_stride : nullptr, more ? a.lengths[next] : 0);
      std::fill(to + count, to + a.listed, -1);
      a.counts[r] = static_cast<int32_t>(count);
    }
  };
#ifdef _OPENMP
  if (a.rows > 1 && work * 4 >= SERIAL_BYTES && !omp_in_parallel()) {
#pragma omp parallel
    run();
    return;
  }
#endif
  run();
}

}  // namespace

TopKKernels top_k_kernels() { return {top_k}; }

}  // namespace WINNOW_ISA
}  // namespace winnow
