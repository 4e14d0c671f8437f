#pragma once
#include <cstdint>

namespace winnow {

struct PrefillKernels {};

}  // namespace winnow
