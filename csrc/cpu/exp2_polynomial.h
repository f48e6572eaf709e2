#pragma once

namespace poweropd {

// 2^x on [-0.5, 0.5], fitted for the least relative error.
template <class Simd>
typename Simd::Float exp2_polynomial(typename Simd::Float x) {
  typename Simd::Float result = Simd::broadcast(1.5403530394e-4f);
  for (const float coefficient : {1.3333558146e-3f, 9.6181291076e-3f, 5.5504108665e-2f,
                                  2.4022650696e-1f, 6.9314718056e-1f, 1.0f}) {
    result = Simd::fma(result, x, Simd::broadcast(coefficient));
  }
  return result;
}

}  // namespace poweropd
