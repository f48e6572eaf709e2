#include "row_loops.h"
#include "simd_portable.h"

namespace poweropd {
RowLoops portable_row_loops() { return row_loops_of<Portable>(); }
}  // namespace poweropd
