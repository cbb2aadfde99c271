// What the ONNX Runtime kernels of relay::RelayAttention share, whatever device they run on: the op's
// description, attributes, checks, tensors. A backend derives from RelayKernel and registers a RelayOp of its
// kernel (cpu_op.cc).
#pragma once

#include <onnxruntime_cxx_api.h>

#include <stdexcept>
#include <string>

#include "plugins/common/op.h"

namespace relay::ort {

#if ORT_API_VERSION < 18
#error "the headers of ONNX Runtime 1.18 or later are needed; set ONNXRUNTIME_ROOT to them"
#endif

// The API version that ONNX Runtime and these headers both know; RegisterCustomOps sets it.
inline constexpr uint32_t kMinApiVersion = 18;
extern uint32_t api_version;

// An error that is the caller's: an attribute, a shape, a length.
struct InvalidInput : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// The tensors of one run; null for inputs that the node does not have.
struct Tensors {
  Geometry geometry;
  const void* inputs[kInputCount] = {};
  void* outputs[kOutputCount] = {};
};

// The tensors as a kernel's parameters: cpu::RelayParams or cuda::RelayParams, which name them alike.
template <typename Params>
void SetTensors(const Tensors& tensors, Params* params) {
  params->query = tensors.inputs[kQuery];
  params->key = tensors.inputs[kKey];
  params->value = tensors.inputs[kValue];
  params->past_key = tensors.inputs[kPastKey];
  params->past_value = tensors.inputs[kPastValue];
  params->context_lens = static_cast<const int32_t*>(tensors.inputs[kContextLens]);
  params->query_lens = static_cast<const int32_t*>(tensors.inputs[kQueryLens]);
  params->prefix_key = tensors.inputs[kPrefixKey];
  params->prefix_value = tensors.inputs[kPrefixValue];
  params->cos_cache = tensors.inputs[kCosCache];
  params->sin_cache = tensors.inputs[kSinCache];
  params->output = tensors.outputs[kOutput];
  params->present_key = tensors.outputs[kPresentKey];
  params->present_value = tensors.outputs[kPresentValue];
}

class RelayKernel {
 public:
  // Reads and checks what is known when the session is made. Throws InvalidInput.
  explicit RelayKernel(const OrtKernelInfo* info);
  virtual ~RelayKernel() = default;

  // Called by ONNX Runtime for each run: Compute, with every exception made an error that names the node.
  OrtStatusPtr ComputeV2(OrtKernelContext* context) noexcept;

 protected:
  virtual void Compute(Ort::KernelContext& context) = 0;

  // Checks the shapes, allocates the outputs, collects the pointers. Throws InvalidInput.
  Tensors BindTensors(Ort::KernelContext& context) const;

  const Attributes& attributes() const { return attributes_; }

 private:
  std::string node_name_;
  Attributes attributes_;
};

// The status of the exception in flight; call it in a catch block. `node` is the node's name.
OrtStatusPtr StatusOfException(const std::string& node) noexcept;
std::string NodeName(const OrtKernelInfo* info);

OrtStatusPtr InferShapes(OrtShapeInferContext* context) noexcept;
size_t MayInplace(int** inputs, int** outputs);
void ReleaseMayInplace(int* inputs, int* outputs);

// The op's description for one kernel class, execution provider and tensor type. ONNX Runtime takes several
// ops of one name as overloads by type.
template <typename TKernel>
struct RelayOp : Ort::CustomOpBase<RelayOp<TKernel>, TKernel, true> {
  RelayOp(const char* execution_provider, ONNXTensorElementDataType type)
      : execution_provider_(execution_provider), type_(type) {
    this->version = api_version;
    this->start_ver_ = kOpSinceVersion;
    OrtCustomOp::InferOutputShapeFn = [](const OrtCustomOp*, OrtShapeInferContext* context) {
      return InferShapes(context);
    };
    OrtCustomOp::GetMayInplace = MayInplace;
    OrtCustomOp::ReleaseMayInplace = ReleaseMayInplace;
  }

  const char* GetName() const { return kOpName; }
  const char* GetExecutionProviderType() const { return execution_provider_; }

  size_t GetInputTypeCount() const { return kInputCount; }
  ONNXTensorElementDataType GetInputType(size_t index) const {
    return index == kContextLens || index == kQueryLens ? ONNX_TENSOR_ELEMENT_DATA_TYPE_INT32 : type_;
  }
  OrtCustomOpInputOutputCharacteristic GetInputCharacteristic(size_t index) const {
    return index == kCosCache || index == kSinCache ? INPUT_OUTPUT_OPTIONAL : INPUT_OUTPUT_REQUIRED;
  }
  size_t GetOutputTypeCount() const { return kOutputCount; }
  ONNXTensorElementDataType GetOutputType(size_t) const { return type_; }

  OrtStatusPtr CreateKernelV2(const OrtApi&, const OrtKernelInfo* info, void** kernel) const noexcept {
    *kernel = nullptr;
    try {
      *kernel = new TKernel(info, type_);
      return nullptr;
    } catch (...) {
      return StatusOfException(NodeName(info));
    }
  }

 private:
  const char* execution_provider_;
  ONNXTensorElementDataType type_;
};

// One function a backend; each adds its ops to the domain and keeps them alive for the life of the process.
void AddCpuOps(OrtCustomOpDomain* domain);
#ifdef RELAY_CUDA
void AddCudaOps(OrtCustomOpDomain* domain);
#endif

}  // namespace relay::ort
