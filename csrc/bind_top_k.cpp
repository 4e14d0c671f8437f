#include <nanobind/nanobind.h>

#include "dispatch.h"

namespace nb = nanobind;

namespace winnow {

void bind_top_k(nb::module_&) {}

}  // namespace winnow
