// The functions that exist once per instruction set; kernels.cc holds them and chooses between them.
#pragma once

#include <cstdint>

#include "plugins/cpu/plan.h"

namespace relay::cpu {

struct Call {
  const RelayParams& params;
  const Plan& plan;
  float* partials;  // [plan.partial_floats]
};

struct Kernels {
  const char* target;
  // Row b of the batch, one kv head: copies past to present where they differ, appends the new keys (rotated)
  // and values, and clears the output of the tokens past query_lens.
  void (*prepare)(const RelayParams& params, int64_t batch, int64_t kv_head, float* scratch);
  // One unit of the plan, one kv head. `scratch`: ScratchFloats(head_dim) floats, 64-byte aligned.
  void (*attend)(const Call& call, const Unit& unit, int64_t kv_head, float* scratch);
  // Fuses the partial states of some rows and writes them to the output.
  void (*merge)(const Call& call, const Merge& merge, int64_t kv_head, float* scratch);
};

int64_t ScratchFloats(int64_t head_dim);

}  // namespace relay::cpu
