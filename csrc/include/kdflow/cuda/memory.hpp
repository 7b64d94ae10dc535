// Where the payloads of a CUDA ring are: the ring's own segment, pinned, or a slab of the consumer's device memory.
#pragma once

#include <cstdint>
#include <cstring>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <utility>

#include "kdflow/cuda/device.hpp"
#include "kdflow/member.hpp"

namespace kdflow::cuda {

// An address that the device can reach; given back when the last slot and the last view of it are gone.
class Memory {
 public:
  virtual ~Memory() = default;
  Memory(const Memory&) = delete;
  DevicePtr base() const { return base_; }

 protected:
  explicit Memory(std::shared_ptr<const Device> device) : device_(std::move(device)) {}
  // Runs `give_back` with the device's context, where there still is one.
  template <typename GiveBack>
  void at_end(const GiveBack& give_back) noexcept {
    if (device_->forked() || base_ == 0) return;
    try {
      const Device::Scope scope(*device_);
      give_back();
    } catch (const CudaError&) {  // the driver is going down with the process, and takes the memory along
    }
  }

  std::shared_ptr<const Device> device_;
  DevicePtr base_ = 0;
};

// The payloads of a host ring, pinned for this process: copies to and from them run without the host.
class PinnedPayload : public Memory {
 public:
  PinnedPayload(std::shared_ptr<const Device> device, const Slots& slots)
      : Memory(std::move(device)), segment_(slots.segment()) {
    const Device::Scope scope(*device_);
    const std::size_t bytes = slots.header().segment_bytes - slots.header().payload_offset;
    device_->driver().cuMemHostRegister(slots.payload(0), bytes, kHostRegisterPortable);
    base_ = reinterpret_cast<DevicePtr>(slots.payload(0));
  }
  ~PinnedPayload() override {
    at_end([this] { device_->driver().cuMemHostUnregister.status(reinterpret_cast<void*>(base_)); });
  }

 private:
  std::shared_ptr<const Segment> segment_;
};

// What the consumer says of its slab, in the page behind the slot states.
struct SlabDescriptor {
  enum State : std::uint64_t { none, exported, withdrawn };

  AtomicWord state;
  std::uint64_t bytes;
  std::int32_t pid;
  std::uint32_t crc;  // of bytes, pid and handle
  IpcMemHandle handle;

  std::uint32_t expected_crc() const {
    unsigned char text[sizeof bytes + sizeof pid + sizeof handle];
    std::memcpy(text, &bytes, sizeof bytes);
    std::memcpy(text + sizeof bytes, &pid, sizeof pid);
    std::memcpy(text + sizeof bytes + sizeof pid, &handle, sizeof handle);
    return crc32c(text, sizeof text);
  }
};
static_assert(sizeof(SlabDescriptor) <= kPageBytes);

inline SlabDescriptor& slab_descriptor(const Slots& slots) {
  return *reinterpret_cast<SlabDescriptor*>(slots.segment()->at(slots.header().payload_offset));
}

// Whole blocks of 2 MiB: the driver packs smaller allocations into one, and a handle would open all of it.
inline std::uint64_t slab_bytes(const Header& header) {
  return round_up(header.num_slots * header.payload_stride, std::uint64_t{2} << 20);
}

// The consumer's own allocation. Never a piece of a pool: whoever opens a handle gets the whole allocation.
class OwnedSlab : public Memory {
 public:
  OwnedSlab(std::shared_ptr<const Device> device, const Slots& slots) : Memory(std::move(device)) {
    const Device::Scope scope(*device_);
    const Result result = device_->driver().cuMemAlloc.status(&base_, slab_bytes(slots.header()));
    if (result == kSuccess) return;
    base_ = 0;
    throw CudaError(slots.name() + ": cannot allocate " + std::to_string(slab_bytes(slots.header())) + " bytes on " +
                    device_->name() +
                    "; use fewer or smaller slots. cuMemAlloc_v2: " + device_->driver().describe(result));
  }
  ~OwnedSlab() override {
    at_end([this] { device_->driver().cuMemFree.status(base_); });
  }

  const std::shared_ptr<const Device>& device() const { return device_; }

  void publish(const std::shared_ptr<OwnedSlab>& self, const Slots& slots) const {
    SlabDescriptor& descriptor = slab_descriptor(slots);
    {
      const Device::Scope scope(*device_);
      device_->driver().cuIpcGetMemHandle(&descriptor.handle, base_);
    }
    descriptor.bytes = slab_bytes(slots.header());
    descriptor.pid = ::getpid();
    descriptor.crc = descriptor.expected_crc();
    locals().put(descriptor.handle, self);
    descriptor.state.store(SlabDescriptor::exported, std::memory_order_release);
    slots.ring_bell();
  }

  // A handle does not open in the process that made it; there the slab itself is at hand.
  static std::shared_ptr<OwnedSlab> find_local(const IpcMemHandle& handle) { return locals().find(handle); }

 private:
  class Locals {
   public:
    void put(const IpcMemHandle& handle, const std::shared_ptr<OwnedSlab>& slab) {
      const std::scoped_lock lock(mutex_);
      std::erase_if(slabs_, [](const auto& entry) { return entry.second.expired(); });
      slabs_[key(handle)] = slab;
    }
    std::shared_ptr<OwnedSlab> find(const IpcMemHandle& handle) {
      const std::scoped_lock lock(mutex_);
      const auto found = slabs_.find(key(handle));
      return found == slabs_.end() ? nullptr : found->second.lock();
    }

   private:
    static std::string key(const IpcMemHandle& handle) {
      return {reinterpret_cast<const char*>(handle.bytes), sizeof handle.bytes};
    }
    std::mutex mutex_;
    std::map<std::string, std::weak_ptr<OwnedSlab>> slabs_;
  };
  static Locals& locals() {
    static Locals all;
    return all;
  }
};

// Another process's slab, mapped into the context of the producer's own device: none is created on the owner's.
class OpenedSlab : public Memory {
 public:
  OpenedSlab(std::shared_ptr<const Device> device, const SlabDescriptor& descriptor) : Memory(std::move(device)) {
    const Driver& driver = device_->driver();
    const Device::Scope scope(*device_);
    DevicePtr opened = 0;
    driver.cuIpcOpenMemHandle(&opened, descriptor.handle, kIpcLazyEnablePeerAccess);
    base_ = opened;
    DevicePtr start = 0;
    std::size_t bytes = 0;
    const Result result = driver.cuMemGetAddressRange.status(&start, &bytes, opened);
    if (result == kSuccess && start + bytes >= opened + descriptor.bytes) return;
    driver.cuIpcCloseMemHandle.status(opened);
    throw RingCorrupt("the consumer's slab: expected at least " + std::to_string(descriptor.bytes) +
                      " bytes behind its handle, got " +
                      (result == kSuccess ? std::to_string(start + bytes - opened) : driver.describe(result)));
  }
  ~OpenedSlab() override {
    at_end([this] { device_->driver().cuIpcCloseMemHandle.status(base_); });
  }
};

// The slab of this process, used from another of its devices.
class LocalSlab : public Memory {
 public:
  LocalSlab(std::shared_ptr<const Device> device, std::shared_ptr<OwnedSlab> slab)
      : Memory(std::move(device)), slab_(std::move(slab)) {
    base_ = slab_->base();
    if (slab_->device()->ordinal() == device_->ordinal()) return;
    const Device::Scope scope(*device_);
    const Result result = device_->driver().cuCtxEnablePeerAccess.status(slab_->device()->context(), 0);
    if (result != kSuccess && result != kPeerAccessAlreadyEnabled) {
      throw CudaError("cuCtxEnablePeerAccess: " + device_->driver().describe(result));
    }
  }

 private:
  std::shared_ptr<OwnedSlab> slab_;
};

// Checks what the segment says before it is used. The pid is that of the consumer in the peer table.
inline void read_descriptor(const Slots& slots, std::int32_t consumer_pid, SlabDescriptor& copy) {
  const SlabDescriptor& shared = slab_descriptor(slots);
  copy.bytes = shared.bytes;
  copy.pid = shared.pid;
  copy.crc = shared.crc;
  copy.handle = shared.handle;
  const auto fail = [&](const std::string& what) {
    throw RingCorrupt(slots.name() + ": the consumer's slab: " + what);
  };
  if (copy.crc != copy.expected_crc()) fail("its descriptor does not match its checksum");
  if (copy.bytes != slab_bytes(slots.header())) {
    fail("expected " + std::to_string(slab_bytes(slots.header())) + " bytes, got " + std::to_string(copy.bytes));
  }
  if (copy.pid != consumer_pid) {
    fail("made by pid " + std::to_string(copy.pid) + ", the consumer is pid " + std::to_string(consumer_pid));
  }
}

}  // namespace kdflow::cuda
