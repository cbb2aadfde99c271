// What every engine's adapter hands to the CUDA kernels: attributes and geometry as RelayParams, pointers
// still null.
#pragma once

#include <algorithm>
#include <cstdint>

#include "plugins/common/op.h"
#include "plugins/cuda/launch.h"

namespace relay {

inline cuda::RelayParams ToCudaParams(const Attributes& attributes, const Geometry& geometry,
                                      cuda::DataType dtype) {
  cuda::RelayParams params{};
  params.batch = static_cast<int32_t>(geometry.batch);
  params.sequence = static_cast<int32_t>(geometry.sequence);
  params.num_heads = static_cast<int32_t>(geometry.num_heads);
  params.kv_num_heads = static_cast<int32_t>(geometry.kv_num_heads);
  params.head_dim = static_cast<int32_t>(geometry.head_dim);
  params.max_context = static_cast<int32_t>(geometry.max_context);
  params.prefix_length = static_cast<int32_t>(geometry.prefix_length);
  params.rotary_dim = static_cast<int32_t>(geometry.rotary_dim);
  params.max_positions = static_cast<int32_t>(geometry.max_positions);
  params.scale = attributes.scale;
  params.softcap = attributes.softcap;
  params.local_window_size =
      static_cast<int32_t>(std::min<int64_t>(attributes.local_window_size, INT32_MAX / 2));
  params.rotary_interleaved = attributes.rotary_interleaved != 0;
  params.dtype = dtype;
  return params;
}

}  // namespace relay
