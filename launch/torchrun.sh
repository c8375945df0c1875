#!/usr/bin/env bash
# A recipe on all GPUs of this machine, started by torchrun.
#   launch/torchrun.sh RECIPE.yaml [key=value ...]
# Settings: PROCESSES (default: one per GPU; on a machine without GPUs say how many), OMP_NUM_THREADS (1),
# STOP_TIMEOUT_S (120): how long a stopped run may take to end its step.
set -euo pipefail
: "${1:?usage: launch/torchrun.sh RECIPE.yaml [key=value ...]}"
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} TORCH_CPP_LOG_LEVEL=${TORCH_CPP_LOG_LEVEL:-ERROR}
# torchrun forwards these to the ranks and waits for them; by default SIGUSR1 would kill it.
export PET_SIGNALS_TO_HANDLE=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${STOP_TIMEOUT_S:-120}
exec torchrun --standalone --nproc-per-node "${PROCESSES:-gpu}" -m mezo_scale.cli train "$@"
