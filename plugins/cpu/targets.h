// The instruction sets that kernels.cc is compiled for, and whether this CPU runs them. To be included before
// any header of Highway.
#pragma once

#if defined(__x86_64__)

#include <cpuid.h>

// AVX-512 (F, CD, VL, DQ, BW), AVX2 and SSE4. Not the later AVX-512 sets (bits 0 to 7) and SSSE3 (bit 12):
// they would add nothing here. By number, as older Highway lacks some of the names. Highway insists on
// compiling its baseline target too (scalar code in release 1.0.3); that one stays empty.
#define HWY_DISABLED_TARGETS (0xFFLL | (1LL << 12))
#define RELAY_CPU_HAS_KERNELS(target) ((target) & (HWY_AVX3 | HWY_AVX2 | HWY_SSE4))

namespace relay::cpu {

// Each asks for all that Highway lets the compiler use for that target.
inline bool HasSse4() {
  return __builtin_cpu_supports("ssse3") && __builtin_cpu_supports("sse4.1") &&
         __builtin_cpu_supports("sse4.2") && __builtin_cpu_supports("aes") &&
         __builtin_cpu_supports("pclmul");
}

inline bool HasAvx2() {
  unsigned int eax, ebx, ecx = 0, edx;
  const bool f16c = __get_cpuid(1, &eax, &ebx, &ecx, &edx) && (ecx & bit_F16C);
  return f16c && HasSse4() && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
         __builtin_cpu_supports("bmi") && __builtin_cpu_supports("bmi2");
}

inline bool HasAvx512() {
  return HasAvx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512cd") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
         __builtin_cpu_supports("avx512bw");
}

}  // namespace relay::cpu

#else
#define HWY_COMPILE_ONLY_STATIC 1  // NEON is the baseline of 64-bit Arm
#define RELAY_CPU_HAS_KERNELS(target) 1
#endif
