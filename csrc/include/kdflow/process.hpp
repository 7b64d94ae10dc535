// Is that process still the one we knew? pidfd where the kernel has it, start time to tell a reused
// pid.
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
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <optional>
#include <string>

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

struct ProcessStat {
  char state;
  std::uint64_t start_time;
  bool running() const { return state != 'Z' && state != 'X'; }
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
  // "pid (name) state ppid ...": the name may hold anything, so count fields from the last
  // parenthesis; field 22.
  const char* cursor = std::strrchr(text, ')');
  if (cursor == nullptr || cursor[1] != ' ') return std::nullopt;
  const char state = cursor[2];
  for (int field = 2; field < 22 && cursor != nullptr; ++field) cursor = std::strchr(cursor + 1, ' ');
  if (cursor == nullptr) return std::nullopt;
  return ProcessStat{state, std::strtoull(cursor, nullptr, 10)};
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
  bool alive(std::size_t index, PeerIdentity identity, std::uint64_t start_time) {
    const std::int32_t pid = identity.pid();
    // While a peer is still attaching, its start time is its predecessor's, and its pid is all we know.
    const bool known = identity.state() == PeerIdentity::State::live && start_time != 0;
    if (pid == self_pid_ && pid == current_pid()) {  // in a forked child it is the parent's
      return !known || self_start_ == 0 || start_time == self_start_;
    }
    if (pid <= 0) return false;
    const std::scoped_lock lock(mutex_);
    Watched& watched = watched_[index];
    if (watched.identity != identity) {
      UniqueFd pidfd(open_pidfd(pid));
      if (!pidfd && errno == ESRCH) return false;
      // The pidfd first, then the start time: the pid cannot change hands in between.
      const std::optional<bool> same = is_running(pid, known, start_time);
      if (!same.value_or(false)) return !same && exists(pid);
      watched = Watched{identity, std::move(pidfd)};
    }
    if (watched.pidfd) {
      pollfd poll{watched.pidfd.get(), POLLIN, 0};
      return ::poll(&poll, 1, 0) <= 0;
    }
    // No pidfd: an old kernel, a sandbox, or no descriptor left.
    const std::optional<bool> same = is_running(pid, known, start_time);
    return same ? *same : exists(pid);
  }

  std::int32_t self_pid() const { return self_pid_; }
  std::uint64_t self_start() const { return self_start_; }

 private:
  struct Watched {
    PeerIdentity identity;
    UniqueFd pidfd;
  };

  static int open_pidfd(std::int32_t pid) { return static_cast<int>(::syscall(SYS_pidfd_open, pid, 0)); }

  // nullopt: /proc does not tell, as when no descriptor is left.
  static std::optional<bool> is_running(std::int32_t pid, bool known, std::uint64_t start_time) {
    if (const auto stat = process_stat(pid)) return stat->running() && (!known || stat->start_time == start_time);
    if (errno == ENOENT || errno == ESRCH) return false;
    return std::nullopt;
  }

  // In doubt yes: one who lives and is taken for dead writes into a slot that gets a second writer.
  static bool exists(std::int32_t pid) { return ::kill(pid, 0) == 0 || errno != ESRCH; }

  std::int32_t self_pid_ = ::getpid();
  std::uint64_t self_start_ = process_stat(::getpid()).value_or(ProcessStat{}).start_time;
  std::mutex mutex_;
  std::array<Watched, kMaxPeers> watched_;
};

}  // namespace kdflow
