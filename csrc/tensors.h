// Tensors as the kernels take them. Shapes, types and devices are checked on the Python side.
#pragma once
#include <ATen/core/Tensor.h>
#include <torch/csrc/utils/pybind.h>

#include <optional>

#include "rows.h"

namespace poweropd {

inline LogitRows logit_rows(const at::Tensor& logits, int64_t first_column, int64_t columns) {
  LogitRows rows;
  rows.data = logits.data_ptr();
  rows.dtype = logits.scalar_type() == at::kBFloat16 ? DType::bf16 : DType::f32;
  rows.stride = logits.stride(0);
  rows.rows = logits.size(0);
  rows.first_column = first_column;
  rows.columns = columns;
  rows.width = logits.size(1);
  return rows;
}

inline RowScales row_scales(const at::Tensor& maximum, const at::Tensor& inverse_sum,
                            const at::Tensor& grad) {
  return {maximum.const_data_ptr<float>(), inverse_sum.const_data_ptr<float>(),
          grad.const_data_ptr<float>()};
}

inline Combined combined(const at::Tensor& logp, const std::optional<at::Tensor>& entropy,
                         const at::Tensor& maximum, const at::Tensor& inverse_sum) {
  return {logp.data_ptr<float>(), entropy ? entropy->data_ptr<float>() : nullptr,
          maximum.data_ptr<float>(), inverse_sum.data_ptr<float>()};
}

}  // namespace poweropd
