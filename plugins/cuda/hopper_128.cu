#include "hopper.cuh"

namespace relay::cuda {

HopperKernel hopper_kernel_128(DataType dtype) {
  return dtype == DataType::kFloat16 ? hopper_kernel<Float16, 128> : hopper_kernel<BFloat16, 128>;
}

}  // namespace relay::cuda
