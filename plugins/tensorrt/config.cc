#include "plugins/tensorrt/config.h"

#include <algorithm>
#include <cstring>
#include <limits>

namespace relay::tensorrt {
namespace {

using nvinfer1::PluginField;
using nvinfer1::PluginFieldCollection;
using nvinfer1::PluginFieldType;

constexpr char kMagic[4] = {'R', 'L', 'Y', 'A'};
constexpr uint32_t kFormatVersion = 1;
constexpr size_t kMaxLayerName = 4096;

constexpr int kIntegerCount = 6;
constexpr const char* kIntegerNames[kIntegerCount] = {"num_heads", "kv_num_heads",       "local_window_size",
                                                      "do_rotary", "rotary_interleaved", "alias_cache"};
constexpr int kFloatCount = 2;
constexpr const char* kFloatNames[kFloatCount] = {"scale", "softcap"};
constexpr char kLayerField[] = "layer";

struct Packed {
  int32_t integers[kIntegerCount];
  float floats[kFloatCount];
};

Packed Pack(const Config& config) {
  const Attributes& a = config.attributes;
  return {{static_cast<int32_t>(a.num_heads), static_cast<int32_t>(a.kv_num_heads),
           static_cast<int32_t>(a.local_window_size), static_cast<int32_t>(a.do_rotary),
           static_cast<int32_t>(a.rotary_interleaved), config.alias_cache},
          {a.scale, a.softcap}};
}

std::string Unpack(const Packed& packed, Config* config) {
  Attributes& a = config->attributes;
  a.num_heads = packed.integers[0];
  a.kv_num_heads = packed.integers[1];
  a.local_window_size = packed.integers[2];
  a.do_rotary = packed.integers[3];
  a.rotary_interleaved = packed.integers[4];
  a.scale = packed.floats[0];
  a.softcap = packed.floats[1];
  if (packed.integers[5] != 0 && packed.integers[5] != 1) {
    return "alias_cache = " + std::to_string(packed.integers[5]) + " must be 0 or 1";
  }
  config->alias_cache = packed.integers[5] != 0;
  return CheckAttributes(a);
}

std::string ReadInteger(const PluginField& field, int32_t* value) {
  int64_t wide = 0;
  if (field.type == PluginFieldType::kINT32) {
    wide = *static_cast<const int32_t*>(field.data);
#if NV_TENSORRT_MAJOR >= 10
  } else if (field.type == PluginFieldType::kINT64) {
    wide = *static_cast<const int64_t*>(field.data);
#endif
  } else {
    return std::string("field ") + field.name + " must be an int32";
  }
  if (wide < std::numeric_limits<int32_t>::min() || wide > std::numeric_limits<int32_t>::max()) {
    return std::string("field ") + field.name + " = " + std::to_string(wide) + " does not fit an int32";
  }
  *value = static_cast<int32_t>(wide);
  return "";
}

std::string ReadFloat(const PluginField& field, float* value) {
  if (field.type == PluginFieldType::kFLOAT32) {
    *value = *static_cast<const float*>(field.data);
  } else if (field.type == PluginFieldType::kFLOAT64) {
    *value = static_cast<float>(*static_cast<const double*>(field.data));
  } else {
    return std::string("field ") + field.name + " must be a float32";
  }
  return "";
}

}  // namespace

const PluginFieldCollection& FieldNames() {
  static const std::vector<PluginField> fields = [] {
    std::vector<PluginField> made;
    for (const char* name : kIntegerNames) made.emplace_back(name, nullptr, PluginFieldType::kINT32, 1);
    for (const char* name : kFloatNames) made.emplace_back(name, nullptr, PluginFieldType::kFLOAT32, 1);
    return made;
  }();
  static const PluginFieldCollection collection{static_cast<int32_t>(fields.size()), fields.data()};
  return collection;
}

std::string ParseFields(const PluginFieldCollection* fields, Config* config) {
  if (fields == nullptr || (fields->nbFields > 0 && fields->fields == nullptr))
    return "no plugin fields were given";
  Packed packed = Pack(*config);
  bool heads[2] = {false, false};
  for (int32_t i = 0; i < fields->nbFields; ++i) {
    const PluginField& field = fields->fields[i];
    const std::string name = field.name ? field.name : "";
    if (name == kLayerField) {
      if (field.type != PluginFieldType::kCHAR || field.length < 0 || (field.length > 0 && !field.data)) {
        return "field layer must be characters";
      }
      config->layer.assign(static_cast<const char*>(field.data), static_cast<size_t>(field.length));
      continue;
    }
    if (field.data == nullptr || field.length != 1) return "field " + name + " must hold one number";
    bool known = false;
    for (int k = 0; k < kIntegerCount && !known; ++k) {
      if (name != kIntegerNames[k]) continue;
      known = true;
      if (k < 2) heads[k] = true;
      if (std::string error = ReadInteger(field, &packed.integers[k]); !error.empty()) return error;
    }
    for (int k = 0; k < kFloatCount && !known; ++k) {
      if (name != kFloatNames[k]) continue;
      known = true;
      if (std::string error = ReadFloat(field, &packed.floats[k]); !error.empty()) return error;
    }
    if (!known) return "field " + name + " is unknown";
  }
  for (int k = 0; k < 2; ++k) {
    if (!heads[k]) return std::string("field ") + kIntegerNames[k] + " is missing";
  }
  return Unpack(packed, config);
}

ConfigFields::ConfigFields(const Config& config) : layer_(config.layer) {
  const Packed packed = Pack(config);
  std::memcpy(integers_, packed.integers, sizeof(integers_));
  std::memcpy(floats_, packed.floats, sizeof(floats_));
  for (int k = 0; k < kIntegerCount; ++k) {
    fields_.emplace_back(kIntegerNames[k], &integers_[k], PluginFieldType::kINT32, 1);
  }
  for (int k = 0; k < kFloatCount; ++k) {
    fields_.emplace_back(kFloatNames[k], &floats_[k], PluginFieldType::kFLOAT32, 1);
  }
  if (!layer_.empty()) {
    fields_.emplace_back(kLayerField, layer_.data(), PluginFieldType::kCHAR,
                         static_cast<int32_t>(layer_.size()));
  }
  collection_.nbFields = static_cast<int32_t>(fields_.size());
  collection_.fields = fields_.data();
}

std::string Serialize(const Config& config) {
  const Packed packed = Pack(config);
  const auto length = static_cast<uint32_t>(std::min(config.layer.size(), kMaxLayerName));
  std::string bytes;
  const auto append = [&bytes](const void* data, size_t size) {
    bytes.append(static_cast<const char*>(data), size);
  };
  append(kMagic, sizeof(kMagic));
  append(&kFormatVersion, sizeof(kFormatVersion));
  append(&packed, sizeof(packed));
  append(&length, sizeof(length));
  append(config.layer.data(), length);
  return bytes;
}

std::string Deserialize(const void* data, size_t size, Config* config) {
  const char* next = static_cast<const char*>(data);
  const char* end = next + size;
  const auto take = [&next, end](void* target, size_t bytes) {
    if (static_cast<size_t>(end - next) < bytes) return false;
    std::memcpy(target, next, bytes);
    next += bytes;
    return true;
  };
  char magic[sizeof(kMagic)];
  uint32_t version = 0;
  if (data == nullptr || !take(magic, sizeof(magic)) || std::memcmp(magic, kMagic, sizeof(magic)) != 0 ||
      !take(&version, sizeof(version))) {
    return "the plan's layer data is not that of this plugin";
  }
  if (version != kFormatVersion) {
    return "the plan was built with another version of this plugin (layer format " + std::to_string(version) +
           ", this one reads " + std::to_string(kFormatVersion) + "): build the engine again";
  }
  Packed packed;
  uint32_t length = 0;
  if (!take(&packed, sizeof(packed)) || !take(&length, sizeof(length)) ||
      static_cast<size_t>(end - next) != length) {
    return "the plan's layer data is truncated or damaged (" + std::to_string(size) + " bytes)";
  }
  config->layer.assign(next, length);
  return Unpack(packed, config);
}

}  // namespace relay::tensorrt
