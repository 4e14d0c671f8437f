// The softmax of decode attention, tile by tile, and the merging of its partial results.
#pragma once
#include <cmath>
#include <limits>
#include <vector>

#include "decode_tile.h"

namespace winnow {
namespace WINNOW_ISA {
namespace {

constexpr float LOG2E = 1.44269504f;
constexpr float MINUS_INF = -std::numeric_limits<float>::infinity();

// Running maximum of HEADS query heads, and their sums of exponentials below it.
struct Running {
  float top[HEADS], total[HEADS];

  void clear() {
    std::fill(top, top + HEADS, MINUS_INF);
    std::fill(total, total + HEADS, 0.f);
  }

  // Logits of n entries, a multiple of 8, become weights relative to the maximum, theirs included. True where
  // it moved: `down` is then what older weights are to be multiplied by.
  bool add(float* x, int n, float (&down)[LANES]) {
    Vec best = splat(MINUS_INF), best2 = best;
    for (int i = 0; i < n * HEADS; i += 2 * LANES) {
      best = larger(load(x + i), best);
      best2 = larger(load(x + i + LANES), best2);
    }
    float most[LANES], shift[LANES], sum[LANES];
    store(most, larger(best, best2));
    bool moved = false;
    for (int g = 0; g < HEADS; ++g) {
      const float now =
          std::max(top[g], std::max(std::max(most[g], most[g + 4]), std::max(most[g + 8], most[g + 12])));
      // While nothing was seen the maximum is -inf: shift by 0 there so that no NaN appears.
      const float by = now == MINUS_INF ? 0.f : now;
      for (int j = g; j < LANES; j += HEADS) {
        shift[j] = by * LOG2E;
        down[j] = (top[g] - by) * LOG2E;
      }
      moved |= now != top[g];
      top[g] = now;
    }
    store(down, exp2_fast(load(down)));
    const Vec by = load(shift);
    Vec all = {};
    for (int i = 0; i < n * HEADS; i += LANES) {
      const Vec p = exp2_fast(load(x + i) * LOG2E - by);
      store(x + i, p);
      all += p;
    }
    store(sum, all);
    for (int g = 0; g < HEADS; ++g)
      total[g] = total[g] * down[g] + (sum[g] + sum[g + 4]) + (sum[g + 8] + sum[g + 12]);
    return moved;
  }
};

// One query head's partial results {maximum, sum, weighted sum[dim]} into its output.
template <typename T>
void merge(const std::vector<const float*>& parts, int64_t dim, T* out, float* lse) {
  float top = MINUS_INF;
  for (const float* part : parts) top = std::max(top, part[0]);
  float sum[MAX_DIM] = {};
  float total = 0.f;
  if (top > MINUS_INF) {
    for (const float* part : parts) {
      const float weight = exp2_fast((part[0] - top) * LOG2E);
      total += weight * part[1];
      for (int64_t d = 0; d < dim; ++d) sum[d] += weight * part[2 + d];
    }
  }
  *lse = top > MINUS_INF ? top + std::log(total) : MINUS_INF;
  const float by = top > MINUS_INF ? 1.f / total : 0.f;
  for (int64_t d = 0; d < dim; ++d) from_float(sum[d] * by, out + d);
}

// Entries first..last - 1 of those that a head holds are visible: positions ascend, so they are one range.
struct Visible {
  int64_t first, last;
};

// `at` are the positions of `n` entries, or null where entry e is at start + e; window < 0: none.
inline Visible visible(const int32_t* at, int64_t start, int64_t n, int64_t position, int64_t window) {
  const int64_t oldest = window < 0 ? std::numeric_limits<int64_t>::min() : position - window + 1;
  Visible seen;
  if (at) {
    seen.last = std::upper_bound(at, at + n, position, [](int64_t x, int32_t y) { return x < y; }) - at;
    seen.first = std::lower_bound(at, at + seen.last, oldest, [](int32_t x, int64_t y) { return x < y; }) - at;
  } else {
    seen.last = std::clamp<int64_t>(position - start + 1, 0, n);
    seen.first = window < 0 ? 0 : std::clamp<int64_t>(oldest - start, 0, seen.last);
  }
  return seen;
}

}  // namespace
}  // namespace WINNOW_ISA
}  // namespace winnow
