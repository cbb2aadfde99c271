// Messages of the plugin, in TensorRT's own log.
#pragma once

#include <NvInferRuntime.h>

#include <string>

namespace relay::tensorrt {

using nvinfer1::ILogger;

// Where TensorRT hands us its logger (entry point setLoggerFinder). Kept for the life of the process.
void SetLoggerFinder(nvinfer1::ILoggerFinder* finder);

// Writes "RelayAttention (layer): message" to TensorRT's logger, or to stderr where there is none.
void Log(ILogger::Severity severity, const std::string& layer, const std::string& message);

inline void LogError(const std::string& layer, const std::string& message) {
  Log(ILogger::Severity::kERROR, layer, message);
}

}  // namespace relay::tensorrt
