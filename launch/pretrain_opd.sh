#!/usr/bin/env bash
""":"
# Start a training run. To bash, the line above is the command ":" and the Python below is a
# here-document that nothing reads; to Python, all of the bash is the docstring.
#
#   bash launch/pretrain_opd.sh --config launch/recipes/chain_sum.toml [--train_steps 50 ...]
#       starts one process per GPU of this node through torchrun, with any number of nodes
#   torchrun --nproc-per-node 8 launch/pretrain_opd.sh --config ...
#       is the same from a torchrun of yours
#   bash launch/pretrain_opd.sh eval --config my_eval.toml
#       starts `poweropd eval` in the same way (eval.sh is this)
#
# Set by you or by Slurm (srun with one task per node):
#   NNODES, NODE_RANK         nodes of the run, and which this one is      (1, 0)
#   MASTER_ADDR, MASTER_PORT  where node 0 listens, if NNODES > 1          (none, 29500)
#   GPUS_PER_NODE             processes to start                           (the GPUs that are visible)
#   NPROC_PER_NODE            the same, and the way to have several on CPU (1 without GPUs)
#   OMP_NUM_THREADS           threads per process on CPU                   (cores / processes)
#   POWEROPD_PYTHON           Python to run                                (see setup_env.sh)
# Exit code 2 says that the settings, the input or the variables above are wrong; 130 and 143, that
# Ctrl-C or SIGTERM ended the run, which the same command goes on with.

set -euo pipefail

here=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd -P)
script=$here/pretrain_opd.sh

fail() {
    echo "pretrain_opd.sh: $1" >&2
    exit 2
}

# integer <name> <smallest> <largest> [<why>]: refuse a variable that isn't a whole number between these.
integer() {
    if [[ ! ${!1} =~ ^[0-9]{1,9}$ ]] || ((10#${!1} < $2 || 10#${!1} > $3)); then
        fail "$1=${!1}: expected a whole number from $2 to $3${4:+ ($4)}"
    fi
    printf -v "$1" %d "$((10#${!1}))"
}

# Two jobs may share a node, so the port comes from the job.
read_slurm() {
    local nodes=${SLURM_STEP_NODELIST:-${SLURM_JOB_NODELIST:-}}
    [[ ${SLURM_LOCALID:-0} == 0 ]] ||
        fail "SLURM_LOCALID=$SLURM_LOCALID: one task per node starts all of its processes; use srun --ntasks-per-node=1"
    [[ -n ${SLURM_STEP_ID:-} ]] ||
        echo "pretrain_opd.sh: not in a Slurm step: node 0 waits for the others unless srun starts each" >&2
    MASTER_PORT=${MASTER_PORT:-$((15000 + ${SLURM_JOB_ID:-0} % 15000))}
    if [[ -z ${MASTER_ADDR:-} ]]; then
        read -r MASTER_ADDR < <(scontrol show hostnames "$nodes") ||
            fail "'scontrol show hostnames $nodes' gave no host: set MASTER_ADDR to the first node"
    fi
}

environment=$(bash "$here/setup_env.sh" --find)
eval "$environment"

for argument in "$@"; do
    case $argument in
        -h | --help | --print_config) exec "$POWEROPD_PYTHON" "$script" "$@" ;;
    esac
done

NNODES=${NNODES:-${SLURM_NNODES:-1}}
GPUS_PER_NODE=${GPUS_PER_NODE:-$(bash "$here/count_gpus.sh")}
integer NNODES 1 100000
integer GPUS_PER_NODE 0 1000
NPROC_PER_NODE=${NPROC_PER_NODE:-$((GPUS_PER_NODE > 0 ? GPUS_PER_NODE : 1))}
integer NPROC_PER_NODE 1 1000
((GPUS_PER_NODE == 0 || NPROC_PER_NODE <= GPUS_PER_NODE)) ||
    fail "NPROC_PER_NODE=$NPROC_PER_NODE, but a process needs a GPU of its own and there are $GPUS_PER_NODE"

if ((NNODES > 1)); then
    [[ -z ${SLURM_NNODES:-} ]] || read_slurm
    NODE_RANK=${NODE_RANK:-${SLURM_NODEID:-}}
    MASTER_PORT=${MASTER_PORT:-29500}
    [[ -n $NODE_RANK ]] ||
        fail "NNODES=$NNODES needs NODE_RANK, this node's number from 0 (srun sets it; NNODES=1 runs on this node alone)"
    [[ -n ${MASTER_ADDR:-} ]] ||
        fail "NNODES=$NNODES needs MASTER_ADDR, the address of the node whose NODE_RANK is 0"
    integer MASTER_PORT 1 65535
    rendezvous=(--nnodes="$NNODES" --node-rank="$NODE_RANK"
        --master-addr="$MASTER_ADDR" --master-port="$MASTER_PORT")
else
    NODE_RANK=${NODE_RANK:-0}
    rendezvous=(--standalone --nnodes=1 --local-addr=127.0.0.1)
fi
integer NODE_RANK 0 $((NNODES - 1)) "NNODES=$NNODES"

# The settings are checked once, by one process, before any rank starts.
WORLD_SIZE=$((NNODES * NPROC_PER_NODE)) "$POWEROPD_PYTHON" "$script" "$@" --print_config >/dev/null

if ((GPUS_PER_NODE == 0)) && [[ -z ${OMP_NUM_THREADS:-} ]]; then
    export OMP_NUM_THREADS=$(($(nproc) / NPROC_PER_NODE > 0 ? $(nproc) / NPROC_PER_NODE : 1))
fi
command=("$POWEROPD_PYTHON" "$here/torchrun.py" "${rendezvous[@]}"
    --nproc-per-node="$NPROC_PER_NODE" "$script" "$@")
printf '%q ' "${command[@]}" >&2
echo >&2
exec "${command[@]}"
: <<'# end of the Python part'
"""

import os
import signal
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

# Megatron's checkpoint writer may spawn processes, which import this file again.
if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Until main() listens, Ctrl-C just ends this.
    from poweropd_megatron.cli.main import main

    command = [] if sys.argv[1:2] == ["eval"] else ["train"]
    code = main([*command, *sys.argv[1:]])
    if code == 2 and os.environ.get("RANK", "0") != "0":
        # torchrun ends every rank as soon as one fails, and rank 0 may still have to say why.
        time.sleep(10)
    sys.exit(code)
# end of the Python part
