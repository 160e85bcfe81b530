// What cpuid says of the processor at hand.
#pragma once

namespace qlora {

struct Processor {
  char vendor[13] = "";  // "GenuineIntel", "AuthenticAMD"; empty where there is no cpuid
  int family = 0, model = 0;
};

/// Family and model with their extensions, as vendors and Linux count them.
Processor processor();

/// Whether AMX's tiles of bf16 can be used: the processor has them, the system saves them, and it let this process use
/// them, which the first call asks for (Linux gives tiles only to processes that ask).
bool hasTiles();

/// QLORA_CPU, or "" where it is not set.
const char* wantedIsa();
/// Whether this process emulates tiles, which never changes: where it has none, and for QLORA_CPU=amx-emulated.
bool tilesAreEmulated();
constexpr const char* kEmulatedIsa = "amx-emulated";

}  // namespace qlora
