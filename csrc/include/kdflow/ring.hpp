// A ring of slots over shared memory: reserve -> write -> commit, receive -> read -> release.
//
// Ticket t lives in slot t % num_slots. The control word of that slot (control.hpp) alone decides
// who may touch it; everything else in the segment is a hint, a counter, or guarded by it.
// docs/ring.md says why each edge is enough, csrc/tests/model.cpp checks it exhaustively for small
// rings.
#pragma once

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "kdflow/handle.hpp"
#include "kdflow/lease.hpp"

namespace kdflow {

struct RingConfig {
  std::string name;
  RingKind kind = RingKind::data;
  std::uint64_t num_slots = 8;
  std::uint64_t slot_bytes = 1u << 20;
  bool checksum = false;
  Placement placement = Placement::host;
  SegmentOptions segment{};
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

class Ring {
 public:
  using Ticket = std::optional<std::uint64_t>;

  // The creator holds the memory and is not a peer.
  static Ring create(const RingConfig& config) {
    const auto fail = [&](const std::string& what) { throw std::invalid_argument(config.name + ": " + what); };
    Header header{};
    header.magic = kMagic;
    header.version = kVersion;
    header.kind = config.kind;
    header.num_slots = config.num_slots;
    header.slot_bytes = config.slot_bytes;
    header.checksum = config.checksum ? 1 : 0;
    header.placement = config.placement;
    header.pid_namespace = pid_namespace();
    header.id = random_id();
    if (config.num_slots == 0 || config.num_slots > kMaxSlots) {
      fail("num_slots must be in 1.." + std::to_string(kMaxSlots) + ", got " + std::to_string(config.num_slots));
    }
    if (config.slot_bytes == 0 || config.slot_bytes > kMaxSlotBytes) {
      fail("slot_bytes must be in 1..2^40, got " + std::to_string(config.slot_bytes));
    }
    if (config.name.empty() || config.name.size() >= sizeof(header.name)) {
      fail("name must have 1 to " + std::to_string(sizeof(header.name) - 1) + " bytes");
    }
    if (config.checksum && config.placement == Placement::device) {
      fail("checksum: the host cannot read device memory; leave it out");
    }
    config.name.copy(header.name, config.name.size());
    lay_out(header, config.segment.huge_pages ? kHugePageBytes : kPageBytes);
    header.crc = header.expected_crc();
    auto segment = std::make_shared<const Segment>(Segment::create(config.name, header.segment_bytes, config.segment));
    std::memcpy(segment->at(0), &header,
                sizeof header);  // all else starts as zeros: free slots, no peers
    return Ring(std::make_shared<Member>(std::move(segment), header, AttachOptions{}));
  }

  static Ring attach(UniqueFd fd, Role role, const AttachOptions& options = {}) {
    auto segment = std::make_shared<const Segment>(Segment::attach(std::move(fd)));
    const Header header = read_header(*segment);
    return join(std::move(segment), header, role, options);
  }

  static Ring attach(const Handle& handle, Role role, const AttachOptions& options = {}) {
    UniqueFd fd = handle.open();
    if (!Segment::is_sealed(fd)) handle.throw_stale("another file");
    auto segment = std::make_shared<const Segment>(Segment::attach(std::move(fd)));
    const Header header = read_header(*segment);
    if (header.id != handle.id) handle.throw_stale(std::string("the ring ") + header.name);
    return join(std::move(segment), header, role, options);
  }

  // Over a mapping that this process has already: for a process that takes both roles.
  static Ring attach(std::shared_ptr<const Segment> segment, Role role, const AttachOptions& options = {}) {
    const Header header = read_header(*segment);
    return join(std::move(segment), header, role, options);
  }

  Handle handle() const { return {::getpid(), slots().fd(), slots().header().id}; }

  // The mapping lives on until the last lease is gone.
  void close() { member_->leave(); }

  const Slots& slots() const { return member_->slots; }
  const std::shared_ptr<Member>& member() const { return member_; }

  // With a ticket: fills that one, as granted by the consumer. Without: the next of all
  // free-running producers.
  Lease reserve(Ticket ticket, const Wait& wait) const {
    const Member::Call call(*member_);
    const Peer self = member_->require(Role::producer);
    check_ticket(ticket);
    return block("reserve", self, ticket, wait, [&](Blocked& blocked) {
      return ticket ? try_reserve(self, *ticket, blocked) : try_reserve_next(self, blocked);
    });
  }

  // reserve, fill and commit in one. `record` has its shape, and whatever else the writer gives.
  void put(Ticket ticket, const Record& record, const void* source, const Wait& wait) const {
    const Member::Call call(*member_);  // while it copies, too, the slot gets no other owner
    Lease lease = reserve(ticket, wait);
    lease.record = record;
    lease.fill(source);
    lease.commit();
  }

  // With a ticket: that one. Without: the next in order.
  Lease receive(Ticket ticket, const Wait& wait) const {
    const Member::Call call(*member_);
    const Peer self = member_->require(Role::consumer);
    check_ticket(ticket);
    return block("receive", self, ticket, wait, [&](Blocked& blocked) {
      return ticket ? try_receive(self, *ticket, blocked) : try_receive_next(self, blocked);
    });
  }

  // Never sleeps.
  std::optional<Lease> try_receive(Ticket ticket) const {
    const Member::Call call(*member_);
    const Peer self = member_->require(Role::consumer);
    check_ticket(ticket);
    const auto attempt = [&](Blocked& blocked) {
      return ticket ? try_receive(self, *ticket, blocked) : try_receive_next(self, blocked);
    };
    Blocked blocked;
    if (auto lease = attempt(blocked)) return lease;
    if (!member_->look_is_due()) return std::nullopt;
    const bool deserted = member_->look_after_peers();
    if (auto lease = attempt(blocked)) return lease;
    if (deserted) throw_deserted("receive", Role::producer, ticket, blocked);
    return std::nullopt;
  }

  // May the consumer grant this ticket: is its slot free for it?
  bool is_free(std::uint64_t ticket) const {
    check_ticket(ticket);
    return slots().load(slots().slot_of(ticket)).is(Phase::free, slots().lap_of(ticket));
  }

  // Makes an abandoned or aborted ticket free to be granted again.
  void reclaim(std::uint64_t ticket) const {
    member_->require(Role::consumer);
    check_ticket(ticket);
    const std::uint64_t slot = slots().slot_of(ticket);
    const std::uint64_t lap = slots().lap_of(ticket);
    Control seen = slots().load(slot);
    if (seen.is(Phase::writing, lap)) {  // perhaps by a dead one
      member_->look_after_peers();
      seen = slots().load(slot);
    }
    while (seen.is(Phase::abandoned, lap) || seen.is(Phase::aborted, lap)) {
      if (seen.attempt() == Control::kMaxAttempt) {
        throw TransportError(member_->describe("reclaim", ticket) + ": given too often without a result", ticket);
      }
      if (!slots().exchange(slot, seen, seen.granted_again())) continue;
      Slots::add(slots().counters().reclaimed);
      return;
    }
    if (seen.is(Phase::free, lap)) return;
    throw TransportError(member_->describe("reclaim", ticket) + ": " + member_->describe_slot(slot, seen) +
                             "; only an abandoned or aborted ticket can be given again",
                         ticket);
  }

  RingStats stats() const {
    const auto read = [](const AtomicWord& word) { return word.load(std::memory_order_relaxed); };
    const auto side = [&](const SideCounters& from) {
      return SideStats{read(from.attached), 0, read(from.records), read(from.bytes), read(from.waits),
                       read(from.wait_ns)};
    };
    const Counters& from = slots().counters();
    RingStats stats{.producers = side(from.producers),
                    .consumers = side(from.consumers),
                    .depth = 0,
                    .writing = 0,
                    .reading = 0,
                    .died = read(from.died),
                    .abandoned = read(from.abandoned),
                    .aborted = read(from.aborted),
                    .reclaimed = read(from.reclaimed),
                    .lost = read(from.lost)};
    for (const Peer& peer : member_->living()) {
      ++(peer.identity.role() == Role::producer ? stats.producers : stats.consumers).live;
    }
    for (std::uint64_t slot = 0; slot < slots().count(); ++slot) {
      const Phase phase = slots().load(slot).phase();
      stats.depth += phase == Phase::ready ? 1 : 0;
      stats.writing += phase == Phase::writing ? 1 : 0;
      stats.reading += phase == Phase::reading ? 1 : 0;
    }
    return stats;
  }

  // Until a peer of the other side is attached.
  void wait_for_peer(const Wait& wait) const {
    const Role awaited = other(member_->require_joined().identity.role());
    const Clock::time_point deadline = Clock::now() + wait.timeout;
    while (!member_->has_live(awaited)) {
      if (Clock::now() >= deadline) {
        throw RingTimeout(slots().name() + ": no " + to_string(awaited) + " attached within " + seconds(wait.timeout));
      }
      slots().wait_bell(slots().bell(), member_->options.tick);
      wait.on_tick();
      member_->require_joined();
    }
  }

 private:
  struct Blocked {
    std::uint64_t slot = 0;
    Control seen;
  };

  explicit Ring(std::shared_ptr<Member> member) : member_(std::move(member)) {}

  static Header read_header(const Segment& segment) {
    if (segment.bytes() < kSlotsOffset) throw RingCorrupt("the segment is smaller than a ring's header");
    Header header;
    std::memcpy(&header, segment.at(0), sizeof header);
    check_header(header, segment.bytes());
    if (header.pid_namespace != pid_namespace()) {
      throw TransportError(std::string(header.name) +
                           ": made in another pid namespace, whose processes cannot be watched from here; share it "
                           "(docker run --pid=container:...)");
    }
    return header;
  }

  // Before anything of it shows in the ring: others would see a peer that comes and dies.
  static void check_kind(const Header& header, const AttachOptions& options) {
    const std::string name(header.name);
    const auto kind = [](RingKind of) { return of == RingKind::data ? "tensors" : "requests"; };
    const bool is_data = header.kind == RingKind::data;
    if (options.kind && *options.kind != header.kind) {
      throw std::invalid_argument(name + ": expected a ring of " + kind(*options.kind) + ", got one of " +
                                  kind(header.kind) + "; attach it as " +
                                  (is_data ? "HiddenRing or CudaRing" : "RequestRing"));
    }
    const auto memory = [](Placement of) { return of == Placement::host ? "host" : "device"; };
    if (options.placement && *options.placement != header.placement) {
      throw std::invalid_argument(name + ": expected slots in " + memory(*options.placement) + " memory, got " +
                                  memory(header.placement) + " memory; attach it as " +
                                  (header.placement == Placement::host ? "HiddenRing" : "CudaRing"));
    }
  }

  static Ring join(std::shared_ptr<const Segment> segment, const Header& header, Role role,
                   const AttachOptions& options) {
    check_kind(header, options);
    segment->populate();  // only now, for it might have been another's memory
    Ring ring(std::make_shared<Member>(std::move(segment), header, options));
    ring.member_->join(role);
    return ring;
  }

  void check_ticket(Ticket ticket) const {
    if (ticket && slots().lap_of(*ticket) >= Control::kMaxLap) {
      throw std::invalid_argument(slots().name() + ": ticket " + std::to_string(*ticket) + " is out of range");
    }
  }

  // --- one attempt at an operation: a lease, or what stands in its way ---
  std::optional<Lease> try_reserve(const Peer& self, std::uint64_t ticket, Blocked& blocked) const {
    const std::uint64_t slot = slots().slot_of(ticket);
    const std::uint64_t lap = slots().lap_of(ticket);
    Control seen = slots().load(slot);
    while (seen.is(Phase::free, lap)) {
      if (slots().exchange(slot, seen, seen.writing_by(self.index))) {
        return start_writing(ticket, seen.writing_by(self.index));
      }
    }
    if (seen.lap() >= lap) {
      throw TransportError(member_->describe("reserve", ticket) + ": " + member_->describe_slot(slot, seen) +
                               "; this ticket was given to another producer, or is over",
                           ticket);
    }
    blocked = {slot, seen};
    return std::nullopt;
  }

  std::optional<Lease> try_reserve_next(const Peer& self, Blocked& blocked) const {
    AtomicWord& next_write = slots().cursors().next_write;
    // The bound only matters when the words are nonsense: each honest retry means that another peer
    // moved on.
    for (std::uint64_t n = 0; n <= 2 * slots().count(); ++n) {
      const std::uint64_t ticket = slots().read_cursor(next_write);
      const std::uint64_t slot = slots().slot_of(ticket);
      Control seen = slots().load(slot);
      blocked = {slot, seen};
      if (seen.lap() < slots().lap_of(ticket)) return std::nullopt;
      if (!seen.is(Phase::free, slots().lap_of(ticket))) {
        slots().advance_past(next_write, ticket, seen);
      } else if (slots().exchange(slot, seen, seen.writing_by(self.index))) {
        KDFLOW_FAULT("slot_taken");
        Slots::advance(next_write, ticket);
        return start_writing(ticket, seen.writing_by(self.index));
      }
    }
    return std::nullopt;
  }

  Lease start_writing(std::uint64_t ticket, Control granted) const {
    const std::uint64_t slot = slots().slot_of(ticket);
    KDFLOW_FAULT("reserved");
    slots().record(slot).writer_pid = member_->table.self_pid();  // to be named, should it die
    member_->guard(slot, 1, PROT_READ | PROT_WRITE);
    return Lease(member_, ticket, granted);
  }

  std::optional<Lease> try_receive(const Peer& self, std::uint64_t ticket, Blocked& blocked) const {
    const std::uint64_t slot = slots().slot_of(ticket);
    const std::uint64_t lap = slots().lap_of(ticket);
    Control seen = slots().load(slot);
    while (seen.is(Phase::ready, lap)) {
      if (slots().exchange(slot, seen, seen.reading_by(self.index))) {
        return start_reading(ticket, seen.reading_by(self.index), &Lease::reject);
      }
    }
    if (seen.is(Phase::abandoned, lap)) throw_abandoned(ticket, "; reclaim() it to give it again");
    if (seen.is(Phase::aborted, lap)) throw_aborted(ticket, slots().reason(slot));
    if (seen.lap() > lap || seen.is(Phase::reading, lap)) {
      throw TransportError(member_->describe("receive", ticket) + ": " + member_->describe_slot(slot, seen) +
                               "; this ticket was received before",
                           ticket);
    }
    blocked = {slot, seen};
    return std::nullopt;
  }

  std::optional<Lease> try_receive_next(const Peer& self, Blocked& blocked) const {
    AtomicWord& next_read = slots().cursors().next_read;
    for (std::uint64_t n = 0; n <= 2 * slots().count(); ++n) {
      const std::uint64_t ticket = slots().read_cursor(next_read);
      const std::uint64_t slot = slots().slot_of(ticket);
      const std::uint64_t lap = slots().lap_of(ticket);
      Control seen = slots().load(slot);
      blocked = {slot, seen};
      if (seen.lap() > lap || seen.is(Phase::reading, lap)) {
        slots().advance_past(next_read, ticket, seen);
      } else if (seen.is(Phase::ready, lap)) {
        if (!slots().exchange(slot, seen, seen.reading_by(self.index))) continue;
        KDFLOW_FAULT("slot_received");
        Slots::advance(next_read, ticket);
        return start_reading(ticket, seen.reading_by(self.index), &Lease::discard);
      } else if (seen.is(Phase::abandoned, lap) || seen.is(Phase::aborted, lap)) {
        skip_lost(ticket, seen);
      } else {
        return std::nullopt;
      }
    }
    return std::nullopt;
  }

  // A free-running ticket has nobody to give it again: it is reported once, and the ring goes on.
  void skip_lost(std::uint64_t ticket, Control seen) const {
    const std::uint64_t slot = slots().slot_of(ticket);
    const bool aborted = seen.phase() == Phase::aborted;
    const std::string why = slots().reason(slot);
    if (!slots().exchange(slot, seen, seen.released())) return;
    Slots::add(slots().counters().lost);
    Slots::advance(slots().cursors().next_read, ticket);
    if (slots().header().kind == RingKind::request) return;  // the sender is dead, or knows
    if (aborted) throw_aborted(ticket, why);
    throw_abandoned(ticket, "; this record is lost");
  }

  Lease start_reading(std::uint64_t ticket, Control granted, void (Lease::*give_up)()) const {
    const std::uint64_t slot = slots().slot_of(ticket);
    KDFLOW_FAULT("received");
    Lease lease(member_, ticket, granted);
    std::memcpy(&lease.record, &slots().record(slot), sizeof(Record));
    try {
      check_record(lease.record, slots().header(), ticket, granted.generation());
      member_->guard(slot, 1, PROT_READ);
      if (slots().header().checksum != 0 && crc32c(lease.data(), lease.record.nbytes) != lease.record.crc) {
        throw RingCorrupt(member_->describe("receive", ticket) + ": the payload does not match its checksum", ticket);
      }
    } catch (const RingCorrupt&) {
      (lease.*give_up)();
      throw;
    }
    Slots::add(slots().counters(Role::consumer).records);
    Slots::add(slots().counters(Role::consumer).bytes, lease.record.nbytes);
    return lease;
  }

  // --- waiting: attempt, spin, sleep; look after the peers once a tick ---
  template <typename Attempt>
  Lease block(const char* operation, const Peer& self, Ticket ticket, const Wait& wait, const Attempt& attempt) const {
    const Role role = self.identity.role();
    Blocked blocked;
    if (auto lease = attempt(blocked)) return std::move(*lease);
    SpinBudget& budget = member_->spin_budget;
    const Clock::time_point start = Clock::now();
    for (int spin = 1; spin % 32 != 0 || Clock::now() - start < budget.get(); ++spin) {
      cpu_relax();
      if (spin % 32 == 0) std::this_thread::yield();  // the peer may be waiting for this very core
      if (!slots().changed(blocked.slot, blocked.seen)) continue;
      if (auto lease = attempt(blocked)) {
        budget.learn(Clock::now() - start);
        return std::move(*lease);
      }
    }
    const WaitCount count{slots().counters(role), budget, start};
    const Clock::time_point deadline = start + wait.timeout;
    Clock::time_point next_look = start + member_->options.tick;
    while (true) {
      slots().sleep(blocked.slot, blocked.seen,
                    std::min<Clock::duration>(deadline - Clock::now(), member_->options.tick));
      if (auto lease = attempt(blocked)) return std::move(*lease);
      const bool look = Clock::now() >= std::min(next_look, deadline);
      if (look) next_look = Clock::now() + member_->options.tick;
      const bool deserted = look && member_->look_after_peers();
      // Looking may have freed the slot; and a peer's last deed before its end counts.
      if (auto lease = attempt(blocked)) return std::move(*lease);
      if (deserted) throw_deserted(operation, other(role), ticket, blocked);
      if (Clock::now() >= deadline) {
        throw RingTimeout(member_->describe(operation, ticket) + " timed out after " + seconds(wait.timeout) + ": " +
                              member_->describe_slot(blocked.slot, blocked.seen) + "; " +
                              member_->describe_living(other(role)),
                          ticket);
      }
      wait.on_tick();
      member_->require_joined();  // it was closed meanwhile, perhaps by on_tick
    }
  }

  struct WaitCount {
    SideCounters& counters;
    SpinBudget& budget;
    Clock::time_point start;
    ~WaitCount() {
      const Clock::duration waited = Clock::now() - start;
      budget.learn(waited);
      Slots::add(counters.waits);
      Slots::add(counters.wait_ns, static_cast<std::uint64_t>(waited.count()));
    }
  };

  // --- errors ---
  static std::string seconds(std::chrono::nanoseconds duration) {
    const std::string text = std::to_string(std::chrono::duration<double>(duration).count());
    return text.substr(0, text.size() - 3) + " s";
  }

  std::string writer(std::uint64_t ticket) const {
    return "producer pid " + std::to_string(slots().record(slots().slot_of(ticket)).writer_pid);
  }
  [[noreturn]] void throw_abandoned(std::uint64_t ticket, const char* remedy) const {
    throw PeerDied(member_->describe("receive", ticket) + ": " + writer(ticket) + " died while writing it" + remedy,
                   ticket);
  }
  [[noreturn]] void throw_aborted(std::uint64_t ticket, const std::string& why) const {
    throw SlotAborted(member_->describe("receive", ticket) + ": " + writer(ticket) + " gave it up: " + why, ticket);
  }
  [[noreturn]] void throw_deserted(const char* operation, Role side, Ticket ticket, const Blocked& blocked) const {
    throw PeerDied(member_->describe(operation, ticket) + ": " + member_->describe_slot(blocked.slot, blocked.seen) +
                       " and no " + to_string(side) + " is left of " +
                       std::to_string(slots().counters(side).attached.load(std::memory_order_relaxed)) +
                       " attached so far",
                   ticket);
  }

  std::shared_ptr<Member> member_;
};

}  // namespace kdflow
