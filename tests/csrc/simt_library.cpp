// The CUDA kernels over the SIMT emulator, for ctypes. Each function returns null or what failed.
#include "launch.cu"

namespace {

template <class Launch>
const char* message_of(Launch launch) {
  static std::string message;
  try {
    if (launch()) return nullptr;
    message = "refused: no grid has this size";
  } catch (const std::exception& error) {
    message = error.what();
  }
  return message.c_str();
}

}  // namespace

using namespace poweropd;

extern "C" void simt_seed(unsigned seed) { simt::machine().seed = seed; }

extern "C" const char* simt_row_stats(LogitRows logits, const int64_t* targets, float* stats,
                                      bool with_entropy, bool accumulate, int block) {
  return message_of([&] {
    return launch_row_stats(logits, targets, stats, with_entropy, accumulate, block, nullptr);
  });
}

extern "C" const char* simt_combine(const float* stats, int64_t shards, int64_t rows,
                                    const int64_t* targets, Combined out) {
  return message_of([&] { return launch_combine(stats, shards, rows, targets, out, nullptr); });
}

extern "C" const char* simt_token_reward(int kind, const float* teacher, const float* student,
                                         int64_t rows, float a, float b, float* reward) {
  return message_of([&] {
    return launch_token_reward(RewardKind(kind), teacher, student, rows, a, b, reward, nullptr);
  });
}

extern "C" const char* simt_row_grad(LogitRows logits, const int64_t* targets, RowScales scales,
                                     int block) {
  return message_of([&] { return launch_row_grad(logits, targets, scales, block, nullptr); });
}
