// 8 lanes in plain C++, for processors without AVX2; compilers make vectors of the loops.
#pragma once
#include "exp2_polynomial.h"
#include "numerics.h"

namespace poweropd {

struct Portable {
  static constexpr int kLanes = 8;
  struct Float {
    float lane[kLanes];
  };

  template <class Make>
  static Float each(Make make) {
    Float result;
    for (int i = 0; i < kLanes; ++i) result.lane[i] = make(i);
    return result;
  }
  static Float broadcast(float value) {
    return each([=](int) { return value; });
  }
  static Float max(Float a, Float b) {
    return each([&](int i) { return a.lane[i] > b.lane[i] ? a.lane[i] : b.lane[i]; });
  }
  static Float sub(Float a, Float b) {
    return each([&](int i) { return a.lane[i] - b.lane[i]; });
  }
  static Float add(Float a, Float b) {
    return each([&](int i) { return a.lane[i] + b.lane[i]; });
  }
  static Float mul(Float a, Float b) {
    return each([&](int i) { return a.lane[i] * b.lane[i]; });
  }
  // Rounded once, also where the processor has no such instruction: the product of two fp32 numbers
  // is exact in fp64, and the sum's second rounding is far below fp32's.
  static Float fma(Float a, Float b, Float c) {
    return each([&](int i) { return float(double(a.lane[i]) * b.lane[i] + c.lane[i]); });
  }
  static float largest(Float a) {
    float result = a.lane[0];
    for (int i = 1; i < kLanes; ++i) result = a.lane[i] > result ? a.lane[i] : result;
    return result;
  }
  static float total(Float a) {
    float result = 0.0f;
    for (int i = 0; i < kLanes; ++i) result += a.lane[i];
    return result;
  }

  // e^x for x <= 0; 0 below -87.7 and for -inf, NaN for NaN.
  static Float exp(Float x) {
    constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it leaves the whole number
    Float fraction, power;
    for (int i = 0; i < kLanes; ++i) {
      const float clamped = x.lane[i] < -88.0f ? -88.0f : x.lane[i];
      const float shifted = clamped * kLog2e + kRound;
      const uint32_t whole = to_bits(shifted) - to_bits(kRound);
      fraction.lane[i] = float(double(clamped) * kLog2e - double(shifted - kRound));
      power.lane[i] = from_bits((whole + 127u) << 23);
    }
    return mul(exp2_polynomial<Portable>(fraction), power);
  }

  template <class T>
  static Float load(const T* from) {
    return each([=](int i) { return to_float(from[i]); });
  }
  // Twice as many elements, in an order that store_pair undoes.
  template <class T>
  static void load_pair(const T* from, Float& a, Float& b) {
    a = load(from);
    b = load(from + kLanes);
  }
  // The first `count` lanes; the others hold `rest`.
  template <class T>
  static Float load(const T* from, int count, float rest) {
    return each([=](int i) { return i < count ? to_float(from[i]) : rest; });
  }
  template <class T>
  static void store(T* to, Float value, int count = kLanes) {
    for (int i = 0; i < count; ++i) narrow(value.lane[i], to + i);
  }
  template <class T>
  static void store_pair(T* to, Float a, Float b) {
    store(to, a);
    store(to + kLanes, b);
  }

 private:
  static void narrow(float value, float* to) { *to = value; }
  // To the nearest bf16, ties to even.
  static void narrow(float value, bf16* to) {
    const uint32_t bits = to_bits(value);
    const uint32_t rounded = (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16;
    to->bits = static_cast<uint16_t>(value != value ? 0x7fffu : rounded);
  }
};

}  // namespace poweropd
