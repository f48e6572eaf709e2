// What the kernels take from CUDA beyond the shared numerics. Built by g++, the same kernels run on
// the SIMT emulator of the tests, which stands in for the CUDA runtime.
#pragma once
#if defined(__CUDACC__)
#include <cuda_runtime.h>
#define POWEROPD_LAUNCH(kernel, grid, block, stream, ...) \
  kernel<<<grid, block, 0, static_cast<cudaStream_t>(stream)>>>(__VA_ARGS__)
#else
#include "simt.h"
#define POWEROPD_LAUNCH(kernel, grid, block, stream, ...) \
  ((void)(stream), simt::launch(grid, block, [=] { kernel(__VA_ARGS__); }))
#endif
#include "numerics.h"

namespace poweropd {

// Two fp32 rounded to the nearest bf16, ties to even; `low` in bits 0 to 15.
__device__ __forceinline__ uint32_t pack_bf16(float low, float high) {
#if defined(__CUDA_ARCH__)
  uint32_t packed;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
  return packed;
#else
  auto rounded = [](float value) -> uint32_t {
    const uint32_t bits = to_bits(value);
    if ((bits & 0x7fffffffu) > 0x7f800000u) return 0x7fffu;
    return (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16;
  };
  return rounded(low) | rounded(high) << 16;
#endif
}

// 16 bytes of logits.
template <class T>
struct Quad;

template <>
struct Quad<float> {
  static constexpr int kSize = 4;
  static __device__ __forceinline__ void unpack(uint4 quad, float (&value)[kSize]) {
    value[0] = from_bits(quad.x);
    value[1] = from_bits(quad.y);
    value[2] = from_bits(quad.z);
    value[3] = from_bits(quad.w);
  }
  static __device__ __forceinline__ uint4 pack(const float (&value)[kSize]) {
    return make_uint4(to_bits(value[0]), to_bits(value[1]), to_bits(value[2]), to_bits(value[3]));
  }
  static __device__ __forceinline__ float one(float value) { return value; }
};

template <>
struct Quad<bf16> {
  static constexpr int kSize = 8;
  static __device__ __forceinline__ void unpack(uint4 quad, float (&value)[kSize]) {
    const uint32_t words[4] = {quad.x, quad.y, quad.z, quad.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      value[2 * i] = from_bits(words[i] << 16);
      value[2 * i + 1] = from_bits(words[i] & 0xffff0000u);
    }
  }
  static __device__ __forceinline__ uint4 pack(const float (&value)[kSize]) {
    return make_uint4(pack_bf16(value[0], value[1]), pack_bf16(value[2], value[3]),
                      pack_bf16(value[4], value[5]), pack_bf16(value[6], value[7]));
  }
  static __device__ __forceinline__ bf16 one(float value) {
    return {static_cast<uint16_t>(pack_bf16(value, 0.0f))};
  }
};

}  // namespace poweropd
