// What one RelayAttention layer is configured with: read from the parser's plugin fields, kept inside the
// plan.
#pragma once

#include <NvInferRuntime.h>

#include <string>
#include <vector>

#include "plugins/common/op.h"

namespace relay::tensorrt {

inline constexpr char kPluginVersion[] = "1";

struct Config {
  Attributes attributes;
  std::string layer;  // name of the ONNX node, for messages
  bool alias_cache =
      false;  // TensorRT 10.3+: declare present_* as the same memory as past_* (IPluginV3OneBuildV2)
};

// Names and types of the fields that a creator takes.
const nvinfer1::PluginFieldCollection& FieldNames();

// Reads the attributes (and, from a plan, everything else) out of `fields`. Returns an empty string, or a
// sentence that names the field that is missing, unknown, of the wrong type or of a value that the op does
// not have.
std::string ParseFields(const nvinfer1::PluginFieldCollection* fields, Config* config);

// A configuration as plugin fields that ParseFields reads back; points into itself, so it neither moves nor
// copies.
class ConfigFields {
 public:
  explicit ConfigFields(const Config& config);
  ConfigFields(const ConfigFields&) = delete;
  ConfigFields& operator=(const ConfigFields&) = delete;
  const nvinfer1::PluginFieldCollection* collection() const { return &collection_; }

 private:
  int32_t integers_[6];
  float floats_[2];
  std::string layer_;
  std::vector<nvinfer1::PluginField> fields_;
  nvinfer1::PluginFieldCollection collection_{};
};

// The same as bytes, for plugins that serialize themselves (TensorRT 8). Little-endian, of a fixed layout:
// magic "RLYA", uint32 format version, the integers, the floats, uint32 length of the layer's name, the name.
std::string Serialize(const Config& config);
std::string Deserialize(const void* data, size_t size, Config* config);

}  // namespace relay::tensorrt
