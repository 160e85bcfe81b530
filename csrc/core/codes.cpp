#include "core/codes.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <limits>

namespace qlora {

namespace {

/// torch.linspace(.1, 1, n) in fp32: from the nearer end, with fused multiply-adds.
float linspace(int j, int n) {
  const float low = .1f, high = 1.0f, step = (high - low) / static_cast<float>(n - 1);
  return j < n / 2 ? std::fma(step, static_cast<float>(j), low) : std::fma(-step, static_cast<float>(n - 1 - j), high);
}

void fillCode(DynamicMapKind kind, float* code) {
  const float decades[7] = {1e-6f, 1e-5f, 1e-4f, 1e-3f, 1e-2f, 1e-1f, 1.0f};
  const bool negatives = kind == DynamicMapKind::signedMap;
  int count = 0;
  code[count++] = 0.0f;
  code[count++] = 1.0f;
  for (int i = 0; i < 7; ++i) {
    const int n = (negatives ? 1 << i : 2 << i) + 1;
    for (int j = 0; j < n - 1; ++j) {
      const float v = decades[i] * ((linspace(j, n) + linspace(j + 1, n)) / 2);
      code[count++] = v;
      if (negatives) code[count++] = -v;
    }
  }
  std::sort(code, code + count);
}

uint8_t search(const DynamicMap& map, float x) {
  return static_cast<uint8_t>(std::lower_bound(map.threshold, map.threshold + 255, x) - map.threshold);
}

DynamicMap make(DynamicMapKind kind) {
  DynamicMap map{};
  fillCode(kind, map.code);
  for (int i = 0; i < 255; ++i) {
    const float middle = (map.code[i] + map.code[i + 1]) * .5f;
    // A tie goes up where the upper index is even: then every x above the middle's lower neighbour does.
    map.threshold[i] = (i + 1) % 2 == 0 ? std::nextafter(middle, -2.0f) : middle;
  }
  map.threshold[255] = std::numeric_limits<float>::infinity();
  for (int key = 0; key < DynamicMap::kKeys; ++key) {
    // Key 0 stands for every magnitude below that of key 1; a key's magnitudes are those from `low` up to `high`.
    const uint32_t lowBits = key == 0 ? 0 : static_cast<uint32_t>(DynamicMap::kLowestKey + key - 1) << 16;
    const uint32_t highBits = (static_cast<uint32_t>(DynamicMap::kLowestKey + key) << 16) - 1;
    map.first[0][key] = search(map, std::bit_cast<float>(lowBits));
    map.first[1][key] = search(map, -std::bit_cast<float>(highBits));
  }
  return map;
}

}  // namespace

const DynamicMap& dynamicMap(DynamicMapKind kind) {
  static const DynamicMap maps[2] = {make(DynamicMapKind::signedMap), make(DynamicMapKind::unsignedMap)};
  return maps[static_cast<int>(kind)];
}

}  // namespace qlora
