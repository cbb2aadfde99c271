// The one door to the CPU kernels: shapes and pointers in, no engine known.
#pragma once

#include <cstddef>
#include <cstdint>

#include "plugins/common/op.h"

namespace relay::cpu {

enum class DataType { kFloat32, kFloat16 };

// One call of relay::RelayAttention. Tensors are dense and row-major; shapes as in plugins/common/op.h.
// Every tensor that is not a length has the kernels' storage type.
// The caller has checked attributes, geometry and lengths (CheckAttributes, MakeGeometry, CheckLengths).
struct RelayParams {
  Attributes attributes;
  Geometry geometry;
  const void* query = nullptr;
  const void* key = nullptr;
  const void* value = nullptr;
  const void* past_key = nullptr;
  const void* past_value = nullptr;
  const int32_t* context_lens = nullptr;
  const int32_t* query_lens = nullptr;
  const void* prefix_key = nullptr;
  const void* prefix_value = nullptr;
  const void* cos_cache = nullptr;
  const void* sin_cache = nullptr;
  void* output = nullptr;
  void* present_key =
      nullptr;  // == past_key: appended in place; else past is copied first. No partial overlap.
  void* present_value = nullptr;
};

// What the kernels need of their host: its threads and its memory.
class Host {
 public:
  virtual ~Host() = default;
  // Calls body(argument, i) once for each i < count, on any threads, and waits for all of them.
  virtual void ParallelFor(size_t count, void (*body)(void* argument, size_t i), void* argument) = 0;
  // Memory that lives until the call of RelayAttention returns. Throws where there is none.
  virtual void* Allocate(size_t bytes) = 0;
};

struct Kernels;  // of one instruction set and one storage type

// The kernels of the best instruction set that this CPU runs: "avx512", "avx2", "sse4" or "neon". The
// environment variable RELAY_ATTENTION_CPU_TARGET names another, for tests. Throws std::runtime_error where
// it cannot be had.
const Kernels& ChooseKernels(DataType dtype);

// Runs the op. The result does not depend on the number of threads, bit for bit.
void RelayAttention(const Kernels& kernels, const RelayParams& params, Host& host);

}  // namespace relay::cpu
