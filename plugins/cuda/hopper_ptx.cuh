// What Hopper has beyond ptx.cuh: bulk tensor copies that report to barriers in shared memory, and matrix
// products of four warps that read shared memory themselves. One function each, as there.
#pragma once

#include "ptx.cuh"

#ifdef RELAY_CUDA_ON_HOST
#include "hopper_on_host.h"
#else

#include <cuda.h>

#include <type_traits>

namespace relay::cuda {

using TensorMap = CUtensorMap;

// ---- barriers in shared memory: 8 bytes each; a phase ends when all arrivals and all bytes are there ----
__device__ __forceinline__ void barrier_init(SharedAddress barrier, uint32_t arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}

// Makes the initialised barriers known to the copy engine; a barrier of the block follows.
__device__ __forceinline__ void barrier_init_fence() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

// One arrival, and so many bytes to wait for.
__device__ __forceinline__ void barrier_expect(SharedAddress barrier, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes)
               : "memory");
}

__device__ __forceinline__ void barrier_arrive(SharedAddress barrier, uint32_t arrivals) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}

// Waits until the phase of this parity has ended. A new barrier is in phase 0, and the one before has ended.
__device__ __forceinline__ void barrier_wait(SharedAddress barrier, uint32_t parity) {
  asm volatile(
      "{\n"
      ".reg .pred p;\n"
      "WAIT_%=:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 p, [%0], %1;\n"
      "@p bra DONE_%=;\n"
      "bra WAIT_%=;\n"
      "DONE_%=:\n"
      "}" ::"r"(barrier),
      "r"(parity)
      : "memory");
}

// ---- copies ----
// bytes: a multiple of 16
__device__ __forceinline__ void prefetch_l2_bulk(const void* address, uint32_t bytes) {
  asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(address), "r"(bytes) : "memory");
}

// Copies one box of a four-dimensional tensor to shared memory; elements outside the tensor become zero.
// once: nobody else reads it, so that it need not stay in L2.
__device__ __forceinline__ void tensor_copy(SharedAddress target, const TensorMap* map, int c0, int c1,
                                            int c2, int c3, SharedAddress barrier, bool once) {
  // Policies as createpolicy makes them: evict_first and evict_normal for all of the access.
  const uint64_t policy = once ? 0x12F0000000000000ull : 0x1000000000000000ull;
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1, "
      "{%2, "
      "%3, %4, %5}], [%6], %7;" ::"r"(target),
      "l"(map), "r"(c0), "r"(c1), "r"(c2), "r"(c3), "r"(barrier), "l"(policy)
      : "memory");
}

// Ordinary writes to shared memory before it are seen by products (and copies) that follow a barrier after
// it.
__device__ __forceinline__ void shared_write_fence() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

// Waits for the 128 threads of the warpgroup, 0 or 1.
__device__ __forceinline__ void warpgroup_barrier(int warpgroup) {
  if (warpgroup == 0)
    asm volatile("bar.sync 1, 128;" ::: "memory");
  else
    asm volatile("bar.sync 2, 128;" ::: "memory");
}
// Waits for warpgroups 0 and 1.
__device__ __forceinline__ void consumer_barrier() { asm volatile("bar.sync 3, 256;" ::: "memory"); }

// ---- registers: all warps of a warpgroup give up or take to have so many each ----
template <int kCount>
__device__ __forceinline__ void give_up_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kCount));
}
template <int kCount>
__device__ __forceinline__ void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kCount));
}

// ---- products ----
__device__ __forceinline__ void product_begin() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void product_commit() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}
template <int kPending>
__device__ __forceinline__ void product_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}
// Has the values change, to whatever.
template <int kCount>
__device__ __forceinline__ void product_undefined(float (&x)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) asm volatile("" : "=f"(x[i]));
}
template <int kRows, int kColumns>
__device__ __forceinline__ void product_undefined(uint32_t (&x)[kRows][kColumns]) {
#pragma unroll
  for (int i = 0; i < kRows; ++i)
#pragma unroll
    for (int j = 0; j < kColumns; ++j) asm volatile("" : "=r"(x[i][j]));
}
// Accumulators may not be moved across it.
template <int kCount>
__device__ __forceinline__ void product_pin(float (&x)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) asm volatile("" : "+f"(x[i])::"memory");
}

// Operands in shared memory are atoms of kRows rows of kRowBytes bytes (128 or 64), swizzled as the copies
// swizzle them: 16-byte chunk c of row r lies at c ^ (r % 8), or c ^ (r / 2 % 4) for 64 bytes.
// Sources: PTX ISA, "Matrix Descriptor Format" of wgmma.
template <int kRowBytes>
__device__ __forceinline__ uint64_t matrix_descriptor(SharedAddress address, uint32_t atom_bytes) {
  constexpr uint64_t kSwizzle = kRowBytes == 128 ? 1 : 2;
  constexpr uint64_t kEightRows = 8 * kRowBytes / 16;
  return kSwizzle << 62 | kEightRows << 32 | uint64_t{atom_bytes / 16} << 16 | (address & 0x3ffff) >> 4;
}

// The same matrix so many bytes further on (of the first 256 KB).
__device__ __forceinline__ uint64_t moved(uint64_t descriptor, uint32_t bytes) {
  return descriptor + bytes / 16;
}

#define RELAY_LIST_16(r) \
  r(0), r(1), r(2), r(3), r(4), r(5), r(6), r(7), r(8), r(9), r(10), r(11), r(12), r(13), r(14), r(15)
#define RELAY_LIST_32(r)                                                                                \
  RELAY_LIST_16(r), r(16), r(17), r(18), r(19), r(20), r(21), r(22), r(23), r(24), r(25), r(26), r(27), \
      r(28), r(29), r(30), r(31)
#define RELAY_LIST_48(r)                                                                                \
  RELAY_LIST_32(r), r(32), r(33), r(34), r(35), r(36), r(37), r(38), r(39), r(40), r(41), r(42), r(43), \
      r(44), r(45), r(46), r(47)
#define RELAY_LIST_64(r)                                                                                \
  RELAY_LIST_48(r), r(48), r(49), r(50), r(51), r(52), r(53), r(54), r(55), r(56), r(57), r(58), r(59), \
      r(60), r(61), r(62), r(63)
#define RELAY_NAMES_16 "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15"
#define RELAY_NAMES_32 \
  RELAY_NAMES_16 ", %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define RELAY_NAMES_48 \
  RELAY_NAMES_32 ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47"
#define RELAY_NAMES_64 \
  RELAY_NAMES_48 ", %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define RELAY_ACCUMULATOR(i) "+f"(c[i])
#define RELAY_RESULT(i) "=f"(c[i])

// names, list: of the accumulators; a0..a3, b, s: numbers of the other operands
#define RELAY_PRODUCT(columns, type, names, list, a0, a1, a2, a3, b, s)                             \
  asm volatile("{ .reg .pred accumulate; setp.ne.b32 accumulate, %" s                               \
               ", 0; wgmma.mma_async.sync.aligned.m64n" columns "k16.f32." type "." type " {" names \
               "}, {%" a0 ", %" a1 ", %" a2 ", %" a3 "}, %" b ", accumulate, 1, 1, 1; }"            \
               : list(RELAY_ACCUMULATOR)                                                            \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(descriptor), "r"(accumulate))
#define RELAY_PRODUCT_SHARED(columns, type, names, list, constraint, accumulate, a_name, b_name)             \
  asm volatile("wgmma.mma_async.sync.aligned.m64n" columns "k16.f32." type "." type " {" names "}, %" a_name \
               ", %" b_name ", " accumulate ", 1, 1, 0, 0;"                                                  \
               : list(constraint)                                                                            \
               : "l"(a), "l"(b))
#define RELAY_PRODUCT_KEYS(type, constraint, accumulate)                                                 \
  if constexpr (kCount == 32)                                                                            \
    RELAY_PRODUCT_SHARED("64", type, RELAY_NAMES_32, RELAY_LIST_32, constraint, accumulate, "32", "33"); \
  else                                                                                                   \
    RELAY_PRODUCT_SHARED("128", type, RELAY_NAMES_64, RELAY_LIST_64, constraint, accumulate, "64", "65")

// c[64, 2 * kCount] (+)= a[64, 16] * b[2 * kCount, 16]^T, rows of both in shared memory. Warp w of the four
// holds rows 16w..16w+15 of c, laid out as in multiply_accumulate.
template <class T, bool kAccumulate, int kCount>
__device__ __forceinline__ void multiply_keys(float (&c)[kCount], uint64_t a, uint64_t b) {
  static_assert(kCount == 32 || kCount == 64);
  if constexpr (std::is_same<T, Float16>::value && kAccumulate) {
    RELAY_PRODUCT_KEYS("f16", RELAY_ACCUMULATOR, "1");
  } else if constexpr (std::is_same<T, Float16>::value) {
    RELAY_PRODUCT_KEYS("f16", RELAY_RESULT, "0");
  } else if constexpr (kAccumulate) {
    RELAY_PRODUCT_KEYS("bf16", RELAY_ACCUMULATOR, "1");
  } else {
    RELAY_PRODUCT_KEYS("bf16", RELAY_RESULT, "0");
  }
}

// c[64, 2 * kCount] = (accumulate ? c : 0) + a[64, 16] * b[16, 2 * kCount], b's rows in shared memory.
template <class T>
__device__ __forceinline__ void multiply_values(float (&c)[16], const uint32_t (&a)[4], uint64_t descriptor,
                                                int accumulate) {
  if constexpr (std::is_same<T, Float16>::value)
    RELAY_PRODUCT("32", "f16", RELAY_NAMES_16, RELAY_LIST_16, "16", "17", "18", "19", "20", "21");
  else
    RELAY_PRODUCT("32", "bf16", RELAY_NAMES_16, RELAY_LIST_16, "16", "17", "18", "19", "20", "21");
}
template <class T>
__device__ __forceinline__ void multiply_values(float (&c)[32], const uint32_t (&a)[4], uint64_t descriptor,
                                                int accumulate) {
  if constexpr (std::is_same<T, Float16>::value)
    RELAY_PRODUCT("64", "f16", RELAY_NAMES_32, RELAY_LIST_32, "32", "33", "34", "35", "36", "37");
  else
    RELAY_PRODUCT("64", "bf16", RELAY_NAMES_32, RELAY_LIST_32, "32", "33", "34", "35", "36", "37");
}
template <class T>
__device__ __forceinline__ void multiply_values(float (&c)[48], const uint32_t (&a)[4], uint64_t descriptor,
                                                int accumulate) {
  if constexpr (std::is_same<T, Float16>::value)
    RELAY_PRODUCT("96", "f16", RELAY_NAMES_48, RELAY_LIST_48, "48", "49", "50", "51", "52", "53");
  else
    RELAY_PRODUCT("96", "bf16", RELAY_NAMES_48, RELAY_LIST_48, "48", "49", "50", "51", "52", "53");
}
template <class T>
__device__ __forceinline__ void multiply_values(float (&c)[64], const uint32_t (&a)[4], uint64_t descriptor,
                                                int accumulate) {
  if constexpr (std::is_same<T, Float16>::value)
    RELAY_PRODUCT("128", "f16", RELAY_NAMES_64, RELAY_LIST_64, "64", "65", "66", "67", "68", "69");
  else
    RELAY_PRODUCT("128", "bf16", RELAY_NAMES_64, RELAY_LIST_64, "64", "65", "66", "67", "68", "69");
}

#undef RELAY_PRODUCT
#undef RELAY_PRODUCT_KEYS
#undef RELAY_PRODUCT_SHARED
#undef RELAY_ACCUMULATOR
#undef RELAY_RESULT

}  // namespace relay::cuda
#endif
