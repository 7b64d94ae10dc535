// Ends leases in stream order: a record is committed, or a slot released, when the GPU has passed the event that was
// recorded behind the last use of the slot. Until then the slot keeps its phase, so a copy that still runs is never
// published, whoever dies.
//
// A thread polls the events. A host function on the stream (cuLaunchHostFunc) would need no thread of ours, but it
// holds the stream up until it has returned, and it is never called once the context has an error: the slot would stay
// taken and nobody would hear why.
#pragma once

#include <pthread.h>
#include <sys/prctl.h>

#include <algorithm>
#include <condition_variable>
#include <list>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "kdflow/cuda/device.hpp"
#include "kdflow/lease.hpp"

namespace kdflow::cuda {

enum class Ending { commit, abort, release };

struct Work {
  Lease lease;
  Ending ending;
  std::string reason;  // of an abort
  EventHandle event;
  StreamHandle stream;
};

class Completer {
 public:
  explicit Completer(std::shared_ptr<const Device> device) : device_(std::move(device)) {
    thread_ = std::make_unique<std::thread>([this] { run(); });
  }

  // Work that is left is dropped: its leases are given back as those of a peer that leaves.
  ~Completer() {
    if (device_->forked()) {  // the thread does not exist here, and its locks may be held
      static_cast<void>(thread_.release());
      return;
    }
    {
      const std::scoped_lock lock(mutex_);
      stopping_ = true;
    }
    arrived_.notify_one();
    thread_->join();
  }
  Completer(const Completer&) = delete;

  void submit(Work work) {
    {
      const std::scoped_lock lock(mutex_);
      incoming_.push_back(std::move(work));
      ++num_open_;
      has_incoming_.store(true, std::memory_order_release);
      if (!asleep_) return;
    }
    arrived_.notify_one();
  }

  // Whether the thread would have to be woken for the next work.
  bool asleep() const { return asleep_.load(std::memory_order_relaxed); }

  // False: something was still running after the timeout.
  bool drain(std::chrono::nanoseconds timeout) {
    std::unique_lock lock(mutex_);
    return done_.wait_for(lock, timeout, [this] { return num_open_ == 0; });
  }

  // The first thing that went wrong since the last call; what the slots' other side was told, too.
  std::optional<std::string> take_failure() {
    if (!failed_.load(std::memory_order_acquire)) return std::nullopt;
    const std::scoped_lock lock(mutex_);
    failed_.store(false, std::memory_order_relaxed);
    return std::exchange(failure_, std::nullopt);
  }

 private:
  void run() {
    ::pthread_setname_np(::pthread_self(), "kdflow-cuda");
    ::prctl(PR_SET_TIMERSLACK, 1UL);  // naps of microseconds, not of 50 more
    const Result current = device_->driver().cuCtxSetCurrent.status(device_->context());
    if (current != kSuccess) fail("cuCtxSetCurrent: " + device_->driver().describe(current));
    std::list<Work> open;
    SpinBudget budget;
    Clock::time_point since = Clock::now();  // the last time something ended or came
    while (accept(open, budget)) {
      const std::size_t num_ended = poll(open);
      const Clock::time_point now = Clock::now();
      if (num_ended > 0) {
        budget.learn(now - since);
        since = now;
      } else if (now - since < budget.get()) {
        for (int i = 0; i < 16; ++i) cpu_relax();
      } else {
        // A nap is an eighth of the time waited so far: what ends soon is seen soon, long work costs little.
        std::this_thread::sleep_for(std::clamp<std::chrono::nanoseconds>((now - since) / 8, kMinNap, kMaxNap));
      }
    }
  }

  // Takes over what was submitted; sleeps while there is nothing to do. False: the end.
  bool accept(std::list<Work>& open, SpinBudget& budget) {
    const auto called = [this] { return has_incoming_.load(std::memory_order_acquire) || stopping_.load(); };
    if (!open.empty() && !called()) return true;
    for (const auto start = Clock::now(); !called() && Clock::now() - start < budget.get();) cpu_relax();
    std::unique_lock lock(mutex_);
    if (open.empty()) {
      asleep_ = true;
      arrived_.wait(lock, [this] { return !incoming_.empty() || stopping_; });
      asleep_ = false;
    }
    if (stopping_) return false;
    open.splice(open.end(), incoming_);
    has_incoming_.store(false, std::memory_order_relaxed);
    return true;
  }

  // Ends what the GPU is done with. Events of one stream come to pass in order, so it is asked for the first only.
  std::size_t poll(std::list<Work>& open) {
    std::size_t num_ended = 0;
    busy_.clear();
    for (auto work = open.begin(); work != open.end();) {
      if (std::find(busy_.begin(), busy_.end(), work->stream) != busy_.end()) {
        ++work;
        continue;
      }
      const Result result = device_->driver().cuEventQuery.status(work->event);
      if (result == kNotReady) {
        busy_.push_back(work->stream);
        ++work;
        continue;
      }
      end(*work, result);
      work = open.erase(work);
      ++num_ended;
    }
    if (num_ended > 0) {
      const std::scoped_lock lock(mutex_);
      num_open_ -= num_ended;
      if (num_open_ == 0) done_.notify_all();
    }
    return num_ended;
  }

  void end(Work& work, Result result) {
    try {
      if (work.ending == Ending::release) {
        work.lease.release();
      } else if (work.ending == Ending::abort || result != kSuccess) {
        work.lease.abort(result == kSuccess ? work.reason : "cuEventQuery: " + device_->driver().describe(result));
      } else {
        work.lease.commit();
      }
    } catch (const TransportError& error) {  // revoked, or the ring is corrupt
      fail(error.what());
    }
    if (result != kSuccess) {
      fail("ticket " + std::to_string(work.lease.ticket()) +
           ": the work on its slot failed: cuEventQuery: " + device_->driver().describe(result));
    }
  }

  void fail(const std::string& what) {
    const std::scoped_lock lock(mutex_);
    if (!failure_) failure_ = what;
    failed_.store(true, std::memory_order_release);
  }

  static constexpr std::chrono::microseconds kMinNap{2}, kMaxNap{20};

  std::shared_ptr<const Device> device_;
  std::mutex mutex_;
  std::condition_variable arrived_, done_;
  std::list<Work> incoming_;
  std::vector<StreamHandle> busy_;  // the thread's
  std::size_t num_open_ = 0;
  std::atomic<bool> asleep_{false};
  std::atomic<bool> stopping_{false};
  std::atomic<bool> has_incoming_{false};
  std::atomic<bool> failed_{false};
  std::optional<std::string> failure_;
  std::unique_ptr<std::thread> thread_;
};

}  // namespace kdflow::cuda
