// A descriptor for select/poll/asyncio that is readable when something may be received.
//
// An eventfd cannot be opened through /proc, so it cannot be handed to producers by a handle. It
// need not be: a thread of the consumer sleeps on the ring's bell and feeds an eventfd of its own
// process. Producers pay nothing.
#pragma once

#include <sys/eventfd.h>
#include <unistd.h>

#include <atomic>
#include <memory>
#include <thread>

#include "kdflow/ring.hpp"

namespace kdflow {

class Notifier {
 public:
  explicit Notifier(std::shared_ptr<Ring> ring)
      : ring_(std::move(ring)),
        eventfd_(::eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK)),
        pid_(::getpid()) {
    if (!eventfd_) throw_errno(ring_->name() + ": eventfd");
    signal();  // what was committed before
    thread_ = std::make_unique<std::thread>([this] { run(); });
  }

  ~Notifier() {
    if (::getpid() != pid_) {  // forked: the thread does not exist here
      static_cast<void>(thread_.release());
      return;
    }
    stop_.store(true, std::memory_order_release);
    ring_->ring_bell();
    thread_->join();
  }

  int fd() const { return eventfd_.get(); }

  // Call before looking into the ring, so that whatever comes later makes the descriptor readable
  // again.
  void clear() const {
    std::uint64_t count;
    static_cast<void>(!::read(fd(), &count, sizeof count));
  }

 private:
  void run() {
    std::uint32_t seen = ring_->bell();
    while (!stop_.load(std::memory_order_acquire)) {
      ring_->wait_bell(seen);
      try {
        if (ring_->bell() == seen) ring_->look_after_peers(Role::consumer);
      } catch (const TransportError&) {  // the consumer's next call meets it too
        signal();
        return;
      }
      if (ring_->bell() == seen) continue;
      seen = ring_->bell();
      signal();
    }
  }

  void signal() const {
    const std::uint64_t one = 1;
    static_cast<void>(!::write(fd(), &one, sizeof one));
  }

  std::shared_ptr<Ring> ring_;
  UniqueFd eventfd_;
  pid_t pid_;
  std::atomic<bool> stop_{false};
  std::unique_ptr<std::thread> thread_;
};

}  // namespace kdflow
