// What kernels/kdflow_kernels/cuda/device.hpp names, for a host: the threads of a cluster are fibers of one thread,
// which go on in random order, and nothing is seen before it must be. A copy that was asked for is made when it is
// waited for, a store to another block when the cluster's barrier opens, and shared memory begins as NaN. So a missing
// wait or barrier is a wrong number.
#pragma once

#include <ucontext.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <deque>
#include <memory>
#include <random>
#include <utility>
#include <vector>

#define KDFLOW_INLINE inline
#define KDFLOW_KERNEL static
#define KDFLOW_PARAMETERS const

using Bits = std::uint32_t;

struct alignas(16) Bits4 {
  Bits at[4];
};

namespace device {

struct Store {
  void* to;
  Bits4 value;
};

struct Fiber {
  ucontext_t context{};
  std::unique_ptr<char[]> stack;
  int thread = 0, rank = 0;
  std::uint64_t hurry = 0;  // the warp's
  bool done = false;
  int arrived_in = -1;  // the phase of the cluster's barrier it has arrived in and not waited for
  // Copies by group, the last one open; and stores that the next barrier of the cluster carries.
  std::deque<std::vector<std::pair<Bits4*, const Bits4*>>> copies{1};
  std::vector<Store> stores;
};

// All of `expected` fibers arrive before any goes on.
struct Barrier {
  int expected = 0;
  std::vector<Fiber*> waiting;
  std::vector<Store> stores;
  int arrived = 0, phase = 0;
};

// What the lanes of a warp exchange, of this exchange and the one before.
struct Warp {
  Barrier barrier;
  float floats[2][32];
  int ints[2][32];
  int exchanges[32] = {};
};

struct Block {
  std::vector<Bits4> shared;
  Bits cycles[16];
  Barrier barrier;
  std::vector<Warp> warps;
};

struct Cluster {
  int index = 0;
  std::vector<Block> blocks;
  std::vector<Fiber> fibers;
  std::vector<Fiber*> ready;
  Barrier barrier;
  Fiber* running = nullptr;
  ucontext_t scheduler{};
  std::mt19937_64 random;
  Bits clock = 0;  // how often a fiber has been gone on with, and a clock been read
  bool misused = false;
};

inline Cluster* cluster = nullptr;

inline Fiber& self() { return *cluster->running; }
inline Block& own_block() { return cluster->blocks[static_cast<std::size_t>(self().rank)]; }
inline Warp& own_warp() { return own_block().warps[static_cast<std::size_t>(self().thread / 32)]; }

inline int thread() { return self().thread; }
inline int block() { return cluster->index * KDFLOW_CLUSTER + self().rank; }
inline Bits4* dynamic_shared() { return own_block().shared.data(); }
inline Bits* cycles() { return own_block().cycles; }
inline Bits clock() { return ++cluster->clock; }

inline void pause() {
  Fiber* const me = cluster->running;
  swapcontext(&me->context, &cluster->scheduler);
}

// This fiber does not go on.
inline void misuse() {
  cluster->misused = true;
  while (true) pause();
}

// Counts an arrival; whoever comes last opens the barrier.
inline void arrive(Barrier& barrier) {
  if (++barrier.arrived < barrier.expected) return;
  barrier.arrived = 0;
  ++barrier.phase;
  for (const Store& store : barrier.stores) std::memcpy(store.to, &store.value, sizeof store.value);
  barrier.stores.clear();
  for (Fiber* fiber : barrier.waiting) cluster->ready.push_back(fiber);
  barrier.waiting.clear();
}
inline void wait_for(Barrier& barrier, int phase) {
  while (barrier.phase == phase) {
    barrier.waiting.push_back(cluster->running);
    pause();
  }
}
inline void meet(Barrier& barrier) {
  const int phase = barrier.phase;
  arrive(barrier);
  wait_for(barrier, phase);
}

inline void sync_threads() { meet(own_block().barrier); }

inline void cluster_arrive(bool tells) {
  if (self().arrived_in >= 0) misuse();  // twice without a wait
  self().arrived_in = cluster->barrier.phase;
  if (!tells && !self().stores.empty()) misuse();
  auto& stores = self().stores;
  cluster->barrier.stores.insert(cluster->barrier.stores.end(), stores.begin(), stores.end());
  stores.clear();
  arrive(cluster->barrier);
}
inline void cluster_wait() {
  if (self().arrived_in < 0) misuse();  // without an arrival
  wait_for(cluster->barrier, self().arrived_in);
  self().arrived_in = -1;
}

inline void store_remote(void* shared, int block, Bits4 value) {
  const auto offset = static_cast<char*>(shared) - reinterpret_cast<char*>(own_block().shared.data());
  auto& target = cluster->blocks[static_cast<std::size_t>(block)].shared;
  self().stores.push_back({reinterpret_cast<char*>(target.data()) + offset, value});
}

inline void copy_async(Bits4* shared, const Bits4* global) { self().copies.back().emplace_back(shared, global); }
inline void commit_copies() { self().copies.emplace_back(); }
template <int kLeft>
inline void wait_copies(float) {
  auto& groups = self().copies;
  while (groups.size() > kLeft + 1) {
    for (auto [to, from] : groups.front()) *to = *from;
    groups.pop_front();
  }
}

// Every lane's value, in the order of lanes.
template <class T>
inline const T* gather(T (&values)[2][32], T value) {
  Warp& warp = own_warp();
  const int lane = thread() % 32, turn = warp.exchanges[lane]++ % 2;
  values[turn][lane] = value;
  meet(warp.barrier);
  return values[turn];
}
template <int kLanes>
inline float max_over(float value) {
  const float* lanes = gather(own_warp().floats, value);
  const int first = thread() % 32 / kLanes * kLanes;
  float found = lanes[first];
  for (int lane = 1; lane < kLanes; ++lane) found = fmaxf(found, lanes[first + lane]);
  return found;
}
template <int kLanes>
inline float sum_over(float value) {
  const float* lanes = gather(own_warp().floats, value);
  float sums[kLanes];
  std::memcpy(sums, lanes + thread() % 32 / kLanes * kLanes, sizeof sums);
  for (int apart = kLanes / 2; apart > 0; apart /= 2) {
    for (int lane = 0; lane < apart; ++lane) sums[lane] += sums[lane + apart];
  }
  return sums[0];
}
inline int warp_min(int value) {
  const int* lanes = gather(own_warp().ints, value);
  int found = lanes[0];
  for (int lane = 1; lane < 32; ++lane) found = lanes[lane] < found ? lanes[lane] : found;
  return found;
}

inline Bits bits(float value) { return __builtin_bit_cast(Bits, value); }
inline float from_bits(Bits value) { return __builtin_bit_cast(float, value); }
inline float exp2(float x) {
  const float y = ::exp2f(x);
  return y < 1.17549435e-38F ? 0.0F : y;
}
inline float log2(float x) { return ::log2f(x); }

inline Bits narrow_one(float value) {
  const Bits found = bits(value);
  return value == value ? (found + 0x7FFFU + ((found >> 16) & 1U)) >> 16 : 0x7FFFU;
}
inline Bits narrow(float lower, float upper) { return narrow_one(lower) | narrow_one(upper) << 16; }
inline Bits max_of_halves(Bits a, Bits b) {
  const float lower = fmaxf(from_bits(a << 16), from_bits(b << 16));
  const float upper = fmaxf(from_bits(a & 0xFFFF0000U), from_bits(b & 0xFFFF0000U));
  return bits(lower) >> 16 | (bits(upper) & 0xFFFF0000U);
}

}  // namespace device
