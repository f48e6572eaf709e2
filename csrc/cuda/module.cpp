// The Python module of the CUDA kernels: they run on the logits' device, in its current stream.
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

#include "launch.h"
#include "tensors.h"

namespace poweropd {
namespace {

constexpr int kChooseBlock = 0;

class OnDeviceOf {
 public:
  explicit OnDeviceOf(const at::Tensor& tensor) : guard_(tensor.device()) {}

  void* stream() const { return c10::cuda::getCurrentCUDAStream().stream(); }

  void check(bool launched) const {
    TORCH_CHECK(launched, "too many rows or columns for one launch");
    C10_CUDA_KERNEL_LAUNCH_CHECK();
  }

 private:
  c10::cuda::CUDAGuard guard_;
};

void row_stats(const at::Tensor& logits, const at::Tensor& targets, const at::Tensor& stats,
               int64_t first_column, int64_t columns, bool with_entropy, bool accumulate) {
  const OnDeviceOf device(logits);
  device.check(launch_row_stats(logit_rows(logits, first_column, columns),
                                targets.const_data_ptr<int64_t>(), stats.data_ptr<float>(),
                                with_entropy, accumulate, kChooseBlock, device.stream()));
}

void row_grad(const at::Tensor& logits, const at::Tensor& targets, const at::Tensor& maximum,
              const at::Tensor& inverse_sum, const at::Tensor& grad, int64_t first_column,
              int64_t columns) {
  const OnDeviceOf device(logits);
  device.check(
      launch_row_grad(logit_rows(logits, first_column, columns), targets.const_data_ptr<int64_t>(),
                      row_scales(maximum, inverse_sum, grad), kChooseBlock, device.stream()));
}

void combine(const at::Tensor& stats, const at::Tensor& targets, const at::Tensor& logp,
             const std::optional<at::Tensor>& entropies, const at::Tensor& maximum,
             const at::Tensor& inverse_sum) {
  const OnDeviceOf device(stats);
  device.check(launch_combine(stats.const_data_ptr<float>(), stats.size(0), stats.size(1),
                              targets.const_data_ptr<int64_t>(),
                              combined(logp, entropies, maximum, inverse_sum), device.stream()));
}

void token_rewards(int kind, const at::Tensor& teacher, const at::Tensor& student, float a, float b,
                   const at::Tensor& reward) {
  const OnDeviceOf device(teacher);
  device.check(launch_token_reward(static_cast<RewardKind>(kind), teacher.const_data_ptr<float>(),
                                   student.const_data_ptr<float>(), teacher.numel(), a, b,
                                   reward.data_ptr<float>(), device.stream()));
}

}  // namespace
}  // namespace poweropd

PYBIND11_MODULE(TORCH_EXTENSION_NAME, module) {
  module.def("row_stats", &poweropd::row_stats);
  module.def("row_grad", &poweropd::row_grad);
  module.def("combine", &poweropd::combine);
  module.def("token_reward", &poweropd::token_rewards);
}
