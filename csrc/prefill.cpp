#include "prefill.h"

namespace winnow {
namespace WINNOW_ISA {

PrefillKernels prefill_kernels() { return {}; }

}  // namespace WINNOW_ISA
}  // namespace winnow
