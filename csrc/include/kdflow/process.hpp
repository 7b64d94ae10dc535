// Is that process still the one we knew? pidfd where the kernel has it; /proc to tell a reused pid and another program.
#pragma once

#include <fcntl.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <array>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <iterator>
#include <mutex>
#include <optional>
#include <string>

#include "kdflow/futex.hpp"
#include "kdflow/layout.hpp"
#include "kdflow/segment.hpp"

namespace kdflow {

inline std::atomic<pid_t> known_pid{0};

// getpid() without its system call, which every record would make several times.
inline pid_t current_pid() {
  static const bool follows_forks =
      ::pthread_atfork(nullptr, nullptr, [] { known_pid.store(::getpid(), std::memory_order_relaxed); }) == 0;
  if (!follows_forks) return ::getpid();
  if (const pid_t pid = known_pid.load(std::memory_order_relaxed); pid != 0) return pid;
  known_pid.store(::getpid(), std::memory_order_relaxed);
  return known_pid.load(std::memory_order_relaxed);
}

// Tells processes apart that have one pid after the other, by their start in clock ticks since boot, and programs that
// one process ran after the other by exec(), by the random address where their stack begins. 0: not known.
struct Incarnation {
  std::uint64_t start_time = 0, stack = 0;

  bool may_be(const Incarnation& other) const {
    const auto same = [](std::uint64_t a, std::uint64_t b) { return a == b || a == 0 || b == 0; };
    return same(start_time, other.start_time) && same(stack, other.stack);
  }
};

struct ProcessStat {
  char state = 'X';
  std::uint64_t num_threads = 0;
  Incarnation incarnation{};
  // Where the first thread has ended and others go on, the state is that of a dead process.
  bool running() const { return (state != 'Z' && state != 'X') || num_threads > 1; }
};

// nullopt: errno says why.
inline std::optional<ProcessStat> process_stat(std::int32_t pid) {
  const std::string path = "/proc/" + std::to_string(pid) + "/stat";
  errno = 0;
  const UniqueFd fd(::open(path.c_str(), O_RDONLY | O_CLOEXEC));
  if (!fd) return std::nullopt;
  char text[1024];
  const ssize_t size = ::read(fd.get(), text, sizeof text - 1);
  if (size <= 0) return std::nullopt;
  text[size] = '\0';
  // "pid (name) state ppid ...": the name may hold anything, so fields are counted from the last parenthesis.
  const char* cursor = std::strrchr(text, ')');
  if (cursor == nullptr || cursor[1] != ' ') return std::nullopt;
  const char state = cursor[2];
  std::uint64_t numbers[29] = {};
  ++cursor;
  for (std::size_t field = 4; field < std::size(numbers); ++field) {
    cursor = std::strchr(cursor + 1, ' ');
    if (cursor == nullptr) return std::nullopt;
    numbers[field] = std::strtoull(cursor, nullptr, 10);
  }
  return ProcessStat{state, numbers[20], {numbers[22], numbers[28]}};
}

inline std::uint64_t pid_namespace() {
  struct stat status{};
  return ::stat("/proc/self/ns/pid", &status) == 0 ? static_cast<std::uint64_t>(status.st_ino) : 0;
}

enum class Role : std::uint8_t { producer = 1, consumer = 2 };

constexpr const char* to_string(Role role) { return role == Role::producer ? "producer" : "consumer"; }
constexpr Role other(Role role) { return role == Role::producer ? Role::consumer : Role::producer; }

// One word a peer: bit 0-1 state, 2-3 role, 4-31 epoch (never used twice), 32-63 pid.
class PeerIdentity {
 public:
  enum class State : std::uint8_t { free, claiming, live };

  constexpr explicit PeerIdentity(std::uint64_t word = 0) : word_(word) {}
  constexpr std::uint64_t word() const { return word_; }
  constexpr bool valid() const { return (word_ & 3) < 3; }
  constexpr State state() const { return static_cast<State>(word_ & 3); }
  constexpr bool is_free() const { return state() == State::free; }
  constexpr Role role() const { return static_cast<Role>((word_ >> 2) & 3); }
  constexpr std::int32_t pid() const { return static_cast<std::int32_t>(word_ >> 32); }
  constexpr bool operator==(const PeerIdentity&) const = default;

  constexpr PeerIdentity claimed(Role role, std::int32_t pid) const {
    return PeerIdentity((word_ & kEpoch) | 1 | (static_cast<std::uint64_t>(role) << 2) |
                        (static_cast<std::uint64_t>(static_cast<std::uint32_t>(pid)) << 32));
  }
  constexpr PeerIdentity live() const { return PeerIdentity((word_ & ~std::uint64_t{3}) | 2); }
  constexpr PeerIdentity freed() const { return PeerIdentity(((word_ & kEpoch) + 0x10) & kEpoch); }

 private:
  static constexpr std::uint64_t kEpoch = 0xfffffff0;
  std::uint64_t word_;
};

// Watches the processes behind a peer table. Thread-safe; only slow paths come here.
class ProcessWatch {
 public:
  bool alive(std::size_t index, PeerIdentity identity, Incarnation incarnation) {
    const std::int32_t pid = identity.pid();
    // While a peer is still attaching, the rest is its predecessor's, and its pid is all we know.
    if (identity.state() != PeerIdentity::State::live) incarnation = {};
    if (pid <= 0) return false;
    // In a forked child, where a thread that does not exist may hold the mutex.
    if (current_pid() != self_pid_) return looks_alive(pid, incarnation);
    if (pid == self_pid_) return incarnation.may_be(self_);
    const std::scoped_lock lock(mutex_);
    Watched& watched = watched_[index];
    if (watched.identity != identity) {
      UniqueFd pidfd(open_pidfd(pid));
      if (!pidfd && errno == ESRCH) return false;
      // The pidfd first, then the start time: the pid cannot change hands in between.
      const std::optional<bool> same = is_running(pid, incarnation);
      if (!same.value_or(false)) return !same && exists(pid);
      watched = Watched{identity, std::move(pidfd), Clock::now() + kLookForExec};
    }
    if (watched.pidfd) {
      pollfd poll{watched.pidfd.get(), POLLIN, 0};
      if (::poll(&poll, 1, 0) > 0) return false;
      if (Clock::now() < watched.next_look) return true;
      watched.next_look = Clock::now() + kLookForExec;  // of which a pidfd does not tell
    }
    return looks_alive(pid, incarnation);
  }

  std::int32_t self_pid() const { return self_pid_; }
  const Incarnation& self() const { return self_; }

 private:
  struct Watched {
    PeerIdentity identity;
    UniqueFd pidfd;  // none: an old kernel, a sandbox, or no descriptor left
    Clock::time_point next_look;
  };
  static constexpr std::chrono::seconds kLookForExec{1};

  static int open_pidfd(std::int32_t pid) { return static_cast<int>(::syscall(SYS_pidfd_open, pid, 0)); }

  // nullopt: /proc does not tell, as when no descriptor is left.
  static std::optional<bool> is_running(std::int32_t pid, const Incarnation& incarnation) {
    if (const auto stat = process_stat(pid)) return stat->running() && incarnation.may_be(stat->incarnation);
    if (errno == ENOENT || errno == ESRCH) return false;
    return std::nullopt;
  }

  // In doubt yes: one who lives and is taken for dead writes into a slot that gets a second writer.
  static bool exists(std::int32_t pid) { return ::kill(pid, 0) == 0 || errno != ESRCH; }

  static bool looks_alive(std::int32_t pid, const Incarnation& incarnation) {
    const std::optional<bool> same = is_running(pid, incarnation);
    return same ? *same : exists(pid);
  }

  std::int32_t self_pid_ = ::getpid();
  Incarnation self_ = process_stat(::getpid()).value_or(ProcessStat{}).incarnation;
  std::mutex mutex_;
  std::array<Watched, kMaxPeers> watched_;
};

}  // namespace kdflow
