// 8 lanes of AVX2 with FMA. Included once, after <immintrin.h> and a target pragma.
#pragma once
#include "exp2_polynomial.h"
#include "numerics.h"

namespace poweropd {

struct Avx2 {
  static constexpr int kLanes = 8;
  using Float = __m256;

  static Float broadcast(float value) { return _mm256_set1_ps(value); }
  static Float max(Float a, Float b) { return _mm256_max_ps(a, b); }
  static Float sub(Float a, Float b) { return _mm256_sub_ps(a, b); }
  static Float add(Float a, Float b) { return _mm256_add_ps(a, b); }
  static Float mul(Float a, Float b) { return _mm256_mul_ps(a, b); }
  static Float fma(Float a, Float b, Float c) { return _mm256_fmadd_ps(a, b, c); }
  static float largest(Float a) {
    float lane[kLanes], result;
    store(lane, a);
    result = lane[0];
    for (int i = 1; i < kLanes; ++i) result = lane[i] > result ? lane[i] : result;
    return result;
  }
  static float total(Float a) {
    float lane[kLanes];
    store(lane, a);
    return ((lane[0] + lane[4]) + (lane[1] + lane[5])) +
           ((lane[2] + lane[6]) + (lane[3] + lane[7]));
  }

  // e^x for x <= 0; 0 below -87.7 and for -inf, NaN for NaN.
  static Float exp(Float x) {
    const Float log2e = broadcast(kLog2e),
                clamped = _mm256_max_ps(broadcast(-88.0f), x);  // not NaN
    const Float whole =
        _mm256_round_ps(mul(clamped, log2e), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    const __m256i exponent = _mm256_add_epi32(_mm256_cvtps_epi32(whole), _mm256_set1_epi32(127));
    const Float power = _mm256_castsi256_ps(_mm256_slli_epi32(exponent, 23));
    return mul(exp2_polynomial<Avx2>(_mm256_fmsub_ps(clamped, log2e, whole)), power);
  }

  static Float load(const float* from) { return _mm256_loadu_ps(from); }
  static Float load(const bf16* from) {
    const __m128i halves = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(halves), 16));
  }
  // Twice as many elements, in an order that store_pair undoes.
  static void load_pair(const float* from, Float& a, Float& b) {
    a = load(from);
    b = load(from + kLanes);
  }
  static void load_pair(const bf16* from, Float& a, Float& b) {
    const __m256i both = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
    a = _mm256_castsi256_ps(_mm256_slli_epi32(both, 16));
    b = _mm256_castsi256_ps(_mm256_and_si256(both, _mm256_set1_epi32(0xffff0000)));
  }
  // The first `count` lanes; the others hold `rest`.
  template <class T>
  static Float load(const T* from, int count, float rest) {
    float lane[kLanes];
    for (int i = 0; i < kLanes; ++i) lane[i] = i < count ? to_float(from[i]) : rest;
    return load(lane);
  }
  static void store(float* to, Float value) { _mm256_storeu_ps(to, value); }
  static void store(bf16* to, Float value) {
    const __m256i halves = _mm256_srli_epi32(round(value), 16);
    const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(halves, halves), 0x08);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm256_castsi256_si128(packed));
  }
  static void store_pair(float* to, Float a, Float b) {
    store(to, a);
    store(to + kLanes, b);
  }
  static void store_pair(bf16* to, Float a, Float b) {
    const __m256i low = _mm256_srli_epi32(round(a), 16);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm256_blend_epi16(low, round(b), 0xaa));
  }
  template <class T>
  static void store(T* to, Float value, int count) {
    T lane[kLanes];
    store(lane, value);
    std::memcpy(to, lane, count * sizeof(T));
  }

 private:
  // To the nearest bf16, ties to even, in the upper halves.
  static __m256i round(Float value) {
    const __m256i bits = _mm256_castps_si256(value);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const __m256i rounded =
        _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
    const __m256i is_nan = _mm256_castps_si256(_mm256_cmp_ps(value, value, _CMP_UNORD_Q));
    return _mm256_blendv_epi8(rounded, _mm256_set1_epi32(0x7fff0000), is_nan);
  }
};

}  // namespace poweropd
