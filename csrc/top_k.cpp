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
constexpr int64_t RUNS = 64;
constexpr int64_t SAMPLE = RUNS * RUN;
constexpr int64_t AHEAD = 2048;        // least scores between what is read and what is fetched
constexpr int64_t EARLY = 1 << 15;     // most scores of a row that are fetched before it is its turn
constexpr int64_t SAMPLE_FROM = 8192;  // shorter rows are candidates as a whole
constexpr int64_t SMALL = 64;          // candidates that are ranked outright
constexpr int64_t SERIAL_BYTES = 1 << 18;
constexpr int SLACK = 16;              // vector stores may write this far behind the last value
constexpr float LOWEST = std::numeric_limits<float>::lowest();  // -inf and NaN are never candidates

struct Row {
  const float* scores;
  int64_t length;
};

// Where sample i of a row begins: at random within its part of the row, against scores that repeat, and a run
// where a line of the cache does. A part is long enough for two runs.
template <int64_t run>
const float* sampled(const Row& row, int64_t i) {
  constexpr uintptr_t bytes = run * sizeof(float);
  const int64_t part = row.length / (SAMPLE / run);
  const uint64_t random = (static_cast<uint32_t>(i) + 1) * 2654435769u;
  const auto jitter = static_cast<int64_t>(random * static_cast<uint64_t>(part - 2 * run + 2) >> 32);
  const float* from = row.scores + i * part + jitter;
  return reinterpret_cast<const float*>((reinterpret_cast<uintptr_t>(from) + bytes - 1) / bytes * bytes);
}

// Keeps memory busy while candidates are collected and sorted out: fetches the rest of the row, then the sample
// of the row that follows, whose lines are far apart and take longest, then its beginning. Line by line between
// other work, because processors drop what is asked for faster than memory can answer.
class Ahead {
 public:
  explicit Ahead(const Row& first) { follow(first); }

  // From now on `row` is read, which followed until now, and `next` follows. Empty rows are passed over.
  void turn(const Row& row, const Row& next) {
    if (next_.length) at_ = end_;
    while (next_.length) line();
    end_ = row.length ? row.scores + row.length : at_;
    follow(next);
  }

  // Whether what is fetched lies too close before x, which is read now.
  bool late(const float* x) const { return at_ < x + AHEAD; }

  // (Inlined, because GCC drops calls that do nothing but fetch.)
  inline __attribute__((always_inline)) void line() {
    const float* from = at_;
    if (__builtin_expect(at_ < end_, 1)) {
      at_ += RUN;
    } else {
      if (!next_.length) return;
      from = across();
    }
    __builtin_prefetch(from, 0, 2);
  }

  // What memory can answer while candidates i to i + 15 are sorted out: three lines for every two such steps.
  inline __attribute__((always_inline)) void beside(int64_t i) {
    line();
    if (i & 16) line();
  }

 private:
  void follow(const Row& next) {
    next_ = next;
    run_ = next.length < SAMPLE_FROM ? RUNS : 0;
  }

  const float* across() {
    if (run_ < RUNS) return sampled<RUN>(next_, run_++);
    const float* from = next_.scores;
    at_ = from + RUN;
    end_ = from + std::min(next_.length, EARLY);
    next_ = {};
    return from;
  }

  const float *at_ = nullptr, *end_ = nullptr;
  Row next_{};
  int64_t run_ = 0;
};

#if WINNOW_ISA_avx512

// Appends (x[i], i) for all x[i] >= least; returns how many.
int64_t collect(const float* x, int64_t n, float least, float* value, int32_t* index, Ahead& ahead) {
  const __m512 bound = _mm512_set1_ps(least);
  const __m512i lanes = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  // The bytes 0, 1, ..., 63.
  const __m512i every =
      _mm512_add_epi32(_mm512_mullo_epi32(lanes, _mm512_set1_epi32(0x04040404)), _mm512_set1_epi32(0x03020100));
  int64_t count = 0;
  // Of 64 scores the places of those taken are compressed as bytes, and 16 of them, usually all, picked at once.
  // Whether there is any is not asked: at usual densities nothing can predict it.
  const auto take = [&](int64_t i, uint64_t valid) {
    __m512 v[4];
    uint64_t taken = 0;
    for (int j = 0; j < 4; ++j) {
      const auto there = static_cast<__mmask16>(valid >> (16 * j));
      v[j] = _mm512_maskz_loadu_ps(there, x + i + 16 * j);
      taken |= static_cast<uint64_t>(_mm512_mask_cmp_ps_mask(there, v[j], bound, _CMP_GE_OQ)) << (16 * j);
    }
    __m512i places = _mm512_maskz_compress_epi8(taken, every);
    int64_t to = count;
    count += __builtin_popcountll(taken);
    for (;; places = _mm512_alignr_epi64(places, places, 2)) {
      const __m512i place = _mm512_cvtepu8_epi32(_mm512_castsi512_si128(places));
      const __mmask16 upper = _mm512_test_epi32_mask(place, _mm512_set1_epi32(32));
      const __m512 low = _mm512_permutex2var_ps(v[0], place, v[1]), high = _mm512_permutex2var_ps(v[2], place, v[3]);
      _mm512_storeu_ps(value + to, _mm512_mask_blend_ps(upper, low, high));
      _mm512_storeu_si512(index + to, _mm512_add_epi32(place, _mm512_set1_epi32(static_cast<int32_t>(i))));
      to += 16;
      if (__builtin_expect(to >= count, 1)) break;
    }
  };
  int64_t i = 0;
  for (; i + 64 <= n; i += 64) {
    // Four lines are read. What was fetched early is read faster than memory answers: fetching keeps to its own
    // pace and lets the lead shrink to what is needed.
    for (int j = 0; j < 2; ++j) ahead.line();
    if (ahead.late(x + i)) {
      for (int j = 0; j < 4; ++j) ahead.line();
    }
    take(i, ~uint64_t{0});
  }
  if (i < n) {
    ahead.line();
    take(i, (uint64_t{1} << (n - i)) - 1);
  }
  return count;
}

// Splits x into what is above and what is below the pivot.
void split(const float* x, int64_t n, float pivot, float* above, int64_t* n_above, float* below, int64_t* n_below,
           Ahead& ahead) {
  const __m512 bound = _mm512_set1_ps(pivot);
  int64_t a = 0, b = 0;
  for (int64_t i = 0; i < n; i += 16) {
    ahead.beside(i);
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
int64_t emit(const float* value, const int32_t* index, int64_t n, float least, int64_t skip, int32_t* to,
             Ahead& ahead) {
  const __m512 bound = _mm512_set1_ps(least);
  int64_t count = 0;
  for (int64_t i = 0; i < n; i += 16) {
    ahead.beside(i);
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

int64_t collect(const float* x, int64_t n, float least, float* value, int32_t* index, Ahead&) {
  int64_t count = 0;
  for (int64_t i = 0; i < n; ++i) {
    value[count] = x[i];
    index[count] = static_cast<int32_t>(i);
    count += x[i] >= least;
  }
  return count;
}

void split(const float* x, int64_t n, float pivot, float* above, int64_t* n_above, float* below, int64_t* n_below,
           Ahead& ahead) {
  int64_t a = 0, b = 0;
  for (int64_t i = 0; i < n; ++i) {
    if (i % RUN == 0) ahead.line();
    const float v = x[i];
    above[a] = v;
    below[b] = v;
    a += v > pivot;
    b += v < pivot;
  }
  *n_above = a;
  *n_below = b;
}

int64_t emit(const float* value, const int32_t* index, int64_t n, float least, int64_t skip, int32_t* to, Ahead&) {
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
  // Indices of the k largest of a row, ascending; returns how many there were.
  int64_t run(const Row& row, int64_t k, int32_t* to, Ahead& ahead) {
    if (k <= 0 || row.length <= 0) return 0;
    reserve(row.length);
    // Runs cost few lines of memory, but neighbours may be alike: the second guess, once the row is in the
    // cache, samples single scores.
    float threshold = suggest<RUN>(row, k, ahead);
    int64_t count = candidates(row, threshold, ahead);
    if (count < k && threshold > LOWEST) {
      threshold = suggest<1>(row, k, ahead);
      count = candidates(row, threshold, ahead);
    }
    if (count < k && threshold > LOWEST) count = candidates(row, LOWEST, ahead);
    if (count <= k) {
      std::copy(index_.begin(), index_.begin() + count, to);
      return count;
    }
    const Kth kth = select(value_.data(), count, k, ahead);
    // Of equal scores the more recent entries, those with larger indices, are taken.
    return emit(value_.data(), index_.data(), count, kth.value, kth.above + kth.equal - k, to, ahead);
  }

 private:
  void reserve(int64_t n) {
    const auto size = static_cast<size_t>(n + SLACK);
    if (value_.size() >= size) return;
    value_.resize(size);
    index_.resize(size);
    for (auto& buffer : parts_) buffer.resize(size);
  }

  int64_t candidates(const Row& row, float least, Ahead& ahead) {
    return collect(row.scores, row.length, least, value_.data(), index_.data(), ahead);
  }

  // A score that very likely has more than k, but not many more, scores at or above it.
  template <int64_t run>
  float suggest(const Row& row, int64_t k, Ahead& ahead) {
    if (row.length < SAMPLE_FROM) return LOWEST;
    const double expected = static_cast<double>(k) * SAMPLE / static_cast<double>(row.length);
    const auto rank = static_cast<int64_t>(expected + 4 * std::sqrt(expected) + 4);
    if (rank >= SAMPLE / 2) return LOWEST;
    int64_t count = 0;
    for (int64_t i = 0; i < SAMPLE / run; ++i) {
      count += collect(sampled<run>(row, i), run, LOWEST, value_.data() + count, index_.data(), ahead);
    }
    return count < rank ? LOWEST : select(value_.data(), count, rank, ahead).value;
  }

  // The k-th largest of x[0..n), 0 < k <= n, without changing x.
  Kth select(const float* x, int64_t n, int64_t k, Ahead& ahead) {
    int64_t above = 0;  // values already known to be larger than all that is left
    int from = 0;       // which pair of buffers the next split may overwrite
    while (n > SMALL) {
      for (int j = 0; j < 6; ++j) ahead.line();  // about as long as the choice takes
      const float pivot = choose(x, n, k - above);
      float *more = parts_[from].data(), *less = parts_[from + 1].data();
      int64_t n_more, n_less;
      split(x, n, pivot, more, &n_more, less, &n_less, ahead);
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
    const auto row = [&a](int64_t r) {
      return r < a.rows ? Row{a.scores + r * a.row_stride, a.lengths[r]} : Row{};
    };
    int64_t r = rows++;
    Ahead ahead(row(r));
    for (int64_t next; r < a.rows; r = next) {
      next = rows++;
      ahead.turn(row(r), row(next));
      int32_t* to = a.indices + r * a.listed;
      const int64_t count = selector.run(row(r), a.k[r], to, ahead);
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
