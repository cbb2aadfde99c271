#include "plugins/onnxruntime/relay_op.h"

#include <new>
#include <vector>

namespace relay::ort {

uint32_t api_version = 0;

namespace {

// Reads an attribute; leaves `value` as it is where the node has none.
template <typename T>
void ReadAttribute(const OrtKernelInfo* info, const char* name, T* value) {
  Ort::Status status(nullptr);
  if constexpr (std::is_same_v<T, float>) {
    status = Ort::Status(Ort::GetApi().KernelInfoGetAttribute_float(info, name, value));
  } else {
    status = Ort::Status(Ort::GetApi().KernelInfoGetAttribute_int64(info, name, value));
  }
  // ONNX Runtime has one status code for a missing attribute and for one of another type
  if (status.IsOK() || status.GetErrorMessage().find("No attribute with name") != std::string::npos) return;
  throw InvalidInput("attribute " + std::string(name) + " must be " +
                     (std::is_same_v<T, float> ? "a float" : "an integer") + ": " + status.GetErrorMessage());
}

// An input's shape as the session knows it: -1 for an unknown dim, empty where nothing is known.
Shape StaticShape(const Ort::ConstKernelInfo& info, Input input) {
  const Ort::TypeInfo type = info.GetInputTypeInfo(input);
  if (type.GetONNXType() != ONNX_TYPE_TENSOR) return {};
  const auto tensor = type.GetTensorTypeAndShapeInfo();
  return tensor.GetShape();
}

}  // namespace

std::string NodeName(const OrtKernelInfo* info) {
  try {
    return Ort::ConstKernelInfo(info).GetNodeName();
  } catch (...) {
    return "?";
  }
}

OrtStatusPtr StatusOfException(const std::string& node) noexcept {
  const auto status = [&node](OrtErrorCode code, const char* reason) {
    return Ort::GetApi().CreateStatus(code,
                                      (std::string(kOpName) + " node '" + node + "': " + reason).c_str());
  };
  try {
    throw;
  } catch (const InvalidInput& error) {
    return status(ORT_INVALID_ARGUMENT, error.what());
  } catch (const std::bad_alloc&) {
    return status(ORT_RUNTIME_EXCEPTION, "out of memory");
  } catch (const std::exception& error) {
    return status(ORT_RUNTIME_EXCEPTION, error.what());
  } catch (...) {
    return status(ORT_RUNTIME_EXCEPTION, "unknown error");
  }
}

RelayKernel::RelayKernel(const OrtKernelInfo* info) : node_name_(NodeName(info)) {
  ReadAttribute(info, "num_heads", &attributes_.num_heads);
  ReadAttribute(info, "kv_num_heads", &attributes_.kv_num_heads);
  ReadAttribute(info, "scale", &attributes_.scale);
  ReadAttribute(info, "softcap", &attributes_.softcap);
  ReadAttribute(info, "local_window_size", &attributes_.local_window_size);
  ReadAttribute(info, "do_rotary", &attributes_.do_rotary);
  ReadAttribute(info, "rotary_interleaved", &attributes_.rotary_interleaved);
  std::string problem = CheckAttributes(attributes_);
  if (!problem.empty()) throw InvalidInput(problem);

  const Ort::ConstKernelInfo kernel_info(info);
  problem = CheckInputCount(attributes_, kernel_info.GetInputCount());
  if (!problem.empty()) throw InvalidInput(problem);
  const Shape query = StaticShape(kernel_info, kQuery);
  if (query.size() == 3 && query[2] >= 0) {
    problem = CheckHeadDim(attributes_, query);
    if (!problem.empty()) throw InvalidInput(problem);
  }
}

OrtStatusPtr RelayKernel::ComputeV2(OrtKernelContext* context) noexcept {
  try {
    Ort::KernelContext kernel_context(context);
    Compute(kernel_context);
    return nullptr;
  } catch (...) {
    return StatusOfException(node_name_);
  }
}

Tensors RelayKernel::BindTensors(Ort::KernelContext& context) const {
  Tensors tensors;
  const size_t count = InputCount(attributes_.do_rotary != 0);
  std::vector<Shape> shapes(count);
  for (size_t i = 0; i < count; ++i) {
    const Ort::ConstValue value = context.GetInput(i);
    if (value == nullptr) throw InvalidInput(std::string(kInputNames[i]) + " is missing");
    shapes[i] = value.GetTensorTypeAndShapeInfo().GetShape();
    tensors.inputs[i] = value.GetTensorRawData();
  }
  const std::string problem = MakeGeometry(attributes_, shapes, &tensors.geometry);
  if (!problem.empty()) throw InvalidInput(problem);
  tensors.outputs[kOutput] = context.GetOutput(kOutput, shapes[kQuery]).GetTensorMutableRawData();
  tensors.outputs[kPresentKey] = context.GetOutput(kPresentKey, shapes[kPastKey]).GetTensorMutableRawData();
  tensors.outputs[kPresentValue] =
      context.GetOutput(kPresentValue, shapes[kPastValue]).GetTensorMutableRawData();
  return tensors;
}

OrtStatusPtr InferShapes(OrtShapeInferContext* context) noexcept {
  constexpr Input kSource[kOutputCount] = {kQuery, kPastKey, kPastValue};
  const OrtApi& api = Ort::GetApi();
  for (size_t output = 0; output < kOutputCount; ++output) {
    OrtTensorTypeAndShapeInfo* info = nullptr;  // owned by the context
    if (OrtStatusPtr status = api.ShapeInferContext_GetInputTypeShape(context, kSource[output], &info))
      return status;
    if (OrtStatusPtr status = api.ShapeInferContext_SetOutputTypeShape(context, output, info)) return status;
  }
  return nullptr;
}

size_t MayInplace(int** inputs, int** outputs) {
  *inputs = new int[2]{kPastKey, kPastValue};
  *outputs = new int[2]{kPresentKey, kPresentValue};
  return 2;
}

void ReleaseMayInplace(int* inputs, int* outputs) {
  delete[] inputs;
  delete[] outputs;
}

}  // namespace relay::ort
