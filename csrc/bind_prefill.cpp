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

void bind_prefill(nb::module_& m) {
  // Addresses and element strides, as PrefillArgs (csrc/prefill.h) lists them.
  m.def(
      "prefill",
      [](int dtype, int64_t tokens, int64_t kv_heads, int64_t group, int64_t depth, uintptr_t q, int64_t q_token,
         int64_t q_head, uintptr_t k, int64_t k_head, int64_t k_entry, uintptr_t v, int64_t v_head, int64_t v_entry,
         uintptr_t lengths, uintptr_t query_positions, int64_t start, uintptr_t positions, int64_t positions_head,
         uintptr_t bias, int64_t bias_head, float scale, float softcap, int64_t sliding, int form, int64_t init,
         int64_t local, int64_t align, int64_t rows, int64_t phase, int64_t unit, uintptr_t offsets,
         int64_t offsets_head, uintptr_t columns, int64_t n_columns, uintptr_t out, uintptr_t lse,
         uintptr_t row_max) {
        PrefillArgs a{};
        a.dtype = static_cast<PrefillDtype>(dtype);
        a.tokens = tokens, a.kv_heads = kv_heads, a.group = group, a.depth = depth;
        a.q = at<const void>(q), a.q_token = q_token, a.q_head = q_head;
        a.k = at<const void>(k), a.k_head = k_head, a.k_entry = k_entry;
        a.v = at<const void>(v), a.v_head = v_head, a.v_entry = v_entry;
        a.lengths = at<const int32_t>(lengths), a.query_positions = at<const int32_t>(query_positions);
        a.start = start, a.positions = at<const int32_t>(positions), a.positions_head = positions_head;
        a.bias = at<const float>(bias), a.bias_head = bias_head;
        a.scale = scale, a.softcap = softcap, a.sliding = sliding;
        a.form = static_cast<PrefillForm>(form), a.init = init, a.local = local, a.align = align;
        a.rows = rows, a.phase = phase, a.unit = unit;
        a.offsets = at<const int32_t>(offsets), a.offsets_head = offsets_head;
        a.columns = at<const int32_t>(columns), a.n_columns = n_columns;
        a.out = at<void>(out), a.lse = at<float>(lse), a.row_max = at<float>(row_max);
        nb::gil_scoped_release release;
        return table().prefill.prefill(a);
      },
      nb::kw_only(), nb::arg("dtype"), nb::arg("tokens"), nb::arg("kv_heads"), nb::arg("group"), nb::arg("depth"),
      nb::arg("q"), nb::arg("q_token"), nb::arg("q_head"), nb::arg("k"), nb::arg("k_head"), nb::arg("k_entry"),
      nb::arg("v"), nb::arg("v_head"), nb::arg("v_entry"), nb::arg("lengths"), nb::arg("query_positions"),
      nb::arg("start"), nb::arg("positions"), nb::arg("positions_head"), nb::arg("bias"), nb::arg("bias_head"),
      nb::arg("scale"), nb::arg("softcap"), nb::arg("sliding"), nb::arg("form"), nb::arg("init"), nb::arg("local"),
      nb::arg("align"), nb::arg("rows"), nb::arg("phase"), nb::arg("unit"), nb::arg("offsets"),
      nb::arg("offsets_head"), nb::arg("columns"), nb::arg("n_columns"), nb::arg("out"), nb::arg("lse"),
      nb::arg("row_max"));
}

}  // namespace winnow
