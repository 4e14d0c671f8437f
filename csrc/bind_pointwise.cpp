#include <nanobind/nanobind.h>

#include "dispatch.h"

namespace nb = nanobind;

namespace winnow {
namespace {

template <class T>
T* at(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

void norm(int type, uintptr_t x, uintptr_t delta, uintptr_t weight, uintptr_t out, int64_t rows, int64_t width,
          float eps) {
  table().pointwise.norm(
      {at<void>(x), at<const void>(delta), at<const void>(weight), at<void>(out), rows, width, eps, Dtype(type)});
}

void rotate(int type, uintptr_t heads, uintptr_t cos, uintptr_t sin, uintptr_t q_weight, uintptr_t k_weight,
            int64_t rows, int64_t row_stride, int64_t query_heads, int64_t key_heads, int64_t depth, float eps) {
  table().pointwise.rotate({at<void>(heads), at<const float>(cos), at<const float>(sin), at<const void>(q_weight),
                            at<const void>(k_weight), rows, row_stride, query_heads, key_heads, depth, eps,
                            Dtype(type)});
}

void silu(int type, uintptr_t gate_up, uintptr_t out, int64_t rows, int64_t width) {
  table().pointwise.silu({at<const void>(gate_up), at<void>(out), rows, width, Dtype(type)});
}

}  // namespace

void bind_pointwise(nb::module_& m) {
  m.def("norm", &norm, nb::call_guard<nb::gil_scoped_release>());
  m.def("rotate", &rotate, nb::call_guard<nb::gil_scoped_release>());
  m.def("silu", &silu, nb::call_guard<nb::gil_scoped_release>());
}

}  // namespace winnow
