// What native tests are made of: a check that says where it failed, and tensors without JavaScript.
#pragma once

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <initializer_list>
#include <memory>
#include <vector>

#include "core/random.h"
#include "core/tensor.h"

#define CHECK(condition)                                                   \
  do {                                                                     \
    if (!(condition)) {                                                    \
      std::fprintf(stderr, "%s:%d: %s\n", __FILE__, __LINE__, #condition); \
      std::exit(1);                                                        \
    }                                                                      \
  } while (false)

namespace qlora {

inline Tensor makeTensor(const std::shared_ptr<Memory>& memory, DType dtype, std::initializer_list<int64_t> shape,
                         MemoryClass memoryClass = MemoryClass::activations) {
  Tensor t;
  t.dtype = dtype;
  t.rank = static_cast<int>(shape.size());
  std::copy(shape.begin(), shape.end(), t.shape.begin());
  t.storage = std::make_shared<Storage>(memory, static_cast<size_t>(t.size()) * sizeOf(dtype), memoryClass);
  return t;
}

/// Bytes of a tensor that the stream has filled.
inline std::vector<char> bytesOf(const Tensor& t) {
  const char* data = static_cast<const char*>(t.storage->data);
  return std::vector<char>(data, data + t.storage->bytes);
}

}  // namespace qlora
