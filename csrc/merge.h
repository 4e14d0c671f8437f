// Merging of attention over disjoint sets of entries. See src/winnow/kernels/merge/__init__.py.
#pragma once
#include <cstdint>
#include <vector>

namespace winnow {

struct MergePart {
  const void* out;   // [rows, dim] contiguous
  bool bf16;         // type of out; otherwise float32
  const float* lse;  // [rows] contiguous
};

struct MergeArgs {
  std::vector<MergePart> parts;
  int64_t rows, dim;
  float* out;  // [rows, dim]
  float* lse;  // [rows]
};

struct MergeKernels {
  void (*merge)(const MergeArgs&);
};

}  // namespace winnow
