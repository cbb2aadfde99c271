#include "hopper.cuh"

namespace relay::cuda {

HopperKernel hopper_kernel_128(DataType dtype, int wide_keys) {
  return choose_hopper_kernel<128>(dtype, wide_keys);
}

}  // namespace relay::cuda
