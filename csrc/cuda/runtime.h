// CUDA's devices and queues, as core/device.h wants them.
#pragma once

#include <memory>

#include "core/device.h"

namespace qlora::cuda {

int deviceCount();
std::unique_ptr<Device> openDevice(int index);

}  // namespace qlora::cuda
