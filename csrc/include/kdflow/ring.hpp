// A ring of slots over shared memory: reserve -> write -> commit, receive -> read -> release.
//
// Ticket t lives in slot t % num_slots. The control word of that slot (control.hpp) is the only
// thing that decides who may touch the slot; everything else in the segment is a hint, a counter,
// or guarded by it. Why each edge is enough is in docs/ring.md; csrc/tests/model.cpp checks it
// exhaustively for small rings.
#pragma once

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "kdflow/errors.hpp"
#include "kdflow/fault.hpp"
#include "kdflow/futex.hpp"
#include "kdflow/layout.hpp"
#include "kdflow/peers.hpp"
#include "kdflow/segment.hpp"

namespace kdflow {

struct RingConfig {
  std::string name;
  RingKind kind = RingKind::data;
  std::uint64_t num_slots = 8;
  std::uint64_t slot_bytes = 1u << 20;
  bool checksum = false;
  SegmentOptions segment{};
};

struct AttachOptions {
  bool guard =
      false;  // debugging: pages of a slot are inaccessible while this peer does not hold it
  std::chrono::milliseconds tick{50};  // how often a waiting peer looks after the others
};

// Every wait is bounded. on_tick runs at least once a tick and may throw (Python: pending signals).
struct Wait {
  std::chrono::nanoseconds timeout{};
  std::function<void()> on_tick = [] {};
};

struct SideStats {
  std::uint64_t attached, live, records, bytes, waits, wait_ns;
};

struct RingStats {
  SideStats producers, consumers;
  std::uint64_t depth, writing, reading;  // slots in phase ready, writing, reading
  std::uint64_t died, abandoned, aborted, reclaimed, lost;
};

class Ring;

// A slot in phase writing or reading, held by this peer. Gives it back when destroyed: a writer
// aborts, a reader releases.
class Lease {
 public:
  Lease(std::shared_ptr<Ring> ring, std::uint64_t ticket, Control granted)
      : ring_(std::move(ring)), ticket_(ticket), granted_(granted.without_waiting()) {}
  Lease(Lease&& other) noexcept = default;
  Lease& operator=(Lease&&) = delete;
  inline ~Lease();

  std::uint64_t ticket() const { return ticket_; }
  std::uint64_t generation() const { return granted_.generation(); }
  const std::shared_ptr<Ring>& ring() const { return ring_; }
  bool held() const { return ring_ != nullptr && !done_; }
  inline std::byte* data() const;

  Record record{};  // the reader's checked copy; the writer fills microbatch_id and tag, and calls
                    // shape()

  // The writer's: what the payload is. Throws std::invalid_argument when it does not fit the slot.
  inline void shape(std::uint8_t dtype_code, std::uint8_t dtype_bits,
                    std::span<const std::int64_t> extents);

  inline void commit();
  inline void abort(const std::string& reason);
  inline void release();

 private:
  friend class Ring;
  inline void finish(Control next);

  std::shared_ptr<Ring> ring_;
  std::uint64_t ticket_;
  Control granted_;
  bool done_ = false;
};

class Ring : public std::enable_shared_from_this<Ring> {
 public:
  static std::shared_ptr<Ring> create(const RingConfig& config) {
    Header header{};
    header.magic = kMagic;
    header.version = kVersion;
    header.kind = config.kind;
    header.num_slots = config.num_slots;
    header.slot_bytes = config.slot_bytes;
    header.checksum = config.checksum ? 1 : 0;
    header.pid_namespace = pid_namespace();
    if (config.num_slots == 0 || config.num_slots > kMaxSlots) {
      throw std::invalid_argument(config.name + ": num_slots must be in 1.." +
                                  std::to_string(kMaxSlots) + ", got " +
                                  std::to_string(config.num_slots));
    }
    if (config.slot_bytes == 0 || config.slot_bytes > kMaxSlotBytes) {
      throw std::invalid_argument(config.name + ": slot_bytes must be in 1..2^40, got " +
                                  std::to_string(config.slot_bytes));
    }
    if (config.name.empty() || config.name.size() >= sizeof(header.name)) {
      throw std::invalid_argument("name must have 1 to " + std::to_string(sizeof(header.name) - 1) +
                                  " bytes, got \"" + config.name + "\"");
    }
    config.name.copy(header.name, config.name.size());
    lay_out(header, config.segment.huge_pages ? kHugePageBytes : kPageBytes);
    header.crc = header.expected_crc();
    Segment segment = Segment::create(config.name, header.segment_bytes, config.segment);
    std::memcpy(segment.at(0), &header,
                sizeof header);  // all else starts as zeros: free slots, no peers
    return std::shared_ptr<Ring>(new Ring(std::move(segment), header, {}));
  }

  static std::shared_ptr<Ring> attach(UniqueFd fd, Role role, const AttachOptions& options = {}) {
    Segment segment = Segment::attach(std::move(fd));
    if (segment.bytes() < kSlotsOffset)
      throw RingCorrupt("the segment is smaller than a ring's header");
    Header header;
    std::memcpy(&header, segment.at(0), sizeof header);
    check_header(header, segment.bytes());
    if (header.pid_namespace != pid_namespace()) {
      throw TransportError(
          std::string(header.name) +
          ": made in another pid namespace, where this process cannot be watched; share it "
          "(docker run --pid=container:...)");
    }
    segment.populate();
    std::shared_ptr<Ring> ring(new Ring(std::move(segment), header, options));
    ring->join(role);
    return ring;
  }

  ~Ring() { close(); }
  Ring(const Ring&) = delete;
  Ring& operator=(const Ring&) = delete;

  // Gives back what this peer holds and leaves. The mapping lives on until the last lease is gone.
  void close() noexcept {
    if (!self_ || forked()) return;
    const Peer self = *std::exchange(self_, std::nullopt);
    if (!peers_.holds(self)) return;
    for (std::uint64_t index = 0; index < header_.num_slots; ++index) {
      Control seen = load(index);
      while (seen.owned_by(self.index)) {
        if (seen.phase() == Phase::writing) set_reason(index, "it closed the ring");
        if (exchange(index, seen,
                     seen.phase() == Phase::writing ? seen.aborted() : seen.ready_again()))
          break;
      }
    }
    peers_.leave(self);
    ring_bell();
  }

  const Header& header() const { return header_; }
  std::string name() const { return header_.name; }
  int fd() const { return segment_.fd(); }
  bool closed() const { return !self_.has_value(); }
  std::byte* payload(std::uint64_t ticket) const {
    return segment_.at(header_.payload_offset + slot_of(ticket) * header_.payload_stride);
  }

  // With a ticket: fills that one, as granted by the consumer. Without: the next of all
  // free-running producers.
  Lease reserve(std::optional<std::uint64_t> ticket, const Wait& wait) {
    const Peer self = require(Role::producer);
    if (ticket) check_ticket(*ticket);
    return block<Lease>(Role::producer, "reserve", ticket, wait, [&](Blocked& blocked) {
      return ticket ? try_reserve(self, *ticket, blocked) : try_reserve_next(self, blocked);
    });
  }

  // With a ticket: that one. Without: the next in order.
  Lease receive(std::optional<std::uint64_t> ticket, const Wait& wait) {
    const Peer self = require(Role::consumer);
    if (ticket) check_ticket(*ticket);
    return block<Lease>(Role::consumer, "receive", ticket, wait, [&](Blocked& blocked) {
      return ticket ? try_receive(self, *ticket, blocked) : try_receive_next(self, blocked);
    });
  }

  // Never sleeps. Looks after the peers at most once a tick.
  std::optional<Lease> try_receive(std::optional<std::uint64_t> ticket) {
    const Peer self = require(Role::consumer);
    if (ticket) check_ticket(*ticket);
    const auto attempt = [&](Blocked& blocked) {
      return ticket ? try_receive(self, *ticket, blocked) : try_receive_next(self, blocked);
    };
    Blocked blocked;
    if (auto lease = attempt(blocked)) return lease;
    if (!tick_is_due()) return std::nullopt;
    const bool deserted = look_after_peers(Role::consumer);
    if (auto lease = attempt(blocked)) return lease;
    if (deserted) throw_deserted(Role::consumer, "receive", ticket, blocked);
    return std::nullopt;
  }

  // May the consumer grant this ticket: is its slot free for it?
  bool is_free(std::uint64_t ticket) const {
    check_ticket(ticket);
    return load(slot_of(ticket)).is(Phase::free, lap_of(ticket));
  }

  // Makes an abandoned or aborted ticket free to be granted again.
  void reclaim(std::uint64_t ticket) {
    require(Role::consumer);
    check_ticket(ticket);
    const std::uint64_t slot = slot_of(ticket);
    Control seen = load(slot);
    if (seen.is(Phase::writing, lap_of(ticket))) {
      look_after_peers(Role::consumer);
      seen = load(slot);
    }
    while (seen.is(Phase::abandoned, lap_of(ticket)) || seen.is(Phase::aborted, lap_of(ticket))) {
      if (seen.attempt() == Control::kMaxAttempt) {
        throw TransportError(describe("reclaim", ticket) + ": given " +
                                 std::to_string(seen.attempt() + 1) + " times without a result",
                             ticket);
      }
      if (exchange(slot, seen, seen.granted_again())) {
        add(counters().reclaimed);
        return;
      }
    }
    if (seen.is(Phase::free, lap_of(ticket))) return;
    throw TransportError(describe("reclaim", ticket) + ": " + describe_slot(slot, seen) +
                             "; only an abandoned or aborted ticket can be given again",
                         ticket);
  }

  RingStats stats() {
    RingStats stats{};
    const auto read = [](const AtomicWord& word) { return word.load(std::memory_order_relaxed); };
    const auto side = [&](const SideCounters& from) {
      return SideStats{read(from.attached), 0,
                       read(from.records),  read(from.bytes),
                       read(from.waits),    read(from.wait_ns)};
    };
    const Counters& from = counters();
    stats.producers = side(from.producers);
    stats.consumers = side(from.consumers);
    for (const Peer& peer : peers()) {
      ++(peer.identity.role() == Role::producer ? stats.producers : stats.consumers).live;
    }
    for (std::uint64_t index = 0; index < header_.num_slots; ++index) {
      const Phase phase = load(index).phase();
      stats.depth += phase == Phase::ready ? 1 : 0;
      stats.writing += phase == Phase::writing ? 1 : 0;
      stats.reading += phase == Phase::reading ? 1 : 0;
    }
    stats.died = read(from.died);
    stats.abandoned = read(from.abandoned);
    stats.aborted = read(from.aborted);
    stats.reclaimed = read(from.reclaimed);
    stats.lost = read(from.lost);
    return stats;
  }

  // The living.
  std::vector<Peer> peers() {
    std::vector<Peer> living = peers_.attached();
    std::erase_if(living, [&](const Peer& peer) { return !peers_.alive(peer); });
    return living;
  }

  // Until a peer of the other side is attached.
  void wait_for_peer(const Wait& wait) {
    const Role awaited = other(require_attached().identity.role());
    const Clock::time_point deadline = Clock::now() + wait.timeout;
    while (!has_live(awaited)) {
      if (Clock::now() >= deadline) {
        throw RingTimeout(name() + ": no " + to_string(awaited) + " attached within " +
                          seconds(wait.timeout));
      }
      wait_bell(bell());
      wait.on_tick();
    }
  }

  // The bell rings at every commit, abort, arrival and departure: what a pollable descriptor is fed
  // from. Sleeps until it rang after `seen` (a former result of bell()), at most one tick.
  std::uint32_t bell() const { return cursors().bell.load(std::memory_order_acquire) & ~1u; }
  void wait_bell(std::uint32_t seen) {
    const std::uint32_t before = cursors().bell.fetch_or(1, std::memory_order_acq_rel);
    if ((before & ~1u) == seen) futex_wait(&cursors().bell, seen | 1, options_.tick);
  }
  void ring_bell() {
    // Read-modify-write on both sides: whichever comes second sees the other, so no wake is lost.
    std::uint32_t before = cursors().bell.load(std::memory_order_relaxed);
    while (!cursors().bell.compare_exchange_weak(
        before, (before & ~1u) + 2, std::memory_order_acq_rel, std::memory_order_relaxed)) {
    }
    if ((before & 1) != 0) futex_wake_all(&cursors().bell);
  }

  // Buries the dead and checks what nobody may change. True: the other side was there and is gone.
  bool look_after_peers(Role role) {
    check_intact();
    bury_dead();
    rewind_reading();
    return side(other(role)).attached.load(std::memory_order_acquire) > 0 && !has_live(other(role));
  }

 private:
  friend class Lease;
  static constexpr int kSpins = 200;

  struct Blocked {
    std::uint64_t slot = 0;
    Control seen;
  };

  Ring(Segment segment, const Header& header, const AttachOptions& options)
      : segment_(std::move(segment)),
        header_(header),
        options_(options),
        peers_({reinterpret_cast<PeerEntry*>(segment_.at(kPeersOffset)), kMaxPeers}, header.name) {}

  // --- shared memory, by its parts ---
  Cursors& cursors() const { return *reinterpret_cast<Cursors*>(segment_.at(kCursorsOffset)); }
  Counters& counters() const { return *reinterpret_cast<Counters*>(segment_.at(kCountersOffset)); }
  SideCounters& side(Role role) const {
    return role == Role::producer ? counters().producers : counters().consumers;
  }
  SlotState& state(std::uint64_t slot) const {
    return reinterpret_cast<SlotState*>(segment_.at(kSlotsOffset))[slot];
  }
  std::uint64_t slot_of(std::uint64_t ticket) const { return ticket % header_.num_slots; }
  std::uint64_t lap_of(std::uint64_t ticket) const { return ticket / header_.num_slots; }
  std::uint64_t ticket_of(std::uint64_t slot, Control control) const {
    return control.lap() * header_.num_slots + slot;
  }
  static void add(AtomicWord& counter, std::uint64_t amount = 1) {
    counter.fetch_add(amount, std::memory_order_relaxed);
  }

  Control load(std::uint64_t slot) const {
    const Control control(state(slot).control.load(std::memory_order_acquire));
    if (!control.valid())
      throw RingCorrupt(name() + ": slot " + std::to_string(slot) + " is in no known phase");
    return control;
  }

  // On failure `seen` is what stands there now.
  bool exchange(std::uint64_t slot, Control& seen, Control next) {
    std::uint64_t word = seen.word();
    if (state(slot).control.compare_exchange_strong(word, next.word(), std::memory_order_acq_rel,
                                                    std::memory_order_acquire)) {
      if (seen.waiting() && !next.waiting()) futex_wake_all(&state(slot).control);
      return true;
    }
    seen = Control(word);
    if (!seen.valid()) load(slot);
    return false;
  }

  static void advance(AtomicWord& cursor, std::uint64_t from) {
    cursor.compare_exchange_strong(from, from + 1, std::memory_order_acq_rel,
                                   std::memory_order_relaxed);
  }

  std::uint64_t cursor_ticket(const AtomicWord& cursor) const {
    const std::uint64_t ticket = cursor.load(std::memory_order_acquire);
    if (lap_of(ticket) > Control::kMaxLap)
      throw RingCorrupt(name() + ": a cursor points beyond the last ticket");
    return ticket;
  }

  // --- one attempt at an operation: a lease, or what stands in its way ---
  std::optional<Lease> try_reserve(const Peer& self, std::uint64_t ticket, Blocked& blocked) {
    const std::uint64_t slot = slot_of(ticket);
    Control seen = load(slot);
    while (seen.is(Phase::free, lap_of(ticket))) {
      if (exchange(slot, seen, seen.writing_by(self.index)))
        return start_writing(ticket, seen.writing_by(self.index));
    }
    if (seen.lap() >= lap_of(ticket)) {
      throw TransportError(describe("reserve", ticket) + ": " + describe_slot(slot, seen) +
                               "; this ticket was given to another producer, or is over",
                           ticket);
    }
    blocked = {slot, seen};
    return std::nullopt;
  }

  std::optional<Lease> try_reserve_next(const Peer& self, Blocked& blocked) {
    // The bound only matters when the words are nonsense: each honest retry means that another peer
    // moved on.
    for (std::uint64_t n = 0; n <= 2 * header_.num_slots; ++n) {
      const std::uint64_t ticket = cursor_ticket(cursors().next_write);
      const std::uint64_t slot = slot_of(ticket);
      Control seen = load(slot);
      blocked = {slot, seen};
      if (seen.lap() < lap_of(ticket)) return std::nullopt;
      if (!seen.is(Phase::free, lap_of(ticket))) {
        advance(cursors().next_write, ticket);
        continue;
      }
      if (!exchange(slot, seen, seen.writing_by(self.index))) continue;
      KDFLOW_FAULT("slot_taken");
      advance(cursors().next_write, ticket);
      return start_writing(ticket, seen.writing_by(self.index));
    }
    return std::nullopt;
  }

  Lease start_writing(std::uint64_t ticket, Control granted) {
    KDFLOW_FAULT("reserved");
    state(slot_of(ticket)).record.writer_pid = peers_.self_pid();
    guard(ticket, PROT_READ | PROT_WRITE);
    return Lease(shared_from_this(), ticket, granted);
  }

  std::optional<Lease> try_receive(const Peer& self, std::uint64_t ticket, Blocked& blocked) {
    const std::uint64_t slot = slot_of(ticket);
    Control seen = load(slot);
    while (seen.is(Phase::ready, lap_of(ticket))) {
      if (exchange(slot, seen, seen.reading_by(self.index)))
        return start_reading(ticket, seen.reading_by(self.index));
    }
    if (seen.is(Phase::abandoned, lap_of(ticket)))
      throw_abandoned(ticket, "; reclaim() it to give it again");
    if (seen.is(Phase::aborted, lap_of(ticket))) throw_aborted(ticket, reason(slot));
    if (seen.lap() > lap_of(ticket) || seen.is(Phase::reading, lap_of(ticket))) {
      throw TransportError(describe("receive", ticket) + ": " + describe_slot(slot, seen) +
                               "; this ticket was received before",
                           ticket);
    }
    blocked = {slot, seen};
    return std::nullopt;
  }

  std::optional<Lease> try_receive_next(const Peer& self, Blocked& blocked) {
    for (std::uint64_t n = 0; n <= 2 * header_.num_slots; ++n) {
      const std::uint64_t ticket = cursor_ticket(cursors().next_read);
      const std::uint64_t slot = slot_of(ticket);
      Control seen = load(slot);
      blocked = {slot, seen};
      if (seen.lap() > lap_of(ticket) || seen.is(Phase::reading, lap_of(ticket))) {
        advance(cursors().next_read, ticket);
      } else if (seen.is(Phase::ready, lap_of(ticket))) {
        if (!exchange(slot, seen, seen.reading_by(self.index))) continue;
        KDFLOW_FAULT("slot_received");
        advance(cursors().next_read, ticket);
        return start_reading(ticket, seen.reading_by(self.index));
      } else if (seen.is(Phase::abandoned, lap_of(ticket)) ||
                 seen.is(Phase::aborted, lap_of(ticket))) {
        skip_lost(ticket, seen);
      } else {
        return std::nullopt;
      }
    }
    return std::nullopt;
  }

  // A free-running ticket has nobody to give it again: it is reported once, and the ring goes on.
  void skip_lost(std::uint64_t ticket, Control seen) {
    const std::uint64_t slot = slot_of(ticket);
    const bool was_aborted = seen.phase() == Phase::aborted;
    const std::string why = was_aborted ? reason(slot) : "";
    if (!exchange(slot, seen, seen.released())) return;
    add(counters().lost);
    advance(cursors().next_read, ticket);
    if (header_.kind == RingKind::request) return;  // its sender knows
    was_aborted ? throw_aborted(ticket, why) : throw_abandoned(ticket, "; this record is lost");
  }

  Lease start_reading(std::uint64_t ticket, Control granted) {
    KDFLOW_FAULT("received");
    Lease lease(shared_from_this(), ticket, granted);
    std::memcpy(&lease.record, &state(slot_of(ticket)).record, sizeof(Record));
    try {
      check_record(lease.record, header_, ticket, granted.generation());
      guard(ticket, PROT_READ);
      if (header_.checksum != 0 &&
          crc32c(payload(ticket), lease.record.nbytes) != lease.record.crc) {
        throw RingCorrupt(describe("receive", ticket) + ": the payload does not match its checksum",
                          ticket);
      }
    } catch (const RingCorrupt&) {
      lease.finish(lease.granted_.abandoned());  // can be given again
      throw;
    }
    add(side(Role::consumer).records);
    add(side(Role::consumer).bytes, lease.record.nbytes);
    return lease;
  }

  // --- waiting ---
  template <typename Result, typename Attempt>
  Result block(Role role, const char* operation, std::optional<std::uint64_t> ticket,
               const Wait& wait, const Attempt& attempt) {
    Blocked blocked;
    if (auto result = attempt(blocked)) return std::move(*result);
    for (int spin = 0; spin < kSpins; ++spin) {
      cpu_relax();
      if (state(blocked.slot).control.load(std::memory_order_relaxed) == blocked.seen.word())
        continue;
      if (auto result = attempt(blocked)) return std::move(*result);
    }
    const Clock::time_point start = Clock::now();
    const Clock::time_point deadline = start + wait.timeout;
    const WaitCount count{side(role), start};
    while (true) {
      sleep(blocked, std::min<Clock::duration>(deadline - Clock::now(), options_.tick));
      if (auto result = attempt(blocked)) return std::move(*result);
      const bool deserted = tick_is_due() && look_after_peers(role);
      if (auto result = attempt(blocked)) return std::move(*result);
      if (deserted) throw_deserted(role, operation, ticket, blocked);
      if (Clock::now() >= deadline) {
        throw RingTimeout(
            describe(operation, ticket) + " timed out after " + seconds(wait.timeout) + ": " +
                describe_slot(blocked.slot, blocked.seen) + "; " + describe_peers(other(role)),
            ticket);
      }
      wait.on_tick();
    }
  }

  struct WaitCount {
    SideCounters& counters;
    Clock::time_point start;
    ~WaitCount() {
      add(counters.waits);
      add(counters.wait_ns, static_cast<std::uint64_t>((Clock::now() - start).count()));
    }
  };

  void sleep(Blocked blocked, Clock::duration timeout) {
    if (timeout <= Clock::duration::zero()) return;
    // The kernel compares the word once more, so a change between the two lines only means a short
    // sleep.
    if (!blocked.seen.waiting() &&
        !exchange(blocked.slot, blocked.seen, blocked.seen.with_waiting()))
      return;
    KDFLOW_FAULT("waiting");
    futex_wait(&state(blocked.slot).control, blocked.seen.with_waiting().futex_value(), timeout);
  }

  bool tick_is_due() {
    const std::int64_t now = Clock::now().time_since_epoch() / std::chrono::nanoseconds(1);
    std::int64_t due = next_tick_.load(std::memory_order_relaxed);
    if (now < due) return false;
    return next_tick_.compare_exchange_strong(
        due, now + std::chrono::nanoseconds(options_.tick).count());
  }

  bool has_live(Role role) {
    for (const Peer& peer : peers_.attached()) {
      if (peer.identity.role() == role && peers_.alive(peer)) return true;
    }
    return false;
  }

  void check_intact() const {
    if (std::memcmp(segment_.at(0), &header_, sizeof header_) != 0) {
      throw RingCorrupt(name() + ": the ring's header was overwritten");
    }
    if (self_ && !peers_.holds(*self_)) {
      throw RingCorrupt(name() + ": this peer's entry was taken away while it is alive");
    }
  }

  void bury_dead() {
    const int num_buried = peers_.reap([this](const Peer& dead) {
      for (std::uint64_t slot = 0; slot < header_.num_slots; ++slot) {
        Control seen = load(slot);
        // Loaded the word first, then the entry: while the entry still names the dead, so did the
        // word.
        while (seen.owned_by(dead.index) && peers_.holds(dead)) {
          const bool was_writing = seen.phase() == Phase::writing;
          if (!exchange(slot, seen, seen.orphaned())) continue;
          if (was_writing) add(counters().abandoned);
          break;
        }
      }
    });
    if (num_buried == 0) return;
    add(counters().died, static_cast<std::uint64_t>(num_buried));
    ring_bell();
  }

  // A record that its dead reader gave back lies behind the cursor.
  void rewind_reading() {
    std::uint64_t cursor = cursors().next_read.load(std::memory_order_acquire);
    std::uint64_t oldest = cursor;
    for (std::uint64_t slot = 0; slot < header_.num_slots; ++slot) {
      const Control seen = load(slot);
      if (seen.phase() == Phase::ready) oldest = std::min(oldest, ticket_of(slot, seen));
    }
    while (oldest < cursor &&
           !cursors().next_read.compare_exchange_weak(cursor, oldest, std::memory_order_acq_rel)) {
    }
  }

  // --- joining ---
  void join(Role role) {
    bury_dead();
    rewind_reading();
    const bool single_consumer = header_.kind == RingKind::data;
    const std::size_t first = single_consumer && role == Role::producer ? 1 : 0;
    const std::size_t last = single_consumer && role == Role::consumer ? 1 : kMaxPeers;
    self_ = peers_.claim(role, first, last);
    add(side(role).attached);
    if (options_.guard) protect(0, header_.num_slots, PROT_NONE);
    ring_bell();
  }

  bool forked() const { return ::getpid() != peers_.self_pid(); }

  Peer require_attached() const {
    if (!self_)
      throw TransportError(name() +
                           ": closed, or created but not attached; attach() with a role first");
    if (forked()) {
      throw TransportError(name() + ": this process was forked from peer pid " +
                           std::to_string(peers_.self_pid()) + "; attach() anew in the child");
    }
    return *self_;
  }

  Peer require(Role role) const {
    const Peer self = require_attached();
    if (self.identity.role() != role) {
      throw TransportError(name() + ": attached as " + to_string(self.identity.role()) +
                           ", only a " + to_string(role) + " may do this");
    }
    return self;
  }

  void check_ticket(std::uint64_t ticket) const {
    if (lap_of(ticket) > Control::kMaxLap - 1) {
      throw std::invalid_argument(name() + ": ticket " + std::to_string(ticket) +
                                  " is out of range");
    }
  }

  // --- page guard ---
  void guard(std::uint64_t ticket, int protection) {
    if (options_.guard) protect(slot_of(ticket), 1, protection);
  }
  void protect(std::uint64_t slot, std::uint64_t num_slots, int protection) {
    std::byte* begin = segment_.at(header_.payload_offset + slot * header_.payload_stride);
    if (::mprotect(begin, num_slots * header_.payload_stride, protection) != 0)
      throw_errno(name() + ": mprotect");
  }

  // --- words for errors ---
  std::string describe(const char* operation, std::optional<std::uint64_t> ticket) const {
    return name() + ": " + operation +
           (ticket ? " of ticket " + std::to_string(*ticket) : " of the next ticket");
  }

  std::string describe_slot(std::uint64_t slot, Control seen) const {
    std::string text = "slot " + std::to_string(slot) + " is " + to_string(seen.phase()) +
                       " for ticket " + std::to_string(ticket_of(slot, seen));
    for (const Peer& peer : peers_.attached()) {
      if (seen.owned_by(peer.index)) text += " by pid " + std::to_string(peer.identity.pid());
    }
    return text;
  }

  std::string describe_peers(Role role) {
    std::string text;
    for (const Peer& peer : peers()) {
      if (peer.identity.role() == role)
        text += (text.empty() ? " pid " : ", ") + std::to_string(peer.identity.pid());
    }
    if (text.empty()) return std::string("no ") + to_string(role) + " is attached";
    return std::string("alive as ") + to_string(role) + ":" + text;
  }

  static std::string seconds(std::chrono::nanoseconds duration) {
    std::string text = std::to_string(std::chrono::duration<double>(duration).count());
    return text.substr(0, text.size() - 3) + " s";
  }

  void set_reason(std::uint64_t slot, const std::string& reason) {
    Record& record = state(slot).record;
    record.reason[reason.copy(record.reason, sizeof(record.reason) - 1)] = '\0';
  }
  std::string reason(std::uint64_t slot) const {
    const Record& record = state(slot).record;
    return {record.reason, ::strnlen(record.reason, sizeof(record.reason))};
  }
  std::string writer(std::uint64_t ticket) const {
    return "producer pid " + std::to_string(state(slot_of(ticket)).record.writer_pid);
  }

  [[noreturn]] void throw_abandoned(std::uint64_t ticket, const char* remedy) const {
    throw PeerDied(
        describe("receive", ticket) + ": " + writer(ticket) + " died while writing it" + remedy,
        ticket);
  }
  [[noreturn]] void throw_aborted(std::uint64_t ticket, const std::string& why) const {
    throw SlotAborted(describe("receive", ticket) + ": " + writer(ticket) + " gave it up: " + why,
                      ticket);
  }
  [[noreturn]] void throw_deserted(Role role, const char* operation,
                                   std::optional<std::uint64_t> ticket, const Blocked& blocked) {
    throw PeerDied(describe(operation, ticket) + ": " + describe_slot(blocked.slot, blocked.seen) +
                       " and no " + to_string(other(role)) + " is left (" +
                       std::to_string(side(other(role)).attached.load(std::memory_order_relaxed)) +
                       " attached so far, " +
                       std::to_string(counters().died.load(std::memory_order_relaxed)) +
                       " peers died)",
                   ticket);
  }

  Segment segment_;
  const Header header_;
  const AttachOptions options_;
  PeerTable peers_;
  std::optional<Peer> self_;
  std::atomic<std::int64_t> next_tick_{0};
};

std::byte* Lease::data() const { return ring_->payload(ticket_); }

void Lease::finish(Control next) {
  if (!held()) throw TransportError("this slot was given back before", ticket_);
  ring_->require_attached();
  done_ = true;
  const std::uint64_t slot = ring_->slot_of(ticket_);
  ring_->guard(ticket_, PROT_NONE);
  Control seen = ring_->load(slot);
  while (seen.without_waiting() == granted_) {
    if (ring_->exchange(slot, seen, next)) return;
  }
  throw TransportError(ring_->name() + ": ticket " + std::to_string(ticket_) +
                           " is no longer held by this peer; nothing of it counts (now " +
                           ring_->describe_slot(slot, seen) + ")",
                       ticket_);
}

void Lease::shape(std::uint8_t dtype_code, std::uint8_t dtype_bits,
                  std::span<const std::int64_t> extents) {
  const Header& header = ring_->header_;
  const auto fail = [&](const std::string& what) {
    throw std::invalid_argument(ring_->describe("reserve", ticket_) + ": " + what);
  };
  if (extents.size() > kMaxDims)
    fail("expected at most 8 dimensions, got " + std::to_string(extents.size()));
  std::uint64_t nbytes = dtype_bits / 8;
  for (const std::int64_t extent : extents) {
    if (extent < 0) fail("negative dimension " + std::to_string(extent));
    if (__builtin_mul_overflow(nbytes, static_cast<std::uint64_t>(extent), &nbytes))
      fail("the shape overflows");
  }
  if (nbytes > header.slot_bytes) {
    fail("expected at most " + std::to_string(header.slot_bytes) + " bytes (slot_bytes), got " +
         std::to_string(nbytes) + "; create the ring with larger slots");
  }
  record.dtype_code = dtype_code;
  record.dtype_bits = dtype_bits;
  record.ndim = static_cast<std::uint16_t>(extents.size());
  record.nbytes = nbytes;
  std::fill(std::begin(record.shape), std::end(record.shape), 0);
  std::copy(extents.begin(), extents.end(), record.shape);
}

void Lease::commit() {
  if (record.dtype_bits == 0) {
    throw std::invalid_argument(ring_->describe("reserve", ticket_) +
                                ": nothing was written; call shape() first");
  }
  if (held() && !ring_->forked() &&
      ring_->load(ring_->slot_of(ticket_)).without_waiting() == granted_) {
    record.ticket = ticket_;
    record.generation = granted_.generation();
    record.writer_pid = ring_->peers_.self_pid();
    if (ring_->header_.checksum != 0) record.crc = crc32c(data(), record.nbytes);
    std::memcpy(&ring_->state(ring_->slot_of(ticket_)).record, &record, sizeof record);
    KDFLOW_FAULT("record_written");
  }
  finish(granted_.committed());
  KDFLOW_FAULT("committed");
  Ring::add(ring_->side(Role::producer).records);
  Ring::add(ring_->side(Role::producer).bytes, record.nbytes);
  ring_->ring_bell();
}

void Lease::abort(const std::string& reason) {
  if (held() && !ring_->forked() &&
      ring_->load(ring_->slot_of(ticket_)).without_waiting() == granted_) {
    ring_->set_reason(ring_->slot_of(ticket_), reason);
  }
  finish(granted_.aborted());
  Ring::add(ring_->counters().aborted);
  ring_->ring_bell();
}

void Lease::release() {
  KDFLOW_FAULT("before_release");
  finish(granted_.released());
  KDFLOW_FAULT("released");
}

Lease::~Lease() {
  if (!held() || ring_->forked() || ring_->closed()) return;
  try {
    granted_.phase() == Phase::writing ? abort("the slot was dropped") : release();
  } catch (const std::exception&) {  // revoked meanwhile: nothing is left to give back
  }
}

}  // namespace kdflow
