// Products of rows with a large matrix. Few rows leave the weights where they are (few_rows.h), where there is AVX-512.
//
// For many, the weights of kItem outputs are packed so that a full vector holds one word of several outputs, and x in strips
// of kTileRows rows, [kRun words][rows][kRun], of which one word is broadcast. A thread packs a slab of weights that
// stays in its second-level cache, and lets every strip of x pass over it. Both streams are fetched ahead by hand: the
// processor's own prefetching stops at every page of 4 KiB.
#include "matmul.h"

#include <omp.h>

#include <algorithm>

#include "few_rows.h"
#include "scratch.h"
#include "tile_pack.h"

namespace winnow {
namespace WINNOW_ISA {
namespace {

constexpr int kColumns = kTileVectors * kLanes;  // outputs of a micro-tile
constexpr int kItem = 64;                        // outputs of a slab of weights
constexpr int kRun = 16;                         // words of a row that lie together in a strip
constexpr int64_t kWords = 1024;                 // words of each output in a slab, at most
constexpr int64_t kStripsBytes = 16 << 20;       // packed rows of x, at most
constexpr int kAheadWeights = 1024, kAheadRows = 3072;  // bytes
constexpr int64_t kLeastStrips = 24;  // that are worth packing a slab
// As which weights need not be packed. More are rather a chunk of a prompt, to be summed up like the whole prompt.
constexpr int64_t kFewRows = 48;
constexpr int64_t kAloneRows = 8;            // that threads need not pack together
constexpr double kSerialProducts = 1 << 18;  // below this, waking another thread does not pay
constexpr int64_t kSerialBytes = 1 << 16;    // of weights for few rows: likewise
static_assert(kItem % kColumns == 0 && kColumns % kPanel == 0, "micro-tiles fill a slab, panels a micro-tile");
static_assert(kWords % kRun == 0, "runs fill a slab");

thread_local Scratch scratch;

// sums[kTileRows][kItem] of one micro-tile: products of a strip with `words` words of the weights, added to what is
// there or instead of it.
template <class Way>
WINNOW_NOINLINE void multiply_strip(const uint32_t* x, const uint32_t* w, int64_t words, float* sums, bool add) {
  Vec acc[kTileRows][kTileVectors];
#pragma GCC unroll 8
  for (int r = 0; r < kTileRows; ++r)
#pragma GCC unroll 8
    for (int j = 0; j < kTileVectors; ++j) acc[r][j] = add ? load(sums + r * kItem + j * kLanes) : Vec{};
  // There is always a run, and saying so to the compiler keeps the sums in registers.
  const uint32_t* const end = x + words * kTileRows;
  do {
#pragma GCC unroll 8
    for (int r = 0; r < kTileRows; ++r)
      __builtin_prefetch(reinterpret_cast<const char*>(x + r * kRun) + kAheadRows);
    const uint32_t* const run_end = x + kRun;
    do {
      Vec b[kTileVectors];
#pragma GCC unroll 8
      for (int j = 0; j < kTileVectors; ++j) {
        b[j] = load(w + j * kLanes);
        if (j * kLanes % 16 == 0) __builtin_prefetch(reinterpret_cast<const char*>(w + j * kLanes) + kAheadWeights);
      }
#pragma GCC unroll 8
      for (int r = 0; r < kTileRows; ++r) {
        const Vec a = splat_word(x + r * kRun);
#pragma GCC unroll 8
        for (int j = 0; j < kTileVectors; ++j) acc[r][j] = Way::dot(acc[r][j], a, b[j]);
      }
      w += kColumns;
    } while (++x != run_end);
    x += (kTileRows - 1) * kRun;
  } while (x != end);
#pragma GCC unroll 8
  for (int r = 0; r < kTileRows; ++r)
#pragma GCC unroll 8
    for (int j = 0; j < kTileVectors; ++j) store(sums + r * kItem + j * kLanes, acc[r][j]);
}

// silu(gate) * up.
template <int kDegree>
static inline Vec gated(Vec gate, Vec up) {
  const Vec power = gate * splat(-kLog2E), most = splat(126.f);  // 2^126 makes it 0 as well as more would
  return gate / (exp2v<kDegree>(power > most ? most : power) + splat(1.f)) * up;
}

template <class Way, bool kGated>
class Matmul {
  using Input = typename Way::Input;
  static constexpr int kOutputs = kGated ? kItem / 2 : kItem;  // of a slab, whose second half are their up weights

 public:
  explicit Matmul(const MatmulArgs& args)
      : a_(args),
        words_(round_up((args.inner + Way::kPerWord - 1) / Way::kPerWord, kRun)),
        outputs_(kGated ? args.outer / 2 : args.outer) {}

  void run() {
#if defined(WINNOW_ISA_avx512)
    if (a_.rows <= kFewRows) return run_few();
#endif
    const double products = static_cast<double>(a_.rows) * static_cast<double>(a_.outer) * static_cast<double>(a_.inner);
    const int threads = products < kSerialProducts ? 1 : omp_get_max_threads();
    prefer_large_pages(a_.out, a_.rows * a_.out_stride * static_cast<int64_t>(sizeof(Input)));
    const int64_t block = std::max<int64_t>(kStripsBytes / (words_ * 4) / kTileRows, 1) * kTileRows;
    for (int64_t first = 0; first < a_.rows; first += block) run_rows(first, std::min(block, a_.rows - first), threads);
  }

 private:
#if defined(WINNOW_ISA_avx512)
  void run_few() {
    const Input* const w = static_cast<const Input*>(a_.w);
    const int threads = a_.outer * a_.inner * int64_t(sizeof *w) < kSerialBytes ? 1 : omp_get_max_threads();
    const FewRows<Way> x(static_cast<const Input*>(a_.x), a_.x_stride, a_.rows, a_.inner);
    const int64_t items = (outputs_ + kOutputs - 1) / kOutputs, ahead = kFewTogether * a_.w_stride * int64_t(sizeof *w);
    // Very few rows every thread packs for itself: that takes no longer than waiting for one that does.
    const bool alone = a_.rows <= kAloneRows;
    uint32_t* const shared = alone ? nullptr : reinterpret_cast<uint32_t*>(scratch.take(x.words() * 4));
#pragma omp parallel num_threads(threads)
    {
      uint32_t* packed = shared;
      if (alone) {
        packed = reinterpret_cast<uint32_t*>(scratch.take(x.words() * 4));
        for (int64_t r = 0; r < x.packed_rows(); ++r) x.pack(r, packed);
      } else {
#pragma omp for schedule(static)
        for (int64_t r = 0; r < x.packed_rows(); ++r) x.pack(r, packed);
      }
      alignas(64) float tile[(kFewRows + kFewVectors * kFewInVector) * kItem];
#pragma omp for schedule(static)
      for (int64_t i = 0; i < items; ++i) {
        const int64_t column = i * kOutputs, columns = std::min<int64_t>(kOutputs, outputs_ - column);
        for (int n = 0; n < kItem; n += kFewTogether) {
          if (n % kOutputs >= columns) continue;  // behind the last output
          const Input* rows[kFewTogether];
          for (int r = 0; r < kFewTogether; ++r) rows[r] = w + weight(column, n + r) * a_.w_stride;
          x.multiply(rows, packed, ahead, tile + n, kItem);
        }
        float bias[kItem];
        take_bias(column, bias);
        write(tile, bias, a_.rows, columns, static_cast<Input*>(a_.out) + column);
      }
    }
  }
#endif

  // Rows whose strips are held at a time.
  void run_rows(int64_t first, int64_t rows, int threads) {
    const int64_t strips = (rows + kTileRows - 1) / kTileRows, items = (outputs_ + kOutputs - 1) / kOutputs;
    // The strips of the last slabs are shared out, so that no thread waits long for another at the end, or does nothing
    // where there are few slabs; but not so finely that packing a slab for each part counts.
    const int64_t parts = std::max<int64_t>(std::min(std::max<int64_t>(4, 4 * threads / items), strips / kLeastStrips), 1);
    const int64_t whole = threads == 1 ? items : std::max<int64_t>(items - 2 * threads, 0);
    // One piece, because large pages pay and every thread's slab alone would not fill one.
    const int64_t slab_words = std::min(kWords, words_) * kItem;
    const int64_t sums = (words_ <= kWords ? 1 : strips) * kTileRows * kItem;
    uint32_t* const slabs = reinterpret_cast<uint32_t*>(
        scratch.take((threads * (slab_words + sums) + strips * kTileRows * words_) * 4));
    uint32_t* const packed = slabs + threads * (slab_words + sums);
#pragma omp parallel num_threads(threads)
    {
#pragma omp for schedule(static)
      for (int64_t s = 0; s < strips; ++s) pack_strip(first, rows, s, strips, packed);
#pragma omp for schedule(dynamic, 1)
      for (int64_t i = 0; i < whole + (items - whole) * parts; ++i) {
        const int64_t item = i < whole ? i : whole + (i - whole) / parts, shares = i < whole ? 1 : parts;
        const int64_t share = i < whole ? 0 : (i - whole) % parts;
        uint32_t* const slab = slabs + omp_get_thread_num() * (slab_words + sums);
        multiply_slab(first, rows, item * kOutputs, strips * share / shares, strips * (share + 1) / shares, strips, packed,
                      slab, reinterpret_cast<float*>(slab + slab_words));
      }
    }
  }

  // Words at..end of strip s lie behind those of all strips before `at`: what passes a slab together lies together.
  static const uint32_t* strip(const uint32_t* packed, int64_t strips, int64_t s, int64_t at, int64_t count) {
    return packed + (strips * at + s * count) * kTileRows;
  }

  void pack_strip(int64_t first, int64_t rows, int64_t s, int64_t strips, uint32_t* packed) const {
    constexpr int kElements = kRun * Way::kPerWord;
    for (int r = 0; r < kTileRows; ++r) {
      const int64_t row = s * kTileRows + r, length = row < rows ? a_.inner : 0;
      const Input* const from = static_cast<const Input*>(a_.x) + (first + row) * a_.x_stride;
      for (int64_t at = 0; at < words_; at += kWords) {
        const int64_t count = std::min(kWords, words_ - at);
        uint32_t* to = const_cast<uint32_t*>(strip(packed, strips, s, at, count)) + r * kRun;
        for (int64_t k = at * Way::kPerWord; k < (at + count) * Way::kPerWord; k += kElements, to += kTileRows * kRun) {
          if (k + kElements <= length) {
            Way::copy(to, from + k, kElements);
          } else {
            Input last[kElements] = {};
            if (k < length) std::copy(from + k, from + length, last);
            Way::copy(to, last, kElements);
          }
        }
      }
    }
  }

  // Which row of the weights is number n of the slab of outputs from `column` on. Behind the last output its row
  // stands in: what it gives is not written.
  int64_t weight(int64_t column, int64_t n) const {
    return n < kOutputs ? std::min(column + n, outputs_ - 1) : outputs_ + std::min(column + n - kOutputs, outputs_ - 1);
  }

  // Outputs `column` .. `column + kOutputs - 1` of some strips.
  void multiply_slab(int64_t first, int64_t rows, int64_t column, int64_t from, int64_t to, int64_t strips,
                     const uint32_t* packed, uint32_t* slab, float* sums) const {
    const int64_t columns = std::min<int64_t>(kOutputs, outputs_ - column);
    const bool whole = words_ <= kWords;  // so that no sums need to be kept
    float bias[kItem];
    take_bias(column, bias);
    for (int64_t at = 0; at < words_; at += kWords) {
      const int64_t count = std::min(kWords, words_ - at);
      pack_slab(column, at, count, slab);
      for (int64_t s = from; s < to; ++s) {
        float* const tile = sums + (whole ? 0 : s - from) * kTileRows * kItem;
        const int64_t count_rows = std::min<int64_t>(kTileRows, rows - s * kTileRows);
        Input* const out = static_cast<Input*>(a_.out) + (first + s * kTileRows) * a_.out_stride + column;
        if (at + count == words_)  // it is written after the products: no waiting then
          for (int64_t r = 0; r < count_rows; ++r)
            for (int64_t n = 0; n < columns; n += 64 / static_cast<int64_t>(sizeof(Input)))
              __builtin_prefetch(out + r * a_.out_stride + n, 1);
        for (int c = 0; c < kItem; c += kColumns)
          multiply_strip<Way>(strip(packed, strips, s, at, count), slab + c * count, count, tile + c, at > 0);
        if (at + count == words_) write(tile, bias, count_rows, columns, out);
      }
    }
  }

  // [kItem / kColumns][words][kColumns]
  void pack_slab(int64_t column, int64_t at, int64_t count, uint32_t* slab) const {
    const int64_t first = at * Way::kPerWord;
    const int64_t whole = std::min(count, std::max<int64_t>(a_.inner / Way::kPerWord - at, 0));
    const Input* const w = static_cast<const Input*>(a_.w);
    for (int64_t n = 0; n < kItem; n += kPanel) {
      const Input* rows[kPanel];
      for (int e = 0; e < kPanel; ++e) rows[e] = w + weight(column, n + e) * a_.w_stride + first;
      uint32_t* const to = slab + n / kColumns * kColumns * count + n % kColumns;
      pack_keys<Way>(rows, static_cast<int>(whole * Way::kPerWord), to, kColumns);
      for (int64_t k = whole; k < count; ++k)
        for (int e = 0; e < kPanel; ++e) {
          Input last[Way::kPerWord] = {};
          const int64_t left = a_.inner - first - k * Way::kPerWord;
          if (left > 0) std::copy_n(rows[e] + k * Way::kPerWord, left, last);
          to[k * kColumns + e] = Way::word(last);
        }
    }
  }

  void take_bias(int64_t column, float* bias) const {
    for (int n = 0; n < kItem; ++n)
      bias[n] = a_.bias ? to_float(static_cast<const Input*>(a_.bias)[weight(column, n)]) : 0.f;
  }

  void write(const float* sums, const float* bias, int64_t rows, int64_t columns, Input* out) const {
    for (int64_t r = 0; r < rows; ++r, sums += kItem, out += a_.out_stride)
      for (int64_t n = 0; n < columns; n += kLanes) {
        Vec v = load(sums + n) + load(bias + n);
        if constexpr (kGated) v = gated<Way::kExpDegree>(v, load(sums + kOutputs + n) + load(bias + kOutputs + n));
        if (n + kLanes <= columns) {
          store_as(out + n, v);
        } else {
          for (int64_t i = 0; n + i < columns; ++i) from_float(v[i], out + n + i);
        }
      }
  }

  const MatmulArgs& a_;
  const int64_t words_;    // of a row, zeros behind its end: whole runs
  const int64_t outputs_;  // columns of the result
};

template <bool kGated>
void matmul(const MatmulArgs& a) {
  a.type == Dtype::f32 ? Matmul<Float32Way, kGated>(a).run() : Matmul<Bf16Way, kGated>(a).run();
}

double peak(int64_t times) {
  constexpr int64_t kShort = 64;  // words
  double operations = 0;
#pragma omp parallel reduction(+ : operations)
  {
    alignas(64) uint32_t x[kTileRows * kShort] = {}, w[kColumns * kShort] = {};
    alignas(64) float sums[kTileRows * kItem] = {};
    for (int64_t i = 0; i < times; ++i) multiply_strip<Bf16Way>(x, w, kShort, sums, true);
    operations += 2.0 * Bf16Way::kPerWord * kTileRows * kColumns * kShort * static_cast<double>(times);
  }
  return operations;
}

}  // namespace

MatmulKernels matmul_kernels() { return {matmul<false>, matmul<true>, peak}; }

}  // namespace WINNOW_ISA
}  // namespace winnow
