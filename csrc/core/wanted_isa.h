// What QLORA_CPU asks for.
#pragma once

namespace qlora {

/// Kernels for AMX on tiles in plain C++, for tests.
constexpr const char* kEmulatedIsa = "amx-emulated";

/// The instruction set that QLORA_CPU names, or "".
const char* wantedIsa();
/// Whether this process emulates tiles, which never changes: where it has none, and where it is asked to.
bool tilesAreEmulated();

}  // namespace qlora
