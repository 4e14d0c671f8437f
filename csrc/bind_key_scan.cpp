#include <nanobind/nanobind.h>

#include "dispatch.h"

namespace nb = nanobind;

namespace winnow {

void bind_key_scan(nb::module_&) {}

}  // namespace winnow
