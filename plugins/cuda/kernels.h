// The kernels by head_dim: each has a translation unit of its own, so that they compile side by side.
#pragma once

#include "plan.h"

namespace relay::cuda {

struct Kernels {
  void (*attention)(KernelArguments);
  void (*append)(RelayParams);
  void (*reference_attention)(RelayParams);
};

// Defined in kernels.cuh, instantiated in kernels_<head_dim>.cu. prefix_rows, context_rows: (16, 16), (64,
// 16), (64, 64), and up to kMaxWideHeadDim (128, 16), (128, 64).
template <int kHeadDim>
Kernels find_kernels(DataType dtype, int prefix_rows, int context_rows);

extern template Kernels find_kernels<32>(DataType, int, int);
extern template Kernels find_kernels<64>(DataType, int, int);
extern template Kernels find_kernels<96>(DataType, int, int);
extern template Kernels find_kernels<128>(DataType, int, int);
extern template Kernels find_kernels<192>(DataType, int, int);
extern template Kernels find_kernels<256>(DataType, int, int);

inline Kernels find_kernels(const RelayParams& p, const Plan& plan) {
  switch (p.head_dim) {
    case 32:
      return find_kernels<32>(p.dtype, plan.prefix_rows, plan.context_rows);
    case 64:
      return find_kernels<64>(p.dtype, plan.prefix_rows, plan.context_rows);
    case 96:
      return find_kernels<96>(p.dtype, plan.prefix_rows, plan.context_rows);
    case 128:
      return find_kernels<128>(p.dtype, plan.prefix_rows, plan.context_rows);
    case 192:
      return find_kernels<192>(p.dtype, plan.prefix_rows, plan.context_rows);
    default:
      return find_kernels<256>(p.dtype, plan.prefix_rows, plan.context_rows);  // check() admits no other
  }
}

}  // namespace relay::cuda
