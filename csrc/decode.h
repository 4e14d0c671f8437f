#pragma once
#include <cstdint>

namespace winnow {

struct DecodeKernels {};

}  // namespace winnow
