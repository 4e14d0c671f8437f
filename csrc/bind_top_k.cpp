#include <nanobind/nanobind.h>

#include "dispatch.h"

namespace nb = nanobind;

namespace winnow {

void bind_top_k(nb::module_& m) {
  // Addresses are `tensor.data_ptr()`; strides count elements.
  m.def("top_k", [](uintptr_t scores, int64_t rows, int64_t row_stride, int64_t width, uintptr_t lengths, uintptr_t k,
                    uintptr_t indices, int64_t listed, uintptr_t counts) {
    TopKArgs a;
    a.scores = reinterpret_cast<const float*>(scores);
    a.rows = rows;
    a.row_stride = row_stride;
    a.width = width;
    a.lengths = reinterpret_cast<const int32_t*>(lengths);
    a.k = reinterpret_cast<const int32_t*>(k);
    a.indices = reinterpret_cast<int32_t*>(indices);
    a.listed = listed;
    a.counts = reinterpret_cast<int32_t*>(counts);
    nb::gil_scoped_release release;
    table().top_k.top_k(a);
  });
}

}  // namespace winnow
