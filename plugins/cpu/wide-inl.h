// Many query rows against the same keys: a vector holds one element of as many rows as it has lanes.
//
// A tile of up to kTileRows rows, transposed, stays in the cache while the keys stream past once. Per block
// of keys S^T = K Q^T, then an online softmax that needs no sum across lanes, then O^T += V^T P. Keys and
// values are used as they lie in memory, one broadcast element at a time.
#if defined(RELAY_CPU_WIDE_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef RELAY_CPU_WIDE_INL_H_
#undef RELAY_CPU_WIDE_INL_H_
#else
#define RELAY_CPU_WIDE_INL_H_
#endif

HWY_BEFORE_NAMESPACE();
namespace relay::cpu {
namespace HWY_NAMESPACE {

// Accumulators of a register tile: kWideVecs vectors of rows times kWideKeys<vectors> keys (or dimensions).
#if HWY_TARGET == HWY_AVX3 || HWY_ARCH_ARM_A64
inline constexpr int kWideVecs = 4;  // 32 registers
template <int kVecs>
inline constexpr int kWideKeys = kVecs == 4   ? 6
                                 : kVecs == 3 ? 8
                                 : kVecs == 2 ? 12
                                              : 16;
template <int kVecs>
inline constexpr int kWideDims = kVecs == 4   ? 4
                                 : kVecs == 1 ? 16
                                              : 8;
#else
inline constexpr int kWideVecs = 2;  // 16 registers
template <int kVecs>
inline constexpr int kWideKeys = kVecs == 2 ? 6 : 8;
template <int kVecs>
inline constexpr int kWideDims = kVecs == 2 ? 4 : 8;
#endif

// The tile of query rows and its softmax state, one lane a row; `stride` floats from one element to the next.
struct WideTile {
  int64_t head_dim;
  int64_t stride;      // rows, rounded up to whole vectors
  const float* query;  // Q^T [head_dim, stride], scaled
  float* o;            // O^T [head_dim, stride]
  float* m;            // [stride]
  float* d;            // [stride]
  const int32_t* lo;   // [stride] first visible key of each row
  const int32_t* hi;   // [stride] one past the last
  float* scores;       // S^T [kBlockKeys, stride]
  float* block_max;    // [stride]
};

// scores[key][row] = K[key] . Q[row] for kKeys keys and kVecs vectors of rows; block_max is kept up.
template <int kVecs, int kKeys>
HWY_INLINE void ScoreTile(const float* HWY_RESTRICT query, const float* HWY_RESTRICT key, int64_t head_dim,
                          int64_t stride, float* HWY_RESTRICT scores, float* HWY_RESTRICT block_max) {
  const Lanes lanes;
  Vec acc[kKeys][kVecs];
  RELAY_UNROLL for (int k = 0; k < kKeys; ++k) {
    RELAY_UNROLL for (int v = 0; v < kVecs; ++v) acc[k][v] = hn::Zero(lanes);
  }
  for (int64_t i = 0; i < head_dim; ++i) {
    Vec q[kVecs];
    RELAY_UNROLL for (int v = 0; v < kVecs; ++v) q[v] = hn::Load(lanes, query + i * stride + v * kLanes);
    RELAY_UNROLL for (int k = 0; k < kKeys; ++k) {
      const Vec element = hn::Set(lanes, key[k * head_dim + i]);
      RELAY_UNROLL for (int v = 0; v < kVecs; ++v) acc[k][v] = hn::MulAdd(element, q[v], acc[k][v]);
    }
  }
  RELAY_UNROLL for (int v = 0; v < kVecs; ++v) {
    Vec largest = hn::Load(lanes, block_max + v * kLanes);
    RELAY_UNROLL for (int k = 0; k < kKeys; ++k) {
      hn::Store(acc[k][v], lanes, scores + k * stride + v * kLanes);
      largest = hn::Max(largest, acc[k][v]);
    }
    hn::Store(largest, lanes, block_max + v * kLanes);
  }
}

// Asks memory for what is needed next while the keys of a block are scored: this block's values, the next
// block's keys. A tile is bound by arithmetic, so the wait for memory hides behind it. (Few rows are bound by
// memory: there the hardware's own prefetching did better, see docs/performance.md.)
struct Ahead {
  // This block begins at key `first`, the next one at `next`; there are `key_count` keys.
  template <typename T>
  HWY_INLINE Ahead(const T* keys, const T* values, int64_t head_dim, int64_t first, int64_t next,
                   int64_t key_count)
      : key(reinterpret_cast<const char*>(keys + next * head_dim)),
        value(reinterpret_cast<const char*>(values + first * head_dim)),
        row_bytes(head_dim * static_cast<int64_t>(sizeof(T))),
        next_count(key_count - next) {}

  // The share of keys [begin, end) of the block.
  HWY_INLINE void Fetch(int64_t begin, int64_t end) const {
    for (int64_t i = begin * row_bytes; i < end * row_bytes; i += 64) __builtin_prefetch(value + i);
    end = HWY_MIN(end, next_count);
    for (int64_t i = begin * row_bytes; i < end * row_bytes; i += 64) __builtin_prefetch(key + i);
  }

  const char* key;
  const char* value;
  int64_t row_bytes;
  int64_t next_count;
};

// scores of `count` keys for kVecs vectors of rows.
template <int kVecs>
HWY_NOINLINE void ScoreKeys(const float* query, const float* key, int64_t count, int64_t head_dim,
                            int64_t stride, float* scores, float* block_max, const Ahead& ahead) {
  constexpr int kKeys = kWideKeys<kVecs>;
  int64_t k = 0;
  for (; k + kKeys <= count; k += kKeys) {
    ahead.Fetch(k, k + kKeys);
    ScoreTile<kVecs, kKeys>(query, key + k * head_dim, head_dim, stride, scores + k * stride, block_max);
  }
  if (k == count) return;
  if (count >= kKeys) {  // the last tile overlaps the one before it, which changes nothing
    k = count - kKeys;
    ScoreTile<kVecs, kKeys>(query, key + k * head_dim, head_dim, stride, scores + k * stride, block_max);
    return;
  }
  for (; k + 2 <= count; k += 2) {
    ScoreTile<kVecs, 2>(query, key + k * head_dim, head_dim, stride, scores + k * stride, block_max);
  }
  if (k < count) {
    ScoreTile<kVecs, 1>(query, key + k * head_dim, head_dim, stride, scores + k * stride, block_max);
  }
}

// o[dim][row] += sum over keys of value[key][dim] * weights[key][row]; kDims dims, kVecs vectors of rows.
template <int kVecs, int kDims>
HWY_INLINE void ValueTile(const float* HWY_RESTRICT weights, const float* HWY_RESTRICT value, int64_t count,
                          int64_t head_dim, int64_t stride, float* HWY_RESTRICT o) {
  const Lanes lanes;
  Vec acc[kDims][kVecs];
  RELAY_UNROLL for (int i = 0; i < kDims; ++i) {
    RELAY_UNROLL for (int v = 0; v < kVecs; ++v) acc[i][v] = hn::Load(lanes, o + i * stride + v * kLanes);
  }
  for (int64_t k = 0; k < count; ++k) {
    Vec p[kVecs];
    RELAY_UNROLL for (int v = 0; v < kVecs; ++v) p[v] = hn::Load(lanes, weights + k * stride + v * kLanes);
    RELAY_UNROLL for (int i = 0; i < kDims; ++i) {
      const Vec element = hn::Set(lanes, value[k * head_dim + i]);
      RELAY_UNROLL for (int v = 0; v < kVecs; ++v) acc[i][v] = hn::MulAdd(element, p[v], acc[i][v]);
    }
  }
  RELAY_UNROLL for (int i = 0; i < kDims; ++i) {
    RELAY_UNROLL for (int v = 0; v < kVecs; ++v) hn::Store(acc[i][v], lanes, o + i * stride + v * kLanes);
  }
}

template <int kVecs>
HWY_NOINLINE void AddValues(const float* weights, const float* value, int64_t count, int64_t head_dim,
                            int64_t stride, float* o) {
  constexpr int kDims = kWideDims<kVecs>;
  int64_t i = 0;
  for (; i + kDims <= head_dim; i += kDims) {
    ValueTile<kVecs, kDims>(weights, value + i, count, head_dim, stride, o + i * stride);
  }
  if (i < head_dim) ValueTile<kVecs, 8>(weights, value + i, count, head_dim, stride, o + i * stride);
}

// Calls body with the number of vectors as a constant for each group of columns of the tile.
template <typename Body>
HWY_INLINE void ForEachColumns(int64_t stride, const Body& body) {
  int64_t column = 0;
  for (; column + kWideVecs * kLanes <= stride; column += kWideVecs * kLanes) {
    body(std::integral_constant<int, kWideVecs>(), column);
  }
  const int64_t rest = (stride - column) / kLanes;
  if (kWideVecs > 3 && rest == 3) body(std::integral_constant<int, HWY_MIN(3, kWideVecs)>(), column);
  if (kWideVecs > 2 && rest == 2) body(std::integral_constant<int, HWY_MIN(2, kWideVecs)>(), column);
  if (rest == 1) body(std::integral_constant<int, 1>(), column);
}

// Softcap and mask of the scores of keys [first, first + count); refreshes block_max.
HWY_NOINLINE void CapAndMask(const WideTile& tile, int64_t first, int64_t count, float cap, bool masked) {
  const Lanes lanes;
  const IntLanes ints;
  const Vec minus_infinity = hn::Set(lanes, -std::numeric_limits<float>::infinity());
  for (int64_t column = 0; column < tile.stride; column += kLanes) {
    const auto lo = hn::Load(ints, tile.lo + column);
    const auto hi = hn::Load(ints, tile.hi + column);
    Vec largest = minus_infinity;
    for (int64_t k = 0; k < count; ++k) {
      float* address = tile.scores + k * tile.stride + column;
      Vec score = hn::Load(lanes, address);
      if (cap != 0.0f) score = hn::Mul(hn::Set(lanes, cap), Tanh(score));
      if (masked) {
        const auto key = hn::Set(ints, static_cast<int32_t>(first + k));
        const auto hidden = hn::Or(hn::Lt(key, lo), hn::Not(hn::Lt(key, hi)));
        score = hn::IfThenElse(hn::RebindMask(lanes, hidden), minus_infinity, score);
      }
      hn::Store(score, lanes, address);
      largest = hn::Max(largest, score);
    }
    hn::Store(largest, lanes, tile.block_max + column);
  }
}

// Scores become weights 2^(s - m), in place; m and d are updated and o is rescaled where m has grown.
HWY_NOINLINE void OnlineSoftmax(const WideTile& tile, int64_t count) {
  const Lanes lanes;
  const Vec minus_infinity = hn::Set(lanes, -std::numeric_limits<float>::infinity());
  for (int64_t column = 0; column < tile.stride; column += kLanes) {
    const Vec old_m = hn::Load(lanes, tile.m + column);
    const Vec m = hn::Max(old_m, hn::Load(lanes, tile.block_max + column));
    // a row without a visible key yet: subtract 0, so that 2^(-inf - m) is 0 and not NaN
    const Vec offset = hn::IfThenZeroElse(hn::Eq(m, minus_infinity), m);
    const Vec rescale = Exp2(hn::Sub(old_m, offset));
    Vec sum0 = hn::Zero(lanes);
    Vec sum1 = hn::Zero(lanes);
    float* scores = tile.scores + column;
    int64_t k = 0;
    for (; k + 2 <= count; k += 2) {
      const Vec p0 = Exp2(hn::Sub(hn::Load(lanes, scores + k * tile.stride), offset));
      const Vec p1 = Exp2(hn::Sub(hn::Load(lanes, scores + (k + 1) * tile.stride), offset));
      hn::Store(p0, lanes, scores + k * tile.stride);
      hn::Store(p1, lanes, scores + (k + 1) * tile.stride);
      sum0 = hn::Add(sum0, p0);
      sum1 = hn::Add(sum1, p1);
    }
    if (k < count) {
      const Vec p = Exp2(hn::Sub(hn::Load(lanes, scores + k * tile.stride), offset));
      hn::Store(p, lanes, scores + k * tile.stride);
      sum0 = hn::Add(sum0, p);
    }
    const Vec d = hn::Load(lanes, tile.d + column);
    hn::Store(hn::MulAdd(d, rescale, hn::Add(sum0, sum1)), lanes, tile.d + column);
    hn::Store(m, lanes, tile.m + column);
    if (!hn::AllTrue(lanes, hn::Eq(old_m, m))) {
      for (int64_t i = 0; i < tile.head_dim; ++i) {
        float* address = tile.o + i * tile.stride + column;
        hn::Store(hn::Mul(hn::Load(lanes, address), rescale), lanes, address);
      }
    }
  }
}

// Adds keys [begin, end) of `key_count` to the state of the tile. float16 is converted block by block.
template <typename T>
HWY_INLINE void AttendWide(const WideTile& tile, const T* key, const T* value, int64_t begin, int64_t end,
                           int64_t key_count, float cap, float* key_block, float* value_block) {
  int32_t lo = 0;
  int32_t hi = INT32_MAX;
  for (int64_t r = 0; r < tile.stride; ++r) {
    lo = HWY_MAX(lo, tile.lo[r]);
    hi = HWY_MIN(hi, tile.hi[r]);
  }
  const int64_t head_dim = tile.head_dim;
  for (int64_t first = begin; first < end; first += kBlockKeys) {
    const int64_t count = HWY_MIN(int64_t{kBlockKeys}, end - first);
    const float* keys = AsFloat(key + first * head_dim, count * head_dim, key_block);
    std::fill_n(tile.block_max, tile.stride, -std::numeric_limits<float>::infinity());
    const Ahead ahead(key, value, head_dim, first, first + count, key_count);
    ForEachColumns(tile.stride, [&](auto vecs, int64_t column) HWY_ATTR {
      ScoreKeys<vecs()>(tile.query + column, keys, count, head_dim, tile.stride, tile.scores + column,
                        tile.block_max + column, ahead);
    });
    const bool masked = first < lo || first + count > hi;
    if (masked || cap != 0.0f) CapAndMask(tile, first, count, cap, masked);
    OnlineSoftmax(tile, count);
    const float* values = AsFloat(value + first * head_dim, count * head_dim, value_block);
    ForEachColumns(tile.stride, [&](auto vecs, int64_t column) HWY_ATTR {
      AddValues<vecs()>(tile.scores + column, values, count, head_dim, tile.stride, tile.o + column);
    });
  }
}

}  // namespace HWY_NAMESPACE
}  // namespace relay::cpu
HWY_AFTER_NAMESPACE();

#endif  // RELAY_CPU_WIDE_INL_H_
