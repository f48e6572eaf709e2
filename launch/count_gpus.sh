#!/usr/bin/env bash
# Print how many GPUs a run can use on this node.

set -euo pipefail

if [[ -n ${CUDA_VISIBLE_DEVICES+set} ]]; then
    case $CUDA_VISIBLE_DEVICES in
        "" | -1 | NoDevFiles) echo 0 ;;
        *) tr ',' '\n' <<<"$CUDA_VISIBLE_DEVICES" | grep -c . ;;
    esac
elif [[ -n ${SLURM_GPUS_ON_NODE:-} ]]; then
    echo "$SLURM_GPUS_ON_NODE"
else
    { nvidia-smi -L 2>/dev/null || true; } | grep -c '^GPU ' || true
fi
