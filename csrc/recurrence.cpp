// A step attends to few of the entries: blocks in which it attends to none are only looked at.
#include "recurrence.h"

#include <omp.h>

#include <algorithm>

namespace winnow {
namespace WINNOW_ISA {
namespace {

constexpr int64_t BLOCK = 64;            // entries
constexpr int64_t ONE_THREAD = 1 << 15;  // entries below which waking a thread does not pay

void recur_head(const RecurrenceArgs& a, int64_t h) {
  const float* mass = a.mass + h * a.mass_head;
  int32_t *active = a.active + h * a.active_head, *pause = a.pause + h * a.pause_head;
  for (int64_t first = 0; first < a.entries; first += BLOCK) {
    const int64_t last = std::min(first + BLOCK, a.entries);
    int any = 0;
#pragma omp simd reduction(| : any)
    for (int64_t e = first; e < last; ++e) any |= mass[e] >= a.least;
    if (!any) continue;
#pragma omp simd
    for (int64_t e = first; e < last; ++e) {
      const bool now = mass[e] >= a.least;
      pause[e] = now ? std::max(pause[e], a.step - active[e]) : pause[e];
      active[e] = now ? a.step : active[e];
    }
  }
}

void recur(const RecurrenceArgs& a) {
  if (a.heads * a.entries < ONE_THREAD || omp_get_max_threads() == 1) {
    for (int64_t h = 0; h < a.heads; ++h) recur_head(a, h);
    return;
  }
#pragma omp parallel for schedule(dynamic, 1)
  for (int64_t h = 0; h < a.heads; ++h) recur_head(a, h);
}

}  // namespace

RecurrenceKernels recurrence_kernels() { return {recur}; }

}  // namespace WINNOW_ISA
}  // namespace winnow
