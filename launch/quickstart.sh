#!/usr/bin/env bash
# Set up the environment, then distil the bundled chain-sum student: minutes on two CPU cores.
#
#   bash launch/quickstart.sh [--train_steps 50 ...]
#
# Paths in the arguments are relative to the checkout. Running it again resumes runs/quickstart.

set -euo pipefail

cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.."
environment=$(bash launch/setup_env.sh)
eval "$environment"

gpus=${GPUS_PER_NODE:-$(bash launch/count_gpus.sh)}
export NPROC_PER_NODE=${NPROC_PER_NODE:-$((gpus == 1 ? 1 : 2))}
layout=()
if [[ $NPROC_PER_NODE == 1 ]]; then
    for model in student teacher; do
        layout+=("--$model.parallel.tensor_model_parallel_size" 1
            "--$model.parallel.pipeline_model_parallel_size" 1
            "--$model.parallel.sequence_parallel" false)
    done
fi
exec bash launch/pretrain_opd.sh --config launch/recipes/chain_sum.toml \
    --output_dir runs/quickstart "${layout[@]}" "$@"
