#include <nanobind/nanobind.h>

#include "dispatch.h"

namespace nb = nanobind;

namespace winnow {
namespace {

// A table as Python passes it: (address, outer stride, row stride), the address 0 where it is absent.
Plane plane(nb::handle h) {
  const auto t = nb::cast<nb::tuple>(h);
  return {reinterpret_cast<void*>(nb::cast<uintptr_t>(t[0])), nb::cast<int64_t>(t[1]), nb::cast<int64_t>(t[2])};
}

}  // namespace

void bind_coded_decode(nb::module_& m) {
  // Planes in the order of CodedArgs; addresses are `tensor.data_ptr()`, strides count elements.
  m.def("coded_decode", [](uintptr_t q, bool bf16, int64_t heads, int64_t group, int64_t dim, int bits, int64_t rank,
                           int64_t values, const nb::tuple& planes, bool k_by_entry, bool k_by_batch, uintptr_t lengths,
                           int64_t capacity, int64_t position, int64_t start, int64_t window, uintptr_t positions,
                           int64_t positions_head, float scale, uintptr_t out, uintptr_t lse) {
    const CodedArgs a{reinterpret_cast<const void*>(q),
                      bf16,
                      heads,
                      group,
                      dim,
                      bits,
                      rank,
                      values,
                      plane(planes[0]),
                      plane(planes[1]),
                      plane(planes[2]),
                      plane(planes[3]),
                      plane(planes[4]),
                      plane(planes[5]),
                      plane(planes[6]),
                      plane(planes[7]),
                      plane(planes[8]),
                      plane(planes[9]),
                      plane(planes[10]),
                      plane(planes[11]),
                      plane(planes[12]),
                      plane(planes[13]),
                      plane(planes[14]),
                      plane(planes[15]),
                      k_by_entry,
                      k_by_batch,
                      reinterpret_cast<const int32_t*>(lengths),
                      capacity,
                      position,
                      start,
                      window,
                      reinterpret_cast<const int32_t*>(positions),
                      positions_head,
                      scale,
                      reinterpret_cast<void*>(out),
                      reinterpret_cast<float*>(lse)};
    nb::gil_scoped_release release;
    return table().coded.decode(a);
  });
}

}  // namespace winnow
