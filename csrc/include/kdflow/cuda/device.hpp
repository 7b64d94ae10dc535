// A device as this process uses it: its primary context, which torch and cupy use too.
#pragma once

#include <unistd.h>

#include <memory>
#include <string>
#include <utility>

#include "kdflow/cuda/driver.hpp"
#include "kdflow/process.hpp"

namespace kdflow::cuda {

class Device {
 public:
  explicit Device(int ordinal) : ordinal_(ordinal) {
    int num_devices = 0;
    driver_.cuDeviceGetCount(&num_devices);
    if (ordinal < 0 || ordinal >= num_devices) {
      throw std::invalid_argument("device: expected 0 to " + std::to_string(num_devices - 1) + ", got " +
                                  std::to_string(ordinal));
    }
    driver_.cuDeviceGet(&id_, ordinal);
    driver_.cuDevicePrimaryCtxRetain(&context_, id_);
  }
  ~Device() {
    if (!forked()) driver_.cuDevicePrimaryCtxRelease.status(id_);  // no driver works in a forked child
  }
  Device(const Device&) = delete;

  int ordinal() const { return ordinal_; }
  ContextHandle context() const { return context_; }
  const Driver& driver() const { return driver_; }
  bool forked() const { return current_pid() != pid_; }
  std::string name() const { return "cuda:" + std::to_string(ordinal_); }

  // The device's context is current in this thread while the object lives; where torch computes it is anyhow.
  class Scope {
   public:
    explicit Scope(const Device& device) : driver_(device.driver_) {
      ContextHandle current = nullptr;
      driver_.cuCtxGetCurrent(&current);
      if (current == device.context_) return;
      driver_.cuCtxPushCurrent(device.context_);
      pushed_ = true;
    }
    ~Scope() {
      ContextHandle popped = nullptr;
      if (pushed_) driver_.cuCtxPopCurrent.status(&popped);
    }
    Scope(const Scope&) = delete;

   private:
    const Driver& driver_;
    bool pushed_ = false;
  };

  // Refuses a stream of another device: what is recorded there would say nothing about this one.
  void require_own(StreamHandle stream) const {
    if (reinterpret_cast<std::uintptr_t>(stream) <= 2) return;  // the default streams belong to the current context
    ContextHandle context = nullptr;
    driver_.cuStreamGetCtx(stream, &context);
    if (context != context_) throw CudaError("stream: expected one of " + name() + ", got one of another context");
  }

  // Refuses memory that the stream's copies could not reach in order: of the host, or of another device.
  void require_own(DevicePtr pointer) const {
    int ordinal = -1;
    const Result result = driver_.cuPointerGetAttribute.status(&ordinal, kPointerDeviceOrdinal, pointer);
    if (result != kSuccess || ordinal != ordinal_) {
      throw CudaError(
          "tensor: expected memory of " + name() + ", got " +
          (result == kSuccess ? "memory of cuda:" + std::to_string(ordinal) : "an address that is no device's") +
          "; move it there first");
    }
  }

 private:
  const Driver& driver_ = Driver::get();
  int ordinal_;
  DeviceId id_ = 0;
  ContextHandle context_ = nullptr;
  pid_t pid_ = current_pid();
};

// Can a process on `from` map memory of `to`? The same device can.
inline bool can_access(int from, int to) {
  if (from == to) return true;
  const Driver& driver = Driver::get();
  DeviceId ids[2];
  driver.cuDeviceGet(&ids[0], from);
  driver.cuDeviceGet(&ids[1], to);
  int can = 0;
  driver.cuDeviceCanAccessPeer(&can, ids[0], ids[1]);
  return can != 0;
}

}  // namespace kdflow::cuda
