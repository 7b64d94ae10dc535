// The few things of a CUDA device that cluster_rows.cu uses, each a name. Compiled by NVRTC, which has no headers.
// Tests put a host's version of this file in its place (tests/support/cluster_rows).
#pragma once

#define KDFLOW_INLINE __device__ __forceinline__
#define KDFLOW_KERNEL                                          \
  extern "C" __global__ __cluster_dims__(KDFLOW_CLUSTER, 1, 1) \
      __launch_bounds__(KDFLOW_THREADS, KDFLOW_BLOCKS_PER_PROCESSOR)
#define KDFLOW_PARAMETERS const __grid_constant__

using Bits = unsigned int;
using Address = unsigned int;

struct alignas(16) Bits4 {
  Bits at[4];
};

namespace device {

KDFLOW_INLINE int thread() { return static_cast<int>(threadIdx.x); }
KDFLOW_INLINE int block() { return static_cast<int>(blockIdx.x); }

KDFLOW_INLINE Bits4* dynamic_shared() {
  extern __shared__ Bits4 shared[];
  return shared;
}

// For the form of the kernel with a clock: where a block's counts are, and the cycles of its processor.
KDFLOW_INLINE Bits* cycles() {
  __shared__ Bits counts[16];
  return counts;
}
KDFLOW_INLINE Bits clock() {
  Bits now;
  asm volatile("mov.u32 %0, %%clock;" : "=r"(now)::"memory");
  return now;
}

KDFLOW_INLINE Address address_of(const void* shared) { return static_cast<Address>(__cvta_generic_to_shared(shared)); }

KDFLOW_INLINE void sync_threads() { __syncthreads(); }

// All threads of the cluster arrive before any goes on. What a warp stored before an arrival that tells of it, to the
// shared memory of whichever block, is there after the wait; other arrivals wait for no store.
KDFLOW_INLINE void cluster_arrive(bool tells) {
  if (tells) {
    asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
  } else {
    asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
  }
}
KDFLOW_INLINE void cluster_wait() { asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory"); }

// *shared = value, in another block's shared memory.
KDFLOW_INLINE void store_remote(void* shared, int block, Bits4 value) {
  Address remote;
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(remote) : "r"(address_of(shared)), "r"(block));
  asm volatile("st.shared::cluster.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(remote), "r"(value.at[0]), "r"(value.at[1]),
               "r"(value.at[2]), "r"(value.at[3])
               : "memory");
}

// 16 bytes from global to shared memory, past the registers; the thread that asked may read them after wait.
KDFLOW_INLINE void copy_async(Bits4* shared, const Bits4* global) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(address_of(shared)), "l"(global) : "memory");
}
KDFLOW_INLINE void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Until no more than the youngest kLeft groups of this thread's are under way. It is asked when the number has been
// found, which is nothing below 0: a condition that always holds, so that the assembler does not move the wait before
// that.
template <int kLeft>
KDFLOW_INLINE void wait_copies(float found) {
  asm volatile(
      "{\n\t.reg .pred holds;\n\t"
      "setp.ne.b32 holds, %0, -1;\n\t"
      "@holds cp.async.wait_group %1;\n\t}"
      :
      : "f"(found), "n"(kLeft)
      : "memory");
}

// Over every kLanes neighbouring lanes of a warp; all get the result. The order of a sum is fixed.
template <int kLanes>
KDFLOW_INLINE float max_over(float value) {
#pragma unroll
  for (int apart = kLanes / 2; apart > 0; apart /= 2) value = fmaxf(value, __shfl_xor_sync(~0U, value, apart));
  return value;
}
template <int kLanes>
KDFLOW_INLINE float sum_over(float value) {
#pragma unroll
  for (int apart = kLanes / 2; apart > 0; apart /= 2) value += __shfl_xor_sync(~0U, value, apart);
  return value;
}
// Over all lanes of a warp.
KDFLOW_INLINE int warp_min(int value) { return __reduce_min_sync(~0U, value); }

KDFLOW_INLINE float from_bits(Bits value) { return __uint_as_float(value); }

// 2^x and log2(x): one instruction of the special-function unit each; see jit_math.py for what they are good to.
KDFLOW_INLINE float exp2(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
KDFLOW_INLINE float log2(float x) {
  float y;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// Two floats as bf16, to nearest even, the first in the lower half.
KDFLOW_INLINE Bits narrow(float lower, float upper) {
  Bits packed;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(upper), "f"(lower));
  return packed;
}
// The larger of each half, as bf16; of a number and NaN the number.
KDFLOW_INLINE Bits max_of_halves(Bits a, Bits b) {
  Bits larger;
  asm("max.bf16x2 %0, %1, %2;" : "=r"(larger) : "r"(a), "r"(b));
  return larger;
}

}  // namespace device
