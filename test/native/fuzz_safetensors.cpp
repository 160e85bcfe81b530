// libFuzzer on the header of safetensors files. An input's first byte chooses: 0, it is a whole file; else the rest is
// the JSON of a header whose length and data fit, so that the fuzzer gets behind the first checks.
#include <cstring>

#include "core/error.h"
#include "core/safetensors.h"
#include "testing.h"

using namespace qlora;

namespace {

void parse(const char* json, uint32_t length, uint64_t dataBytes) {
  std::unique_ptr<char[]> text(new char[length]);
  std::memcpy(text.get(), json, length);
  const SafetensorsHeader header(std::move(text), length, dataBytes);
  // What the parser accepts covers the data exactly.
  uint64_t sum = 0;
  for (const SafetensorsHeader::Entry& entry : header.entries()) {
    CHECK(entry.begin <= entry.end && entry.end <= dataBytes);
    sum += entry.end - entry.begin;
    CHECK(!quoted(header.view(entry.name)).empty());
    uint64_t bits = kSafetensorsDTypes[entry.dtype].bits;
    for (const uint64_t size : header.shape(entry)) bits *= size;
    CHECK(bits == 8 * (entry.end - entry.begin));
  }
  CHECK(sum == dataBytes);
  for (const SafetensorsHeader::Pair& pair : header.metadata()) CHECK(header.view(pair.value).size() <= length);
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  try {
    if (size > 9 && data[0] == 0) {
      const uint32_t length = safetensorsHeaderLength(data + 1, size - 1);
      parse(reinterpret_cast<const char*>(data) + 9, length, size - 9 - length);
    } else if (size > 1) {
      // So much data as the header claims, where it says so.
      parse(reinterpret_cast<const char*>(data) + 1, static_cast<uint32_t>(size - 1), 64 * uint64_t{data[0] - 1u});
    }
  } catch (const Error& error) {
    CHECK(error.code == "ERR_QLORA_SAFETENSORS");
  }
  return 0;
}
