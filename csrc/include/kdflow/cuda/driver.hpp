// The CUDA driver API, found at run time: one build runs with and without a GPU, and no CUDA is needed to build it.
//
// Types and numbers are facts of the driver's ABI; calls with a second version carry its name (_v2), for the plain
// symbol is the old one.
#pragma once

#include <dlfcn.h>

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <optional>
#include <string>

#include "kdflow/errors.hpp"

namespace kdflow::cuda {

using Result = int;
using DeviceId = int;
using DevicePtr = std::uint64_t;
using ContextHandle = struct OpaqueContext*;
using StreamHandle = struct OpaqueStream*;
using EventHandle = struct OpaqueEvent*;

struct IpcMemHandle {
  unsigned char bytes[64];
};

inline constexpr Result kSuccess = 0;
inline constexpr Result kNotReady = 600;
inline constexpr Result kPeerAccessAlreadyEnabled = 704;
inline constexpr unsigned kEventDisableTiming = 2;
inline constexpr unsigned kHostRegisterPortable = 1;
inline constexpr unsigned kIpcLazyEnablePeerAccess = 1;
inline constexpr int kPointerDeviceOrdinal = 9;
inline constexpr int kCaptureRelaxed = 2;

// A call to the driver, or one of ours around it, went wrong.
struct CudaError : TransportError {
  using TransportError::TransportError;
};

// One entry point. Called, it throws CudaError on any result but success.
template <typename... Parameters>
struct Call {
  const char* name;
  Result (*function)(Parameters...) = nullptr;

  Result status(Parameters... arguments) const { return function(arguments...); }
  void operator()(Parameters... arguments) const;
};

struct Driver {
  Call<unsigned> cuInit{"cuInit"};
  Call<Result, const char**> cuGetErrorName{"cuGetErrorName"};
  Call<Result, const char**> cuGetErrorString{"cuGetErrorString"};
  Call<int*> cuDeviceGetCount{"cuDeviceGetCount"};
  Call<DeviceId*, int> cuDeviceGet{"cuDeviceGet"};
  Call<int*, DeviceId, DeviceId> cuDeviceCanAccessPeer{"cuDeviceCanAccessPeer"};
  Call<ContextHandle*, DeviceId> cuDevicePrimaryCtxRetain{"cuDevicePrimaryCtxRetain"};
  Call<DeviceId> cuDevicePrimaryCtxRelease{"cuDevicePrimaryCtxRelease_v2"};
  Call<ContextHandle> cuCtxSetCurrent{"cuCtxSetCurrent"};
  Call<ContextHandle*> cuCtxGetCurrent{"cuCtxGetCurrent"};
  Call<ContextHandle> cuCtxPushCurrent{"cuCtxPushCurrent_v2"};
  Call<ContextHandle*> cuCtxPopCurrent{"cuCtxPopCurrent_v2"};
  Call<> cuCtxSynchronize{"cuCtxSynchronize"};
  Call<ContextHandle, unsigned> cuCtxEnablePeerAccess{"cuCtxEnablePeerAccess"};
  Call<StreamHandle, ContextHandle*> cuStreamGetCtx{"cuStreamGetCtx"};
  Call<StreamHandle> cuStreamQuery{"cuStreamQuery"};
  Call<EventHandle*, unsigned> cuEventCreate{"cuEventCreate"};
  Call<EventHandle> cuEventDestroy{"cuEventDestroy_v2"};
  Call<EventHandle, StreamHandle> cuEventRecord{"cuEventRecord"};
  Call<EventHandle> cuEventQuery{"cuEventQuery"};
  Call<DevicePtr*, std::size_t> cuMemAlloc{"cuMemAlloc_v2"};
  Call<DevicePtr> cuMemFree{"cuMemFree_v2"};
  Call<DevicePtr, DevicePtr, std::size_t, StreamHandle> cuMemcpyAsync{"cuMemcpyAsync"};
  Call<DevicePtr*, std::size_t*, DevicePtr> cuMemGetAddressRange{"cuMemGetAddressRange_v2"};
  Call<void*, int, DevicePtr> cuPointerGetAttribute{"cuPointerGetAttribute"};
  Call<IpcMemHandle*, DevicePtr> cuIpcGetMemHandle{"cuIpcGetMemHandle"};
  Call<DevicePtr*, IpcMemHandle, unsigned> cuIpcOpenMemHandle{"cuIpcOpenMemHandle_v2"};
  Call<DevicePtr> cuIpcCloseMemHandle{"cuIpcCloseMemHandle"};
  Call<void*, std::size_t, unsigned> cuMemHostRegister{"cuMemHostRegister_v2"};
  Call<void*> cuMemHostUnregister{"cuMemHostUnregister"};
  Call<int*> cuThreadExchangeStreamCaptureMode{"cuThreadExchangeStreamCaptureMode"};  // not of every driver

  // Throws CudaError with the reason where there is no driver or no device.
  static const Driver& get();

  // nullopt: there is a driver and at least one device. Creates no context. Asked once a process.
  static const std::optional<std::string>& unavailable_reason();

  // From now on no call of this thread breaks a CUDA graph that another one captures.
  void relax_capture() const {
    int mode = kCaptureRelaxed;
    if (cuThreadExchangeStreamCaptureMode.function != nullptr) cuThreadExchangeStreamCaptureMode.status(&mode);
  }

  // "CUDA_ERROR_INVALID_VALUE (1), invalid argument"
  std::string describe(Result result) const {
    const char* name = nullptr;
    const char* meaning = nullptr;
    if (cuGetErrorName.status(result, &name) != kSuccess) name = nullptr;
    if (cuGetErrorString.status(result, &meaning) != kSuccess) meaning = nullptr;
    return std::string(name != nullptr ? name : "unknown error") + " (" + std::to_string(result) + ")" +
           (meaning != nullptr ? std::string(", ") + meaning : std::string());
  }

 private:
  struct Opened;

  static const Opened& opened();

  template <typename Visit>
  void each_call(const Visit& visit) {
    visit(cuInit), visit(cuGetErrorName), visit(cuGetErrorString), visit(cuDeviceGetCount), visit(cuDeviceGet);
    visit(cuDeviceCanAccessPeer), visit(cuDevicePrimaryCtxRetain);
    visit(cuDevicePrimaryCtxRelease), visit(cuCtxSetCurrent), visit(cuCtxGetCurrent), visit(cuCtxPushCurrent);
    visit(cuCtxPopCurrent), visit(cuCtxSynchronize), visit(cuCtxEnablePeerAccess), visit(cuStreamGetCtx);
    visit(cuStreamQuery), visit(cuEventCreate);
    visit(cuEventDestroy), visit(cuEventRecord), visit(cuEventQuery), visit(cuMemAlloc), visit(cuMemFree);
    visit(cuMemcpyAsync), visit(cuMemGetAddressRange), visit(cuPointerGetAttribute), visit(cuIpcGetMemHandle);
    visit(cuIpcOpenMemHandle), visit(cuIpcCloseMemHandle), visit(cuMemHostRegister), visit(cuMemHostUnregister);
  }

  // What is wrong, or nothing.
  std::optional<std::string> load() {
    const char* other = std::getenv("KDFLOW_CUDA_DRIVER");  // a stand-in, for tests
    const std::string path = other != nullptr ? other : "libcuda.so.1";
    void* library = ::dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);  // never closed: its threads outlive every caller
    if (library == nullptr) return std::string(::dlerror());
    const auto find = [&]<typename... Parameters>(Call<Parameters...>& call) {
      call.function = reinterpret_cast<Result (*)(Parameters...)>(::dlsym(library, call.name));
      return call.function != nullptr;
    };
    std::optional<std::string> missing;
    each_call([&](auto& call) {
      if (!find(call) && !missing) missing = path + " has no " + call.name + "; update the driver";
    });
    find(cuThreadExchangeStreamCaptureMode);
    if (missing) return missing;
    if (const Result result = cuInit.status(0); result != kSuccess) return "cuInit: " + describe(result);
    int num_devices = 0;
    if (const Result result = cuDeviceGetCount.status(&num_devices); result != kSuccess) {
      return "cuDeviceGetCount: " + describe(result);
    }
    if (num_devices == 0) return "the driver is there, but no device is visible (CUDA_VISIBLE_DEVICES?)";
    return std::nullopt;
  }
};

struct Driver::Opened {
  Driver driver{};
  std::optional<std::string> reason = driver.load();
};

inline const Driver::Opened& Driver::opened() {
  static const Opened once;
  return once;
}

inline const std::optional<std::string>& Driver::unavailable_reason() { return opened().reason; }

inline const Driver& Driver::get() {
  if (const auto& reason = unavailable_reason()) throw CudaError("no CUDA device can be used: " + *reason);
  return opened().driver;
}

template <typename... Parameters>
void Call<Parameters...>::operator()(Parameters... arguments) const {
  const Result result = function(arguments...);
  if (result != kSuccess) throw CudaError(std::string(name) + ": " + Driver::get().describe(result));
}

}  // namespace kdflow::cuda
