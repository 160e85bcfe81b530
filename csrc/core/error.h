// Errors with a stable code. They cross into JavaScript as QLoRAError, in one place (napi/bind.h).
#pragma once

#include <cstdarg>
#include <cstdio>
#include <stdexcept>
#include <string>
#include <utility>

namespace qlora {

class Error : public std::runtime_error {
 public:
  Error(std::string code, const std::string& message, std::string hint = {})
      : std::runtime_error(message), code(std::move(code)), hint(std::move(hint)) {}

  const std::string code;  // "ERR_QLORA_..."
  const std::string hint;  // what to do about it; may be empty
};

/// Throws an Error whose message is formatted as printf does.
[[noreturn]] __attribute__((format(printf, 2, 3))) inline void fail(const char* code, const char* format, ...) {
  char message[1024];
  va_list arguments;
  va_start(arguments, format);
  std::vsnprintf(message, sizeof message, format, arguments);
  va_end(arguments);
  throw Error(code, message);
}

}  // namespace qlora
