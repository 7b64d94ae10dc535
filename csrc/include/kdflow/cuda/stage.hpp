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
  friend class Stage;

 public:
  StreamLease(std::shared_ptr<Stage> stage, Lease held, StreamHandle on, std::shared_ptr<Memory> memory);
  StreamLease(StreamLease&&) noexcept = default;
  ~StreamLease();

  bool held() const { return lease.held(); }
  // Whoever has it may enqueue work on the slot.
  DevicePtr address() {
    use_ = std::max(use_, Use::seen);
    return address_;
  }
  const std::shared_ptr<Memory>& memory() const { return memory_; }

  void copy_from(DevicePtr source, std::uint64_t nbytes) { copy(address_, source, source, nbytes); }
  void copy_to(DevicePtr target, std::uint64_t nbytes) { copy(target, address_, target, nbytes); }

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
  enum class Use { none, seen, enqueued };  // work on the slot: impossible, possible, certain

  void require_usable() const;
  bool stream_is_done() const;
  void copy(DevicePtr target, DevicePtr source, DevicePtr of_user, std::uint64_t nbytes);
  void enqueue(DevicePtr target, DevicePtr source, std::uint64_t nbytes);
  void finish(Ending ending, const std::string& reason);

  std::shared_ptr<Stage> stage_;
  std::shared_ptr<Memory> memory_;
  DevicePtr address_;
  StreamHandle checked_;  // known to be of the ring's device
  Use use_ = Use::none;
};

class Stage : public std::enable_shared_from_this<Stage> {
 public:
  // Whatever uses the device's things. They go after the last of these.
  class Call : public Calls::Scope {
   public:
    explicit Call(Stage& stage) : Scope(stage.calls_) {
      if (!entered()) stage.throw_closed();
    }
  };

  Stage(Ring ring, std::shared_ptr<const Device> device)
      : ring_(std::move(ring)),
        role_(ring_.member()->require_joined().identity.role()),
        device_(std::move(device)),
        completer_(std::make_unique<Completer>(device_, slots().count())) {
    if (!in_device_memory()) {
      memory_ = std::make_shared<PinnedPayload>(device_, slots());
    } else if (role_ == Role::consumer) {
      own_slab();
    }
    calls_.open();
  }
  ~Stage() {
    try {
      close(std::chrono::seconds(10), std::chrono::seconds(0));
    } catch (const TransportError&) {  // the GPU still works on the slots: what it uses stays, as does the thread
      static_cast<void>(completer_.release());
      static_cast<void>(new std::shared_ptr<Memory>(memory_));
      static_cast<void>(new Calls::Hold(ring_.member()->calls));
    }
  }

  const Device& device() const { return *device_; }
  const Member& member() const { return *ring_.member(); }
  bool in_device_memory() const { return slots().header().placement == Placement::device; }
  Completer& completer() { return *completer_; }

  StreamLease reserve(Ring::Ticket ticket, const Wait& wait, StreamHandle stream) {
    const Call call(*this);
    begin(stream);
    ring_.member()->require(Role::producer);
    if (in_device_memory()) use_slab(wait);
    return hold(ring_.reserve(ticket, wait), stream);
  }
  // reserve, copy and commit in one. `record` has its shape, and whatever else the writer gives.
  void put(Ring::Ticket ticket, const Record& record, DevicePtr source, const Wait& wait, StreamHandle stream) {
    const Call call(*this);
    require_open();
    if (record.nbytes > 0) device_->require_own(source);  // a mistake here must not cost the ticket
    StreamLease slot = reserve(ticket, wait, stream);
    slot.lease.record = record;
    try {
      slot.enqueue(slot.address_, source, record.nbytes);
      slot.commit();
    } catch (const TransportError& error) {
      if (slot.held()) slot.abort(error.what());
      throw;
    }
  }
  StreamLease receive(Ring::Ticket ticket, const Wait& wait, StreamHandle stream) {
    const Call call(*this);
    begin(stream);
    return hold(ring_.receive(ticket, wait), stream);
  }
  std::optional<StreamLease> try_receive(Ring::Ticket ticket, StreamHandle stream) {
    const Call call(*this);
    begin(stream);
    auto lease = ring_.try_receive(ticket);
    if (!lease) return std::nullopt;
    return hold(std::move(*lease), stream);
  }

  // Waits until what was committed or released so far has come to pass.
  void drain(std::chrono::nanoseconds timeout) {
    const Call call(*this);
    if (!completer_->drain(timeout)) {
      throw RingTimeout(slots().name() + ": work on its slots is still running after " +
                        std::to_string(std::chrono::duration<double>(timeout).count()) + " s");
    }
    throw_failure();
  }

  // True: everything was given back. False: a producer still maps the slab, which is therefore kept until this process
  // ends. Throws RingTimeout, and closes nothing, while work is still running after `timeout`.
  bool close(std::chrono::nanoseconds timeout, std::chrono::nanoseconds grace) {
    if (!calls_.is_open() || ring_.member()->forked()) return true;
    {
      const Call call(*this);
      if (!completer_->drain(timeout)) {
        throw RingTimeout(slots().name() + ": cannot close, work on its slots is still running");
      }
      grace_.store(grace);
      calls_.stop();
      ring_.member()->calls.stop();  // waiting calls end
    }
    if (!calls_.close(timeout) && !calls_.within()) {
      throw RingTimeout(slots().name() + ": closed, but a call of another thread still uses it");
    }
    return alone_.load();
  }

  void throw_failure() {
    if (const auto failure = completer_->take_failure()) throw CudaError(slots().name() + ": " + *failure);
  }

 private:
  friend class StreamLease;

  const Slots& slots() const { return ring_.slots(); }

  [[noreturn]] void throw_closed() const { throw TransportError(slots().name() + ": this ring is closed"); }

  void require_open() const {
    if (!calls_.is_open()) throw_closed();
    if (ring_.member()->forked()) {
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

  // What close() comes to, when the last call is over.
  void tear_down() noexcept {
    if (ring_.member()->forked()) return;
    try {
      const Device::Scope scope(*device_);
      // Work on slots that were neither committed nor released, or were so during close(): nothing of it may run when
      // they get another owner.
      if (num_held_.load() > 0 || !completer_->drain({})) device_->driver().cuCtxSynchronize.status();
    } catch (const CudaError&) {  // the context is gone, and its work with it
    }
    completer_.reset();
    const bool owner = in_device_memory() && role_ == Role::consumer;
    if (owner) slab_descriptor(slots()).state.store(SlabDescriptor::withdrawn, std::memory_order_release);
    if (!owner) memory_.reset();
    membership_.reset();
    ring_.close();
    if (owner) alone_.store(wait_for_producers_to_leave(grace_.load()));
    if (!alone_.load()) static_cast<void>(new std::shared_ptr<Memory>(memory_));  // on purpose: see above
    memory_.reset();
    device_.reset();
  }

  // Producer: opens the slab once, then makes sure before every slot that its owner has not left, and now and then, for
  // that is a system call, that it was not killed.
  void use_slab(const Wait& wait) {
    await_slab(wait);
    const std::scoped_lock lock(slab_mutex_);
    if (memory_ == nullptr) {
      for (const Peer& peer : ring_.member()->living()) {
        if (peer.identity.role() == Role::consumer) owner_ = peer;
      }
      require_owner();
      open_slab();
    }
    require_owner();
  }

  // Without the mutex, for each call has a timeout of its own.
  void await_slab(const Wait& wait) const {
    Member& member = *ring_.member();
    const Clock::time_point deadline = Clock::now() + wait.timeout;
    while (slab_descriptor(slots()).state.load(std::memory_order_acquire) == SlabDescriptor::none) {
      if (Clock::now() >= deadline) {
        throw RingTimeout(slots().name() + ": reserve: no consumer has made its device memory known in time; " +
                          member.describe_living(Role::consumer));
      }
      slots().wait_bell(slots().bell(), std::min<Clock::duration>(member.options.tick, deadline - Clock::now()));
      wait.on_tick();
      require_open();
    }
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
    const Clock::time_point now = Clock::now();
    if (!withdrawn && owner_ && table.holds(*owner_)) {
      if (now < next_look_) return;
      if (table.alive(*owner_)) {
        next_look_ = now + kLook;
        return;
      }
    }
    throw PeerDied(slots().name() + ": reserve: the consumer that owns the device memory " +
                   (withdrawn ? "has closed the ring" : "died") + "; close this end too");
  }

  bool wait_for_producers_to_leave(std::chrono::nanoseconds grace) noexcept {
    try {
      for (const Clock::time_point deadline = Clock::now() + grace; ring_.member()->has_live(Role::producer);) {
        if (Clock::now() >= deadline) return false;
        std::this_thread::sleep_for(std::chrono::milliseconds(1));
      }
      return true;
    } catch (const TransportError&) {  // a corrupt ring does not tell
      return false;
    }
  }

  static constexpr std::chrono::milliseconds kLook{1};

  Ring ring_;
  const Role role_;
  // Whoever closes the ring, the slots have no other owner before the work on them is over.
  std::optional<Calls::Hold> membership_{std::in_place, ring_.member()->calls};
  std::shared_ptr<const Device> device_;
  std::shared_ptr<Memory> memory_;
  std::mutex slab_mutex_;
  std::optional<Peer> owner_;  // of the slab
  Clock::time_point next_look_{};
  std::atomic<std::size_t> num_held_{0};
  std::atomic<bool> alone_{true};
  std::atomic<std::chrono::nanoseconds> grace_{};
  std::unique_ptr<Completer> completer_;
  Calls calls_{[this] { tear_down(); }};
};

inline StreamLease::StreamLease(std::shared_ptr<Stage> stage, Lease held, StreamHandle on,
                                std::shared_ptr<Memory> memory)
    : lease(std::move(held)), stream(on), stage_(std::move(stage)), memory_(std::move(memory)), checked_(on) {
  const Slots& slots = lease.member()->slots;
  address_ = memory_->base() + slots.slot_of(lease.ticket()) * slots.header().payload_stride;
  ++stage_->num_held_;
}

inline StreamLease::~StreamLease() {
  if (stage_ == nullptr || !held() || lease.member()->forked()) return;
  const Calls::Scope call(stage_->calls_);
  if (!call.entered() || !stage_->calls_.is_open()) return;
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

inline void StreamLease::copy(DevicePtr target, DevicePtr source, DevicePtr of_user, std::uint64_t nbytes) {
  const Stage::Call call(*stage_);
  require_usable();
  if (nbytes > 0) stage_->device().require_own(of_user);
  enqueue(target, source, nbytes);
}

inline void StreamLease::enqueue(DevicePtr target, DevicePtr source, std::uint64_t nbytes) {
  if (nbytes > lease.member()->slots.header().slot_bytes) {
    throw std::invalid_argument("copy: more bytes than the slot has");
  }
  if (nbytes == 0) return;
  const Device& device = stage_->device();
  const Device::Scope scope(device);
  device.driver().cuMemcpyAsync(target, source, nbytes, stream);
  use_ = Use::enqueued;
}

// Nothing to wait for, as when a reader enqueued nothing: the slot changes hands here, and the GPU is not asked to pass
// an event. (Two processes share a GPU in turns; an event of the one would wait for its turn behind the other's work.)
// What was enqueued a moment ago is not done yet, so the stream is not asked, unless the thread sleeps: a small copy is
// over before that would wake.
inline bool StreamLease::stream_is_done() const {
  if (use_ == Use::none) return true;
  const auto& query = stage_->device().driver().cuStreamQuery;
  Completer& completer = stage_->completer();
  const std::chrono::nanoseconds patience = completer.patience();
  const Clock::time_point start = Clock::now();
  Result result = use_ == Use::seen ? query.status(stream) : kNotReady;
  while (result == kNotReady && Clock::now() - start < patience) result = query.status(stream);
  if (result == kSuccess) completer.learn(Clock::now() - start);
  return result == kSuccess;
}

inline void StreamLease::finish(Ending ending, const std::string& reason) {
  const Stage::Call call(*stage_);
  require_usable();
  const Device& device = stage_->device();
  const Device::Scope scope(device);
  if (stream != checked_) device.require_own(stream);
  const bool done = stream_is_done();
  if (!done) stage_->completer().submit(std::move(lease), ending, reason, stream);
  --stage_->num_held_;
  memory_.reset();  // a slot object that lies around keeps nothing alive
  if (!done) return;
  switch (ending) {
    case Ending::commit:
      return lease.commit();
    case Ending::abort:
      return lease.abort(reason);
    case Ending::release:
      return lease.release();
  }
}

}  // namespace kdflow::cuda
