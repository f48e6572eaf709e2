// The loops over rows that each instruction set provides.
#pragma once
#include "rows.h"

namespace poweropd {

// Each works on rows begin ... end - 1. Indices: DType, then whether the entropy is wanted.
struct RowLoops {
  void (*stats[2][2])(const LogitRows& logits, const int64_t* targets, float* stats,
                      bool accumulate, int64_t begin, int64_t end);
  void (*grad[2])(const LogitRows& logits, const int64_t* targets, const RowScales& scales,
                  int64_t begin, int64_t end);
};

RowLoops portable_row_loops();
#if defined(__x86_64__)
RowLoops avx2_row_loops();
RowLoops avx512_row_loops();
#endif

}  // namespace poweropd
