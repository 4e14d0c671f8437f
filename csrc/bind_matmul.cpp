#include <nanobind/nanobind.h>

#include "dispatch.h"

namespace nb = nanobind;

namespace winnow {

void bind_matmul(nb::module_& m) {
  // Addresses are `tensor.data_ptr()`, 0 for no bias; strides count elements.
  m.def("matmul", [](bool gated, int type, uintptr_t x, int64_t x_stride, uintptr_t w, int64_t w_stride,
                     uintptr_t bias, uintptr_t out, int64_t out_stride, int64_t rows, int64_t outer, int64_t inner) {
    const MatmulArgs args{reinterpret_cast<const void*>(x),
                          reinterpret_cast<const void*>(w),
                          reinterpret_cast<const void*>(bias),
                          reinterpret_cast<void*>(out),
                          x_stride,
                          w_stride,
                          out_stride,
                          rows,
                          outer,
                          inner,
                          static_cast<Dtype>(type)};
    nb::gil_scoped_release release;
    (gated ? table().matmul.gated : table().matmul.matmul)(args);
  });
  m.def(
      "multiply_peak", [](int64_t times) { return table().matmul.peak(times); },
      nb::call_guard<nb::gil_scoped_release>());
}

}  // namespace winnow
