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

__device__ __forceinline__ Lengths read_lengths(const RelayParams& p, int request) {
  Lengths n;
  n.context = p.context_lens[request];
  n.query = p.query_lens[request];
  n.valid = n.query >= 0 && n.query <= p.sequence && n.context >= 0 && n.context <= p.max_context - n.query;
  if (p.rotary_dim > 0 && n.valid && n.query > 0)
    n.valid = n.context <= p.max_positions - p.prefix_length - n.query;
  if (!n.valid) n.context = n.query = 0;
  return n;
}

}  // namespace relay::cuda
