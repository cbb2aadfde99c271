// Few query rows: a vector holds consecutive elements of one row of head_dim. Each key and value is read once
// for a group of rows; the work is bound by memory, so sums across lanes are merely kept cheap (four keys at
// a time).
#if defined(RELAY_CPU_NARROW_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef RELAY_CPU_NARROW_INL_H_
#undef RELAY_CPU_NARROW_INL_H_
#else
#define RELAY_CPU_NARROW_INL_H_
#endif

HWY_BEFORE_NAMESPACE();
namespace relay::cpu {
namespace HWY_NAMESPACE {

#if HWY_TARGET == HWY_AVX3 || HWY_ARCH_ARM_A64
inline constexpr int kNarrowRows = 4;
inline constexpr int kNarrowVecs = 4;  // vectors of head_dim that are accumulated at a time
#else
inline constexpr int kNarrowRows = 2;
inline constexpr int kNarrowVecs = 4;
#endif

struct NarrowRows {
  int64_t head_dim;
  int64_t stride;      // head_dim rounded up to whole vectors
  const float* query;  // [rows, stride], scaled, zeros past head_dim
  float* o;            // [rows, stride]
  float* m;            // [rows]
  float* d;            // [rows]
  const int32_t* lo;   // [rows] first visible key
  const int32_t* hi;   // [rows] one past the last
  float* scores;       // [kNarrowRows, kBlockKeys]
};

// Lane i of the result (i < 4) is the sum over all lanes of the i-th vector.
HWY_INLINE hn::Vec<hn::FixedTag<float, 4>> SumLanes(Vec v0, Vec v1, Vec v2, Vec v3) {
  const Lanes lanes;
  const hn::RepartitionToWide<Lanes> pairs;
  const Vec a = hn::Add(hn::InterleaveLower(lanes, v0, v1), hn::InterleaveUpper(lanes, v0, v1));
  const Vec b = hn::Add(hn::InterleaveLower(lanes, v2, v3), hn::InterleaveUpper(lanes, v2, v3));
  const auto a2 = hn::BitCast(pairs, a);
  const auto b2 = hn::BitCast(pairs, b);
  return SumBlocks(lanes, hn::Add(hn::BitCast(lanes, hn::InterleaveLower(pairs, a2, b2)),
                                  hn::BitCast(lanes, hn::InterleaveUpper(pairs, a2, b2))));
}

// A vector of a key or value. kPartial: the last one where head_dim fills only its lower half, the rest is
// zero (head_dim is a multiple of eight, so that happens with sixteen lanes only).
template <bool kPartial, typename T>
HWY_INLINE Vec LoadRow(const T* from) {
  const Lanes lanes;
  if constexpr (kPartial) {
    return hn::ZeroExtendVector(lanes, LoadVec(hn::Half<Lanes>(), from));
  } else {
    return LoadVec(lanes, from);
  }
}

// scores[row][key] for kRows rows and kKeys consecutive keys; kKeys is 4, or 1 for what is left over.
template <int kRows, int kKeys, typename T>
HWY_INLINE void ScoreFew(const NarrowRows& rows, const float* HWY_RESTRICT query, const T* HWY_RESTRICT key,
                         float* HWY_RESTRICT scores) {
  const Lanes lanes;
  const int64_t head_dim = rows.head_dim;
  const int64_t stride = rows.stride;
  Vec acc[kRows][kKeys];
  RELAY_UNROLL for (int r = 0; r < kRows; ++r) {
    RELAY_UNROLL for (int k = 0; k < kKeys; ++k) acc[r][k] = hn::Zero(lanes);
  }
  const auto add = [&](auto partial, int64_t i) HWY_ATTR {
    Vec keys[kKeys];
    RELAY_UNROLL for (int k = 0; k < kKeys; ++k) keys[k] = LoadRow<partial()>(key + k * head_dim + i);
    RELAY_UNROLL for (int r = 0; r < kRows; ++r) {
      const Vec q = hn::Load(lanes, query + r * stride + i);
      RELAY_UNROLL for (int k = 0; k < kKeys; ++k) acc[r][k] = hn::MulAdd(q, keys[k], acc[r][k]);
    }
  };
  int64_t i = 0;
  for (; i + kLanes <= head_dim; i += kLanes) add(std::false_type(), i);
  if constexpr (kLanes > 8) {
    if (i < head_dim) add(std::true_type(), i);
  }
  RELAY_UNROLL for (int r = 0; r < kRows; ++r) {
    if constexpr (kKeys == 4) {
      hn::StoreU(SumLanes(acc[r][0], acc[r][1], acc[r][2], acc[r][3]), hn::FixedTag<float, 4>(),
                 scores + r * kBlockKeys);
    } else {
      scores[r * kBlockKeys] = hn::GetLane(hn::SumOfLanes(lanes, acc[r][0]));
    }
  }
}

template <int kRows, typename T>
HWY_NOINLINE void ScoreNarrow(const NarrowRows& rows, const float* query, const T* key, int64_t count) {
  int64_t k = 0;
  for (; k + 4 <= count; k += 4) ScoreFew<kRows, 4>(rows, query, key + k * rows.head_dim, rows.scores + k);
  for (; k < count; ++k) ScoreFew<kRows, 1>(rows, query, key + k * rows.head_dim, rows.scores + k);
}

// o[row][i..] += sum over keys of weights[row][key] * value[key][i..], for kRows rows and kVecs vectors.
template <int kRows, int kVecs, bool kPartial, typename T>
HWY_NOINLINE void AddValueColumns(const NarrowRows& rows, int64_t first_row, const T* HWY_RESTRICT value,
                                  int64_t count, int64_t i, const float* HWY_RESTRICT weights) {
  const Lanes lanes;
  float* HWY_RESTRICT o = rows.o + first_row * rows.stride + i;
  Vec acc[kRows][kVecs];
  RELAY_UNROLL for (int r = 0; r < kRows; ++r) {
    RELAY_UNROLL for (int v = 0; v < kVecs; ++v) acc[r][v] =
        hn::Load(lanes, o + r * rows.stride + v * kLanes);
  }
  for (int64_t k = 0; k < count; ++k) {
    Vec values[kVecs];
    RELAY_UNROLL for (int v = 0; v < kVecs; ++v) {
      values[v] = LoadRow<kPartial>(value + k * rows.head_dim + i + v * kLanes);
    }
    RELAY_UNROLL for (int r = 0; r < kRows; ++r) {
      const Vec p = hn::Set(lanes, weights[r * kBlockKeys + k]);
      RELAY_UNROLL for (int v = 0; v < kVecs; ++v) acc[r][v] = hn::MulAdd(p, values[v], acc[r][v]);
    }
  }
  RELAY_UNROLL for (int r = 0; r < kRows; ++r) {
    RELAY_UNROLL for (int v = 0; v < kVecs; ++v)
        hn::Store(acc[r][v], lanes, o + r * rows.stride + v * kLanes);
  }
}

// Scores of one row become weights, in place; returns by how much the row's o has to be rescaled.
HWY_NOINLINE float OnlineSoftmaxRow(const NarrowRows& rows, int64_t row, int64_t first, int64_t count,
                                    float cap, float* scores) {
  const Lanes lanes;
  const float minus_infinity = -std::numeric_limits<float>::infinity();
  const int64_t padded = (count + kLanes - 1) / kLanes * kLanes;
  if (cap != 0.0f) {
    for (int64_t k = 0; k < padded; k += kLanes) {
      hn::Store(hn::Mul(hn::Set(lanes, cap), Tanh(hn::Load(lanes, scores + k))), lanes, scores + k);
    }
  }
  for (int64_t k = 0; k < HWY_MIN(count, rows.lo[row] - first); ++k) scores[k] = minus_infinity;
  for (int64_t k = HWY_MAX(int64_t{0}, rows.hi[row] - first); k < count; ++k) scores[k] = minus_infinity;
  for (int64_t k = count; k < padded; ++k) scores[k] = minus_infinity;

  Vec largest = hn::Load(lanes, scores);
  for (int64_t k = kLanes; k < padded; k += kLanes) largest = hn::Max(largest, hn::Load(lanes, scores + k));
  const float old_m = rows.m[row];
  const float m = HWY_MAX(old_m, hn::GetLane(hn::MaxOfLanes(lanes, largest)));
  const float offset = m == minus_infinity ? 0.0f : m;
  const float rescale = hn::GetLane(Exp2(hn::Set(lanes, old_m - offset)));
  Vec sum = hn::Zero(lanes);
  for (int64_t k = 0; k < padded; k += kLanes) {
    const Vec p = Exp2(hn::Sub(hn::Load(lanes, scores + k), hn::Set(lanes, offset)));
    hn::Store(p, lanes, scores + k);
    sum = hn::Add(sum, p);
  }
  rows.d[row] = rows.d[row] * rescale + hn::GetLane(hn::SumOfLanes(lanes, sum));
  rows.m[row] = m;
  return rescale;
}

// Adds one block of keys to kRows rows.
template <int kRows, typename T>
HWY_INLINE void AttendBlock(const NarrowRows& rows, int64_t first_row, const T* key, const T* value,
                            int64_t first, int64_t count, float cap) {
  const int64_t head_dim = rows.head_dim;
  ScoreNarrow<kRows>(rows, rows.query + first_row * rows.stride, key, count);
  const Lanes lanes;
  for (int r = 0; r < kRows; ++r) {
    const float rescale =
        OnlineSoftmaxRow(rows, first_row + r, first, count, cap, rows.scores + r * kBlockKeys);
    if (rescale == 1.0f) continue;
    float* o = rows.o + (first_row + r) * rows.stride;
    for (int64_t i = 0; i < rows.stride; i += kLanes) {
      hn::Store(hn::Mul(hn::Load(lanes, o + i), hn::Set(lanes, rescale)), lanes, o + i);
    }
  }
  int64_t i = 0;
  for (; i + kNarrowVecs * kLanes <= head_dim; i += kNarrowVecs * kLanes) {
    AddValueColumns<kRows, kNarrowVecs, false>(rows, first_row, value, count, i, rows.scores);
  }
  for (; i + kLanes <= head_dim; i += kLanes) {
    AddValueColumns<kRows, 1, false>(rows, first_row, value, count, i, rows.scores);
  }
  if constexpr (kLanes > 8) {
    if (i < head_dim) AddValueColumns<kRows, 1, true>(rows, first_row, value, count, i, rows.scores);
  }
}

// Adds keys [begin, end) to the states of `row_count` rows. float16 is converted as it is read.
template <typename T>
HWY_INLINE void AttendNarrow(const NarrowRows& rows, int64_t row_count, const T* key, const T* value,
                             int64_t begin, int64_t end, float cap) {
  const int64_t head_dim = rows.head_dim;
  for (int64_t first = begin; first < end; first += kBlockKeys) {
    const int64_t count = HWY_MIN(int64_t{kBlockKeys}, end - first);
    const T* keys = key + first * head_dim;
    const T* values = value + first * head_dim;
    int64_t r = 0;
    for (; r + kNarrowRows <= row_count; r += kNarrowRows) {
      AttendBlock<kNarrowRows>(rows, r, keys, values, first, count, cap);
    }
    if (kNarrowRows > 2 && r + 3 == row_count) {
      AttendBlock<HWY_MIN(3, kNarrowRows)>(rows, r, keys, values, first, count, cap);
    } else if (kNarrowRows > 2 && r + 2 == row_count) {
      AttendBlock<HWY_MIN(2, kNarrowRows)>(rows, r, keys, values, first, count, cap);
    } else if (r + 1 == row_count) {
      AttendBlock<1>(rows, r, keys, values, first, count, cap);
    }
  }
}

}  // namespace HWY_NAMESPACE
}  // namespace relay::cpu
HWY_AFTER_NAMESPACE();

#endif  // RELAY_CPU_NARROW_INL_H_
