#include "bind_queries_and_entries.h"
#include "dispatch.h"

namespace nb = nanobind;

namespace winnow {
namespace {

int64_t prefill(const QueriesAndEntries& given, uintptr_t v, int64_t v_head, int64_t v_entry, int form, int64_t init,
                int64_t local, int64_t align, int64_t rows, int64_t phase, int64_t unit, uintptr_t offsets,
                int64_t offsets_head, uintptr_t columns, int64_t n_columns, uintptr_t out, uintptr_t lse,
                uintptr_t row_max) {
  PrefillArgs a{given};
  a.v = at<const void>(v), a.v_head = v_head, a.v_entry = v_entry;
  a.form = static_cast<PrefillForm>(form), a.init = init, a.local = local, a.align = align;
  a.rows = rows, a.phase = phase, a.unit = unit;
  a.offsets = at<const int32_t>(offsets), a.offsets_head = offsets_head;
  a.columns = at<const int32_t>(columns), a.n_columns = n_columns;
  a.out = at<void>(out), a.lse = at<float>(lse), a.row_max = at<float>(row_max);
  nb::gil_scoped_release release;
  return table().prefill.prefill(a);
}

}  // namespace

void bind_prefill(nb::module_& m) {
  define(m, "prefill", prefill, nb::arg("v"), nb::arg("v_head"), nb::arg("v_entry"), nb::arg("form"), nb::arg("init"),
         nb::arg("local"), nb::arg("align"), nb::arg("rows"), nb::arg("phase"), nb::arg("unit"), nb::arg("offsets"),
         nb::arg("offsets_head"), nb::arg("columns"), nb::arg("n_columns"), nb::arg("out"), nb::arg("lse"),
         nb::arg("row_max"));
}

}  // namespace winnow
