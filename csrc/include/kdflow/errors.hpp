// Errors of the ring. Misuse that names an argument is std::invalid_argument; the rest is one of
// these.
#pragma once

#include <cerrno>
#include <cstdint>
#include <cstring>
#include <optional>
#include <stdexcept>
#include <string>

namespace kdflow {

struct TransportError : std::runtime_error {
  explicit TransportError(const std::string& what, std::optional<std::uint64_t> ticket = std::nullopt)
      : std::runtime_error(what), ticket(ticket) {}
  std::optional<std::uint64_t> ticket;
};

struct PeerDied : TransportError {
  using TransportError::TransportError;
};
struct RingTimeout : TransportError {
  using TransportError::TransportError;
};
struct RingCorrupt : TransportError {
  using TransportError::TransportError;
};
// The writer is alive and gave the slot up: its own message is in what().
struct SlotAborted : TransportError {
  using TransportError::TransportError;
};

[[noreturn]] inline void throw_errno(const std::string& what) {
  throw TransportError(what + ": " + std::strerror(errno));
}

}  // namespace kdflow
