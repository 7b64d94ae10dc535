// The peer table: who is attached, who of them is dead, and which slots the dead leave behind.
#pragma once

#include <cstdint>
#include <functional>
#include <span>
#include <string>
#include <vector>

#include "kdflow/fault.hpp"
#include "kdflow/layout.hpp"
#include "kdflow/process.hpp"

namespace kdflow {

struct Peer {
  std::uint32_t index;
  PeerIdentity identity;
};

class PeerTable {
 public:
  PeerTable(std::span<PeerEntry> entries, std::string ring) : entries_(entries), ring_(std::move(ring)) {}

  // Takes an entry out of [first, last). The caller has reaped the dead before.
  Peer claim(Role role, std::size_t first, std::size_t last) {
    for (std::size_t index = first; index < last; ++index) {
      PeerIdentity seen = load(index);
      if (!seen.is_free()) continue;
      const PeerIdentity claimed = seen.claimed(role, watch_.self_pid());
      if (!exchange(index, seen, claimed)) continue;
      KDFLOW_FAULT("peer_claimed");
      entries_[index].start_time.store(watch_.self().start_time, std::memory_order_relaxed);
      entries_[index].stack.store(watch_.self().stack, std::memory_order_relaxed);
      if (!exchange(index, claimed, claimed.live())) {
        throw TransportError(ring_ + ": another peer took this process for dead while it attached");
      }
      return Peer{static_cast<std::uint32_t>(index), claimed.live()};
    }
    if (last - first == 1) {
      throw TransportError(ring_ + ": already has its one consumer, pid " + std::to_string(load(first).pid()) +
                           "; close that one first");
    }
    throw TransportError(ring_ + ": all " + std::to_string(kMaxPeers) + " peer entries are taken");
  }

  void leave(const Peer& peer) { exchange(peer.index, peer.identity, peer.identity.freed()); }
  bool holds(const Peer& peer) const { return load(peer.index) == peer.identity; }

  std::vector<Peer> attached() const {
    std::vector<Peer> peers;
    for (std::size_t index = 0; index < entries_.size(); ++index) {
      const PeerIdentity identity = load(index);
      if (!identity.is_free()) peers.push_back(Peer{static_cast<std::uint32_t>(index), identity});
    }
    return peers;
  }

  bool alive(const Peer& peer) {
    const PeerEntry& entry = entries_[peer.index];
    return watch_.alive(
        peer.index, peer.identity,
        {entry.start_time.load(std::memory_order_relaxed), entry.stack.load(std::memory_order_relaxed)});
  }

  // orphan(peer) gives the slots of a dead peer back, may run in several processes at once, and is
  // over before the entry can be taken by anybody else. Returns the number of peers this call
  // buried.
  int reap(const std::function<void(const Peer&)>& orphan) {
    int num_buried = 0;
    for (const Peer& peer : attached()) {
      if (alive(peer)) continue;
      orphan(peer);
      KDFLOW_FAULT("peer_orphaned");
      num_buried += exchange(peer.index, peer.identity, peer.identity.freed()) ? 1 : 0;
    }
    return num_buried;
  }

  std::int32_t self_pid() const { return watch_.self_pid(); }

 private:
  PeerIdentity load(std::size_t index) const {
    const PeerIdentity identity(entries_[index].identity.load(std::memory_order_acquire));
    if (!identity.valid()) {
      throw RingCorrupt(ring_ + ": peer entry " + std::to_string(index) + " is not in any state");
    }
    return identity;
  }

  bool exchange(std::size_t index, PeerIdentity expected, PeerIdentity desired) {
    std::uint64_t word = expected.word();
    return entries_[index].identity.compare_exchange_strong(word, desired.word(), std::memory_order_acq_rel,
                                                            std::memory_order_acquire);
  }

  std::span<PeerEntry> entries_;
  std::string ring_;
  ProcessWatch watch_;
};

}  // namespace kdflow
