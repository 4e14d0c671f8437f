#include "decode.h"

namespace winnow {
namespace WINNOW_ISA {

DecodeKernels decode_kernels() { return {}; }

}  // namespace WINNOW_ISA
}  // namespace winnow
