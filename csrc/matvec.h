#pragma once
#include <cstdint>

namespace winnow {

struct MatvecKernels {};

}  // namespace winnow
