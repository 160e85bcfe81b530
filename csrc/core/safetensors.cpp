#include "core/safetensors.h"

#include <algorithm>
#include <cstring>
#include <numeric>

#include "core/error.h"

namespace qlora {

namespace {

constexpr uint64_t kMaxNumber = (uint64_t{1} << 53) - 1;  // what a JavaScript number holds exactly

[[noreturn]] void invalid(const std::string& message) {
  throw Error("ERR_QLORA_SAFETENSORS", message,
              "The file is damaged or is no safetensors file: download or write it again.");
}

bool isSpace(char c) { return c == ' ' || c == '\n' || c == '\r' || c == '\t'; }

/// Bytes of the well-formed UTF-8 sequence at `s` (no overlong form, no surrogate, at most U+10FFFF), 0 where there is
/// none.
int utf8Length(const unsigned char* s, size_t left) {
  const unsigned char c = s[0];
  if (c < 0x80) return 1;
  const auto follows = [&](size_t i, unsigned char low = 0x80, unsigned char high = 0xbf) {
    return i < left && s[i] >= low && s[i] <= high;
  };
  if (c >= 0xc2 && c <= 0xdf) return follows(1) ? 2 : 0;
  if ((c & 0xf0) == 0xe0) {
    return follows(1, c == 0xe0 ? 0xa0 : 0x80, c == 0xed ? 0x9f : 0xbf) && follows(2) ? 3 : 0;
  }
  if (c >= 0xf0 && c <= 0xf4) {
    return follows(1, c == 0xf0 ? 0x90 : 0x80, c == 0xf4 ? 0x8f : 0xbf) && follows(2) && follows(3) ? 4 : 0;
  }
  return 0;
}

char* encodeUtf8(char* out, uint32_t code) {
  if (code < 0x80) {
    *out++ = static_cast<char>(code);
    return out;
  }
  const int extra = code < 0x800 ? 1 : code < 0x10000 ? 2 : 3;
  constexpr int kLead[] = {0, 0xc0, 0xe0, 0xf0};
  *out++ = static_cast<char>(kLead[extra] | (code >> (6 * extra)));
  for (int i = extra - 1; i >= 0; --i) *out++ = static_cast<char>(0x80 | ((code >> (6 * i)) & 0x3f));
  return out;
}

}  // namespace

std::string quoted(std::string_view name) {
  std::string text = "'";
  for (size_t i = 0; i < name.size();) {
    if (i >= 100) return text + "...'";
    const int n = utf8Length(reinterpret_cast<const unsigned char*>(name.data()) + i, name.size() - i);
    const bool printable = n > 1 || (n == 1 && name[i] >= 0x20 && name[i] != 0x7f);
    text += printable ? std::string(name.substr(i, static_cast<size_t>(n))) : "?";
    i += static_cast<size_t>(std::max(n, 1));
  }
  return text + "'";
}

/// Reads the one shape of JSON that a header may have; so nothing recurses, whatever the nesting.
class SafetensorsParser {
 public:
  SafetensorsParser(SafetensorsHeader& header, uint32_t length, uint64_t dataBytes)
      : header_(header), start_(header.text_.get()), end_(start_ + length), at_(start_), dataBytes_(dataBytes) {}

  void parse() {
    if (at_ == end_ || *at_ != '{') invalid("its header does not begin with '{'");
    bool hasMetadata = false;
    object([&](SafetensorsHeader::Text key) {
      if (header_.view(key) != "__metadata__") return tensor(key);
      if (hasMetadata) invalid("its header holds '__metadata__' twice");
      hasMetadata = true;
      object([&](SafetensorsHeader::Text name) {
        skipSpace();
        if (at_ == end_ || *at_ != '"') invalid("metadata " + quoted(header_.view(name)) + " must be a string");
        header_.metadata_.push_back({name, string()});
        if (header_.metadata_.size() > kMaxSafetensorsMetadata) {
          invalid("its header holds more than " + std::to_string(kMaxSafetensorsMetadata) + " metadata entries");
        }
      });
    });
    skipSpace();
    if (at_ != end_) unexpected("the end of the header");
    refuseTwice(
        header_.entries_, [](const SafetensorsHeader::Entry& e) { return e.name; }, "tensor ");
    refuseTwice(
        header_.metadata_, [](const SafetensorsHeader::Pair& p) { return p.key; }, "metadata ");
    checkCover();
  }

  /// A number as a header may hold it.
  uint64_t number(const std::string& what) {
    skipSpace();
    const char* first = at_;
    uint64_t n = 0;
    for (; at_ != end_ && *at_ >= '0' && *at_ <= '9'; ++at_) {
      n = n * 10 + static_cast<uint64_t>(*at_ - '0');
      if (n > kMaxNumber) invalid(what + " holds a number above 2^53 - 1");
    }
    const bool leadingZero = at_ - first > 1 && *first == '0';
    const bool goesOn = at_ != end_ && (*at_ == '.' || *at_ == 'e' || *at_ == 'E' || *at_ == '-' || *at_ == '+');
    if (at_ == first || leadingZero || goesOn) invalid(what + " must hold non-negative integers");
    return n;
  }

 private:
  using Text = SafetensorsHeader::Text;

  void skipSpace() {
    while (at_ != end_ && isSpace(*at_)) ++at_;
  }

  [[noreturn]] void unexpected(const std::string& wanted) {
    invalid("its header is no valid JSON: expected " + wanted + " at byte " + std::to_string(at_ - start_) +
            (at_ == end_ ? ", where it ends" : ", found " + quoted({at_, 1})));
  }

  void expect(char c) {
    skipSpace();
    if (at_ == end_ || *at_ != c) unexpected(std::string("'") + c + "'");
    ++at_;
  }

  bool accept(char c) {
    skipSpace();
    if (at_ == end_ || *at_ != c) return false;
    ++at_;
    return true;
  }

  /// Calls member(key) at the value of each member.
  template <class Member>
  void object(Member&& member) {
    expect('{');
    if (accept('}')) return;
    do {
      const Text key = string();
      expect(':');
      member(key);
    } while (accept(','));
    expect('}');
  }

  uint32_t hex4() {
    uint32_t code = 0;
    for (int i = 0; i < 4; ++i, ++at_) {
      const char c = at_ == end_ ? '\0' : *at_;
      const int digit = c >= '0' && c <= '9'   ? c - '0'
                        : c >= 'a' && c <= 'f' ? c - 'a' + 10
                        : c >= 'A' && c <= 'F' ? c - 'A' + 10
                                               : -1;
      if (digit < 0) unexpected("four hexadecimal digits");
      code = code * 16 + static_cast<uint32_t>(digit);
    }
    return code;
  }

  char* escape(char* out) {
    const char c = at_ == end_ ? '\0' : *at_++;
    switch (c) {
      case '"':
      case '\\':
      case '/':
        *out = c;
        return out + 1;
      case 'b':
        *out = '\b';
        return out + 1;
      case 'f':
        *out = '\f';
        return out + 1;
      case 'n':
        *out = '\n';
        return out + 1;
      case 'r':
        *out = '\r';
        return out + 1;
      case 't':
        *out = '\t';
        return out + 1;
      case 'u':
        break;
      default:
        unexpected("an escape sequence");
    }
    uint32_t code = hex4();
    if (code >= 0xd800 && code < 0xe000) {
      const bool paired = code < 0xdc00 && end_ - at_ >= 2 && at_[0] == '\\' && at_[1] == 'u';
      if (paired) at_ += 2;
      const uint32_t low = paired ? hex4() : 0;
      if (low < 0xdc00 || low >= 0xe000) unexpected("the second half of a surrogate pair");
      code = 0x10000 + ((code - 0xd800) << 10) + (low - 0xdc00);
    }
    return encodeUtf8(out, code);
  }

  /// Decoded in place: a decoded string is never longer than its JSON.
  Text string() {
    expect('"');
    char* const first = at_;
    char* out = at_;
    while (true) {
      if (at_ == end_) unexpected("'\"'");
      if (*at_ == '"') break;
      if (*at_ == '\\') {
        ++at_;
        out = escape(out);
        continue;
      }
      const int n = utf8Length(reinterpret_cast<unsigned char*>(at_), static_cast<size_t>(end_ - at_));
      if (n == 0) unexpected("UTF-8");
      if (static_cast<unsigned char>(*at_) < 0x20) unexpected("no control character in a string");
      for (int i = 0; i < n; ++i) *out++ = *at_++;
    }
    ++at_;
    return {static_cast<uint32_t>(first - start_), static_cast<uint32_t>(out - first)};
  }

  void tensor(Text name) {
    SafetensorsHeader::Entry entry;
    entry.name = name;
    const std::string what = "tensor " + quoted(header_.view(name));
    bool hasDType = false, hasShape = false, hasOffsets = false;
    uint64_t elements = 1;
    skipSpace();
    if (at_ == end_ || *at_ != '{') invalid(what + " must be an object");
    object([&](Text keyText) {
      const std::string_view key = header_.view(keyText);
      bool& seen = key == "dtype" ? hasDType : key == "shape" ? hasShape : hasOffsets;
      if (key != "dtype" && key != "shape" && key != "data_offsets") {
        invalid(what + " has an unknown key " + quoted(key));
      }
      if (seen) invalid(what + " has " + quoted(key) + " twice");
      seen = true;
      if (key == "dtype") {
        entry.dtype = dtype(what);
      } else if (key == "shape") {
        elements = shape(entry, what);
      } else {
        offsets(entry, what);
      }
    });
    if (!hasDType || !hasShape || !hasOffsets) {
      invalid(what + " lacks '" + (!hasDType ? "dtype" : !hasShape ? "shape" : "data_offsets") + "'");
    }
    checkSpan(entry, elements, what);
    header_.entries_.push_back(entry);
  }

  uint8_t dtype(const std::string& what) {
    skipSpace();
    if (at_ == end_ || *at_ != '"') invalid(what + ": dtype must be a string");
    const std::string_view name = header_.view(string());
    for (size_t i = 0; i < std::size(kSafetensorsDTypes); ++i) {
      if (name == kSafetensorsDTypes[i].name) return static_cast<uint8_t>(i);
    }
    invalid(what + " has an unknown dtype " + quoted(name));
  }

  /// The number of elements.
  uint64_t shape(SafetensorsHeader::Entry& entry, const std::string& what) {
    skipSpace();
    entry.shapeAt = static_cast<uint32_t>(at_ - start_);
    if (!accept('[')) invalid(what + ": shape must be an array");
    uint64_t elements = 1;
    bool overflow = false, empty = false;
    if (!accept(']')) {
      do {
        const uint64_t n = number(what + ": shape");
        empty = empty || n == 0;
        overflow = __builtin_mul_overflow(elements, std::max<uint64_t>(n, 1), &elements) || overflow;
        ++entry.rank;
      } while (accept(','));
      expect(']');
    }
    if (empty) return 0;
    if (overflow) invalid(what + ": its shape holds more than 2^64 elements");
    return elements;
  }

  void offsets(SafetensorsHeader::Entry& entry, const std::string& what) {
    if (!accept('[')) invalid(what + ": data_offsets must be an array");
    entry.begin = number(what + ": data_offsets");
    if (!accept(',')) invalid(what + ": data_offsets must hold two numbers");
    entry.end = number(what + ": data_offsets");
    if (!accept(']')) invalid(what + ": data_offsets must hold two numbers");
  }

  void checkSpan(const SafetensorsHeader::Entry& entry, uint64_t elements, const std::string& what) {
    const SafetensorsDType& type = kSafetensorsDTypes[entry.dtype];
    uint64_t bits = 0;
    if (__builtin_mul_overflow(elements, static_cast<uint64_t>(type.bits), &bits) || bits % 8 != 0) {
      invalid(what + ": " + std::to_string(elements) + " elements of " + type.name +
              " are no whole number of bytes below 2^61");
    }
    const std::string span = "data_offsets [" + std::to_string(entry.begin) + ", " + std::to_string(entry.end) + "]";
    if (entry.end < entry.begin) invalid(what + ": " + span + " end before they begin");
    if (entry.end > dataBytes_) {
      invalid(what + ": " + span + " lie beyond the end of the file, which holds " + std::to_string(dataBytes_) +
              " bytes of data");
    }
    if (entry.end - entry.begin != bits / 8) {
      invalid(what + ": " + std::to_string(elements) + " elements of " + type.name + " take " +
              std::to_string(bits / 8) + " bytes, but " + span + " span " + std::to_string(entry.end - entry.begin));
    }
  }

  template <class Item, class Key>
  void refuseTwice(const std::deque<Item>& items, Key key, const char* what) {
    std::vector<uint32_t> order = indices(items.size());
    const auto name = [&](uint32_t i) { return header_.view(key(items[i])); };
    std::sort(order.begin(), order.end(), [&](uint32_t a, uint32_t b) { return name(a) < name(b); });
    for (size_t i = 1; i < order.size(); ++i) {
      if (name(order[i - 1]) == name(order[i]))
        invalid("its header holds " + (what + quoted(name(order[i]))) + " twice");
    }
  }

  /// Sorted by place, each tensor begins where the one before ends, and the last ends with the file.
  void checkCover() {
    const auto& entries = header_.entries_;
    std::vector<uint32_t> order = indices(entries.size());
    std::sort(order.begin(), order.end(), [&](uint32_t a, uint32_t b) {
      return std::pair(entries[a].begin, entries[a].end) < std::pair(entries[b].begin, entries[b].end);
    });
    uint64_t covered = 0;
    for (uint32_t i : order) {
      if (entries[i].begin != covered) {
        invalid(
            "tensor " + quoted(header_.view(entries[i].name)) + " begins at byte " + std::to_string(entries[i].begin) +
            (entries[i].begin < covered ? ", inside the one before it, which ends at " : ", leaving a hole behind ") +
            std::to_string(covered));
      }
      covered = entries[i].end;
    }
    if (covered != dataBytes_) {
      invalid("its tensors end at byte " + std::to_string(covered) + " of the data, but the file holds " +
              std::to_string(dataBytes_));
    }
  }

  static std::vector<uint32_t> indices(size_t count) {
    std::vector<uint32_t> order(count);
    std::iota(order.begin(), order.end(), 0u);
    return order;
  }

  SafetensorsHeader& header_;
  char* const start_;
  char* const end_;
  char* at_;
  const uint64_t dataBytes_;
};

uint32_t safetensorsHeaderLength(const unsigned char* prefix, uint64_t fileBytes) {
  if (fileBytes < 8) invalid("it has " + std::to_string(fileBytes) + " bytes, too few for a safetensors file");
  uint64_t length = 0;
  for (int i = 7; i >= 0; --i) length = length << 8 | prefix[i];
  if (length > kMaxSafetensorsHeader) {
    invalid("its header claims " + std::to_string(length) + " bytes; at most " + std::to_string(kMaxSafetensorsHeader) +
            " are allowed");
  }
  if (length > fileBytes - 8) {
    invalid("its header claims " + std::to_string(length) + " bytes, but the file has only " +
            std::to_string(fileBytes) + ": it is cut short");
  }
  return static_cast<uint32_t>(length);
}

SafetensorsHeader::SafetensorsHeader(std::unique_ptr<char[]> text, uint32_t length, uint64_t dataBytes)
    : text_(std::move(text)) {
  SafetensorsParser(*this, length, dataBytes).parse();
}

std::vector<uint64_t> SafetensorsHeader::shape(const Entry& entry) const {
  std::vector<uint64_t> dims(entry.rank);
  const char* at = text_.get() + entry.shapeAt;
  for (uint64_t& n : dims) {
    while (*at < '0' || *at > '9') ++at;
    for (; *at >= '0' && *at <= '9'; ++at) n = n * 10 + static_cast<uint64_t>(*at - '0');
  }
  return dims;
}

}  // namespace qlora
