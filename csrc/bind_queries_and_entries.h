// Binds kernels of many queries over one segment: what they are all told is unpacked here, once.
#pragma once
#include <nanobind/nanobind.h>

#include <tuple>

#include "queries_and_entries.h"

namespace winnow {

template <class T>
T* at(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

// Addresses and element strides, as QueriesAndEntries lists them.
inline QueriesAndEntries queries_and_entries(int dtype, int64_t tokens, int64_t kv_heads, int64_t group, int64_t depth,
                                             uintptr_t q, int64_t q_token, int64_t q_head, uintptr_t k, int64_t k_head,
                                             int64_t k_entry, uintptr_t lengths, uintptr_t query_positions,
                                             int64_t start, uintptr_t positions, int64_t positions_head, uintptr_t bias,
                                             int64_t bias_head, float scale, float softcap, int64_t sliding) {
  QueriesAndEntries a{};
  a.dtype = static_cast<QueryDtype>(dtype);
  a.tokens = tokens, a.kv_heads = kv_heads, a.group = group, a.depth = depth;
  a.q = at<const void>(q), a.q_token = q_token, a.q_head = q_head;
  a.k = at<const void>(k), a.k_head = k_head, a.k_entry = k_entry;
  a.lengths = at<const int32_t>(lengths), a.query_positions = at<const int32_t>(query_positions);
  a.start = start, a.positions = at<const int32_t>(positions), a.positions_head = positions_head;
  a.bias = at<const float>(bias), a.bias_head = bias_head;
  a.scale = scale, a.softcap = softcap, a.sliding = sliding;
  return a;
}

namespace detail {

template <class... Common, class Result, class... Own, class... Names>
void define(nanobind::module_& m, const char* name, QueriesAndEntries (*unpack)(Common...),
            Result (*run)(const QueriesAndEntries&, Own...), Names... names) {
  m.def(
      name, [=](Common... common, Own... own) { return run(unpack(common...), own...); }, nanobind::kw_only(),
      names...);
}

}  // namespace detail

// Defines a function of keywords: those of queries_and_entries(), then `own` ones, which `run` takes behind them.
template <class Run, class... Own>
void define(nanobind::module_& m, const char* name, Run run, Own... own) {
  using nanobind::arg;
  detail::define(m, name, queries_and_entries, run, arg("dtype"), arg("tokens"), arg("kv_heads"), arg("group"),
                 arg("depth"), arg("q"), arg("q_token"), arg("q_head"), arg("k"), arg("k_head"), arg("k_entry"),
                 arg("lengths"), arg("query_positions"), arg("start"), arg("positions"), arg("positions_head"),
                 arg("bias"), arg("bias_head"), arg("scale"), arg("softcap"), arg("sliding"), own...);
}

}  // namespace winnow
