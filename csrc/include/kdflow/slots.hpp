// The shared memory of one ring, by its parts. All that changes hands goes through load() and
// exchange().
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <memory>
#include <span>
#include <string>
#include <utility>

#include "kdflow/copy.hpp"
#include "kdflow/errors.hpp"
#include "kdflow/fault.hpp"
#include "kdflow/futex.hpp"
#include "kdflow/layout.hpp"
#include "kdflow/process.hpp"
#include "kdflow/segment.hpp"

namespace kdflow {

class Slots {
 public:
  Slots(std::shared_ptr<const Segment> segment, const Header& header) : segment_(std::move(segment)), header_(header) {}

  const std::shared_ptr<const Segment>& segment() const { return segment_; }

  const Header& header() const { return header_; }
  std::string name() const { return header_.name; }
  std::uint64_t count() const { return header_.num_slots; }
  int fd() const { return segment_->fd(); }

  Cursors& cursors() const { return *reinterpret_cast<Cursors*>(segment_->at(kCursorsOffset)); }
  Counters& counters() const { return *reinterpret_cast<Counters*>(segment_->at(kCountersOffset)); }
  SideCounters& counters(Role role) const {
    return role == Role::producer ? counters().producers : counters().consumers;
  }
  std::span<PeerEntry> peer_entries() const {
    return {reinterpret_cast<PeerEntry*>(segment_->at(kPeersOffset)), kMaxPeers};
  }
  Record& record(std::uint64_t slot) const { return state(slot).record; }
  // Only where the payload is host memory.
  std::byte* payload(std::uint64_t slot) const {
    return segment_->at(header_.payload_offset + slot * header_.payload_stride);
  }

  // Will a slot have left the caches by the time it is written again?
  bool exceeds_cache() const { return count() * header_.payload_stride > last_level_cache_bytes() / 2; }

  std::uint64_t slot_of(std::uint64_t ticket) const { return ticket % header_.num_slots; }
  std::uint64_t lap_of(std::uint64_t ticket) const { return ticket / header_.num_slots; }
  std::uint64_t ticket_of(std::uint64_t slot, Control control) const {
    return control.lap() * header_.num_slots + slot;
  }

  Control load(std::uint64_t slot) const { return checked(slot, state(slot).control.load(std::memory_order_acquire)); }

  // For spinning: says only that something changed.
  bool changed(std::uint64_t slot, Control seen) const {
    return state(slot).control.load(std::memory_order_relaxed) != seen.word();
  }

  // The one way a slot changes. On failure `seen` is what stands there now.
  bool exchange(std::uint64_t slot, Control& seen, Control next) const {
    std::uint64_t word = seen.word();
    if (state(slot).control.compare_exchange_strong(word, next.word(), std::memory_order_acq_rel,
                                                    std::memory_order_acquire)) {
      if (seen.waiting() && !next.waiting()) futex_wake_all(&state(slot).control);
      return true;
    }
    seen = checked(slot, word);
    return false;
  }

  // Sleeps until the word is no longer `seen`, or a wake, a signal, the timeout.
  void sleep(std::uint64_t slot, Control seen, std::chrono::nanoseconds timeout) const {
    if (timeout <= timeout.zero()) return;
    // The kernel compares the word once more: a change between these two lines makes a short sleep,
    // not a lost wake.
    if (!seen.waiting() && !exchange(slot, seen, seen.with_waiting())) return;
    KDFLOW_FAULT("waiting");
    futex_wait(&state(slot).control, seen.with_waiting().futex_value(), timeout);
  }

  std::uint64_t read_cursor(const AtomicWord& cursor) const {
    const std::uint64_t ticket = cursor.load(std::memory_order_acquire);
    if (lap_of(ticket) >= Control::kMaxLap) throw RingCorrupt(name() + ": a cursor points beyond the last ticket");
    return ticket;
  }

  static void advance(AtomicWord& cursor, std::uint64_t from) {
    cursor.compare_exchange_strong(from, from + 1, std::memory_order_acq_rel, std::memory_order_relaxed);
  }

  // The slot of `from` was seen past it. A cursor may be laps behind, where tickets are used beside free-running calls.
  void advance_past(AtomicWord& cursor, std::uint64_t from, Control seen) const {
    const bool laps_behind = seen.lap() > lap_of(from) + 1;
    const std::uint64_t next = laps_behind ? std::max(from + 1, oldest_ticket()) : from + 1;
    cursor.compare_exchange_strong(from, next, std::memory_order_acq_rel, std::memory_order_relaxed);
  }

  static void add(AtomicWord& counter, std::uint64_t amount = 1) {
    counter.fetch_add(amount, std::memory_order_relaxed);
  }

  // The bell rings at every commit, abort, arrival and departure: what a pollable descriptor is fed
  // from.
  std::uint32_t bell() const { return cursors().bell.load(std::memory_order_acquire) & ~1u; }

  // Sleeps until it rang after `seen` (a former result of bell()), or the timeout.
  void wait_bell(std::uint32_t seen, std::chrono::nanoseconds timeout) const {
    const std::uint32_t before = cursors().bell.fetch_or(1, std::memory_order_acq_rel);
    if ((before & ~1u) == seen) futex_wait(&cursors().bell, seen | 1, timeout);
  }

  void ring_bell() const {
    // Read-modify-write on both sides: whichever comes second sees the other, so no wake is lost.
    std::uint32_t before = cursors().bell.load(std::memory_order_relaxed);
    while (!cursors().bell.compare_exchange_weak(before, (before & ~1u) + 2, std::memory_order_acq_rel,
                                                 std::memory_order_relaxed)) {
    }
    if ((before & 1) != 0) futex_wake_all(&cursors().bell);
  }

  // All tickets before it are over.
  std::uint64_t oldest_ticket() const {
    std::uint64_t oldest = ticket_of(0, load(0));
    for (std::uint64_t slot = 1; slot < count(); ++slot) oldest = std::min(oldest, ticket_of(slot, load(slot)));
    return oldest;
  }

  void check_intact() const {
    if (std::memcmp(segment_->at(0), &header_, sizeof header_) != 0) {
      throw RingCorrupt(name() + ": the ring's header was overwritten");
    }
  }

  void protect(std::uint64_t first, std::uint64_t num_slots, int protection) const {
    if (::mprotect(payload(first), num_slots * header_.payload_stride, protection) != 0) {
      throw_errno(name() + ": mprotect");
    }
  }

  void set_reason(std::uint64_t slot, const std::string& reason) const {
    Record& target = record(slot);
    std::size_t size = std::min(reason.size(), sizeof(target.reason) - 1);
    while (size > 0 && size < reason.size() && (reason[size] & 0xc0) == 0x80) --size;  // not inside a UTF-8 character
    target.reason[reason.copy(target.reason, size)] = '\0';
  }
  std::string reason(std::uint64_t slot) const {
    return {record(slot).reason, ::strnlen(record(slot).reason, sizeof(Record::reason))};
  }

 private:
  SlotState& state(std::uint64_t slot) const { return reinterpret_cast<SlotState*>(segment_->at(kSlotsOffset))[slot]; }

  Control checked(std::uint64_t slot, std::uint64_t word) const {
    if (Control(word).valid()) return Control(word);
    throw RingCorrupt(name() + ": slot " + std::to_string(slot) + " is in no known phase");
  }

  std::shared_ptr<const Segment> segment_;
  const Header header_;
};

}  // namespace kdflow
