// Attention mass: what many queries together give each entry.
//
// Work is cut by entries: an item owns some columns of all query heads of one KV head, so that sums need no
// atomics and no merging. It packs its keys once; queries stream past them in blocks. A micro-tile's logits
// never leave the registers: products, exponentials and column sums in one go.
#include "mass.h"

#include <omp.h>

#include <algorithm>
#include <limits>
#include <vector>

#include "memory.h"
#include "prefill_tile.h"
#include "tile_pack.h"

namespace winnow {
namespace WINNOW_ISA {
namespace {

constexpr int kKeys = kTilePanels * kPanel;   // entries of a micro-tile
constexpr int kBlockRows = 8 * kTileRows;     // queries that are copied at a time
constexpr int64_t kItemBytes = 64 << 10;      // packed keys of an item: they stay in the second-level cache
constexpr float kNothing = std::numeric_limits<float>::infinity();  // 2^(x - this) is 0

// What the rows of a micro-tile see of its entries: row r those of [lo[r], hi[r]).
struct Seen {
  const int32_t *lo, *hi;
  int32_t first;  // number of the micro-tile's first entry
};

// Adds to sums[kKeys] the weights of kTileRows rows, 2^(logit * log2(e) - reference). Where it is not plain there
// is a mask, a softcap or a bias.
template <class Way, bool kPlain>
WINNOW_NOINLINE void mass_micro(const uint32_t* q, const uint32_t* k, int words, const float* reference,
                                const TileMaths& maths, const Seen& seen, const float* bias, float* sums) {
  constexpr int NV = kTilePanels * kPanelVectors;
  Vec acc[kTileRows][NV];
  const uint32_t* panels[kTilePanels];
#pragma GCC unroll 8
  for (int n = 0; n < kTilePanels; ++n) panels[n] = k + n * words * kPanel;
  multiply<Way, kTileRows, kTilePanels>(q, panels, words, acc);
#pragma GCC unroll 8
  for (int j = 0; j < NV; ++j) {
    Vec total = load(sums + j * kLanes);
#pragma GCC unroll 8
    for (int r = 0; r < kTileRows; ++r) {
      Vec x = acc[r][j];
      if constexpr (kPlain) {
        x = x * splat(maths.scale);
      } else {
        x = maths.transforms ? transformed(x, maths, bias == nullptr ? nullptr : bias + j * kLanes)
                             : x * splat(maths.scale);
      }
      x = exp2v<Way::kExpDegree>(x - splat(reference[r]));
      if constexpr (!kPlain) {
        const VecInt at = iota() + (seen.first + j * kLanes);
        x = (at >= seen.lo[r]) & (at < seen.hi[r]) ? x : Vec{};
      }
      total = total + x;
    }
    store(sums + j * kLanes, total);
  }
}

template <class Way>
class Mass {
  using Input = typename Way::Input;

 public:
  explicit Mass(const MassArgs& args)
      : a_(args),
        D_(static_cast<int>(args.depth)),
        words_(D_ / Way::kPerWord),
        maths_(tile_maths(args)),
        zeros_(static_cast<size_t>(args.depth)),
        lo_(static_cast<size_t>(args.kv_heads * args.tokens)),
        hi_(lo_.size()) {
    const double products = static_cast<double>(a_.tokens) * a_.kv_heads * a_.group * a_.width * D_;
    threads_ = threads_for(products);
    // Few long heads: smaller items, so that threads end together.
    entries_ = std::max<int64_t>(kKeys, kItemBytes / (words_ * 4) / kKeys * kKeys);
    while (entries_ > kKeys && a_.kv_heads * a_.width < 8 * threads_ * entries_) entries_ = entries_ / 2 / kKeys * kKeys;
    entries_ = std::max<int64_t>(kKeys, entries_);
    plan_thread();
  }

  void run() {
    for (int64_t h = 0; h < a_.kv_heads; ++h) find_spans(h);
    scratch_ = allocate(threads_ * thread_bytes_);
    // Early entries are seen by most queries: heaviest first.
    const int64_t n = (a_.width + entries_ - 1) / entries_ * a_.kv_heads;
    if (threads_ == 1) {
      for (int64_t i = 0; i < n; ++i) sum_item(i, 0);
      return;
    }
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads_)
    for (int64_t i = 0; i < n; ++i) sum_item(i, omp_get_thread_num());
  }

 private:
  // Which entries of head h each token sees; both ends only move forward from token to token.
  void find_spans(int64_t h) {
    const int64_t length = a_.lengths[h];
    const int32_t* at = a_.positions == nullptr ? nullptr : a_.positions + h * a_.positions_head;
    // Entries at positions up to `position`, of which `from` are known to be.
    const auto until = [&](int64_t from, int64_t position) {
      if (at == nullptr) return std::clamp<int64_t>(position - a_.start + 1, 0, length);
      while (from < length && at[from] <= position) ++from;
      return from;
    };
    int64_t lo = 0, hi = 0;
    for (int64_t t = 0; t < a_.tokens; ++t) {
      const int64_t position = a_.query_positions[t];
      hi = until(hi, position);
      if (a_.sliding > 0) lo = until(lo, position - a_.sliding);
      lo_[static_cast<size_t>(h * a_.tokens + t)] = static_cast<int32_t>(std::min(lo, hi));
      hi_[static_cast<size_t>(h * a_.tokens + t)] = static_cast<int32_t>(hi);
    }
  }

  struct Thread {
    uint32_t *k, *q;
    float *bias, *reference, *sums;
  };

  // Lays a thread's buffers out; with a null base it only counts the bytes.
  int64_t lay_out(char* base, Thread& t) const {
    int64_t at = 0;
    const auto take = [&](auto*& p, int64_t count) {
      p = reinterpret_cast<std::remove_reference_t<decltype(p)>>(base + at);
      at += round_up(count * 4, 64);
    };
    take(t.k, entries_ * words_);
    take(t.q, kBlockRows * words_);
    take(t.bias, entries_);
    take(t.reference, kBlockRows);
    take(t.sums, entries_);
    return at + 4096;  // no two threads share a page
  }
  void plan_thread() {
    Thread unused;
    thread_bytes_ = round_up(lay_out(nullptr, unused), 4096);
  }

  void pack(int64_t h, int64_t first, int64_t last, const Thread& t) const {
    const Input* head = static_cast<const Input*>(a_.k) + h * a_.k_head;
    const int64_t length = a_.lengths[h];
    for (int64_t e = first; e < last; e += kPanel) {
      const Input* rows[kPanel];
      for (int i = 0; i < kPanel; ++i) {
        const bool exists = e + i < length;
        rows[i] = exists ? head + (e + i) * a_.k_entry : zeros_.data();
        if (a_.bias != nullptr) t.bias[e - first + i] = exists ? a_.bias[h * a_.bias_head + e + i] : 0.f;
      }
      pack_keys<Way>(rows, D_, t.k + (e - first) * words_);
    }
  }

  // Queries and references of `rows` tokens; up to a whole group of rows, those that weigh nothing.
  int64_t load_rows(int64_t n, int64_t token, int64_t rows, const Thread& t) const {
    const int64_t all = round_up(rows, kTileRows);
    for (int64_t i = 0; i < all; ++i) {
      const bool exists = i < rows;
      const Input* from =
          exists ? static_cast<const Input*>(a_.q) + (token + i) * a_.q_token + n * a_.q_head : zeros_.data();
      Way::copy(t.q + i * words_, from, D_);
      const float lse = exists ? a_.lse[(token + i) * a_.lse_token + n * a_.lse_head] : kNoMax;
      // A row that saw nothing has -inf.
      t.reference[i] = lse == kNoMax ? kNothing : lse * kLog2E;
    }
    return all;
  }

  void sum_item(int64_t item, int thread) const {
    Thread t;
    lay_out(scratch_.get() + thread * thread_bytes_, t);
    const int64_t h = item % a_.kv_heads, first = item / a_.kv_heads * entries_;
    const int64_t end = std::min(first + entries_, a_.width), last = first + round_up(end - first, kKeys);
    const int32_t *lo = lo_.data() + h * a_.tokens, *hi = hi_.data() + h * a_.tokens;
    // Tokens that see some entry of the item; from a whole block on, so that which rows share a micro-tile, and
    // with it the last bit of a sum, does not depend on how the work was cut.
    const int64_t t0 = (std::upper_bound(hi, hi + a_.tokens, first) - hi) / kBlockRows * kBlockRows;
    const int64_t t1 = std::lower_bound(lo, lo + a_.tokens, last) - lo;
    if (t0 < t1) pack(h, first, last, t);
    for (int64_t n = h * a_.group; n < (h + 1) * a_.group; ++n) {
      std::fill(t.sums, t.sums + (last - first), 0.f);
      for (int64_t token = t0; token < t1; token += kBlockRows) {
        const int64_t rows = std::min<int64_t>(kBlockRows, t1 - token);
        load_rows(n, token, rows, t);
        for (int64_t e = first; e < last && e < hi[token + rows - 1]; e += kKeys)
          sum_tile(token, rows, e, lo, hi, t, e - first);
      }
      std::copy(t.sums, t.sums + (end - first), a_.mass + n * a_.width + first);
    }
  }

  // A block of rows against the micro-tile at entry e, which lies at `at` in the thread's buffers.
  void sum_tile(int64_t token, int64_t rows, int64_t e, const int32_t* lo, const int32_t* hi, const Thread& t,
                int64_t at) const {
    const uint32_t* k = t.k + at * words_;
    const float* bias = a_.bias == nullptr ? nullptr : t.bias + at;
    for (int64_t r = 0; r < rows; r += kTileRows) {
      const int64_t begin = token + r, count = std::min<int64_t>(kTileRows, rows - r), final = begin + count - 1;
      if (hi[final] <= e || lo[begin] >= e + kKeys) continue;
      const bool whole = hi[begin] >= e + kKeys && lo[final] <= e;
      if (whole && !maths_.transforms) {
        mass_micro<Way, true>(t.q + r * words_, k, words_, t.reference + r, maths_, {}, nullptr, t.sums + at);
        continue;
      }
      int32_t seen_lo[kTileRows] = {}, seen_hi[kTileRows] = {};  // padded rows see nothing
      std::copy(lo + begin, lo + begin + count, seen_lo);
      std::copy(hi + begin, hi + begin + count, seen_hi);
      const Seen seen{seen_lo, seen_hi, static_cast<int32_t>(e)};
      mass_micro<Way, false>(t.q + r * words_, k, words_, t.reference + r, maths_, seen, bias, t.sums + at);
    }
  }

  const MassArgs& a_;
  const int D_, words_;
  const TileMaths maths_;
  const std::vector<Input> zeros_;
  std::vector<int32_t> lo_, hi_;  // [H, T]
  int threads_;
  int64_t entries_;  // of an item
  int64_t thread_bytes_ = 0;
  Memory scratch_;
};

void run(const MassArgs& args) {
  if (args.dtype == QueryDtype::bfloat16) return Mass<Bf16Way>(args).run();
  Mass<Float32Way>(args).run();
}

}  // namespace

MassKernels mass_kernels() { return {run}; }

}  // namespace WINNOW_ISA
}  // namespace winnow
