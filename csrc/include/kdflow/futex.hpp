// Sleeping on a word of shared memory, across processes.
#pragma once

#include <linux/futex.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <climits>
#include <cstdint>

namespace kdflow {

using Clock = std::chrono::steady_clock;

inline void cpu_relax() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// How long to spin before sleeping: twice as long as recent waits took, if that is short; next to nothing otherwise.
// A stream of records is then met without a system call, and a wait that will be long burns only kMin. kMax lies above
// what sleeping and waking take between cores (50 to 150 us where an idle virtual core halts): below it, a wait that
// slept would count as one too long to spin for, so that the next slept too, and a stream once broken stayed slow.
class SpinBudget {
 public:
  static constexpr std::chrono::microseconds kMin{2}, kMax{250};

  explicit SpinBudget(std::chrono::nanoseconds most = kMax) : most_(most) {}

  std::chrono::nanoseconds get() const { return std::chrono::nanoseconds(ns_.load(std::memory_order_relaxed)); }

  void learn(std::chrono::nanoseconds waited) {
    const std::chrono::nanoseconds now = get();
    const std::chrono::nanoseconds next = waited <= most_ ? std::max(2 * waited, (now + 2 * waited) / 2) : now / 2;
    ns_.store(std::clamp<std::chrono::nanoseconds>(next, kMin, most_).count(), std::memory_order_relaxed);
  }

 private:
  const std::chrono::nanoseconds most_;
  std::atomic<std::int64_t> ns_{std::chrono::nanoseconds(kMin).count()};
};

// Returns on a wake, a changed word, a signal or the timeout: the caller looks again in every case.
inline void futex_wait(const void* word, std::uint32_t expected, std::chrono::nanoseconds timeout) {
  const auto seconds = std::chrono::duration_cast<std::chrono::seconds>(timeout);
  const timespec limit{seconds.count(), (timeout - seconds).count()};
  ::syscall(SYS_futex, word, FUTEX_WAIT, expected, &limit, nullptr, 0);
}

inline void futex_wake_all(const void* word) { ::syscall(SYS_futex, word, FUTEX_WAKE, INT_MAX, nullptr, nullptr, 0); }

}  // namespace kdflow
