// Plain loops that the compiler vectorises; arithmetic is in float32 and rounds once, at the end.
#include "pointwise.h"

#include <cmath>
#include <cstring>

namespace winnow {
namespace WINNOW_ISA {
namespace {

constexpr int64_t kSerialElements = 1 << 15;  // below this, waking a second thread costs more than it gives

struct Bf16 {
  uint16_t bits;
};

inline float widen(float x) { return x; }
inline float widen(Bf16 x) {
  const uint32_t word = uint32_t(x.bits) << 16;
  float wide;
  std::memcpy(&wide, &word, 4);
  return wide;
}

inline void narrow(float x, float& to) { to = x; }
// To nearest, ties to even; NaN stays NaN.
inline void narrow(float x, Bf16& to) {
  uint32_t word;
  std::memcpy(&word, &x, 4);
  const uint32_t rounded = (word + 0x7fff + ((word >> 16) & 1)) >> 16;
  const uint32_t quiet = (word >> 16) | 0x40;
  to.bits = uint16_t((word & 0x7fffffff) > 0x7f800000 ? quiet : rounded);
}

// exp by 2^n times the Taylor series on |r| <= ln 2 / 2; about 2e-7 relative. Inputs beyond the range of
// float32 are clamped, so that the result is 0 or large, never NaN.
inline float exponential(float x) {
  x = x < -87.f ? -87.f : (x > 88.f ? 88.f : x);
  constexpr float kRound = 12582912.f;  // 1.5 * 2^23: adding it leaves the nearest integer in the low bits
  const float n = (x * 1.44269504f + kRound) - kRound;
  const float r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  const float p =
      1.f + r * (1.f + r * (0.5f + r * (1.f / 6 + r * (1.f / 24 + r * (1.f / 120 + r * (1.f / 720))))));
  const int32_t word = (int32_t(n) + 127) << 23;
  float scale;
  std::memcpy(&scale, &word, 4);
  return p * scale;
}

template <class T>
inline float inverse_rms(const T* x, int64_t width, float eps) {
  float sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < width; ++i) {
    const float value = widen(x[i]);
    sum += value * value;
  }
  return 1.f / std::sqrt(sum / float(width) + eps);
}

template <class T>
void norm_rows(const NormArgs& a) {
  const T* weight = static_cast<const T*>(a.weight);
#pragma omp parallel for schedule(static) if (a.rows * a.width > kSerialElements)
  for (int64_t row = 0; row < a.rows; ++row) {
    T* x = static_cast<T*>(a.x) + row * a.width;
    T* out = static_cast<T*>(a.out) + row * a.width;
    if (a.delta) {
      const T* delta = static_cast<const T*>(a.delta) + row * a.width;
#pragma omp simd
      for (int64_t i = 0; i < a.width; ++i) narrow(widen(x[i]) + widen(delta[i]), x[i]);
    }
    const float factor = inverse_rms(x, a.width, a.eps);
#pragma omp simd
    for (int64_t i = 0; i < a.width; ++i) narrow(widen(x[i]) * factor * widen(weight[i]), out[i]);
  }
}

template <class T>
void rotate_rows(const RotateArgs& a) {
  const int64_t half = a.depth / 2;
#pragma omp parallel for schedule(static) if (a.rows * a.row_stride > kSerialElements)
  for (int64_t row = 0; row < a.rows; ++row) {
    const float* cos = a.cos + row * half;
    const float* sin = a.sin + row * half;
    for (int64_t h = 0; h < a.query_heads + a.key_heads; ++h) {
      T* low = static_cast<T*>(a.heads) + row * a.row_stride + h * a.depth;
      T* high = low + half;
      const T* weight = static_cast<const T*>(h < a.query_heads ? a.q_weight : a.k_weight);
      if (weight) {
        const float factor = inverse_rms(low, a.depth, a.eps);
#pragma omp simd
        for (int64_t i = 0; i < a.depth; ++i) narrow(widen(low[i]) * factor * widen(weight[i]), low[i]);
      }
#pragma omp simd
      for (int64_t i = 0; i < half; ++i) {
        const float x = widen(low[i]), y = widen(high[i]);
        narrow(x * cos[i] - y * sin[i], low[i]);
        narrow(y * cos[i] + x * sin[i], high[i]);
      }
    }
  }
}

template <class T>
void silu_rows(const SiluArgs& a) {
#pragma omp parallel for schedule(static) if (a.rows * a.width > kSerialElements)
  for (int64_t row = 0; row < a.rows; ++row) {
    const T* gate = static_cast<const T*>(a.gate_up) + row * 2 * a.width;
    const T* up = gate + a.width;
    T* out = static_cast<T*>(a.out) + row * a.width;
#pragma omp simd
    for (int64_t i = 0; i < a.width; ++i) {
      const float x = widen(gate[i]);
      narrow(x / (1.f + exponential(-x)) * widen(up[i]), out[i]);
    }
  }
}

void norm(const NormArgs& a) { a.type == Dtype::f32 ? norm_rows<float>(a) : norm_rows<Bf16>(a); }
void rotate(const RotateArgs& a) { a.type == Dtype::f32 ? rotate_rows<float>(a) : rotate_rows<Bf16>(a); }
void silu(const SiluArgs& a) { a.type == Dtype::f32 ? silu_rows<float>(a) : silu_rows<Bf16>(a); }

}  // namespace

PointwiseKernels pointwise_kernels() { return {norm, rotate, silu}; }

}  // namespace WINNOW_ISA
}  // namespace winnow
