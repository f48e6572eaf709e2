// Compiled by nvcc, and by g++ over the SIMT emulator: no header of torch belongs here.
#include <limits>

#include "launch.h"
#include "row_kernels.cuh"

namespace poweropd {
namespace {

constexpr int64_t kMaxGrid = std::numeric_limits<int32_t>::max();
constexpr int kTokensPerBlock = 128;

// Rows from which the largest block was the fastest on an H100, and those up to which the smallest
// was: there, larger ones leave threads without a quad to load.
constexpr int64_t kLongStatsBytes = 1 << 17, kLongGradBytes = 1 << 16, kShortBytes = 1 << 15;

int block_for(const LogitRows& logits, int64_t long_bytes) {
  const int64_t bytes = logits.columns * (logits.dtype == DType::f32 ? 4 : 2);
  return bytes < kShortBytes ? 256 : bytes < long_bytes ? 512 : 1024;
}

bool fits(const LogitRows& logits) {
  return logits.rows <= kMaxGrid && logits.width <= kMaxGrid - 1024 * 8 * kUnroll;
}

template <class T, int kBlock>
void row_stats_of(const LogitRows& logits, const int64_t* targets, float* stats, bool with_entropy,
                  bool accumulate, void* stream) {
  auto kernel = with_entropy ? (accumulate ? row_stats_kernel<T, true, true, kBlock>
                                           : row_stats_kernel<T, true, false, kBlock>)
                             : (accumulate ? row_stats_kernel<T, false, true, kBlock>
                                           : row_stats_kernel<T, false, false, kBlock>);
  POWEROPD_LAUNCH(kernel, dim3(unsigned(logits.rows)), dim3(kBlock), stream,
                  static_cast<const T*>(logits.data), logits.stride, targets,
                  reinterpret_cast<float4*>(stats), logits.first_column, int(logits.columns));
}

template <class T, int kBlock>
void row_grad_of(const LogitRows& logits, const int64_t* targets, const RowScales& scales,
                 void* stream) {
  auto kernel = row_grad_kernel<T, kBlock>;
  POWEROPD_LAUNCH(kernel, dim3(unsigned(logits.rows)), dim3(kBlock), stream,
                  static_cast<T*>(logits.data), logits.stride, targets, scales, logits.first_column,
                  int(logits.columns), int(logits.width));
}

// Calls `launch` with a value of the logits' type and one whose ::value is the block's size.
template <int kBlock>
struct Block {
  static constexpr int value = kBlock;
};

template <class Launch>
bool with_type_and_block(DType dtype, int block, Launch launch) {
  auto with_block = [&](auto type) {
    if (block == 32) return launch(type, Block<32>()), true;
    if (block == 256) return launch(type, Block<256>()), true;
    if (block == 512) return launch(type, Block<512>()), true;
    if (block == 1024) return launch(type, Block<1024>()), true;
    return false;
  };
  return dtype == DType::f32 ? with_block(float()) : with_block(bf16());
}

}  // namespace

bool launch_row_stats(const LogitRows& logits, const int64_t* targets, float* stats,
                      bool with_entropy, bool accumulate, int block, void* stream) {
  if (logits.rows == 0) return true;
  return fits(logits) &&
         with_type_and_block(logits.dtype, block ? block : block_for(logits, kLongStatsBytes),
                             [&](auto type, auto size) {
                               row_stats_of<decltype(type), decltype(size)::value>(
                                   logits, targets, stats, with_entropy, accumulate, stream);
                             });
}

bool launch_combine(const float* stats, int64_t shards, int64_t rows, const int64_t* targets,
                    const Combined& out, void* stream) {
  if (rows == 0) return true;
  if (rows > kMaxGrid || shards > kMaxGrid) return false;
  auto kernel = combine_kernel;
  POWEROPD_LAUNCH(kernel, dim3(unsigned((rows + kTokensPerBlock - 1) / kTokensPerBlock)),
                  dim3(kTokensPerBlock), stream, reinterpret_cast<const float4*>(stats),
                  int(shards), rows, targets, out);
  return true;
}

bool launch_token_reward(RewardKind kind, const float* teacher, const float* student, int64_t rows,
                         float a, float b, float* reward, void* stream) {
  if (rows == 0) return true;
  if (rows > kMaxGrid) return false;
  auto kernel = token_reward_kernel;
  POWEROPD_LAUNCH(kernel, dim3(unsigned((rows + kTokensPerBlock - 1) / kTokensPerBlock)),
                  dim3(kTokensPerBlock), stream, kind, teacher, student, rows, a, b, reward);
  return true;
}

bool launch_row_grad(const LogitRows& logits, const int64_t* targets, const RowScales& scales,
                     int block, void* stream) {
  if (logits.rows == 0) return true;
  return fits(logits) &&
         with_type_and_block(logits.dtype, block ? block : block_for(logits, kLongGradBytes),
                             [&](auto type, auto size) {
                               row_grad_of<decltype(type), decltype(size)::value>(logits, targets,
                                                                                  scales, stream);
                             });
}

}  // namespace poweropd
