// One pass over each row of every part; see merge.h.
#include "merge.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

namespace winnow {
namespace WINNOW_ISA {
namespace {

constexpr int64_t SERIAL_VALUES = 1 << 16;  // less than this is not worth waking a second thread

inline float widened(float x) { return x; }
inline float widened(uint16_t x) {
  const uint32_t bits = static_cast<uint32_t>(x) << 16;
  float out;
  std::memcpy(&out, &bits, 4);
  return out;
}

template <typename T>
void add(const void* from, int64_t row, int64_t dim, float weight, float* to) {
  const T* x = static_cast<const T*>(from) + row * dim;
  for (int64_t d = 0; d < dim; ++d) to[d] += weight * widened(x[d]);
}

void merge_row(const MergeArgs& a, int64_t row) {
  float top = -std::numeric_limits<float>::infinity(), total = 0.f;
  for (const MergePart& part : a.parts) top = std::max(top, part.lse[row]);
  float* out = a.out + row * a.dim;
  std::fill(out, out + a.dim, 0.f);
  a.lse[row] = top;
  if (top == -std::numeric_limits<float>::infinity()) return;  // saw nothing anywhere
  for (const MergePart& part : a.parts) total += std::exp(part.lse[row] - top);
  for (const MergePart& part : a.parts) {
    const float weight = std::exp(part.lse[row] - top) / total;
    if (part.bf16) {
      add<uint16_t>(part.out, row, a.dim, weight, out);
    } else {
      add<float>(part.out, row, a.dim, weight, out);
    }
  }
  a.lse[row] = top + std::log(total);
}

void merge(const MergeArgs& a) {
#pragma omp parallel for if (a.rows * a.dim >= SERIAL_VALUES)
  for (int64_t row = 0; row < a.rows; ++row) merge_row(a, row);
}

}  // namespace

MergeKernels merge_kernels() { return {merge}; }

}  // namespace WINNOW_ISA
}  // namespace winnow
