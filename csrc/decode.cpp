// Decode attention: one new token over one ragged segment (flash-decoding).
//
// The work, all rows of K and V that the lists name, is cut into chunks that threads take in turn. A chunk
// runs tile by tile: logits of a tile of K rows, an online softmax, then the tile's V rows; its result
// (maximum, sum, weighted sum) is merged with the other chunks of the same heads by log-sum-exp. Where the mass
// is asked for, chunks keep their weights until the sums that they are divided by are known.
#include "decode.h"

#include <memory>
#include <stdexcept>

#ifdef _OPENMP
#include <omp.h>
#endif

#include "online_softmax.h"
#include "rebuild.h"
#include "scratch.h"

namespace winnow {
namespace WINNOW_ISA {
namespace {

constexpr int TILE = 2048;             // entries between two rescalings: long, so that K and V are long streams
constexpr int64_t MAX_CHUNK = 8192;    // entries
constexpr int64_t MIN_CHUNK = 512;
constexpr int64_t SERIAL_BYTES = 1 << 18;  // less than this is not worth waking a second thread
constexpr int AHEAD = 128;             // rows between what is read and what is fetched
constexpr int64_t KEPT_BYTES = 16 << 20;   // of weights, between calls

// Query heads that share one list of entries.
struct Row {
  int64_t head;           // KV head
  int64_t query, queries; // first query head, how many
  int64_t lo, hi;         // visible entries; positions ascend, so they are one range
  bool listed;            // otherwise all visible
  const int32_t* list;
  int64_t items;          // entries or pages listed
};

struct Chunk {
  int64_t row, first, last;  // items of the row
  int64_t result;            // first of its partial results, one per query head
  int64_t weights;           // where it keeps them, in floats
};

thread_local Scratch kept_weights;

// What a chunk keeps for the mass: per pass the maximum of every tile, and per entry the weight relative to it.
class Weights {
 public:
  Weights(float* at, int64_t entries) : at_(at), tops_(tops(entries)), pass_(floats(entries)) {}
  // Room of one pass.
  static int64_t floats(int64_t entries) { return tops(entries) + round_up(entries, 8) * HEADS; }
  float* top(int pass, int64_t entry) const { return at_ + pass * pass_ + entry / TILE * HEADS; }
  float* of(int pass, int64_t entry) const { return at_ + pass * pass_ + tops_ + entry * HEADS; }

 private:
  // A multiple of a cache line.
  static int64_t tops(int64_t entries) { return round_up(entries, 4 * TILE) / TILE * HEADS; }
  float* at_;
  int64_t tops_, pass_;
};

// mass[i] += sum over heads of weights[i][head] * by[head]
template <int heads>
void add_heads(const float* weights, const float* by, int64_t n, float* mass) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    float sum = 0.f;
    for (int g = 0; g < heads; ++g) sum += weights[i * HEADS + g] * by[g];
    mass[i] += sum;
  }
}

void add_heads(int heads, const float* weights, const float* by, int64_t n, float* mass) {
  static_assert(HEADS == 4, "one case per number of heads");
  switch (heads) {
    case 1: return add_heads<1>(weights, by, n, mass);
    case 2: return add_heads<2>(weights, by, n, mass);
    case 3: return add_heads<3>(weights, by, n, mass);
    default: return add_heads<4>(weights, by, n, mass);
  }
}

Row make_row(const DecodeArgs& a, int64_t r) {
  Row row;
  const bool per_query = a.rows && a.rows != a.heads;
  row.head = per_query ? r / a.group : r;
  row.query = per_query ? r : r * a.group;
  row.queries = per_query ? 1 : a.group;
  const int64_t n = a.lengths[row.head];
  if (n < 0 || n > a.capacity) throw std::invalid_argument("decode: a length lies outside the reserve");
  const int32_t* at = a.positions ? a.positions + row.head * a.positions_head : nullptr;
  const Visible seen = visible(at, a.start, n, a.position, a.window);
  row.lo = seen.first;
  row.hi = seen.last;
  if (a.rows && (a.counts[r] < 0 || a.counts[r] > a.listed))
    throw std::invalid_argument("decode: a count of the selection lies outside its list");
  row.list = a.rows ? a.indices + r * a.indices_row : nullptr;
  row.listed = a.rows > 0;
  row.items = row.hi == row.lo ? 0 : row.listed ? a.counts[r] : row.hi - row.lo;
  return row;
}

// Entries that a chunk reads, at most: not all of a page need be visible.
int64_t entries_of(const Chunk& chunk, const Row& row, const DecodeArgs& a) {
  return (chunk.last - chunk.first) * (row.listed ? a.page : 1);
}

template <typename T>
class Worker {
 public:
  explicit Worker(const DecodeArgs& args)
      : a_(args),
        dim_(static_cast<int>(args.dim)),
        made_(args.k_mask || args.rebuilt),
        passes_(static_cast<size_t>((args.group + HEADS - 1) / HEADS)) {
    if (args.rebuilt) rebuild_ = std::make_unique<Rebuild<T>>(args);
  }

  // Attention over one chunk. `result` gets {maximum, sum, weighted sum[D]} per query head; `kept` the weights, where
  // there is any. Returns entries read.
  int64_t run(const Row& row, const Chunk& chunk, float* result, float* kept) {
    row_ = &row;
    head_ = row.head;
    const Weights weights(kept, entries_of(chunk, row, a_));
    k_ = static_cast<const T*>(a_.k) + row.head * a_.k_head;
    v_ = static_cast<const T*>(a_.v) + row.head * a_.v_head;
    const int64_t n = list_entries(row, chunk);
    const int passes = static_cast<int>((row.queries + HEADS - 1) / HEADS);
    for (int p = 0; p < passes; ++p) {
      Pass& pass = passes_[p];
      pass.query = row.query + p * HEADS;
      pass.heads = static_cast<int>(std::min<int64_t>(HEADS, row.queries - p * HEADS));
      pass.queries.load(static_cast<const T*>(a_.q) + pass.query * dim_, pass.heads, dim_);
      pass.sums.clear();
      pass.running.clear();
    }

    // A block of rows, and behind it those that come next, the other phase's first ones among them. The
    // hardware's prefetcher follows a dense read better than prefetch instructions do, but not a list.
    const T* rows[BLOCK + AHEAD];
    const T* const* ahead = row.listed && !made_ ? rows + AHEAD : nullptr;
    if (ahead) {
      const int first = point(rows, false, 0, std::min<int64_t>(AHEAD, n));
      for (int i = 0; i < first; ++i) prefetch_row(rows[i], dim_ * static_cast<int>(sizeof(T)));
    }
    for (int64_t tile = 0; tile < n; tile += TILE) {
      const int64_t end = std::min<int64_t>(tile + TILE, n);
      for (int p = 0; p < passes; ++p) passes_[p].logits = kept ? weights.of(p, tile) : passes_[p].buffer;
      for (int64_t at = tile; at < end; at += BLOCK) {
        point(rows, false, at, end, tile, end);
        for (int p = 0; p < passes; ++p)
          tile_logits<T>(passes_[p].queries, rows, ahead, padded(end - at), passes_[p].heads, dim_,
                         passes_[p].logits + (at - tile) * HEADS);
      }
      for (int p = 0; p < passes; ++p) {
        softmax(passes_[p], tile, static_cast<int>(end - tile));
        if (kept) std::copy(passes_[p].running.top, passes_[p].running.top + HEADS, weights.top(p, tile));
      }
      for (int64_t at = tile; at < end; at += BLOCK) {
        point(rows, true, at, end, end, n);
        for (int p = 0; p < passes; ++p)
          tile_values<T>(passes_[p].sums, passes_[p].logits + (at - tile) * HEADS, rows, ahead, padded(end - at),
                         passes_[p].heads, dim_);
      }
    }

    for (int p = 0; p < passes; ++p) {
      for (int g = 0; g < passes_[p].heads; ++g) {
        float* to = result + (p * HEADS + g) * (dim_ + 2);
        to[0] = passes_[p].running.top[g];
        to[1] = passes_[p].running.total[g];
        passes_[p].sums.natural(to + 2, g, dim_);
      }
    }
    return n;
  }

  // Adds the weights that a chunk kept to the mass of its entries, now that the log-sum-exps are known.
  void add_mass(const Row& row, const Chunk& chunk, float* kept) {
    row_ = &row;
    const Weights weights(kept, entries_of(chunk, row, a_));
    const int64_t n = list_entries(row, chunk);
    float* const mass = a_.mass + row.head * a_.mass_head;
    for (int p = 0; p * HEADS < row.queries; ++p) {
      const int heads = static_cast<int>(std::min<int64_t>(HEADS, row.queries - p * HEADS));
      const float* lse = a_.lse + row.query + p * HEADS;
      for (int64_t tile = 0; tile < n; tile += TILE) {
        const int64_t count = std::min<int64_t>(TILE, n - tile);
        const float *top = weights.top(p, tile), *of = weights.of(p, tile);
        float by[HEADS] = {};  // of a query that saw nothing, too: its difference would be NaN
        for (int g = 0; g < heads; ++g)
          if (lse[g] > MINUS_INF) by[g] = exp2_fast((top[g] - lse[g]) * LOG2E);
        if (row.listed) {
          for (int64_t i = 0; i < count; ++i) add_heads(heads, of + i * HEADS, by, 1, mass + entry(tile + i));
        } else {
          add_heads(heads, of, by, count, mass + entry(tile));
        }
      }
    }
  }

 private:
  struct Pass {
    Pass() {}  // leaves the large buffers as they are
    Queries<T> queries;
    Sums<T> sums;
    alignas(64) float buffer[TILE * HEADS];
    float* logits;                           // of a tile, then weights: the buffer, or where they are kept
    Running running;
    int64_t query;
    int heads;
  };

  static int padded(int64_t n) { return static_cast<int>(std::min<int64_t>(BLOCK, (n + 7) / 8 * 8)); }

  // Entry numbers of a chunk that are visible; a dense chunk needs no list.
  int64_t list_entries(const Row& row, const Chunk& chunk) {
    first_ = row.lo + chunk.first;
    if (!row.listed) return chunk.last - chunk.first;
    entries_.resize(static_cast<size_t>((chunk.last - chunk.first) * a_.page));
    int32_t* to = entries_.data();
    for (int64_t i = chunk.first; i < chunk.last; ++i) {
      const int64_t from = std::max(row.list[i] * a_.page, row.lo);
      const int64_t end = std::min((row.list[i] + int64_t{1}) * a_.page, row.hi);
      for (int64_t e = from; e < end; ++e) *to++ = static_cast<int32_t>(e);
    }
    return to - entries_.data();
  }

  // Packed rows of a block with their zeros, in this thread's buffer.
  template <bool past>
  void expand(bool values, int64_t i, int have) const {
    const int bytes = dim_ / 8;
    const uint8_t* mask = values ? a_.v_mask + head_ * a_.v_mask_head : a_.k_mask + head_ * a_.k_mask_head;
    const T* base = values ? v_ : k_;
    const int64_t stride = values ? a_.v_row : a_.k_row;
    for (int j = 0; j < have; ++j) {
      const int64_t e = entry(i + j);
      expand_row<past>(base + e * stride, static_cast<int>(a_.kept), mask + e * bytes, dim_, wide_ + j * dim_);
    }
  }

  // Rows of a block that are not stored as the inner loops read them.
  void make(bool values, int64_t i, int have) const {
    if (a_.k_mask) {
      const int64_t left = (a_.capacity - first_ - i - have) * (values ? a_.v_row : a_.k_row);
      if (!row_->listed && left * static_cast<int64_t>(sizeof(T)) >= OVERRUN) return expand<true>(values, i, have);
      return expand<false>(values, i, have);
    }
    int64_t at[BLOCK];
    for (int j = 0; j < have; ++j) at[j] = position(entry(i + j));
    if (have) rebuild_->rows(head_, at, have, wide_);
  }

  int64_t position(int64_t e) const {
    return a_.positions ? a_.positions[head_ * a_.positions_head + e] : a_.start + e;
  }

  int64_t entry(int64_t i) const { return row_->listed ? entries_[static_cast<size_t>(i)] : first_ + i; }

  // Pointers to rows of K or V from entry i on and below `end`, and behind them to rows then..last - 1 of the
  // other; where there are none, a row of zeros. Only V's last block may be padded, so nothing but zeros is
  // ever added for no entry: all other blocks of V are whole, and padded logits are overwritten.
  void point(const T** to, bool values, int64_t i, int64_t end, int64_t then, int64_t last) const {
    alignas(64) static const T zeros[MAX_DIM] = {};
    const int all = row_->listed && !made_ ? BLOCK + AHEAD : BLOCK;
    int have = point(to, values, i, std::min(end, i + all));
    // Rows that are made here share one buffer: what comes next would overwrite what is read now.
    if (!made_) have += point(to + have, !values, then, std::min(last, then + all - have));
    for (int j = have; j < all; ++j) to[j] = zeros;
  }

  // Pointers to rows i..end - 1 of K or V; returns how many.
  int point(const T** to, bool values, int64_t i, int64_t end) const {
    const T* base = values ? v_ : k_;
    const int64_t stride = values ? a_.v_row : a_.k_row;
    const int have = static_cast<int>(std::max<int64_t>(0, end - i));
    if (a_.k_mask || (a_.rebuilt && !values)) {
      make(values, i, have);
      for (int j = 0; j < have; ++j) to[j] = wide_ + j * dim_;
    } else if (row_->listed) {
      for (int j = 0; j < have; ++j) to[j] = base + entries_[static_cast<size_t>(i + j)] * stride;
    } else {
      for (int j = 0; j < have; ++j) to[j] = base + (first_ + i + j) * stride;
    }
    return have;
  }

  // Logits of a tile become probabilities relative to the running maximum; older sums are rescaled to it.
  void softmax(Pass& pass, int64_t tile, int n) {
    float* x = pass.logits;
    const int whole = (n + 7) / 8 * 8;
    if (a_.softcap > 0.f || a_.bias || a_.logits) {
      adjust(pass, tile, n);
    } else {
      for (int i = 0; i < n * HEADS; i += LANES) store(x + i, load(x + i) * a_.scale);
    }
    std::fill(x + n * HEADS, x + whole * HEADS, MINUS_INF);
    float down[LANES];
    if (pass.running.add(x, whole, down)) pass.sums.rescale(down, dim_);
  }

  // Scale, soft cap and bias of a tile's logits, and the copy that the caller asked for.
  void adjust(Pass& pass, int64_t tile, int n) {
    float* x = pass.logits;
    for (int i = 0; i < n * HEADS; i += LANES) {
      Vec y = load(x + i) * a_.scale;
      if (a_.softcap > 0.f) {
        // tanh(z) = 1 - 2 / (1 + e^2z); beyond 15 it is 1 in float32
        Vec z = y / a_.softcap;
        z = z > 15.f ? splat(15.f) : z;
        z = z < -15.f ? splat(-15.f) : z;
        y = a_.softcap * (1.f - 2.f / (1.f + exp2_fast(z * (2.f * LOG2E))));
      }
      store(x + i, y);
    }
    if (a_.bias) {
      const float* bias = a_.bias + row_->head * a_.bias_head;
      for (int i = 0; i < n; ++i) {
        const float b = bias[entry(tile + i)];
        for (int g = 0; g < HEADS; ++g) x[i * HEADS + g] += b;
      }
    }
    if (a_.logits) {
      for (int g = 0; g < pass.heads; ++g) {
        float* to = a_.logits + (pass.query + g) * a_.logits_head;
        if (row_->listed) {
          for (int i = 0; i < n; ++i) to[entry(tile + i)] = x[i * HEADS + g];
        } else {
          to += entry(tile);
#pragma omp simd
          for (int i = 0; i < n; ++i) to[i] = x[i * HEADS + g];
        }
      }
    }
  }

  const DecodeArgs& a_;
  const int dim_;
  const bool made_;  // rows of K, and with masks of V, are written to a buffer before they are read
  std::vector<Pass> passes_;
  std::vector<int32_t> entries_;
  const Row* row_ = nullptr;
  const T *k_ = nullptr, *v_ = nullptr;
  int64_t first_ = 0, head_ = 0;
  std::unique_ptr<Rebuild<T>> rebuild_;
  alignas(64) mutable T wide_[BLOCK * MAX_DIM];  // rows of a block that are made, not stored
};

// Whether threads that take whole rows end together: of ragged ones one thread could have most.
bool even(const std::vector<Row>& row, int threads) {
  int64_t longest = 0, all = 0;
  for (const Row& r : row) {
    longest = std::max(longest, r.items);
    all += r.items;
  }
  const auto rows = static_cast<int64_t>(row.size());
  return threads == 1 || (rows % threads == 0 && longest * rows * 4 <= all * 5);
}

template <typename T>
int64_t decode(const DecodeArgs& a) {
  const int64_t rows = a.rows ? a.rows : a.heads;
  int threads = 1;
#ifdef _OPENMP
  if (!omp_in_parallel()) threads = omp_get_max_threads();
#endif
  std::vector<Row> row;
  int64_t work = 0;  // entries, at most
  for (int64_t r = 0; r < rows; ++r) {
    row.push_back(make_row(a, r));
    work += row.back().items * (a.rows ? a.page : 1);
  }
  if (work * a.dim * 2 * static_cast<int64_t>(sizeof(T)) < SERIAL_BYTES) threads = 1;

  const int64_t share = threads == 1 ? MAX_CHUNK : (work + threads * 8 - 1) / (threads * 8);
  const int64_t step = std::max<int64_t>(1, std::clamp(share, MIN_CHUNK, MAX_CHUNK) / (a.rows ? a.page : 1));
  // The mass of a whole head is added as soon as it was read: its weights are still in the cache then, and the
  // next head's take their place.
  const bool whole = a.mass && rows == a.heads && even(row, threads);
  std::vector<Chunk> chunks;
  int64_t results = 0, weights = 0, most = 0;
  for (int64_t r = 0; r < rows; ++r) {
    const int64_t of_row = whole ? row[r].items : step;
    for (int64_t i = 0; i < row[r].items; i += of_row) {
      chunks.push_back({r, i, std::min(i + of_row, row[r].items), results, weights});
      results += row[r].queries;
      if (!a.mass) continue;
      const int64_t floats =
          (row[r].queries + HEADS - 1) / HEADS * Weights::floats(entries_of(chunks.back(), row[r], a));
      weights += whole ? 0 : floats;
      most = std::max(most, floats);
    }
  }
  if (whole) weights = most * threads;

  const int64_t stride = a.dim + 2;
  std::vector<float> result(static_cast<size_t>(results * stride));
  float* const kept = reinterpret_cast<float*>(kept_weights.take(weights * static_cast<int64_t>(sizeof(float))));
  int64_t pairs = 0;
  const auto count = static_cast<int64_t>(chunks.size());
  // One row's queries, from its chunks begin .. end - 1.
  const auto finish = [&](const Row& r, size_t begin, size_t end) {
    std::vector<const float*> parts;
    for (int64_t g = 0; g < r.queries; ++g) {
      parts.clear();
      for (size_t i = begin; i < end; ++i) parts.push_back(result.data() + (chunks[i].result + g) * stride);
      const int64_t n = r.query + g;
      merge(parts, a.dim, static_cast<T*>(a.out) + n * a.dim, a.lse + n);
    }
  };
  const auto run = [&](Worker<T>& worker, int64_t c, int thread) {
    const Chunk& chunk = chunks[c];
    const Row& r = row[chunk.row];
    float* const at = a.mass ? kept + (whole ? thread * most : chunk.weights) : nullptr;
    const int64_t read = worker.run(r, chunk, result.data() + chunk.result * stride, at);
    if (whole) {
      finish(r, static_cast<size_t>(c), static_cast<size_t>(c) + 1);
      worker.add_mass(r, chunk, at);
    }
    return r.queries * read;
  };
  if (threads == 1) {  // an OpenMP team of one still costs microseconds
    Worker<T> worker(a);
    for (int64_t c = 0; c < count; ++c) pairs += run(worker, c, 0);
  } else {
#pragma omp parallel num_threads(threads) reduction(+ : pairs)
    {
      Worker<T> worker(a);
#pragma omp for schedule(dynamic, 1)
      for (int64_t c = 0; c < count; ++c) pairs += run(worker, c, omp_get_thread_num());
    }
  }

  size_t c = 0;
  for (int64_t r = 0; r < rows; ++r) {
    const size_t begin = c;
    while (c < chunks.size() && chunks[c].row == r) ++c;
    if (!whole || begin == c) finish(row[r], begin, c);
  }
  if (a.mass && !whole) {
    // By KV head: the lists of several query heads may name one entry.
    const auto add = [&](int64_t h) {
      Worker<T> worker(a);
      for (const Chunk& chunk : chunks)
        if (row[chunk.row].head == h) worker.add_mass(row[chunk.row], chunk, kept + chunk.weights);
    };
    if (threads == 1) {
      for (int64_t h = 0; h < a.heads; ++h) add(h);
    } else {
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads)
      for (int64_t h = 0; h < a.heads; ++h) add(h);
    }
  }
  kept_weights.free_above(KEPT_BYTES);
  return pairs;
}

int64_t decode_any(const DecodeArgs& a) { return a.bf16 ? decode<bf16>(a) : decode<float>(a); }

}  // namespace

DecodeKernels decode_kernels() { return {decode_any}; }

}  // namespace WINNOW_ISA
}  // namespace winnow
