#include <nanobind/nanobind.h>

#include "dispatch.h"

namespace nb = nanobind;

namespace winnow {
namespace {

// Addresses are `tensor.data_ptr()`, 0 for an absent tensor; strides count elements.
DecodeArgs operands(uintptr_t q, uintptr_t k, uintptr_t v, int64_t k_head, int64_t k_row, int64_t v_head, int64_t v_row,
                    uintptr_t k_mask, uintptr_t v_mask, int64_t k_mask_head, int64_t v_mask_head, int64_t kept,
                    int64_t capacity, uintptr_t lengths, int64_t heads, int64_t group, int64_t dim, bool bf16,
                    int64_t position, int64_t start, int64_t window, uintptr_t positions, int64_t positions_head,
                    uintptr_t bias, int64_t bias_head, float scale, float softcap, uintptr_t indices, uintptr_t counts,
                    int64_t indices_row, int64_t listed, int64_t rows, int64_t page, uintptr_t out, uintptr_t lse) {
  DecodeArgs a{};
  a.q = reinterpret_cast<const void*>(q);
  a.k = reinterpret_cast<const void*>(k);
  a.v = reinterpret_cast<const void*>(v);
  a.k_head = k_head;
  a.k_row = k_row;
  a.v_head = v_head;
  a.v_row = v_row;
  a.k_mask = reinterpret_cast<const uint8_t*>(k_mask);
  a.v_mask = reinterpret_cast<const uint8_t*>(v_mask);
  a.k_mask_head = k_mask_head;
  a.v_mask_head = v_mask_head;
  a.kept = kept;
  a.capacity = capacity;
  a.lengths = reinterpret_cast<const int32_t*>(lengths);
  a.heads = heads;
  a.group = group;
  a.dim = dim;
  a.bf16 = bf16;
  a.position = position;
  a.start = start;
  a.window = window;
  a.positions = reinterpret_cast<const int32_t*>(positions);
  a.positions_head = positions_head;
  a.bias = reinterpret_cast<const float*>(bias);
  a.bias_head = bias_head;
  a.scale = scale;
  a.softcap = softcap;
  a.indices = reinterpret_cast<const int32_t*>(indices);
  a.counts = reinterpret_cast<const int32_t*>(counts);
  a.indices_row = indices_row;
  a.listed = listed;
  a.rows = rows;
  a.page = page;
  a.out = reinterpret_cast<void*>(out);
  a.lse = reinterpret_cast<float*>(lse);
  return a;
}

// The call that gives `more` beside the result.
template <class... Operand>
auto giving(DecodeArgs (*operands)(Operand...), float* DecodeArgs::*more, int64_t DecodeArgs::*stride) {
  return [=](Operand... operand, uintptr_t to, int64_t head) {
    DecodeArgs a = operands(operand...);
    a.*more = reinterpret_cast<float*>(to);
    a.*stride = head;
    nb::gil_scoped_release release;
    return table().decode.decode(a);
  };
}

// The same with keys that are rebuilt; what says how comes first.
template <class... Operand>
auto rebuilding(DecodeArgs (*operands)(Operand...)) {
  return [=](uintptr_t left, int64_t left_row, int64_t left_start, uintptr_t right, int64_t right_head, int64_t rank,
             uintptr_t coarse, uintptr_t fine, int64_t coarse_start, uintptr_t partner, Operand... operand, uintptr_t logits,
             int64_t logits_head) {
    const Rebuilt keys{reinterpret_cast<const void*>(left),
                       left_row,
                       left_start,
                       reinterpret_cast<const void*>(right),
                       right_head,
                       rank,
                       reinterpret_cast<const float*>(coarse),
                       reinterpret_cast<const float*>(fine),
                       coarse_start,
                       reinterpret_cast<const int32_t*>(partner)};
    DecodeArgs a = operands(operand...);
    a.rebuilt = &keys;
    a.logits = reinterpret_cast<float*>(logits);
    a.logits_head = logits_head;
    nb::gil_scoped_release release;
    return table().decode.decode(a);
  };
}

}  // namespace

void bind_decode(nb::module_& m) {
  m.def("decode", giving(operands, &DecodeArgs::logits, &DecodeArgs::logits_head));
  m.def("rebuilt_decode", rebuilding(operands));
  m.def("decode_mass", giving(operands, &DecodeArgs::mass, &DecodeArgs::mass_head));
}

}  // namespace winnow
