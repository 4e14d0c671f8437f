// The arithmetic of one group of query rows against one tile of packed keys and values.
//
// A tile is up to kMaxPanels panels. A K panel holds, for each word of the head dimension, that word
// of 16 keys; a V panel holds, for each word along its 16 keys, that word of every output dimension. Both
// are read with full vectors while one word of the query (of the weights) is broadcast.
#pragma once
#include <omp.h>

#include <algorithm>
#include <cmath>
#include <limits>

#include "tile_simd.h"
#include "queries_and_entries.h"

namespace winnow {
namespace WINNOW_ISA {

constexpr int kMaxPanels = 32;  // panels per tile, at most
constexpr int kTileKeys = kMaxPanels * kPanel;
constexpr int kRow = kTileKeys + kPanel;  // row stride of logits and weights: rows must not share cache sets
constexpr float kLn2 = 0.69314718055994531f;
constexpr float kNoMax = -std::numeric_limits<float>::infinity();
// Weights are exponentials against a reference that may lag behind the row's maximum by this many powers
// of two; only then are the row's sums rescaled. The result is exact either way.
constexpr float kLag = 8.f;
constexpr float kGrown = 1024.f;  // lane sum of a micro-tile that says that some weight is beyond 2^kLag
static_assert(kGrown >= 256.f * kTilePanels, "then the largest logit moves the reference");

// Threads for so many multiplications: below some, waking another does not pay.
static inline int threads_for(double products) { return products < 2e6 ? 1 : omp_get_max_threads(); }

// Slots of a list that a row sees: [a0, a1) and [b0, b1), with a1 <= b0.
struct Visible {
  int32_t a0, a1, b0, b1;
  int64_t count() const { return int64_t{a1} - a0 + b1 - b0; }
};

// What the rows of a group share about a list.
struct GroupSpan {
  int32_t any0, any1;      // no row sees a slot outside
  int32_t all_a0, all_a1;  // every row sees these,
  int32_t all_b0, all_b1;  // and these
};

struct TileMaths {
  float scale;  // times log2(e)
  float plain_scale, softcap;
  bool transforms;  // softcap or bias
};

static inline TileMaths tile_maths(const QueriesAndEntries& a) {
  return {a.scale * kLog2E, a.scale, a.softcap, a.softcap > 0 || a.bias != nullptr};
}

// A group's state; row r of the group is at [r].
struct Group {
  const uint32_t* q;  // [rows][words]
  float* o;           // [rows][D]
  float* m;           // [rows] reference exponent
  float* l;           // [rows][kLanes] partial sums of the weights
  float* top;         // [rows][kLanes] largest scaled logit times log2(e), or null
  const Visible* visible[kTileRows];
  GroupSpan span;
};

struct Tile {
  const uint32_t* k[kMaxPanels];
  const uint32_t* v[kMaxPanels];
  const float* bias[kMaxPanels];
  int panels;
  int32_t slot;  // list slot of the first key
};

// Per-thread buffers of one group and tile.
struct TileBuffers {
  float* s;        // [kTileRows][kRow] logits
  uint32_t* p;     // [kTileRows][kRow] words of weights
  float* highest;  // [kTileRows][kLanes]
};

// acc[r] = products of query row r with the keys of N panels. Part of its callers' loops: the sums stay in registers.
template <class Way, int R, int N>
static inline __attribute__((always_inline)) void multiply(const uint32_t* q, const uint32_t* const* k, int words,
                                                           Vec (&acc)[R][N * kPanelVectors]) {
  constexpr int NV = N * kPanelVectors;
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
    for (int j = 0; j < NV; ++j) acc[r][j] = Vec{};
  const uint32_t* kp[N];
#pragma GCC unroll 8
  for (int n = 0; n < N; ++n) kp[n] = k[n];
#pragma GCC unroll 1
  for (int w = 0; w < words; ++w) {
    Vec b[NV];
#pragma GCC unroll 8
    for (int j = 0; j < NV; ++j) b[j] = load(kp[j / kPanelVectors] + w * kPanel + j % kPanelVectors * kLanes);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const Vec a = splat_word(q + r * words + w);
#pragma GCC unroll 8
      for (int j = 0; j < NV; ++j) acc[r][j] = Way::dot(acc[r][j], a, b[j]);
    }
  }
}

template <class Way, int R, int N>
WINNOW_NOINLINE void qk_micro(const uint32_t* q, const uint32_t* const* k, int words, float* s, float* highest) {
  constexpr int NV = N * kPanelVectors;
  Vec acc[R][NV];
  multiply<Way, R, N>(q, k, words, acc);
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
    Vec top = load(highest + r * kLanes);
#pragma GCC unroll 8
    for (int j = 0; j < NV; ++j) {
      store(s + r * kRow + j * kLanes, acc[r][j]);
      top = larger(acc[r][j], top);
    }
    store(highest + r * kLanes, top);
  }
}

template <class Way, int R, int NV>
WINNOW_NOINLINE void pv_micro(const uint32_t* p, const uint32_t* const* v, int panels, int at, int D, float* o) {
  constexpr int kSteps = kPanel / Way::kPerWord;
  Vec acc[R][NV];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
    for (int j = 0; j < NV; ++j) acc[r][j] = load(o + r * D + at + j * kLanes);
  // There is always a panel, and saying so to the compiler keeps the sums in registers.
  const uint32_t* const* const end = v + panels;
  do {
    const uint32_t* from = *v + at;
    const uint32_t* const p_end = p + kSteps;
    do {
      Vec b[NV];
#pragma GCC unroll 8
      for (int j = 0; j < NV; ++j) b[j] = load(from + j * kLanes);
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
        const Vec a = splat_word(p + r * kRow);
#pragma GCC unroll 8
        for (int j = 0; j < NV; ++j) acc[r][j] = Way::dot(acc[r][j], a, b[j]);
      }
      from += D;
    } while (++p != p_end);
  } while (++v != end);
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
    for (int j = 0; j < NV; ++j) store(o + r * D + at + j * kLanes, acc[r][j]);
}

template <class Way, int R>
static inline void qk_rows(const uint32_t* q, const uint32_t* const* k, int panels, int words, float* s,
                           float* highest) {
  int n = 0;
  for (; n + kTilePanels <= panels; n += kTilePanels)
    qk_micro<Way, R, kTilePanels>(q, k + n, words, s + n * kPanel, highest);
  if constexpr (kTilePanels > 1) {
    if (panels - n == 1) qk_micro<Way, R, 1>(q, k + n, words, s + n * kPanel, highest);
    if (panels - n == 2) qk_micro<Way, R, 2>(q, k + n, words, s + n * kPanel, highest);
    if (panels - n == 3) qk_micro<Way, R, 3>(q, k + n, words, s + n * kPanel, highest);
  }
}

template <class Way, int R>
static inline void pv_rows(const uint32_t* p, const uint32_t* const* v, int panels, int D, float* o) {
  constexpr int kWide = kTileVectors * kLanes;
  int at = 0;
  for (; at + kWide <= D; at += kWide) pv_micro<Way, R, kTileVectors>(p, v, panels, at, D, o);
  const int left = (D - at) / kLanes;
  if (left == 1) pv_micro<Way, R, 1>(p, v, panels, at, D, o);
  if constexpr (kTileVectors > 2) {
    if (left == 2) pv_micro<Way, R, 2>(p, v, panels, at, D, o);
    if (left == 3) pv_micro<Way, R, 3>(p, v, panels, at, D, o);
  }
}

// Products of queries and keys as logits times log2(e), where there is a softcap or a bias.
static inline Vec transformed(Vec x, const TileMaths& maths, const float* bias) {
  x = x * splat(maths.plain_scale);
  if (maths.softcap > 0) {
    // tanh(y) = 1 - 2 / (e^2y + 1); the exponent is clamped where tanh is 1 in float32.
    Vec y = x * splat(2 * kLog2E / maths.softcap);
    y = y > splat(40.f) ? splat(40.f) : y;
    x = splat(maths.softcap) * (splat(1.f) - splat(2.f) / (exp2v<5>(y) + splat(1.f)));
  }
  if (bias != nullptr) x = x + load(bias);
  return x * splat(kLog2E);
}

// Softcap, bias and mask, in place; afterwards logits are in powers of two where `maths.transforms`.
WINNOW_NOINLINE void transform_row(float* s, const Tile& tile, int first, int panels, const Visible& seen, bool mask,
                                 const TileMaths& maths, float* highest) {
  Vec top = splat(kNoMax);
  const VecInt lanes = iota();
  for (int n = 0; n < panels; ++n) {
    const int32_t slot = tile.slot + (first + n) * kPanel;
    const bool whole = !mask || (slot >= seen.b0 && slot + kPanel <= seen.b1);
    if (whole && !maths.transforms) {
      for (int i = 0; i < kPanelVectors; ++i) top = larger(load(s + n * kPanel + i * kLanes), top);
      continue;
    }
    const float* bias = tile.bias[first + n];
    for (int i = 0; i < kPanelVectors; ++i) {
      float* logits = s + n * kPanel + i * kLanes;
      Vec x = load(logits);
      if (maths.transforms) x = transformed(x, maths, bias == nullptr ? nullptr : bias + i * kLanes);
      if (!whole) {
        const VecInt at = lanes + (slot + i * kLanes);
        const VecInt lit = ((at >= seen.a0) & (at < seen.a1)) | ((at >= seen.b0) & (at < seen.b1));
        x = lit ? x : splat(kNoMax);
      }
      store(logits, x);
      top = larger(x, top);
    }
  }
  store(highest, top);
}

template <class Way, int N>
static inline Vec weigh_panels(const float* s, uint32_t* p, Vec scale, Vec reference, Vec total) {
  Vec w[N * kPanelVectors];
#pragma GCC unroll 8
  for (int i = 0; i < N * kPanelVectors; ++i) {
    w[i] = exp2v<Way::kExpDegree>(load(s + i * kLanes) * scale - reference);
    total = total + w[i];
  }
  Way::template store_panels<N>(p, w);
  return total;
}

// Weights of one row, and its running sums. `scale` turns logits into powers of two.
template <class Way>
WINNOW_NOINLINE void weigh_row(const float* s, uint32_t* p, int panels, float scale, const float* highest, int D,
                               float* o, float* m, float* l, float* top) {
  constexpr int kPanelWeights = kPanel / Way::kPerWord;
  const Vec high = load(highest) * splat(scale);
  if (top != nullptr) store(top, larger(high, load(top)));
  if (any_greater(high, splat(*m + kLag))) {
    const float next = largest(high);
    const Vec factor = exp2v<5>(splat(*m - next));
    for (int d = 0; d < D; d += kLanes) store(o + d, load(o + d) * factor);
    store(l, load(l) * factor);
    *m = next;
  }
  // Before anything was seen the reference is -inf; any finite one serves, every weight is then zero.
  const Vec reference = splat(*m == kNoMax ? 0.f : *m);
  Vec total = load(l);
  int n = 0;
  for (; n + 2 <= panels; n += 2)
    total = weigh_panels<Way, 2>(s + n * kPanel, p + n * kPanelWeights, splat(scale), reference, total);
  if (n < panels)
    total = weigh_panels<Way, 1>(s + n * kPanel, p + n * kPanelWeights, splat(scale), reference, total);
  store(l, total);
}

// Weights of R rows and N panels straight from the sums of products, against references that were seen before; they
// are added to `l`. False where some weight grew so large that its reference must follow.
template <class Way, int R, int N>
WINNOW_NOINLINE bool weigh_micro(const uint32_t* q, const uint32_t* const* k, int words, float scale, const float* m,
                                 uint32_t* p, float* l) {
  constexpr int NV = N * kPanelVectors, kPanelWeights = kPanel / Way::kPerWord;
  Vec acc[R][NV];
  multiply<Way, R, N>(q, k, words, acc);
  Vec most{};
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
    const Vec reference = splat(m[r]);
    Vec total{};
#pragma GCC unroll 8
    for (int j = 0; j < NV; ++j) {
      acc[r][j] = exp2v<Way::kExpDegree>(acc[r][j] * splat(scale) - reference);
      total = total + acc[r][j];
    }
#pragma GCC unroll 8
    for (int n = 0; n + 2 <= N; n += 2)
      Way::template store_panels<2>(p + r * kRow + n * kPanelWeights, &acc[r][n * kPanelVectors]);
    if constexpr (N % 2 == 1)
      Way::template store_panels<1>(p + r * kRow + (N - 1) * kPanelWeights, &acc[r][(N - 1) * kPanelVectors]);
    store(l + r * kLanes, load(l + r * kLanes) + total);
    most = larger(total, most);
  }
  return !any_greater(most, splat(kGrown));
}

template <class Way, int R>
static inline bool weigh_rows(const uint32_t* q, const uint32_t* const* k, int panels, int words, float scale,
                              const float* m, uint32_t* p, float* l) {
  constexpr int kPanelWeights = kPanel / Way::kPerWord;
  int n = 0;
  for (; n + kTilePanels <= panels; n += kTilePanels)
    if (!weigh_micro<Way, R, kTilePanels>(q, k + n, words, scale, m, p + n * kPanelWeights, l)) return false;
  p += n * kPanelWeights;
  if constexpr (kTilePanels > 1) {
    if (panels - n == 1) return weigh_micro<Way, R, 1>(q, k + n, words, scale, m, p, l);
    if (panels - n == 2) return weigh_micro<Way, R, 2>(q, k + n, words, scale, m, p, l);
    if (panels - n == 3) return weigh_micro<Way, R, 3>(q, k + n, words, scale, m, p, l);
  }
  return true;
}

// Logits are laid out and looked at before they are weighed.
template <class Way, int R>
WINNOW_NOINLINE void attend_panels(const Group& group, const Tile& tile, int first, int panels, bool whole, int words,
                                   int D, const TileMaths& maths, const TileBuffers& buffers) {
  for (int r = 0; r < R; ++r) store(buffers.highest + r * kLanes, splat(kNoMax));
  qk_rows<Way, R>(group.q, tile.k + first, panels, words, buffers.s, buffers.highest);
  if (!whole || maths.transforms)
    for (int r = 0; r < R; ++r)
      transform_row(buffers.s + r * kRow, tile, first, panels, *group.visible[r], !whole, maths,
                    buffers.highest + r * kLanes);
  const float scale = maths.transforms ? 1.f : maths.scale;
  for (int r = 0; r < R; ++r)
    weigh_row<Way>(buffers.s + r * kRow, buffers.p + r * kRow, panels, scale,
                   buffers.highest + r * kLanes, D, group.o + r * D, group.m + r, group.l + r * kLanes,
                   group.top == nullptr ? nullptr : group.top + r * kLanes);
  pv_rows<Way, R>(buffers.p, tile.v + first, panels, D, group.o);
}

// The same without looking: where nothing but the scale changes logits, and no weight outgrows its reference.
template <class Way, int R>
static inline bool attend_unseen(const Group& group, const Tile& tile, int first, int panels, int words, int D,
                                 const TileMaths& maths, const TileBuffers& buffers) {
  alignas(64) float sums[R * kLanes] = {};
  if (!weigh_rows<Way, R>(group.q, tile.k + first, panels, words, maths.scale, group.m, buffers.p, sums)) return false;
  for (int r = 0; r < R; ++r)
    store(group.l + r * kLanes, load(group.l + r * kLanes) + load(sums + r * kLanes));
  pv_rows<Way, R>(buffers.p, tile.v + first, panels, D, group.o);
  return true;
}

template <class Way, int R>
WINNOW_NOINLINE void attend_rows(const Group& group, const Tile& tile, int words, int D, const TileMaths& maths,
                                 const TileBuffers& buffers) {
  // Panels outside of what any row sees are left out; the mask is applied only where some row sees less.
  const int32_t end = tile.slot + tile.panels * kPanel;
  if (group.span.any0 >= end || group.span.any1 <= tile.slot) return;
  int first = group.span.any0 > tile.slot ? (group.span.any0 - tile.slot) / kPanel : 0;
  const int last =
      group.span.any1 < end ? (group.span.any1 - tile.slot + kPanel - 1) / kPanel : tile.panels;
  const int32_t x0 = tile.slot + first * kPanel, x1 = tile.slot + last * kPanel;
  const bool whole = (x0 >= group.span.all_b0 && x1 <= group.span.all_b1) ||
                     (x0 >= group.span.all_a0 && x1 <= group.span.all_a1);

  if (whole && !maths.transforms && group.top == nullptr) {
    if (std::find(group.m, group.m + R, kNoMax) != group.m + R) {  // a few panels tell what to expect of the others
      const int few = std::min(last - first, kTilePanels);
      attend_panels<Way, R>(group, tile, first, few, true, words, D, maths, buffers);
      first += few;
    }
    if (first == last || attend_unseen<Way, R>(group, tile, first, last - first, words, D, maths, buffers)) return;
  }
  attend_panels<Way, R>(group, tile, first, last - first, whole, words, D, maths, buffers);
}

template <class Way>
static inline void attend(int rows, const Group& group, const Tile& tile, int words, int D, const TileMaths& maths,
                          const TileBuffers& buffers) {
  static_assert(kTileRows <= 6, "one case per number of rows");
  if (rows == kTileRows) return attend_rows<Way, kTileRows>(group, tile, words, D, maths, buffers);
  if constexpr (kTileRows > 1)
    if (rows == 1) return attend_rows<Way, 1>(group, tile, words, D, maths, buffers);
  if constexpr (kTileRows > 2)
    if (rows == 2) return attend_rows<Way, 2>(group, tile, words, D, maths, buffers);
  if constexpr (kTileRows > 3)
    if (rows == 3) return attend_rows<Way, 3>(group, tile, words, D, maths, buffers);
  if constexpr (kTileRows > 4)
    if (rows == 4) return attend_rows<Way, 4>(group, tile, words, D, maths, buffers);
  if constexpr (kTileRows > 5)
    if (rows == 5) return attend_rows<Way, 5>(group, tile, words, D, maths, buffers);
}

}  // namespace WINNOW_ISA
}  // namespace winnow
