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

}  // namespace qlora
