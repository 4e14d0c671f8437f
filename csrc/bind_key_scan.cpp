#include <nanobind/nanobind.h>

#include "dispatch.h"

namespace nb = nanobind;

namespace winnow {
namespace {

KeyCodes make_codes(uintptr_t codes, int64_t codes_head, uintptr_t scales, int64_t scales_head, int64_t capacity,
                    int64_t heads, int64_t dim, int bits) {
  return {reinterpret_cast<uint8_t*>(codes), codes_head, reinterpret_cast<float*>(scales), scales_head, capacity,
          heads, dim, bits};
}

}  // namespace

void bind_key_scan(nb::module_& m) {
  // Addresses are `tensor.data_ptr()`; strides count elements.
  m.def("quantize_keys", [](uintptr_t codes, int64_t codes_head, uintptr_t scales, int64_t scales_head,
                            int64_t capacity, int64_t heads, int64_t dim, int bits, uintptr_t k, int64_t k_head,
                            int64_t k_row, int64_t k_capacity, bool bf16, uintptr_t begin, uintptr_t end) {
    QuantizeKeysArgs a;
    a.to = make_codes(codes, codes_head, scales, scales_head, capacity, heads, dim, bits);
    a.k = reinterpret_cast<const void*>(k);
    a.k_head = k_head;
    a.k_row = k_row;
    a.k_capacity = k_capacity;
    a.bf16 = bf16;
    a.begin = reinterpret_cast<const int32_t*>(begin);
    a.end = reinterpret_cast<const int32_t*>(end);
    nb::gil_scoped_release release;
    table().key_scan.quantize(a);
  });
  m.def("key_scan", [](uintptr_t codes, int64_t codes_head, uintptr_t scales, int64_t scales_head, int64_t capacity,
                       int64_t heads, int64_t dim, int bits, uintptr_t q, bool bf16, int64_t group,
                       uintptr_t lengths, int reduce, uintptr_t out, int64_t width) {
    KeyScanArgs a;
    a.from = make_codes(codes, codes_head, scales, scales_head, capacity, heads, dim, bits);
    a.q = reinterpret_cast<const void*>(q);
    a.bf16 = bf16;
    a.group = group;
    a.lengths = reinterpret_cast<const int32_t*>(lengths);
    a.reduce = static_cast<Reduce>(reduce);
    a.out = reinterpret_cast<float*>(out);
    a.width = width;
    nb::gil_scoped_release release;
    table().key_scan.scan(a);
  });
}

}  // namespace winnow
