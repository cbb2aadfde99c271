#include "hopper.cuh"

namespace relay::cuda {

HopperKernel hopper_kernel_64(DataType dtype, int wide_keys) {
  return choose_hopper_kernel<64>(dtype, wide_keys);
}

}  // namespace relay::cuda
