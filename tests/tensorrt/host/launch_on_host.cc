// plugins/cuda/launch.h without a GPU: the op in plain loops over host memory, in float, so that the TensorRT
// adapters can be driven on any machine. Says nothing about the CUDA kernels. Also the three CUDA runtime
// calls that an adapter makes for its barrier words, over malloc.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <vector>

#include "plugins/cuda/launch.h"

namespace {

int launches_with_barrier = 0;

// float16 or bfloat16 at an index
float Load(const void* data, size_t index, relay::cuda::DataType type) {
  uint16_t bits = 0;
  std::memcpy(&bits, static_cast<const uint16_t*>(data) + index, sizeof(bits));
  if (type == relay::cuda::DataType::kBFloat16) {
    const uint32_t wide = static_cast<uint32_t>(bits) << 16;
    float value = 0;
    std::memcpy(&value, &wide, sizeof(value));
    return value;
  }
  _Float16 value = 0;
  std::memcpy(&value, &bits, sizeof(value));
  return static_cast<float>(value);
}

void Store(void* data, size_t index, relay::cuda::DataType type, float value) {
  uint16_t bits = 0;
  if (type == relay::cuda::DataType::kBFloat16) {
    uint32_t wide = 0;
    std::memcpy(&wide, &value, sizeof(wide));
    bits = static_cast<uint16_t>((wide + 0x7FFF + ((wide >> 16) & 1)) >> 16);
  } else {
    const auto half = static_cast<_Float16>(value);
    std::memcpy(&bits, &half, sizeof(bits));
  }
  std::memcpy(static_cast<uint16_t*>(data) + index, &bits, sizeof(bits));
}

using relay::cuda::RelayParams;
using relay::cuda::Status;

// Loads one head of one token, rotated at `position`.
std::vector<float> Rotated(const RelayParams& p, const void* data, size_t offset, int64_t position) {
  std::vector<float> x(static_cast<size_t>(p.head_dim));
  for (int d = 0; d < p.head_dim; ++d) x[d] = Load(data, offset + d, p.dtype);
  const int half = p.rotary_dim / 2;
  const std::vector<float> source = x;
  for (int i = 0; i < half; ++i) {
    const int first = p.rotary_interleaved ? 2 * i : i;
    const int second = p.rotary_interleaved ? 2 * i + 1 : i + half;
    const float cos = Load(p.cos_cache, static_cast<size_t>(position) * half + i, p.dtype);
    const float sin = Load(p.sin_cache, static_cast<size_t>(position) * half + i, p.dtype);
    x[first] = source[first] * cos - source[second] * sin;
    x[second] = source[second] * cos + source[first] * sin;
  }
  return x;
}

void ComputeRow(const RelayParams& p, int b, float scale) {
  const int context = p.context_lens[b];
  const int count = p.query_lens[b];
  const size_t D = static_cast<size_t>(p.head_dim);
  const size_t query_width = p.num_heads * D;
  const size_t key_width = p.kv_num_heads * D;
  const auto cache = [&](int h, int64_t token) {
    return ((static_cast<size_t>(b) * p.kv_num_heads + h) * p.max_context + token) * D;
  };
  for (int s = 0; s < count; ++s) {
    for (int h = 0; h < p.kv_num_heads; ++h) {
      const size_t source = (static_cast<size_t>(b) * p.sequence + s) * key_width + h * D;
      const auto key = Rotated(p, p.key, source, static_cast<int64_t>(p.prefix_length) + context + s);
      for (size_t d = 0; d < D; ++d) {
        Store(p.present_key, cache(h, context + s) + d, p.dtype, key[d]);
        Store(p.present_value, cache(h, context + s) + d, p.dtype, Load(p.value, source + d, p.dtype));
      }
    }
  }
  for (int s = 0; s < count; ++s) {
    const int64_t position = static_cast<int64_t>(p.prefix_length) + context + s;
    for (int h = 0; h < p.num_heads; ++h) {
      const int kv = h / (p.num_heads / p.kv_num_heads);
      const size_t target = (static_cast<size_t>(b) * p.sequence + s) * query_width + h * D;
      const auto query = Rotated(p, p.query, target, position);
      float highest = -std::numeric_limits<float>::infinity();
      std::vector<float> scores;
      const int64_t first =
          p.local_window_size < 0 ? 0 : std::max<int64_t>(0, position - p.local_window_size + 1);
      const auto at = [&](int64_t j, const void* prefix, const void* present, size_t d) {
        return j < p.prefix_length
                   ? Load(prefix, (static_cast<size_t>(kv) * p.prefix_length + j) * D + d, p.dtype)
                   : Load(present, cache(kv, j - p.prefix_length) + d, p.dtype);
      };
      for (int64_t j = first; j <= position; ++j) {
        float score = 0;
        for (size_t d = 0; d < D; ++d) score += query[d] * at(j, p.prefix_key, p.present_key, d);
        score *= scale;
        if (p.softcap > 0) score = p.softcap * std::tanh(score / p.softcap);
        scores.push_back(score);
        highest = std::max(highest, score);
      }
      float sum = 0;
      std::vector<float> output(D, 0.0F);
      for (int64_t j = first; j <= position; ++j) {
        const float weight = std::exp(scores[static_cast<size_t>(j - first)] - highest);
        sum += weight;
        for (size_t d = 0; d < D; ++d) output[d] += weight * at(j, p.prefix_value, p.present_value, d);
      }
      for (size_t d = 0; d < D; ++d) Store(p.output, target + d, p.dtype, output[d] / sum);
    }
  }
}

Status Refuse(Status status, char* message, size_t size, const char* text) {
  if (message && size) std::snprintf(message, size, "%s", text);
  return status;
}

}  // namespace

namespace relay::cuda {

Status check(const RelayParams& p, bool check_pointers, char* message, size_t size) {
  const int D = p.head_dim;
  if (D != 64 && D != 96 && D != 128 && D != 192 && D != 256) {
    return Refuse(Status::kUnsupported, message, size, "head_dim must be 64, 96, 128, 192 or 256");
  }
  if (check_pointers && (!p.query || !p.key || !p.value || !p.past_key || !p.past_value || !p.present_key ||
                         !p.present_value || !p.context_lens || !p.query_lens || !p.output)) {
    return Refuse(Status::kInvalidArgument, message, size, "a tensor's address is null");
  }
  return Status::kOk;
}

size_t workspace_bytes(const RelayParams& p, int sm_count) {
  return static_cast<size_t>(sm_count) * 64 + static_cast<size_t>(p.batch) * p.sequence * p.num_heads * 16;
}

int sm_count() { return 4; }

Status launch(const RelayParams& p, const RelayTuning&, void* workspace, size_t workspace_size, void* barrier,
              CUstream_st*, char* message, size_t size) {
  if (const Status status = check(p, true, message, size); status != Status::kOk) return status;
  if (!workspace || workspace_size < workspace_bytes(p, sm_count())) {
    return Refuse(Status::kWorkspaceTooSmall, message, size, "the workspace is too small");
  }
  std::memset(workspace, 0xAB, workspace_size);  // writes all it was promised, so that a short one shows
  if (barrier) {
    ++launches_with_barrier;
    for (size_t i = 0; i < kBarrierBytes; ++i) {
      if (static_cast<char*>(barrier)[i])
        return Refuse(Status::kCudaError, message, size, "barrier not cleared");
    }
  }
  const size_t cache = static_cast<size_t>(p.batch) * p.kv_num_heads * p.max_context * p.head_dim * 2;
  if (p.past_key != p.present_key) std::memcpy(p.present_key, p.past_key, cache);
  if (p.past_value != p.present_value) std::memcpy(p.present_value, p.past_value, cache);
  const size_t width = static_cast<size_t>(p.num_heads) * p.head_dim;
  std::memset(p.output, 0, static_cast<size_t>(p.batch) * p.sequence * width * 2);
  const float scale = p.scale != 0 ? p.scale : 1 / std::sqrt(static_cast<float>(p.head_dim));
  for (int b = 0; b < p.batch; ++b) {
    const int64_t context = p.context_lens[b];
    const int64_t count = p.query_lens[b];
    const bool beyond = p.rotary_dim > 0 && count > 0 && p.prefix_length + context + count > p.max_positions;
    if (context < 0 || count < 0 || count > p.sequence || context + count > p.max_context || beyond) {
      for (size_t i = 0; i < p.sequence * width; ++i)
        Store(p.output, b * p.sequence * width + i, p.dtype, NAN);
      continue;
    }
    ComputeRow(p, b, scale);
  }
  return Status::kOk;
}

}  // namespace relay::cuda

extern "C" __attribute__((visibility("default"))) int host_launches_with_barrier() {
  return launches_with_barrier;
}
