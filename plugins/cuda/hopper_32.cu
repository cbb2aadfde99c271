#include "hopper.cuh"

namespace relay::cuda {

HopperKernel hopper_kernel_32(DataType dtype, int wide_keys) {
  return choose_hopper_kernel<32>(dtype, wide_keys);
}

}  // namespace relay::cuda
