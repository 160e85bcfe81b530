// The header of a safetensors file: parsed strictly, since files come from strangers.
//
//   8 bytes, little-endian: n, the length of the header
//   n bytes: JSON, {"<tensor>": {"dtype": "BF16", "shape": [2, 3], "data_offsets": [0, 12]}, ...,
//            "__metadata__": {"<string>": "<string>", ...}}, which may be padded with white space
//   the data, to the end of the file; data_offsets count from its start
//
// Stricter than the reference implementation: no key twice, no key that the format does not know, every string valid
// UTF-8 without lone surrogates, every number a plain non-negative integer below 2^53. As there: the tensors cover the
// data exactly, without hole or overlap, and dtype x shape is each one's length.
#pragma once

#include <cstdint>
#include <deque>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

namespace qlora {

struct SafetensorsDType {
  const char* name;
  int bits;  // of an element
};

/// Every dtype of the format, whether we can load it or not, in the order by which files are sorted (alignment rises).
constexpr SafetensorsDType kSafetensorsDTypes[] = {
    {"BOOL", 8},    {"F4", 4},      {"F6_E2M3", 6}, {"F6_E3M2", 6},     {"U8", 8},          {"I8", 8},
    {"F8_E5M2", 8}, {"F8_E4M3", 8}, {"F8_E8M0", 8}, {"F8_E4M3FNUZ", 8}, {"F8_E5M2FNUZ", 8}, {"I16", 16},
    {"U16", 16},    {"F16", 16},    {"BF16", 16},   {"I32", 32},        {"U32", 32},        {"F32", 32},
    {"C64", 64},    {"F64", 64},    {"I64", 64},    {"U64", 64},
};

constexpr uint64_t kMaxSafetensorsHeader = 100'000'000;
/// Files have a handful; a header full of them would take JavaScript a multiple of its size.
constexpr size_t kMaxSafetensorsMetadata = 100'000;

/// The length that the file's first 8 bytes claim; throws ERR_QLORA_SAFETENSORS where the file cannot hold it.
uint32_t safetensorsHeaderLength(const unsigned char* prefix, uint64_t fileBytes);

/// What a header says. Names, shapes and metadata are views of its text, and lists grow without being copied, so that
/// memory stays below 8 x the text.
class SafetensorsHeader {
 public:
  struct Text {
    uint32_t at = 0, length = 0;
  };
  struct Entry {
    Text name;
    uint32_t shapeAt = 0;
    uint32_t rank = 0;
    uint8_t dtype = 0;            // index into kSafetensorsDTypes
    uint64_t begin = 0, end = 0;  // bytes, from the start of the data
  };
  struct Pair {
    Text key, value;
  };

  SafetensorsHeader() = default;
  /// `text` are the n bytes, `dataBytes` what follows them in the file. Throws ERR_QLORA_SAFETENSORS.
  SafetensorsHeader(std::unique_ptr<char[]> text, uint32_t length, uint64_t dataBytes);

  const std::deque<Entry>& entries() const { return entries_; }  // in the order of the file
  const std::deque<Pair>& metadata() const { return metadata_; }
  std::string_view view(Text t) const { return {text_.get() + t.at, t.length}; }
  std::vector<uint64_t> shape(const Entry& entry) const;

 private:
  friend class SafetensorsParser;

  std::unique_ptr<char[]> text_;
  std::deque<Entry> entries_;
  std::deque<Pair> metadata_;
};

/// A name from a file as it may stand in a message: printable, at most some 100 characters, in single quotes.
std::string quoted(std::string_view name);

}  // namespace qlora
