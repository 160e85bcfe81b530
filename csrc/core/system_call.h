// What every system call here needs.
#pragma once

#include <cerrno>
#include <string>
#include <system_error>

namespace qlora {

inline std::string describe(int error) { return std::system_category().message(error); }

inline bool isDiskFull(int error) { return error == ENOSPC || error == EDQUOT; }

/// The call again as long as a signal interrupts it.
template <class Call>
auto retry(Call&& call) {
  auto result = call();
  while (result < 0 && errno == EINTR) result = call();
  return result;
}

}  // namespace qlora
