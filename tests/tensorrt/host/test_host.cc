// Drives a RelayAttention plugin library the way TensorRT does: by its entry points and virtual functions. It
// is not TensorRT: there is no parser, optimizer or engine here, only the calls that those make. Built
// against the headers of the TensorRT that the plugin was built against; Python (test_adapter.py) calls it
// through ctypes.
#include <NvInferRuntime.h>
#include <dlfcn.h>

#include <cstring>
#include <memory>
#include <string>
#include <vector>

#define HOST_API extern "C" __attribute__((visibility("default")))

namespace {

using namespace nvinfer1;
#if NV_TENSORRT_MAJOR >= 10
using Creator = IPluginCreatorInterface;
using DimValue = int64_t;
constexpr char kEntryPoint[] = "getCreators";
#else
using Creator = IPluginCreator;
using DimValue = int32_t;
constexpr char kEntryPoint[] = "getPluginCreators";
#endif

class HostLogger final : public ILogger {
 public:
  void log(Severity severity, const AsciiChar* message) noexcept override {
    text += std::to_string(static_cast<int>(severity)) + " " + message + "\n";
  }
  std::string text;
};
HostLogger logger;

class HostLoggerFinder final : public ILoggerFinder {
 public:
  ILogger* findLogger() override { return &logger; }
};
HostLoggerFinder logger_finder;

// A dimension as the plugin sees it while building: a constant, or a number known only later.
class HostExpr final : public IDimensionExpr {
 public:
  explicit HostExpr(DimValue value) : impl_(value) { mImpl = &impl_; }

 private:
  struct Impl final : apiv::VDimensionExpr {
    explicit Impl(DimValue v) : value(v) {}
    bool isConstant() const noexcept override { return value >= 0; }
    DimValue getConstantValue() const noexcept override { return value; }
#if NV_TENSORRT_MAJOR >= 10
    bool isSizeTensor() const noexcept override { return false; }
#endif
    DimValue value;
  } impl_;
};

class HostExprBuilder final : public IExprBuilder {
 public:
  HostExprBuilder() { mImpl = &impl_; }

 private:
  struct Impl final : apiv::VExprBuilder {
    const IDimensionExpr* constant(DimValue value) noexcept override {
      made.push_back(std::make_unique<HostExpr>(value));
      return made.back().get();
    }
    const IDimensionExpr* operation(DimensionOperation, const IDimensionExpr&,
                                    const IDimensionExpr&) noexcept override {
      return nullptr;  // the op's outputs have the shapes of inputs; an operation would be a mistake
    }
#if NV_TENSORRT_MAJOR >= 10
    const IDimensionExpr* declareSizeTensor(int32_t, const IDimensionExpr&,
                                            const IDimensionExpr&) noexcept override {
      return nullptr;
    }
#endif
    std::vector<std::unique_ptr<HostExpr>> made;
  } impl_;
};

struct Library {
  void* handle = nullptr;
  Creator* creator = nullptr;
};

// One plugin object. `context` is what attaching it to an execution context gave (V3: an object of its own).
struct Plugin {
#if NV_TENSORRT_MAJOR >= 10
  std::unique_ptr<IPluginV3> owned;
  std::unique_ptr<IPluginV3> context;
  IPluginV3OneCore* core() {
    return static_cast<IPluginV3OneCore*>(owned->getCapabilityInterface(PluginCapabilityType::kCORE));
  }
  IPluginV3OneBuild* build() {
    return static_cast<IPluginV3OneBuild*>(owned->getCapabilityInterface(PluginCapabilityType::kBUILD));
  }
  IPluginV3OneRuntime* runtime() {
    IPluginV3* plugin = context ? context.get() : owned.get();
    return static_cast<IPluginV3OneRuntime*>(plugin->getCapabilityInterface(PluginCapabilityType::kRUNTIME));
  }
#else
  struct Destroy {
    void operator()(IPluginV2DynamicExt* plugin) const { plugin->destroy(); }
  };
  std::unique_ptr<IPluginV2DynamicExt, Destroy> owned;
#endif
};

// Shapes travel from Python as rows of 8: shapes[i][0..ranks[i]-1].
Dims ToDims(const int64_t* shape, int32_t rank) {
  Dims dims{};
  dims.nbDims = rank;
  for (int32_t d = 0; d < rank; ++d) dims.d[d] = static_cast<DimValue>(shape[d]);
  return dims;
}

std::vector<PluginTensorDesc> ToDescriptions(int32_t count, const int64_t* shapes, const int32_t* ranks,
                                             const int32_t* types) {
  std::vector<PluginTensorDesc> descriptions;
  for (int32_t i = 0; i < count; ++i) {
    descriptions.push_back(
        {ToDims(shapes + 8 * i, ranks[i]), static_cast<DataType>(types[i]), TensorFormat::kLINEAR, 1.0F});
  }
  return descriptions;
}

std::vector<DynamicPluginTensorDesc> ToDynamic(const std::vector<PluginTensorDesc>& descriptions) {
  std::vector<DynamicPluginTensorDesc> dynamic;
  for (const PluginTensorDesc& description : descriptions) {
    DynamicPluginTensorDesc made{};
    made.desc = description;
    made.min = made.max = description.dims;
#if NV_TENSORRT_MAJOR >= 10
    made.opt = description.dims;
#endif
    dynamic.push_back(made);
  }
  return dynamic;
}

#if NV_TENSORRT_MAJOR >= 10
Plugin* Own(IPluginV3* plugin) {
  if (!plugin) return nullptr;
  auto made = std::make_unique<Plugin>();
  made->owned.reset(plugin);
  return made.release();
}
#else
Plugin* Own(IPluginV2* plugin) {
  if (!plugin) return nullptr;
  auto made = std::make_unique<Plugin>();
  made->owned.reset(static_cast<IPluginV2DynamicExt*>(plugin));
  return made.release();
}
#endif

#if NV_TENSORRT_MAJOR >= 10
IPluginCreatorV3One* V3(Creator* creator) { return static_cast<IPluginCreatorV3One*>(creator); }
#endif

}  // namespace

HOST_API int32_t host_tensorrt_major() { return NV_TENSORRT_MAJOR; }

// Everything logged since the last call, one "severity message" a line.
HOST_API const char* host_log() {
  static std::string taken;
  taken = std::move(logger.text);
  logger.text.clear();
  return taken.c_str();
}

HOST_API Library* host_open(const char* path, char* error, size_t error_size) {
  auto library = std::make_unique<Library>();
  library->handle = dlopen(path, RTLD_NOW | RTLD_LOCAL);
  const auto fail = [&](const char* why) -> Library* {
    std::strncpy(error, why, error_size - 1);
    return nullptr;
  };
  if (!library->handle) return fail(dlerror());
  using SetLoggerFinder = void (*)(ILoggerFinder*);
  const auto set_logger_finder = reinterpret_cast<SetLoggerFinder>(dlsym(library->handle, "setLoggerFinder"));
  if (!set_logger_finder) return fail("no setLoggerFinder");
  set_logger_finder(&logger_finder);
  using GetCreators = Creator* const* (*)(int32_t&);
  const auto get_creators = reinterpret_cast<GetCreators>(dlsym(library->handle, kEntryPoint));
  if (!get_creators) return fail("no entry point for creators");
  int32_t count = 0;
  Creator* const* creators = get_creators(count);
  if (count != 1 || !creators) return fail("not one creator");
  library->creator = creators[0];
#if NV_TENSORRT_MAJOR >= 10
  const InterfaceInfo info = library->creator->getInterfaceInfo();
  if (std::strcmp(info.kind, "PLUGIN CREATOR_V3ONE") != 0 || info.major != 1) return fail(info.kind);
#endif
  return library.release();
}

// "name version namespace field:type field:type ..." of the creator.
HOST_API const char* host_describe(Library* library) {
  static std::string text;
#if NV_TENSORRT_MAJOR >= 10
  auto* creator = V3(library->creator);
#else
  auto* creator = library->creator;
#endif
  text = std::string(creator->getPluginName()) + " " + creator->getPluginVersion() + " " +
         creator->getPluginNamespace();
  const PluginFieldCollection* names = creator->getFieldNames();
  for (int32_t i = 0; i < names->nbFields; ++i) {
    text += std::string(" ") + names->fields[i].name + ":" +
            std::to_string(static_cast<int>(names->fields[i].type));
  }
  return text.c_str();
}

HOST_API Plugin* host_create(Library* library, const char* layer, int32_t count, const char* const* names,
                             const void* const* data, const int32_t* types, const int32_t* lengths) {
  std::vector<PluginField> fields;
  for (int32_t i = 0; i < count; ++i) {
    fields.emplace_back(names[i], data[i], static_cast<PluginFieldType>(types[i]), lengths[i]);
  }
  PluginFieldCollection collection{};
  collection.nbFields = count;
  collection.fields = fields.data();
#if NV_TENSORRT_MAJOR >= 10
  return Own(V3(library->creator)->createPlugin(layer, &collection, TensorRTPhase::kBUILD));
#else
  return Own(library->creator->createPlugin(layer, &collection));
#endif
}

HOST_API Plugin* host_clone(Plugin* plugin) { return Own(plugin->owned->clone()); }

HOST_API void host_destroy(Plugin* plugin) { delete plugin; }

HOST_API const char* host_identity(Plugin* plugin) {
  static std::string text;
#if NV_TENSORRT_MAJOR >= 10
  IPluginV3OneCore* core = plugin->core();
  text =
      std::string(core->getPluginName()) + " " + core->getPluginVersion() + " " + core->getPluginNamespace();
#else
  IPluginV2DynamicExt* core = plugin->owned.get();
  text =
      std::string(core->getPluginType()) + " " + core->getPluginVersion() + " " + core->getPluginNamespace();
#endif
  return text.c_str();
}

// V2: the plan's bytes into `buffer`. V3: the fields, which host_deserialize takes as they are. Returns the
// size.
HOST_API int64_t host_serialize(Plugin* plugin, char* buffer, int64_t capacity) {
#if NV_TENSORRT_MAJOR >= 10
  // name\0 type length data, one after the other: TensorRT's own encoding is not public
  const PluginFieldCollection* fields = plugin->runtime()->getFieldsToSerialize();
  std::string bytes;
  for (int32_t i = 0; i < fields->nbFields; ++i) {
    const PluginField& field = fields->fields[i];
    const int32_t head[2] = {static_cast<int32_t>(field.type), field.length};
    const size_t item = field.type == PluginFieldType::kCHAR ? 1 : 4;
    bytes.append(field.name, std::strlen(field.name) + 1);
    bytes.append(reinterpret_cast<const char*>(head), sizeof(head));
    bytes.append(static_cast<const char*>(field.data), item * static_cast<size_t>(field.length));
  }
#else
  std::string bytes(plugin->owned->getSerializationSize(), '\0');
  plugin->owned->serialize(bytes.data());
#endif
  if (buffer && static_cast<int64_t>(bytes.size()) <= capacity)
    std::memcpy(buffer, bytes.data(), bytes.size());
  return static_cast<int64_t>(bytes.size());
}

HOST_API Plugin* host_deserialize(Library* library, const char* layer, const char* bytes, int64_t size) {
#if NV_TENSORRT_MAJOR >= 10
  std::vector<PluginField> fields;
  for (const char* next = bytes; next < bytes + size;) {
    const char* name = next;
    next += std::strlen(name) + 1;
    int32_t head[2];
    std::memcpy(head, next, sizeof(head));
    next += sizeof(head);
    const auto type = static_cast<PluginFieldType>(head[0]);
    fields.emplace_back(name, next, type, head[1]);
    next += (type == PluginFieldType::kCHAR ? 1 : 4) * static_cast<size_t>(head[1]);
  }
  PluginFieldCollection collection{};
  collection.nbFields = static_cast<int32_t>(fields.size());
  collection.fields = fields.data();
  return Own(V3(library->creator)->createPlugin(layer, &collection, TensorRTPhase::kRUNTIME));
#else
  return Own(library->creator->deserializePlugin(layer, bytes, static_cast<size_t>(size)));
#endif
}

// Shapes of the outputs from input shapes, -1 = known only at run time. out_* as the inputs'. Returns 0 on
// success.
HOST_API int32_t host_output_shapes(Plugin* plugin, int32_t count, const int64_t* shapes,
                                    const int32_t* ranks, int64_t* out_shapes, int32_t* out_ranks) {
  std::vector<std::unique_ptr<HostExpr>> expressions;
  std::vector<DimsExprs> inputs(static_cast<size_t>(count));
  for (int32_t i = 0; i < count; ++i) {
    inputs[i].nbDims = ranks[i];
    for (int32_t d = 0; d < ranks[i]; ++d) {
      expressions.push_back(std::make_unique<HostExpr>(static_cast<DimValue>(shapes[8 * i + d])));
      inputs[i].d[d] = expressions.back().get();
    }
  }
  HostExprBuilder builder;
  DimsExprs outputs[3]{};
#if NV_TENSORRT_MAJOR >= 10
  const int32_t output_count = plugin->build()->getNbOutputs();
  if (output_count != 3) return -2;
  if (plugin->build()->getOutputShapes(inputs.data(), count, nullptr, 0, outputs, 3, builder) != 0) return -1;
#else
  if (plugin->owned->getNbOutputs() != 3) return -2;
  for (int32_t o = 0; o < 3; ++o) {
    outputs[o] = plugin->owned->getOutputDimensions(o, inputs.data(), count, builder);
    if (outputs[o].nbDims < 0) return -1;
  }
#endif
  for (int32_t o = 0; o < 3; ++o) {
    out_ranks[o] = outputs[o].nbDims;
    for (int32_t d = 0; d < outputs[o].nbDims; ++d) {
      const IDimensionExpr* e = outputs[o].d[d];
      out_shapes[8 * o + d] = e->isConstant() ? static_cast<int64_t>(e->getConstantValue()) : -1;
    }
  }
  return 0;
}

// Types of the outputs. Returns 0 on success.
HOST_API int32_t host_output_types(Plugin* plugin, int32_t count, const int32_t* types, int32_t* out_types) {
  std::vector<DataType> inputs;
  for (int32_t i = 0; i < count; ++i) inputs.push_back(static_cast<DataType>(types[i]));
  DataType outputs[3]{};
#if NV_TENSORRT_MAJOR >= 10
  if (plugin->build()->getOutputDataTypes(outputs, 3, inputs.data(), count) != 0) return -1;
#else
  for (int32_t o = 0; o < 3; ++o) outputs[o] = plugin->owned->getOutputDataType(o, inputs.data(), count);
#endif
  for (int32_t o = 0; o < 3; ++o) out_types[o] = static_cast<int32_t>(outputs[o]);
  return 0;
}

HOST_API int32_t host_supports(Plugin* plugin, int32_t position, int32_t input_count, int32_t output_count,
                               const int32_t* types, const int32_t* formats) {
  std::vector<PluginTensorDesc> tensors(static_cast<size_t>(input_count + output_count));
  for (int32_t i = 0; i <= position; ++i) {  // later entries are not TensorRT's to give
    tensors[i].type = static_cast<DataType>(types[i]);
    tensors[i].format = static_cast<TensorFormat>(formats[i]);
  }
#if NV_TENSORRT_MAJOR >= 10
  return plugin->build()->supportsFormatCombination(position, ToDynamic(tensors).data(), input_count,
                                                    output_count);
#else
  return plugin->owned->supportsFormatCombination(position, tensors.data(), input_count, output_count);
#endif
}

// configurePlugin with the largest shapes. V2's returns nothing: always 0 there.
HOST_API int32_t host_configure(Plugin* plugin, int32_t input_count, const int64_t* shapes,
                                const int32_t* ranks, const int32_t* types) {
  const auto tensors = ToDynamic(ToDescriptions(input_count + 3, shapes, ranks, types));
#if NV_TENSORRT_MAJOR >= 10
  return plugin->build()->configurePlugin(tensors.data(), input_count, tensors.data() + input_count, 3);
#else
  plugin->owned->configurePlugin(tensors.data(), input_count, tensors.data() + input_count, 3);
  return 0;
#endif
}

HOST_API int64_t host_workspace(Plugin* plugin, int32_t input_count, const int64_t* shapes,
                                const int32_t* ranks, const int32_t* types) {
  const auto tensors = ToDescriptions(input_count + 3, shapes, ranks, types);
#if NV_TENSORRT_MAJOR >= 10
  const auto dynamic = ToDynamic(tensors);
  return static_cast<int64_t>(
      plugin->build()->getWorkspaceSize(dynamic.data(), input_count, dynamic.data() + input_count, 3));
#else
  return static_cast<int64_t>(
      plugin->owned->getWorkspaceSize(tensors.data(), input_count, tensors.data() + input_count, 3));
#endif
}

HOST_API int32_t host_aliased_input(Plugin* plugin, int32_t output) {
#if NV_TENSORRT_MAJOR >= 10
  IPluginV3OneBuild* build = plugin->build();
  if (build->getInterfaceInfo().major < 2) return -2;  // the interface that has no such question
  return static_cast<IPluginV3OneBuildV2*>(build)->getAliasedInput(output);
#else
  static_cast<void>(plugin);
  static_cast<void>(output);
  return -2;
#endif
}

HOST_API int32_t host_attach(Plugin* plugin) {
#if NV_TENSORRT_MAJOR >= 10
  plugin->context.reset(plugin->runtime()->attachToContext(nullptr));
  return plugin->context ? 0 : -1;
#else
  if (plugin->owned->initialize() != 0) return -1;
  plugin->owned->attachToContext(nullptr, nullptr, nullptr);
  return 0;
#endif
}

HOST_API void host_detach(Plugin* plugin) {
#if NV_TENSORRT_MAJOR >= 10
  plugin->context.reset();
#else
  plugin->owned->detachFromContext();
  plugin->owned->terminate();
#endif
}

// onShapeChange (V3) or configurePlugin (V2), then enqueue on `stream`. Returns what they return.
HOST_API int32_t host_enqueue(Plugin* plugin, int32_t input_count, const int64_t* shapes,
                              const int32_t* ranks, const int32_t* types, const void* const* inputs,
                              void* const* outputs, void* workspace, void* stream) {
  const auto tensors = ToDescriptions(input_count + 3, shapes, ranks, types);
  const PluginTensorDesc* in = tensors.data();
  const PluginTensorDesc* out = in + input_count;
#if NV_TENSORRT_MAJOR >= 10
  if (const int32_t error = plugin->runtime()->onShapeChange(in, input_count, out, 3); error != 0)
    return error;
  return plugin->runtime()->enqueue(in, out, inputs, outputs, workspace, static_cast<cudaStream_t>(stream));
#else
  const auto dynamic = ToDynamic(tensors);
  plugin->owned->configurePlugin(dynamic.data(), input_count, dynamic.data() + input_count, 3);
  return plugin->owned->enqueue(in, out, inputs, outputs, workspace, static_cast<cudaStream_t>(stream));
#endif
}
