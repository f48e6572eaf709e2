// Launches of the CUDA kernels, for callers that know neither nvcc nor the SIMT emulator.
#pragma once
#include "numerics.h"
#include "rows.h"

namespace poweropd {

// Pointers are to device memory, stats and combined ones 16-byte aligned; `stream` is a
// cudaStream_t. `block` is the number of threads per row: 32, 256, 512, 1024, or 0 for the one
// that suits the columns. Each returns false, without a launch, for sizes that a grid can't have.
bool launch_row_stats(const LogitRows& logits, const int64_t* targets, float* stats,
                      bool with_entropy, bool accumulate, int block, void* stream);
bool launch_combine(const float* stats, int64_t shards, int64_t rows, const int64_t* targets,
                    const Combined& out, void* stream);
bool launch_token_reward(RewardKind kind, const float* teacher, const float* student, int64_t rows,
                         float a, float b, float* reward, void* stream);
bool launch_row_grad(const LogitRows& logits, const int64_t* targets, const RowScales& scales,
                     int block, void* stream);

}  // namespace poweropd
