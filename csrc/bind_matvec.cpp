#include <nanobind/nanobind.h>

#include "dispatch.h"

namespace nb = nanobind;

namespace winnow {

void bind_matvec(nb::module_&) {}

}  // namespace winnow
