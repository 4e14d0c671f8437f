// Work goes in pieces of a few rows that stay in the first-level cache: bounds, then what encodes them,
// then codes of one byte each, then packing; and back. Vectors are GCC/Clang vector extensions, one
// source for every instruction set. All sets give bit for bit the reference's result: the arithmetic is
// single IEEE operations in a fixed order, which contraction to fused ones would change.
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

constexpr int64_t kTile = 16;                // rows whose scales are worked out together
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

// To bfloat16, downwards and away from zero.
inline float floor_bf16(float f) {
  const uint32_t b = bits_of(f);
  return float_of((b + (b >> 31) * 0xffffu) & 0xffff0000u);
}
inline float outward_bf16(float f) { return float_of((bits_of(f) + 0xffffu) & 0xffff0000u); }

// A value is (code - offset) * scale + zero; the symmetric form has no zero, the other no offset.
struct Form {
  int bits, offset;
  float levels;  // largest code of the asymmetric form, largest magnitude of the symmetric one
  bool symmetric;
  explicit Form(const QuantizeArgs& a)
      : bits(a.bits),
        offset(a.zero.data ? 0 : 1 << (a.bits - 1)),
        levels(float(a.zero.data ? (1 << a.bits) - 1 : (1 << (a.bits - 1)) - 1)),
        symmetric(!a.zero.data) {}
};

struct Scratch {
  std::vector<float> low, high, zero, scale, inverse;
  std::vector<uint8_t> codes;
  std::vector<uint8_t> row;
  Scratch(int64_t groups, int64_t height, int64_t width)
      : low(groups),
        high(groups),
        zero(groups),
        scale(groups),
        inverse(groups),
        codes(height * width),
        row(width * 4 + 64) {}
};

// From the bounds of groups to what encodes them. Zero and scale are rounded outwards before they are
// used, so every value lies within the codes and the error is at most half a scale.
void fit(const Form& form, int64_t groups, const float* __restrict low, const float* __restrict high,
         float* __restrict zero, float* __restrict scale, float* __restrict inverse) {
  for (int64_t g = 0; g < groups; ++g) {
    const float base = form.symmetric ? 0.0f : floor_bf16(low[g]);
    const float below = -low[g], above = high[g] - base;
    const float reach = form.symmetric && below > above ? below : above;
    // Not smaller than 2^-100, so that its inverse is finite.
    const float step = reach / form.levels, least = step > 0x1p-100f ? step : 0x1p-100f;
    zero[g] = base;
    scale[g] = reach > 0.0f ? outward_bf16(least) : 0.0f;
    inverse[g] = reach > 0.0f ? 1.0f / scale[g] : 0.0f;
  }
}

template <class T>
void bounds(const T* x, int64_t count, float& low, float& high) {
  low = high = widen(x[0]);
  int64_t i = 0;
  if (count >= kLanes) {
    F lo = widened(x), hi = lo;
    for (i = kLanes; i + kLanes <= count; i += kLanes) {
      const F v = widened(x + i);
      lo = least(v, lo), hi = largest(v, hi);
    }
#if WINNOW_ISA_avx512
    low = _mm512_reduce_min_ps(lo), high = _mm512_reduce_max_ps(hi);
#else
    for (int lane = 0; lane < kLanes; ++lane) low = std::min(low, lo[lane]), high = std::max(high, hi[lane]);
#endif
  }
  for (; i < count; ++i) low = std::min(low, widen(x[i])), high = std::max(high, widen(x[i]));
}

// Bounds of every channel over `rows` rows, `stride` elements apart; four rows share a pass over them.
template <class T>
void channel_bounds(const T* x, int64_t stride, int64_t rows, int64_t width, float* low, float* high) {
  for (int64_t i = 0; i < width; ++i) low[i] = high[i] = widen(x[i]);
  for (int64_t r = 0; r < rows; r += 4) {
    const int64_t together = std::min<int64_t>(4, rows - r);
    int64_t i = 0;
    for (; i + kLanes <= width; i += kLanes) {
      F lo = load<F>(low + i), hi = load<F>(high + i);
      for (int64_t m = 0; m < together; ++m) {
        const F v = widened(x + (r + m) * stride + i);
        lo = least(v, lo), hi = largest(v, hi);
      }
      store(low + i, lo), store(high + i, hi);
    }
    for (; i < width; ++i) {
      for (int64_t m = 0; m < together; ++m) {
        const float v = widen(x[(r + m) * stride + i]);
        low[i] = std::min(low[i], v), high[i] = std::max(high[i], v);
      }
    }
  }
}

// A factor that a run of channels shares, or one for each channel.
struct Shared {
  float value;
  F vector(int64_t) const { return value - F{}; }
  float operator[](int64_t) const { return value; }
};
struct Each {
  const float* values;
  F vector(int64_t i) const { return load<F>(values + i); }
  float operator[](int64_t i) const { return values[i]; }
};

// Adding 1.5 * 2^23 leaves a value, rounded to the nearest even integer, in the low bits.
constexpr float kRound = 12582912.0f;

template <class T, class Factor>
void encode(const T* x, int64_t count, Factor zero, Factor inverse, int offset, uint8_t* codes) {
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) {
    const F value = (widened(x + i) - zero.vector(i)) * inverse.vector(i) + kRound;
    to_bytes(codes + i, (U)value + uint32_t(offset));
  }
  for (; i < count; ++i)
    codes[i] = uint8_t(bits_of((widen(x[i]) - zero[i]) * inverse[i] + kRound) + uint32_t(offset));
}

template <class T, class Factor>
void decode(const uint8_t* codes, int64_t count, Factor zero, Factor scale, int offset, T* x) {
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) {
    const I code = (I)from_bytes(codes + i) - offset;
    store_narrowed(x + i, __builtin_convertvector(code, F) * scale.vector(i) + zero.vector(i));
  }
  for (; i < count; ++i) narrow(float(int(codes[i]) - offset) * scale[i] + zero[i], x[i]);
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
    for (; i + kBytes <= width; i += kBytes) {
      const U four = load<U>(codes + i);
      to_bytes(out + i / 4, four | four >> 6 | four >> 12 | four >> 18);
    }
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
    for (; i + kBytes <= width; i += kBytes) {
      const U b = from_bytes(packed + i / 4);
      store(codes + i, (b | b << 6 | b << 12 | b << 18) & 0x03030303u);
    }
    for (; i < width; ++i) codes[i] = packed[i / 4] >> i % 4 * 2 & 3;
  }
  return codes;
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

// ---- Rows first..last - 1 of one outer index.

// After all their codes: reading codes back just behind their narrower stores would stall.
void pack_rows(const QuantizeArgs& a, const Scratch& s, int64_t o, int64_t first, int64_t last) {
  for (int64_t r = first; r < last; ++r)
    pack(a.bits, s.codes.data() + (r - first) * a.width, a.width, row_of<uint8_t>(a.codes, o, r));
}

template <class T>
void quantize_tokens(const QuantizeArgs& a, const Form& form, Scratch& s, int64_t o, int64_t first, int64_t last) {
  const int64_t per_row = a.width / a.group;
  for (int64_t r = first, g = 0; r < last; ++r)
    for (int64_t c = 0; c < per_row; ++c, ++g)
      bounds(row_of<const T>(a.x, o, r) + c * a.group, a.group, s.low[g], s.high[g]);
  fit(form, (last - first) * per_row, s.low.data(), s.high.data(), s.zero.data(), s.scale.data(), s.inverse.data());
  uint8_t* codes = s.codes.data();
  for (int64_t r = first, g = 0; r < last; ++r) {
    store_bf16(&s.scale[g], per_row, row_of<uint16_t>(a.scale, o, r));
    if (a.zero.data) store_bf16(&s.zero[g], per_row, row_of<uint16_t>(a.zero, o, r));
    for (int64_t c = 0; c < per_row; ++c, ++g, codes += a.group)
      encode(row_of<const T>(a.x, o, r) + c * a.group, a.group, Shared{s.zero[g]}, Shared{s.inverse[g]},
             form.offset, codes);
  }
  pack_rows(a, s, o, first, last);
}

template <class T>
void quantize_channels(const QuantizeArgs& a, const Form& form, Scratch& s, int64_t o, int64_t first, int64_t last) {
  channel_bounds(row_of<const T>(a.x, o, first), a.x.row_stride, last - first, a.width, s.low.data(), s.high.data());
  fit(form, a.width, s.low.data(), s.high.data(), s.zero.data(), s.scale.data(), s.inverse.data());
  store_bf16(s.scale.data(), a.width, row_of<uint16_t>(a.scale, o, first / a.group));
  if (a.zero.data) store_bf16(s.zero.data(), a.width, row_of<uint16_t>(a.zero, o, first / a.group));
  for (int64_t r = first; r < last; ++r)
    encode(row_of<const T>(a.x, o, r), a.width, Each{s.zero.data()}, Each{s.inverse.data()}, form.offset,
           s.codes.data() + (r - first) * a.width);
  pack_rows(a, s, o, first, last);
}

// Where results go around the caches they pass through a row of scratch.
template <class T>
struct Sink {
  bool stream;
  T* staged;
  Sink(const QuantizeArgs& a, Scratch& s) {
    const uintptr_t at = reinterpret_cast<uintptr_t>(s.row.data());
    staged = reinterpret_cast<T*>((at + 63) / 64 * 64);
    const int64_t size = sizeof(T);
    stream = kBlock && a.outer * a.rows * a.width * size > kStreamBytes && a.width * size % 64 == 0 &&
             a.x.row_stride * size % 64 == 0 && a.x.outer_stride * size % 64 == 0 &&
             reinterpret_cast<uintptr_t>(a.x.data) % 64 == 0;
  }
  T* begin(T* target) { return stream ? staged : target; }
  void end(T* target, int64_t width) {
    if (!stream) return;
#if WINNOW_ISA_avx512
    for (int64_t i = 0; i < width * int64_t(sizeof(T)); i += 64)
      _mm512_stream_si512(reinterpret_cast<__m512i*>(reinterpret_cast<char*>(target) + i),
                          _mm512_load_si512(reinterpret_cast<const char*>(staged) + i));
#elif WINNOW_ISA_avx2
    for (int64_t i = 0; i < width * int64_t(sizeof(T)); i += 32)
      _mm256_stream_si256(reinterpret_cast<__m256i*>(reinterpret_cast<char*>(target) + i),
                          _mm256_load_si256(reinterpret_cast<const __m256i*>(reinterpret_cast<const char*>(staged) + i)));
#endif
  }
#if WINNOW_ISA_avx512 || WINNOW_ISA_avx2
  static constexpr bool kBlock = true;
  ~Sink() {
    if (stream) _mm_sfence();
  }
#else
  static constexpr bool kBlock = false;
#endif
};

template <class T>
void dequantize_tokens(const QuantizeArgs& a, const Form& form, Scratch& s, int64_t o, int64_t first, int64_t last) {
  const int64_t per_row = a.width / a.group;
  Sink<T> sink(a, s);
  for (int64_t r = first; r < last; ++r) {
    const uint8_t* codes = unpack(form.bits, row_of<const uint8_t>(a.codes, o, r), a.width, s.codes.data());
    const uint16_t* scale = row_of<const uint16_t>(a.scale, o, r);
    const uint16_t* zero = a.zero.data ? row_of<const uint16_t>(a.zero, o, r) : nullptr;
    T* target = row_of<T>(a.x, o, r);
    T* out = sink.begin(target);
    for (int64_t c = 0; c < per_row; ++c)
      decode(codes + c * a.group, a.group, Shared{zero ? widen(zero[c]) : 0.0f}, Shared{widen(scale[c])},
             form.offset, out + c * a.group);
    sink.end(target, a.width);
  }
}

template <class T>
void dequantize_channels(const QuantizeArgs& a, const Form& form, Scratch& s, int64_t o, int64_t first, int64_t last) {
  load_bf16(row_of<const uint16_t>(a.scale, o, first / a.group), a.width, s.scale.data());
  std::fill(s.zero.begin(), s.zero.begin() + a.width, 0.0f);
  if (a.zero.data) load_bf16(row_of<const uint16_t>(a.zero, o, first / a.group), a.width, s.zero.data());
  Sink<T> sink(a, s);
  for (int64_t r = first; r < last; ++r) {
    const uint8_t* codes = unpack(form.bits, row_of<const uint8_t>(a.codes, o, r), a.width, s.codes.data());
    T* target = row_of<T>(a.x, o, r);
    decode(codes, a.width, Each{s.zero.data()}, Each{s.scale.data()}, form.offset, sink.begin(target));
    sink.end(target, a.width);
  }
}

using Piece = void (*)(const QuantizeArgs&, const Form&, Scratch&, int64_t, int64_t, int64_t);

void in_pieces(const QuantizeArgs& a, Piece piece) {
  const int64_t height = a.by_channel ? a.group : kTile;
  const int64_t per_outer = (a.rows + height - 1) / height, pieces = a.outer * per_outer;
  const int64_t groups = a.by_channel ? a.width : kTile * (a.width / a.group);
  const Form form(a);
#pragma omp parallel if (a.outer * a.rows * a.width >= kSerialElements)
  {
    Scratch scratch(groups, height, a.width);
#pragma omp for schedule(static)
    for (int64_t i = 0; i < pieces; ++i) {
      const int64_t o = i / per_outer, first = i % per_outer * height;
      piece(a, form, scratch, o, first, std::min(first + height, a.rows));
    }
  }
}

void quantize(const QuantizeArgs& a) {
  if (a.x_is_bf16) return in_pieces(a, a.by_channel ? quantize_channels<uint16_t> : quantize_tokens<uint16_t>);
  in_pieces(a, a.by_channel ? quantize_channels<float> : quantize_tokens<float>);
}

void dequantize(const QuantizeArgs& a) {
  if (a.x_is_bf16) return in_pieces(a, a.by_channel ? dequantize_channels<uint16_t> : dequantize_tokens<uint16_t>);
  in_pieces(a, a.by_channel ? dequantize_channels<float> : dequantize_tokens<float>);
}

}  // namespace

QuantizeKernels quantize_kernels() { return {quantize, dequantize}; }

}  // namespace WINNOW_ISA
}  // namespace winnow
