// The memory of a ring: a sealed memfd. It has no name, so nothing is left behind when the last
// process is gone.
#pragma once

#include <fcntl.h>
#include <linux/mempolicy.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cerrno>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <utility>

#include "kdflow/available.hpp"
#include "kdflow/errors.hpp"

namespace kdflow {

class UniqueFd {
 public:
  UniqueFd() = default;
  explicit UniqueFd(int fd) : fd_(fd) {}
  UniqueFd(UniqueFd&& other) noexcept : fd_(std::exchange(other.fd_, -1)) {}
  UniqueFd& operator=(UniqueFd&& other) noexcept {
    std::swap(fd_, other.fd_);
    return *this;
  }
  ~UniqueFd() {
    if (fd_ >= 0) ::close(fd_);
  }
  int get() const { return fd_; }
  explicit operator bool() const { return fd_ >= 0; }

 private:
  int fd_ = -1;
};

struct SegmentOptions {
  bool huge_pages = false;         // from the pool of vm.nr_hugepages
  std::optional<int> numa_node{};  // preferred, not forced
};

class Segment {
 public:
  static Segment create(const std::string& name, std::size_t bytes, const SegmentOptions& options) {
    const std::uint64_t available = available_bytes();
    if (!options.huge_pages && bytes > available - available / 8) {  // others need some, too
      throw TransportError(name + ": cannot allocate " + std::to_string(bytes) + " bytes of shared memory, only " +
                           std::to_string(available) +
                           " are available, and an eighth of it stays free; use fewer or smaller slots");
    }
    UniqueFd fd = make_memfd(name, options.huge_pages);
    if (::ftruncate(fd.get(), static_cast<off_t>(bytes)) != 0) throw_errno(name + ": ftruncate");
    const std::string remedy =
        options.huge_pages ? "; raise vm.nr_hugepages or pass huge_pages=False" : "; use fewer or smaller slots";
    Segment segment(name, std::move(fd), bytes, remedy);  // huge pages are taken from their pool here
    if (options.numa_node) segment.prefer_node(*options.numa_node);
    // Every page exists from here on: too little memory is this error, not a SIGBUS in the middle
    // of a run.
    int error = 0;
    while ((error = ::posix_fallocate(segment.fd(), 0, static_cast<off_t>(bytes))) == EINTR) {
    }
    if (error != 0) {
      errno = error;
      throw_errno(name + ": cannot allocate " + std::to_string(bytes) + " bytes of shared memory" + remedy);
    }
    if (::fcntl(segment.fd(), F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL) != 0) {
      throw_errno(name + ": cannot seal the memfd");
    }
    return segment;
  }

  static bool is_sealed(const UniqueFd& fd) {
    const int seals = ::fcntl(fd.get(), F_GET_SEALS);
    return seals >= 0 && (seals & F_SEAL_SHRINK) != 0 && (seals & F_SEAL_GROW) != 0;
  }

  // Refuses whatever could shrink under the mapping.
  static Segment attach(UniqueFd fd) {
    if (!is_sealed(fd)) {
      throw RingCorrupt("fd " + std::to_string(fd.get()) + " is not a kdflow ring: expected a memfd sealed in size");
    }
    struct stat status{};
    if (::fstat(fd.get(), &status) != 0) throw_errno("fstat of a ring");
    if (status.st_size <= 0) throw RingCorrupt("the ring's memfd is empty");
    return Segment("ring", std::move(fd), static_cast<std::size_t>(status.st_size));
  }

  Segment(Segment&& other) noexcept
      : fd_(std::move(other.fd_)), base_(std::exchange(other.base_, nullptr)), bytes_(other.bytes_) {}
  Segment& operator=(Segment&&) = delete;
  ~Segment() {
    if (base_ != nullptr) ::munmap(base_, bytes_);
  }

  int fd() const { return fd_.get(); }
  std::size_t bytes() const { return bytes_; }
  std::byte* at(std::size_t offset) const { return static_cast<std::byte*>(base_) + offset; }

  // Fills the page table now, so that the first lap of the ring runs as fast as the second.
  void populate() const {
    constexpr int kPopulateWrite = 23;  // MADV_POPULATE_WRITE, Linux 5.14; older kernels fault the pages in on use
    ::madvise(base_, bytes_, kPopulateWrite);
  }

 private:
  Segment(const std::string& name, UniqueFd fd, std::size_t bytes, const std::string& remedy = "")
      : fd_(std::move(fd)), bytes_(bytes) {
    base_ = ::mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, fd_.get(), 0);
    if (base_ == MAP_FAILED) {
      base_ = nullptr;
      throw_errno(name + ": cannot map " + std::to_string(bytes) + " bytes" + remedy);
    }
  }

  static UniqueFd make_memfd(const std::string& name, bool huge_pages) {
    constexpr unsigned kNoExecSeal = 8;  // MFD_NOEXEC_SEAL, Linux 6.3
    const unsigned flags = MFD_CLOEXEC | MFD_ALLOW_SEALING | (huge_pages ? unsigned{MFD_HUGETLB} : 0u);
    UniqueFd fd(::memfd_create(name.c_str(), flags | kNoExecSeal));
    if (!fd && errno == EINVAL) fd = UniqueFd(::memfd_create(name.c_str(), flags));
    if (!fd) throw_errno(name + ": memfd_create");
    return fd;
  }

  void prefer_node(int node) const {
    constexpr unsigned kBits = 8 * sizeof(unsigned long);
    unsigned long mask[16] = {};
    const auto bit = static_cast<unsigned>(node);
    if (node < 0 || bit >= 16 * kBits) throw std::invalid_argument("numa_node: no node " + std::to_string(node));
    mask[bit / kBits] = 1ul << (bit % kBits);
    if (::syscall(SYS_mbind, base_, bytes_, MPOL_PREFERRED, mask, 16 * kBits, 0) != 0) {
      throw_errno("numa_node: expected a node with memory that this process may use, got " + std::to_string(node));
    }
  }

  UniqueFd fd_;
  void* base_ = nullptr;
  std::size_t bytes_ = 0;
};

}  // namespace kdflow
