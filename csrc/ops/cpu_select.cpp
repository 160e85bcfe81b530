#include <cstdlib>
#include <cstring>
#include <string>

#include "core/error.h"
#include "cpu_isas.h"
#include "ops/op_table.h"

#if defined(__x86_64__)
#include <cpuid.h>
#elif defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>
#elif defined(__aarch64__) && defined(__APPLE__)
#include <sys/sysctl.h>
#endif

namespace qlora {

#define QLORA_DECLARE_ISA(isa)  \
  namespace isa {               \
  extern const OpTable opTable; \
  }
QLORA_CPU_ISAS(QLORA_DECLARE_ISA)
#undef QLORA_DECLARE_ISA

namespace {

#if defined(__aarch64__)
/// Whether bfmmla and bfdot are there.
bool hasBf16() {
#if defined(__linux__)
  constexpr unsigned long kBf16 = 1ul << 14;  // HWCAP2_BF16
  return getauxval(AT_HWCAP2) & kBf16;
#elif defined(__APPLE__)
  int has = 0;
  size_t size = sizeof has;
  return !sysctlbyname("hw.optional.arm.FEAT_BF16", &has, &size, nullptr, 0) && has;
#else
  return false;
#endif
}
#endif

bool runsHere(const char* isa) {
#if defined(__x86_64__)
  __builtin_cpu_init();
  unsigned a, b, c = 0, d;
  const bool f16c = __get_cpuid(1, &a, &b, &c, &d) && (c & bit_F16C);  // clang's builtin does not know the name
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && f16c;
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (!std::strcmp(isa, "avx2")) return avx2;
  if (!std::strcmp(isa, "avx512")) return avx512;
  if (!std::strcmp(isa, "avx512bf16")) return avx512 && __builtin_cpu_supports("avx512bf16");
#elif defined(__aarch64__)
  if (!std::strcmp(isa, "neon")) return true;
  if (!std::strcmp(isa, "neonbf16")) return hasBf16();
#endif
  return !std::strcmp(isa, "scalar");
}

struct Runnable {
  const OpTable* tables[8];
  int count = 0;

  Runnable() {
    // QLORA_CPU_ISAS lists them worst first.
#define QLORA_ADD_ISA(isa) \
  if (runsHere(#isa)) add(&isa::opTable);
    QLORA_CPU_ISAS(QLORA_ADD_ISA)
#undef QLORA_ADD_ISA
  }
  void add(const OpTable* table) {
    for (int i = count++; i > 0; --i) tables[i] = tables[i - 1];
    tables[0] = table;
  }
};

}  // namespace

CpuTables cpuTables() {
  static const Runnable runnable;
  return {runnable.tables, runnable.count};
}

const OpTable& cpuTable() {
  const CpuTables here = cpuTables();
  const char* wanted = std::getenv("QLORA_CPU");
  if (!wanted || !*wanted) return *here.tables[0];
  std::string names;
  for (int i = 0; i < here.count; ++i) {
    if (!std::strcmp(here.tables[i]->name, wanted)) return *here.tables[i];
    names += (i ? ", " : "") + std::string(here.tables[i]->name);
  }
  throw Error(
      "ERR_QLORA_CPU",
      "QLORA_CPU must name an instruction set that runs here (" + names + "), got '" + std::string(wanted) + "'",
      "Unset QLORA_CPU to take the best one.");
}

}  // namespace qlora
