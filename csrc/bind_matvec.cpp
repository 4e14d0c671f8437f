#include <nanobind/nanobind.h>

#include "dispatch.h"

namespace nb = nanobind;

namespace winnow {
namespace {

template <class T>
T* at(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

// Weights: 0 float32, 1 bfloat16, 2 int8 with scale and row sums.
void matvec(int w_type, int x_type, uintptr_t x, int64_t x_stride, uintptr_t w, int64_t w_stride, uintptr_t out,
            int64_t out_stride, int64_t rows, int64_t outer, int64_t inner, uintptr_t scale, uintptr_t row_sum) {
  const MatvecArgs args{at<const void>(x), at<const void>(w),  at<void>(out),       x_stride,
                        w_stride,          out_stride,         rows,                outer,
                        inner,             Dtype(x_type),      at<const float>(scale), at<const int32_t>(row_sum)};
  const MatvecKernels& kernels = table().matvec;
  (w_type == 0 ? kernels.f32 : w_type == 1 ? kernels.bf16 : kernels.int8)(args);
}

}  // namespace

void bind_matvec(nb::module_& m) {
  m.def("matvec", &matvec, nb::call_guard<nb::gil_scoped_release>());
  m.def(
      "read_sum", [](uintptr_t data, int64_t bytes) { return table().matvec.read_sum(at<const void>(data), bytes); },
      nb::call_guard<nb::gil_scoped_release>());
}

}  // namespace winnow
