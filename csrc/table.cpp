#include "kernels.h"

namespace winnow {
namespace WINNOW_ISA {

// Each <op>_kernels() is defined in the op's own file, in this namespace.
PrefillKernels prefill_kernels();
MassKernels mass_kernels();
DecodeKernels decode_kernels();
MatmulKernels matmul_kernels();
MatvecKernels matvec_kernels();
KeyScanKernels key_scan_kernels();
TopKKernels top_k_kernels();
QuantizeKernels quantize_kernels();
PointwiseKernels pointwise_kernels();
NearestKernels nearest_kernels();
CodedKernels coded_kernels();
MergeKernels merge_kernels();
RecurrenceKernels recurrence_kernels();

const KernelTable* table() {
  static const KernelTable kernels{prefill_kernels(),   mass_kernels(),      decode_kernels(),   matmul_kernels(),
                                   matvec_kernels(),    key_scan_kernels(),  top_k_kernels(),    quantize_kernels(),
                                   pointwise_kernels(), nearest_kernels(),   coded_kernels(),    merge_kernels(),
                                   recurrence_kernels()};
  return &kernels;
}

}  // namespace WINNOW_ISA
}  // namespace winnow
