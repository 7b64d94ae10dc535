// A held slot.
#pragma once

#include <chrono>
#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <utility>

#include "kdflow/copy.hpp"
#include "kdflow/member.hpp"

namespace kdflow {

// A slot in phase writing or reading, held by this peer. Gives it back when destroyed: a writer
// aborts, a reader releases. It keeps the mapping alive, so data() never dangles; what it points to
// is the lease's until it ends.
class Lease {
 public:
  Lease(std::shared_ptr<Member> member, std::uint64_t ticket, Control granted)
      : member_(std::move(member)), ticket_(ticket), granted_(granted.without_waiting()) {}
  Lease(Lease&& other) noexcept = default;
  ~Lease() {
    if (!held() || member_->forked() || !member_->joined()) return;
    try {
      granted_.phase() == Phase::writing ? abort("the slot was dropped") : release();
    } catch (const TransportError&) {  // revoked meanwhile: nothing is left to give back
    }
  }

  std::uint64_t ticket() const { return ticket_; }
  std::uint64_t generation() const { return granted_.generation(); }
  const std::shared_ptr<Member>& member() const { return member_; }
  bool held() const { return member_ != nullptr && !done_; }
  std::byte* data() const { return slots().payload(slot()); }

  Record record{};  // the reader's checked copy; the writer fills microbatch_id and tag, and calls
                    // shape()

  // The writer's: what the payload is. Throws std::invalid_argument when it does not fit the slot.
  void shape(std::uint8_t dtype_code, std::uint8_t dtype_bits, std::span<const std::int64_t> extents) {
    member_->shape(record, "reserve", ticket_, dtype_code, dtype_bits, extents);
  }

  // The writer's: all of the payload, from other memory of this process. After shape().
  void fill(const void* source) { copy(data(), source, record.nbytes, slots().exceeds_cache()); }

  void commit() {
    if (record.dtype_bits == 0) {
      throw std::invalid_argument(member_->describe("reserve", ticket_) + ": nothing was written; give it a shape");
    }
    require_held();
    const Member::Call call(*member_);
    record.ticket = ticket_;
    record.generation = granted_.generation();
    record.writer_pid = member_->table.self_pid();
    record.committed_ns = std::chrono::nanoseconds(Clock::now().time_since_epoch()).count();
    if (slots().header().checksum != 0) record.crc = crc32c(data(), record.nbytes);
    std::memcpy(&slots().record(slot()), &record, sizeof record);
    KDFLOW_FAULT("record_written");
    finish(granted_.committed());
    KDFLOW_FAULT("committed");
    Slots::add(slots().counters(Role::producer).records);
    Slots::add(slots().counters(Role::producer).bytes, record.nbytes);
    slots().ring_bell();
  }

  void abort(const std::string& reason) {
    require_held();
    const Member::Call call(*member_);
    slots().set_reason(slot(), reason);
    finish(granted_.aborted());
    Slots::add(slots().counters().aborted);
    slots().ring_bell();
  }

  void release() {
    require_held();
    KDFLOW_FAULT("releasing");
    finish(granted_.released());
    KDFLOW_FAULT("released");
  }

  void require_held() const {
    if (!held()) throw TransportError("ticket " + std::to_string(ticket_) + ": was given back before", ticket_);
    member_->require_joined();
    if (slots().load(slot()).without_waiting() != granted_) throw_revoked();
  }

  // A record that turned out unreadable: its ticket can be given again; or, where nobody grants it, is lost.
  void reject() { finish(granted_.abandoned()); }
  void discard() {
    finish(granted_.released());
    Slots::add(slots().counters().lost);
  }

 private:
  const Slots& slots() const { return member_->slots; }
  std::uint64_t slot() const { return slots().slot_of(ticket_); }

  void finish(Control next) {
    done_ = true;
    member_->guard(slot(), 1, PROT_NONE);
    Control seen = slots().load(slot());
    while (seen.without_waiting() == granted_) {
      if (slots().exchange(slot(), seen, next)) return;
    }
    throw_revoked();
  }

  [[noreturn]] void throw_revoked() const {
    throw TransportError(member_->describe("hold", ticket_) + ": it is no longer this peer's, nothing of it counts: " +
                             member_->describe_slot(slot(), slots().load(slot())),
                         ticket_);
  }

  std::shared_ptr<Member> member_;
  std::uint64_t ticket_;
  Control granted_;
  bool done_ = false;
};

}  // namespace kdflow
