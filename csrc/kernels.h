// The kernels that exist once per instruction set, as one table of function pointers each.
//
// A kernel file defines its functions in namespace winnow::WINNOW_ISA; csrc/table.cpp, compiled once per
// instruction set, collects them. Bindings (csrc/bind_*.cpp) call through winnow::table() and hold no logic.
#pragma once
#include "coded_decode.h"
#include "decode.h"
#include "key_scan.h"
#include "mass.h"
#include "matmul.h"
#include "matvec.h"
#include "merge.h"
#include "nearest.h"
#include "pointwise.h"
#include "prefill.h"
#include "quantize.h"
#include "recurrence.h"
#include "top_k.h"

namespace winnow {

struct KernelTable {
  PrefillKernels prefill;
  MassKernels mass;
  DecodeKernels decode;
  MatmulKernels matmul;
  MatvecKernels matvec;
  KeyScanKernels key_scan;
  TopKKernels top_k;
  QuantizeKernels quantize;
  PointwiseKernels pointwise;
  NearestKernels nearest;
  CodedKernels coded;
  MergeKernels merge;
  RecurrenceKernels recurrence;
};

#define WINNOW_DECLARE_TABLE(isa) \
  namespace isa {                 \
  const KernelTable* table();     \
  }
WINNOW_DECLARE_TABLE(generic)
WINNOW_DECLARE_TABLE(avx2)
WINNOW_DECLARE_TABLE(avx512)
#undef WINNOW_DECLARE_TABLE

}  // namespace winnow
