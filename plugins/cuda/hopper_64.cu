#include "hopper.cuh"

namespace relay::cuda {

HopperKernel hopper_kernel_64(DataType dtype) {
  return dtype == DataType::kFloat16 ? hopper_kernel<Float16, 64> : hopper_kernel<BFloat16, 64>;
}

}  // namespace relay::cuda
