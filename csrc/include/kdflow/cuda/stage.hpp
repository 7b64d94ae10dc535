// A ring whose slots a device writes and reads: the ring of ring.hpp decides who holds a slot, and this adds the memory
// behind it and the order of the streams.
//
// Tear-down, producer: what it holds is given up, running work is waited for, the slab is unmapped, and only then does
// it leave the ring. Consumer: it withdraws the slab and leaves, waits until the producers are gone, and frees it; a
// producer that stays keeps the slab alive until this process ends, for freeing it under a mapping is undefined.
#pragma once

#include <atomic>
#include <chrono>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "kdflow/cuda/completer.hpp"
#include "kdflow/cuda/memory.hpp"
#include "kdflow/ring.hpp"

namespace kdflow::cuda {

class Stage;

// A held slot. Every way of giving it back waits for the stream first, the destructor's too.
class StreamLease {
 public:
  StreamLease(std::shared_ptr<Stage> stage, Lease held, StreamHandle on, std::shared_ptr<Memory> memory);
  StreamLease(StreamLease&&) noexcept = default;
  ~StreamLease();

  bool held() const { return lease.held(); }
  DevicePtr address() const { return address_; }
  const std::shared_ptr<Memory>& memory() const { return memory_; }

  void copy_from(DevicePtr source, std::uint64_t nbytes) { copy(address_, source, source, nbytes); }
  void copy_to(DevicePtr target, std::uint64_t nbytes) const { copy(target, address_, target, nbytes); }

  void commit() {
    require_usable();
    if (lease.record.dtype_bits == 0) {
      throw std::invalid_argument(lease.member()->describe("reserve", lease.ticket()) +
                                  ": nothing was written; give it a shape");
    }
    finish(Ending::commit, {});
  }
  void abort(const std::string& reason) { finish(Ending::abort, reason); }
  void release() { finish(Ending::release, {}); }

  Lease lease;
  StreamHandle stream;  // that of the last use

 private:
  void require_usable() const;
  bool stream_is_done() const;
  void copy(DevicePtr target, DevicePtr source, DevicePtr of_user, std::uint64_t nbytes) const;
  void finish(Ending ending, const std::string& reason);

  std::shared_ptr<Stage> stage_;
  std::shared_ptr<Memory> memory_;
  DevicePtr address_;
};

// One event a slot, made beforehand: no commit can fail for want of one.
class SlotEvents {
 public:
  SlotEvents(std::shared_ptr<const Device> device, std::uint64_t count) : device_(std::move(device)) {
    const Device::Scope scope(*device_);
    try {
      for (events_.reserve(count); events_.size() < count;) {
        EventHandle event = nullptr;
        device_->driver().cuEventCreate(&event, kEventDisableTiming);
        events_.push_back(event);
      }
    } catch (...) {
      destroy();
      throw;
    }
  }
  ~SlotEvents() {
    if (device_->forked()) return;
    try {
      const Device::Scope scope(*device_);
      destroy();
    } catch (const TransportError&) {  // the context is broken, and its events with it
    }
  }
  SlotEvents(const SlotEvents&) = delete;

  EventHandle operator[](std::uint64_t slot) const { return events_[slot]; }

 private:
  void destroy() {
    for (const EventHandle event : events_) device_->driver().cuEventDestroy.status(event);
  }

  std::shared_ptr<const Device> device_;
  std::vector<EventHandle> events_;
};

class Stage : public std::enable_shared_from_this<Stage> {
 public:
  Stage(Ring ring, int ordinal)
      : ring_(std::move(ring)),
        role_(ring_.member()->require_joined().identity.role()),
        device_(std::make_shared<const Device>(ordinal)),
        events_(std::make_unique<SlotEvents>(device_, slots().count())) {
    if (!in_device_memory()) {
      memory_ = std::make_shared<PinnedPayload>(device_, slots());
    } else if (role_ == Role::consumer) {
      own_slab();
    }
    completer_ = std::make_unique<Completer>(device_);
  }
  ~Stage() {
    try {
      close(std::chrono::seconds(10), std::chrono::seconds(0));
    } catch (const TransportError&) {  // the GPU still works on the slots: what it uses stays, as does the thread
      static_cast<void>(completer_.release());
      static_cast<void>(events_.release());
      static_cast<void>(new std::shared_ptr<Memory>(memory_));
    }
  }

  const Device& device() const { return *device_; }
  bool in_device_memory() const { return slots().header().placement == Placement::device; }
  Completer& completer() { return *completer_; }

  StreamLease reserve(Ring::Ticket ticket, const Wait& wait, StreamHandle stream) {
    begin(stream);
    if (in_device_memory()) use_slab(wait);
    return hold(ring_.reserve(ticket, wait), stream);
  }
  StreamLease receive(Ring::Ticket ticket, const Wait& wait, StreamHandle stream) {
    begin(stream);
    return hold(ring_.receive(ticket, wait), stream);
  }
  std::optional<StreamLease> try_receive(Ring::Ticket ticket, StreamHandle stream) {
    begin(stream);
    auto lease = ring_.try_receive(ticket);
    if (!lease) return std::nullopt;
    return hold(std::move(*lease), stream);
  }

  // Waits until what was committed or released so far has come to pass.
  void drain(std::chrono::nanoseconds timeout) {
    if (!completer_->drain(timeout)) {
      throw RingTimeout(slots().name() + ": work on its slots is still running after " +
                        std::to_string(std::chrono::duration<double>(timeout).count()) + " s");
    }
    throw_failure();
  }

  // True: everything was given back. False: a producer still maps the slab, which is therefore kept until this process
  // ends. Throws RingTimeout, and closes nothing, while work is still running after `timeout`.
  bool close(std::chrono::nanoseconds timeout, std::chrono::nanoseconds grace) {
    if (closed_ || device_->forked()) return true;
    if (!completer_->drain(timeout)) {
      throw RingTimeout(slots().name() + ": cannot close, work on its slots is still running");
    }
    closed_ = true;
    const std::shared_ptr<const Device> device = std::move(device_);
    const Device::Scope scope(*device);
    // Work on slots that were neither committed nor released: nothing of it may run when they get another owner.
    if (num_held_.load() > 0) device->driver().cuCtxSynchronize.status();
    completer_.reset();
    events_.reset();
    const bool owner = in_device_memory() && role_ == Role::consumer;
    if (owner) slab_descriptor(slots()).state.store(SlabDescriptor::withdrawn, std::memory_order_release);
    if (!owner) memory_.reset();
    ring_.close();
    if (!owner) return true;
    const bool alone = wait_for_producers_to_leave(grace);
    if (!alone) static_cast<void>(new std::shared_ptr<Memory>(memory_));  // on purpose: see above
    memory_.reset();
    return alone;
  }

  void throw_failure() {
    if (const auto failure = completer_->take_failure()) throw CudaError(slots().name() + ": " + *failure);
  }

 private:
  friend class StreamLease;

  const Slots& slots() const { return ring_.slots(); }

  void require_open() const {
    if (closed_) throw TransportError(slots().name() + ": this ring is closed");
    if (device_->forked()) {
      throw TransportError(slots().name() + ": CUDA does not work in a forked child; start it with spawn");
    }
  }

  void begin(StreamHandle stream) {
    require_open();
    throw_failure();
    device_->require_own(stream);
  }

  StreamLease hold(Lease lease, StreamHandle stream) {
    return StreamLease(shared_from_this(), std::move(lease), stream, memory_);
  }

  void own_slab() {
    if (slab_descriptor(slots()).state.load(std::memory_order_acquire) != SlabDescriptor::none) {
      throw TransportError(slots().name() +
                           ": its device memory went with the consumer that owned it; create another ring");
    }
    const auto slab = std::make_shared<OwnedSlab>(device_, slots());
    slab->publish(slab, slots());
    memory_ = slab;
  }

  // Producer: opens the slab once, then makes sure before every slot that its owner is alive.
  void use_slab(const Wait& wait) {
    Member& member = *ring_.member();
    const std::scoped_lock lock(slab_mutex_);
    if (memory_ == nullptr) {
      const Clock::time_point deadline = Clock::now() + wait.timeout;
      while (slab_descriptor(slots()).state.load(std::memory_order_acquire) == SlabDescriptor::none) {
        if (Clock::now() >= deadline) {
          throw RingTimeout(slots().name() + ": reserve: no consumer has made its device memory known in time; " +
                            member.describe_living(Role::consumer));
        }
        slots().wait_bell(slots().bell(), member.options.tick);
        wait.on_tick();
      }
      for (const Peer& peer : member.living()) {
        if (peer.identity.role() == Role::consumer) owner_ = peer;
      }
      require_owner();
      open_slab();
    }
    require_owner();
  }

  void open_slab() {
    SlabDescriptor descriptor{};
    read_descriptor(slots(), owner_->identity.pid(), descriptor);
    if (descriptor.pid == ::getpid()) {
      auto local = OwnedSlab::find_local(descriptor.handle);
      if (local == nullptr) throw RingCorrupt(slots().name() + ": this process does not know the slab it exported");
      memory_ = std::make_shared<LocalSlab>(device_, std::move(local));
    } else {
      memory_ = std::make_shared<OpenedSlab>(device_, descriptor);
    }
  }

  void require_owner() {
    PeerTable& table = ring_.member()->table;
    const bool withdrawn = slab_descriptor(slots()).state.load(std::memory_order_acquire) != SlabDescriptor::exported;
    if (!withdrawn && owner_ && table.holds(*owner_) && table.alive(*owner_)) return;
    throw PeerDied(slots().name() + ": reserve: the consumer that owns the device memory " +
                   (withdrawn ? "has closed the ring" : "died") + "; close this end too");
  }

  bool wait_for_producers_to_leave(std::chrono::nanoseconds grace) {
    for (const Clock::time_point deadline = Clock::now() + grace; ring_.member()->has_live(Role::producer);) {
      if (Clock::now() >= deadline) return false;
      std::this_thread::sleep_for(std::chrono::milliseconds(1));
    }
    return true;
  }

  Ring ring_;
  const Role role_;
  std::shared_ptr<const Device> device_;
  std::shared_ptr<Memory> memory_;
  std::mutex slab_mutex_;
  std::optional<Peer> owner_;  // of the slab
  std::unique_ptr<SlotEvents> events_;
  std::atomic<std::size_t> num_held_{0};
  std::atomic<bool> closed_{false};
  std::unique_ptr<Completer> completer_;
};

inline StreamLease::StreamLease(std::shared_ptr<Stage> stage, Lease held, StreamHandle on,
                                std::shared_ptr<Memory> memory)
    : lease(std::move(held)), stream(on), stage_(std::move(stage)), memory_(std::move(memory)) {
  const Slots& slots = lease.member()->slots;
  address_ = memory_->base() + slots.slot_of(lease.ticket()) * slots.header().payload_stride;
  ++stage_->num_held_;
}

inline StreamLease::~StreamLease() {
  if (stage_ == nullptr || !held() || stage_->closed_ || stage_->device_->forked()) return;
  const Device::Scope scope(*stage_->device_);
  try {
    const bool writing = stage_->role_ == Role::producer;
    finish(writing ? Ending::abort : Ending::release, "the slot was dropped");
  } catch (const TransportError&) {  // no event could be recorded: wait for all that may still use the slot
    stage_->device_->driver().cuCtxSynchronize.status();
  }
}

inline void StreamLease::require_usable() const {
  if (!held()) {
    throw TransportError("ticket " + std::to_string(lease.ticket()) + ": was given back before", lease.ticket());
  }
  stage_->require_open();
  lease.require_held();
}

inline void StreamLease::copy(DevicePtr target, DevicePtr source, DevicePtr of_user, std::uint64_t nbytes) const {
  require_usable();
  const Device& device = stage_->device();
  const Slots& slots = lease.member()->slots;
  if (nbytes > slots.header().slot_bytes) throw std::invalid_argument("copy: more bytes than the slot has");
  if (nbytes == 0) return;
  const Device::Scope scope(device);
  device.require_own(of_user);
  device.driver().cuMemcpyAsync(target, source, nbytes, stream);
}

// Nothing to wait for, as when a reader enqueued nothing: the slot changes hands here, and the GPU is not asked to pass
// an event. (Two processes share a GPU in turns; an event of the one would wait for its turn behind the other's work.)
// While the thread sleeps, waking it takes as long as the copy of a small record: that long it is worth looking.
inline bool StreamLease::stream_is_done() const {
  constexpr std::chrono::microseconds kWakeUp{6};
  const Driver& driver = stage_->device().driver();
  Result result = driver.cuStreamQuery.status(stream);
  if (result != kNotReady || !stage_->completer().asleep()) return result == kSuccess;
  for (const auto start = Clock::now(); result == kNotReady && Clock::now() - start < kWakeUp;) {
    result = driver.cuStreamQuery.status(stream);
  }
  return result == kSuccess;
}

inline void StreamLease::finish(Ending ending, const std::string& reason) {
  require_usable();
  const Device& device = stage_->device();
  const std::uint64_t slot = lease.member()->slots.slot_of(lease.ticket());
  const Device::Scope scope(device);
  device.require_own(stream);
  if (stream_is_done()) {
    --stage_->num_held_;
    memory_.reset();
    switch (ending) {
      case Ending::commit:
        return lease.commit();
      case Ending::abort:
        return lease.abort(reason);
      case Ending::release:
        return lease.release();
    }
  }
  const EventHandle event = (*stage_->events_)[slot];  // its holder's alone
  device.driver().cuEventRecord(event, stream);
  --stage_->num_held_;
  memory_.reset();  // a slot object that lies around keeps nothing alive
  stage_->completer().submit(Work{std::move(lease), ending, reason, event, stream});
}

}  // namespace kdflow::cuda
