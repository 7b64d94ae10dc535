// CUDA devices for a CPU build of torch: tensors on cuda:N whose memory is the host's, whose operators are the CPU's.
//
// What the tests of a GPU's code need is here: memory that the fake driver of ../fake_cuda.cpp can copy and hand to
// other processes, an operator that is given tensors of two devices refuses, and collectives. What is not: asynchrony.
// An operator is over when it returns, and begins by waiting for the driver's default stream.
//
// It must be loaded before torch, for it answers in torch's place whether there is an accelerator.
#include <ATen/ATen.h>
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/DeviceAccelerator.h>
#include <ATen/EmptyTensor.h>
#include <ATen/detail/CUDAHooksInterface.h>
#include <ATen/native/CPUFallback.h>
#include <ATen/native/transformers/attention.h>
#include <ATen/ops/_reshape_alias_cpu_dispatch.h>
#include <ATen/ops/as_strided_cpu_dispatch.h>
#include <ATen/ops/set_cpu_dispatch.h>
#include <ATen/ops/set_native.h>
#include <ATen/ops/view_cpu_dispatch.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <dlfcn.h>
#include <torch/extension.h>

#include <map>
#include <mutex>
#include <set>
#include <string>
#include <torch/csrc/distributed/c10d/Backend.hpp>
#include <vector>

namespace fake {

using c10::Device;
using c10::DeviceIndex;
using c10::DeviceType;
using c10::Stream;

constexpr DeviceIndex kDevices = 2;
thread_local DeviceIndex current = 0;

// --- the driver ---

class Driver {
 public:
  static Driver& get() {
    static Driver& driver = *new Driver;
    return driver;
  }

  // The slab is reserved whole and takes what is touched.
  void* allocate(DeviceIndex device, std::size_t nbytes) {
    Own& own = devices_[device];
    TORCH_CHECK(own.used + nbytes <= kSlabBytes, "fake device ", int(device), " has no more memory");
    own.used += nbytes;
    return own.slab + own.used - nbytes;
  }

  // The driver's streams are threads; torch's operators run in their caller.
  void synchronize() {
    for (const Own& own : devices_) {
      set_current_(own.context);
      synchronize_();
    }
    set_current_(devices_[current].context);
  }

 private:
  static constexpr std::size_t kSlabBytes = std::size_t{4} << 30;
  struct Own {
    void* context = nullptr;
    char* slab = nullptr;
    std::size_t used = 0;
  };

  Driver() {
    const char* path = std::getenv("KDFLOW_CUDA_DRIVER");
    TORCH_CHECK(path != nullptr, "fake device: KDFLOW_CUDA_DRIVER does not name the fake driver");
    void* library = dlopen(path, RTLD_NOW);
    TORCH_CHECK(library != nullptr, dlerror());
    const auto find = [&]<class F>(F*& function, const char* name) {
      function = reinterpret_cast<F*>(dlsym(library, name));
      TORCH_CHECK(function != nullptr, "fake device: the driver has no ", name);
    };
    int (*init)(unsigned);
    int (*retain)(void**, int);
    int (*allocate)(std::uint64_t*, std::size_t);
    find(init, "cuInit");
    find(retain, "cuDevicePrimaryCtxRetain");
    find(allocate, "cuMemAlloc_v2");
    find(set_current_, "cuCtxSetCurrent");
    find(synchronize_, "cuCtxSynchronize");
    init(0);
    for (DeviceIndex device = 0; device < kDevices; ++device) {
      Own& own = devices_[device];
      std::uint64_t slab = 0;
      retain(&own.context, device);
      set_current_(own.context);
      TORCH_CHECK(allocate(&slab, kSlabBytes) == 0, "fake device: no memory from the driver");
      own.slab = reinterpret_cast<char*>(slab);
    }
  }

  int (*set_current_)(void*);
  int (*synchronize_)();
  Own devices_[kDevices];
};

void synchronize() { Driver::get().synchronize(); }

// --- memory: freed blocks are kept by their size, as by torch's own allocator ---

class Allocator final : public c10::Allocator {
 public:
  static Allocator& get() {
    static Allocator& allocator = *new Allocator;
    return allocator;
  }

  c10::DataPtr allocate(std::size_t nbytes) override {
    const Device device(DeviceType::CUDA, current);
    if (nbytes == 0) return {nullptr, nullptr, &free, device};
    const std::scoped_lock lock(mutex_);
    std::size_t size = 512;
    while (size < nbytes) size *= 2;
    auto& kept = kept_[{current, size}];
    if (kept.empty()) kept.push_back(Driver::get().allocate(current, size));
    void* block = kept.back();
    kept.pop_back();
    blocks_[block] = {current, size};
    allocated[current] += size;
    peak[current] = std::max(peak[current], allocated[current]);
    return {block, block, &free, device};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &free; }
  void copy_data(void* target, const void* source, std::size_t nbytes) const override {
    std::memcpy(target, source, nbytes);
  }

  std::size_t allocated[kDevices] = {}, peak[kDevices] = {};

 private:
  using Block = std::pair<DeviceIndex, std::size_t>;

  static void free(void* block) {
    if (block == nullptr) return;
    Allocator& self = get();
    const std::scoped_lock lock(self.mutex_);
    const auto found = self.blocks_.find(block);
    self.kept_[found->second].push_back(block);
    self.allocated[found->second.first] -= found->second.second;
    self.blocks_.erase(found);
  }

  std::mutex mutex_;
  std::map<Block, std::vector<void*>> kept_;
  std::map<void*, Block> blocks_;
};

struct Guard final : c10::impl::DeviceGuardImplInterface {
  DeviceType type() const override { return DeviceType::CUDA; }
  Device getDevice() const override { return {DeviceType::CUDA, current}; }
  Device exchangeDevice(Device device) const override {
    const Device before = getDevice();
    setDevice(device);
    return before;
  }
  void setDevice(Device device) const override {
    TORCH_CHECK(device.index() < kDevices, "fake device: there is no ", device);
    if (device.index() >= 0) current = device.index();
  }
  void uncheckedSetDevice(Device device) const noexcept override { current = device.index(); }
  Stream getStream(Device device) const override { return Stream(Stream::DEFAULT, device); }
  Stream getDefaultStream(Device device) const override { return Stream(Stream::DEFAULT, device); }
  Stream getNewStream(Device device, int) const override { return Stream(Stream::DEFAULT, device); }
  Stream exchangeStream(Stream stream) const override { return stream; }
  DeviceIndex deviceCount() const noexcept override { return kDevices; }
  c10::DeviceCapability getDeviceCapability(Device) const override { return {}; }
  void record(void** event, const Stream&, const DeviceIndex, const c10::EventFlag) const override { *event = &marker; }
  void block(void*, const Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  void destroyEvent(void*, const DeviceIndex) const noexcept override {}
  bool queryStream(const Stream&) const override { return true; }
  void synchronizeStream(const Stream&) const override { synchronize(); }
  void synchronizeEvent(void*) const override {}
  void synchronizeDevice(const DeviceIndex) const override { synchronize(); }
  void recordDataPtrOnStream(const c10::DataPtr&, const Stream&) const override {}

  static inline char marker;  // of events, which have all passed
};

struct Hooks final : at::CUDAHooksInterface {
  void init() const override {}
  bool isAvailable() const override { return true; }
  bool hasCUDA() const override { return true; }
  bool hasPrimaryContext(DeviceIndex) const override { return true; }
  DeviceIndex deviceCount() const override { return kDevices; }
  DeviceIndex getCurrentDevice() const override { return current; }
  bool isPinnedPtr(const void*) const override { return false; }
  c10::Allocator* getPinnedMemoryAllocator() const override { return c10::GetAllocator(c10::DeviceType::CPU); }
  const at::Generator& getDefaultGenerator(DeviceIndex) const override { return at::detail::getDefaultCPUGenerator(); }
};

// --- operators ---

// A CPU tensor over the same memory.
at::Tensor on_host(const at::Tensor& tensor) {
  if (!tensor.is_cuda()) return tensor;
  return at::from_blob(
      tensor.data_ptr(), tensor.sizes(), tensor.strides(), [tensor](void*) {},
      at::TensorOptions().dtype(tensor.dtype()).device(at::kCPU));
}

using Size = c10::IntArrayRef;
using Offset = std::optional<std::int64_t>;
constexpr c10::DispatchKeySet kKeys(c10::DispatchKey::CUDA);

at::Tensor empty(Size size, std::optional<at::ScalarType> dtype, std::optional<at::Layout>,
                 std::optional<Device> device, std::optional<bool>, std::optional<at::MemoryFormat> format) {
  const c10::OptionalDeviceGuard guard(device);
  return at::detail::empty_generic(size, &Allocator::get(), kKeys, c10::dtype_or_default(dtype), format);
}
at::Tensor empty_strided(Size size, Size stride, std::optional<at::ScalarType> dtype, std::optional<at::Layout>,
                         std::optional<Device> device, std::optional<bool>) {
  const c10::OptionalDeviceGuard guard(device);
  return at::detail::empty_strided_generic(size, stride, &Allocator::get(), kKeys, c10::dtype_or_default(dtype));
}

void resize_storage(c10::StorageImpl& storage, std::size_t nbytes) {
  const c10::DeviceGuard guard(storage.device());
  auto fresh = Allocator::get().allocate(nbytes);
  if (const std::size_t kept = std::min(nbytes, storage.nbytes())) std::memcpy(fresh.get(), storage.data(), kept);
  storage.set_data_ptr_noswap(std::move(fresh));
  storage.set_nbytes(nbytes);
}
const at::Tensor& resize_(const at::Tensor& self, c10::SymIntArrayRef size, std::optional<at::MemoryFormat>) {
  self.unsafeGetTensorImpl()->set_sizes_contiguous(C10_AS_INTARRAYREF_SLOW(size));
  const std::size_t nbytes = (self.numel() + self.storage_offset()) * self.element_size();
  if (nbytes > self.storage().nbytes()) resize_storage(*self.storage().unsafeGetStorageImpl(), nbytes);
  return self;
}

at::Tensor& copy_(at::Tensor& self, const at::Tensor& source, bool) {
  synchronize();
  if (self.numel() > 0) on_host(self).copy_(on_host(source));
  return self;
}
at::Tensor copy_from(const at::Tensor& self, const at::Tensor& target, bool) {
  at::Tensor to = target;
  return copy_(to, self, false);
}
at::Tensor copy_from_and_resize(const at::Tensor& self, const at::Tensor& target) {
  if (target.sizes() != self.sizes()) target.resize_(self.sizes());
  return copy_from(self, target, false);
}
at::Scalar local_scalar_dense(const at::Tensor& self) {
  synchronize();
  return at::_local_scalar_dense(on_host(self));
}

// The CPU's operator, for arguments that CUDA's would take.
void on_cpu(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  static const std::set<std::string> index_on_any_device = {"aten::index", "aten::_index_put_impl_"};
  synchronize();
  std::optional<Device> device;
  const auto check = [&](const at::Tensor& tensor) {
    if (!tensor.defined() || (tensor.is_cpu() && tensor.dim() == 0)) return;
    if (!device) device = tensor.device();
    TORCH_CHECK(tensor.device() == *device, "Expected all tensors to be on the same device, but ", op.schema().name(),
                " found ", *device, " and ", tensor.device());
  };
  if (!index_on_any_device.contains(op.schema().name())) {
    for (const auto& argument : torch::jit::last(*stack, op.schema().arguments().size())) {
      if (argument.isTensor()) check(argument.toTensor());
      if (argument.isTensorList()) {
        for (const at::Tensor tensor : argument.toTensorList()) check(tensor);
      }
    }
  }
  at::native::cpu_fallback(op, stack);
}

std::int64_t choose_sdp(const at::Tensor&, const at::Tensor&, const at::Tensor&, const std::optional<at::Tensor>&,
                        double, bool, std::optional<double>, bool) {
  return 0;  // the formula itself
}

// --- collectives: gloo's, over the same memory; they refuse tensors of the host, as NCCL does ---

using c10d::ReduceOp;
using Tensors = std::vector<at::Tensor>;
using WorkPtr = c10::intrusive_ptr<c10d::Work>;

at::Tensor of_device(const at::Tensor& tensor) {
  TORCH_CHECK(tensor.is_cuda(), "fake nccl: got a tensor on ", tensor.device());
  return on_host(tensor);
}
Tensors of_device(const Tensors& tensors) {
  Tensors found;
  for (const auto& tensor : tensors) found.push_back(of_device(tensor));
  return found;
}
std::vector<Tensors> of_device(const std::vector<Tensors>& lists) {
  std::vector<Tensors> found;
  for (const auto& tensors : lists) found.push_back(of_device(tensors));
  return found;
}

class Nccl final : public c10d::Backend {
 public:
  Nccl(c10::intrusive_ptr<c10d::Backend> gloo, int rank, int size) : Backend(rank, size), gloo_(std::move(gloo)) {}

  const std::string getBackendName() const override { return "fake_nccl"; }

  WorkPtr broadcast(Tensors& tensors, const c10d::BroadcastOptions& options) override {
    return run([&](auto& all) { return gloo_->broadcast(all, options); }, tensors);
  }
  WorkPtr allreduce(Tensors& tensors, const c10d::AllreduceOptions& options) override {
    return run([&](auto& all) { return gloo_->allreduce(all, options); }, tensors);
  }
  WorkPtr allgather(std::vector<Tensors>& out, Tensors& in, const c10d::AllgatherOptions& options) override {
    return run([&](auto& to, auto& from) { return gloo_->allgather(to, from, options); }, out, in);
  }
  WorkPtr _allgather_base(at::Tensor& out, at::Tensor& in, const c10d::AllgatherOptions& options) override {
    return run([&](auto& to, auto& from) { return gloo_->_allgather_base(to, from, options); }, out, in);
  }
  WorkPtr allgather_into_tensor_coalesced(Tensors& out, Tensors& in, const c10d::AllgatherOptions& options) override {
    return run([&](auto& to, auto& from) { return gloo_->allgather_into_tensor_coalesced(to, from, options); }, out,
               in);
  }
  WorkPtr scatter(Tensors& out, std::vector<Tensors>& in, const c10d::ScatterOptions& options) override {
    return run([&](auto& to, auto& from) { return gloo_->scatter(to, from, options); }, out, in);
  }
  WorkPtr reduce_scatter(Tensors& out, std::vector<Tensors>& in, const c10d::ReduceScatterOptions& options) override {
    return run([&](auto& to, auto& from) { return gloo_->reduce_scatter(to, from, options); }, out, in);
  }
  WorkPtr _reduce_scatter_base(at::Tensor& out, at::Tensor& in, const c10d::ReduceScatterOptions& options) override {
    return run([&](auto& to, auto& from) { return gloo_->_reduce_scatter_base(to, from, options); }, out, in);
  }
  WorkPtr reduce_scatter_tensor_coalesced(Tensors& out, Tensors& in,
                                          const c10d::ReduceScatterOptions& options) override {
    return run([&](auto& to, auto& from) { return gloo_->reduce_scatter_tensor_coalesced(to, from, options); }, out,
               in);
  }
  WorkPtr alltoall_base(at::Tensor& out, at::Tensor& in, std::vector<std::int64_t>& out_sizes,
                        std::vector<std::int64_t>& in_sizes, const c10d::AllToAllOptions& options) override {
    const auto call = [&](auto& to, auto& from) {
      return gloo_->alltoall_base(to, from, out_sizes, in_sizes, options);
    };
    return run(call, out, in);
  }
  WorkPtr barrier(const c10d::BarrierOptions& options) override {
    return run([&] { return gloo_->barrier(options); });
  }

 private:
  template <class Call, class... Arguments>
  WorkPtr run(Call call, Arguments&... arguments) {
    synchronize();
    auto views = std::make_tuple(of_device(arguments)...);
    WorkPtr work = std::apply(call, views);
    work->wait();
    return work;
  }

  c10::intrusive_ptr<c10d::Backend> gloo_;
};

}  // namespace fake

// In place of torch's own, which know at compile time that there is no CUDA.
namespace at::accelerator {
TORCH_API std::optional<c10::DeviceType> getAccelerator(bool) { return c10::DeviceType::CUDA; }
}  // namespace at::accelerator
namespace at::detail {
TORCH_API const CUDAHooksInterface& getCUDAHooks() {
  static const fake::Hooks& hooks = *new fake::Hooks;
  return hooks;
}
}  // namespace at::detail

namespace {
using FakeGuard = fake::Guard;
C10_REGISTER_GUARD_IMPL(CUDA, FakeGuard);
}  // namespace

TORCH_LIBRARY_IMPL(_, CUDA, m) { m.fallback(torch::CppFunction::makeFromBoxedFunction<&fake::on_cpu>()); }
TORCH_LIBRARY_IMPL(aten, CUDA, m) {
  using fake::Offset;
  using fake::Size;
  m.impl("empty.memory_format", fake::empty);
  m.impl("empty_strided", fake::empty_strided);
  m.impl("resize_", fake::resize_);
  m.impl("copy_", fake::copy_);
  m.impl("_copy_from", fake::copy_from);
  m.impl("_copy_from_and_resize", fake::copy_from_and_resize);
  m.impl("_local_scalar_dense", fake::local_scalar_dense);
  m.impl("view", [](const at::Tensor& self, Size size) { return at::cpu::view(self, size); });
  m.impl("as_strided", [](const at::Tensor& self, Size size, Size stride, Offset offset) {
    return at::cpu::as_strided(self, size, stride, offset);
  });
  m.impl("_reshape_alias",
         [](const at::Tensor& self, Size size, Size stride) { return at::cpu::_reshape_alias(self, size, stride); });
  m.impl("set_.source_Storage",
         [](at::Tensor& self, c10::Storage storage) -> at::Tensor& { return at::cpu::set_(self, storage); });
  m.impl("set_.source_Storage_storage_offset",
         [](at::Tensor& self, c10::Storage storage, std::int64_t offset, Size size, Size stride) -> at::Tensor& {
           return at::cpu::set_(self, storage, offset, size, stride);
         });
  m.impl("set_.source_Tensor", [](at::Tensor& self, const at::Tensor& source) -> at::Tensor& {
    return at::native::set_tensor_(self, source);
  });
}

PYBIND11_MODULE(fake_device, m) {
  // To be called when torch is loaded.
  m.def("start", [] {
    c10::SetAllocator(c10::DeviceType::CUDA, &fake::Allocator::get(), 1);
    at::native::_fused_sdp_choice_stub.set_cuda_dispatch_ptr(&fake::choose_sdp);
  });
  m.def("synchronize", &fake::synchronize, py::call_guard<py::gil_scoped_release>());
  m.def("device_count", [] { return int(fake::kDevices); });
  m.def("current_device", [] { return int(fake::current); });
  m.def("set_device", [](int device) { fake::Guard().setDevice(c10::Device(c10::DeviceType::CUDA, device)); });
  m.def("allocated", [](int device) { return fake::Allocator::get().allocated[device]; });
  m.def("peak", [](int device) { return fake::Allocator::get().peak[device]; });
  m.def("reset_peak",
        [](int device) { fake::Allocator::get().peak[device] = fake::Allocator::get().allocated[device]; });
  m.def("resize_storage", [](std::uintptr_t storage, std::size_t nbytes) {
    fake::resize_storage(*reinterpret_cast<c10::StorageImpl*>(storage), nbytes);
  });
  m.def("make_nccl", [](c10::intrusive_ptr<c10d::Backend> gloo, int rank, int size) {
    return c10::intrusive_ptr<c10d::Backend>(c10::make_intrusive<fake::Nccl>(std::move(gloo), rank, size));
  });
}
