#!/usr/bin/env bash
# A recipe started by the deepspeed launcher, on this machine or on those of a hostfile.
#   launch/deepspeed.sh RECIPE.yaml [key=value ...]
#   HOSTFILE=hosts launch/deepspeed.sh RECIPE.yaml [key=value ...]     lines: HOSTNAME slots=8; needs pdsh and ssh
# Without ssh, start it on every machine with HOSTFILE, MASTER_ADDR and NODE_RANK (default: SLURM's).
# Settings: PROCESSES on this machine (default: one per GPU), MASTER_ADDR (default: the first host), PORT (29500).
set -euo pipefail
: "${1:?usage: [HOSTFILE=hosts] launch/deepspeed.sh RECIPE.yaml [key=value ...]}"
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} TORCH_CPP_LOG_LEVEL=${TORCH_CPP_LOG_LEVEL:-ERROR}
options=(--master_port "${PORT:-29500}" --no_local_rank)
node_rank=${NODE_RANK:-${SLURM_NODEID:-}}
if [ -n "${HOSTFILE:-}" ]; then
  options+=(--hostfile "$HOSTFILE" --force_multi)
  [ -z "$node_rank" ] || options+=(--no_ssh --node_rank "$node_rank")
  [ -z "${MASTER_ADDR:-}" ] || options+=(--master_addr "$MASTER_ADDR")
elif [ -n "${PROCESSES:-}" ]; then
  options+=(--num_accelerators "$PROCESSES")
fi
exec deepspeed "${options[@]}" --module mezo_scale.cli train "$@"
