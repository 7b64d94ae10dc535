// Copies into slots.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <fstream>

#if defined(__SSE2__)
#include <emmintrin.h>
#endif

namespace kdflow {

// Of one third-level cache as the kernel lists it. (sysconf adds several up, and in virtual machines adds up those of
// the whole host: ten times too much was seen.)
inline std::uint64_t last_level_cache_bytes() {
  static const std::uint64_t bytes = [] {
    std::ifstream file("/sys/devices/system/cpu/cpu0/cache/index3/size");  // "32768K"
    std::uint64_t kib = 0;
    char unit = 0;
    return file >> kib >> unit && unit == 'K' && kib > 0 ? kib << 10 : std::uint64_t{32} << 20;
  }();
  return bytes;
}

// memcpy, or, where the target is not in the caches anyhow, with stores that pass them by: those do not read the lines
// they are about to overwrite. `target` is aligned to 64 bytes.
inline void copy(std::byte* target, const void* source, std::uint64_t nbytes, bool past_caches) {
  std::uint64_t done = 0;
#if defined(__SSE2__)
  if (past_caches) {
    const auto* from = static_cast<const __m128i*>(source);
    auto* to = reinterpret_cast<__m128i*>(target);
    for (; done + 64 <= nbytes; done += 64, from += 4, to += 4) {
      const __m128i a = _mm_loadu_si128(from), b = _mm_loadu_si128(from + 1);
      const __m128i c = _mm_loadu_si128(from + 2), d = _mm_loadu_si128(from + 3);
      _mm_stream_si128(to, a);
      _mm_stream_si128(to + 1, b);
      _mm_stream_si128(to + 2, c);
      _mm_stream_si128(to + 3, d);
    }
    _mm_sfence();  // such stores are in no order with the commit that follows, unless told
  }
#else
  static_cast<void>(past_caches);
#endif
  if (done < nbytes) std::memcpy(target + done, static_cast<const std::byte*>(source) + done, nbytes - done);
}

}  // namespace kdflow
