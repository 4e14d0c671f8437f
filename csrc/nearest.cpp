// The most similar of the hosts for every row: a matrix product of which only each row's maximum is kept.
//
// Hosts are packed once; blocks of rows stream past them. Dividing by a row's own norm changes no order, so that
// products are only scaled by the hosts' norms before they are compared, in registers.
#include "nearest.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include "prefill_tile.h"
#include "scratch.h"
#include "tile_pack.h"

namespace winnow {
namespace WINNOW_ISA {
namespace {

constexpr int kKeys = kTilePanels * kPanel;  // hosts of a micro-tile
constexpr int kBlockRows = 8 * kTileRows;    // rows that are copied at a time
constexpr float kLeastNorm = 1e-12f;         // as torch.nn.functional.normalize has it
thread_local Scratch scratch;

// Best product so far of each of kTileRows rows, lane by lane, and which host it is with.
template <class Way>
WINNOW_NOINLINE void nearest_micro(const uint32_t* q, const uint32_t* k, int words, const float* inverse, int32_t first,
                                   float* best, int32_t* host) {
  constexpr int NV = kTilePanels * kPanelVectors;
  Vec acc[kTileRows][NV];
  const uint32_t* panels[kTilePanels];
#pragma GCC unroll 8
  for (int n = 0; n < kTilePanels; ++n) panels[n] = k + n * words * kPanel;
  multiply<Way, kTileRows, kTilePanels>(q, panels, words, acc);
#pragma GCC unroll 8
  for (int r = 0; r < kTileRows; ++r) {
    Vec top = load(best + r * kLanes);
    VecInt at = (VecInt)load(host + r * kLanes);
#pragma GCC unroll 8
    for (int j = 0; j < NV; ++j) {
      const Vec x = acc[r][j] * load(inverse + j * kLanes);
      const VecInt better = x > top;
      top = better ? x : top;
      at = better ? iota() + (first + j * kLanes) : at;
    }
    store(best + r * kLanes, top);
    store(host + r * kLanes, (Vec)at);
  }
}

template <class Way>
class Nearest {
  using Input = typename Way::Input;

 public:
  explicit Nearest(const NearestArgs& args)
      : a_(args),
        D_(static_cast<int>(args.depth)),
        words_(D_ / Way::kPerWord),
        all_hosts_(round_up(args.n_hosts, kKeys)),
        inverse_(static_cast<size_t>(all_hosts_)) {}

  void run() {
    packed_ = reinterpret_cast<uint32_t*>(scratch.take(all_hosts_ * words_ * 4));
    pack();
    const int64_t blocks = (a_.n_rows + kBlockRows - 1) / kBlockRows;
    const double products = static_cast<double>(a_.n_rows) * static_cast<double>(a_.n_hosts) * D_;
    const int threads = threads_for(products);
    if (threads == 1) {
      std::vector<uint32_t> words(static_cast<size_t>(kBlockRows * words_));
      for (int64_t b = 0; b < blocks; ++b) compare(b * kBlockRows, words.data());
      return;
    }
#pragma omp parallel num_threads(threads)
    {
      std::vector<uint32_t> words(static_cast<size_t>(kBlockRows * words_));
#pragma omp for schedule(dynamic, 4)
      for (int64_t b = 0; b < blocks; ++b) compare(b * kBlockRows, words.data());
    }
  }

 private:
  const Input* row(int64_t i) const { return static_cast<const Input*>(a_.x) + i * a_.stride; }

  float inverse_norm(const Input* x) const {
    float sum = 0.f;
#pragma omp simd reduction(+ : sum)
    for (int d = 0; d < D_; ++d) sum += to_float(x[d]) * to_float(x[d]);
    return 1.f / std::max(std::sqrt(sum), kLeastNorm);
  }

  void pack() {
    for (int64_t e = 0; e < all_hosts_; e += kPanel) {
      const Input* rows[kPanel];
      for (int i = 0; i < kPanel; ++i) {
        // What is missing to a whole tile repeats the first host, which wins the tie.
        rows[i] = row(a_.hosts[e + i < a_.n_hosts ? e + i : 0]);
        inverse_[static_cast<size_t>(e + i)] = inverse_norm(rows[i]);
      }
      pack_keys<Way>(rows, D_, packed_ + e * words_);
    }
  }

  // Rows first .. first + kBlockRows - 1 against all hosts.
  void compare(int64_t first, uint32_t* words) const {
    const int64_t count = std::min<int64_t>(kBlockRows, a_.n_rows - first), all = round_up(count, kTileRows);
    alignas(64) float best[kBlockRows * kLanes];
    alignas(64) int32_t host[kBlockRows * kLanes] = {};
    std::fill(best, best + all * kLanes, kNoMax);
    for (int64_t i = 0; i < all; ++i) Way::copy(words + i * words_, row(a_.rows[first + std::min(i, count - 1)]), D_);
    for (int64_t e = 0; e < all_hosts_; e += kKeys)
      for (int64_t r = 0; r < all; r += kTileRows)
        nearest_micro<Way>(words + r * words_, packed_ + e * words_, words_, inverse_.data() + e,
                           static_cast<int32_t>(e), best + r * kLanes, host + r * kLanes);
    for (int64_t i = 0; i < count; ++i) {
      const float* lanes = best + i * kLanes;
      int lane = 0;
      for (int l = 1; l < kLanes; ++l) {
        const bool earlier = host[i * kLanes + l] < host[i * kLanes + lane];
        if (lanes[l] > lanes[lane] || (lanes[l] == lanes[lane] && earlier)) lane = l;
      }
      a_.cosine[first + i] = lanes[lane] * inverse_norm(row(a_.rows[first + i]));
      a_.host[first + i] = host[i * kLanes + lane];
    }
  }

  const NearestArgs& a_;
  const int D_, words_;
  const int64_t all_hosts_;  // whole micro-tiles
  std::vector<float> inverse_;
  uint32_t* packed_ = nullptr;
};

void run(const NearestArgs& args) {
  if (args.dtype == QueryDtype::bfloat16) return Nearest<Bf16Way>(args).run();
  Nearest<Float32Way>(args).run();
}

}  // namespace

NearestKernels nearest_kernels() { return {run}; }

}  // namespace WINNOW_ISA
}  // namespace winnow
