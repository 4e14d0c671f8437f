// Decode attention over entries in 8, 4 or 2 bits: what comes from memory are codes and their factors.
//
// Factors are not multiplied into keys and values. A scale that the entries of a page share goes into the
// query, one that the channels of an entry share into its logit or weight; zeros are a constant per page, or
// one number per entry and group. What is left are small integers, a page of which is written into the
// first-level cache for the inner loops of dense attention. Low rank adds channels to keys and values;
// extremes are corrected where they are.
#include "coded_decode.h"

#include <stdexcept>

#ifdef _OPENMP
#include <omp.h>
#endif

#include "coded_tile.h"
#include "online_softmax.h"

namespace winnow {
namespace WINNOW_ISA {
namespace {

constexpr int TILE = 8;                    // pages between two rescalings
constexpr int64_t MAX_CHUNK = 128;         // pages
constexpr int64_t MIN_CHUNK = 8;
constexpr int64_t SERIAL_VALUES = 1 << 17;  // less than this is not worth waking a second thread
static_assert(CODED_PAGE == BLOCK, "a page is a block of rows");

typedef float Four __attribute__((vector_size(16)));  // one number per query head of a pass
static_assert(HEADS == 4, "Four has a number for each");

inline Four load_four(const float* from) {
  Four x;
  std::memcpy(&x, from, sizeof x);
  return x;
}
inline void store_four(float* to, Four x) { std::memcpy(to, &x, sizeof x); }

template <typename T>
inline const T* row_of(const Plane& p, int64_t head, int64_t row) {
  return static_cast<const T*>(p.data) + head * p.outer_stride + row * p.row_stride;
}

// Pages first..last - 1 of a head.
struct Chunk {
  int64_t head, first, last;
  Visible seen;
  int64_t result;  // first of its partial results, one per query head
};

template <typename T>
class Worker {
 public:
  explicit Worker(const CodedArgs& args)
      : a_(args),
        dim_(static_cast<int>(args.dim)),
        rank_(static_cast<int>(args.rank)),
        fours_((rank_ + 3) / 4 * 4),
        more_((rank_ + 15) / 16 * 16),
        width_(dim_ + more_),
        group_(static_cast<int>(args.dim / args.values)),
        middle_(centre(args.bits)),
        passes_(static_cast<size_t>((args.group + HEADS - 1) / HEADS)) {
    for (Pass& pass : passes_) pass.sums.resize(static_cast<size_t>(args.values));
    for (int i = 0; i < BLOCK; ++i) std::fill(rows_ + i * width_ + dim_ + rank_, rows_ + (i + 1) * width_, T{});
    left_.resize(static_cast<size_t>(BLOCK * fours_));
    k_right_.resize(static_cast<size_t>(dim_ * fours_));
    v_right_.resize(static_cast<size_t>(dim_ * fours_));
    for (int channel = 0; channel < width_; channel += channel < dim_ ? group_ : more_)
      for (int i = 0; i < BLOCK; ++i) pointers_.push_back(rows_ + i * width_ + channel);
  }

  // `result` gets {maximum, sum, weighted sum[D]} per query head; returns visible entries.
  int64_t run(const Chunk& chunk, float* result) {
    head_ = chunk.head;
    k_row_ = k_batch_ = v_batch_ = -1;
    for (size_t p = 0; p < passes_.size(); ++p) begin(passes_[p], static_cast<int64_t>(p) * HEADS);
    for (int64_t tile = chunk.first; tile < chunk.last; tile += TILE) {
      const int pages = static_cast<int>(std::min<int64_t>(TILE, chunk.last - tile));
      for (int i = 0; i < pages; ++i) keys(tile + i, i);
      for (Pass& pass : passes_) {
        hide(pass, chunk.seen, tile * BLOCK, pages * BLOCK);
        if (pass.running.add(pass.logits, pages * BLOCK, down_)) rescale(pass);
      }
      for (int i = 0; i < pages; ++i) values(tile + i, i);
    }
    for (Pass& pass : passes_) {
      collect(pass);
      for (int g = 0; g < pass.heads; ++g, result += dim_ + 2) {
        result[0] = pass.running.top[g];
        result[1] = pass.running.total[g];
        std::copy(pass.done[g], pass.done[g] + dim_, result + 2);
      }
    }
    return std::min(chunk.seen.last, chunk.last * BLOCK) - std::max(chunk.seen.first, chunk.first * BLOCK);
  }

 private:
  struct Pass {
    Pass() {}  // leaves the large buffers as they are
    int heads;
    alignas(64) float q[HEADS][MAX_DIM];         // times the scale of attention
    alignas(64) float q_channel[MAX_DIM][HEADS];  // the same
    Queries<T> queries;                          // against the numbers of a page
    float constant[HEADS];                       // of the page's logits
    float projected[HEADS][MAX_DIM];             // the query on the right factor
    Running running;
    alignas(64) float logits[TILE * BLOCK * HEADS];  // then weights
    std::vector<Sums<T>> sums;                   // of the numbers of V, by group of channels
    Vec shifts[MAX_DIM / 16];                    // of its zeros, by group; a lane is an entry of four and a head
    Sums<T> left;                                // of the left factor
    alignas(64) float sparse[MAX_DIM][HEADS];    // of what extremes are more than the rest says
    alignas(64) float done[HEADS][MAX_DIM];      // of batches that are complete
  };

  void begin(Pass& pass, int64_t first) {
    pass.heads = static_cast<int>(std::min<int64_t>(HEADS, a_.group - first));
    const T* q = static_cast<const T*>(a_.q) + (head_ * a_.group + first) * dim_;
    for (int g = 0; g < HEADS; ++g)
      for (int d = 0; d < dim_; ++d)
        pass.q[g][d] = pass.q_channel[d][g] = g < pass.heads ? to_float(q[g * dim_ + d]) * a_.scale : 0.f;
    pass.running.clear();
    std::memset(pass.done, 0, sizeof pass.done);
    std::memset(&pass.queries, 0, sizeof pass.queries);
    clear(pass);
  }

  void clear(Pass& pass) {
    for (Sums<T>& sums : pass.sums) sums.clear();
    std::fill(pass.shifts, pass.shifts + a_.values, Vec{});
    if (rank_) pass.left.clear();
    if (a_.v_extremes.data) std::memset(pass.sparse, 0, sizeof pass.sparse);
  }

  int64_t batch_of(int64_t page) const { return a_.batches.data ? *row_of<int32_t>(a_.batches, head_, page) : 0; }

  static void widen(const bf16* from, int n, float* to) {
    for (int i = 0; i < n; ++i) to[i] = to_float(from[i]);
  }

  // Rows of a right factor, filled up to whole fours.
  void widen_right(const Plane& plane, int64_t batch, std::vector<float>& to) const {
    const bf16* from = row_of<bf16>(plane, head_, batch);
    for (int d = 0; d < dim_; ++d) widen(from + d * rank_, rank_, to.data() + d * fours_);
  }

  // The numbers of a page's codes, and behind each row that of the left factor.
  void block(const Plane& codes, const Plane& left, int64_t page) {
    const int64_t entry = page * BLOCK;
    numbers_of(a_.bits, row_of<uint8_t>(codes, head_, entry), codes.row_stride, dim_, rows_, width_);
    if (!rank_) return;
    for (int i = 0; i < BLOCK; ++i) {
      const bf16* from = row_of<bf16>(left, head_, entry + i);
      for (int j = 0; j < rank_; ++j) {
        left_[static_cast<size_t>(i * fours_ + j)] = to_float(from[j]);
        exactly(to_float(from[j]), rows_ + i * width_ + dim_ + j);
      }
    }
  }

  // Rows of the block from the n-th group of channels on; behind the last is the left factor.
  const T* const* rows_from(int64_t n) const { return pointers_.data() + n * BLOCK; }

  // ---------------------------------------------------------------- keys

  void keys(int64_t page, int slot) {
    block(a_.k_codes, a_.k_left, page);
    key_factors(page);
    const T* const* rows = rows_from(0);
    for (Pass& pass : passes_) {
      float* x = pass.logits + slot * BLOCK * HEADS;
      tile_logits<T>(pass.queries, rows, nullptr, BLOCK, pass.heads, width_, x);
      if (a_.k_by_entry) {
        for (int i = 0; i < BLOCK; ++i) store_four(x + i * HEADS, load_four(x + i * HEADS) * scale_[i]);
      } else {
        const Four constant = load_four(pass.constant);
        for (int i = 0; i < BLOCK; ++i) store_four(x + i * HEADS, load_four(x + i * HEADS) + constant);
      }
      if (a_.k_extremes.data) correct_keys(pass, page, x);
    }
  }

  // Scales and zeros of a page, and the queries that they have gone into.
  void key_factors(int64_t page) {
    const int64_t batch = batch_of(page);
    const bool other = batch != k_batch_;
    if (other && rank_) widen_right(a_.k_right, batch, k_right_);
    k_batch_ = batch;
    if (other && rank_)
      for (Pass& pass : passes_) project(pass);
    if (a_.k_by_entry) {
      const bf16* from = row_of<bf16>(a_.k_scale, head_, page * BLOCK);
      for (int i = 0; i < BLOCK; ++i) scale_[i] = to_float(from[i * a_.k_scale.row_stride]);
      if (!other) return;
      for (Pass& pass : passes_) load_queries(pass, nullptr);
      return;
    }
    const int64_t row = a_.k_by_batch ? batch : page;
    if (row == k_row_ && !other) return;
    k_row_ = row;
    widen(row_of<bf16>(a_.k_scale, head_, row), dim_, scale_);
    widen(row_of<bf16>(a_.k_zero, head_, row), dim_, shift_);
    for (int d = 0; d < dim_; ++d) shift_[d] += middle_ * scale_[d];
    for (Pass& pass : passes_) {
      load_queries(pass, scale_);
      for (int g = 0; g < HEADS; ++g) {
        float sum = 0.f;
#pragma omp simd reduction(+ : sum)
        for (int d = 0; d < dim_; ++d) sum += pass.q[g][d] * shift_[d];
        pass.constant[g] = sum;
      }
    }
  }

  void project(Pass& pass) {
    for (int g = 0; g < HEADS; ++g) {
      std::fill(pass.projected[g], pass.projected[g] + more_, 0.f);
      for (int d = 0; d < dim_; ++d)
        for (int j = 0; j < rank_; ++j) pass.projected[g][j] += pass.q[g][d] * k_right_[d * fours_ + j];
    }
  }

  void load_queries(Pass& pass, const float* scale) {
    for (int g = 0; g < pass.heads; ++g) {
      auto* to = pass.queries.q[g];
      const float* from = pass.q[g];
      if (scale) {
        for (int d = 0; d < dim_; ++d) rounded(from[d] * scale[d], to + d);
      } else {
        for (int d = 0; d < dim_; ++d) rounded(from[d], to + d);
      }
      for (int j = 0; j < more_; ++j) rounded(pass.projected[g][j], to + dim_ + j);
    }
  }

  // The number at a channel of a row of the block, as everything but extremes has it.
  float without_extremes(int entry, int channel, float scale, float shift, const std::vector<float>& right) const {
    Four lost{};
    for (int j = 0; j < fours_; j += 4)
      lost += load_four(left_.data() + entry * fours_ + j) * load_four(right.data() + channel * fours_ + j);
    return to_float(rows_[entry * width_ + channel]) * scale + shift + ((lost[0] + lost[1]) + (lost[2] + lost[3]));
  }

  void correct_keys(Pass& pass, int64_t page, float* x) {
    const T* extremes = row_of<T>(a_.k_extremes, head_, page);
    const uint8_t* where = row_of<uint8_t>(a_.k_where, head_, page);
    const auto correct = [&](int d, int i) {
      const int entry = where[i];
      const float more = to_float(extremes[i]) - without_extremes(entry, d, scale_[d], shift_[d], k_right_);
      store_four(x + entry * HEADS, load_four(x + entry * HEADS) + load_four(pass.q_channel[d]) * more);
    };
    for (int d = 0; d < dim_; ++d) {
      correct(d, d);
      if (where[d + dim_] != where[d]) correct(d, d + dim_);  // else of equal values, it is the same one
    }
  }

  // Entries that the query does not see.
  static void hide(Pass& pass, Visible seen, int64_t first, int n) {
    const auto before = std::clamp<int64_t>(seen.first - first, 0, n), end = std::clamp<int64_t>(seen.last - first, 0, n);
    std::fill(pass.logits, pass.logits + before * HEADS, MINUS_INF);
    std::fill(pass.logits + end * HEADS, pass.logits + n * HEADS, MINUS_INF);
  }

  // ---------------------------------------------------------------- values

  void values(int64_t page, int slot) {
    const int64_t batch = batch_of(page), entry = page * BLOCK;
    if (batch != v_batch_) {
      if (v_batch_ >= 0)
        for (Pass& pass : passes_) collect(pass);
      v_batch_ = batch;
      if (rank_) widen_right(a_.v_right, batch, v_right_);
    }
    block(a_.v_codes, a_.v_left, page);
    for (int n = 0; n < a_.values; ++n) {
      value_factors(entry, n);
      const T* const* rows = rows_from(n);
      for (Pass& pass : passes_) {
        const float* p = pass.logits + slot * BLOCK * HEADS;
        alignas(64) float weighted[BLOCK * HEADS];
        Vec shifts = pass.shifts[n];
        for (int i = 0; i < BLOCK * HEADS; i += LANES) {
          store(weighted + i, load(p + i) * load(by_ + i));
          if (a_.v_zero.data) shifts += load(p + i) * load(and_ + i);
        }
        pass.shifts[n] = shifts;
        tile_values<T>(pass.sums[n], weighted, rows, nullptr, BLOCK, pass.heads, group_);
      }
    }
    if (rank_) {
      const T* const* rows = rows_from(a_.values);
      for (Pass& pass : passes_)
        tile_values<T>(pass.left, pass.logits + slot * BLOCK * HEADS, rows, nullptr, BLOCK, pass.heads, more_);
    }
    if (a_.v_extremes.data)
      for (Pass& pass : passes_) correct_values(pass, entry, pass.logits + slot * BLOCK * HEADS);
  }

  // Column n of the factors of a page's entries.
  void column(const Plane& plane, int64_t entry, int n, float* to) const {
    const bf16* from = row_of<bf16>(plane, head_, entry) + n;
    if (plane.row_stride == 1) return widen(from, BLOCK, to);
    for (int i = 0; i < BLOCK; ++i) to[i] = to_float(from[i * plane.row_stride]);
  }

  // Of a group of channels the scale and zero of every entry of a page, and both once per query head.
  void value_factors(int64_t entry, int n) {
    float *scale = v_scale_[n], *shift = v_shift_[n];
    column(a_.v_scale, entry, n, scale);
    if (a_.v_zero.data) {
      column(a_.v_zero, entry, n, shift);
      for (int i = 0; i < BLOCK; ++i) shift[i] += middle_ * scale[i];
      spread(shift, and_);
    }
    spread(scale, by_);
  }

  void correct_values(Pass& pass, int64_t first, const float* p) {
    for (int i = 0; i < BLOCK; ++i) {
      const T* extremes = row_of<T>(a_.v_extremes, head_, first + i);
      const uint8_t* where = row_of<uint8_t>(a_.v_where, head_, first + i);
      for (int m = 0; m < (where[0] == where[1] ? 1 : 2); ++m) {
        const int channel = where[m], n = channel / group_;
        const float known = without_extremes(i, channel, v_scale_[n][i], v_shift_[n][i], v_right_);
        const float more = to_float(extremes[m]) - known;
        float* to = pass.sparse[channel];
        store_four(to, load_four(to) + load_four(p + i * HEADS) * more);
      }
    }
  }

  void rescale(Pass& pass) {
    for (Sums<T>& sums : pass.sums) sums.rescale(down_, group_);
    for (int n = 0; n < a_.values; ++n) pass.shifts[n] *= load(down_);
    if (rank_) pass.left.rescale(down_, more_);
    if (a_.v_extremes.data)
      for (int d = 0; d < dim_; ++d) store_four(pass.sparse[d], load_four(pass.sparse[d]) * load_four(down_));
    for (int g = 0; g < HEADS; ++g)
      for (int d = 0; d < dim_; ++d) pass.done[g][d] *= down_[g];
  }

  // Adds what a batch gave: its factors are known to all of its entries.
  void collect(Pass& pass) {
    alignas(64) float value[MAX_DIM], left[MAX_DIM];
    const bf16* channel = a_.v_channel.data ? row_of<bf16>(a_.v_channel, head_, v_batch_) : nullptr;
    for (int g = 0; g < pass.heads; ++g) {
      for (int n = 0; n < a_.values; ++n) {
        pass.sums[n].natural(value + n * group_, g, group_);
        const Vec s = pass.shifts[n];
        const float shift = (s[g] + s[g + 4]) + (s[g + 8] + s[g + 12]);
        for (int d = n * group_; d < (n + 1) * group_; ++d) value[d] += shift;
      }
      if (rank_) pass.left.natural(left, g, more_);
      for (int d = 0; d < dim_; ++d) {
        for (int j = 0; j < rank_; ++j) value[d] += left[j] * v_right_[d * fours_ + j];
        if (channel) value[d] *= to_float(channel[d]);
        if (a_.v_extremes.data) value[d] += pass.sparse[d][g];
        pass.done[g][d] += value[d];
      }
    }
    clear(pass);
  }

  const CodedArgs& a_;
  const int dim_, rank_, fours_, more_, width_, group_;  // channels of the left factor filled up to fours, to 16 more_
  const float middle_;
  int64_t head_ = 0, k_row_ = -1, k_batch_ = -1, v_batch_ = -1;
  std::vector<Pass> passes_;
  std::vector<float> left_, k_right_, v_right_;  // rows of fours_; left_ is of the page that is at work
  std::vector<const T*> pointers_;
  alignas(64) T rows_[BLOCK * MAX_DIM];  // the page that is at work
  alignas(64) float scale_[MAX_DIM], shift_[MAX_DIM];  // of K's channels; the scales of entries where K has those
  float v_scale_[MAX_DIM / 16][BLOCK], v_shift_[MAX_DIM / 16][BLOCK] = {};
  alignas(64) float by_[BLOCK * HEADS], and_[BLOCK * HEADS];
  float down_[LANES];
};

std::vector<Chunk> cut(const CodedArgs& a, int threads) {
  std::vector<Chunk> heads, chunks;
  int64_t work = 0;
  for (int64_t h = 0; h < a.heads; ++h) {
    const int64_t n = a.lengths[h];
    if (n < 0 || n > a.capacity || n % BLOCK) throw std::invalid_argument("coded_decode: a length fits no whole pages");
    const Visible seen =
        visible(a.positions ? a.positions + h * a.positions_head : nullptr, a.start, n, a.position, a.window);
    if (seen.first == seen.last) continue;
    heads.push_back({h, seen.first / BLOCK, (seen.last + BLOCK - 1) / BLOCK, seen, 0});
    work += heads.back().last - heads.back().first;
  }
  const int64_t step = std::clamp((work + threads * 8 - 1) / (threads * 8), MIN_CHUNK, MAX_CHUNK);
  int64_t results = 0;
  for (Chunk of : heads) {
    for (int64_t page = of.first; page < of.last; page += step, results += a.group)
      chunks.push_back({of.head, page, std::min(page + step, of.last), of.seen, results});
  }
  return chunks;
}

template <typename T>
int64_t decode(const CodedArgs& a) {
  int threads = 1;
#ifdef _OPENMP
  if (!omp_in_parallel()) threads = omp_get_max_threads();
#endif
  int64_t stored = 0;
  for (int64_t h = 0; h < a.heads; ++h) stored += a.lengths[h];
  if (stored * a.dim < SERIAL_VALUES) threads = 1;
  const std::vector<Chunk> chunks = cut(a, threads);
  const int64_t stride = a.dim + 2;
  std::vector<float> result(chunks.size() * static_cast<size_t>(a.group * stride));
  const auto count = static_cast<int64_t>(chunks.size());
  int64_t seen = 0;
  const auto run = [&](Worker<T>& worker, int64_t c) {
    return worker.run(chunks[c], result.data() + chunks[c].result * stride);
  };
  if (threads == 1) {  // an OpenMP team of one still costs microseconds
    Worker<T> worker(a);
    for (int64_t c = 0; c < count; ++c) seen += run(worker, c);
  } else {
#pragma omp parallel num_threads(threads) reduction(+ : seen)
    {
      Worker<T> worker(a);
#pragma omp for schedule(dynamic, 1)
      for (int64_t c = 0; c < count; ++c) seen += run(worker, c);
    }
  }
  std::vector<const float*> parts;
  size_t c = 0;
  for (int64_t h = 0; h < a.heads; ++h) {
    const size_t begin = c;
    while (c < chunks.size() && chunks[c].head == h) ++c;
    for (int64_t g = 0; g < a.group; ++g) {
      parts.clear();
      for (size_t i = begin; i < c; ++i) parts.push_back(result.data() + (chunks[i].result + g) * stride);
      const int64_t n = h * a.group + g;
      merge(parts, a.dim, static_cast<T*>(a.out) + n * a.dim, a.lse + n);
    }
  }
  return seen * a.group;
}

int64_t decode_any(const CodedArgs& a) { return a.bf16 ? decode<bf16>(a) : decode<float>(a); }

}  // namespace

CodedKernels coded_kernels() { return {decode_any}; }

}  // namespace WINNOW_ISA
}  // namespace winnow
