// The CUDA kernels: plain loads and stores, shuffles and barriers, so that an interpreter of PTX
// can execute what nvcc makes of them. One block works on one row.
#pragma once
#include "port.h"
#include "rows.h"

namespace poweropd {

constexpr int kWarp = 32;
constexpr int kUnroll = 4;  // 16-byte loads in flight per thread

// How a row falls into single elements before the first 16-byte boundary, whole quads, and a tail.
// Head and tail are shorter than a quad, and the first `lead` quads end at a 128-byte line, from
// where a warp writes whole lines: a thread has at most one of each. Sums don't start there, since
// their last bits would then depend on where the logits are.
template <class T>
struct RowParts {
  int head;
  int lead;
  int quads;
  int tail;

  __device__ __forceinline__ RowParts(const T* row, int columns) {
    const int misaligned = int(reinterpret_cast<uintptr_t>(row) & 127);
    head = ((16 - misaligned) & 15) / int(sizeof(T));
    if (head > columns) head = columns;
    quads = (columns - head) / Quad<T>::kSize;
    lead = ((128 - misaligned) & 127) / 16;
    if (lead > quads) lead = quads;
    tail = head + quads * Quad<T>::kSize;
  }
};

// Adds columns to a state, which is rescaled at most once for all of them.
template <bool kEntropy, int kCount>
__device__ __forceinline__ void absorb(SoftmaxState& state, const float (&value)[kCount]) {
  float maximum = value[0];
#pragma unroll
  for (int i = 1; i < kCount; ++i) maximum = fmaxf(maximum, value[i]);
  if (maximum > state.maximum) {
    const float step = state.maximum - maximum, scale = exp_fast(step);
    if (kEntropy) {
      state.weighted = scale * (state.weighted + state.sum * fmaxf(step, kLowestExponent));
    }
    state.sum *= scale;
    state.maximum = maximum;
  }
  if (state.maximum == negative_infinity()) {
    // Nothing but -inf so far, or NaN, which must not be lost.
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      if (value[i] != value[i]) state.sum = value[i];
    }
    return;
  }
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    const float exponent = value[i] - state.maximum, weight = exp_fast(exponent);
    state.sum += weight;
    if (kEntropy) state.weighted = fmaf(weight, fmaxf(exponent, kLowestExponent), state.weighted);
  }
}

__device__ __forceinline__ SoftmaxState warp_merge(SoftmaxState state) {
#pragma unroll
  for (int offset = kWarp / 2; offset > 0; offset >>= 1) {
    SoftmaxState other;
    other.maximum = __shfl_xor_sync(0xffffffffu, state.maximum, offset);
    other.sum = __shfl_xor_sync(0xffffffffu, state.sum, offset);
    other.weighted = __shfl_xor_sync(0xffffffffu, state.weighted, offset);
    state = merge(state, other);
  }
  return state;
}

// Returns the merged state of the block in its first warp.
template <int kBlock>
__device__ __forceinline__ SoftmaxState block_merge(SoftmaxState state) {
  constexpr int kWarps = kBlock / kWarp;
  __shared__ float maxima[kWarps], sums[kWarps], weighted[kWarps];
  state = warp_merge(state);
  if (kWarps == 1) return state;
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  if (lane == 0) {
    maxima[warp] = state.maximum;
    sums[warp] = state.sum;
    weighted[warp] = state.weighted;
  }
  __syncthreads();
  if (warp == 0) {
    state = {negative_infinity(), 0.0f, 0.0f};
    if (lane < kWarps) state = {maxima[lane], sums[lane], weighted[lane]};
    state = warp_merge(state);
  }
  return state;
}

// stats[row] = {maximum, sum, logit of the target or -inf, weighted}; with kAccumulate the columns
// join what stats[row] has of other columns.
template <class T, bool kEntropy, bool kAccumulate, int kBlock>
__global__ void __launch_bounds__(kBlock)
    row_stats_kernel(const T* __restrict__ logits, int64_t stride,
                     const int64_t* __restrict__ targets, float4* __restrict__ stats,
                     int64_t first_column, int columns) {
  const int64_t row = blockIdx.x;
  const int64_t target = targets[row];
  SoftmaxState state{negative_infinity(), 0.0f, 0.0f};
  if (target == kIgnoredTarget) {
    if (!kAccumulate && threadIdx.x == 0) {
      stats[row] = make_float4(negative_infinity(), 0.0f, negative_infinity(), 0.0f);
    }
    return;
  }
  const T* begin = logits + row * stride;
  const RowParts<T> parts(begin, columns);
  constexpr int kSize = Quad<T>::kSize;
  const int thread = threadIdx.x;
  if (thread < parts.head) {
    const float value[1] = {to_float(begin[thread])};
    absorb<kEntropy>(state, value);
  }
  const uint4* quads = reinterpret_cast<const uint4*>(begin + parts.head);
  auto absorb_quad = [&](uint4 loaded) {
    float value[kSize];
    Quad<T>::unpack(loaded, value);
    absorb<kEntropy>(state, value);
  };
  int i = thread;
  for (; i + (kUnroll - 1) * kBlock < parts.quads; i += kUnroll * kBlock) {
    uint4 loaded[kUnroll];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) loaded[u] = __ldcs(quads + i + u * kBlock);
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) absorb_quad(loaded[u]);
  }
#pragma unroll 1
  for (; i < parts.quads; i += kBlock) absorb_quad(__ldcs(quads + i));
  if (parts.tail + thread < columns) {
    const float value[1] = {to_float(begin[parts.tail + thread])};
    absorb<kEntropy>(state, value);
  }
  state = block_merge<kBlock>(state);
  if (threadIdx.x == 0) {
    const int64_t column = target - first_column;
    float target_logit =
        column >= 0 && column < columns ? to_float(begin[column]) : negative_infinity();
    if (kAccumulate) {
      const float4 before = stats[row];
      state = merge({before.x, before.y, before.w}, state);
      target_logit = column >= 0 && column < columns ? target_logit : before.z;
    }
    stats[row] = make_float4(state.maximum, state.sum, target_logit, state.weighted);
  }
}

// One softmax from the states of all shards, merged in the order of the ranks.
__global__ void combine_kernel(const float4* __restrict__ stats, int shards, int64_t rows,
                               const int64_t* __restrict__ targets, Combined out) {
  const int64_t row = blockIdx.x * int64_t(blockDim.x) + threadIdx.x;
  if (row >= rows) return;
  SoftmaxState state{negative_infinity(), 0.0f, 0.0f};
  float target_logit = negative_infinity();
  for (int shard = 0; shard < shards; ++shard) {
    const float4 part = stats[shard * rows + row];
    state = merge(state, {part.x, part.y, part.w});
    if (!(part.z == negative_infinity())) target_logit = part.z;
  }
  const bool ignored = targets[row] == kIgnoredTarget;
  out.logp[row] = ignored ? 0.0f : log_prob(state, target_logit);
  if (out.entropy) out.entropy[row] = ignored ? 0.0f : entropy(state);
  out.maximum[row] = ignored ? 0.0f : state.maximum;
  out.inverse_sum[row] = ignored ? 0.0f : 1.0f / state.sum;
}

__global__ void token_reward_kernel(RewardKind kind, const float* __restrict__ teacher,
                                    const float* __restrict__ student, int64_t rows, float a,
                                    float b, float* __restrict__ reward) {
  const int64_t row = blockIdx.x * int64_t(blockDim.x) + threadIdx.x;
  if (row < rows) reward[row] = token_reward(kind, teacher[row], student[row], a, b);
}

// logits <- grad * (one-hot of the target - softmax); rows whose grad is zero are written only.
template <class T, int kBlock>
__global__ void __launch_bounds__(kBlock)
    row_grad_kernel(T* logits, int64_t stride, const int64_t* __restrict__ targets,
                    RowScales scales, int64_t first_column, int columns, int width) {
  const int64_t row = blockIdx.x;
  T* begin = logits + row * stride;
  const int thread = threadIdx.x;
  const float grad = scales.grad[row];
  if (grad == 0.0f) columns = 0;
  const RowParts<T> parts(begin, columns);
  constexpr int kSize = Quad<T>::kSize;
  if (columns > 0) {
    const float maximum = scales.maximum[row], scale = -grad * scales.inverse_sum[row];
    const int64_t offset = targets[row] - first_column;
    const int target = offset >= 0 && offset < columns ? int(offset) : -1;
    auto gradient = [&](float logit, int column) {
      return fmaf(scale, exp_fast(logit - maximum), column == target ? grad : 0.0f);
    };
    auto quad_gradient = [&](uint4 loaded, int quad) {
      float value[kSize];
      Quad<T>::unpack(loaded, value);
#pragma unroll
      for (int k = 0; k < kSize; ++k) {
        value[k] = gradient(value[k], parts.head + quad * kSize + k);
      }
      return Quad<T>::pack(value);
    };
    auto write_one = [&](int column) {
      begin[column] = Quad<T>::one(gradient(to_float(begin[column]), column));
    };
    if (thread < parts.head) write_one(thread);
    uint4* quads = reinterpret_cast<uint4*>(begin + parts.head);
    auto write_quad = [&](int quad) {
      __stcs(quads + quad, quad_gradient(__ldcs(quads + quad), quad));
    };
    if (thread < parts.lead) write_quad(thread);
    int i = parts.lead + thread;
    for (; i + (kUnroll - 1) * kBlock < parts.quads; i += kUnroll * kBlock) {
      uint4 loaded[kUnroll];
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) loaded[u] = __ldcs(quads + i + u * kBlock);
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) {
        __stcs(quads + i + u * kBlock, quad_gradient(loaded[u], i + u * kBlock));
      }
    }
#pragma unroll 1
    for (; i < parts.quads; i += kBlock) write_quad(i);
    if (parts.tail + thread < columns) write_one(parts.tail + thread);
  }
  const RowParts<T> rest(begin + columns, width - columns);
  T* blank = begin + columns;
  if (thread < rest.head) blank[thread] = Quad<T>::one(0.0f);
  uint4* blank_quads = reinterpret_cast<uint4*>(blank + rest.head);
  for (int i = thread; i < rest.quads; i += kBlock) {
    __stcs(blank_quads + i, make_uint4(0, 0, 0, 0));
  }
  if (rest.tail + thread < width - columns) blank[rest.tail + thread] = Quad<T>::one(0.0f);
}

}  // namespace poweropd
