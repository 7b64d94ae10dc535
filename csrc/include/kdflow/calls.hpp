// Calls in flight on an object that may be closed meanwhile: by another thread, or by a signal handler below one of
// them. The last to go, a call or the owner, does what closing does; so nothing goes away under a call, and no close
// waits for the call that it runs in.
#pragma once

#include <atomic>
#include <chrono>
#include <cstdint>
#include <functional>
#include <thread>
#include <utility>

#include "kdflow/futex.hpp"

namespace kdflow {

class Calls {
 public:
  // `last` runs once, when the object is closed and no call is left. It must not throw.
  explicit Calls(std::function<void()> last) : last_(std::move(last)) {}

  // Puts the end off while it lives. Not entered: all is over.
  class Hold {
   public:
    explicit Hold(Calls& calls) : calls_(calls), entered_(calls.enter()) {}
    ~Hold() {
      if (entered_) calls_.leave();
    }
    Hold(const Hold&) = delete;
    bool entered() const { return entered_; }

   protected:
    Calls& calls_;

   private:
    const bool entered_;
  };

  // A call of this thread.
  class Scope : public Hold {
   public:
    explicit Scope(Calls& calls) : Hold(calls), outer_(std::exchange(innermost, this)) {}
    ~Scope() { innermost = outer_; }

   private:
    friend class Calls;
    static inline thread_local const Scope* innermost = nullptr;
    const Scope* const outer_;
  };

  void open() {
    over_.store(false, std::memory_order_relaxed);
    owned_.store(true, std::memory_order_relaxed);
    users_.store(1, std::memory_order_relaxed);
    open_.store(true, std::memory_order_release);
  }
  bool is_open() const { return open_.load(std::memory_order_acquire); }

  // New calls are to be refused, and those that wait look at is_open() once a tick.
  void stop() { open_.store(false, std::memory_order_release); }

  // Waits for other threads' calls. False: some go on, or this thread is in one; the end comes with the last of them.
  bool close(std::chrono::nanoseconds timeout) {
    stop();
    if (owned_.exchange(false, std::memory_order_acq_rel)) leave();
    const auto deadline = Clock::now() + timeout;
    while (!over_.load(std::memory_order_acquire)) {
      if (within() || Clock::now() >= deadline) return false;
      std::this_thread::sleep_for(std::chrono::microseconds(100));
    }
    return true;
  }

  // Is this thread in a call?
  bool within() const {
    for (const Scope* scope = Scope::innermost; scope != nullptr; scope = scope->outer_) {
      if (&scope->calls_ == this) return true;
    }
    return false;
  }

 private:
  bool enter() {
    std::uint32_t users = users_.load(std::memory_order_acquire);
    while (users != 0 && !users_.compare_exchange_weak(users, users + 1, std::memory_order_acq_rel)) {
    }
    return users != 0;
  }
  void leave() {
    if (users_.fetch_sub(1, std::memory_order_acq_rel) != 1) return;
    last_();
    over_.store(true, std::memory_order_release);
  }

  const std::function<void()> last_;
  std::atomic<std::uint32_t> users_{0};  // calls, and the owner until it closes; 0 before open() and when all is over
  std::atomic<bool> owned_{false}, open_{false}, over_{true};
};

}  // namespace kdflow
