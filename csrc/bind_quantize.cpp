#include <nanobind/nanobind.h>

#include "dispatch.h"

namespace nb = nanobind;

namespace winnow {
namespace {

// A plane as Python passes it: (address, outer stride, row stride).
Plane plane(const nb::tuple& t) {
  return {reinterpret_cast<void*>(nb::cast<uintptr_t>(t[0])), nb::cast<int64_t>(t[1]), nb::cast<int64_t>(t[2])};
}

template <bool encode>
void run(const nb::tuple& x, const nb::tuple& codes, const nb::tuple& scale, const nb::tuple& zero, int64_t outer,
         int64_t rows, int64_t width, int64_t group, int bits, bool by_channel, bool x_is_bf16) {
  const QuantizeArgs args{plane(x), plane(codes), plane(scale), plane(zero), outer,    rows,
                          width,    group,        bits,         by_channel,  x_is_bf16};
  nb::gil_scoped_release release;
  (encode ? table().quantize.quantize : table().quantize.dequantize)(args);
}

}  // namespace

void bind_quantize(nb::module_& m) {
  m.def("quantize", &run<true>);
  m.def("dequantize", &run<false>);
}

}  // namespace winnow
