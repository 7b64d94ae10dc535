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
#include <memory>
#include <mutex>
#include <optional>
#include <span>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "kdflow/cuda/device.hpp"
#include "kdflow/lease.hpp"

namespace kdflow::cuda {

enum class Ending { commit, abort, release };

class Completer {
 public:
  Completer(std::shared_ptr<const Device> device, std::uint64_t num_slots)
      : device_(std::move(device)), work_(std::make_unique<Work[]>(num_slots)), num_slots_(num_slots) {
    const Device::Scope scope(*device_);
    try {
      for (Work& work : slots()) device_->driver().cuEventCreate(&work.event, kEventDisableTiming);
    } catch (...) {
      destroy_events();
      throw;
    }
    incoming_.reserve(num_slots);
    open_.reserve(num_slots);
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
    try {
      const Device::Scope scope(*device_);
      destroy_events();
    } catch (const TransportError&) {  // the context is broken, and its events with it
    }
  }
  Completer(const Completer&) = delete;

  // Ends a lease when the stream has passed this point. The device's context is current. When it throws, the lease is
  // still the caller's.
  void submit(Lease&& lease, Ending ending, const std::string& reason, StreamHandle stream) {
    Work& work = work_[lease.member()->slots.slot_of(lease.ticket())];
    if (work.open.load(std::memory_order_acquire)) {
      throw RingCorrupt(lease.member()->slots.name() + ": a slot was granted while work on it is still running",
                        lease.ticket());
    }
    device_->driver().cuEventRecord(work.event, stream);
    work.lease.emplace(std::move(lease));
    work.ending = ending;
    work.reason = reason;
    work.stream = stream;
    work.since = Clock::now();
    work.open.store(true, std::memory_order_relaxed);
    {
      const std::scoped_lock lock(mutex_);
      incoming_.push_back(&work);
      ++num_open_;
      has_incoming_.store(true, std::memory_order_release);
      if (!asleep_) return;
    }
    arrived_.notify_one();
  }

  // How long the caller should ask the stream itself before it submits: as long as recent work took, if that is less
  // than what waking the thread takes. Not at all while the thread is awake, nor in a stream of records, whose copies
  // are to overlap with the calls for the next ones.
  std::chrono::nanoseconds patience() {
    const std::int64_t now = Clock::now().time_since_epoch() / std::chrono::nanoseconds(1);
    const std::chrono::nanoseconds gap(now - asked_ns_.exchange(now, std::memory_order_relaxed));
    if (gap < kSparse || !asleep_.load(std::memory_order_relaxed)) return {};
    return std::min<std::chrono::nanoseconds>(work_time_.get(), kWakeUp);
  }
  // Work that the caller saw the end of took that long.
  void learn(std::chrono::nanoseconds took) { work_time_.learn(took); }

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
  // What a slot waits for. Its event is made beforehand, so that no commit fails for want of one; its memory is used
  // again for every lease of the slot.
  struct Work {
    EventHandle event = nullptr;
    std::atomic<bool> open{false};  // from submit until its lease was taken out to be ended
    std::optional<Lease> lease{};
    Ending ending{};
    std::string reason{};  // of an abort
    StreamHandle stream = nullptr;
    Clock::time_point since{};
  };

  std::span<Work> slots() const { return {work_.get(), num_slots_}; }

  void destroy_events() {
    for (const Work& work : slots()) {
      if (work.event != nullptr) device_->driver().cuEventDestroy.status(work.event);
    }
  }

  void run() {
    ::pthread_setname_np(::pthread_self(), "kdflow-cuda");
    ::prctl(PR_SET_TIMERSLACK, 1UL);    // naps of microseconds, not of 50 more
    device_->driver().relax_capture();  // captures forbid cuEventQuery to all threads, unless they say that they may
    const Result current = device_->driver().cuCtxSetCurrent.status(device_->context());
    if (current != kSuccess) fail("cuCtxSetCurrent: " + device_->driver().describe(current));
    SpinBudget budget;        // of how long work takes
    Clock::time_point since;  // when something last ended, or came while nothing was open
    while (accept(since)) {
      const bool ended = poll();
      const Clock::time_point now = Clock::now();
      if (ended) {
        budget.learn(now - since);
        since = now;
      } else {
        rest(now - since, budget.get());
      }
    }
  }

  // Takes over what was submitted; sleeps while there is nothing to do. False: the end.
  bool accept(Clock::time_point& since) {
    const auto called = [this] { return has_incoming_.load(std::memory_order_acquire) || stopping_.load(); };
    const bool idle = open_.empty();
    if (!idle && !called()) return true;
    const Clock::time_point start = Clock::now();
    while (!called() && Clock::now() - start < gaps_.get()) cpu_relax();
    std::unique_lock lock(mutex_);
    if (idle) {
      asleep_ = incoming_.empty();
      arrived_.wait(lock, [this] { return !incoming_.empty() || stopping_; });
      asleep_ = false;
      since = Clock::now();
      gaps_.learn(since - start);
    }
    if (stopping_) return false;
    open_.insert(open_.end(), incoming_.begin(), incoming_.end());
    incoming_.clear();
    has_incoming_.store(false, std::memory_order_relaxed);
    return true;
  }

  // Ends what the GPU is done with. Events of one stream come to pass in order, so it is asked for the first only.
  bool poll() {
    const std::size_t num_before = open_.size();
    busy_.clear();
    std::erase_if(open_, [this](Work* work) {
      if (std::find(busy_.begin(), busy_.end(), work->stream) != busy_.end()) return false;
      const Result result = device_->driver().cuEventQuery.status(work->event);
      if (result == kNotReady) {
        busy_.push_back(work->stream);
        return false;
      }
      end(*work, result);
      return true;
    });
    const std::size_t num_ended = num_before - open_.size();
    if (num_ended == 0) return false;
    const std::scoped_lock lock(mutex_);
    num_open_ -= num_ended;
    if (num_open_ == 0) done_.notify_all();
    return true;
  }

  // Between two polls. Each asks the driver, whose lock the callers' copies need too: so the first is when half of what
  // work took recently is over, and from then on they come after an eighth of the time waited. What ends soon is seen
  // soon, and long work costs little, for it is slept through.
  static void rest(std::chrono::nanoseconds waited, std::chrono::nanoseconds budget) {
    if (waited >= budget) {
      std::this_thread::sleep_for(std::clamp<std::chrono::nanoseconds>(waited / 8, kMinNap, kMaxNap));
      return;
    }
    const auto pause = std::min<std::chrono::nanoseconds>(std::max(budget / 4 - waited, waited / 8), kMaxPause);
    for (const auto start = Clock::now(); Clock::now() - start < pause;) cpu_relax();
  }

  void end(Work& work, Result result) {
    const Ending ending = work.ending;
    work_time_.learn(Clock::now() - work.since);
    const std::string reason = std::move(work.reason);
    Lease lease = std::move(*work.lease);
    work.lease.reset();
    work.open.store(false, std::memory_order_release);  // when the lease ends, the slot may be granted again
    try {
      if (ending == Ending::release) {
        lease.release();
      } else if (ending == Ending::abort || result != kSuccess) {
        lease.abort(result == kSuccess ? reason : "cuEventQuery: " + device_->driver().describe(result));
      } else {
        lease.commit();
      }
    } catch (const TransportError& error) {  // revoked, or the ring is corrupt
      fail(error.what());
    }
    if (result != kSuccess) {
      fail("ticket " + std::to_string(lease.ticket()) +
           ": the work on its slot failed: cuEventQuery: " + device_->driver().describe(result));
    }
  }

  void fail(const std::string& what) {
    const std::scoped_lock lock(mutex_);
    if (!failure_) failure_ = what;
    failed_.store(true, std::memory_order_release);
  }

  static constexpr std::chrono::microseconds kMinNap{2}, kMaxNap{20}, kMaxPause{8}, kWakeUp{25}, kSparse{100};

  std::shared_ptr<const Device> device_;
  std::unique_ptr<Work[]> work_;
  const std::size_t num_slots_;
  std::mutex mutex_;
  std::condition_variable arrived_, done_;
  std::vector<Work*> incoming_;
  std::vector<Work*> open_;         // the thread's, in the order of their coming
  std::vector<StreamHandle> busy_;  // the thread's
  SpinBudget gaps_;                 // between works, with nothing open
  SpinBudget work_time_;
  std::atomic<std::int64_t> asked_ns_{0};
  std::size_t num_open_ = 0;
  std::atomic<bool> asleep_{false};
  std::atomic<bool> stopping_{false};
  std::atomic<bool> has_incoming_{false};
  std::atomic<bool> failed_{false};
  std::optional<std::string> failure_;
  std::unique_ptr<std::thread> thread_;
};

}  // namespace kdflow::cuda
