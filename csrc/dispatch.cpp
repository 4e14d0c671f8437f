#include "dispatch.h"

#if defined(__x86_64__)
#include <cpuid.h>
#endif

#include <stdexcept>

namespace winnow {
namespace {

struct Isa {
  const char* name;
  const KernelTable* table;
};

std::vector<Isa> detect() {
  std::vector<Isa> found;
#ifdef WINNOW_WITH_avx512
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
      __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vnni") &&
      __builtin_cpu_supports("avx512vbmi") && __builtin_cpu_supports("avx512vbmi2")) {
    found.push_back({"avx512", avx512::table()});
  }
#endif
#ifdef WINNOW_WITH_avx2
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2")) {
    found.push_back({"avx2", avx2::table()});
  }
#endif
  found.push_back({"generic", generic::table()});
  return found;
}

const std::vector<Isa>& isas() {
  static const std::vector<Isa> found = detect();
  return found;
}

struct Choice {
  std::string name = isas().front().name;
  const KernelTable* table = isas().front().table;
};

Choice& choice() {
  static Choice chosen;
  return chosen;
}

}  // namespace

std::vector<std::string> available_isas() {
  std::vector<std::string> names;
  for (const Isa& isa : isas()) names.emplace_back(isa.name);
  return names;
}

const std::string& current_isa() { return choice().name; }

void force_isa(const std::string& name) {
  for (const Isa& isa : isas()) {
    if (name == isa.name) {
      choice() = Choice{isa.name, isa.table};
      return;
    }
  }
  throw std::invalid_argument("instruction set '" + name + "' is not available on this machine");
}

const KernelTable& table() { return *choice().table; }

bool has_matrix_tiles() {
#if defined(__x86_64__)
  // Asked once: in a virtual machine the instruction takes microseconds.
  static const bool has = [] {
    unsigned a, b, c, d;
    return __get_cpuid_count(7, 0, &a, &b, &c, &d) && (d >> 22 & 1);
  }();
  return has;
#else
  return false;
#endif
}

}  // namespace winnow
