// The entry point of the custom-op library. It links no engine: ONNX Runtime hands its API over at load time,
// in the newest version that both sides know, so one file serves old and new releases.
#include <onnxruntime_cxx_api.h>

#include <algorithm>
#include <cstdlib>
#include <mutex>

#include "plugins/onnxruntime/relay_op.h"

extern "C" __attribute__((visibility("default"))) OrtStatus* RegisterCustomOps(OrtSessionOptions* options,
                                                                               const OrtApiBase* base) {
  // Release 1.N offers the API versions up to N; asking it for more would print a complaint.
  const char* release = base->GetVersionString();  // "1.N.P"
  char* rest = nullptr;
  const unsigned long major = std::strtoul(release, &rest, 10);
  const unsigned long minor = *rest == '.' ? std::strtoul(rest + 1, nullptr, 10) : 0;
  const uint32_t offered = major > 1 ? ORT_API_VERSION : static_cast<uint32_t>(minor);
  static std::mutex mutex;
  const std::lock_guard<std::mutex> lock(mutex);
  const OrtApi* api = nullptr;
  uint32_t version = std::min<uint32_t>(offered, ORT_API_VERSION);
  while (version >= relay::ort::kMinApiVersion && (api = base->GetApi(version)) == nullptr) --version;
  if (api == nullptr) {
    // The oldest API can still make the status object, and that call has never moved.
    return base->GetApi(1)->CreateStatus(
        ORT_NOT_IMPLEMENTED, "relay_attention needs ONNX Runtime 1.18 or later; this one is older");
  }
  Ort::InitApi(api);
  relay::ort::api_version = version;
  try {
    static OrtCustomOpDomain* domain = [] {
      OrtCustomOpDomain* made = nullptr;  // lives as long as the process
      Ort::ThrowOnError(Ort::GetApi().CreateCustomOpDomain(relay::kOpDomain, &made));
      relay::ort::AddCpuOps(made);
#ifdef RELAY_CUDA
      relay::ort::AddCudaOps(made);
#endif
      return made;
    }();
    Ort::ThrowOnError(Ort::GetApi().AddCustomOpDomain(options, domain));
    return nullptr;
  } catch (const std::exception& error) {
    return api->CreateStatus(ORT_RUNTIME_EXCEPTION, error.what());
  }
}
