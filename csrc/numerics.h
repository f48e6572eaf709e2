// The numerics that the CPU and the CUDA kernels share: softmax state, log-prob, entropy, rewards.
//
// A logit meets the maximum of its row before anything else: their difference is exact where it
// matters, however large both are. Scaled to log2 units first, |z| = 1000 would cost 1.5e-5.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__CUDACC__)
#define POWEROPD_HD __host__ __device__ __forceinline__
#else
#define POWEROPD_HD inline
#endif

namespace poweropd {

constexpr float kLog2e = 1.4426950408889634f;

// Rows with this target are not read; their results are zero.
constexpr int64_t kIgnoredTarget = -100;

// Below this exponent an exponential is zero in fp32. What an exponential is multiplied with is
// held to it: 0 * -inf would be NaN, and a sum times the difference of a masked logit overflows.
constexpr float kLowestExponent = -150.0f;

struct bf16 {
  uint16_t bits;
};

POWEROPD_HD float from_bits(uint32_t bits) {
#if defined(__CUDA_ARCH__)
  return __uint_as_float(bits);
#else
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
#endif
}

POWEROPD_HD uint32_t to_bits(float value) {
#if defined(__CUDA_ARCH__)
  return __float_as_uint(value);
#else
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
#endif
}

POWEROPD_HD float negative_infinity() { return from_bits(0xff800000u); }
POWEROPD_HD float to_float(float value) { return value; }
POWEROPD_HD float to_float(bf16 value) { return from_bits(uint32_t(value.bits) << 16); }

// e^x for x <= 0; 0 for -inf.
POWEROPD_HD float exp_fast(float x) {
#if defined(__CUDA_ARCH__)
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x * kLog2e));
  return y;
#else
  return expf(x);
#endif
}

// What a softmax needs to know of some of a row's columns: the maximum m of the logits, the sum of
// e^(z - m), and the same sum weighted with z - m.
// A NaN column makes `sum` NaN; `maximum` may pass over it.
struct SoftmaxState {
  float maximum;
  float sum;
  float weighted;
};

POWEROPD_HD SoftmaxState merge(SoftmaxState a, SoftmaxState b) {
  const float maximum = fmaxf(a.maximum, b.maximum);
  if (maximum == negative_infinity()) return {maximum, a.sum + b.sum, 0.0f};
  const float from_a = a.maximum - maximum, from_b = b.maximum - maximum;
  const float scale_a = exp_fast(from_a), scale_b = exp_fast(from_b);
  SoftmaxState merged;
  merged.maximum = maximum;
  merged.sum = a.sum * scale_a + b.sum * scale_b;
  merged.weighted = scale_a * (a.weighted + a.sum * fmaxf(from_a, kLowestExponent)) +
                    scale_b * (b.weighted + b.sum * fmaxf(from_b, kLowestExponent));
  return merged;
}

POWEROPD_HD float log_prob(SoftmaxState state, float target_logit) {
  return (target_logit - state.maximum) - logf(state.sum);
}

POWEROPD_HD float entropy(SoftmaxState state) {
  return logf(state.sum) - state.weighted / state.sum;
}

// The order is that of the Python side's REWARD_KINDS.
enum class RewardKind : int { power, box_cox, log_ratio, clip, tanh };

// Zero for equal log-probs, both of them -inf included. power and box_cox take alpha as `a`, clip
// its bounds as `a` and `b`, tanh its scale as `a`. The power is taken of the larger probability
// and the rest by expm1, so that nothing overflows and near-equal ones keep their relative
// accuracy.
POWEROPD_HD float token_reward(RewardKind kind, float teacher, float student, float a, float b) {
  if (teacher == student) return 0.0f;
  const float difference = teacher - student;
  if (kind == RewardKind::log_ratio) return difference;
  if (kind == RewardKind::clip) return difference < a ? a : difference > b ? b : difference;
  if (kind == RewardKind::tanh) return tanhf(difference / a);
  const float larger = difference > 0.0f ? teacher : student;
  const float size = expf(a * larger) * -expm1f(-a * fabsf(difference));
  const float reward = difference > 0.0f ? size : -size;
  return kind == RewardKind::box_cox ? reward / a : reward;
}

}  // namespace poweropd
