#include <nanobind/nanobind.h>

#include "dispatch.h"

namespace nb = nanobind;

namespace winnow {

void bind_decode(nb::module_&) {}

}  // namespace winnow
