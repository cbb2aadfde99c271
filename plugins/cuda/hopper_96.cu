#include "hopper.cuh"

namespace relay::cuda {

HopperKernel hopper_kernel_96(DataType dtype) {
  return dtype == DataType::kFloat16 ? hopper_kernel<Float16, 96> : hopper_kernel<BFloat16, 96>;
}

}  // namespace relay::cuda
