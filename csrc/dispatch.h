// Which instruction set runs. One table of function pointers per set; `table()` is the chosen one.
#pragma once
#include <string>
#include <vector>

#include "kernels.h"

namespace winnow {

// The names that this build and this processor both have, best first.
std::vector<std::string> available_isas();
// Name of the set in use.
const std::string& current_isa();
// Throws std::invalid_argument when `name` is not available here.
void force_isa(const std::string& name);
const KernelTable& table();
// Whether the processor multiplies whole tiles of bf16 (AMX), which no kernel here uses.
bool has_matrix_tiles();

}  // namespace winnow
