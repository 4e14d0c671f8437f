#include <nanobind/nanobind.h>

#include "dispatch.h"

namespace nb = nanobind;

namespace winnow {

void bind_nearest(nb::module_& m) {
  // Addresses are `tensor.data_ptr()`; strides count elements.
  m.def("nearest", [](int dtype, uintptr_t x, int64_t stride, int64_t depth, uintptr_t rows, int64_t n_rows,
                      uintptr_t hosts, int64_t n_hosts, uintptr_t cosine, uintptr_t host) {
    NearestArgs a;
    a.dtype = static_cast<QueryDtype>(dtype);
    a.x = reinterpret_cast<const void*>(x);
    a.stride = stride;
    a.depth = depth;
    a.rows = reinterpret_cast<const int64_t*>(rows);
    a.n_rows = n_rows;
    a.hosts = reinterpret_cast<const int64_t*>(hosts);
    a.n_hosts = n_hosts;
    a.cosine = reinterpret_cast<float*>(cosine);
    a.host = reinterpret_cast<int64_t*>(host);
    nb::gil_scoped_release release;
    table().nearest.nearest(a);
  });
}

}  // namespace winnow
