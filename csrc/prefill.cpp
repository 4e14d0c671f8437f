// Prefill attention: which rows meet which panels, and in what order.
//
// Work is cut into items: some tokens of all query heads of one KV head (dense, window), or some rows of
// one query head (lists). An item sees a list of panels of 16 entries; where an item's rows are few, it
// packs the panels as it goes, otherwise a KV head's panels are packed once and shared by its items.
#include "prefill.h"

#include <omp.h>

#include <algorithm>
#include <stdexcept>
#include <type_traits>
#include <vector>

#include "prefill_tile.h"
#include "scratch.h"
#include "tile_pack.h"

namespace winnow {
namespace WINNOW_ISA {
namespace {

constexpr int kItemRows = 256;  // rows of an item that shares its panels
constexpr int64_t kTileBytes = 128 << 10;  // packed keys and values of a tile
constexpr int64_t kPackedBytes = 16 << 20;  // packed heads at once, and what is kept between calls
constexpr int64_t kAhead = 32;  // entries that packing fetches ahead of what it reads
constexpr int kListRows = 512;  // rows of an item that packs a gathered list: they pay for the packing

thread_local Scratch packed;  // heads

struct Item {
  int64_t kv_head;
  int64_t head, heads;    // query heads head .. head + heads - 1
  int64_t token, tokens;  // rows are token-major: row i is token i / heads, head i % heads
  int64_t list;           // number of the item's list (lists only)
};

struct Needed {
  int32_t kv_head, panel;
};

// A run of entries of one head.
struct Span {
  int64_t lo, hi;
};

template <class Way>
class Prefill {
  using Input = typename Way::Input;

 public:
  explicit Prefill(const PrefillArgs& args)
      : a_(args),
        D_(static_cast<int>(args.depth)),
        maths_(tile_maths(args)),
        zeros_(static_cast<size_t>(args.depth)) {
    words_ = D_ / Way::kPerWord;
    panel_words_ = panel_words<Way>(D_);
    for (int64_t h = 0; h < a_.kv_heads; ++h) longest_ = std::max<int64_t>(longest_, a_.lengths[h]);
    // A tile of keys and values stays in the second-level cache while every group of rows passes over it.
    tile_panels_ = std::clamp<int64_t>(kTileBytes / (2 * panel_words_ * 4), 4, kMaxPanels);
    gathers_ = a_.form == PrefillForm::lists && a_.unit % kPanel != 0;
    const double products = static_cast<double>(a_.tokens) * a_.kv_heads * a_.group * longest_ * D_;
    threads_ = threads_for(products);
    const int64_t rows = a_.tokens * a_.group;
    packs_ = gathers_ || (a_.form != PrefillForm::lists && rows <= kItemRows && a_.kv_heads >= threads_);
    item_rows_ = gathers_ ? kListRows : kItemRows;
    if (!packs_ && a_.form != PrefillForm::lists) {
      // Smaller items where one head alone would not keep the threads busy.
      while (item_rows_ > 8 * kTileRows && rows < 2 * threads_ * item_rows_) item_rows_ /= 2;
    }
    item_rows_ = std::max<int64_t>(item_rows_, a_.group);
    plan_thread();
  }

  int64_t run() {
    if (a_.tokens == 0) return 0;
    if (a_.form == PrefillForm::lists) check_lists();
    scratch_ = allocate(threads_ * thread_bytes_);
    prefer_large_pages(a_.out, a_.tokens * a_.kv_heads * a_.group * D_ * static_cast<int64_t>(sizeof(Input)));
    std::vector<Item> items;
    int64_t pairs = 0;
    if (packs_) {
      for (int64_t h = 0; h < a_.kv_heads; ++h) add_items(h, items);
      const int64_t n = static_cast<int64_t>(items.size());
#pragma omp parallel for schedule(dynamic, 1) reduction(+ : pairs) num_threads(threads_)
      for (int64_t i = 0; i < n; ++i) pairs += attend_item(items[static_cast<size_t>(i)], nullptr);
      return pairs;
    }
    // As many heads at once as fit: threads wait for each other once a batch, not once a head.
    panels_ = (longest_ + kPanel - 1) / kPanel;
    const int64_t head_bytes = std::max<int64_t>(1, panels_ * (2 * panel_words_ + (a_.bias ? kPanel : 0)) * 4);
    const int64_t batch = std::clamp<int64_t>(kPackedBytes / head_bytes, 1, a_.kv_heads);
    packed_k_ = reinterpret_cast<uint32_t*>(packed.take(batch * head_bytes));
    packed_v_ = packed_k_ + batch * panels_ * panel_words_;
    packed_bias_ = reinterpret_cast<float*>(packed_v_ + batch * panels_ * panel_words_);
    std::vector<Needed> needed;
    for (first_head_ = 0; first_head_ < a_.kv_heads; first_head_ += batch) {
      items.clear();
      needed.clear();
      for (int64_t h = first_head_; h < std::min(first_head_ + batch, a_.kv_heads); ++h) {
        const size_t before = items.size();
        add_items(h, items);
        find_needed(h, items.data() + before, items.size() - before, needed);
      }
      // Neighbours in the list of items share pages of the queries; runs of them where there are plenty.
      const int64_t n_needed = static_cast<int64_t>(needed.size()), n = static_cast<int64_t>(items.size());
      const int64_t chunk = n >= 64 * threads_ ? 4 : 1;
#pragma omp parallel reduction(+ : pairs) num_threads(threads_)
      {
#pragma omp for schedule(dynamic, 32)
        for (int64_t i = 0; i < n_needed; ++i) {
          const Needed& one = needed[static_cast<size_t>(i)];
          const int64_t at = packed_at(one.kv_head) + one.panel;
          pack(one.kv_head, int64_t{one.panel} * kPanel, nullptr, packed_k_ + at * panel_words_,
               packed_v_ + at * panel_words_, packed_bias_ + at * kPanel);
        }
#pragma omp for schedule(dynamic, chunk)
        for (int64_t i = 0; i < n; ++i)
          pairs += attend_item(items[static_cast<size_t>(i)], i + 1 < n ? &items[static_cast<size_t>(i) + 1] : nullptr);
      }
    }
    packed.free_above(kPackedBytes);
    return pairs;
  }

 private:
  // ---- what a query sees, in entries of its KV head

  // Entries of head h at positions up to `position`.
  int64_t entries_until(int64_t h, int64_t position) const {
    const int64_t length = a_.lengths[h];
    if (a_.positions == nullptr) return std::clamp<int64_t>(position - a_.start + 1, 0, length);
    const int32_t* from = a_.positions + h * a_.positions_head;
    return std::upper_bound(from, from + length, position) - from;
  }

  int64_t init_entries(int64_t h) const {
    return a_.form == PrefillForm::window ? entries_until(h, a_.init - 1) : 0;
  }

  // The model's causal span, and the form's first `init` entries and its local span inside it.
  void spans(int64_t h, int64_t token, Span& init, Span& local) const {
    const int64_t at = a_.query_positions[token];
    const int64_t hi = entries_until(h, at);
    const int64_t lo = a_.sliding > 0 ? std::min(hi, entries_until(h, at - a_.sliding)) : 0;
    init = {lo, lo};
    local = {lo, hi};
    if (a_.form != PrefillForm::window) return;
    const int64_t first = a_.align == 1 ? at - a_.local + 1 : at / a_.align * a_.align - (a_.local - a_.align);
    const int64_t init_end = std::clamp(init_entries(h), lo, hi);
    const int64_t begin = std::clamp(entries_until(h, first - 1), lo, hi);
    if (begin <= init_end) return;
    init = {lo, init_end};
    local = {begin, hi};
  }

  // What the tokens first .. last see together. Spans only move forward from token to token, and an init
  // span begins where the model's window does.
  struct Union {
    Span init, local;
  };
  Union union_of(int64_t h, int64_t first, int64_t last) const {
    Span init0, local0, init1, local1;
    spans(h, first, init0, local0);
    spans(h, last, init1, local1);
    return {{init0.lo, std::max(init0.lo, std::min(init_entries(h), local1.hi))},
            local1.hi > local0.lo ? Span{local0.lo, local1.hi} : Span{0, 0}};
  }

  // ---- items

  void add_items(int64_t h, std::vector<Item>& items) const {
    const int64_t G = a_.group;
    if (a_.form != PrefillForm::lists) {
      // Later tokens see more: heaviest first.
      const int64_t step = std::max<int64_t>(1, item_rows_ / G);
      for (int64_t t = (a_.tokens - 1) / step * step; t >= 0; t -= step)
        items.push_back({h, h * G, G, t, std::min(step, a_.tokens - t), 0});
      return;
    }
    const int64_t last = (a_.tokens - 1 + a_.phase) / a_.rows;
    for (int64_t list = last; list >= 0; --list) {
      const int64_t begin = std::max<int64_t>(0, list * a_.rows - a_.phase);
      const int64_t end = std::min(a_.tokens, (list + 1) * a_.rows - a_.phase);
      for (int64_t t = begin; t < end; t += item_rows_)
        for (int64_t g = 0; g < G; ++g)
          items.push_back({h, h * G + g, 1, t, std::min(item_rows_, end - t), list});
    }
  }

  // Lists come from outside: a column that is negative or out of order would write behind the buffers.
  void check_lists() const {
    const int64_t lists = (a_.tokens - 1 + a_.phase) / a_.rows + 1, heads = a_.kv_heads * a_.group;
    bool good = true;
#pragma omp parallel for schedule(static) reduction(&& : good) num_threads(threads_)
    for (int64_t n = 0; n < heads; ++n) {
      for (int64_t r = 0; r < lists && good; ++r) {
        const int32_t* offsets = a_.offsets + n * a_.offsets_head + r;
        good = offsets[0] >= 0 && offsets[0] <= offsets[1] && offsets[1] <= a_.n_columns;
        int32_t before = -1;
        for (int32_t i = offsets[0]; good && i < offsets[1]; ++i) {
          good = a_.columns[i] > before;
          before = a_.columns[i];
        }
      }
    }
    if (!good) throw std::invalid_argument("the columns of a list must be ascending, unique and not negative");
  }

  void list_of(const Item& item, const int32_t*& columns, int64_t& count) const {
    const int32_t* offsets = a_.offsets + item.head * a_.offsets_head + item.list;
    columns = a_.columns + offsets[0];
    // Units behind the end of this head's entries hold nothing.
    const int64_t units = (a_.lengths[item.kv_head] + a_.unit - 1) / a_.unit;
    count = std::lower_bound(columns, a_.columns + offsets[1], units) - columns;
  }

  // Panels of head h that some item reads, ascending.
  void find_needed(int64_t h, const Item* items, size_t n_items, std::vector<Needed>& needed) const {
    const int64_t panels = (a_.lengths[h] + kPanel - 1) / kPanel;
    std::vector<char> marks(static_cast<size_t>(panels), 0);
    const auto mark = [&](int64_t from, int64_t to) {
      for (int64_t p = from / kPanel; p * kPanel < to; ++p) marks[static_cast<size_t>(p)] = 1;
    };
    if (a_.form == PrefillForm::lists) {
      const int32_t* columns;
      int64_t count;
      for (size_t n = 0; n < n_items; ++n) {
        list_of(items[n], columns, count);
        for (int64_t i = 0; i < count; ++i)
          mark(columns[i] * a_.unit, std::min<int64_t>((columns[i] + 1) * a_.unit, a_.lengths[h]));
      }
    } else {
      const Union u = union_of(h, 0, a_.tokens - 1);
      mark(u.init.lo, u.init.hi);
      mark(u.local.lo, u.local.hi);
    }
    for (int64_t p = 0; p < panels; ++p)
      if (marks[static_cast<size_t>(p)]) needed.push_back({static_cast<int32_t>(h), static_cast<int32_t>(p)});
  }

  // ---- packing

  // Where a head's packed panels begin, in panels.
  int64_t packed_at(int64_t h) const { return (h - first_head_) * panels_; }

  // Entries [first, first + 16), or the 16 listed ones; those that do not exist are zeros.
  __attribute__((noinline)) void pack(int64_t h, int64_t first, const int32_t* listed, uint32_t* k, uint32_t* v,
                                      float* bias) const {
    const Input *k_rows[kPanel], *v_rows[kPanel];
    const Input* k_head = static_cast<const Input*>(a_.k) + h * a_.k_head;
    const Input* v_head = static_cast<const Input*>(a_.v) + h * a_.v_head;
    const int64_t length = a_.lengths[h];
    for (int e = 0; e < kPanel; ++e) {
      const int64_t entry = listed == nullptr ? first + e : listed[e];
      const bool exists = entry >= 0 && entry < length;
      k_rows[e] = exists ? k_head + entry * a_.k_entry : zeros_.data();
      v_rows[e] = exists ? v_head + entry * a_.v_entry : zeros_.data();
      if (a_.bias != nullptr) bias[e] = exists ? a_.bias[h * a_.bias_head + entry] : 0.f;
    }
    if (listed == nullptr)
      for (int e = 0; e < kPanel; ++e)
        for (int64_t d = 0; d < D_; d += 64 / static_cast<int64_t>(sizeof(Input))) {
          __builtin_prefetch(k_head + (first + e + kAhead) * a_.k_entry + d);
          __builtin_prefetch(v_head + (first + e + kAhead) * a_.v_entry + d);
        }
    pack_keys<Way>(k_rows, D_, k);
    pack_values(v_rows, D_, v, Way{});
  }

  // ---- one item

  struct Thread {
    uint32_t* q;
    float *o, *m, *l, *top;
    Visible* visible;
    int32_t* slots;  // panel numbers, or entries where lists are gathered
    int32_t* ahead;  // panels that the next item begins with
    uint32_t *k, *v;
    float* bias;
    Group* groups;
    TileBuffers tile;
  };

  // Lays a thread's buffers out; with a null base it only counts the bytes.
  int64_t lay_out(char* base, Thread& t) const {
    int64_t at = 0;
    const auto take = [&](auto*& p, int64_t count) {
      p = reinterpret_cast<std::remove_reference_t<decltype(p)>>(base + at);
      at += round_up(count * static_cast<int64_t>(sizeof(*p)), 64);
    };
    const int64_t rows = item_rows_;
    take(t.q, rows * words_);
    take(t.o, rows * D_);
    take(t.m, rows);
    take(t.l, rows * kLanes);
    take(t.top, rows * kLanes);
    take(t.visible, rows);
    take(t.groups, (rows + kTileRows - 1) / kTileRows);
    take(t.slots, gathers_ ? longest_ + 2 * kPanel + a_.unit : longest_ / kPanel + 2);
    take(t.ahead, tile_panels_);
    take(t.k, packs_ ? tile_panels_ * panel_words_ : 0);
    take(t.v, packs_ ? tile_panels_ * panel_words_ : 0);
    take(t.bias, packs_ ? kTileKeys : 0);
    take(t.tile.s, kTileRows * kRow);
    take(t.tile.p, kTileRows * kRow);
    take(t.tile.highest, kTileRows * kLanes);
    return at + 4096;  // no two threads share a page
  }
  void plan_thread() {
    Thread unused;
    thread_bytes_ = round_up(lay_out(nullptr, unused), 4096);
  }

  // Fills the item's list of panels (or entries) and what each of its tokens sees of it.
  __attribute__((noinline)) int64_t list_panels(const Item& item, Thread& t) const {
    const int64_t h = item.kv_head;
    if (a_.form == PrefillForm::lists) {
      const int32_t* columns;
      int64_t count, slots = 0;
      list_of(item, columns, count);
      const int64_t unit = a_.unit;
      const int64_t all = round_up(a_.lengths[h], kPanel);
      for (int64_t i = 0; i < count; ++i) {
        const int64_t begin = columns[i] * unit, end = std::min(begin + unit, all);
        if (gathers_)
          for (int64_t e = begin; e < end; ++e) t.slots[slots++] = static_cast<int32_t>(e);
        else
          for (int64_t p = begin / kPanel; p * kPanel < end; ++p) t.slots[slots++] = static_cast<int32_t>(p);
      }
      if (gathers_)
        while (slots % kPanel != 0) t.slots[slots++] = -1;
      const auto slot_of = [&](int64_t entry) {
        const int64_t i = std::lower_bound(columns, columns + count, entry / unit) - columns;
        const bool inside = i < count && columns[i] == entry / unit;
        return static_cast<int32_t>(i * unit + (inside ? entry % unit : 0));
      };
      for (int64_t i = 0; i < item.tokens; ++i) {
        Span none, seen;
        spans(h, item.token + i, none, seen);
        t.visible[i] = {0, 0, slot_of(seen.lo), slot_of(seen.hi)};
      }
      return gathers_ ? slots / kPanel : slots;
    }
    // Panels of the init spans, then those of the local ones that are not among them.
    const Union u = union_of(h, item.token, item.token + item.tokens - 1);
    const int64_t init_begin = u.init.lo / kPanel, init_end = (u.init.hi + kPanel - 1) / kPanel;
    int64_t panels = 0, local_begin = u.local.lo / kPanel;
    if (u.init.lo < u.init.hi) {
      for (int64_t p = init_begin; p < init_end; ++p) t.slots[panels++] = static_cast<int32_t>(p);
      local_begin = std::max(local_begin, init_end);
    }
    const int64_t skipped = local_begin - panels;
    for (int64_t p = local_begin; p * kPanel < u.local.hi; ++p) t.slots[panels++] = static_cast<int32_t>(p);
    const auto slot_of = [&](int64_t entry) {
      return static_cast<int32_t>(entry - (entry >= local_begin * kPanel ? skipped : init_begin) * kPanel);
    };
    for (int64_t i = 0; i < item.tokens; ++i) {
      Span init, local;
      spans(h, item.token + i, init, local);
      t.visible[i] = {slot_of(init.lo), slot_of(init.hi), slot_of(local.lo), slot_of(local.hi)};
    }
    return panels;
  }

  const Input* query(int64_t token, int64_t head) const {
    return static_cast<const Input*>(a_.q) + token * a_.q_token + head * a_.q_head;
  }

  void load_queries(const Item& item, uint32_t* q) const {
    for (int64_t i = 0; i < item.tokens; ++i)
      for (int64_t n = 0; n < item.heads; ++n, q += words_) Way::copy(q, query(item.token + i, item.head + n), D_);
  }

  Input* out_row(int64_t token, int64_t head) const {
    return static_cast<Input*>(a_.out) + (token * a_.kv_heads * a_.group + head) * D_;
  }

  __attribute__((noinline)) void store_rows(const Item& item, int64_t row, int rows, const Group& group) const {
    for (int r = 0; r < rows; ++r) {
      const int64_t token = item.token + (row + r) / item.heads, head = item.head + (row + r) % item.heads;
      const int64_t at = token * a_.kv_heads * a_.group + head;
      const float total = sum(load(group.l + r * kLanes));
      const bool blank = total == 0.f;
      const float inverse = blank ? 0.f : 1.f / total;
      Input* to = out_row(token, head);
      for (int d = 0; d < D_; d += kLanes)
        store_as(to + d, blank ? Vec{} : load(group.o + r * D_ + d) * splat(inverse));
      a_.lse[at] = blank ? kNoMax : (group.m[r] + std::log2(total)) * kLn2;
      if (a_.row_max != nullptr) a_.row_max[at] = blank ? kNoMax : largest(load(group.top + r * kLanes)) * kLn2;
    }
  }

  int64_t attend_item(const Item& item, const Item* next) const {
    Thread t;
    lay_out(scratch_.get() + omp_get_thread_num() * thread_bytes_, t);
    const int64_t panels = list_panels(item, t), rows = item.tokens * item.heads;
    int64_t pairs = 0;
    for (int64_t i = 0; i < item.tokens; ++i) pairs += t.visible[i].count() * item.heads;

    for (int64_t i = 0; i < item.tokens; ++i)
      for (int64_t at = 0; at < item.heads * D_; at += 64 / static_cast<int64_t>(sizeof(Input)))
        __builtin_prefetch(out_row(item.token + i, item.head) + at, 1);  // written at the end: no waiting then
    load_queries(item, t.q);
    if (next != nullptr)
      for (int64_t i = 0; i < next->tokens; ++i)
        for (int64_t at = 0; at < next->heads * D_; at += 64 / static_cast<int64_t>(sizeof(Input)))
          __builtin_prefetch(query(next->token + i, next->head) + at, 0, 2);
    std::fill(t.o, t.o + rows * D_, 0.f);
    std::fill(t.m, t.m + rows, kNoMax);
    std::fill(t.l, t.l + rows * kLanes, 0.f);
    std::fill(t.top, t.top + rows * kLanes, kNoMax);
    for (int64_t row = 0; row < rows; row += kTileRows) {
      const int n = static_cast<int>(std::min<int64_t>(kTileRows, rows - row));
      Group& group = t.groups[row / kTileRows];
      group.q = t.q + row * words_;
      group.o = t.o + row * D_;
      group.m = t.m + row;
      group.l = t.l + row * kLanes;
      group.top = a_.row_max != nullptr ? t.top + row * kLanes : nullptr;
      constexpr int32_t kFar = std::numeric_limits<int32_t>::max();
      group.span = {kFar, 0, 0, kFar, 0, kFar};
      for (int r = 0; r < n; ++r) {
        const Visible& v = t.visible[static_cast<uint32_t>(row + r) / static_cast<uint32_t>(item.heads)];
        group.visible[r] = &v;
        GroupSpan& span = group.span;
        if (v.count() > 0) {
          span.any0 = std::min(span.any0, v.a0 < v.a1 ? v.a0 : v.b0);
          span.any1 = std::max(span.any1, v.b0 < v.b1 ? v.b1 : v.a1);
        }
        span.all_a0 = std::max(span.all_a0, v.a0);
        span.all_a1 = std::min(span.all_a1, v.a1);
        span.all_b0 = std::max(span.all_b0, v.b0);
        span.all_b1 = std::min(span.all_b1, v.b1);
      }
    }

    Tile tile{};
    for (int64_t first = 0; first < panels; first += tile_panels_) {
      tile.panels = static_cast<int>(std::min(tile_panels_, panels - first));
      tile.slot = static_cast<int32_t>(first * kPanel);
      for (int n = 0; n < tile.panels; ++n) fetch(item.kv_head, first + n, n, t, tile);
      // Meanwhile the second-level cache gets the next tile, or the next item's first: lists jump about, so
      // no hardware foresees them.
      const int64_t left = packs_ ? 0 : std::min(tile_panels_, panels - first - tile_panels_);
      const bool more = left > 0;
      const int32_t* const ahead = more ? t.slots + first + tile_panels_ : t.ahead;
      const int64_t n_ahead = more ? left : next != nullptr ? first_panels(*next, t.ahead) : 0;
      const int64_t base = packs_ ? 0 : packed_at(more || next == nullptr ? item.kv_head : next->kv_head);
      for (int64_t row = 0; row < rows; row += kTileRows) {
        for (int64_t p = n_ahead * row / rows; p < n_ahead * std::min(rows, row + kTileRows) / rows; ++p)
          for (int64_t w = 0; w < panel_words_; w += 16) {
            __builtin_prefetch(packed_k_ + (base + ahead[p]) * panel_words_ + w, 0, 2);
            __builtin_prefetch(packed_v_ + (base + ahead[p]) * panel_words_ + w, 0, 2);
          }
        attend<Way>(static_cast<int>(std::min<int64_t>(kTileRows, rows - row)), t.groups[row / kTileRows], tile,
                    words_, D_, maths_, t.tile);
      }
    }
    for (int64_t row = 0; row < rows; row += kTileRows)
      store_rows(item, row, static_cast<int>(std::min<int64_t>(kTileRows, rows - row)), t.groups[row / kTileRows]);
    return pairs;
  }

  // Panels of an item's first tile (of lists; other items run over neighbouring panels).
  int64_t first_panels(const Item& item, int32_t* ahead) const {
    if (a_.form != PrefillForm::lists) return 0;
    const int32_t* columns;
    int64_t count, n = 0;
    list_of(item, columns, count);
    const int64_t all = (a_.lengths[item.kv_head] + kPanel - 1) / kPanel, step = a_.unit / kPanel;
    for (int64_t i = 0; i < count; ++i)
      for (int64_t p = columns[i] * step; p < std::min(all, (columns[i] + 1) * step); ++p) {
        if (n == tile_panels_) return n;
        ahead[n++] = static_cast<int32_t>(p);
      }
    return n;
  }

  // Panel `index` of the item's list becomes panel n of the tile.
  void fetch(int64_t h, int64_t index, int n, Thread& t, Tile& tile) const {
    if (packs_) {
      uint32_t *k = t.k + n * panel_words_, *v = t.v + n * panel_words_;
      float* bias = t.bias + n * kPanel;
      if (gathers_)
        pack(h, 0, t.slots + index * kPanel, k, v, bias);
      else
        pack(h, int64_t{t.slots[index]} * kPanel, nullptr, k, v, bias);
      tile.k[n] = k;
      tile.v[n] = v;
      tile.bias[n] = a_.bias ? bias : nullptr;
      return;
    }
    const int64_t panel = packed_at(h) + t.slots[index];
    tile.k[n] = packed_k_ + panel * panel_words_;
    tile.v[n] = packed_v_ + panel * panel_words_;
    tile.bias[n] = a_.bias ? packed_bias_ + panel * kPanel : nullptr;
  }

  const PrefillArgs& a_;
  const int D_;
  const TileMaths maths_;
  const std::vector<Input> zeros_;
  int words_;
  int64_t panel_words_, tile_panels_;
  int64_t longest_ = 0;
  bool gathers_, packs_;  // lists of single entries; items pack their own panels
  int threads_;
  int64_t item_rows_;
  int64_t thread_bytes_ = 0;
  Memory scratch_;
  int64_t panels_ = 0, first_head_ = 0;  // room per head, first head of the batch
  uint32_t *packed_k_ = nullptr, *packed_v_ = nullptr;
  float* packed_bias_ = nullptr;
};

int64_t run(const PrefillArgs& args) {
  if (args.dtype == QueryDtype::bfloat16) return Prefill<Bf16Way>(args).run();
  return Prefill<Float32Way>(args).run();
}

}  // namespace

PrefillKernels prefill_kernels() { return {run}; }

}  // namespace WINNOW_ISA
}  // namespace winnow
