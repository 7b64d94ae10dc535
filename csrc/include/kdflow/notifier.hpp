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

#include "kdflow/member.hpp"

namespace kdflow {

class Notifier {
 public:
  explicit Notifier(std::shared_ptr<Member> member)
      : member_(std::move(member)), eventfd_(::eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK)), pid_(::getpid()) {
    if (!eventfd_) throw_errno(member_->slots.name() + ": eventfd");
    signal();  // for what was committed before; seen_ was read first, so nothing falls in between
    thread_ = std::make_unique<std::thread>([this] { run(); });
  }

  ~Notifier() {
    if (::getpid() != pid_) {  // forked: the thread does not exist here
      static_cast<void>(thread_.release());
      return;
    }
    stop_.store(true, std::memory_order_release);
    member_->slots.ring_bell();
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
    while (!stop_.load(std::memory_order_acquire)) {
      member_->slots.wait_bell(seen_, member_->options.tick);
      try {
        if (member_->slots.bell() == seen_) member_->look_after_peers();
      } catch (const TransportError&) {  // the consumer's next call meets it too
        signal();
        return;
      }
      if (member_->slots.bell() == seen_) continue;
      seen_ = member_->slots.bell();
      signal();
    }
  }

  void signal() const {
    const std::uint64_t one = 1;
    static_cast<void>(!::write(fd(), &one, sizeof one));
  }

  std::shared_ptr<Member> member_;
  std::uint32_t seen_ = member_->slots.bell();  // the thread's, once it runs
  UniqueFd eventfd_;
  pid_t pid_;
  std::atomic<bool> stop_{false};
  std::unique_ptr<std::thread> thread_;
};

}  // namespace kdflow
