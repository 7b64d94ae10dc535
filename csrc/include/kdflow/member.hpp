// One peer's membership of a ring: joining, leaving, and looking after the others.
#pragma once

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <iterator>
#include <optional>
#include <span>
#include <stdexcept>
#include <string>
#include <vector>

#include "kdflow/calls.hpp"
#include "kdflow/fault.hpp"
#include "kdflow/peers.hpp"
#include "kdflow/slots.hpp"

namespace kdflow {

struct AttachOptions {
  bool guard = false;                  // debugging: a slot's pages are inaccessible while it is not held
  std::chrono::milliseconds tick{50};  // how often a waiting peer looks after the others
  std::chrono::nanoseconds max_spin = SpinBudget::kMax;
  std::optional<RingKind> kind{};        // another one is refused
  std::optional<Placement> placement{};  // another one is refused
};

class Member {
 public:
  Member(std::shared_ptr<const Segment> segment, const Header& header, const AttachOptions& options)
      : slots(std::move(segment), header), options(options), table(slots.peer_entries(), header.name) {}
  ~Member() { leave(); }
  Member(const Member&) = delete;

  const Slots slots;
  const AttachOptions options;
  PeerTable table;
  SpinBudget spin_budget{options.max_spin};
  Calls calls{[this] { give_back(); }};

  void join(Role role) {
    bury_dead();
    rewind_reading();
    // The one consumer of a data ring has entry 0 to itself: whoever holds it is the only one.
    const bool one_consumer = slots.header().kind == RingKind::data;
    const std::size_t first = one_consumer && role == Role::producer ? 1 : 0;
    const std::size_t last = one_consumer && role == Role::consumer ? 1 : kMaxPeers;
    self_ = table.claim(role, first, last);
    calls.open();
    Slots::add(slots.counters(role).attached);
    guard(0, slots.count(), PROT_NONE);
    slots.ring_bell();
  }

  // A call that takes or gives a slot. Words carry this peer's index, so the entry is given up after the last of them.
  class Call : public Calls::Scope {
   public:
    explicit Call(Member& member) : Scope(member.calls) {
      if (!entered()) member.require_joined();  // which throws
    }
  };

  // Gives back what this peer holds: half-written slots aborted, half-read ones ready for another reader. Calls of
  // other threads that wait end within a tick; the time is for one that copies.
  void leave() {
    if (!forked()) calls.close(std::chrono::seconds(1));
  }

  bool joined() const { return calls.is_open(); }
  bool forked() const { return current_pid() != table.self_pid(); }

  Peer require_joined() const {
    if (!joined()) {
      throw TransportError(slots.name() + ": closed, or created but not attached; attach() with a role first");
    }
    if (forked()) {
      throw TransportError(slots.name() + ": this process was forked from peer pid " +
                           std::to_string(table.self_pid()) + "; attach() anew in the child");
    }
    return self_;
  }

  Peer require(Role role) const {
    const Peer self = require_joined();
    if (self.identity.role() != role) {
      throw TransportError(slots.name() + ": attached as " + to_string(self.identity.role()) + ", only a " +
                           to_string(role) + " may do this");
    }
    return self;
  }

  void guard(std::uint64_t first, std::uint64_t num_slots, int protection) const {
    if (options.guard) slots.protect(first, num_slots, protection);
  }

  // For those who poll: true once a tick, and whenever the bell rang since the last time.
  bool look_is_due() {
    const std::int64_t now = Clock::now().time_since_epoch() / std::chrono::nanoseconds(1);
    const std::uint32_t bell = slots.bell();
    if (last_bell_.exchange(bell) == bell && now < next_look_.load()) return false;
    next_look_.store(now + std::chrono::nanoseconds(options.tick).count());
    return true;
  }

  // Buries the dead and checks what nobody may change. True: the other side was there once and is
  // gone.
  bool look_after_peers() {
    const Peer self = require_joined();
    slots.check_intact();
    if (!table.holds(self)) {
      throw RingCorrupt(slots.name() + ": this peer's entry was taken away while it is alive");
    }
    bury_dead();
    rewind_reading();
    const Role awaited = other(self.identity.role());
    return slots.counters(awaited).attached.load(std::memory_order_acquire) > 0 && !has_live(awaited);
  }

  std::vector<Peer> living() {
    std::vector<Peer> peers = table.attached();
    std::erase_if(peers, [&](const Peer& peer) { return !table.alive(peer); });
    return peers;
  }

  bool has_live(Role role) {
    const std::vector<Peer> peers = living();
    return std::any_of(peers.begin(), peers.end(), [&](const Peer& peer) { return peer.identity.role() == role; });
  }

  // Writes into `record` what a payload is. Throws std::invalid_argument when it fits no slot.
  void shape(Record& record, const char* operation, std::optional<std::uint64_t> ticket, std::uint8_t dtype_code,
             std::uint8_t dtype_bits, std::span<const std::int64_t> extents) const {
    const auto fail = [&](const std::string& what) {
      throw std::invalid_argument(describe(operation, ticket) + ": " + what);
    };
    if (extents.size() > kMaxDims) fail("expected at most 8 dimensions, got " + std::to_string(extents.size()));
    const bool empty = std::find(extents.begin(), extents.end(), 0) != extents.end();
    std::uint64_t nbytes = empty ? 0 : dtype_bits / 8;
    for (const std::int64_t extent : extents) {
      if (extent < 0) fail("negative dimension " + std::to_string(extent));
      if (__builtin_mul_overflow(nbytes, static_cast<std::uint64_t>(extent), &nbytes)) fail("the shape overflows");
    }
    if (nbytes > slots.header().slot_bytes) {
      fail("expected at most " + std::to_string(slots.header().slot_bytes) + " bytes (slot_bytes), got " +
           std::to_string(nbytes) + "; create the ring with larger slots");
    }
    record.dtype_code = dtype_code;
    record.dtype_bits = dtype_bits;
    record.ndim = static_cast<std::uint16_t>(extents.size());
    record.nbytes = nbytes;
    std::fill(std::begin(record.shape), std::end(record.shape), 0);
    std::copy(extents.begin(), extents.end(), record.shape);
  }

  // --- words for errors ---
  std::string describe(const char* operation, std::optional<std::uint64_t> ticket) const {
    return slots.name() + ": " + operation + (ticket ? " of ticket " + std::to_string(*ticket) : " of the next ticket");
  }

  std::string describe_slot(std::uint64_t slot, Control seen) const {
    std::string text = "slot " + std::to_string(slot) + " is " + to_string(seen.phase()) + " for ticket " +
                       std::to_string(slots.ticket_of(slot, seen));
    for (const Peer& peer : table.attached()) {
      if (seen.owned_by(peer.index)) text += " by pid " + std::to_string(peer.identity.pid());
    }
    return text;
  }

  std::string describe_living(Role role) {
    std::string pids;
    for (const Peer& peer : living()) {
      if (peer.identity.role() != role) continue;
      pids += (pids.empty() ? " pid " : ", ") + std::to_string(peer.identity.pid());
    }
    if (pids.empty()) return std::string("no ") + to_string(role) + " is attached";
    return std::string("alive as ") + to_string(role) + ":" + pids;
  }

 private:
  void give_back() noexcept {
    if (forked()) return;
    try {
      if (table.holds(self_)) give_back_slots();
    } catch (const TransportError&) {  // a corrupt ring: there is nothing sound to leave
    }
  }

  void give_back_slots() {
    for (std::uint64_t slot = 0; slot < slots.count(); ++slot) {
      Control seen = slots.load(slot);
      while (seen.owned_by(self_.index)) {
        const bool writing = seen.phase() == Phase::writing;
        if (writing) slots.set_reason(slot, "it closed the ring");
        if (slots.exchange(slot, seen, writing ? seen.aborted() : seen.ready_again())) break;
      }
    }
    table.leave(self_);
    slots.ring_bell();
  }

  void bury_dead() {
    const int num_buried = table.reap([this](const Peer& dead) {
      for (std::uint64_t slot = 0; slot < slots.count(); ++slot) {
        Control seen = slots.load(slot);
        // The word was loaded before the entry: while the entry still names the dead, so did the
        // word.
        while (seen.owned_by(dead.index) && table.holds(dead)) {
          const bool writing = seen.phase() == Phase::writing;
          if (!slots.exchange(slot, seen, seen.orphaned())) continue;
          if (writing) Slots::add(slots.counters().abandoned);
          break;
        }
      }
    });
    if (num_buried == 0) return;
    Slots::add(slots.counters().died, static_cast<std::uint64_t>(num_buried));
    slots.ring_bell();
  }

  // A record that its dead reader gave back lies behind the cursor.
  void rewind_reading() {
    AtomicWord& next_read = slots.cursors().next_read;
    std::uint64_t cursor = next_read.load(std::memory_order_acquire);
    std::uint64_t oldest = cursor;
    for (std::uint64_t slot = 0; slot < slots.count(); ++slot) {
      const Control seen = slots.load(slot);
      if (seen.phase() == Phase::ready) oldest = std::min(oldest, slots.ticket_of(slot, seen));
    }
    // Once: if somebody moved the cursor meanwhile, what was seen says nothing about where it is now. The next tick
    // looks again.
    if (oldest < cursor) next_read.compare_exchange_strong(cursor, oldest, std::memory_order_acq_rel);
  }

  Peer self_{0, PeerIdentity()};
  std::atomic<std::int64_t> next_look_{0};
  std::atomic<std::uint32_t> last_bell_{0};
};

}  // namespace kdflow
