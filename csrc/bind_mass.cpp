#include <nanobind/nanobind.h>

#include "dispatch.h"

namespace nb = nanobind;

namespace winnow {
namespace {

template <class T>
T* at(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

}  // namespace

void bind_mass(nb::module_& m) {
  // Addresses and element strides, as MassArgs (csrc/mass.h) lists them.
  m.def(
      "mass",
      [](int dtype, int64_t tokens, int64_t kv_heads, int64_t group, int64_t depth, uintptr_t q, int64_t q_token,
         int64_t q_head, uintptr_t k, int64_t k_head, int64_t k_entry, uintptr_t lengths, uintptr_t query_positions,
         int64_t start, uintptr_t positions, int64_t positions_head, uintptr_t bias, int64_t bias_head, float scale,
         float softcap, int64_t sliding, uintptr_t lse, int64_t lse_token, int64_t lse_head, uintptr_t mass,
         int64_t width) {
        MassArgs a{};
        a.dtype = static_cast<PrefillDtype>(dtype);
        a.tokens = tokens, a.kv_heads = kv_heads, a.group = group, a.depth = depth;
        a.q = at<const void>(q), a.q_token = q_token, a.q_head = q_head;
        a.k = at<const void>(k), a.k_head = k_head, a.k_entry = k_entry;
        a.lengths = at<const int32_t>(lengths), a.query_positions = at<const int32_t>(query_positions);
        a.start = start, a.positions = at<const int32_t>(positions), a.positions_head = positions_head;
        a.bias = at<const float>(bias), a.bias_head = bias_head;
        a.scale = scale, a.softcap = softcap, a.sliding = sliding;
        a.lse = at<const float>(lse), a.lse_token = lse_token, a.lse_head = lse_head;
        a.mass = at<float>(mass), a.width = width;
        nb::gil_scoped_release release;
        table().mass.mass(a);
      },
      nb::kw_only(), nb::arg("dtype"), nb::arg("tokens"), nb::arg("kv_heads"), nb::arg("group"), nb::arg("depth"),
      nb::arg("q"), nb::arg("q_token"), nb::arg("q_head"), nb::arg("k"), nb::arg("k_head"), nb::arg("k_entry"),
      nb::arg("lengths"), nb::arg("query_positions"), nb::arg("start"), nb::arg("positions"),
      nb::arg("positions_head"), nb::arg("bias"), nb::arg("bias_head"), nb::arg("scale"), nb::arg("softcap"),
      nb::arg("sliding"), nb::arg("lse"), nb::arg("lse_token"), nb::arg("lse_head"), nb::arg("mass"),
      nb::arg("width"));
}

}  // namespace winnow
