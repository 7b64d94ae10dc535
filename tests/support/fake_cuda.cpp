// A stand-in for libcuda.so.1 over host memory, for tests of the ring's own logic on machines without a GPU.
//
// A stream is a thread with a queue, and the default stream of each device is one, too. A test can hold a stream, so
// that nothing enqueued on it runs until it is let go: whatever is published too early is then published too early
// every time. Device memory is a memfd, and its IPC handle says where to find it, so that it crosses processes.
//
// To measure what the host does, FAKE_CUDA_COPY_NS makes streams of clocks instead: a copy moves nothing and is over so
// many nanoseconds after the one before it.
#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <map>
#include <mutex>
#include <string>
#include <thread>

namespace {

enum : int {
  kSuccess = 0,
  kInvalidValue = 1,
  kOutOfMemory = 2,
  kInvalidContext = 201,
  kAlreadyMapped = 208,
  kInvalidHandle = 400,
  kNotReady = 600,
  kPeerAlreadyEnabled = 704,
  kCaptureUnsupported = 900,
  kAlreadyRegistered = 712,
  kNotRegistered = 713,
};

int number(const char* name, int otherwise) {
  const char* text = std::getenv(name);
  return text != nullptr ? std::atoi(text) : otherwise;
}

const std::int64_t copy_ns = number("FAKE_CUDA_COPY_NS", -1);
const bool by_clock = copy_ns >= 0;

std::int64_t clock_ns() { return std::chrono::steady_clock::now().time_since_epoch() / std::chrono::nanoseconds(1); }

struct Stream {
  explicit Stream(int device) : device(device) {
    if (!by_clock) std::thread([this] { run(); }).detach();
  }

  void push(std::function<void()> work) {
    const std::scoped_lock lock(mutex);
    queue.push_back(std::move(work));
    ++num_open;
    changed.notify_all();
  }
  void set_held(bool value) {
    const std::scoped_lock lock(mutex);
    held = value;
    changed.notify_all();
  }
  void synchronize() {
    while (by_clock && clock_ns() < busy_until) std::this_thread::yield();
    std::unique_lock lock(mutex);
    changed.wait(lock, [this] { return num_open == 0; });
  }
  void run() {
    std::unique_lock lock(mutex);
    while (true) {
      changed.wait(lock, [this] { return !queue.empty() && !held; });
      const auto work = std::move(queue.front());
      queue.pop_front();
      lock.unlock();
      work();
      lock.lock();
      --num_open;
      changed.notify_all();
    }
  }

  const int device;
  std::mutex mutex;
  std::condition_variable changed;
  std::deque<std::function<void()>> queue;
  int num_open = 0;
  bool held = false;
  std::atomic<std::int64_t> busy_until{0};  // of a stream by the clock
};

struct Event {
  int device;
  std::atomic<std::int64_t> passed_at{0};  // of a stream by the clock
  std::uint64_t num_recorded = 0;
  std::uint64_t num_passed = 0;
};

struct Allocation {
  std::size_t bytes;
  int device;
  int fd;          // of memory of this process
  int num_opened;  // of memory of another one
};

struct Handle {
  int pid, fd, device;
  std::uint64_t bytes;
};

struct Context {
  int device;
  int num_retained = 0;
  Stream* stream = nullptr;
};

struct State {
  std::mutex mutex;
  Context contexts[8];
  std::map<std::uintptr_t, Allocation> memory;
  std::map<std::uintptr_t, std::size_t> registered;
  std::map<std::string, std::pair<int, int>> failures;  // call -> result, calls to let pass before it
  std::map<std::string, int> live;
};
State& state = *new State;  // never destroyed: streams run until the process ends

thread_local std::deque<Context*> current;

// A capture of a graph in the global mode: it breaks when a thread whose own mode is not relaxed asks for an event.
enum class Capture { none, running, broken };
std::atomic<Capture> capture{Capture::none};
constexpr int kRelaxed = 2;
thread_local int capture_mode = 0;

// The injected result of this call, or success.
int injected(const char* call) {
  if (by_clock) return kSuccess;
  const std::scoped_lock lock(state.mutex);
  const auto found = state.failures.find(call);
  if (found == state.failures.end() || found->second.second-- > 0) return kSuccess;
  return found->second.first;
}
#define FAIL_IF_INJECTED(call)                            \
  do {                                                    \
    if (const int result = injected(call)) return result; \
  } while (false)

void count(const char* what, int change) { state.live[what] += change; }

Stream* resolve(void* handle) {
  if (reinterpret_cast<std::uintptr_t>(handle) > 2) return static_cast<Stream*>(handle);
  return current.empty() ? nullptr : current.back()->stream;
}

auto find(std::uintptr_t pointer) {
  auto found = state.memory.upper_bound(pointer);
  if (found == state.memory.begin()) return state.memory.end();
  --found;
  return pointer < found->first + found->second.bytes ? found : state.memory.end();
}

bool reachable(std::uintptr_t pointer, std::size_t bytes) {
  const std::scoped_lock lock(state.mutex);
  if (const auto found = find(pointer); found != state.memory.end()) {
    return pointer + bytes <= found->first + found->second.bytes;
  }
  for (const auto& [start, size] : state.registered) {
    if (pointer >= start && pointer + bytes <= start + size) return true;
  }
  return false;
}

}  // namespace

extern "C" {

int cuInit(unsigned) {
  FAIL_IF_INJECTED("cuInit");
  if (const int result = number("FAKE_CUDA_INIT", kSuccess)) return result;
  for (int device = 0; device < 8; ++device) state.contexts[device].device = device;
  return kSuccess;
}

int cuGetErrorName(int result, const char** name) {
  static const std::map<int, const char*> names = {
      {kSuccess, "CUDA_SUCCESS"},
      {kInvalidValue, "CUDA_ERROR_INVALID_VALUE"},
      {kOutOfMemory, "CUDA_ERROR_OUT_OF_MEMORY"},
      {100, "CUDA_ERROR_NO_DEVICE"},
      {kInvalidHandle, "CUDA_ERROR_INVALID_HANDLE"},
      {700, "CUDA_ERROR_ILLEGAL_ADDRESS"},
  };
  const auto found = names.find(result);
  *name = found == names.end() ? nullptr : found->second;
  return found == names.end() ? kInvalidValue : kSuccess;
}

int cuGetErrorString(int result, const char** text) {
  *text = result == 700 ? "an illegal memory access was encountered" : "the fake's words for it";
  return kSuccess;
}

int cuDeviceGetCount(int* devices) {
  *devices = number("FAKE_CUDA_DEVICES", 2);
  return kSuccess;
}
int cuDeviceGet(int* device, int ordinal) {
  *device = ordinal;
  return kSuccess;
}
int cuDeviceCanAccessPeer(int* can, int, int) {
  *can = number("FAKE_CUDA_PEER", 1);
  return kSuccess;
}

int cuDevicePrimaryCtxRetain(Context** context, int device) {
  FAIL_IF_INJECTED("cuDevicePrimaryCtxRetain");
  const std::scoped_lock lock(state.mutex);
  Context& own = state.contexts[device];
  if (own.stream == nullptr) own.stream = new Stream(device);
  ++own.num_retained;
  count("contexts", 1);
  *context = &own;
  return kSuccess;
}
int cuDevicePrimaryCtxRelease_v2(int) {
  const std::scoped_lock lock(state.mutex);
  count("contexts", -1);
  return kSuccess;
}
int cuCtxSetCurrent(Context* context) {
  current.assign(1, context);
  return kSuccess;
}
int cuCtxGetCurrent(Context** context) {
  *context = current.empty() ? nullptr : current.back();
  return kSuccess;
}
int cuCtxPushCurrent_v2(Context* context) {
  current.push_back(context);
  return kSuccess;
}
int cuCtxPopCurrent_v2(Context** context) {
  if (current.empty()) return kInvalidContext;
  *context = current.back();
  current.pop_back();
  return kSuccess;
}
int cuCtxSynchronize() {
  if (current.empty()) return kInvalidContext;
  current.back()->stream->synchronize();
  return kSuccess;
}
int cuCtxEnablePeerAccess(Context*, unsigned) { return injected("cuCtxEnablePeerAccess"); }

int cuStreamGetCtx(void* stream, Context** context) {
  Stream* found = resolve(stream);
  if (found == nullptr) return kInvalidContext;
  *context = &state.contexts[found->device];
  return kSuccess;
}

int cuStreamQuery(void* stream) {
  FAIL_IF_INJECTED("cuStreamQuery");
  Stream* found = resolve(stream);
  if (found == nullptr) return kInvalidContext;
  if (by_clock) return clock_ns() >= found->busy_until ? kSuccess : kNotReady;
  const std::scoped_lock lock(found->mutex);
  return found->num_open == 0 ? kSuccess : kNotReady;
}

int cuEventCreate(Event** event, unsigned) {
  FAIL_IF_INJECTED("cuEventCreate");
  if (current.empty()) return kInvalidContext;
  const std::scoped_lock lock(state.mutex);
  count("events", 1);
  *event = new Event{.device = current.back()->device};
  return kSuccess;
}
int cuEventDestroy_v2(Event* event) {
  const std::scoped_lock lock(state.mutex);
  count("events", -1);
  delete event;
  return kSuccess;
}
int cuEventRecord(Event* event, void* stream) {
  FAIL_IF_INJECTED("cuEventRecord");
  Stream* found = resolve(stream);
  if (found == nullptr || found->device != event->device) return kInvalidHandle;
  if (by_clock) {
    event->passed_at = found->busy_until.load();
    return kSuccess;
  }
  std::uint64_t number;
  {
    const std::scoped_lock lock(state.mutex);
    number = ++event->num_recorded;
  }
  found->push([event, number] {
    const std::scoped_lock lock(state.mutex);
    event->num_passed = number;
  });
  return kSuccess;
}
int cuThreadExchangeStreamCaptureMode(int* mode) {
  std::swap(capture_mode, *mode);
  return kSuccess;
}
int cuEventQuery(Event* event) {
  FAIL_IF_INJECTED("cuEventQuery");
  if (capture_mode != kRelaxed && capture != Capture::none) {
    capture = Capture::broken;
    return kCaptureUnsupported;
  }
  if (by_clock) return clock_ns() >= event->passed_at ? kSuccess : kNotReady;
  const std::scoped_lock lock(state.mutex);
  return event->num_passed >= event->num_recorded ? kSuccess : kNotReady;
}

int cuMemAlloc_v2(std::uint64_t* pointer, std::size_t bytes) {
  FAIL_IF_INJECTED("cuMemAlloc_v2");
  if (current.empty()) return kInvalidContext;
  const int fd = ::memfd_create("fake-device-memory", MFD_CLOEXEC);
  if (fd < 0 || ::ftruncate(fd, static_cast<off_t>(bytes)) != 0) return kOutOfMemory;
  void* mapped = ::mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
  if (mapped == MAP_FAILED) return kOutOfMemory;
  const std::scoped_lock lock(state.mutex);
  count("allocations", 1);
  *pointer = reinterpret_cast<std::uintptr_t>(mapped);
  state.memory[*pointer] = {bytes, current.back()->device, fd, 0};
  return kSuccess;
}
int cuMemFree_v2(std::uint64_t pointer) {
  const std::scoped_lock lock(state.mutex);
  const auto found = state.memory.find(pointer);
  if (found == state.memory.end() || found->second.num_opened != 0) return kInvalidValue;
  ::munmap(reinterpret_cast<void*>(pointer), found->second.bytes);
  ::close(found->second.fd);
  state.memory.erase(found);
  count("allocations", -1);
  return kSuccess;
}
int cuMemcpyAsync(std::uint64_t target, std::uint64_t source, std::size_t bytes, void* stream) {
  FAIL_IF_INJECTED("cuMemcpyAsync");
  Stream* found = resolve(stream);
  if (found == nullptr) return kInvalidContext;
  if (by_clock) {
    found->busy_until = std::max(clock_ns(), found->busy_until.load()) + copy_ns;
    return kSuccess;
  }
  if (!reachable(target, bytes) || !reachable(source, bytes)) return kInvalidValue;
  found->push([=] { std::memcpy(reinterpret_cast<void*>(target), reinterpret_cast<void*>(source), bytes); });
  return kSuccess;
}
int cuMemGetAddressRange_v2(std::uint64_t* start, std::size_t* bytes, std::uint64_t pointer) {
  const std::scoped_lock lock(state.mutex);
  const auto found = find(pointer);
  if (found == state.memory.end()) return kInvalidValue;
  *start = found->first;
  *bytes = found->second.bytes;
  return kSuccess;
}
int cuPointerGetAttribute(void* value, int attribute, std::uint64_t pointer) {
  if (attribute != 9) return kInvalidValue;  // the device's ordinal
  const std::scoped_lock lock(state.mutex);
  const auto found = find(pointer);
  if (found == state.memory.end()) return kInvalidValue;
  *static_cast<int*>(value) = found->second.device;
  return kSuccess;
}

struct IpcMemHandle {
  char bytes[64];
};
int cuIpcGetMemHandle(IpcMemHandle* handle, std::uint64_t pointer) {
  FAIL_IF_INJECTED("cuIpcGetMemHandle");
  const std::scoped_lock lock(state.mutex);
  const auto found = state.memory.find(pointer);
  if (found == state.memory.end()) return kInvalidValue;
  const Handle written{::getpid(), found->second.fd, found->second.device, found->second.bytes};
  std::memset(handle, 0, sizeof *handle);
  std::memcpy(handle, &written, sizeof written);
  return kSuccess;
}
int cuIpcOpenMemHandle_v2(std::uint64_t* pointer, IpcMemHandle handle, unsigned) {
  FAIL_IF_INJECTED("cuIpcOpenMemHandle_v2");
  Handle read;
  std::memcpy(&read, &handle, sizeof read);
  if (current.empty() || read.pid == ::getpid()) return kInvalidContext;  // as the driver: not in its own process
  const std::string path = "/proc/" + std::to_string(read.pid) + "/fd/" + std::to_string(read.fd);
  const int fd = ::open(path.c_str(), O_RDWR | O_CLOEXEC);
  if (fd < 0) return kInvalidValue;
  void* mapped = ::mmap(nullptr, read.bytes, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
  ::close(fd);
  if (mapped == MAP_FAILED) return kInvalidValue;
  const std::scoped_lock lock(state.mutex);
  count("opened", 1);
  *pointer = reinterpret_cast<std::uintptr_t>(mapped);
  state.memory[*pointer] = {read.bytes, read.device, -1, 1};
  return kSuccess;
}
int cuIpcCloseMemHandle(std::uint64_t pointer) {
  const std::scoped_lock lock(state.mutex);
  const auto found = state.memory.find(pointer);
  if (found == state.memory.end() || found->second.num_opened == 0) return kInvalidValue;
  ::munmap(reinterpret_cast<void*>(pointer), found->second.bytes);
  state.memory.erase(found);
  count("opened", -1);
  return kSuccess;
}
int cuMemHostRegister_v2(void* pointer, std::size_t bytes, unsigned) {
  FAIL_IF_INJECTED("cuMemHostRegister_v2");
  const std::scoped_lock lock(state.mutex);
  if (!state.registered.emplace(reinterpret_cast<std::uintptr_t>(pointer), bytes).second) return kAlreadyRegistered;
  count("registered", 1);
  return kSuccess;
}
int cuMemHostUnregister(void* pointer) {
  const std::scoped_lock lock(state.mutex);
  if (state.registered.erase(reinterpret_cast<std::uintptr_t>(pointer)) == 0) return kNotRegistered;
  count("registered", -1);
  return kSuccess;
}

// --- for the tests ---

Stream* fake_stream(int device) { return new Stream(device); }
void fake_hold(Stream* stream, int held) { stream->set_held(held != 0); }
void fake_synchronize(Stream* stream) { stream->synchronize(); }
// From now on, after `passing` more calls, the call returns `result`; 0 makes it work again.
void fake_fail(const char* call, int result, int passing) {
  const std::scoped_lock lock(state.mutex);
  if (result == kSuccess) {
    state.failures.erase(call);
  } else {
    state.failures[call] = {result, passing};
  }
}
void fake_begin_capture() { capture = Capture::running; }
// Did the capture go well?
int fake_end_capture() { return capture.exchange(Capture::none) == Capture::running ? 1 : 0; }
int fake_live(const char* what) {
  const std::scoped_lock lock(state.mutex);
  return state.live[what];
}
}
