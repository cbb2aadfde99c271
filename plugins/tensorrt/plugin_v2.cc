// TensorRT 8: IPluginV2DynamicExt.
#include <NvInferRuntime.h>

#include <cstring>

#include "plugins/tensorrt/export.h"
#include "plugins/tensorrt/layer.h"
#include "plugins/tensorrt/log.h"

namespace relay::tensorrt {
namespace {

using nvinfer1::AsciiChar;
using nvinfer1::DataType;
using nvinfer1::Dims;
using nvinfer1::DimsExprs;
using nvinfer1::DynamicPluginTensorDesc;
using nvinfer1::PluginTensorDesc;

class RelayPlugin final : public nvinfer1::IPluginV2DynamicExt {
 public:
  explicit RelayPlugin(Config config) : layer_(std::move(config)) {}
  RelayPlugin(const RelayPlugin& other) : layer_(other.layer_), namespace_(other.namespace_) {}

  const AsciiChar* getPluginType() const noexcept override { return kOpName; }
  const AsciiChar* getPluginVersion() const noexcept override { return kPluginVersion; }
  int32_t getNbOutputs() const noexcept override { return kLayerOutputs; }
  int32_t initialize() noexcept override { return 0; }
  void terminate() noexcept override {}
  void destroy() noexcept override { delete this; }
  void setPluginNamespace(const AsciiChar* name) noexcept override { namespace_ = name ? name : ""; }
  const AsciiChar* getPluginNamespace() const noexcept override { return namespace_.c_str(); }
  IPluginV2DynamicExt* clone() const noexcept override { return new RelayPlugin(*this); }

  size_t getSerializationSize() const noexcept override { return Serialize(layer_.config()).size(); }
  void serialize(void* buffer) const noexcept override {
    const std::string bytes = Serialize(layer_.config());
    std::memcpy(buffer, bytes.data(), bytes.size());
  }

  DataType getOutputDataType(int32_t, const DataType* types, int32_t) const noexcept override {
    return types[kQuery];
  }
  DimsExprs getOutputDimensions(int32_t index, const DimsExprs* inputs, int32_t input_count,
                                nvinfer1::IExprBuilder&) noexcept override {
    DimsExprs outputs[kLayerOutputs];
    if (index < 0 || index >= kLayerOutputs ||
        !layer_.OutputShapes(inputs, input_count, outputs, kLayerOutputs)) {
      DimsExprs refused{};
      refused.nbDims = -1;
      return refused;
    }
    return outputs[index];
  }
  bool supportsFormatCombination(int32_t position, const PluginTensorDesc* tensors, int32_t input_count,
                                 int32_t output_count) noexcept override {
    return layer_.Supports(position, input_count, output_count, tensors[position].type,
                           tensors[position].format, tensors[kQuery].type);
  }
  void configurePlugin(const DynamicPluginTensorDesc*, int32_t, const DynamicPluginTensorDesc*,
                       int32_t) noexcept override {}
  size_t getWorkspaceSize(const PluginTensorDesc* inputs, int32_t input_count, const PluginTensorDesc*,
                          int32_t) const noexcept override {
    if (input_count != layer_.input_count()) return 0;
    const Dims* shapes[kInputCount];
    for (int32_t i = 0; i < input_count; ++i) shapes[i] = &inputs[i].dims;
    return layer_.WorkspaceBytes(shapes, input_count, inputs[kQuery].type);
  }
  int32_t enqueue(const PluginTensorDesc* input_descriptions, const PluginTensorDesc*,
                  const void* const* inputs, void* const* outputs, void* workspace,
                  cudaStream_t stream) noexcept override {
    return layer_.Enqueue(input_descriptions, inputs, outputs, workspace, stream);
  }

  void attachToContext(cudnnContext*, cublasContext*, nvinfer1::IGpuAllocator*) noexcept override {
    layer_.Attach();
  }
  void detachFromContext() noexcept override { layer_.Detach(); }

 private:
  Layer layer_;
  std::string namespace_ = kOpDomain;
};

class RelayCreator final : public nvinfer1::IPluginCreator {
 public:
  const AsciiChar* getPluginName() const noexcept override { return kOpName; }
  const AsciiChar* getPluginVersion() const noexcept override { return kPluginVersion; }
  const nvinfer1::PluginFieldCollection* getFieldNames() noexcept override { return &FieldNames(); }
  void setPluginNamespace(const AsciiChar* name) noexcept override { namespace_ = name ? name : ""; }
  const AsciiChar* getPluginNamespace() const noexcept override { return namespace_.c_str(); }

  nvinfer1::IPluginV2* createPlugin(const AsciiChar* name,
                                    const nvinfer1::PluginFieldCollection* fields) noexcept override {
    Config config;
    config.layer = name ? name : "";
    return Make(config, ParseFields(fields, &config));
  }
  nvinfer1::IPluginV2* deserializePlugin(const AsciiChar* name, const void* data,
                                         size_t size) noexcept override {
    Config config;
    const std::string error = Deserialize(data, size, &config);
    if (config.layer.empty() && name) config.layer = name;
    return Make(config, error);
  }

 private:
  nvinfer1::IPluginV2* Make(const Config& config, const std::string& error) {
    if (!error.empty()) {
      LogError(config.layer, error);
      return nullptr;
    }
    auto* plugin = new RelayPlugin(config);
    plugin->setPluginNamespace(namespace_.c_str());
    return plugin;
  }

  std::string namespace_ = kOpDomain;
};

}  // namespace
}  // namespace relay::tensorrt

// Called by IPluginRegistry::loadLibrary, and by nothing else: there is no static registration beside it.
RELAY_EXPORT nvinfer1::IPluginCreator* const* getPluginCreators(int32_t& count) {
  static relay::tensorrt::RelayCreator creator;
  static nvinfer1::IPluginCreator* const creators[] = {&creator};
  count = 1;
  return creators;
}

RELAY_EXPORT void setLoggerFinder(nvinfer1::ILoggerFinder* finder) {
  relay::tensorrt::SetLoggerFinder(finder);
}
