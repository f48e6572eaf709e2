#!/usr/bin/env bash
# Evaluate a model on this node's GPUs, or several nodes': `poweropd eval` started as
# pretrain_opd.sh starts training, with its variables and exit codes.
#
#   NPROC_PER_NODE=2 bash launch/eval.sh --config my_eval.toml [--eval.num_samples 16 ...]

set -euo pipefail

exec bash "$(dirname -- "${BASH_SOURCE[0]}")/pretrain_opd.sh" eval "$@"
