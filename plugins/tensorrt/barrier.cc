#include <cuda_runtime_api.h>

#include "plugins/tensorrt/layer.h"

namespace relay::tensorrt {

std::unique_ptr<Barrier> Barrier::Make() {
  void* data = nullptr;
  if (cudaMalloc(&data, cuda::kBarrierBytes) == cudaSuccess) {
    // the default stream's memset is done before the context's first launch: cudaMemset waits for pageable
    // work only, so the stream is waited for explicitly
    if (cudaMemset(data, 0, cuda::kBarrierBytes) == cudaSuccess &&
        cudaStreamSynchronize(nullptr) == cudaSuccess) {
      return std::unique_ptr<Barrier>(new Barrier(data));
    }
    cudaFree(data);
  }
  cudaGetLastError();  // not to be found by the next caller
  return nullptr;
}

Barrier::~Barrier() { cudaFree(data_); }

}  // namespace relay::tensorrt
