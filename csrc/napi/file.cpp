#include "napi/bind.h"

namespace qlora {

void defineFiles(Napi::Env, Napi::Object) {}

}  // namespace qlora
