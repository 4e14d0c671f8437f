#include "matvec.h"

namespace winnow {
namespace WINNOW_ISA {

MatvecKernels matvec_kernels() { return {}; }

}  // namespace WINNOW_ISA
}  // namespace winnow
