// Rows in and out: rotary embedding, appending to the cache, query rows of a unit, results.
#if defined(RELAY_CPU_ROWS_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef RELAY_CPU_ROWS_INL_H_
#undef RELAY_CPU_ROWS_INL_H_
#else
#define RELAY_CPU_ROWS_INL_H_
#endif

HWY_BEFORE_NAMESPACE();
namespace relay::cpu {
namespace HWY_NAMESPACE {

// Rotates x [head_dim] at an absolute position.
template <typename T>
HWY_INLINE void Rotate(const RelayParams& params, int64_t position, float* HWY_RESTRICT x) {
  const int64_t half = params.geometry.rotary_dim / 2;
  if (half == 0) return;
  alignas(64) float cos_row[kMaxHeadDim / 2];
  alignas(64) float sin_row[kMaxHeadDim / 2];
  const float* HWY_RESTRICT cos =
      AsFloat(static_cast<const T*>(params.cos_cache) + position * half, half, cos_row);
  const float* HWY_RESTRICT sin =
      AsFloat(static_cast<const T*>(params.sin_cache) + position * half, half, sin_row);
  if (params.attributes.rotary_interleaved) {
    for (int64_t i = 0; i < half; ++i) {
      const float a = x[2 * i], b = x[2 * i + 1];
      x[2 * i] = a * cos[i] - b * sin[i];
      x[2 * i + 1] = b * cos[i] + a * sin[i];
    }
  } else {
    float* HWY_RESTRICT y = x + half;
    for (int64_t i = 0; i < half; ++i) {
      const float a = x[i], b = y[i];
      x[i] = a * cos[i] - b * sin[i];
      y[i] = b * cos[i] + a * sin[i];
    }
  }
}

template <typename T>
void Prepare(const RelayParams& params, int64_t batch, int64_t kv_head, float* scratch) {
  const Geometry& g = params.geometry;
  const int64_t cache = (batch * g.kv_num_heads + kv_head) * g.max_context * g.head_dim;
  T* present_key = static_cast<T*>(params.present_key) + cache;
  T* present_value = static_cast<T*>(params.present_value) + cache;
  const size_t bytes = static_cast<size_t>(g.max_context * g.head_dim) * sizeof(T);
  if (params.present_key != params.past_key) {
    std::memcpy(present_key, static_cast<const T*>(params.past_key) + cache, bytes);
  }
  if (params.present_value != params.past_value) {
    std::memcpy(present_value, static_cast<const T*>(params.past_value) + cache, bytes);
  }

  const int64_t context = params.context_lens[batch];
  for (int64_t s = 0; s < params.query_lens[batch]; ++s) {
    const int64_t source = ((batch * g.sequence + s) * g.kv_num_heads + kv_head) * g.head_dim;
    const int64_t target = (context + s) * g.head_dim;
    const T* key = static_cast<const T*>(params.key) + source;
    if (g.rotary_dim > 0) {
      Load(key, g.head_dim, scratch);
      Rotate<T>(params, g.prefix_length + context + s, scratch);
      Store(scratch, g.head_dim, present_key + target);
    } else {
      std::memcpy(present_key + target, key, static_cast<size_t>(g.head_dim) * sizeof(T));
    }
    std::memcpy(present_value + target, static_cast<const T*>(params.value) + source,
                static_cast<size_t>(g.head_dim) * sizeof(T));
  }
  const int64_t width = g.group() * g.head_dim;  // of this kv head in one token's output
  for (int64_t s = params.query_lens[batch]; s < g.sequence; ++s) {
    T* output =
        static_cast<T*>(params.output) + ((batch * g.sequence + s) * g.kv_num_heads + kv_head) * width;
    std::memset(output, 0, static_cast<size_t>(width) * sizeof(T));
  }
}

// The first prefix key and the first context key that a row sees.
HWY_INLINE int64_t FirstPrefixKey(const RelayParams& params, const Row& row) {
  const int64_t window = params.attributes.local_window_size;
  if (window < 0) return 0;
  return HWY_MAX(int64_t{0}, params.geometry.prefix_length + row.context_hi - window);
}
HWY_INLINE int64_t FirstContextKey(const RelayParams& params, const Row& row) {
  return HWY_MAX(int64_t{0}, FirstPrefixKey(params, row) - params.geometry.prefix_length);
}

HWY_INLINE int64_t RowOffset(const Geometry& g, const Row& row, int64_t kv_head) {
  return row.offset + kv_head * g.group() * g.head_dim;
}

// Query row as float, rotated and scaled, zeros up to `stride`.
template <typename T>
HWY_INLINE void LoadQuery(const RelayParams& params, const Row& row, int64_t kv_head, float scale,
                          int64_t stride, float* x) {
  const Geometry& g = params.geometry;
  const int64_t head_dim = g.head_dim;
  Load(static_cast<const T*>(params.query) + RowOffset(g, row, kv_head), head_dim, x);
  Rotate<T>(params, g.prefix_length + row.context_hi - 1, x);
  for (int64_t i = 0; i < head_dim; ++i) x[i] *= scale;
  for (int64_t i = head_dim; i < stride; ++i) x[i] = 0.0f;
}

}  // namespace HWY_NAMESPACE
}  // namespace relay::cpu
HWY_AFTER_NAMESPACE();

#endif  // RELAY_CPU_ROWS_INL_H_
