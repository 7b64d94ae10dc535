// The control word of a slot: one 64-bit atomic that holds everything two processes must agree on.
//
//   bit  0-2   phase
//   bit  3     waiting: somebody sleeps on the word, whoever wakes the slot must call futex
//   bit  4-11  owner: index of the peer that writes or reads
//   bit 12-23  attempt: counts grants of the same ticket, so that no two owners ever see an equal
//   word bit 24-63  lap: ticket / num_slots
//
// Its low half is the futex word. This file is pure: no atomics, no system calls; the model checker
// runs on it.
#pragma once

#include <cstdint>

namespace kdflow {

enum class Phase : std::uint8_t { free, writing, ready, reading, abandoned, aborted };
inline constexpr std::uint64_t kNumPhases = 6;

constexpr const char* to_string(Phase phase) {
  constexpr const char* names[] = {"free", "writing", "ready", "reading", "abandoned", "aborted"};
  return names[static_cast<std::uint8_t>(phase)];
}

class Control {
 public:
  static constexpr std::uint64_t kMaxOwners = 1u << 8;
  static constexpr std::uint64_t kMaxAttempt = (1u << 12) - 1;
  static constexpr std::uint64_t kMaxLap = (std::uint64_t{1} << 40) - 1;

  constexpr Control() = default;
  constexpr explicit Control(std::uint64_t word) : word_(word) {}

  constexpr std::uint64_t word() const { return word_; }
  constexpr std::uint32_t futex_value() const { return static_cast<std::uint32_t>(word_); }
  constexpr bool valid() const { return (word_ & 7) < kNumPhases; }
  constexpr Phase phase() const { return static_cast<Phase>(word_ & 7); }
  constexpr bool is(Phase phase, std::uint64_t lap) const { return this->phase() == phase && this->lap() == lap; }
  constexpr bool waiting() const { return (word_ & kWaiting) != 0; }
  constexpr std::uint32_t owner() const { return (word_ >> 4) & 0xff; }
  constexpr std::uint64_t attempt() const { return (word_ >> 12) & kMaxAttempt; }
  constexpr std::uint64_t lap() const { return word_ >> 24; }
  constexpr std::uint64_t generation() const { return word_ >> 12; }
  constexpr bool owned_by(std::uint32_t peer) const {
    return owner() == peer && (phase() == Phase::writing || phase() == Phase::reading);
  }
  constexpr bool operator==(const Control&) const = default;

  constexpr Control with_waiting() const { return Control(word_ | kWaiting); }
  constexpr Control without_waiting() const { return Control(word_ & ~kWaiting); }

  // Transitions that nobody waits for keep the waiting bit ...
  constexpr Control writing_by(std::uint32_t peer) const { return held(Phase::writing, peer); }
  constexpr Control reading_by(std::uint32_t peer) const { return held(Phase::reading, peer); }
  // ... the others clear it, and their author wakes the sleepers.
  constexpr Control committed() const { return make(Phase::ready, attempt(), lap()); }
  constexpr Control released() const { return make(Phase::free, 0, lap() + 1); }
  constexpr Control abandoned() const { return make(Phase::abandoned, attempt(), lap()); }
  constexpr Control aborted() const { return make(Phase::aborted, attempt(), lap()); }
  // The attempt grows here too: a reaper that stalled before its compare-and-swap must not hit the
  // next owner.
  constexpr Control granted_again() const { return make(Phase::free, attempt() + 1, lap()); }
  constexpr Control ready_again() const { return make(Phase::ready, attempt() + 1, lap()); }
  // What becomes of the slot when its owner is gone.
  constexpr Control orphaned() const { return phase() == Phase::writing ? abandoned() : ready_again(); }

 private:
  static constexpr std::uint64_t kWaiting = 1u << 3;

  constexpr Control held(Phase phase, std::uint32_t peer) const {
    return Control((word_ & ~std::uint64_t{0xff7}) | static_cast<std::uint64_t>(phase) | (std::uint64_t{peer} << 4));
  }
  constexpr Control make(Phase phase, std::uint64_t attempt, std::uint64_t lap) const {
    return Control(static_cast<std::uint64_t>(phase) | (word_ & 0xff0) | ((attempt & kMaxAttempt) << 12) | (lap << 24));
  }

  std::uint64_t word_ = 0;  // all zero: free, lap 0
};

}  // namespace kdflow
