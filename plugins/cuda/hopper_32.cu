#include "hopper.cuh"

namespace relay::cuda {

HopperKernel hopper_kernel_32(DataType dtype) {
  return dtype == DataType::kFloat16 ? hopper_kernel<Float16, 32> : hopper_kernel<BFloat16, 32>;
}

}  // namespace relay::cuda
