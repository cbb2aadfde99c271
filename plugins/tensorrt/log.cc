#include "plugins/tensorrt/log.h"

#include <dlfcn.h>

#include <atomic>
#include <cstdio>

namespace relay::tensorrt {
namespace {

std::atomic<nvinfer1::ILoggerFinder*> logger_finder{nullptr};

ILogger* FindLogger() {
  if (auto* finder = logger_finder.load()) {
    if (ILogger* logger = finder->findLogger()) return logger;
  }
  // TensorRT 8.6 gives a finder only to libraries inside version-compatible plans. libnvinfer exports
  // getLogger(); it is looked up here, not linked, so that this library has no undefined symbol of
  // TensorRT's.
  using GetLogger = ILogger* (*)();
  static const auto get_logger = reinterpret_cast<GetLogger>(dlsym(RTLD_DEFAULT, "getLogger"));
  return get_logger ? get_logger() : nullptr;
}

}  // namespace

void SetLoggerFinder(nvinfer1::ILoggerFinder* finder) { logger_finder = finder; }

void Log(ILogger::Severity severity, const std::string& layer, const std::string& message) {
  const std::string text = "RelayAttention" + (layer.empty() ? "" : " (" + layer + ")") + ": " + message;
  if (ILogger* logger = FindLogger()) {
    logger->log(severity, text.c_str());
  } else {
    std::fprintf(stderr, "%s\n", text.c_str());
  }
}

}  // namespace relay::tensorrt
