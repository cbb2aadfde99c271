// Vector arithmetic that every kernel shares. Included once per instruction set, see kernels.cc.
#if defined(RELAY_CPU_MATH_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef RELAY_CPU_MATH_INL_H_
#undef RELAY_CPU_MATH_INL_H_
#else
#define RELAY_CPU_MATH_INL_H_
#endif

HWY_BEFORE_NAMESPACE();
namespace relay::cpu {
namespace HWY_NAMESPACE {

namespace hn = hwy::HWY_NAMESPACE;

using Lanes = hn::ScalableTag<float>;
using Vec = hn::Vec<Lanes>;
using IntLanes = hn::RebindToSigned<Lanes>;
inline constexpr int kLanes = static_cast<int>(hn::MaxLanes(Lanes()));

// 2^x for x <= 128. Relative error below 3e-7; 0 below 2^-127, NaN for NaN.
HWY_INLINE Vec Exp2(Vec x) {
  const Lanes d;
  // Adding 1.5 * 2^23 rounds to an integer; 127 more puts the exponent of 2^integer into the lowest bits.
  const Vec magic = hn::Set(d, 12582912.0f + 127.0f);
  x = hn::Max(hn::Set(d, -127.0f), x);  // in this order x86 keeps NaN
  const Vec shifted = hn::Add(x, magic);
  const Vec fraction = hn::Sub(x, hn::Sub(shifted, magic));
  // minimax for 2^f on [-1/2, 1/2], exact at 0
  Vec p = hn::Set(d, 0.001326472731307149f);
  p = hn::MulAdd(p, fraction, hn::Set(d, 0.009671512991189957f));
  p = hn::MulAdd(p, fraction, hn::Set(d, 0.05550733581185341f));
  p = hn::MulAdd(p, fraction, hn::Set(d, 0.24022242426872253f));
  p = hn::MulAdd(p, fraction, hn::Set(d, 0.6931470036506653f));
  p = hn::MulAdd(p, fraction, hn::Set(d, 1.0f));
  const Vec power = hn::BitCast(d, hn::ShiftLeft<23>(hn::BitCast(IntLanes(), shifted)));
  return hn::Mul(p, power);
}

// tanh(x) to a few units in the last place: odd rational approximation, saturated beyond 7.9.
HWY_INLINE Vec Tanh(Vec x) {
  const Lanes d;
  const Vec limit = hn::Set(d, 7.90531110763549805f);
  x = hn::Min(limit, hn::Max(hn::Neg(limit), x));
  const Vec x2 = hn::Mul(x, x);
  Vec p = hn::Set(d, -2.76076847742355e-16f);
  p = hn::MulAdd(p, x2, hn::Set(d, 2.00018790482477e-13f));
  p = hn::MulAdd(p, x2, hn::Set(d, -8.60467152213735e-11f));
  p = hn::MulAdd(p, x2, hn::Set(d, 5.12229709037114e-08f));
  p = hn::MulAdd(p, x2, hn::Set(d, 1.48572235717979e-05f));
  p = hn::MulAdd(p, x2, hn::Set(d, 6.37261928875436e-04f));
  p = hn::MulAdd(p, x2, hn::Set(d, 4.89352455891786e-03f));
  Vec q = hn::Set(d, 1.19825839466702e-06f);
  q = hn::MulAdd(q, x2, hn::Set(d, 1.18534705686654e-04f));
  q = hn::MulAdd(q, x2, hn::Set(d, 2.26843463243900e-03f));
  q = hn::MulAdd(q, x2, hn::Set(d, 4.89352518554385e-03f));
  return hn::Div(hn::Mul(x, p), q);
}

// One vector of a storage type as float.
template <typename D>
HWY_INLINE hn::Vec<D> LoadVec(D d, const float* from) {
  return hn::LoadU(d, from);
}
template <typename D>
HWY_INLINE hn::Vec<D> LoadVec(D d, const hwy::float16_t* from) {
  return hn::PromoteTo(d, hn::LoadU(hn::Rebind<hwy::float16_t, D>(), from));
}

// Converts `count` elements between a storage type and float.
HWY_INLINE void Load(const float* from, int64_t count, float* to) {
  std::memcpy(to, from, static_cast<size_t>(count) * sizeof(float));
}
HWY_INLINE void Store(const float* from, int64_t count, float* to) {
  std::memcpy(to, from, static_cast<size_t>(count) * sizeof(float));
}
template <typename D>
HWY_INLINE void StoreHalf(D d, const float* from, hwy::float16_t* to) {
  const hn::Rebind<hwy::float16_t, D> half;
  hn::StoreU(hn::DemoteTo(half, hn::LoadU(d, from)), half, to);
}
HWY_INLINE void Load(const hwy::float16_t* from, int64_t count, float* to) {
  int64_t i = 0;
  const Lanes lanes;
  const hn::CappedTag<float, 1> one;
  for (; i + kLanes <= count; i += kLanes) hn::StoreU(LoadVec(lanes, from + i), lanes, to + i);
  for (; i < count; ++i) hn::StoreU(LoadVec(one, from + i), one, to + i);
}
HWY_INLINE void Store(const float* from, int64_t count, hwy::float16_t* to) {
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) StoreHalf(Lanes(), from + i, to + i);
  for (; i < count; ++i) StoreHalf(hn::CappedTag<float, 1>(), from + i, to + i);
}
// `count` elements as float: where they lie, or converted into `buffer`.
HWY_INLINE const float* AsFloat(const float* from, int64_t, float*) { return from; }
HWY_INLINE const float* AsFloat(const hwy::float16_t* from, int64_t count, float* buffer) {
  Load(from, count, buffer);
  return buffer;
}

// Sum of the vector's blocks of four lanes.
template <typename D>
HWY_INLINE hn::Vec<hn::FixedTag<float, 4>> SumBlocks(D, hn::Vec<D> v) {
  if constexpr (hn::MaxLanes(D()) == 4) {
    return v;
  } else {
    const hn::Half<D> half;
    return SumBlocks(half, hn::Add(hn::LowerHalf(half, v), hn::UpperHalf(half, v)));
  }
}

// to[column * to_stride + row] = from[row * from_stride + column], both dimensions multiples of four.
HWY_INLINE void Transpose(const float* from, int64_t rows, int64_t columns, int64_t from_stride, float* to,
                          int64_t to_stride) {
  const hn::FixedTag<float, 4> d;
  const hn::RepartitionToWide<decltype(d)> pairs;
  for (int64_t r = 0; r < rows; r += 4) {
    for (int64_t c = 0; c < columns; c += 4) {
      const float* source = from + r * from_stride + c;
      const auto a0 = hn::LoadU(d, source);
      const auto a1 = hn::LoadU(d, source + from_stride);
      const auto a2 = hn::LoadU(d, source + 2 * from_stride);
      const auto a3 = hn::LoadU(d, source + 3 * from_stride);
      const auto b0 = hn::BitCast(pairs, hn::InterleaveLower(d, a0, a1));
      const auto b1 = hn::BitCast(pairs, hn::InterleaveLower(d, a2, a3));
      const auto b2 = hn::BitCast(pairs, hn::InterleaveUpper(d, a0, a1));
      const auto b3 = hn::BitCast(pairs, hn::InterleaveUpper(d, a2, a3));
      float* target = to + c * to_stride + r;
      hn::StoreU(hn::BitCast(d, hn::InterleaveLower(pairs, b0, b1)), d, target);
      hn::StoreU(hn::BitCast(d, hn::InterleaveUpper(pairs, b0, b1)), d, target + to_stride);
      hn::StoreU(hn::BitCast(d, hn::InterleaveLower(pairs, b2, b3)), d, target + 2 * to_stride);
      hn::StoreU(hn::BitCast(d, hn::InterleaveUpper(pairs, b2, b3)), d, target + 3 * to_stride);
    }
  }
}

}  // namespace HWY_NAMESPACE
}  // namespace relay::cpu
HWY_AFTER_NAMESPACE();

#endif  // RELAY_CPU_MATH_INL_H_
