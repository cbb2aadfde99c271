// relay::RelayAttention as every adapter sees it: names, attributes, shapes, and the checks they share.
// plugins/schema.py holds the same definition for Python; a test keeps the two equal.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

namespace relay {

inline constexpr char kOpDomain[] = "relay";
inline constexpr char kOpName[] = "RelayAttention";
inline constexpr int kOpSinceVersion = 1;
inline constexpr int kMaxHeadDim = 256;

enum Input : size_t {
  kQuery,        // [B, S, Hq*D]
  kKey,          // [B, S, Hkv*D]
  kValue,        // [B, S, Hkv*D]
  kPastKey,      // [B, Hkv, Cmax, D]
  kPastValue,    // [B, Hkv, Cmax, D]
  kContextLens,  // [B] int32
  kQueryLens,    // [B] int32
  kPrefixKey,    // [Hkv, P, D]
  kPrefixValue,  // [Hkv, P, D]
  kCosCache,     // [max_pos, R/2], only with do_rotary=1
  kSinCache,     // [max_pos, R/2], only with do_rotary=1
  kInputCount,
};
enum Output : size_t { kOutput, kPresentKey, kPresentValue, kOutputCount };

inline constexpr const char* kInputNames[kInputCount] = {
    "query",      "key",        "value",        "past_key",  "past_value", "context_lens",
    "query_lens", "prefix_key", "prefix_value", "cos_cache", "sin_cache"};
inline constexpr const char* kOutputNames[kOutputCount] = {"output", "present_key", "present_value"};

// Inputs of a node: the rotary caches are there exactly when the node rotates.
inline constexpr size_t InputCount(bool do_rotary) { return do_rotary ? kInputCount : kCosCache; }

struct Attributes {
  int64_t num_heads = 0;
  int64_t kv_num_heads = 0;
  float scale = 0.0f;              // 0 = 1/sqrt(head_dim)
  float softcap = 0.0f;            // 0 = none
  int64_t local_window_size = -1;  // -1 = none
  int64_t do_rotary = 0;
  int64_t rotary_interleaved = 0;
};

// Sizes of one call, in elements.
struct Geometry {
  int64_t batch = 0;          // B
  int64_t sequence = 0;       // S
  int64_t num_heads = 0;      // Hq
  int64_t kv_num_heads = 0;   // Hkv
  int64_t head_dim = 0;       // D
  int64_t max_context = 0;    // Cmax
  int64_t prefix_length = 0;  // P
  int64_t rotary_dim = 0;     // R, 0 = no rotary
  int64_t max_positions = 0;  // rows of the rotary caches

  int64_t group() const { return num_heads / kv_num_heads; }
};

using Shape = std::vector<int64_t>;

// Each check returns an empty string, or one sentence that says which argument is wrong and its value.
std::string CheckAttributes(const Attributes& attributes);

// `count` inputs of a node; known when the node is.
std::string CheckInputCount(const Attributes& attributes, size_t count);
// `query`: [batch, sequence, num_heads * head_dim], the first two may be unknown (-1).
std::string CheckHeadDim(const Attributes& attributes, const Shape& query);

// Derives the geometry from the shapes of all inputs of a node, or says which of them disagree.
std::string MakeGeometry(const Attributes& attributes, const std::vector<Shape>& inputs, Geometry* geometry);

// Checks lengths that are readable on the host, `geometry.batch` numbers each.
std::string CheckLengths(const Geometry& geometry, const int32_t* context_lens, const int32_t* query_lens);

}  // namespace relay
