#include <cuda_runtime_api.h>

#include <map>
#include <mutex>

#include "plugins/common/cuda_params.h"
#include "plugins/cuda/launch.h"
#include "plugins/onnxruntime/relay_op.h"

namespace relay::ort {
namespace {

// Memory of the session's device, from ONNX Runtime's arena.
class DeviceAllocator {
 public:
  explicit DeviceAllocator(const OrtKernelInfo* info) {
    Ort::ThrowOnError(Ort::GetApi().KernelInfoGetAllocator(info, OrtMemTypeDefault, &allocator_));
    Ort::ThrowOnError(Ort::GetApi().MemoryInfoGetId(allocator_->Info(allocator_), &device_));
  }
  DeviceAllocator(const DeviceAllocator&) = delete;
  DeviceAllocator& operator=(const DeviceAllocator&) = delete;
  ~DeviceAllocator() { Ort::GetApi().ReleaseAllocator(allocator_); }

  void* Allocate(size_t bytes) {
    void* memory = allocator_->Alloc(allocator_, bytes);
    if (memory == nullptr) throw std::bad_alloc();
    return memory;
  }
  void Free(void* memory) { allocator_->Free(allocator_, memory); }
  int device() const { return device_; }

 private:
  OrtAllocator* allocator_ = nullptr;
  int device_ = 0;
};

// Given back when the launch is enqueued: whoever gets it next enqueues behind it, on the same stream.
class Scratch {
 public:
  Scratch(DeviceAllocator& allocator, size_t bytes)
      : allocator_(allocator), data(allocator.Allocate(bytes)) {}
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  ~Scratch() { allocator_.Free(data); }

 private:
  DeviceAllocator& allocator_;

 public:
  void* const data;
};

void ThrowOnCudaError(cudaError_t error, const char* doing) {
  if (error == cudaSuccess) return;
  cudaGetLastError();
  throw std::runtime_error(std::string("CUDA error while ") + doing + ": " + cudaGetErrorString(error));
}

class CudaKernel : public RelayKernel {
 public:
  CudaKernel(const OrtKernelInfo* info, ONNXTensorElementDataType type)
      : RelayKernel(info), dtype_(ToDataType(type)), allocator_(info) {
    // What the shapes known by now already rule out is refused here, the rest by launch().
    Geometry geometry;
    geometry.batch = geometry.sequence = 1;
    geometry.num_heads = attributes().num_heads;
    geometry.kv_num_heads = attributes().kv_num_heads;
    const Ort::ConstKernelInfo kernel_info(info);
    const int64_t query = LastDimension(kernel_info, kQuery);
    geometry.head_dim = query > 0 ? query / geometry.num_heads : 64;
    if (attributes().do_rotary) {
      const int64_t half = LastDimension(kernel_info, kCosCache);
      geometry.rotary_dim = half > 0 ? 2 * half : 16;
      geometry.max_positions = 1;
    }
    char reason[512] = "";
    if (cuda::check(ToCudaParams(attributes(), geometry, dtype_), /*check_pointers=*/false, reason,
                    sizeof(reason)) != cuda::Status::kOk) {
      throw InvalidInput(reason);
    }
  }
  ~CudaKernel() override {
    for (const auto& [stream, words] : barriers_) allocator_.Free(words);
  }

 protected:
  void Compute(Ort::KernelContext& context) override {
    const Tensors tensors = BindTensors(context);
    cuda::RelayParams params = ToCudaParams(attributes(), tensors.geometry, dtype_);
    SetTensors(tensors, &params);

    ThrowOnCudaError(cudaSetDevice(allocator_.device()), "choosing the session's device");
    const auto stream = static_cast<cudaStream_t>(context.GetGPUComputeStream());
    const size_t bytes = cuda::workspace_bytes(params, cuda::sm_count());
    const Scratch workspace(allocator_, bytes);
    char reason[512] = "";
    switch (cuda::launch(params, cuda::RelayTuning{}, workspace.data, bytes, Barrier(stream), stream, reason,
                         sizeof(reason))) {
      case cuda::Status::kOk:
        return;
      case cuda::Status::kInvalidArgument:
      case cuda::Status::kUnsupported:
        throw InvalidInput(reason);
      default:
        throw std::runtime_error(reason);
    }
  }

 private:
  static cuda::DataType ToDataType(ONNXTensorElementDataType type) {
    if (type == ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16) return cuda::DataType::kFloat16;
    if (type == ONNX_TENSOR_ELEMENT_DATA_TYPE_BFLOAT16) return cuda::DataType::kBFloat16;
    throw InvalidInput(
        "the CUDA kernels take float16 and bfloat16, this node is float32; export the model with --precision "
        "fp16 or bf16, or make the session without the CUDA execution provider");
  }

  // -1 where the session does not know it.
  static int64_t LastDimension(const Ort::ConstKernelInfo& info, Input input) {
    const Ort::TypeInfo type = info.GetInputTypeInfo(input);
    if (type.GetONNXType() != ONNX_TYPE_TENSOR) return -1;
    const Shape shape = type.GetTensorTypeAndShapeInfo().GetShape();
    return shape.empty() ? -1 : shape.back();
  }

  // The words of the grid's barrier: one set a stream, since runs of one session may overlap on several.
  void* Barrier(cudaStream_t stream) {
    const std::lock_guard<std::mutex> lock(mutex_);
    const auto known = barriers_.find(stream);
    if (known != barriers_.end()) return known->second;
    void* words = allocator_.Allocate(cuda::kBarrierBytes);
    const cudaError_t error = cudaMemsetAsync(words, 0, cuda::kBarrierBytes, stream);
    if (error != cudaSuccess) allocator_.Free(words);
    ThrowOnCudaError(error, "clearing the barrier");
    barriers_.emplace(stream, words);
    return words;
  }

  const cuda::DataType dtype_;
  DeviceAllocator allocator_;
  std::mutex mutex_;
  std::map<cudaStream_t, void*> barriers_;
};

}  // namespace

void AddCudaOps(OrtCustomOpDomain* domain) {
  // float32 too, so that such a model is refused with a reason and not run on the CPU with a copy around
  // every node.
  static RelayOp<CudaKernel> float32("CUDAExecutionProvider", ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT);
  static RelayOp<CudaKernel> float16("CUDAExecutionProvider", ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16);
  static RelayOp<CudaKernel> bfloat16("CUDAExecutionProvider", ONNX_TENSOR_ELEMENT_DATA_TYPE_BFLOAT16);
  for (OrtCustomOp* op : {static_cast<OrtCustomOp*>(&float32), static_cast<OrtCustomOp*>(&float16),
                          static_cast<OrtCustomOp*>(&bfloat16)}) {
    Ort::ThrowOnError(Ort::GetApi().CustomOpDomain_Add(domain, op));
  }
}

}  // namespace relay::ort
