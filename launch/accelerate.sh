#!/usr/bin/env bash
# A recipe started by `accelerate launch`, on this machine or, run on each of them, on several.
#   launch/accelerate.sh RECIPE.yaml [key=value ...]
#   NNODES=2 NODE_RANK=0 MASTER_ADDR=head launch/accelerate.sh RECIPE.yaml [key=value ...]
# Settings: CONFIG (launch/accelerate.yaml, whose values the others override), PROCESSES in all over all machines,
# NNODES, NODE_RANK, MASTER_ADDR, PORT (29500), STOP_TIMEOUT_S (120).
set -euo pipefail
: "${1:?usage: launch/accelerate.sh RECIPE.yaml [key=value ...]}"
options=(--config_file "${CONFIG:-$(dirname "${BASH_SOURCE[0]}")/accelerate.yaml}" --main_process_port "${PORT:-29500}")
[ -z "${PROCESSES:-}" ] || options+=(--num_processes "$PROCESSES")
[ -z "${NNODES:-}" ] || options+=(--num_machines "$NNODES" --machine_rank "${NODE_RANK:?}" --main_process_ip "${MASTER_ADDR:?}")
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
# torchrun, which accelerate starts, forwards these to the ranks and waits for them; by default SIGUSR1 would kill it.
export PET_SIGNALS_TO_HANDLE=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${STOP_TIMEOUT_S:-120}
exec accelerate launch "${options[@]}" -m mezo_scale.cli train "$@"
