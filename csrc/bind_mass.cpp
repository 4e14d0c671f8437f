#include "bind_queries_and_entries.h"
#include "dispatch.h"

namespace nb = nanobind;

namespace winnow {
namespace {

void mass(const QueriesAndEntries& given, uintptr_t lse, int64_t lse_token, int64_t lse_head, uintptr_t mass,
          int64_t width) {
  MassArgs a{given};
  a.lse = at<const float>(lse), a.lse_token = lse_token, a.lse_head = lse_head;
  a.mass = at<float>(mass), a.width = width;
  nb::gil_scoped_release release;
  table().mass.mass(a);
}

}  // namespace

void bind_mass(nb::module_& m) {
  define(m, "mass", mass, nb::arg("lse"), nb::arg("lse_token"), nb::arg("lse_head"), nb::arg("mass"),
         nb::arg("width"));
}

}  // namespace winnow
