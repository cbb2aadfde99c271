// One RelayAttention layer behind both plugin interfaces: types, shapes, scratch and the launch.
#pragma once

#include <NvInferRuntime.h>

#include <memory>
#include <string>

#include "plugins/cuda/launch.h"
#include "plugins/tensorrt/config.h"

namespace relay::tensorrt {

inline constexpr int32_t kLayerOutputs = static_cast<int32_t>(kOutputCount);

// Device words that the kernels keep between launches (kBarrierBytes, cleared once). One per execution
// context and layer: contexts may run at the same time, layers of one context on TensorRT's auxiliary streams
// as well.
class Barrier {
 public:
  // Null where the device has no memory left: the kernels then clear words of the workspace before each
  // launch.
  static std::unique_ptr<Barrier> Make();
  ~Barrier();
  Barrier(const Barrier&) = delete;
  Barrier& operator=(const Barrier&) = delete;
  void* data() const { return data_; }

 private:
  explicit Barrier(void* data) : data_(data) {}
  void* data_;
};

class Layer {
 public:
  explicit Layer(Config config) : config_(std::move(config)) {}
  Layer(const Layer& other) : config_(other.config_) {}  // a copy has no device memory
  Layer& operator=(const Layer&) = delete;

  const Config& config() const { return config_; }
  int32_t input_count() const { return static_cast<int32_t>(InputCount(config_.attributes.do_rotary != 0)); }

  // Whether tensor `position` (inputs first, then outputs) may have this type and format; `type` is query's.
  bool Supports(int32_t position, int32_t input_count, int32_t output_count, nvinfer1::DataType position_type,
                nvinfer1::TensorFormat format, nvinfer1::DataType type) const;

  // Output dimensions from input dimensions. False, with the reason in the log, where what is known while
  // building already contradicts the op or the kernels (number of inputs, ranks, heads, head_dim, rotary).
  bool OutputShapes(const nvinfer1::DimsExprs* inputs, int32_t input_count, nvinfer1::DimsExprs* outputs,
                    int32_t output_count) const;

  // Scratch in bytes for these shapes or any smaller ones; 0, with the reason in the log, where they are
  // refused.
  size_t WorkspaceBytes(const nvinfer1::Dims* const* inputs, int32_t input_count,
                        nvinfer1::DataType type) const;

  // Whether the kernels take these shapes; the reason goes to the log.
  bool Check(const nvinfer1::Dims* const* inputs, int32_t input_count, nvinfer1::DataType type) const;

  // Enqueues the kernels on `stream`: no allocation, no synchronisation. Returns 0, or -1 with the reason in
  // the log.
  int32_t Enqueue(const nvinfer1::PluginTensorDesc* descriptions, const void* const* inputs,
                  void* const* outputs, void* workspace, cudaStream_t stream) const;

  void Attach();  // to an execution context
  void Detach() { barrier_.reset(); }

 private:
  std::string MakeParams(const nvinfer1::Dims* const* inputs, int32_t input_count, nvinfer1::DataType type,
                         cuda::RelayParams* params) const;
  int SmCount() const;

  Config config_;
  std::unique_ptr<Barrier> barrier_;
  mutable int sm_count_ = 0;
};

}  // namespace relay::tensorrt
