// A ring's address for other processes of the same user in the same pid namespace: "pid:fd:id". The id is the ring's
// own, for after a close the descriptor may be anything's.
#pragma once

#include <fcntl.h>
#include <sys/random.h>

#include <charconv>
#include <cstdint>
#include <string>
#include <string_view>

#include "kdflow/errors.hpp"
#include "kdflow/segment.hpp"

namespace kdflow {

struct Handle {
  int pid;
  int fd;
  std::uint64_t id;

  static Handle parse(std::string_view text) {
    Handle handle{};
    std::string_view rest = text;
    const bool parsed = take(rest, handle.pid, ':') && take(rest, handle.fd, ':') && take(rest, handle.id, '\0', 16);
    if (parsed && handle.pid > 0 && handle.fd >= 0) return handle;
    throw std::invalid_argument("ring handle: expected \"pid:fd:id\", got \"" + std::string(text) + "\"");
  }

  std::string text() const {
    char hex[16];
    const auto [end, error] = std::to_chars(hex, hex + sizeof hex, id, 16);
    return std::to_string(pid) + ":" + std::to_string(fd) + ":" + std::string(hex, end);
  }

  UniqueFd open() const {
    const std::string path = "/proc/" + std::to_string(pid) + "/fd/" + std::to_string(fd);
    UniqueFd opened(::open(path.c_str(), O_RDWR | O_CLOEXEC | O_NOCTTY | O_NONBLOCK));  // it may be a terminal by now
    if (opened) return opened;
    throw_errno("cannot open ring handle " + text() +
                "; its process must be running, have the ring open, and be of the same user and pid namespace");
  }

  [[noreturn]] void throw_stale(const std::string& found) const {
    throw TransportError("ring handle " + text() + ": its process has closed that ring, found " + found +
                         " in its place; ask for the handle of a ring that is open");
  }

 private:
  template <typename Number>
  static bool take(std::string_view& rest, Number& number, char end, int base = 10) {
    const auto [stop, error] = std::from_chars(rest.data(), rest.data() + rest.size(), number, base);
    rest.remove_prefix(static_cast<std::size_t>(stop - rest.data()));
    if (error != std::errc{} || rest.empty() != (end == '\0') || (end != '\0' && rest.front() != end)) return false;
    if (end != '\0') rest.remove_prefix(1);
    return true;
  }
};

inline std::uint64_t random_id() {
  std::uint64_t id = 0;
  if (::getrandom(&id, sizeof id, 0) != static_cast<ssize_t>(sizeof id)) throw_errno("getrandom");
  return id;
}

}  // namespace kdflow
