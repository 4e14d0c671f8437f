#include "key_scan.h"

namespace winnow {
namespace WINNOW_ISA {

KeyScanKernels key_scan_kernels() { return {}; }

}  // namespace WINNOW_ISA
}  // namespace winnow
