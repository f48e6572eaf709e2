#!/usr/bin/env bash
# Run the kernels' cases under each tool of NVIDIA's compute-sanitizer; needs a GPU and the toolkit.
#
#   bash tests/cuda/compute_sanitizer.sh [pytest arguments]

set -euo pipefail

cd -- "$(dirname -- "${BASH_SOURCE[0]}")/../.."
environment=$(POWEROPD_EXTRAS=test bash launch/setup_env.sh)
eval "$environment"
sanitizer=$(type -P compute-sanitizer || true)
if [[ -z $sanitizer ]]; then
    echo "compute_sanitizer.sh: compute-sanitizer isn't on PATH: it is in the CUDA toolkit's bin" >&2
    exit 2
fi
for tool in memcheck racecheck initcheck synccheck; do
    cases="fp64 and not qwen3 and not far"
    # These two don't follow the asynchronous copies of cuBLAS, and find fault with its products.
    [[ $tool == racecheck || $tool == initcheck ]] && cases+=" and not lm_head"
    echo "compute-sanitizer --tool $tool"
    # torch's allocator hands out parts of large blocks, in which memcheck can't see bounds.
    PYTORCH_NO_CUDA_MEMORY_CACHING=1 "$sanitizer" --tool "$tool" --error-exitcode 1 \
        "$POWEROPD_PYTHON" -m pytest -q tests/cuda -k "$cases" "$@"
done
