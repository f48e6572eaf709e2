// The loops over the columns of a row, for any width of vector. Each instruction set includes this
// once, in a translation unit of its own, so nothing in here may be shared between units.
#pragma once
#include <algorithm>
#include <limits>

#include "numerics.h"
#include "row_loops_table.h"

namespace poweropd {

// Columns that are read twice in a row, the second time from the first-level cache.
constexpr int64_t kBlock = 1024;

// Bytes that are asked for ahead of what is read: left to itself, memory would idle whenever the
// processor computes, and a processor's own prefetching ends at each page. Arithmetic asks far
// ahead into the second-level cache; the search for the maximum, which does little, moves it to the
// first.
constexpr int kFarAhead = 16384, kAhead = 2048;

// Asks for the cache lines of `count` elements, kBytes behind `from`: into all levels (kLocality
// 3), or from the second on (2). Behind the end of the logits that does nothing.
template <int kBytes, int kLocality, class T>
void prefetch(const T* from, int count) {
  constexpr int kLine = 64;
  const char* line = reinterpret_cast<const char*>(from) + kBytes;
  for (int bytes = count * int(sizeof(T)); bytes > 0; bytes -= kLine, line += kLine) {
    __builtin_prefetch(line, 0, kLocality);
  }
}

template <class Simd, class T>
float block_maximum(const T* block, int64_t count) {
  using Float = typename Simd::Float;
  constexpr int kLanes = Simd::kLanes;
  Float largest[4];
  for (Float& part : largest) part = Simd::broadcast(negative_infinity());
  int64_t i = 0;
  for (; i + 4 * kLanes <= count; i += 4 * kLanes) {
    for (int k = 0; k < 4; k += 2) {
      Float a, b;
      prefetch<kAhead, 3>(block + i + k * kLanes, 2 * kLanes);
      Simd::load_pair(block + i + k * kLanes, a, b);
      largest[k] = Simd::max(largest[k], a);
      largest[k + 1] = Simd::max(largest[k + 1], b);
    }
  }
  for (; i < count; i += kLanes) {
    const int rest = static_cast<int>(std::min<int64_t>(kLanes, count - i));
    largest[0] = Simd::max(largest[0], Simd::load(block + i, rest, negative_infinity()));
  }
  return Simd::largest(
      Simd::max(Simd::max(largest[0], largest[1]), Simd::max(largest[2], largest[3])));
}

// Adds the block's share to `sum` and `weighted`, in fp64: fp32 alone would lose a digit.
template <class Simd, class T, bool kEntropy>
void add_block(const T* block, int64_t count, float maximum, double& sum, double& weighted) {
  using Float = typename Simd::Float;
  constexpr int kLanes = Simd::kLanes;
  const Float lowest = Simd::broadcast(kLowestExponent), largest = Simd::broadcast(maximum);
  Float sums[4], weights[4];
  for (int k = 0; k < 4; ++k) sums[k] = weights[k] = Simd::broadcast(0.0f);
  auto add = [&](int k, Float logits) {
    const Float exponent = Simd::sub(logits, largest);
    const Float exponential = Simd::exp(exponent);
    sums[k] = Simd::add(sums[k], exponential);
    if (kEntropy) weights[k] = Simd::fma(exponential, Simd::max(lowest, exponent), weights[k]);
  };
  int64_t i = 0;
  for (; i + 4 * kLanes <= count; i += 4 * kLanes) {
    for (int k = 0; k < 4; k += 2) {
      Float a, b;
      prefetch<kFarAhead, 2>(block + i + k * kLanes, 2 * kLanes);
      Simd::load_pair(block + i + k * kLanes, a, b);
      add(k, a);
      add(k + 1, b);
    }
  }
  for (; i < count; i += kLanes) {
    const int rest = static_cast<int>(std::min<int64_t>(kLanes, count - i));
    add(0, Simd::load(block + i, rest, negative_infinity()));
  }
  sum += Simd::total(Simd::add(Simd::add(sums[0], sums[1]), Simd::add(sums[2], sums[3])));
  if (kEntropy) {
    weighted += Simd::total(
        Simd::add(Simd::add(weights[0], weights[1]), Simd::add(weights[2], weights[3])));
  }
}

template <class Simd, class T, bool kEntropy>
SoftmaxState row_state(const T* row, int64_t columns) {
  float maximum = negative_infinity();
  double sum = 0.0, weighted = 0.0;
  for (int64_t begin = 0; begin < columns; begin += kBlock) {
    const T* block = row + begin;
    const int64_t count = std::min(kBlock, columns - begin);
    const float larger = block_maximum<Simd>(block, count);
    if (larger > maximum) {
      const double step = double(maximum) - larger, scale = ::exp(step);
      weighted = sum > 0.0 ? scale * (weighted + sum * step) : 0.0;
      sum *= scale;
      maximum = larger;
    }
    if (maximum == negative_infinity()) {
      // Nothing but -inf so far, or NaN, which must not be lost.
      for (int64_t i = 0; i < count; ++i) {
        if (to_float(block[i]) != to_float(block[i]))
          sum = std::numeric_limits<double>::quiet_NaN();
      }
      continue;
    }
    add_block<Simd, T, kEntropy>(block, count, maximum, sum, weighted);
  }
  return {maximum, static_cast<float>(sum), static_cast<float>(weighted)};
}

template <class Simd, class T, bool kEntropy>
void row_stats_loop(const LogitRows& logits, const int64_t* targets, float* stats, bool accumulate,
                    int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    float* out = stats + 4 * row;
    SoftmaxState before{negative_infinity(), 0.0f, 0.0f};
    float target_logit = negative_infinity();
    if (accumulate) {
      before = {out[0], out[1], out[3]};
      target_logit = out[2];
    }
    SoftmaxState state = before;
    if (targets[row] != kIgnoredTarget) {
      const T* columns = static_cast<const T*>(logits.data) + row * logits.stride;
      state = merge(before, row_state<Simd, T, kEntropy>(columns, logits.columns));
      const int64_t column = targets[row] - logits.first_column;
      if (column >= 0 && column < logits.columns) target_logit = to_float(columns[column]);
    }
    out[0] = state.maximum;
    out[1] = state.sum;
    out[2] = target_logit;
    out[3] = state.weighted;
  }
}

template <class Simd, class T>
void row_gradient(T* row, int64_t columns, int64_t target, float maximum, float scale, float grad) {
  using Float = typename Simd::Float;
  constexpr int kLanes = Simd::kLanes;
  const Float largest = Simd::broadcast(maximum), scales = Simd::broadcast(scale);
  auto softmax = [&](Float logits) { return Simd::exp(Simd::sub(logits, largest)); };
  auto scaled = [&](Float logits) { return Simd::mul(scales, softmax(logits)); };
  const bool has_target = target >= 0 && target < columns;
  const float target_logit = has_target ? to_float(row[target]) : 0.0f;
  int64_t i = 0;
  for (; i + 2 * kLanes <= columns; i += 2 * kLanes) {
    Float a, b;
    prefetch<kFarAhead, 2>(row + i, 2 * kLanes);
    Simd::load_pair(row + i, a, b);
    Simd::store_pair(row + i, scaled(a), scaled(b));
  }
  for (; i < columns; i += kLanes) {
    const int rest = static_cast<int>(std::min<int64_t>(kLanes, columns - i));
    Simd::store(row + i, scaled(Simd::load(row + i, rest, negative_infinity())), rest);
  }
  if (has_target) {
    const Float weights = softmax(Simd::broadcast(target_logit));
    Simd::store(row + target, Simd::fma(scales, weights, Simd::broadcast(grad)), 1);
  }
}

template <class Simd, class T>
void row_grad_loop(const LogitRows& logits, const int64_t* targets, const RowScales& scales,
                   int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    T* columns = static_cast<T*>(logits.data) + row * logits.stride;
    const float grad = scales.grad[row];
    const int64_t live = grad == 0.0f ? 0 : logits.columns;
    if (live > 0) {
      row_gradient<Simd>(columns, live, targets[row] - logits.first_column, scales.maximum[row],
                         -grad * scales.inverse_sum[row], grad);
    }
    std::memset(static_cast<void*>(columns + live), 0, (logits.width - live) * sizeof(T));
  }
}

template <class Simd>
RowLoops row_loops_of() {
  RowLoops loops;
  loops.stats[0][0] = row_stats_loop<Simd, float, false>;
  loops.stats[0][1] = row_stats_loop<Simd, float, true>;
  loops.stats[1][0] = row_stats_loop<Simd, bf16, false>;
  loops.stats[1][1] = row_stats_loop<Simd, bf16, true>;
  loops.grad[0] = row_grad_loop<Simd, float>;
  loops.grad[1] = row_grad_loop<Simd, bf16>;
  return loops;
}

}  // namespace poweropd
