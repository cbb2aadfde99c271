// The slow kernels: one warp to a query row, one key after the other, no sharing, no splitting. Right by
// inspection, and what the fast kernel is compared with on a GPU.
#pragma once

#include "lengths.cuh"
#include "rotary.cuh"

namespace relay::cuda {

// Writes the new tokens into present, keys rotated; also runs before a long chunk (Plan::append_before).
// Grid-stride over [B, S, Hkv, D/8] chunks.
template <class T>
__global__ void append_kernel(RelayParams p) {
  const int chunks = p.head_dim / 8;
  const int64_t count = int64_t{p.batch} * p.sequence * p.kv_num_heads * chunks;
  const Rotary rotary{p.cos_cache, p.sin_cache, p.rotary_dim, p.rotary_interleaved != 0};
  for (int64_t i = int64_t{blockIdx.x} * blockDim.x + threadIdx.x; i < count;
       i += int64_t{gridDim.x} * blockDim.x) {
    const int chunk = i % chunks;
    const int head = i / chunks % p.kv_num_heads;
    const int token = i / chunks / p.kv_num_heads % p.sequence;
    const int request = i / chunks / p.kv_num_heads / p.sequence;
    const Lengths n = read_lengths(p, request);
    if (token >= n.query) continue;
    const int64_t source = (i / chunks) * chunks;
    const int64_t target =
        ((int64_t{request} * p.kv_num_heads + head) * p.max_context + n.context + token) * chunks;
    const uint4* key = static_cast<const uint4*>(p.key) + source;
    uint4* present = static_cast<uint4*>(p.present_key) + target;
    RotaryChunk x;
    rotary.read(x, chunk, p.prefix_length + n.context + token, [&](int c) { return key[c]; });
    rotary.write<T>(x, chunk, [&](int c, const uint4& rotated) { present[c] = rotated; });
    static_cast<uint4*>(p.present_value)[target + chunk] = static_cast<const uint4*>(p.value)[source + chunk];
  }
}

// One warp (a block of its own) to a row (b, s, query head); runs after the append. head_dim = 32 *
// kElements.
template <class T, int kElements>
__global__ void reference_attention_kernel(RelayParams p) {
  const int64_t row = blockIdx.x;
  const int head = row % p.num_heads;
  const int token = row / p.num_heads % p.sequence;
  const int request = row / p.num_heads / p.sequence;
  const int kv_head = head / (p.num_heads / p.kv_num_heads);
  const int lane = threadIdx.x;
  const Lengths n = read_lengths(p, request);
  const auto element = [](const void* base, int64_t i) {
    const uint16_t bits = static_cast<const uint16_t*>(base)[i];
    return T::unpack(bits).x;
  };
  uint16_t* output = static_cast<uint16_t*>(p.output) + row * p.head_dim;
  if (token >= n.query) {
    for (int i = 0; i < kElements; ++i)
      output[i * 32 + lane] = n.valid ? uint16_t{0} : static_cast<uint16_t>(T::kNaN);
    return;
  }

  const int position = p.prefix_length + n.context + token;
  float query[kElements];
  for (int i = 0; i < kElements; ++i) {
    const int d = i * 32 + lane;
    float x = element(p.query, row * p.head_dim + d);
    if (d < p.rotary_dim) {
      const int half = p.rotary_dim / 2;
      const int pair = p.rotary_interleaved ? d ^ 1 : (d < half ? d + half : d - half);
      const int angle = p.rotary_interleaved ? d / 2 : d % half;
      const float other = element(p.query, row * p.head_dim + pair);
      const float c = element(p.cos_cache, int64_t{position} * half + angle);
      const float s = element(p.sin_cache, int64_t{position} * half + angle);
      x = x * c + (pair > d ? -other : other) * s;
      x = T::unpack(T::pack(x, x)).x;
    }
    query[i] = x;
  }

  float maximum = -INFINITY, sum = 0, accumulator[kElements] = {};
  const int window_begin = p.local_window_size > 0 ? position - p.local_window_size + 1 : 0;
  for (int j = window_begin > 0 ? window_begin : 0; j <= position; ++j) {
    const bool in_prefix = j < p.prefix_length;
    const int64_t offset =
        in_prefix ? (int64_t{kv_head} * p.prefix_length + j) * p.head_dim
                  : ((int64_t{request} * p.kv_num_heads + kv_head) * p.max_context + j - p.prefix_length) *
                        p.head_dim;
    const void* keys = in_prefix ? p.prefix_key : p.present_key;
    const void* values = in_prefix ? p.prefix_value : p.present_value;
    float score = 0;
    for (int i = 0; i < kElements; ++i) score += query[i] * element(keys, offset + i * 32 + lane);
    for (int distance = 16; distance > 0; distance /= 2)
      score += __shfl_xor_sync(0xffffffffu, score, distance);
    score *= p.scale;
    if (p.softcap > 0) score = p.softcap * tanhf(score / p.softcap);
    const float new_maximum = fmaxf(maximum, score);
    const float decay = expf(maximum - new_maximum), weight = expf(score - new_maximum);
    sum = sum * decay + weight;
    for (int i = 0; i < kElements; ++i)
      accumulator[i] = accumulator[i] * decay + weight * element(values, offset + i * 32 + lane);
    maximum = new_maximum;
  }
  for (int i = 0; i < kElements; ++i) {
    const float x = accumulator[i] / sum;
    output[i * 32 + lane] = static_cast<uint16_t>(T::pack(x, x));
  }
}

}  // namespace relay::cuda
