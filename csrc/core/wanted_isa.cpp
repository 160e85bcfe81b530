#include "core/wanted_isa.h"

#include <cstdlib>
#include <cstring>

#include "core/processor.h"

namespace qlora {

const char* wantedIsa() {
  const char* name = std::getenv("QLORA_CPU");
  return name ? name : "";
}

bool tilesAreEmulated() {
  static const bool emulated = !std::strcmp(wantedIsa(), kEmulatedIsa) || !hasTiles();
  return emulated;
}

}  // namespace qlora
