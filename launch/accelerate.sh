#!/usr/bin/env bash
# A recipe started by `accelerate launch`, on this machine or, run on each of them, on several.
#   launch/accelerate.sh RECIPE.yaml [key=value ...]
#   NNODES=2 NODE_RANK=0 MASTER_ADDR=head launch/accelerate.sh RECIPE.yaml [key=value ...]
# Settings: CONFIG (accelerate.yaml beside this script, whose values the others override), PROCESSES per machine,
# NNODES, NODE_RANK (default: SLURM's), MASTER_ADDR, PORT (29500), STOP_TIMEOUT_S (120), OMP_NUM_THREADS (1).
set -euo pipefail
: "${1:?usage: launch/accelerate.sh RECIPE.yaml [key=value ...]}"
options=(--config_file "${CONFIG:-$(dirname "${BASH_SOURCE[0]}")/accelerate.yaml}" --main_process_port "${PORT:-29500}")
[ -z "${PROCESSES:-}" ] || options+=(--num_processes "$((PROCESSES * ${NNODES:-1}))")
if [ "${NNODES:-1}" -gt 1 ]; then
  rank=${NODE_RANK:-${SLURM_NODEID:?NODE_RANK is not set: 0 on the head, 1 on the next}}
  options+=(--num_machines "$NNODES" --machine_rank "$rank" --main_process_ip "${MASTER_ADDR:?the name of the head}")
fi
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} TORCH_CPP_LOG_LEVEL=${TORCH_CPP_LOG_LEVEL:-ERROR}
# torchrun, which accelerate starts, forwards these to the ranks and waits for them; by default SIGUSR1 would kill it.
export PET_SIGNALS_TO_HANDLE=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${STOP_TIMEOUT_S:-120}
exec accelerate launch "${options[@]}" -m mezo_scale.cli train "$@"
