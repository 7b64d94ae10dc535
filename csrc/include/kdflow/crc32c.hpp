// CRC-32C (Castagnoli, reflected polynomial 0x82f63b78), with the SSE4.2 instruction where the CPU
// has it.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <cstring>

namespace kdflow {

namespace detail {

consteval std::array<std::uint32_t, 256> crc32c_table() {
  std::array<std::uint32_t, 256> table{};
  for (std::uint32_t byte = 0; byte < 256; ++byte) {
    std::uint32_t crc = byte;
    for (int bit = 0; bit < 8; ++bit) crc = (crc >> 1) ^ ((crc & 1) != 0 ? 0x82f63b78u : 0u);
    table[byte] = crc;
  }
  return table;
}

inline std::uint32_t crc32c_portable(std::uint32_t crc, const unsigned char* data, std::size_t size) {
  static constexpr auto table = crc32c_table();
  for (; size > 0; --size) crc = (crc >> 8) ^ table[(crc ^ *data++) & 0xff];
  return crc;
}

#if defined(__x86_64__)
__attribute__((target("sse4.2"))) inline std::uint32_t crc32c_sse42(std::uint32_t crc, const unsigned char* data,
                                                                    std::size_t size) {
  std::uint64_t wide = crc;
  for (; size >= 8; size -= 8, data += 8) {
    std::uint64_t word;
    std::memcpy(&word, data, 8);
    wide = __builtin_ia32_crc32di(wide, word);
  }
  crc = static_cast<std::uint32_t>(wide);
  for (; size > 0; --size) crc = __builtin_ia32_crc32qi(crc, *data++);
  return crc;
}
#endif

}  // namespace detail

inline std::uint32_t crc32c(const void* data, std::size_t size) {
  const auto* bytes = static_cast<const unsigned char*>(data);
#if defined(__x86_64__)
  if (__builtin_cpu_supports("sse4.2")) return ~detail::crc32c_sse42(~0u, bytes, size);
#endif
  return ~detail::crc32c_portable(~0u, bytes, size);
}

}  // namespace kdflow
