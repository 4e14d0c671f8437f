#pragma once
#include <cstdint>

namespace winnow {

struct TopKKernels {};

}  // namespace winnow
