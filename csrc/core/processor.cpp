#include "core/processor.h"

#include <cstdint>
#include <cstring>

#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace qlora {

#if defined(__x86_64__)

Processor processor() {
  Processor p;
  unsigned a, b, c, d;
  if (!__get_cpuid(0, &a, &b, &c, &d)) return p;
  std::memcpy(p.vendor, &b, 4);
  std::memcpy(p.vendor + 4, &d, 4);
  std::memcpy(p.vendor + 8, &c, 4);
  if (!__get_cpuid(1, &a, &b, &c, &d)) return p;
  p.family = static_cast<int>(a >> 8 & 15);
  p.model = static_cast<int>(a >> 4 & 15);
  if (p.family == 6 || p.family == 15) p.model += static_cast<int>(a >> 16 & 15) << 4;
  if (p.family == 15) p.family += static_cast<int>(a >> 20 & 255);
  return p;
}

#else

Processor processor() { return {}; }

#endif

#if defined(__x86_64__) && defined(__linux__)

namespace {

bool askForTiles() {
  constexpr unsigned kOsXsave = 1u << 27, kAmxBf16 = 1u << 22, kAmxTile = 1u << 24;
  constexpr unsigned kTileState = 3u << 17;  // XTILECFG and XTILEDATA of XCR0
  unsigned a, b, c, d;
  if (!__get_cpuid(1, &a, &b, &c, &d) || !(c & kOsXsave)) return false;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || (d & (kAmxBf16 | kAmxTile)) != (kAmxBf16 | kAmxTile)) return false;
  uint32_t low, high;
  asm("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  if ((low & kTileState) != kTileState) return false;
  constexpr long kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}

}  // namespace

bool hasTiles() {
  static const bool granted = askForTiles();
  return granted;
}

#else

bool hasTiles() { return false; }

#endif

}  // namespace qlora
