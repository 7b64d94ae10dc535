// What lies where in the segment. Slot state and payload are kept apart, for the payload may be device memory.
//
//   Header | Cursors | Counters | PeerEntry[kMaxPeers] | SlotState[num_slots] | pad to a page |
//   payload[num_slots], or one page that says where in device memory the payload is
#pragma once

#include <unistd.h>

#include <atomic>
#include <bit>
#include <cstddef>
#include <cstdint>
#include <string>
#include <type_traits>

#include "kdflow/control.hpp"
#include "kdflow/crc32c.hpp"
#include "kdflow/errors.hpp"

namespace kdflow {

inline constexpr std::size_t kCacheLine = 64;
inline constexpr std::size_t kPageBytes = 4096;
inline constexpr std::size_t kHugePageBytes = 2u << 20;
inline constexpr std::size_t kMaxPeers = 128;
inline constexpr std::uint64_t kMaxSlots = 1u << 16;
inline constexpr std::uint64_t kMaxSlotBytes = std::uint64_t{1} << 40;
inline constexpr std::size_t kMaxDims = 8;
inline constexpr std::uint64_t kMagic = 0x31474e495246444b;  // "KDFRING1"
inline constexpr std::uint32_t kVersion = 3;

using AtomicWord = std::atomic<std::uint64_t>;
static_assert(AtomicWord::is_always_lock_free, "a lock inside an atomic would not work across processes");
static_assert(std::endian::native == std::endian::little, "the low half of the control word is its futex word");

enum class RingKind : std::uint32_t {
  data = 1,     // several producers, one consumer, payloads are read in place
  request = 2,  // several of both
};

enum class Placement : std::uint32_t { host = 0, device = 1 };

// Written once by the creator. Every peer copies it, checks it, and uses only its copy from then
// on.
struct Header {
  std::uint64_t magic;
  std::uint32_t version;
  RingKind kind;
  std::uint64_t num_slots;
  std::uint64_t slot_bytes;
  std::uint64_t payload_stride;
  std::uint64_t payload_offset;
  std::uint64_t segment_bytes;
  std::uint64_t pid_namespace;
  std::uint64_t id;        // random: tells the ring from whatever else its handle may open
  std::uint32_t checksum;  // 0 or 1
  Placement placement;     // of the payload
  char name[48];
  std::uint32_t crc;  // of all the bytes before it

  std::uint32_t expected_crc() const { return crc32c(this, offsetof(Header, crc)); }
};
static_assert(sizeof(Header) <= 4 * kCacheLine && std::is_trivially_copyable_v<Header>);

// Hints only: the truth is in the control words, so a peer killed between a slot and its cursor
// costs nothing.
struct Cursors {
  alignas(kCacheLine) AtomicWord next_write;
  alignas(kCacheLine) AtomicWord next_read;
  // Rung by every commit; bit 0: a poller sleeps on it.
  alignas(kCacheLine) std::atomic<std::uint32_t> bell;
};

struct SideCounters {
  AtomicWord attached, records, bytes, waits, wait_ns;
};

struct Counters {
  alignas(kCacheLine) SideCounters producers;
  alignas(kCacheLine) SideCounters consumers;
  alignas(kCacheLine) AtomicWord died;
  AtomicWord abandoned, aborted, reclaimed, lost;
};

struct alignas(kCacheLine) PeerEntry {
  AtomicWord identity;    // PeerIdentity
  AtomicWord start_time;  // Incarnation of the process, process.hpp
  AtomicWord stack;
};

// Written by the owner of a slot in phase writing, read by the owner of the same slot in phase
// reading.
struct Record {
  std::uint64_t ticket;
  std::uint64_t generation;
  std::uint64_t nbytes;
  std::int64_t microbatch_id;
  std::int64_t tag;
  std::uint32_t crc;
  std::int32_t writer_pid;
  std::uint8_t dtype_code;  // DLPack
  std::uint8_t dtype_bits;
  std::uint16_t ndim;
  std::uint32_t reserved;
  std::int64_t shape[kMaxDims];
  std::int64_t committed_ns;  // CLOCK_MONOTONIC
  char reason[128];           // of an abort
};

struct alignas(kCacheLine) SlotState {
  AtomicWord control;
  alignas(kCacheLine) Record record;
};

static_assert(sizeof(Record) == 256 && std::is_trivially_copyable_v<Record>);
static_assert(sizeof(SlotState) == 5 * kCacheLine && offsetof(SlotState, record) == kCacheLine);
static_assert(sizeof(PeerEntry) == kCacheLine && sizeof(Cursors) == 3 * kCacheLine);
static_assert(kMaxPeers <= Control::kMaxOwners);

inline constexpr std::size_t kCursorsOffset = 4 * kCacheLine;
inline constexpr std::size_t kCountersOffset = kCursorsOffset + sizeof(Cursors);
inline constexpr std::size_t kPeersOffset = kCountersOffset + sizeof(Counters);
inline constexpr std::size_t kSlotsOffset = kPeersOffset + kMaxPeers * sizeof(PeerEntry);

constexpr std::uint64_t round_up(std::uint64_t value, std::uint64_t unit) { return (value + unit - 1) / unit * unit; }

// Fills in every size that follows from num_slots and slot_bytes.
inline void lay_out(Header& header, std::uint64_t page_bytes) {
  header.payload_offset = round_up(kSlotsOffset + header.num_slots * sizeof(SlotState), page_bytes);
  header.payload_stride = round_up(header.slot_bytes, page_bytes);
  header.segment_bytes = header.payload_offset +
                         (header.placement == Placement::host ? header.num_slots * header.payload_stride : page_bytes);
}

// Throws RingCorrupt unless every number fits a mapping of `mapped_bytes`.
inline void check_header(const Header& header, std::uint64_t mapped_bytes) {
  const auto fail = [](const std::string& what) { throw RingCorrupt("ring header: " + what); };
  if (header.magic != kMagic) fail("expected a kdflow ring, got another magic number");
  if (header.version != kVersion) {
    fail("expected version " + std::to_string(kVersion) + ", got " + std::to_string(header.version) +
         "; both sides must run the same kdflow");
  }
  if (header.crc != header.expected_crc()) fail("its checksum does not match; the memory was overwritten");
  if (header.kind != RingKind::data && header.kind != RingKind::request) fail("unknown kind of ring");
  if (header.checksum > 1) fail("checksum flag is neither 0 nor 1");
  if (header.placement != Placement::host && header.placement != Placement::device) fail("unknown placement");
  if (header.num_slots == 0 || header.num_slots > kMaxSlots) fail("num_slots out of range");
  if (header.slot_bytes == 0 || header.slot_bytes > kMaxSlotBytes) fail("slot_bytes out of range");
  if (header.name[sizeof(header.name) - 1] != '\0') fail("name is not terminated");
  bool fits = false;
  for (const std::uint64_t page_bytes : {kPageBytes, kHugePageBytes}) {
    Header expected = header;
    lay_out(expected, page_bytes);
    fits =
        fits || (expected.payload_offset == header.payload_offset && expected.payload_stride == header.payload_stride &&
                 expected.segment_bytes == header.segment_bytes && header.segment_bytes == mapped_bytes);
  }
  if (!fits) fail("sizes do not fit a mapping of " + std::to_string(mapped_bytes) + " bytes");
}

// Throws RingCorrupt unless the record is the one expected and lies inside its slot.
inline void check_record(const Record& record, const Header& header, std::uint64_t ticket, std::uint64_t generation) {
  const auto fail = [&](const std::string& what) {
    throw RingCorrupt(std::string(header.name) + ": record of ticket " + std::to_string(ticket) + ": " + what, ticket);
  };
  if (record.ticket != ticket) fail("holds ticket " + std::to_string(record.ticket));
  if (record.generation > generation || record.generation >> 12 != generation >> 12) fail("wrong generation");
  if (record.nbytes > header.slot_bytes) {
    fail(std::to_string(record.nbytes) + " bytes in a slot of " + std::to_string(header.slot_bytes));
  }
  if (record.ndim > kMaxDims) fail("more than 8 dimensions");
  const bool known_bits = record.dtype_bits >= 8 && record.dtype_bits <= 128 && std::has_single_bit(record.dtype_bits);
  if (!known_bits) fail("unknown element size");
  std::uint64_t nbytes = record.dtype_bits / 8;
  bool empty = false;
  for (std::size_t dim = 0; dim < record.ndim; ++dim) {
    if (record.shape[dim] < 0) fail("negative dimension");
    const auto extent = static_cast<std::uint64_t>(record.shape[dim]);
    empty = empty || extent == 0;
    if (!empty && nbytes > header.slot_bytes / extent) fail("shape does not fit the slot");
    nbytes *= empty ? 1 : extent;
  }
  if ((empty ? 0 : nbytes) != record.nbytes) fail("shape and byte count disagree");
}

}  // namespace kdflow
