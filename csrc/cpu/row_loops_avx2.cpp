// The shared headers come before the target: what other units use of them must run on any
// processor.
#if defined(__x86_64__)
#include <immintrin.h>

#include <algorithm>
#include <cmath>
#include <limits>

#include "numerics.h"
#include "row_loops_table.h"

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma")
#endif
#include "row_loops.h"
#include "simd_avx2.h"

namespace poweropd {
RowLoops avx2_row_loops() { return row_loops_of<Avx2>(); }
}  // namespace poweropd

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif
