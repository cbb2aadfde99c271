// TensorRT 10 and later: IPluginV3 with its Core, Build and Runtime capabilities.
#include <NvInferRuntime.h>

#include <cstdlib>
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

// Tells TensorRT that present_* is past_* (from 10.3 on, with PreviewFeature::kALIASED_PLUGIN_IO_10_03 in the
// builder's configuration). Off unless this environment variable is 1 while the engine is built; the plan
// remembers it.
constexpr char kAliasVariable[] = "RELAY_TENSORRT_ALIAS_CACHE";
#define RELAY_HAS_ALIAS (NV_TENSORRT_MAJOR > 10 || NV_TENSORRT_MINOR >= 3)

// Build is the interface's first version where the cache is not aliased: it asks nothing that 10.0 does not
// have.
template <class Build>
class RelayPlugin final : public nvinfer1::IPluginV3,
                          public nvinfer1::IPluginV3OneCore,
                          public Build,
                          public nvinfer1::IPluginV3OneRuntime {
 public:
  explicit RelayPlugin(Config config) : layer_(std::move(config)) {}

  nvinfer1::IPluginCapability* getCapabilityInterface(nvinfer1::PluginCapabilityType type) noexcept override {
    switch (type) {
      case nvinfer1::PluginCapabilityType::kCORE:
        return static_cast<nvinfer1::IPluginV3OneCore*>(this);
      case nvinfer1::PluginCapabilityType::kBUILD:
        return static_cast<Build*>(this);
      case nvinfer1::PluginCapabilityType::kRUNTIME:
        return static_cast<nvinfer1::IPluginV3OneRuntime*>(this);
    }
    return nullptr;
  }
  nvinfer1::IPluginV3* clone() noexcept override { return new RelayPlugin(layer_.config()); }

  const AsciiChar* getPluginName() const noexcept override { return kOpName; }
  const AsciiChar* getPluginVersion() const noexcept override { return kPluginVersion; }
  const AsciiChar* getPluginNamespace() const noexcept override { return kOpDomain; }

  // Build
  int32_t getNbOutputs() const noexcept override { return kLayerOutputs; }
  int32_t getOutputDataTypes(DataType* outputs, int32_t output_count, const DataType* inputs,
                             int32_t input_count) const noexcept override {
    if (input_count != layer_.input_count() || output_count != kLayerOutputs) return -1;
    for (int32_t i = 0; i < output_count; ++i) outputs[i] = inputs[kQuery];
    return 0;
  }
  int32_t getOutputShapes(const DimsExprs* inputs, int32_t input_count, const DimsExprs*, int32_t,
                          DimsExprs* outputs, int32_t output_count,
                          nvinfer1::IExprBuilder&) noexcept override {
    return layer_.OutputShapes(inputs, input_count, outputs, output_count) ? 0 : -1;
  }
  bool supportsFormatCombination(int32_t position, const DynamicPluginTensorDesc* tensors,
                                 int32_t input_count, int32_t output_count) noexcept override {
    return layer_.Supports(position, input_count, output_count, tensors[position].desc.type,
                           tensors[position].desc.format, tensors[kQuery].desc.type);
  }
  int32_t configurePlugin(const DynamicPluginTensorDesc* inputs, int32_t input_count,
                          const DynamicPluginTensorDesc*, int32_t output_count) noexcept override {
    if (input_count != layer_.input_count() || output_count != kLayerOutputs) return -1;
    const Dims* largest[kInputCount];
    for (int32_t i = 0; i < input_count; ++i) largest[i] = &inputs[i].max;
    return layer_.Check(largest, input_count, inputs[kQuery].desc.type) ? 0 : -1;
  }
  size_t getWorkspaceSize(const DynamicPluginTensorDesc* inputs, int32_t input_count,
                          const DynamicPluginTensorDesc*, int32_t) const noexcept override {
    if (input_count != layer_.input_count()) return 0;
    const Dims* largest[kInputCount];
    for (int32_t i = 0; i < input_count; ++i) largest[i] = &inputs[i].max;
    return layer_.WorkspaceBytes(largest, input_count, inputs[kQuery].desc.type);
  }
  int32_t getAliasedInput(int32_t output) noexcept {  // overrides IPluginV3OneBuildV2's where Build is that
    if (output == static_cast<int32_t>(kPresentKey)) return static_cast<int32_t>(kPastKey);
    if (output == static_cast<int32_t>(kPresentValue)) return static_cast<int32_t>(kPastValue);
    return -1;
  }

  // Runtime
  int32_t onShapeChange(const PluginTensorDesc* inputs, int32_t input_count, const PluginTensorDesc*,
                        int32_t output_count) noexcept override {
    if (input_count != layer_.input_count() || output_count != kLayerOutputs) return -1;
    const Dims* shapes[kInputCount];
    for (int32_t i = 0; i < input_count; ++i) shapes[i] = &inputs[i].dims;
    return layer_.Check(shapes, input_count, inputs[kQuery].type) ? 0 : -1;
  }
  int32_t enqueue(const PluginTensorDesc* input_descriptions, const PluginTensorDesc*,
                  const void* const* inputs, void* const* outputs, void* workspace,
                  cudaStream_t stream) noexcept override {
    return layer_.Enqueue(input_descriptions, inputs, outputs, workspace, stream);
  }
  nvinfer1::IPluginV3* attachToContext(nvinfer1::IPluginResourceContext*) noexcept override {
    auto* attached = new RelayPlugin(layer_.config());
    attached->layer_.Attach();
    return attached;
  }
  const nvinfer1::PluginFieldCollection* getFieldsToSerialize() noexcept override {
    fields_ = std::make_unique<ConfigFields>(layer_.config());
    return fields_->collection();
  }

 private:
  Layer layer_;
  std::unique_ptr<ConfigFields> fields_;  // TensorRT reads it after getFieldsToSerialize has returned
};

class RelayCreator final : public nvinfer1::IPluginCreatorV3One {
 public:
  const AsciiChar* getPluginName() const noexcept override { return kOpName; }
  const AsciiChar* getPluginVersion() const noexcept override { return kPluginVersion; }
  const AsciiChar* getPluginNamespace() const noexcept override { return kOpDomain; }
  const nvinfer1::PluginFieldCollection* getFieldNames() noexcept override { return &FieldNames(); }

  nvinfer1::IPluginV3* createPlugin(const AsciiChar* name, const nvinfer1::PluginFieldCollection* fields,
                                    nvinfer1::TensorRTPhase phase) noexcept override {
    Config config;
    config.layer = name ? name : "";
    if (phase == nvinfer1::TensorRTPhase::kBUILD) {
      const char* alias = std::getenv(kAliasVariable);
      config.alias_cache = alias && std::strcmp(alias, "1") == 0;
    }
    if (const std::string error = ParseFields(fields, &config); !error.empty()) {
      LogError(config.layer, error);
      return nullptr;
    }
#if RELAY_HAS_ALIAS
    if (config.alias_cache) return new RelayPlugin<nvinfer1::IPluginV3OneBuildV2>(config);
#else
    if (config.alias_cache) {
      LogError(config.layer, "alias_cache needs TensorRT 10.3 or later");
      return nullptr;
    }
#endif
    return new RelayPlugin<nvinfer1::IPluginV3OneBuild>(config);
  }
};

}  // namespace
}  // namespace relay::tensorrt

// Called by IPluginRegistry::loadLibrary, and by nothing else: there is no static registration beside it.
RELAY_EXPORT nvinfer1::IPluginCreatorInterface* const* getCreators(int32_t& count) {
  static relay::tensorrt::RelayCreator creator;
  static nvinfer1::IPluginCreatorInterface* const creators[] = {&creator};
  count = 1;
  return creators;
}

RELAY_EXPORT void setLoggerFinder(nvinfer1::ILoggerFinder* finder) {
  relay::tensorrt::SetLoggerFinder(finder);
}
