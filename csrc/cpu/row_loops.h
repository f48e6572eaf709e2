// The loops over the columns of a row, for any width of vector. Each instruction set includes this
// once, in a translation unit of its own, so nothing in here may be shared between units.
#pragma once
#include <algorithm>

#include "numerics.h"
#include "row_loops_table.h"

namespace poweropd {

// A row is read in as many places at once: a processor fetches the next lines of a place by itself,
// but only up to the end of a page, and reads more of memory while it does so in several places.
constexpr int kStreams = 4;

// Columns of each stream that are read twice in a row, the second time from the first-level cache.
constexpr int64_t kBlock = 256;

// Bytes of each stream that are asked for ahead of the arithmetic, during which memory would idle.
constexpr int kAhead = 4096;

// Asks for the cache lines of two vectors, kAhead bytes behind `from`. Behind the end of the logits
// that does nothing.
template <class Simd, class T>
void prefetch(const T* from) {
  constexpr int kLine = 64, kBytes = 2 * Simd::kLanes * int(sizeof(T));
  const char* line = reinterpret_cast<const char*>(from) + kAhead;
  for (int bytes = 0; bytes < kBytes; bytes += kLine) __builtin_prefetch(line + bytes, 0, 2);
}

// Columns of each stream, which begin at multiples of as many; the few that are left follow them.
template <class Simd>
int64_t columns_of_stream(int64_t columns) {
  constexpr int64_t kStep = 2 * Simd::kLanes;
  return columns / (kStreams * kStep) * kStep;
}

// A row's state while columns are added to it, in fp64: fp32 alone would lose a digit. A type for
// each instruction set, whose functions no other unit has.
template <class Simd>
struct RunningState {
  float maximum = negative_infinity();
  double sum = 0.0, weighted = 0.0;

  void raise_maximum(float larger) {
    if (!(larger > maximum)) return;
    const double step = double(maximum) - larger, scale = ::exp(step);
    weighted = sum > 0.0 ? scale * (weighted + sum * step) : 0.0;
    sum *= scale;
    maximum = larger;
  }
};

// Adds columns to a row's state; each(visit) calls visit(stream, logits) for every vector of them.
template <class Simd, bool kEntropy, class Each>
void add_columns(RunningState<Simd>& state, Each each) {
  using Float = typename Simd::Float;
  static_assert(kStreams == 4, "as many parts are merged below");
  Float parts[kStreams];
  for (Float& part : parts) part = Simd::broadcast(negative_infinity());
  each([&](int k, Float logits) { parts[k] = Simd::max(parts[k], logits); });
  state.raise_maximum(
      Simd::largest(Simd::max(Simd::max(parts[0], parts[1]), Simd::max(parts[2], parts[3]))));
  // Of nothing but -inf so far, or NaN, which must not be lost, the sum is 0 or NaN.
  const bool is_empty = state.maximum == negative_infinity();
  const Float largest = Simd::broadcast(is_empty ? 0.0f : state.maximum);
  const Float lowest = Simd::broadcast(kLowestExponent);
  Float weights[kStreams];
  for (int k = 0; k < kStreams; ++k) parts[k] = weights[k] = Simd::broadcast(0.0f);
  each([&](int k, Float logits) {
    const Float exponent = Simd::sub(logits, largest), exponential = Simd::exp(exponent);
    parts[k] = Simd::add(parts[k], exponential);
    if (kEntropy) weights[k] = Simd::fma(exponential, Simd::max(lowest, exponent), weights[k]);
  });
  auto total = [](const Float* of) {
    return Simd::total(Simd::add(Simd::add(of[0], of[1]), Simd::add(of[2], of[3])));
  };
  state.sum += total(parts);
  if (kEntropy) state.weighted += total(weights);
}

template <class Simd, class T, bool kEntropy>
SoftmaxState row_state(const T* row, int64_t columns) {
  using Float = typename Simd::Float;
  constexpr int kLanes = Simd::kLanes;
  const int64_t length = columns_of_stream<Simd>(columns);
  RunningState<Simd> state;
  for (int64_t begin = 0; begin < length; begin += kBlock) {
    const int64_t end = std::min(begin + kBlock, length);
    add_columns<Simd, kEntropy>(state, [&](auto visit) {
      for (int64_t i = begin; i < end; i += 2 * kLanes) {
        for (int k = 0; k < kStreams; ++k) {
          Float a, b;
          prefetch<Simd>(row + k * length + i);
          Simd::load_pair(row + k * length + i, a, b);
          visit(k, a);
          visit(k, b);
        }
      }
    });
  }
  add_columns<Simd, kEntropy>(state, [&](auto visit) {
    for (int64_t i = kStreams * length; i < columns; i += kLanes) {
      const int rest = static_cast<int>(std::min<int64_t>(kLanes, columns - i));
      visit(0, Simd::load(row + i, rest, negative_infinity()));
    }
  });
  return {state.maximum, static_cast<float>(state.sum), static_cast<float>(state.weighted)};
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
  const int64_t length = columns_of_stream<Simd>(columns);
  for (int64_t i = 0; i < length; i += 2 * kLanes) {
    for (int k = 0; k < kStreams; ++k) {
      T* pair = row + k * length + i;
      Float a, b;
      prefetch<Simd>(pair);
      Simd::load_pair(pair, a, b);
      Simd::store_pair(pair, scaled(a), scaled(b));
    }
  }
  for (int64_t i = kStreams * length; i < columns; i += kLanes) {
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
