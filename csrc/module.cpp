#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include "dispatch.h"

namespace nb = nanobind;

namespace winnow {
void bind_prefill(nb::module_& m);
void bind_mass(nb::module_& m);
void bind_decode(nb::module_& m);
void bind_matmul(nb::module_& m);
void bind_matvec(nb::module_& m);
void bind_key_scan(nb::module_& m);
void bind_top_k(nb::module_& m);
void bind_quantize(nb::module_& m);
void bind_pointwise(nb::module_& m);
void bind_nearest(nb::module_& m);
void bind_coded_decode(nb::module_& m);
void bind_merge(nb::module_& m);
void bind_recurrence(nb::module_& m);
}  // namespace winnow

NB_MODULE(_native, m) {
  m.def("available_isas", &winnow::available_isas);
  m.def("current_isa", &winnow::current_isa);
  m.def("force_isa", &winnow::force_isa);
  m.def("has_matrix_tiles", &winnow::has_matrix_tiles);
  winnow::bind_prefill(m);
  winnow::bind_mass(m);
  winnow::bind_decode(m);
  winnow::bind_matmul(m);
  winnow::bind_matvec(m);
  winnow::bind_key_scan(m);
  winnow::bind_top_k(m);
  winnow::bind_quantize(m);
  winnow::bind_pointwise(m);
  winnow::bind_nearest(m);
  winnow::bind_coded_decode(m);
  winnow::bind_merge(m);
  winnow::bind_recurrence(m);
}
