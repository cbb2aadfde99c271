#include "plugins/tensorrt/layer.h"

#include "plugins/common/cuda_params.h"
#include "plugins/tensorrt/log.h"

namespace relay::tensorrt {
namespace {

using nvinfer1::DataType;
using nvinfer1::Dims;
using nvinfer1::DimsExprs;

constexpr size_t kMessageSize = 512;

// Sizes that inputs share, as plugins/common/op.h names them.
enum Symbol { kB, kS, kQueryWidth, kKeyWidth, kHkv, kC, kD, kP, kM, kHalfR, kSymbolCount };

struct InputRank {
  int rank;
  Symbol symbols[4];
};
constexpr InputRank kRanks[kInputCount] = {{3, {kB, kS, kQueryWidth}},
                                           {3, {kB, kS, kKeyWidth}},
                                           {3, {kB, kS, kKeyWidth}},
                                           {4, {kB, kHkv, kC, kD}},
                                           {4, {kB, kHkv, kC, kD}},
                                           {1, {kB}},
                                           {1, {kB}},
                                           {3, {kHkv, kP, kD}},
                                           {3, {kHkv, kP, kD}},
                                           {2, {kM, kHalfR}},
                                           {2, {kM, kHalfR}}};

bool IsKernelType(DataType type) {
#if NV_TENSORRT_MAJOR >= 10
  if (type == DataType::kBF16) return true;
#endif
  return type == DataType::kHALF;
}

cuda::DataType ToKernelType(DataType type) {
  return type == DataType::kHALF ? cuda::DataType::kFloat16 : cuda::DataType::kBFloat16;
}

bool IsLength(int32_t position) {
  return position == static_cast<int32_t>(kContextLens) || position == static_cast<int32_t>(kQueryLens);
}

std::string CheckKernels(const cuda::RelayParams& params) {
  char message[kMessageSize] = "the kernels refuse these shapes";
  return cuda::check(params, /*check_pointers=*/false, message, sizeof(message)) == cuda::Status::kOk
             ? ""
             : message;
}

}  // namespace

bool Layer::Supports(int32_t position, int32_t input_count, int32_t output_count, DataType position_type,
                     nvinfer1::TensorFormat format, DataType type) const {
  if (input_count != this->input_count() || output_count != kLayerOutputs) return false;
  if (position < 0 || position >= input_count + output_count) return false;
  if (format != nvinfer1::TensorFormat::kLINEAR) return false;
  if (IsLength(position)) return position_type == DataType::kINT32;
  return IsKernelType(position_type) && position_type == type;
}

bool Layer::OutputShapes(const DimsExprs* inputs, int32_t input_count, DimsExprs* outputs,
                         int32_t output_count) const {
  if (input_count != this->input_count() || output_count != kLayerOutputs) {
    LogError(config_.layer,
             "the node has " + std::to_string(input_count) + " inputs and " + std::to_string(output_count) +
                 " outputs, expected " + std::to_string(this->input_count()) + " (do_rotary = " +
                 std::to_string(config_.attributes.do_rotary) + ") and " + std::to_string(kLayerOutputs));
    return false;
  }
  // Sizes that are dynamic here are given small values that agree with each other and with what is constant,
  // so that the op's own check says whether the rest fits.
  int64_t sizes[kSymbolCount] = {1, 1, -1, -1, -1, 1, -1, 1, -1, -1};
  bool constant[kSymbolCount] = {};
  for (int32_t i = 0; i < input_count; ++i) {
    if (inputs[i].nbDims != kRanks[i].rank) {
      LogError(config_.layer, std::string(kInputNames[i]) + " has " + std::to_string(inputs[i].nbDims) +
                                  " dimensions, expected " + std::to_string(kRanks[i].rank));
      return false;
    }
    for (int32_t d = 0; d < inputs[i].nbDims; ++d) {
      const Symbol symbol = kRanks[i].symbols[d];
      if (constant[symbol] || !inputs[i].d[d]->isConstant()) continue;
      constant[symbol] = true;
      sizes[symbol] = inputs[i].d[d]->getConstantValue();
    }
  }
  if (sizes[kM] < 0) sizes[kM] = sizes[kP] + sizes[kC];
  std::vector<Shape> shapes(static_cast<size_t>(input_count));
  for (int32_t i = 0; i < input_count; ++i) {
    for (int32_t d = 0; d < inputs[i].nbDims; ++d) {
      const bool known = inputs[i].d[d]->isConstant();
      const int64_t size = known ? inputs[i].d[d]->getConstantValue() : sizes[kRanks[i].symbols[d]];
      if (size < 0) {
        LogError(config_.layer, std::string(kInputNames[i]) + " must have a constant size in dimension " +
                                    std::to_string(d));
        return false;
      }
      shapes[static_cast<size_t>(i)].push_back(size);
    }
  }
  Geometry geometry;
  std::string error = MakeGeometry(config_.attributes, shapes, &geometry);
  if (error.empty())
    error = CheckKernels(ToCudaParams(config_.attributes, geometry, cuda::DataType::kFloat16));
  if (!error.empty()) {
    LogError(config_.layer, error);
    return false;
  }
  outputs[kOutput] = inputs[kQuery];
  outputs[kPresentKey] = inputs[kPastKey];
  outputs[kPresentValue] = inputs[kPastValue];
  return true;
}

std::string Layer::MakeParams(const Dims* const* inputs, int32_t input_count, DataType type,
                              cuda::RelayParams* params) const {
  if (!IsKernelType(type)) return "the kernels take float16 (and from TensorRT 10 on bfloat16) only";
  std::vector<Shape> shapes(static_cast<size_t>(input_count));
  for (int32_t i = 0; i < input_count; ++i) {
    if (inputs[i]->nbDims < 0 || inputs[i]->nbDims > Dims::MAX_DIMS) return "an input has no dimensions";
    shapes[static_cast<size_t>(i)].assign(inputs[i]->d, inputs[i]->d + inputs[i]->nbDims);
  }
  Geometry geometry;
  if (std::string error = MakeGeometry(config_.attributes, shapes, &geometry); !error.empty()) return error;
  *params = ToCudaParams(config_.attributes, geometry, ToKernelType(type));
  return "";
}

bool Layer::Check(const Dims* const* inputs, int32_t input_count, DataType type) const {
  cuda::RelayParams params;
  std::string error = MakeParams(inputs, input_count, type, &params);
  if (error.empty()) error = CheckKernels(params);
  if (!error.empty()) LogError(config_.layer, error);
  return error.empty();
}

size_t Layer::WorkspaceBytes(const Dims* const* inputs, int32_t input_count, DataType type) const {
  cuda::RelayParams params;
  if (const std::string error = MakeParams(inputs, input_count, type, &params); !error.empty()) {
    LogError(config_.layer, error);
    return 0;
  }
  return cuda::workspace_bytes(params, SmCount());
}

int32_t Layer::Enqueue(const nvinfer1::PluginTensorDesc* descriptions, const void* const* inputs,
                       void* const* outputs, void* workspace, cudaStream_t stream) const {
  const Dims* shapes[kInputCount];
  for (int32_t i = 0; i < input_count(); ++i) shapes[i] = &descriptions[i].dims;
  cuda::RelayParams params;
  if (const std::string error = MakeParams(shapes, input_count(), descriptions[kQuery].type, &params);
      !error.empty()) {
    LogError(config_.layer, error);
    return -1;
  }
  params.query = inputs[kQuery];
  params.key = inputs[kKey];
  params.value = inputs[kValue];
  params.past_key = inputs[kPastKey];
  params.past_value = inputs[kPastValue];
  params.context_lens = static_cast<const int32_t*>(inputs[kContextLens]);
  params.query_lens = static_cast<const int32_t*>(inputs[kQueryLens]);
  params.prefix_key = inputs[kPrefixKey];
  params.prefix_value = inputs[kPrefixValue];
  if (config_.attributes.do_rotary) {
    params.cos_cache = inputs[kCosCache];
    params.sin_cache = inputs[kSinCache];
  }
  params.output = outputs[kOutput];
  params.present_key = outputs[kPresentKey];
  params.present_value = outputs[kPresentValue];

  // TensorRT does not say how much scratch it gave: at least what WorkspaceBytes asked for the largest
  // shapes, of which these need no more.
  const size_t workspace_size = cuda::workspace_bytes(params, SmCount());
  char message[kMessageSize] = "the kernels failed";
  const cuda::Status status =
      cuda::launch(params, cuda::RelayTuning{}, workspace, workspace_size,
                   barrier_ ? barrier_->data() : nullptr, stream, message, sizeof(message));
  if (status == cuda::Status::kOk) return 0;
  LogError(config_.layer, message);
  return -1;
}

void Layer::Attach() {
  SmCount();
  barrier_ = Barrier::Make();
}

int Layer::SmCount() const {
  if (sm_count_ == 0) sm_count_ = cuda::sm_count();
  return sm_count_;
}

}  // namespace relay::tensorrt
