// Work goes in pieces of a few rows that stay in the first-level cache: first the bounds of every group,
// then its zero and scale, then the codes; and back. Runs of channels that share a factor and fill whole
// vectors take the path for pairs, any others one value at a time. Every instruction set gives bit for bit
// the reference's result: the arithmetic is single IEEE operations in a fixed order, which contraction to
// fused ones would change.
#include "quantize.h"

#include <algorithm>
#include <cstring>
#include <limits>
#include <vector>

#if defined(__clang__)
#pragma clang fp contract(off)
#elif defined(__GNUC__)
#pragma GCC optimize("fp-contract=off")
#endif

#include "quantize_simd.h"

namespace winnow {
namespace WINNOW_ISA {
namespace {

constexpr int64_t kAhead = 16384;             // bytes
constexpr int64_t kRun = 2 * kLanes;         // channels that a pair of vectors holds
constexpr int64_t kTile = 32;                // rows whose scales are worked out together
constexpr int64_t kStreamBytes = 24 << 20;   // results beyond this do not fit the caches: write around them
constexpr int64_t kSerialElements = 1 << 14;  // below this a second thread costs more than it gives

inline uint32_t bits_of(float f) {
  uint32_t b;
  std::memcpy(&b, &f, 4);
  return b;
}

inline float float_of(uint32_t b) {
  float f;
  std::memcpy(&f, &b, 4);
  return f;
}

inline float widen(float f) { return f; }
inline float widen(uint16_t b) { return float_of(uint32_t(b) << 16); }

inline void narrow(float f, float& out) { out = f; }
inline void narrow(float f, uint16_t& out) {  // to nearest even; f is finite
  const uint32_t b = bits_of(f);
  out = uint16_t((b + 0x7fffu + ((b >> 16) & 1)) >> 16);
}

// To bfloat16: the largest not above, and the smallest not below a value that is not negative.
inline F floor_bf16(F v) {
  const U b = (U)v;
  return (F)((b + (b >> 31) * 0xffffu) & 0xffff0000u);
}
inline F ceil_bf16(F v) { return (F)(((U)v + 0xffffu) & 0xffff0000u); }

// A value is (code - offset) * scale + zero; the symmetric form has no zero, the other no offset.
struct Form {
  int bits, offset;
  float levels;  // largest code of the asymmetric form, largest magnitude of the symmetric one
  // Adding 1.5 * 2^23 leaves a value, rounded to the nearest even integer, in the low bits of the float.
  // The offset is even, so adding it in the same step does not change which way a half is rounded.
  float round;
  bool symmetric;
  explicit Form(const QuantizeArgs& a)
      : bits(a.bits),
        offset(a.zero.data ? 0 : 1 << (a.bits - 1)),
        levels(float(a.zero.data ? (1 << a.bits) - 1 : (1 << (a.bits - 1)) - 1)),
        round(12582912.0f + float(offset)),
        symmetric(!a.zero.data) {}
};

struct Scratch {
  std::vector<float> low, high, zero, scale, inverse;
  std::vector<float> runs_zero, runs_inverse;  // the same, once per run of channels
  std::vector<uint8_t> codes;
  std::vector<uint8_t> out;  // what goes around the caches, see Sink
  Scratch(int64_t groups, int64_t height, int64_t width)
      : low(groups + kLanes),
        high(groups + kLanes),
        zero(groups + kLanes),
        scale(groups + kLanes),
        inverse(groups + kLanes),
        runs_zero(height * width / kRun),
        runs_inverse(height * width / kRun),
        codes(height * width),
        out(std::max<int64_t>(4, height) * width + 64) {}
};

// From the bounds of groups to what encodes them. Zero and scale are rounded outwards before they are
// used, so every value lies within the codes and the error is at most half a scale. Whole vectors are
// computed: all arrays have room for one more.
void fit(const Form& form, int64_t groups, const float* low, const float* high, float* zero, float* scale,
         float* inverse) {
  const F none = {};
  for (int64_t g = 0; g < groups; g += kLanes) {
    const F lowest = load<F>(low + g);
    const F base = form.symmetric ? none : floor_bf16(lowest);
    const F above = load<F>(high + g) - base;
    const F reach = form.symmetric ? largest(-lowest, above) : above;
    // Not smaller than 2^-100, so that its inverse is finite.
    const F step = ceil_bf16(largest(reach / form.levels, 0x1p-100f - none));
    store(zero + g, base);
    store(scale + g, reach > 0.0f ? step : none);
    store(inverse + g, reach > 0.0f ? 1.0f / step : none);
  }
}

// ---- Bounds

// The later pass over a piece, which is slower than memory, fetches what is to come into the second-level
// cache.
inline void prefetch(const void* p) { __builtin_prefetch(static_cast<const char*>(p) + kAhead, 0, 2); }

template <class T>
void bounds(const T* x, int64_t count, float& low, float& high) {
  low = high = widen(x[0]);
  for (int64_t i = 1; i < count; ++i) low = std::min(low, widen(x[i])), high = std::max(high, widen(x[i]));
}

template <bool one_run, class T>
inline Bounds bounds_of_pairs(const T* x, int64_t count) {
  Pairs v = load_pairs(x);
  Bounds of{least(v.even, v.odd), largest(v.even, v.odd)};
  for (int64_t i = kRun; !one_run && i < count; i += kRun) {
    v = load_pairs(x + i);
    of = {least(least(v.even, v.odd), of.low), largest(largest(v.even, v.odd), of.high)};
  }
  return of;
}

// Bounds of every channel over `rows` rows, `stride` elements apart; four rows share a pass over them.
// In pairs, the bounds of the even channels of a vector come before those of the odd ones.
template <bool pairs, class T>
void channel_bounds(const T* x, int64_t stride, int64_t rows, int64_t width, float* low, float* high) {
  std::fill(low, low + width, std::numeric_limits<float>::infinity());
  std::fill(high, high + width, -std::numeric_limits<float>::infinity());
  for (int64_t r = 0; r < rows; r += 4) {
    const int64_t together = std::min<int64_t>(4, rows - r);
    if (pairs) {
      for (int64_t i = 0; i < width; i += 2 * kLanes) {
        Pairs lo{load<F>(low + i), load<F>(low + i + kLanes)}, hi{load<F>(high + i), load<F>(high + i + kLanes)};
        for (int64_t m = 0; m < together; ++m) {
          const Pairs v = load_pairs(x + (r + m) * stride + i);
          lo = {least(v.even, lo.even), least(v.odd, lo.odd)};
          hi = {largest(v.even, hi.even), largest(v.odd, hi.odd)};
        }
        store(low + i, lo.even), store(low + i + kLanes, lo.odd);
        store(high + i, hi.even), store(high + i + kLanes, hi.odd);
      }
    } else {
      for (int64_t m = 0; m < together; ++m) {
        const T* row = x + (r + m) * stride;
        for (int64_t i = 0; i < width; ++i)
          low[i] = std::min(low[i], widen(row[i])), high[i] = std::max(high[i], widen(row[i]));
      }
    }
  }
}

// ---- Codes

// A factor that some channels share, one for each run of them, or one for each channel (in pairs: even ones
// first).
struct Shared {
  float value;
  Pairs pairs(int64_t) const { return {value - F{}, value - F{}}; }
  float operator[](int64_t) const { return value; }
};
struct PerRun {
  const float* values;
  Pairs pairs(int64_t i) const { return {values[i / kRun] - F{}, values[i / kRun] - F{}}; }
};
struct Each {
  const float* values;
  Pairs pairs(int64_t i) const { return {load<F>(values + i), load<F>(values + i + kLanes)}; }
  float operator[](int64_t i) const { return values[i]; }
};

template <class T, class Factor>
void encode(const T* x, int64_t count, Factor zero, Factor inverse, const Form& form, uint8_t* codes) {
  const uint32_t mask = (1u << form.bits) - 1;  // what NaN leaves must not reach its neighbours
  for (int64_t i = 0; i < count; ++i)
    codes[i] = uint8_t(bits_of((widen(x[i]) - zero[i]) * inverse[i] + form.round) & mask);
}

// Codes of a run: neighbours meet in a lane.
template <int bits, class T, class Factor>
inline U encoded(const T* x, int64_t i, Factor zero, Factor inverse, float round) {
  constexpr uint32_t mask = (1u << bits) - 1;
  const Pairs v = load_pairs(x + i), z = zero.pairs(i), f = inverse.pairs(i);
  prefetch(x + i);
  const U even = (U)((v.even - z.even) * f.even + round), odd = (U)((v.odd - z.odd) * f.odd + round);
  return (even & mask) | (odd << bits & mask << bits);
}

// Packed codes, four runs at a time.
template <int bits, class T, class Factor>
void encode_pairs(const T* x, int64_t count, Factor zero, Factor inverse, float round, uint8_t* out) {
  int64_t i = 0;
  for (; i + 4 * kRun <= count; i += 4 * kRun)
    narrow_four<bits>(out + i * bits / 8, encoded<bits>(x, i, zero, inverse, round),
                      encoded<bits>(x, i + kRun, zero, inverse, round),
                      encoded<bits>(x, i + 2 * kRun, zero, inverse, round),
                      encoded<bits>(x, i + 3 * kRun, zero, inverse, round));
  if (i == count) return;
  U last[4] = {};
  for (int64_t j = i; j < count; j += kRun) last[(j - i) / kRun] = encoded<bits>(x, j, zero, inverse, round);
  uint8_t four[4 * kRun];
  narrow_four<bits>(four, last[0], last[1], last[2], last[3]);
  std::memcpy(out + i * bits / 8, four, size_t((count - i) * bits / 8));
}

template <class T, class Factor>
void decode(const uint8_t* codes, int64_t count, Factor zero, Factor scale, int offset, T* x) {
  for (int64_t i = 0; i < count; ++i) narrow(float(int(codes[i]) - offset) * scale[i] + zero[i], x[i]);
}

template <int bits, class T, class Factor>
void decode_pairs(const uint8_t* codes, int64_t count, Factor zero, Factor scale, int offset, T* x) {
  for (int64_t i = 0; i < count; i += 2 * kLanes) {
    const U both = widened<bits>(codes + i * bits / 8);
    const I even = (I)(both & ((1u << bits) - 1)) - offset, odd = (I)(both >> bits) - offset;
    const Pairs z = zero.pairs(i), f = scale.pairs(i);
    store_pairs(x + i, {__builtin_convertvector(even, F) * f.even + z.even,
                        __builtin_convertvector(odd, F) * f.odd + z.odd});
  }
}

// Neighbouring channels share a byte, the first in its low bits. (Little-endian loads.)
void pack(int bits, const uint8_t* codes, int64_t width, uint8_t* out) {
  int64_t i = 0;
  if (bits == 8) {
    std::memcpy(out, codes, size_t(width));
  } else if (bits == 4) {
    for (; i + kBytes <= width; i += kBytes) {
      const Words two = load<Words>(codes + i);
      words_to_bytes(out + i / 2, two | two >> 4);
    }
    for (; i < width; i += 2) out[i / 2] = uint8_t(codes[i] | codes[i + 1] << 4);
  } else {
    for (; i < width; i += 4)
      out[i / 4] = uint8_t(codes[i] | codes[i + 1] << 2 | codes[i + 2] << 4 | codes[i + 3] << 6);
  }
}

// The codes of a row, one byte each: in place, or unpacked into `codes`.
const uint8_t* unpack(int bits, const uint8_t* packed, int64_t width, uint8_t* codes) {
  int64_t i = 0;
  if (bits == 8) return packed;
  if (bits == 4) {
    for (; i + kBytes <= width; i += kBytes) {
      const Words b = words_from_bytes(packed + i / 2);
      store(codes + i, (b | b << 4) & 0x0f0f);
    }
    for (; i < width; ++i) codes[i] = packed[i / 2] >> i % 2 * 4 & 15;
  } else {
    for (; i < width; ++i) codes[i] = packed[i / 4] >> i % 4 * 2 & 3;
  }
  return codes;
}

// Every value `times` times.
void repeat(const float* values, int64_t count, int64_t times, float* out) {
  for (int64_t i = 0; i < count; ++i, out += times) std::fill(out, out + times, values[i]);
}

void store_bf16(const float* __restrict values, int64_t count, uint16_t* __restrict out) {
  for (int64_t i = 0; i < count; ++i) out[i] = uint16_t(bits_of(values[i]) >> 16);  // exact, by construction
}

void load_bf16(const uint16_t* __restrict from, int64_t count, float* __restrict out) {
  for (int64_t i = 0; i < count; ++i) out[i] = widen(from[i]);
}

template <class T>
inline T* row_of(const Plane& p, int64_t o, int64_t r) {
  return static_cast<T*>(p.data) + o * p.outer_stride + r * p.row_stride;
}

// Where results are too large for the caches they pass through scratch, a row or a piece at a time, and
// go around them: otherwise each line would be read before it is written.
class Sink {
 public:
  // `run`: bytes that are written together; `step`, `outer_step`: bytes between them.
  Sink(const QuantizeArgs& a, Scratch& s, const void* to, int64_t run, int64_t step, int64_t outer_step) {
    staged_ = reinterpret_cast<void*>((reinterpret_cast<uintptr_t>(s.out.data()) + 63) / 64 * 64);
    around_ = kPossible && a.outer * a.rows * a.width * 2 > kStreamBytes && run % 64 == 0 && step % 64 == 0 &&
              outer_step % 64 == 0 && reinterpret_cast<uintptr_t>(to) % 64 == 0;
  }
  bool around() const { return around_; }
  template <class T>
  T* begin(T* target) {
    return around_ ? static_cast<T*>(staged_) : target;
  }
  void end(void* target, int64_t bytes) {
    if (!around_) return;
#if WINNOW_ISA_avx512 || WINNOW_ISA_avx2
    const char* from = static_cast<const char*>(staged_);
    char* to = static_cast<char*>(target);
    if (bytes % 64) {  // the last, shorter piece
      std::memcpy(to, from, size_t(bytes));
      return;
    }
    for (int64_t i = 0; i < bytes; i += 32)
      _mm256_stream_si256(reinterpret_cast<__m256i*>(to + i),
                          _mm256_load_si256(reinterpret_cast<const __m256i*>(from + i)));
#else
    (void)target, (void)bytes;
#endif
  }
#if WINNOW_ISA_avx512 || WINNOW_ISA_avx2
  static constexpr bool kPossible = true;
  static void settle() { _mm_sfence(); }  // before other threads may read what went around the caches
#else
  static constexpr bool kPossible = false;
  static void settle() {}
#endif

 private:
  bool around_;
  void* staged_;
};

template <class T>
Sink sink_of_values(const QuantizeArgs& a, Scratch& s) {
  const int64_t size = sizeof(T);
  return Sink(a, s, a.x.data, a.width * size, a.x.row_stride * size, a.x.outer_stride * size);
}

// Even channels of each vector before the odd ones, as pairs want their factors.
void split(const float* from, int64_t count, float* to) {
  const Lanes lanes;
  for (int64_t i = 0; i < count; i += 2 * kLanes) {
    const F a = load<F>(from + i), b = load<F>(from + i + kLanes);
    store(to + i, shuffle(a, b, lanes.even)), store(to + i + kLanes, shuffle(a, b, lanes.odd));
  }
}
void join(const float* from, int64_t count, float* to) {
  const Lanes lanes;
  for (int64_t i = 0; i < count; i += 2 * kLanes) {
    const F even = load<F>(from + i), odd = load<F>(from + i + kLanes);
    store(to + i, shuffle(even, odd, lanes.low)), store(to + i + kLanes, shuffle(even, odd, lanes.high));
  }
}

// ---- Rows first..last - 1 of one outer index. `bits` is 0 where values go one at a time.

struct Rows {
  int64_t outer, first, last;
};

// Where the packed codes of a piece go: straight to their place, or through scratch as one block.
class Codes {
 public:
  Codes(const QuantizeArgs& a, Scratch& s, Rows p)
      : row_bytes_(a.width * a.bits / 8),
        rows_(p.last - p.first),
        target_(row_of<uint8_t>(a.codes, p.outer, p.first)),
        sink_(a, s, a.codes.data, (a.by_channel ? a.group : kTile) * row_bytes_,
              a.codes.row_stride == row_bytes_ ? 64 : 1, a.codes.outer_stride),
        base_(sink_.begin(target_)),
        stride_(sink_.around() ? row_bytes_ : a.codes.row_stride) {}
  ~Codes() { sink_.end(target_, rows_ * row_bytes_); }
  uint8_t* row(int64_t i) const { return base_ + i * stride_; }

 private:
  int64_t row_bytes_, rows_;
  uint8_t* target_;
  Sink sink_;
  uint8_t* base_;
  int64_t stride_;
};

// `encode` leaves one byte per code; packed are they after all rows of a piece: reading bytes back just
// behind their stores would stall.
template <int bits>
void pack_rows(const QuantizeArgs& a, const Scratch& s, Rows p, const Codes& to) {
  if (bits != 0) return;
  for (int64_t i = 0; i < p.last - p.first; ++i) pack(a.bits, s.codes.data() + i * a.width, a.width, to.row(i));
}

template <class T>
void token_bounds_one_by_one(const QuantizeArgs& a, Scratch& s, Rows p) {
  int64_t g = 0;
  for (int64_t r = p.first; r < p.last; ++r) {
    const T* x = row_of<const T>(a.x, p.outer, r);
    for (int64_t c = 0; c < a.width; c += a.group, ++g) bounds(x + c, a.group, s.low[g], s.high[g]);
  }
}

template <bool one_run, class T>
void token_bounds_of_runs(const QuantizeArgs& a, Scratch& s, Rows p) {
  const T* at[kLanes];  // groups whose bounds are worked out together
  int64_t g = 0;
  const int64_t groups = (p.last - p.first) * (a.width / a.group);
  for (int64_t r = p.first; r < p.last; ++r) {
    const T* x = row_of<const T>(a.x, p.outer, r);
    for (int64_t c = 0; c < a.width; c += a.group) {
      at[g++ % kLanes] = x + c;
      if (g % kLanes != 0 && g < groups) continue;
      const int64_t first = (g - 1) / kLanes * kLanes;
      std::fill(at + (g - first), at + kLanes, x + c);
      const Bounds of = reduced<kLanes>([&](int i) { return bounds_of_pairs<one_run>(at[i], a.group); });
      store(&s.low[first], of.low), store(&s.high[first], of.high);
    }
  }
}

// The bounds of all groups of some rows, row by row.
template <int bits, class T>
void token_bounds(const QuantizeArgs& a, Scratch& s, Rows p) {
  if (bits == 0) return token_bounds_one_by_one<T>(a, s, p);
  if (a.group == kRun) return token_bounds_of_runs<true, T>(a, s, p);
  token_bounds_of_runs<false, T>(a, s, p);
}

// One row of factors after the other, or all at once where they lie so.
void store_factors(const Plane& to, const float* values, int64_t per_row, Rows p) {
  if (to.row_stride == per_row)
    return store_bf16(values, (p.last - p.first) * per_row, row_of<uint16_t>(to, p.outer, p.first));
  for (int64_t r = p.first; r < p.last; ++r, values += per_row)
    store_bf16(values, per_row, row_of<uint16_t>(to, p.outer, r));
}

template <int bits, class T>
void quantize_tokens(const QuantizeArgs& a, const Form& form, Scratch& s, Rows p) {
  const int64_t per_row = a.width / a.group;
  token_bounds<bits, T>(a, s, p);
  fit(form, (p.last - p.first) * per_row, s.low.data(), s.high.data(), s.zero.data(), s.scale.data(),
      s.inverse.data());
  store_factors(a.scale, s.scale.data(), per_row, p);
  if (a.zero.data) store_factors(a.zero, s.zero.data(), per_row, p);
  const Codes to(a, s, p);
  const float *zero = s.zero.data(), *inverse = s.inverse.data();
  const int64_t runs = a.group / kRun;  // 1, 2 or 3 are encoded with those of other groups, four at a time
  const bool together = bits != 0 && runs % 4;
  if (together && runs > 1) {
    repeat(zero, (p.last - p.first) * per_row, runs, s.runs_zero.data());
    repeat(inverse, (p.last - p.first) * per_row, runs, s.runs_inverse.data());
    zero = s.runs_zero.data(), inverse = s.runs_inverse.data();
  }
  for (int64_t r = p.first; r < p.last; ++r) {
    const T* x = row_of<const T>(a.x, p.outer, r);
    uint8_t* out = to.row(r - p.first);
    uint8_t* codes = s.codes.data() + (r - p.first) * a.width;
    if (together) {
      encode_pairs<bits ? bits : 8>(x, a.width, PerRun{zero}, PerRun{inverse}, form.round, out);
      zero += a.width / kRun, inverse += a.width / kRun;
      continue;
    }
    for (int64_t c = 0; c < a.width; c += a.group, ++zero, ++inverse) {
      const Shared z{*zero}, f{*inverse};
      if (bits == 0) encode(x + c, a.group, z, f, form, codes + c);
      if (bits != 0) encode_pairs<bits ? bits : 8>(x + c, a.group, z, f, form.round, out + c * bits / 8);
    }
  }
  pack_rows<bits>(a, s, p, to);
}

template <int bits, class T>
void quantize_channels(const QuantizeArgs& a, const Form& form, Scratch& s, Rows p) {
  channel_bounds<bits != 0>(row_of<const T>(a.x, p.outer, p.first), a.x.row_stride, p.last - p.first, a.width,
                            s.low.data(), s.high.data());
  fit(form, a.width, s.low.data(), s.high.data(), s.zero.data(), s.scale.data(), s.inverse.data());
  const float *scale = s.scale.data(), *zero = s.zero.data();
  if (bits != 0) {
    join(scale, a.width, s.low.data()), join(zero, a.width, s.high.data());
    scale = s.low.data(), zero = s.high.data();
  }
  store_bf16(scale, a.width, row_of<uint16_t>(a.scale, p.outer, p.first / a.group));
  if (a.zero.data) store_bf16(zero, a.width, row_of<uint16_t>(a.zero, p.outer, p.first / a.group));
  const Codes to(a, s, p);
  const Each z{s.zero.data()}, f{s.inverse.data()};
  for (int64_t r = p.first; r < p.last; ++r) {
    const T* x = row_of<const T>(a.x, p.outer, r);
    if (bits != 0) {
      encode_pairs<bits ? bits : 8>(x, a.width, z, f, form.round, to.row(r - p.first));
    } else {
      encode(x, a.width, z, f, form, s.codes.data() + (r - p.first) * a.width);
    }
  }
  pack_rows<bits>(a, s, p, to);
}

// The codes of a row as `decode` or `decode_pairs` wants them.
template <int bits>
const uint8_t* codes_of(const QuantizeArgs& a, Scratch& s, int64_t o, int64_t r) {
  const uint8_t* packed = row_of<const uint8_t>(a.codes, o, r);
  for (int64_t i = 0; i < a.width * a.bits / 8; i += 64) prefetch(packed + i);
  return bits == 0 ? unpack(a.bits, packed, a.width, s.codes.data()) : packed;
}

template <int bits, class T, class Factor>
void decode_run(const Form& form, const uint8_t* codes, int64_t at, int64_t count, Factor zero, Factor scale, T* x) {
  if (bits == 0) return decode(codes + at, count, zero, scale, form.offset, x);
  decode_pairs<bits ? bits : 8>(codes + at * bits / 8, count, zero, scale, form.offset, x);
}

template <int bits, class T>
void dequantize_tokens(const QuantizeArgs& a, const Form& form, Scratch& s, Rows p) {
  Sink sink = sink_of_values<T>(a, s);
  for (int64_t r = p.first; r < p.last; ++r) {
    const uint8_t* codes = codes_of<bits>(a, s, p.outer, r);
    const uint16_t* scale = row_of<const uint16_t>(a.scale, p.outer, r);
    const uint16_t* zero = a.zero.data ? row_of<const uint16_t>(a.zero, p.outer, r) : nullptr;
    T* target = row_of<T>(a.x, p.outer, r);
    T* out = sink.begin(target);
    for (int64_t c = 0, g = 0; c < a.width; c += a.group, ++g)
      decode_run<bits>(form, codes, c, a.group, Shared{zero ? widen(zero[g]) : 0.0f}, Shared{widen(scale[g])}, out + c);
    sink.end(target, a.width * int64_t(sizeof(T)));
  }
}

template <int bits, class T>
void dequantize_channels(const QuantizeArgs& a, const Form& form, Scratch& s, Rows p) {
  load_bf16(row_of<const uint16_t>(a.scale, p.outer, p.first / a.group), a.width, s.scale.data());
  std::fill(s.zero.begin(), s.zero.begin() + a.width, 0.0f);
  if (a.zero.data) load_bf16(row_of<const uint16_t>(a.zero, p.outer, p.first / a.group), a.width, s.zero.data());
  const float *scale = s.scale.data(), *zero = s.zero.data();
  if (bits != 0) {
    split(scale, a.width, s.low.data()), split(zero, a.width, s.high.data());
    scale = s.low.data(), zero = s.high.data();
  }
  Sink sink = sink_of_values<T>(a, s);
  for (int64_t r = p.first; r < p.last; ++r) {
    T* target = row_of<T>(a.x, p.outer, r);
    decode_run<bits>(form, codes_of<bits>(a, s, p.outer, r), 0, a.width, Each{zero}, Each{scale}, sink.begin(target));
    sink.end(target, a.width * int64_t(sizeof(T)));
  }
}

using Piece = void (*)(const QuantizeArgs&, const Form&, Scratch&, Rows);

void in_pieces(const QuantizeArgs& a, Piece piece) {
  const int64_t height = a.by_channel ? a.group : kTile;
  const int64_t per_outer = (a.rows + height - 1) / height, pieces = a.outer * per_outer;
  const int64_t groups = a.by_channel ? a.width : kTile * (a.width / a.group);
  const Form form(a);
#pragma omp parallel if (a.outer * a.rows * a.width >= kSerialElements)
  {
    Scratch scratch(groups, height, a.width);
#pragma omp for schedule(static) nowait
    for (int64_t i = 0; i < pieces; ++i) {
      const int64_t first = i % per_outer * height;
      piece(a, form, scratch, {i / per_outer, first, std::min(first + height, a.rows)});
    }
    Sink::settle();
  }
}

template <int bits>
Piece quantizer(const QuantizeArgs& a) {
  if (a.by_channel) return a.x_is_bf16 ? quantize_channels<bits, uint16_t> : quantize_channels<bits, float>;
  return a.x_is_bf16 ? quantize_tokens<bits, uint16_t> : quantize_tokens<bits, float>;
}

template <int bits>
Piece dequantizer(const QuantizeArgs& a) {
  if (a.by_channel) return a.x_is_bf16 ? dequantize_channels<bits, uint16_t> : dequantize_channels<bits, float>;
  return a.x_is_bf16 ? dequantize_tokens<bits, uint16_t> : dequantize_tokens<bits, float>;
}

bool takes_pairs(const QuantizeArgs& a) { return (a.by_channel ? a.width : a.group) % (2 * kLanes) == 0; }

void quantize(const QuantizeArgs& a) {
  const int bits = takes_pairs(a) ? a.bits : 0;
  in_pieces(a, bits == 8 ? quantizer<8>(a) : bits == 4 ? quantizer<4>(a) : bits == 2 ? quantizer<2>(a) : quantizer<0>(a));
}

void dequantize(const QuantizeArgs& a) {
  const int bits = takes_pairs(a) ? a.bits : 0;
  in_pieces(a, bits == 8   ? dequantizer<8>(a)
               : bits == 4 ? dequantizer<4>(a)
               : bits == 2 ? dequantizer<2>(a)
                           : dequantizer<0>(a));
}

}  // namespace

QuantizeKernels quantize_kernels() { return {quantize, dequantize}; }

}  // namespace WINNOW_ISA
}  // namespace winnow
