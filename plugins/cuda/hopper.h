// The Hopper kernels by head_dim: each has a translation unit of its own, compiled for sm_90a alone.
#pragma once

#include "plan.h"

#ifdef RELAY_CUDA_ON_HOST
#include "hopper_on_host.h"
#else
#include <cuda.h>
namespace relay::cuda {
using TensorMap = CUtensorMap;
}
#endif

namespace relay::cuda {

struct HopperArguments {
  KernelArguments base;
  // {elements of an atom's row, rows, atoms of a head, heads}: of a buffer, 64 rows of one head (hopper.cuh)
  TensorMap prefix_key;
  TensorMap prefix_value;
  TensorMap present_key;
  TensorMap present_value;
};

using HopperKernel = void (*)(HopperArguments);

HopperKernel hopper_kernel_32(DataType dtype, int wide_keys);
HopperKernel hopper_kernel_64(DataType dtype, int wide_keys);
HopperKernel hopper_kernel_96(DataType dtype, int wide_keys);
HopperKernel hopper_kernel_128(DataType dtype, int wide_keys);

// wide_keys: Plan's
inline HopperKernel find_hopper_kernel(const RelayParams& p, int wide_keys) {
  switch (p.head_dim) {
    case 32:
      return hopper_kernel_32(p.dtype, wide_keys);
    case 64:
      return hopper_kernel_64(p.dtype, wide_keys);
    case 96:
      return hopper_kernel_96(p.dtype, wide_keys);
    default:
      return hopper_kernel_128(p.dtype, wide_keys);  // plan_hopper admits no other
  }
}

// Elements in a row of an atom: the copy engine swizzles rows of 128 or 64 bytes.
constexpr int atom_elements(int head_dim) { return head_dim % 64 == 0 ? 64 : 32; }

}  // namespace relay::cuda
