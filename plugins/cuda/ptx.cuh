// Everything the kernels need that is not plain C++: the instructions of the chip, one function each. Nothing
// else in plugins/cuda may hold inline assembly, so that tests/cuda_emulation can compile the very same
// kernels with a host compiler: with RELAY_CUDA_ON_HOST set, its cuda_on_host.h defines every name of this
// file, fragment layouts included.
#pragma once

#ifdef RELAY_CUDA_ON_HOST
#include "cuda_on_host.h"
#else

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

namespace relay::cuda {

// ---- element types: two elements to a 32-bit register, the lower address in the lower half ----
struct Float16 {
  static __device__ __forceinline__ uint32_t pack(float low, float high) {
    const __half2 pair = __floats2half2_rn(low, high);
    return *reinterpret_cast<const uint32_t*>(&pair);
  }
  static __device__ __forceinline__ float2 unpack(uint32_t pair) {
    return __half22float2(*reinterpret_cast<const __half2*>(&pair));
  }
  // Quiet NaN in both halves.
  static constexpr uint32_t kNaN = 0x7e007e00u;
};

struct BFloat16 {
  static __device__ __forceinline__ uint32_t pack(float low, float high) {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
    return *reinterpret_cast<const uint32_t*>(&pair);
  }
  static __device__ __forceinline__ float2 unpack(uint32_t pair) {
    return make_float2(__uint_as_float(pair << 16), __uint_as_float(pair & 0xffff0000u));
  }
  static constexpr uint32_t kNaN = 0x7fc07fc0u;
};

// ---- shared memory: 32-bit addresses, so that tile arithmetic costs one register ----
using SharedAddress = uint32_t;

__device__ __forceinline__ char* dynamic_shared() {
  extern __shared__ uint4 relay_dynamic_shared[];
  return reinterpret_cast<char*>(relay_dynamic_shared);
}

__device__ __forceinline__ SharedAddress shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

__device__ __forceinline__ uint4 load_shared_16(SharedAddress address) {
  uint4 value;
  asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(value.x), "=r"(value.y), "=r"(value.z), "=r"(value.w)
               : "r"(address)
               : "memory");
  return value;
}

__device__ __forceinline__ void store_shared_16(SharedAddress address, const uint4& value) {
  asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(value.x), "r"(value.y),
               "r"(value.z), "r"(value.w)
               : "memory");
}

// Copies 16 bytes, or writes 16 zero bytes where !valid (source is not read then). Lands when the group it is
// committed to has been waited for.
__device__ __forceinline__ void copy_async_16(SharedAddress target, const void* source, bool valid) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(target), "l"(source), "r"(valid ? 16 : 0)
               : "memory");
}

__device__ __forceinline__ void copy_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Returns when all but the latest kPending committed groups of this thread have landed.
template <int kPending>
__device__ __forceinline__ void copy_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// Four 8x8 matrices of 16-bit elements; lanes 8i..8i+7 give the row addresses of matrix i. Lane 4r+c receives
// elements (r, 2c) and (r, 2c+1) of each; transposed: (2c, r) and (2c+1, r).
__device__ __forceinline__ void load_matrix_x4(uint32_t (&r)[4], SharedAddress row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(row)
               : "memory");
}

__device__ __forceinline__ void load_matrix_x4_transposed(uint32_t (&r)[4], SharedAddress row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(row)
               : "memory");
}

// c[16, 8] += a[16, 16] * b[16, 8]. With g = lane / 4 and t = lane % 4:
// a = {(g, 2t..), (g+8, 2t..), (g, 2t+8..), (g+8, 2t+8..)}, b = {(2t.., g), (2t+8.., g)}, c = {(g, 2t), (g,
// 2t+1), (g+8, 2t), (g+8, 2t+1)}.
template <class T>
__device__ __forceinline__ void multiply_accumulate(float (&c)[4], const uint32_t (&a)[4], uint32_t b0,
                                                    uint32_t b1);

template <>
__device__ __forceinline__ void multiply_accumulate<Float16>(float (&c)[4], const uint32_t (&a)[4],
                                                             uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

template <>
__device__ __forceinline__ void multiply_accumulate<BFloat16>(float (&c)[4], const uint32_t (&a)[4],
                                                              uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// ---- arithmetic ----
// 2^x, relative error about 2^-22; 2^-inf = 0.
__device__ __forceinline__ float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

__device__ __forceinline__ float log2_fast(float x) {
  float y;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// ---- between blocks ----
__device__ __forceinline__ uint32_t load_acquire(const uint32_t* word) {
  uint32_t value;
  asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(value) : "l"(word) : "memory");
  return value;
}

// Later reads need not wait for it.
__device__ __forceinline__ uint32_t load_relaxed(const uint32_t* word) {
  uint32_t value;
  asm volatile("ld.relaxed.gpu.global.u32 %0, [%1];" : "=r"(value) : "l"(word) : "memory");
  return value;
}

// Returns the word before.
__device__ __forceinline__ uint32_t add_release(uint32_t* word, uint32_t value) {
  uint32_t before;
  asm volatile("atom.add.release.gpu.global.u32 %0, [%1], %2;"
               : "=r"(before)
               : "l"(word), "r"(value)
               : "memory");
  return before;
}

// What another block wrote: read from L2, never from this multiprocessor's L1.
__device__ __forceinline__ float load_other_block(const float* word) { return __ldcg(word); }

#define RELAY_LOAD_IF(words, type, from_name, there_name, ...)                                         \
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" there_name ", 0;\n@p ld.global.cg." type " " words \
               ", [%" from_name "];\n}"                                                                \
               : __VA_ARGS__                                                                           \
               : "l"(from), "r"(static_cast<int>(there)))

// The same of 4, 2 or 1 words, where there are any; else x stays as it is. Loads behind a condition of C++'s
// would be moved when they arrive, and so wait for one another.
__device__ __forceinline__ void load_other_block_if(bool there, float (&x)[4], const float* from) {
  RELAY_LOAD_IF("{%0, %1, %2, %3}", "v4.f32", "4", "5", "+f"(x[0]), "+f"(x[1]), "+f"(x[2]), "+f"(x[3]));
}
__device__ __forceinline__ void load_other_block_if(bool there, float (&x)[2], const float* from) {
  RELAY_LOAD_IF("{%0, %1}", "v2.f32", "2", "3", "+f"(x[0]), "+f"(x[1]));
}
__device__ __forceinline__ void load_other_block_if(bool there, float (&x)[1], const float* from) {
  RELAY_LOAD_IF("%0", "f32", "1", "2", "+f"(x[0]));
}

#undef RELAY_LOAD_IF

__device__ __forceinline__ void prefetch_l2(const void* line) {
  asm volatile("prefetch.global.L2 [%0];" ::"l"(line));
}

}  // namespace relay::cuda
#endif
