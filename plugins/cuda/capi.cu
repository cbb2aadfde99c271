// The launch interface for ctypes: librelay_attention_cuda.so, for tests and benchmarks without an engine.
// The structs are those of launch.h; tests/gpu/relay_cuda.py mirrors them. Every function returns a Status as
// an int.
#include <cuda_runtime.h>

#include <cstdio>
#include <cstring>

#include "kernels.h"
#include "launch.h"

namespace relay::cuda {

Status plan_for_device(const RelayParams&, const RelayTuning&, Plan*, char*, size_t);  // launch.cu

namespace {
__global__ void empty_kernel() {}
}  // namespace

}  // namespace relay::cuda

#define RELAY_API extern "C" __attribute__((visibility("default"))) int

using namespace relay::cuda;

RELAY_API relay_attention_check(const RelayParams* params, char* message, size_t message_size) {
  return static_cast<int>(check(*params, false, message, message_size));
}

RELAY_API relay_attention_workspace_bytes(const RelayParams* params, size_t* bytes) {
  *bytes = workspace_bytes(*params, sm_count());
  return 0;
}

RELAY_API relay_attention_launch(const RelayParams* params, const RelayTuning* tuning, void* workspace,
                                 size_t workspace_size, void* barrier, void* stream, char* message,
                                 size_t message_size) {
  return static_cast<int>(launch(*params, *tuning, workspace, workspace_size, barrier,
                                 static_cast<CUstream_st*>(stream), message, message_size));
}

// values: [prefix_rows, context_rows, depth, grid, launches, shared bytes]
RELAY_API relay_attention_plan(const RelayParams* params, const RelayTuning* tuning, int* values,
                               char* message, size_t message_size) {
  Plan plan{};
  const Status status = plan_for_device(*params, *tuning, &plan, message, message_size);
  const int found[] = {plan.prefix_rows, plan.context_rows, plan.depth,
                       plan.grid,        plan.launches,     static_cast<int>(plan.shared_bytes)};
  std::memcpy(values, found, sizeof(found));
  return static_cast<int>(status);
}

// A kernel that does nothing, launched as the real one would be: the cost that no version can go below.
RELAY_API relay_attention_empty_launch(const RelayParams* params, const RelayTuning* tuning, void* stream,
                                       char* message, size_t message_size) {
  Plan plan{};
  const Status status = plan_for_device(*params, *tuning, &plan, message, message_size);
  if (status != Status::kOk) return static_cast<int>(status);
  const int threads = plan.hopper ? kHopperThreads : kThreads;
  cudaError_t error = cudaFuncSetAttribute(empty_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                           static_cast<int>(plan.shared_bytes));
  if (error == cudaSuccess)
    error = cudaLaunchCooperativeKernel(reinterpret_cast<const void*>(empty_kernel), dim3(plan.grid),
                                        dim3(threads), nullptr, plan.shared_bytes,
                                        static_cast<cudaStream_t>(stream));
  if (error == cudaSuccess) return 0;
  cudaGetLastError();
  snprintf(message, message_size, "CUDA error while launching an empty kernel: %s",
           cudaGetErrorString(error));
  return static_cast<int>(Status::kCudaError);
}
