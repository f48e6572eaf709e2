// The Python module of the CPU kernels: rows are shared over torch's threads.
#include <ATen/Parallel.h>

#include <stdexcept>
#include <string>
#include <vector>

#include "numerics.h"
#include "row_loops_table.h"
#include "tensors.h"

namespace poweropd {
namespace {

struct Capability {
  std::string name;
  RowLoops loops;
};

// What this processor has, the fastest first.
std::vector<Capability> find_capabilities() {
  std::vector<Capability> found;
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq")) {
    found.push_back({"avx512", avx512_row_loops()});
  }
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
    found.push_back({"avx2", avx2_row_loops()});
  }
#endif
  found.push_back({"portable", portable_row_loops()});
  return found;
}

const std::vector<Capability>& capabilities() {
  static const std::vector<Capability> found = find_capabilities();
  return found;
}

const Capability*& chosen() {
  static const Capability* capability = &capabilities().front();
  return capability;
}

std::vector<std::string> capability_names() {
  std::vector<std::string> names;
  for (const Capability& capability : capabilities()) names.push_back(capability.name);
  return names;
}

void set_capability(const std::string& name) {
  for (const Capability& capability : capabilities()) {
    if (capability.name == name) {
      chosen() = &capability;
      return;
    }
  }
  throw std::invalid_argument("this processor has no " + name);
}

// Rows that make it worth waking another thread.
int64_t grain(int64_t columns) {
  return std::max<int64_t>(1, 16384 / std::max<int64_t>(1, columns));
}

void row_stats(const at::Tensor& logits, const at::Tensor& targets, const at::Tensor& stats,
               int64_t first_column, int64_t columns, bool with_entropy, bool accumulate) {
  const LogitRows rows = logit_rows(logits, first_column, columns);
  const auto loop = chosen()->loops.stats[int(rows.dtype)][with_entropy];
  const int64_t* target = targets.const_data_ptr<int64_t>();
  float* out = stats.data_ptr<float>();
  pybind11::gil_scoped_release no_gil;
  at::parallel_for(0, rows.rows, grain(columns), [&](int64_t begin, int64_t end) {
    loop(rows, target, out, accumulate, begin, end);
  });
}

void row_grad(const at::Tensor& logits, const at::Tensor& targets, const at::Tensor& maximum,
              const at::Tensor& inverse_sum, const at::Tensor& grad, int64_t first_column,
              int64_t columns) {
  const LogitRows rows = logit_rows(logits, first_column, columns);
  const auto loop = chosen()->loops.grad[int(rows.dtype)];
  const int64_t* target = targets.const_data_ptr<int64_t>();
  const RowScales scales = row_scales(maximum, inverse_sum, grad);
  pybind11::gil_scoped_release no_gil;
  at::parallel_for(0, rows.rows, grain(rows.width),
                   [&](int64_t begin, int64_t end) { loop(rows, target, scales, begin, end); });
}

void combine(const at::Tensor& stats, const at::Tensor& targets, const at::Tensor& logp,
             const std::optional<at::Tensor>& entropies, const at::Tensor& maximum,
             const at::Tensor& inverse_sum) {
  const int64_t shards = stats.size(0), rows = stats.size(1);
  const float* states = stats.const_data_ptr<float>();
  const int64_t* target = targets.const_data_ptr<int64_t>();
  const Combined out = combined(logp, entropies, maximum, inverse_sum);
  for (int64_t row = 0; row < rows; ++row) {
    SoftmaxState state{negative_infinity(), 0.0f, 0.0f};
    float target_logit = negative_infinity();
    for (int64_t shard = 0; shard < shards; ++shard) {
      const float* part = states + 4 * (shard * rows + row);
      state = merge(state, {part[0], part[1], part[3]});
      if (!(part[2] == negative_infinity())) target_logit = part[2];
    }
    const bool ignored = target[row] == kIgnoredTarget;
    out.logp[row] = ignored ? 0.0f : log_prob(state, target_logit);
    if (out.entropy) out.entropy[row] = ignored ? 0.0f : entropy(state);
    out.maximum[row] = ignored ? 0.0f : state.maximum;
    out.inverse_sum[row] = ignored ? 0.0f : 1.0f / state.sum;
  }
}

void token_rewards(int kind, const at::Tensor& teacher, const at::Tensor& student, float a, float b,
                   const at::Tensor& reward) {
  const float* from = teacher.const_data_ptr<float>();
  const float* to = student.const_data_ptr<float>();
  float* out = reward.data_ptr<float>();
  for (int64_t row = 0; row < teacher.numel(); ++row) {
    out[row] = token_reward(static_cast<RewardKind>(kind), from[row], to[row], a, b);
  }
}

}  // namespace
}  // namespace poweropd

PYBIND11_MODULE(TORCH_EXTENSION_NAME, module) {
  module.def("row_stats", &poweropd::row_stats);
  module.def("row_grad", &poweropd::row_grad);
  module.def("combine", &poweropd::combine);
  module.def("token_reward", &poweropd::token_rewards);
  module.def("capabilities", &poweropd::capability_names);
  module.def("set_capability", &poweropd::set_capability);
}
