// Which entries a decode step attended to, and for how long they had not been. See src/winnow/kernels/recurrence.
#pragma once
#include <cstdint>

namespace winnow {

struct RecurrenceArgs {
  const float* mass;  // [H, S]
  int64_t mass_head;  // strides count elements
  int32_t* active;    // [H, S] last step that attended to an entry
  int64_t active_head;
  int32_t* pause;  // [H, S] longest pause between two such steps
  int64_t pause_head;
  int64_t heads, entries;
  float least;  // mass from which a step attends to an entry
  int32_t step;
};

struct RecurrenceKernels {
  void (*recur)(const RecurrenceArgs&);
};

}  // namespace winnow
