#include <string>
#include <string_view>

#include "core/error.h"
#include "core/wanted_isa.h"
#include "cpu_isas.h"
#include "ops/cpu_choice.h"
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

bool runsHere(std::string_view isa) {
#if defined(__x86_64__)
  __builtin_cpu_init();
  unsigned a, b, c = 0, d;
  const bool f16c = __get_cpuid(1, &a, &b, &c, &d) && (c & bit_F16C);  // clang's builtin does not know the name
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && f16c;
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  const bool avx512bf16 = avx512 && __builtin_cpu_supports("avx512bf16");
  if (isa == "avx2") return avx2;
  if (isa == "avx512") return avx512;
  if (isa == "avx512bf16" || isa == kEmulatedIsa) return avx512bf16;
  if (isa == "amx") return avx512bf16 && !tilesAreEmulated();
#elif defined(__aarch64__)
  if (isa == "neon") return true;
  if (isa == "neonbf16") return hasBf16();
#endif
  return isa == "scalar";
}

struct Runnable {
  const OpTable* tables[8];
  int count = 0;
  OpTable emulated{};

  Runnable() {
    // QLORA_CPU_ISAS lists them worst first.
#define QLORA_ADD_ISA(isa) add(isa::opTable);
    QLORA_CPU_ISAS(QLORA_ADD_ISA)
#undef QLORA_ADD_ISA
    // Emulated tiles are for tests, and nobody's best.
    if (emulated.name) tables[count++] = &emulated;
  }
  void add(const OpTable& table) {
    if (table.name == std::string_view("amx") && tilesAreEmulated() && runsHere(kEmulatedIsa)) {
      emulated = table;
      emulated.name = kEmulatedIsa;
    }
    if (!runsHere(table.name)) return;
    for (int i = count++; i > 0; --i) tables[i] = tables[i - 1];
    tables[0] = &table;
  }
  const OpTable* find(std::string_view name) const {
    for (int i = 0; i < count; ++i) {
      if (tables[i]->name == name) return tables[i];
    }
    return nullptr;
  }
};

const Runnable& runnable() {
  static const Runnable here;
  return here;
}

std::string nameOf(const Processor& p) {
  return std::string(p.vendor) + " family " + std::to_string(p.family) + " model " + std::to_string(p.model);
}

}  // namespace

CpuTables cpuTables() { return {runnable().tables, runnable().count}; }

CpuChoice cpuChoice() {
  const Runnable& here = runnable();
  const std::string_view wanted = wantedIsa();
  if (wanted.empty()) {
    const Processor at = processor();
    const CpuRule* rule = cpuRule(at, [&](const char* isa) { return here.find(isa) != nullptr; });
    if (rule) return {here.find(rule->isa), "for " + nameOf(at) + ": " + rule->reason};
    return {here.tables[0], "as the best that runs here"};
  }
  if (const OpTable* table = here.find(wanted)) return {table, "by QLORA_CPU"};
  std::string names;
  for (int i = 0; i < here.count; ++i) names += (i ? ", " : "") + std::string(here.tables[i]->name);
  throw Error(
      "ERR_QLORA_CPU",
      "QLORA_CPU must name an instruction set that runs here (" + names + "), got '" + std::string(wanted) + "'",
      "Unset QLORA_CPU to take the best one.");
}

const OpTable& cpuTable() { return *cpuChoice().table; }

}  // namespace qlora
