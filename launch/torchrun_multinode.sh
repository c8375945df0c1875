#!/usr/bin/env bash
# A recipe on several machines, started by torchrun. Run the same line on every machine (srun, pdsh, or by hand):
#   NNODES=2 launch/torchrun_multinode.sh HEAD_HOST RECIPE.yaml [key=value ...]
# Settings: NNODES, PROCESSES per node (default: one per GPU), PORT of the rendezvous on the head (29500),
# JOIN_TIMEOUT_S until all machines must have met (300), STOP_TIMEOUT_S (120), OMP_NUM_THREADS (1).
set -euo pipefail
usage="usage: NNODES=N launch/torchrun_multinode.sh HEAD_HOST RECIPE.yaml [key=value ...]"
head=${1:?$usage}
: "${2:?$usage}" "${NNODES:?$usage}"
shift
port=${PORT:-29500} timeout=${JOIN_TIMEOUT_S:-300}
# It lingers, for srun --kill-on-bad-exit drops what has not reached it when the first task ends.
fail() { echo "$(hostname): $*" >&2; sleep 1; exit 1; }

address=$(getent ahosts "$head" | awk 'NR == 1 { print $1 }') || fail "the name of the head node, $head, does not resolve"
answers() { timeout 5 bash -c ": < /dev/tcp/$address/$port" 2>/dev/null; }
if [[ " $(hostname -I) 127.0.0.1 127.0.1.1 ::1 " == *" $address "* ]]; then
  ! answers || fail "port $port is taken, by an earlier run perhaps: end it, or set PORT to another one"
else
  deadline=$((SECONDS + timeout))
  until answers; do
    ((SECONDS < deadline)) || fail "can't reach the rendezvous at $head:$port ($address) within $timeout s"
    sleep 1
  done
fi

export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} TORCH_CPP_LOG_LEVEL=${TORCH_CPP_LOG_LEVEL:-ERROR}
# torchrun forwards these to the ranks and waits for them; by default SIGUSR1 would kill it.
export PET_SIGNALS_TO_HANDLE=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${STOP_TIMEOUT_S:-120}
exec torchrun --nnodes "$NNODES" --nproc-per-node "${PROCESSES:-gpu}" \
  --rdzv-backend c10d --rdzv-endpoint "$head:$port" --rdzv-id "${SLURM_JOB_ID:-mezo-scale}" \
  --rdzv-conf "join_timeout=$timeout" -m mezo_scale.cli train "$@"
