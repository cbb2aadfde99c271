// What both kernels keep of each request in shared memory, and what they write beside their results.
#pragma once

#include "lengths.cuh"
#include "plan.h"
#include "rotary.cuh"

namespace relay::cuda {

// Base of the schedules, which fill the tables.
struct RequestTables {
  const KernelArguments* arguments;
  int arrays;  // offset in the dynamic shared memory

  __device__ __forceinline__ int* array(int index) const {
    return reinterpret_cast<int*>(dynamic_shared() + arrays) + index * (arguments->params.batch + 1);
  }
  // [B + 1] first token of each request, counted inside the launch
  __device__ __forceinline__ int* token_start() const { return array(0); }
  // [B + 1] first unit of each request's context tiles; from where it is counted, the schedule says
  __device__ __forceinline__ int* unit_start() const { return array(1); }
  // [B] index of the launch's first token in the request's sequence
  __device__ __forceinline__ int* first_token() const { return array(2); }
  // [B]
  __device__ __forceinline__ int* context_len() const { return array(3); }
  // [tokens]
  __device__ __forceinline__ uint16_t* request_of_token() const {
    return reinterpret_cast<uint16_t*>(array(4));
  }

  // Of keys of a context.
  __device__ __forceinline__ int blocks_of(int keys) const {
    const int log2 = arguments->context_keys_log2;
    return (keys + (1 << log2) - 1) >> log2;
  }
  // Key block of the first key that a token at a position of its context sees.
  __device__ __forceinline__ int first_block(int position) const {
    const int first = position - arguments->params.local_window_size + 1;
    return arguments->params.local_window_size > 0 && first > 0 ? first >> arguments->context_keys_log2 : 0;
  }
  __device__ __forceinline__ int request_tokens(int request) const {
    return token_start()[request + 1] - token_start()[request];
  }
  __device__ __forceinline__ int context_keys(int request) const {
    return context_len()[request] + first_token()[request] + request_tokens(request);
  }
  __device__ __forceinline__ int context_block_begin(int request) const {
    return first_block(context_len()[request] + first_token()[request]);
  }
  __device__ __forceinline__ int context_blocks(int request) const {
    return blocks_of(context_keys(request)) - context_block_begin(request);
  }
};

// Writes the launch's new tokens into the caches, keys rotated. `thread` of `threads` of each block take
// part.
template <class T, int kHeadDim>
__device__ __forceinline__ void append_tokens(const RequestTables& tables, const Rotary& rotary, int tokens,
                                              int thread, int threads) {
  constexpr int kChunks = kHeadDim / 8;
  const RelayParams& p = tables.arguments->params;
  const int count = tokens * p.kv_num_heads * kChunks;
#pragma unroll 1
  for (int i = blockIdx.x * threads + thread; i < count; i += gridDim.x * threads) {
    const int chunk = i % kChunks;
    const int token = tables.arguments->by_kv_heads.divide(i / kChunks);
    const int head = i / kChunks - token * p.kv_num_heads;
    const int request = tables.request_of_token()[token];
    const int s = tables.first_token()[request] + token - tables.token_start()[request];
    const int slot = tables.context_len()[request] + s;
    const int64_t from = ((int64_t{request} * p.sequence + s) * p.kv_num_heads + head) * kChunks;
    const int64_t to = ((int64_t{request} * p.kv_num_heads + head) * p.max_context + slot) * kChunks;
    const uint4* key = static_cast<const uint4*>(p.key) + from;
    uint4* present = static_cast<uint4*>(p.present_key) + to;
    const uint4 value = static_cast<const uint4*>(p.value)[from + chunk];
    RotaryChunk x;
    rotary.read(x, chunk, p.prefix_length + slot, [&](int c) { return key[c]; });
    rotary.write<T>(x, chunk, [&](int c, const uint4& rotated) { present[c] = rotated; });
    static_cast<uint4*>(p.present_value)[to + chunk] = value;
  }
}

// Output rows past query_lens: zero; all rows of a request whose lengths are out of range: NaN. tokens: of
// the launch.
template <class T, int kHeadDim>
__device__ __forceinline__ void fill_idle_rows(const RelayParams& p, int tokens, int thread, int threads) {
  if (tokens == p.batch * p.sequence) return;
  const int chunks = p.num_heads * (kHeadDim / 8);
#pragma unroll 1
  for (int row = blockIdx.x; row < p.batch * p.sequence; row += gridDim.x) {
    const Lengths n = read_lengths(p, row / p.sequence);
    if (row % p.sequence < n.query) continue;
    const uint32_t word = n.valid ? 0 : T::kNaN;
    uint4* output = static_cast<uint4*>(p.output) + int64_t{row} * chunks;
#pragma unroll 1
    for (int i = thread; i < chunks; i += threads) output[i] = make_uint4(word, word, word, word);
  }
}

}  // namespace relay::cuda
