// What both back-ends are called with. Nothing here knows of torch.
#pragma once
#include <cstdint>

namespace poweropd {

enum class DType : int { f32, bf16 };

// Rows of a shard of logits: `columns` of the vocabulary from `first_column` on, and beyond them,
// up to `width`, padding that no softmax sees. Rows may start at any address that fits the type.
struct LogitRows {
  void* data;
  DType dtype;
  int64_t stride;  // elements from one row to the next
  int64_t rows;
  int64_t first_column;
  int64_t columns;
  int64_t width;
};

// For each row: the largest logit, 1 / sum of its softmax, and the gradient
// of the loss with respect to the log-prob of its target.
struct RowScales {
  const float* maximum;
  const float* inverse_sum;
  const float* grad;
};

// One softmax for each row from `shards` states of it: stats [shards][rows][4]. entropy may be
// null.
struct Combined {
  float* logp;
  float* entropy;
  float* maximum;
  float* inverse_sum;
};

}  // namespace poweropd
