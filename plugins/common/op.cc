#include "plugins/common/op.h"

#include <cmath>

namespace relay {
namespace {

std::string ToString(const Shape& shape) {
  std::string text = "[";
  for (size_t i = 0; i < shape.size(); ++i) text += (i ? ", " : "") + std::to_string(shape[i]);
  return text + "]";
}

std::string Wrong(Input input, const Shape& shape, const std::string& expected) {
  return std::string(kInputNames[input]) + " has shape " + ToString(shape) + ", expected " + expected;
}

std::string Row(const char* name, int64_t row, int64_t value) {
  return std::string(name) + "[" + std::to_string(row) + "] = " + std::to_string(value);
}

}  // namespace

std::string CheckAttributes(const Attributes& a) {
  if (a.num_heads < 1) return "num_heads = " + std::to_string(a.num_heads) + " must be at least 1";
  if (a.kv_num_heads < 1) return "kv_num_heads = " + std::to_string(a.kv_num_heads) + " must be at least 1";
  if (a.num_heads % a.kv_num_heads != 0) {
    return "num_heads = " + std::to_string(a.num_heads) +
           " is not a multiple of kv_num_heads = " + std::to_string(a.kv_num_heads);
  }
  if (!std::isfinite(a.scale) || a.scale < 0) {
    return "scale = " + std::to_string(a.scale) + " must be finite and positive, or 0 for 1/sqrt(head_dim)";
  }
  if (!std::isfinite(a.softcap) || a.softcap < 0) {
    return "softcap = " + std::to_string(a.softcap) + " must be finite and positive, or 0 for none";
  }
  if (a.local_window_size != -1 && a.local_window_size < 1) {
    return "local_window_size = " + std::to_string(a.local_window_size) +
           " must be at least 1, or -1 for none";
  }
  if (a.do_rotary != 0 && a.do_rotary != 1) {
    return "do_rotary = " + std::to_string(a.do_rotary) + " must be 0 or 1";
  }
  if (a.rotary_interleaved != 0 && a.rotary_interleaved != 1) {
    return "rotary_interleaved = " + std::to_string(a.rotary_interleaved) + " must be 0 or 1";
  }
  return "";
}

std::string CheckInputCount(const Attributes& attributes, size_t count) {
  const size_t expected = InputCount(attributes.do_rotary != 0);
  if (count == expected) return "";
  return "the node has " + std::to_string(count) + " inputs, expected " + std::to_string(expected) +
         (attributes.do_rotary ? " (cos_cache and sin_cache included, as do_rotary = 1)"
                               : " (no cos_cache and sin_cache, as do_rotary = 0)");
}

std::string CheckHeadDim(const Attributes& attributes, const Shape& query) {
  if (query[2] % attributes.num_heads != 0) {
    return Wrong(kQuery, query,
                 "a last dimension that num_heads = " + std::to_string(attributes.num_heads) + " divides");
  }
  const int64_t head_dim = query[2] / attributes.num_heads;
  if (head_dim >= 8 && head_dim % 8 == 0 && head_dim <= kMaxHeadDim) return "";
  return "head_dim = " + std::to_string(head_dim) + " (query " + ToString(query) +
         " with num_heads = " + std::to_string(attributes.num_heads) + ") must be a multiple of 8, at most " +
         std::to_string(kMaxHeadDim);
}

std::string MakeGeometry(const Attributes& attributes, const std::vector<Shape>& inputs, Geometry* geometry) {
  std::string problem = CheckInputCount(attributes, inputs.size());
  if (!problem.empty()) return problem;
  Geometry g;
  g.num_heads = attributes.num_heads;
  g.kv_num_heads = attributes.kv_num_heads;

  const Shape& query = inputs[kQuery];
  if (query.size() != 3) return Wrong(kQuery, query, "[batch, sequence, num_heads * head_dim]");
  g.batch = query[0];
  g.sequence = query[1];
  problem = CheckHeadDim(attributes, query);
  if (!problem.empty()) return problem;
  g.head_dim = query[2] / g.num_heads;

  const Shape new_tokens = {g.batch, g.sequence, g.kv_num_heads * g.head_dim};
  for (Input input : {kKey, kValue}) {
    if (inputs[input] != new_tokens) return Wrong(input, inputs[input], ToString(new_tokens));
  }
  const Shape& past = inputs[kPastKey];
  if (past.size() != 4 || past[0] != g.batch || past[1] != g.kv_num_heads || past[3] != g.head_dim) {
    return Wrong(kPastKey, past,
                 "[" + std::to_string(g.batch) + ", " + std::to_string(g.kv_num_heads) + ", max_context, " +
                     std::to_string(g.head_dim) + "]");
  }
  g.max_context = past[2];
  if (inputs[kPastValue] != past) return Wrong(kPastValue, inputs[kPastValue], ToString(past));
  for (Input input : {kContextLens, kQueryLens}) {
    if (inputs[input] != Shape{g.batch}) return Wrong(input, inputs[input], ToString({g.batch}));
  }
  const Shape& prefix = inputs[kPrefixKey];
  if (prefix.size() != 3 || prefix[0] != g.kv_num_heads || prefix[2] != g.head_dim) {
    return Wrong(
        kPrefixKey, prefix,
        "[" + std::to_string(g.kv_num_heads) + ", prefix_length, " + std::to_string(g.head_dim) + "]");
  }
  g.prefix_length = prefix[1];
  if (inputs[kPrefixValue] != prefix) return Wrong(kPrefixValue, inputs[kPrefixValue], ToString(prefix));

  if (attributes.do_rotary) {
    const Shape& cos = inputs[kCosCache];
    if (cos.size() != 2 || cos[1] < 1 || 2 * cos[1] > g.head_dim) {
      return Wrong(kCosCache, cos,
                   "[max_positions, R/2] with R at most head_dim = " + std::to_string(g.head_dim));
    }
    if (inputs[kSinCache] != cos) return Wrong(kSinCache, inputs[kSinCache], ToString(cos));
    g.max_positions = cos[0];
    g.rotary_dim = 2 * cos[1];
  }
  // lengths and positions are int32 in every kernel
  for (int64_t size : {g.batch * g.sequence * g.group(), g.max_context + g.prefix_length}) {
    if (size > INT32_MAX / 2)
      return "the tensors are too large: " + std::to_string(size) + " rows or positions";
  }
  *geometry = g;
  return "";
}

std::string CheckLengths(const Geometry& g, const int32_t* context_lens, const int32_t* query_lens) {
  for (int64_t b = 0; b < g.batch; ++b) {
    const int64_t context = context_lens[b];
    const int64_t query = query_lens[b];
    if (context < 0) return Row("context_lens", b, context) + " must not be negative";
    if (query < 0) return Row("query_lens", b, query) + " must not be negative";
    if (query > g.sequence) {
      return Row("query_lens", b, query) + " is more than the sequence length " + std::to_string(g.sequence);
    }
    if (context + query > g.max_context) {
      return Row("context_lens", b, context) + " + " + Row("query_lens", b, query) +
             " is more than the cache holds: max_context = " + std::to_string(g.max_context);
    }
    if (g.rotary_dim > 0 && query > 0 && g.prefix_length + context + query > g.max_positions) {
      return "row " + std::to_string(b) + " reaches position " +
             std::to_string(g.prefix_length + context + query - 1) + " (prefix " +
             std::to_string(g.prefix_length) + " + context " + std::to_string(context) + " + query " +
             std::to_string(query) + "), beyond the rotary cache's " + std::to_string(g.max_positions) +
             " positions";
    }
  }
  return "";
}

}  // namespace relay
