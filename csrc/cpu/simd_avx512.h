// 16 lanes of AVX-512. Included once, after <immintrin.h> and a target pragma.
#pragma once
#include "exp2_polynomial.h"
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

  // e^x for x <= 0; 0 below -104 and for -inf, NaN for NaN.
  static Float exp(Float x) {
    const Float log2e = broadcast(kLog2e), clamped = max(broadcast(kLowestExponent), x);  // not NaN
    const Float whole =
        _mm512_roundscale_ps(mul(clamped, log2e), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    const Float fraction = _mm512_fmsub_ps(clamped, log2e, whole);
    return _mm512_scalef_ps(exp2_polynomial<Avx512>(fraction), whole);
  }

  static Float load(const float* from) { return _mm512_loadu_ps(from); }
  static Float load(const bf16* from) {
    return widen(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
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
  static void store(bf16* to, Float value) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), narrow(value));
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
  // To the nearest bf16, ties to even. The processor's own conversion flushes denormals.
  static __m256i narrow(Float value) {
    const __m512i bits = _mm512_castps_si512(value);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const __m512i rounded =
        _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
    const __mmask16 is_nan = _mm512_cmp_ps_mask(value, value, _CMP_UNORD_Q);
    const __m512i chosen = _mm512_mask_blend_epi32(is_nan, rounded, _mm512_set1_epi32(0x7fff0000));
    return _mm512_cvtepi32_epi16(_mm512_srli_epi32(chosen, 16));
  }
};

}  // namespace poweropd
