// The lengths of one request, read on the device and checked there.
#pragma once

#include "launch.h"
#include "ptx.cuh"

namespace relay::cuda {

constexpr unsigned kAllLanes = 0xffffffffu;

struct Lengths {
  int context;  // tokens in the cache before this call
  int query;    // valid new tokens; 0 where !valid
  bool valid;  // false: out of range (see check() in launch.h); the row's output is NaN, its cache left alone
};

__device__ __forceinline__ Lengths check_lengths(const RelayParams& p, int context, int query) {
  Lengths n;
  n.context = context;
  n.query = query;
  n.valid = n.query >= 0 && n.query <= p.sequence && n.context >= 0 && n.context <= p.max_context - n.query;
  if (p.rotary_dim > 0 && n.valid && n.query > 0)
    n.valid = n.context <= p.max_positions - p.prefix_length - n.query;
  if (!n.valid) n.context = n.query = 0;
  return n;
}
__device__ __forceinline__ Lengths read_lengths(const RelayParams& p, int request) {
  return check_lengths(p, p.context_lens[request], p.query_lens[request]);
}

}  // namespace relay::cuda
