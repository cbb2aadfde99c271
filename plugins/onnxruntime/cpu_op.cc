#include <vector>

#include "plugins/cpu/launch.h"
#include "plugins/onnxruntime/relay_op.h"

namespace relay::ort {
namespace {

// ONNX Runtime's own threads and arena, for the length of one run.
class OrtHost : public cpu::Host {
 public:
  explicit OrtHost(const Ort::KernelContext& context) : context_(context) {}
  OrtHost(const OrtHost&) = delete;
  OrtHost& operator=(const OrtHost&) = delete;
  ~OrtHost() override {
    for (void* memory : taken_) allocator_->Free(allocator_, memory);
    if (allocator_ != nullptr) Ort::GetApi().ReleaseAllocator(allocator_);
  }

  void ParallelFor(size_t count, void (*body)(void*, size_t), void* argument) override {
    context_.ParallelFor(body, count, /*num_batch=*/0, argument);
  }

  void* Allocate(size_t bytes) override {
    if (allocator_ == nullptr) {
      const auto memory = Ort::MemoryInfo::CreateCpu(OrtArenaAllocator, OrtMemTypeDefault);
      Ort::ThrowOnError(
          Ort::GetApi().KernelContext_GetAllocator(context_.GetOrtKernelContext(), memory, &allocator_));
    }
    taken_.reserve(taken_.size() + 1);
    void* memory = allocator_->Alloc(allocator_, bytes);
    if (memory == nullptr) throw std::bad_alloc();
    taken_.push_back(memory);
    return memory;
  }

 private:
  const Ort::KernelContext& context_;
  OrtAllocator* allocator_ = nullptr;
  std::vector<void*> taken_;
};

class CpuKernel : public RelayKernel {
 public:
  CpuKernel(const OrtKernelInfo* info, ONNXTensorElementDataType type)
      : RelayKernel(info),
        kernels_(cpu::ChooseKernels(type == ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT ? cpu::DataType::kFloat32
                                                                                : cpu::DataType::kFloat16)) {}

 protected:
  void Compute(Ort::KernelContext& context) override {
    const Tensors tensors = BindTensors(context);
    cpu::RelayParams params;
    params.attributes = attributes();
    params.geometry = tensors.geometry;
    SetTensors(tensors, &params);

    const std::string problem = CheckLengths(params.geometry, params.context_lens, params.query_lens);
    if (!problem.empty()) throw InvalidInput(problem);
    OrtHost host(context);
    cpu::RelayAttention(kernels_, params, host);
  }

 private:
  const cpu::Kernels& kernels_;
};

}  // namespace

void AddCpuOps(OrtCustomOpDomain* domain) {
  static RelayOp<CpuKernel> float32(nullptr, ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT);
  static RelayOp<CpuKernel> float16(nullptr, ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16);
  for (OrtCustomOp* op : {static_cast<OrtCustomOp*>(&float32), static_cast<OrtCustomOp*>(&float16)}) {
    Ort::ThrowOnError(Ort::GetApi().CustomOpDomain_Add(domain, op));
  }
}

}  // namespace relay::ort
