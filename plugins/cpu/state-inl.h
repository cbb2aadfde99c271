// The softmax state of one query row over some keys, and how two of them are fused.
#if defined(RELAY_CPU_STATE_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef RELAY_CPU_STATE_INL_H_
#undef RELAY_CPU_STATE_INL_H_
#else
#define RELAY_CPU_STATE_INL_H_
#endif

HWY_BEFORE_NAMESPACE();
namespace relay::cpu {
namespace HWY_NAMESPACE {

// Scores are in base 2 throughout: s = score * log2(e), so that e^score = 2^s. After FlashInfer's state_t.
struct State {
  float* o;  // [head_dim]: sum of 2^(s - m) * value over the keys
  float m;   // largest s, -inf where there is no key
  float d;   // sum of 2^(s - m)
  int64_t head_dim;

  // Adds the keys of `other`. No key on one side leaves the other side's result.
  HWY_INLINE void Merge(const float* other_o, float other_m, float other_d) {
    const float largest = HWY_MAX(m, other_m);
    if (!(largest != -std::numeric_limits<float>::infinity())) return;  // no key on either side
    const float weight = std::exp2(m - largest);
    const float other_weight = std::exp2(other_m - largest);
    d = d * weight + other_d * other_weight;
    m = largest;
    for (int64_t i = 0; i < head_dim; ++i) o[i] = o[i] * weight + other_o[i] * other_weight;
  }

  // o becomes the attention output: the weighted mean of the values, 0 where there is no key.
  HWY_INLINE void Normalize() {
    const float scale = d == 0.0f ? 0.0f : 1.0f / d;
    for (int64_t i = 0; i < head_dim; ++i) o[i] *= scale;
  }
};

}  // namespace HWY_NAMESPACE
}  // namespace relay::cpu
HWY_AFTER_NAMESPACE();

#endif  // RELAY_CPU_STATE_INL_H_
