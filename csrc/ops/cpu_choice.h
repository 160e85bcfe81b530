// Which of the instruction sets that a processor has is the fastest on it, as data: first match wins. Where no line
// matches, the last of QLORA_CPU_ISAS that runs is taken. A line says what was measured, and where.
#pragma once

#include <cstring>
#include <string>

#include "core/processor.h"

namespace qlora {

struct OpTable;

struct CpuRule {
  const char* vendor;
  int family, firstModel, lastModel;
  const char* isa;
  const char* reason;
};

constexpr int kAnyModel = 255;

inline constexpr CpuRule kCpuRules[] = {
    // Sapphire Rapids (model 143), GFLOP/s a core: tiles 3800 from registers, 2500 from the first cache; fp32 FMA 240;
    // vdpbf16ps 119. Emerald Rapids (207) and Granite Rapids (173, 174) have the same units.
    {"GenuineIntel", 6, 143, kAnyModel, "amx", "tiles do ten times the work of fp32 FMA"},
    // The same without tiles: a system or a virtual machine may hide them.
    {"GenuineIntel", 6, 143, kAnyModel, "avx512", "fp32 FMA does twice the work of vdpbf16ps"},
    // Zen 4 (model 17), GFLOP/s a core: vdpbf16ps 235, fp32 FMA 117.
    {"AuthenticAMD", 25, 0, kAnyModel, "avx512bf16", "vdpbf16ps does twice the work of fp32 FMA"},
};

/// The first line for the processor whose instruction set runs(isa); null where there is none.
template <class Runs>
const CpuRule* cpuRule(const Processor& p, Runs&& runs) {
  for (const CpuRule& rule : kCpuRules) {
    if (!std::strcmp(rule.vendor, p.vendor) && rule.family == p.family && rule.firstModel <= p.model &&
        p.model <= rule.lastModel && runs(rule.isa)) {
      return &rule;
    }
  }
  return nullptr;
}

struct CpuChoice {
  const OpTable* table;
  std::string reason;  // continues "chosen"
};

/// The instruction set that QLORA_CPU names, else the one of kCpuRules, else the best by features. Throws ERR_QLORA_CPU
/// where QLORA_CPU's cannot run here.
CpuChoice cpuChoice();

}  // namespace qlora
