// The DLPack exchange structures (ABI facts of https://dmlc.github.io/dlpack/latest/c_api.html), as
// far as used.
#pragma once

#include <cstddef>
#include <cstdint>

namespace kdflow::dlpack {

inline constexpr std::int32_t kCpu = 1, kCuda = 2;

struct Device {
  std::int32_t type;
  std::int32_t id;
};

struct DataType {
  std::uint8_t code;
  std::uint8_t bits;
  std::uint16_t lanes;
};

struct Tensor {
  void* data;
  Device device;
  std::int32_t ndim;
  DataType dtype;
  std::int64_t* shape;
  std::int64_t* strides;  // null: row-major
  std::uint64_t byte_offset;
};

struct ManagedTensor {
  Tensor tensor;
  void* manager_context;
  void (*deleter)(ManagedTensor*);
};

static_assert(sizeof(void*) == 8 && sizeof(Tensor) == 48 && sizeof(ManagedTensor) == 64);

}  // namespace kdflow::dlpack
