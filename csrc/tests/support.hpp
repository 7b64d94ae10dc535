// What the ring's tests share: small rings, records whose bytes tell their ticket, children to kill.
#pragma once

#include <sys/prctl.h>
#include <sys/wait.h>
#include <unistd.h>

#include <chrono>
#include <csignal>
#include <functional>

#include "check.hpp"
#include "kdflow/ring.hpp"

namespace support {

using namespace kdflow;
using namespace std::chrono_literals;

inline const AttachOptions kQuick{.guard = false, .tick = 2ms};

inline Ring make_ring(std::uint64_t num_slots = 4, std::uint64_t slot_bytes = 256, RingKind kind = RingKind::data,
                      bool checksum = false) {
  return Ring::create(
      {.name = "test", .kind = kind, .num_slots = num_slots, .slot_bytes = slot_bytes, .checksum = checksum});
}

inline Ring join(const Ring& ring, Role role, const AttachOptions& options = kQuick) {
  return Ring::attach(ring.slots().segment(), role, options);
}

inline Wait within(std::chrono::nanoseconds timeout) { return Wait{.timeout = timeout}; }

inline std::byte pattern(std::uint64_t ticket, std::uint64_t i) {
  return static_cast<std::byte>((ticket * 31 + i * 7 + 1) & 0xff);
}

inline void fill(Lease& lease, std::uint64_t nbytes) {
  const auto extent = static_cast<std::int64_t>(nbytes);
  lease.shape(1, 8, {&extent, 1});
  for (std::uint64_t i = 0; i < nbytes; ++i) lease.data()[i] = pattern(lease.ticket(), i);
}

inline bool intact(const Lease& lease) {
  for (std::uint64_t i = 0; i < lease.record.nbytes; ++i) {
    if (lease.data()[i] != pattern(lease.ticket(), i)) return false;
  }
  return lease.record.ticket == lease.ticket();
}

inline void write_one(const Ring& ring, Ring::Ticket ticket, std::uint64_t nbytes = 100) {
  Lease lease = ring.reserve(ticket, within(10s));
  fill(lease, nbytes);
  lease.commit();
}

inline std::uint64_t read_one(const Ring& ring, Ring::Ticket ticket) {
  Lease lease = ring.receive(ticket, within(10s));
  CHECK(intact(lease));
  lease.release();
  return lease.ticket();
}

// Runs body in a child; it ends there, whatever happens, and never outlives the test.
inline pid_t spawn(const std::function<void()>& body) {
  const pid_t pid = ::fork();
  if (pid != 0) return pid;
  ::prctl(PR_SET_PDEATHSIG, SIGKILL);
  try {
    body();
  } catch (const std::exception& error) {
    check::fail("child", 0, error.what());
  }
  std::_Exit(0);
}

// Exit status of the child; 128 + signal when it was killed.
inline int join_child(pid_t pid) {
  int status = 0;
  while (::waitpid(pid, &status, 0) < 0 && errno == EINTR) {
  }
  return WIFSIGNALED(status) ? 128 + WTERMSIG(status) : WEXITSTATUS(status);
}

}  // namespace support
