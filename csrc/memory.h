// Scratch memory of the kernels: aligned to cache lines, and in large pages where that is cheap.
#pragma once
#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>

namespace winnow {
namespace WINNOW_ISA {

struct Free {
  void operator()(void* p) const { std::free(p); }
};
using Memory = std::unique_ptr<char[], Free>;

static inline int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

constexpr int64_t kLargePage = 2 << 20;

// Large memory that is about to be written: a page of 2 MiB costs one fault instead of 512, and fewer misses
// of the translation buffer. Only a hint, and only where the system lets programs choose.
static inline void prefer_large_pages(void* from, int64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  const int64_t begin = round_up(reinterpret_cast<int64_t>(from), kLargePage);
  const int64_t end = (reinterpret_cast<int64_t>(from) + bytes) / kLargePage * kLargePage;
  if (end > begin) madvise(reinterpret_cast<void*>(begin), static_cast<size_t>(end - begin), MADV_HUGEPAGE);
#else
  (void)from, (void)bytes;
#endif
}

static inline Memory allocate(int64_t bytes) {
  // Whole large pages, where at least half of the last one is needed.
  const int64_t unit = bytes % kLargePage >= kLargePage / 2 ? kLargePage : 64;
  const int64_t size = std::max<int64_t>(round_up(bytes, unit), 64);
  void* p = std::aligned_alloc(size >= kLargePage ? kLargePage : 64, static_cast<size_t>(size));
  if (p == nullptr) throw std::bad_alloc();
  prefer_large_pages(p, size);
  return Memory(static_cast<char*>(p));
}

}  // namespace WINNOW_ISA
}  // namespace winnow
