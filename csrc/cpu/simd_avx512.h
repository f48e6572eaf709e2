// 16 lanes of AVX-512. Included once, after <immintrin.h> and a target pragma.
#pragma once
#include "numerics.h"

namespace poweropd {

struct Avx512 {
  static constexpr int kLanes = 16;
  using Float = __m512;

  static Float broadcast(float value) { return _mm512_set1_ps(value); }
  static Float max(Float a, Float b) { return _mm512_max_ps(a, b); }
  static Float sub(Float a, Float b) { return _mm512_sub_ps(a, b); }
  static Float add(Float a, Float b) { return _mm512_add_ps(a, b); }
  static Float mul(Float a, Float b) { return _mm512_mul_ps(a, b); }
  static Float fma(Float a, Float b, Float c) { return _mm512_fmadd_ps(a, b, c); }
  static float largest(Float a) { return _mm512_reduce_max_ps(a); }
  static float total(Float a) { return _mm512_reduce_add_ps(a); }

  // e^x for x <= 0; 0 below -104 and for -inf, NaN for NaN. 2^(x log2 e) is the product of a whole
  // power, a root from the table, and a parabola on [-1/64, 1/64] with 5e-8 relative error.
  static Float exp(Float x) {
    const Float log2e = broadcast(kLog2e), clamped = max(broadcast(kLowestExponent), x);  // not NaN
    const Float rounder = broadcast(393216.0f);  // 1.5 * 2^18: adding it leaves a multiple of 1/32
    const Float shifted = fma(clamped, log2e, rounder), rounded = sub(shifted, rounder);
    const Float fraction = _mm512_fmsub_ps(clamped, log2e, rounded);
    const Float root = _mm512_permutex2var_ps(_mm512_load_ps(kRoots), _mm512_castps_si512(shifted),
                                              _mm512_load_ps(kRoots + kLanes));
    const Float slope = fma(broadcast(2.4022651e-1f), fraction, broadcast(6.9315734e-1f));
    return _mm512_scalef_ps(fma(mul(root, fraction), slope, root), rounded);
  }

  static Float load(const float* from) { return _mm512_loadu_ps(from); }
  // Twice as many elements, in an order that store_pair undoes.
  static void load_pair(const float* from, Float& a, Float& b) {
    a = load(from);
    b = load(from + kLanes);
  }
  static void load_pair(const bf16* from, Float& a, Float& b) {
    const __m512i both = _mm512_loadu_si512(from);
    a = _mm512_castsi512_ps(_mm512_slli_epi32(both, 16));
    b = _mm512_castsi512_ps(_mm512_and_si512(both, _mm512_set1_epi32(0xffff0000)));
  }
  // The first `count` lanes; the others hold `rest`.
  static Float load(const float* from, int count, float rest) {
    return _mm512_mask_loadu_ps(broadcast(rest), mask(count), from);
  }
  static Float load(const bf16* from, int count, float rest) {
    const Float loaded = widen(_mm256_maskz_loadu_epi16(mask(count), from));
    return _mm512_mask_blend_ps(mask(count), broadcast(rest), loaded);
  }
  static void store(float* to, Float value) { _mm512_storeu_ps(to, value); }
  static void store_pair(float* to, Float a, Float b) {
    store(to, a);
    store(to + kLanes, b);
  }
  static void store_pair(bf16* to, Float a, Float b) {
    const __m512i low = _mm512_srli_epi32(round(a), 16);
    _mm512_storeu_si512(to, _mm512_mask_blend_epi16(0xaaaaaaaa, low, round(b)));
  }
  static void store(float* to, Float value, int count) {
    _mm512_mask_storeu_ps(to, mask(count), value);
  }
  static void store(bf16* to, Float value, int count) {
    _mm256_mask_storeu_epi16(to, mask(count), narrow(value));
  }

 private:
  static __mmask16 mask(int count) { return static_cast<__mmask16>((1u << count) - 1u); }
  static Float widen(__m256i halves) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16));
  }
  static __m256i narrow(Float value) {
    return _mm512_cvtepi32_epi16(_mm512_srli_epi32(round(value), 16));
  }
  // To the nearest bf16, ties to even, in the upper halves. The processor's own conversion flushes
  // denormals. A NaN that arithmetic made stays one when it is cut.
  static __m512i round(Float value) {
    const __m512i bits = _mm512_castps_si512(value);
    const __mmask16 is_odd = _mm512_test_epi32_mask(bits, _mm512_set1_epi32(0x10000));
    const __m512i half =
        _mm512_mask_blend_epi32(is_odd, _mm512_set1_epi32(0x7fff), _mm512_set1_epi32(0x8000));
    const __mmask16 is_number = _mm512_cmp_ps_mask(value, value, _CMP_ORD_Q);
    return _mm512_mask_add_epi32(bits, is_number, bits, half);
  }

  // 2^(k/32)
  alignas(64) static constexpr float kRoots[2 * kLanes] = {
      1.0f,        1.02189715f, 1.04427378f, 1.0671404f,  1.09050773f, 1.11438674f, 1.13878863f,
      1.16372486f, 1.18920712f, 1.21524736f, 1.24185781f, 1.26905096f, 1.29683955f, 1.32523664f,
      1.35425555f, 1.38390988f, 1.41421356f, 1.44518081f, 1.47682615f, 1.50916443f, 1.54221083f,
      1.57598085f, 1.61049033f, 1.64575548f, 1.68179283f, 1.7186193f,  1.75625216f, 1.79470908f,
      1.83400809f, 1.87416763f, 1.91520656f, 1.95714412f};
};

}  // namespace poweropd
