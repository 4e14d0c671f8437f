#pragma once
#include <cstdint>

namespace winnow {

struct KeyScanKernels {};

}  // namespace winnow
