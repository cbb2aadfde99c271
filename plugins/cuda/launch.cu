#include <cuda.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <map>
#include <mutex>
#include <tuple>

#include "hopper.h"
#include "kernels.h"
#include "launch.h"
#include "plan.h"

namespace relay::cuda {
namespace {

Status cuda_failed(cudaError_t error, const char* doing, char* message, size_t size) {
  cudaGetLastError();  // not to be found by the next caller
  if (message != nullptr && size > 0)
    snprintf(message, size, "CUDA error while %s: %s", doing, cudaGetErrorString(error));
  return Status::kCudaError;
}

#define RELAY_CUDA_TRY(call, doing)                                                    \
  do {                                                                                 \
    const cudaError_t error = (call);                                                  \
    if (error != cudaSuccess) return cuda_failed(error, doing, message, message_size); \
  } while (false)

// Attributes of the devices and of the kernels on them never change: asked once.
struct Cache {
  std::mutex mutex;
  std::map<int, DeviceLimits> limits;
  std::map<std::tuple<int, const void*, size_t>, int> blocks_per_sm;
};

Cache& cache() {
  static Cache instance;
  return instance;
}

Status device_limits(int device, DeviceLimits* limits, char* message, size_t message_size) {
  std::lock_guard<std::mutex> lock(cache().mutex);
  const auto known = cache().limits.find(device);
  if (known != cache().limits.end()) {
    *limits = known->second;
    return Status::kOk;
  }
  int major = 0, cooperative = 0, sm = 0, per_block = 0, per_sm = 0;
  const std::pair<int*, cudaDeviceAttr> attributes[] = {
      {&major, cudaDevAttrComputeCapabilityMajor},
      {&cooperative, cudaDevAttrCooperativeLaunch},
      {&sm, cudaDevAttrMultiProcessorCount},
      {&per_block, cudaDevAttrMaxSharedMemoryPerBlockOptin},
      {&per_sm, cudaDevAttrMaxSharedMemoryPerMultiprocessor},
  };
  for (const auto& [value, attribute] : attributes)
    RELAY_CUDA_TRY(cudaDeviceGetAttribute(value, attribute, device), "asking for the device's attributes");
  if (major < 8 || cooperative == 0) {
    if (message != nullptr && message_size > 0)
      snprintf(message, message_size,
               "RelayAttention needs a GPU of compute capability 8.0 or later with cooperative launches; "
               "device %d has "
               "%d.x",
               device, major);
    return Status::kUnsupported;
  }
  *limits = {major, sm, static_cast<size_t>(per_block), static_cast<size_t>(per_sm)};
  cache().limits[device] = *limits;
  return Status::kOk;
}

// Blocks of `kernel` that one multiprocessor holds; also lets the kernel have so much shared memory.
Status blocks_per_sm(int device, const void* kernel, const DeviceLimits& limits, int threads,
                     size_t shared_bytes, int* blocks, char* message, size_t message_size) {
  std::lock_guard<std::mutex> lock(cache().mutex);
  const auto key = std::make_tuple(device, kernel, shared_bytes);
  const auto known = cache().blocks_per_sm.find(key);
  if (known != cache().blocks_per_sm.end()) {
    *blocks = known->second;
    return Status::kOk;
  }
  RELAY_CUDA_TRY(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                      static_cast<int>(limits.shared_bytes_per_block)),
                 "raising the shared memory limit");
  // All blocks of a cooperative launch must fit at once, so the split between L1 and shared memory is not
  // left to chance.
  RELAY_CUDA_TRY(cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout,
                                      cudaSharedmemCarveoutMaxShared),
                 "choosing the shared memory carveout");
  RELAY_CUDA_TRY(cudaOccupancyMaxActiveBlocksPerMultiprocessor(blocks, kernel, threads, shared_bytes),
                 "asking for the occupancy");
  cache().blocks_per_sm[key] = *blocks;
  return Status::kOk;
}

Status launch_reference(const RelayParams& params, const Kernels& kernels, cudaStream_t stream, char* message,
                        size_t message_size) {
  RelayParams p = params;
  if (p.scale == 0) p.scale = 1.0f / std::sqrt(static_cast<float>(p.head_dim));
  kernels.append<<<256, kThreads, 0, stream>>>(p);
  kernels.reference_attention<<<p.batch * p.sequence * p.num_heads, 32, 0, stream>>>(p);
  RELAY_CUDA_TRY(cudaGetLastError(), "launching the reference kernels");
  return Status::kOk;
}

// The driver's encoder of tensor maps, found at run time: nothing here links the driver's library.
using EncodeTensorMap = decltype(&cuTensorMapEncodeTiled);

Status find_encoder(EncodeTensorMap* encode, char* message, size_t message_size) {
  static const EncodeTensorMap found = [] {
    void* function = nullptr;
    cudaDriverEntryPointQueryResult result{};
    const cudaError_t error = cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000,
                                                               cudaEnableDefault, &result);
    if (error != cudaSuccess || result != cudaDriverEntryPointSuccess) {
      cudaGetLastError();
      function = nullptr;
    }
    return reinterpret_cast<EncodeTensorMap>(function);
  }();
  *encode = found;
  if (found != nullptr) return Status::kOk;
  if (message != nullptr && message_size > 0)
    snprintf(message, message_size,
             "the NVIDIA driver has no cuTensorMapEncodeTiled: RelayAttention on Hopper needs a driver for "
             "CUDA 12 or "
             "later");
  return Status::kUnsupported;
}

// [heads, rows, head_dim] as the copy engine sees it. An empty tensor keeps an empty map, which no work
// refers to.
Status encode_tensor_map(EncodeTensorMap encode, TensorMap* map, const void* tensor, const RelayParams& p,
                         int64_t heads, int64_t rows, uint32_t block_keys, char* message,
                         size_t message_size) {
  *map = TensorMap{};
  if (heads == 0 || rows == 0) return Status::kOk;
  const cuuint64_t atom = atom_elements(p.head_dim), row_bytes = cuuint64_t{2} * p.head_dim;
  const cuuint64_t sizes[] = {atom, static_cast<cuuint64_t>(rows), p.head_dim / atom,
                              static_cast<cuuint64_t>(heads)};
  const cuuint64_t strides[] = {row_bytes, 2 * atom, row_bytes * rows};
  const cuuint32_t box[] = {static_cast<cuuint32_t>(atom), block_keys,
                            static_cast<cuuint32_t>(p.head_dim / atom), 1};
  const cuuint32_t steps[] = {1, 1, 1, 1};
  const CUresult result = encode(
      map, p.dtype == DataType::kFloat16 ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
      4, const_cast<void*>(tensor), sizes, strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
      atom == 64 ? CU_TENSOR_MAP_SWIZZLE_128B : CU_TENSOR_MAP_SWIZZLE_64B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
      CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (result == CUDA_SUCCESS) return Status::kOk;
  if (message != nullptr && message_size > 0)
    snprintf(
        message, message_size, "CUDA error %d while describing a tensor of %lld heads of %lld rows of %d",
        static_cast<int>(result), static_cast<long long>(heads), static_cast<long long>(rows), p.head_dim);
  return Status::kCudaError;
}

Status encode_tensor_maps(const RelayParams& p, HopperArguments* arguments, char* message,
                          size_t message_size) {
  EncodeTensorMap encode = nullptr;
  Status status = find_encoder(&encode, message, message_size);
  const int64_t caches = int64_t{p.batch} * p.kv_num_heads;
  const int prefix_log2 = arguments->base.prefix_keys_log2, context_log2 = arguments->base.context_keys_log2;
  const struct {
    TensorMap* map;
    const void* tensor;
    int64_t heads, rows;
    int keys_log2;
  } maps[] = {{&arguments->prefix_key, p.prefix_key, p.kv_num_heads, p.prefix_length, prefix_log2},
              {&arguments->prefix_value, p.prefix_value, p.kv_num_heads, p.prefix_length, prefix_log2},
              {&arguments->present_key, p.present_key, caches, p.max_context, context_log2},
              {&arguments->present_value, p.present_value, caches, p.max_context, context_log2}};
  for (const auto& m : maps)
    if (status == Status::kOk)
      status = encode_tensor_map(encode, m.map, m.tensor, p, m.heads, m.rows, 1u << m.keys_log2, message,
                                 message_size);
  return status;
}

}  // namespace

int sm_count() {
  int device = 0, count = 0;
  if (cudaGetDevice(&device) != cudaSuccess ||
      cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device) != cudaSuccess) {
    cudaGetLastError();
    return 0;
  }
  return count;
}

Status plan_for_device(const RelayParams& params, const RelayTuning& tuning, Plan* plan, char* message,
                       size_t message_size) {
  int device = 0;
  RELAY_CUDA_TRY(cudaGetDevice(&device), "asking for the current device");
  DeviceLimits limits{};
  Status status = device_limits(device, &limits, message, message_size);
  if (status != Status::kOk) return status;
  status = make_plan(params, tuning, limits, plan, message, message_size);
  if (status != Status::kOk) return status;
  const void* kernel = plan->hopper
                           ? reinterpret_cast<const void*>(find_hopper_kernel(params, plan->wide_keys))
                           : reinterpret_cast<const void*>(find_kernels(params, *plan).attention);
  int blocks = 0;
  status = blocks_per_sm(device, kernel, limits, plan->hopper ? kHopperThreads : kThreads, plan->shared_bytes,
                         &blocks, message, message_size);
  if (status != Status::kOk) return status;
  if (blocks < 1) {
    if (message != nullptr && message_size > 0)
      snprintf(message, message_size, "no block with %zu bytes of shared memory fits on device %d",
               plan->shared_bytes, device);
    return Status::kUnsupported;
  }
  // Registers may allow fewer resident blocks than shared memory does; the grid must fit at once.
  plan->grid = std::min(plan->grid, blocks * limits.sm_count);
  return Status::kOk;
}

Status launch(const RelayParams& params, const RelayTuning& tuning, void* workspace, size_t workspace_size,
              void* barrier, CUstream_st* stream, char* message, size_t message_size) {
  Status status = check(params, true, message, message_size);
  if (status != Status::kOk) return status;
  const size_t cache_bytes =
      size_t{2} * params.batch * params.kv_num_heads * params.max_context * params.head_dim;
  if (cache_bytes > 0) {
    if (params.present_key != params.past_key)
      RELAY_CUDA_TRY(
          cudaMemcpyAsync(params.present_key, params.past_key, cache_bytes, cudaMemcpyDeviceToDevice, stream),
          "copying past_key to present_key");
    if (params.present_value != params.past_value)
      RELAY_CUDA_TRY(cudaMemcpyAsync(params.present_value, params.past_value, cache_bytes,
                                     cudaMemcpyDeviceToDevice, stream),
                     "copying past_value to present_value");
  }
  if (params.batch == 0 || params.sequence == 0) return Status::kOk;

  Plan plan{};
  status = plan_for_device(params, tuning, &plan, message, message_size);
  if (status != Status::kOk) return status;
  const Kernels kernels = find_kernels(params, plan);
  if (tuning.algorithm == 1) return launch_reference(params, kernels, stream, message, message_size);

  const size_t needed = plan_workspace(params, plan).total;
  if (workspace == nullptr || workspace_size < needed) {
    if (message != nullptr && message_size > 0)
      snprintf(message, message_size, "the workspace has %zu bytes, %zu are needed", workspace_size, needed);
    return Status::kWorkspaceTooSmall;
  }
  if (reinterpret_cast<uintptr_t>(workspace) % 16 != 0 || reinterpret_cast<uintptr_t>(barrier) % 128 != 0) {
    if (message != nullptr && message_size > 0)
      snprintf(message, message_size, "the workspace must be aligned to 16 bytes and the barrier to 128");
    return Status::kInvalidArgument;
  }

  if (plan.append_before) {
    kernels.append<<<4 * plan.grid, kThreads, 0, stream>>>(params);
    RELAY_CUDA_TRY(cudaGetLastError(), "launching the append of a prompt's keys");
  }
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeCooperative;
  attribute.val.cooperative = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(plan.grid);
  config.blockDim = dim3(plan.hopper ? kHopperThreads : kThreads);
  config.dynamicSmemBytes = plan.shared_bytes;
  config.stream = stream;
  config.attrs = &attribute;
  config.numAttrs = 1;
  HopperArguments hopper{};
  if (plan.hopper) {
    hopper.base = kernel_arguments(params, plan, 0, workspace, barrier);
    status = encode_tensor_maps(params, &hopper, message, message_size);
    if (status != Status::kOk) return status;
  }
  for (int i = 0; i < plan.launches; ++i) {
    const KernelArguments arguments = kernel_arguments(params, plan, i, workspace, barrier);
    if (barrier == nullptr && i == 0)
      RELAY_CUDA_TRY(cudaMemsetAsync(arguments.barrier, 0, kBarrierBytes, stream), "clearing the barrier");
    if (plan.hopper) {
      hopper.base = arguments;
      RELAY_CUDA_TRY(cudaLaunchKernelEx(&config, find_hopper_kernel(params, plan.wide_keys), hopper),
                     "launching RelayAttention for Hopper");
    } else {
      RELAY_CUDA_TRY(cudaLaunchKernelEx(&config, kernels.attention, arguments), "launching RelayAttention");
    }
  }
  return Status::kOk;
}

}  // namespace relay::cuda
