#pragma once
#include <cstdint>

namespace winnow {

struct QuantizeKernels {};

}  // namespace winnow
