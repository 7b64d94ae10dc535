// How much memory there is to be had. Who allocates more is killed by the kernel, or others are: it refuses nothing.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <fstream>
#include <limits>
#include <string>

namespace kdflow {

// The least limit of this process's control groups, as containers and batch systems set them.
inline std::uint64_t control_group_limit() {
  std::uint64_t least = std::numeric_limits<std::uint64_t>::max();
  std::ifstream groups("/proc/self/cgroup");
  for (std::string line; std::getline(groups, line);) {  // "4:memory:/job/7", or "0::/job/7" of version 2
    const std::size_t first = line.find(':'), second = line.find(':', first + 1);
    if (second == std::string::npos || line[second + 1] != '/') continue;
    const std::string controller = line.substr(first + 1, second - first - 1);
    if (!controller.empty() && controller != "memory") continue;
    const std::string mount = controller.empty() ? "/sys/fs/cgroup" : "/sys/fs/cgroup/memory";
    const std::string file = controller.empty() ? "/memory.max" : "/memory.limit_in_bytes";
    for (std::string group = line.substr(second + 1);; group.resize(group.rfind('/'))) {
      std::uint64_t limit = 0;
      if (std::ifstream(mount + group + file) >> limit) least = std::min(least, limit);
      if (group.empty()) break;
    }
  }
  return least;
}

inline std::uint64_t available_bytes() {
  std::uint64_t sum = 0;
  std::ifstream meminfo("/proc/meminfo");  // "MemAvailable:   123 kB"
  for (std::string line; std::getline(meminfo, line);) {
    for (const char* name : {"MemAvailable:", "SwapFree:"}) {
      if (!line.starts_with(name)) continue;
      sum += std::strtoull(line.c_str() + line.find(':') + 1, nullptr, 10) << 10;
    }
  }
  return std::min(sum > 0 ? sum : std::numeric_limits<std::uint64_t>::max(), control_group_limit());
}

}  // namespace kdflow
