#include <nanobind/nanobind.h>

#include "dispatch.h"

namespace nb = nanobind;

namespace winnow {

void bind_recurrence(nb::module_& m) {
  // Addresses are `tensor.data_ptr()`; strides count elements.
  m.def("recur", [](uintptr_t mass, int64_t mass_head, uintptr_t active, int64_t active_head, uintptr_t pause,
                    int64_t pause_head, int64_t heads, int64_t entries, float least, int32_t step) {
    RecurrenceArgs a;
    a.mass = reinterpret_cast<const float*>(mass);
    a.mass_head = mass_head;
    a.active = reinterpret_cast<int32_t*>(active);
    a.active_head = active_head;
    a.pause = reinterpret_cast<int32_t*>(pause);
    a.pause_head = pause_head;
    a.heads = heads;
    a.entries = entries;
    a.least = least;
    a.step = step;
    nb::gil_scoped_release release;
    table().recurrence.recur(a);
  });
}

}  // namespace winnow
