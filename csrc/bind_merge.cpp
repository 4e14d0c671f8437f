#include <nanobind/nanobind.h>

#include "dispatch.h"

namespace nb = nanobind;

namespace winnow {

void bind_merge(nb::module_& m) {
  // Parts as (address of out, whether it is bfloat16, address of lse).
  m.def("merge", [](const nb::list& parts, int64_t rows, int64_t dim, uintptr_t out, uintptr_t lse) {
    MergeArgs a{{}, rows, dim, reinterpret_cast<float*>(out), reinterpret_cast<float*>(lse)};
    for (nb::handle item : parts) {
      const auto part = nb::cast<nb::tuple>(item);
      a.parts.push_back({reinterpret_cast<const void*>(nb::cast<uintptr_t>(part[0])), nb::cast<bool>(part[1]),
                         reinterpret_cast<const float*>(nb::cast<uintptr_t>(part[2]))});
    }
    nb::gil_scoped_release release;
    table().merge.merge(a);
  });
}

}  // namespace winnow
