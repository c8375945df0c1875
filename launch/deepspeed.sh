#!/usr/bin/env bash
# A recipe started by the deepspeed launcher, on this machine or on those of a hostfile.
#   launch/deepspeed.sh RECIPE.yaml [key=value ...]
#   HOSTFILE=hosts launch/deepspeed.sh RECIPE.yaml [key=value ...]     lines: HOSTNAME slots=8; needs pdsh and ssh
# Settings: PROCESSES on this machine (default: one per GPU), HOSTFILE, MASTER_ADDR (first host), PORT (29500).
# Under SLURM, where nodes may not allow ssh: srun launches one of these per node, with HOSTFILE, NODE_RANK and MASTER_ADDR.
set -euo pipefail
: "${1:?usage: [HOSTFILE=hosts] launch/deepspeed.sh RECIPE.yaml [key=value ...]}"
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
options=(--master_port "${PORT:-29500}" --no_local_rank)
[ -z "${MASTER_ADDR:-}" ] || options+=(--master_addr "$MASTER_ADDR")
if [ -n "${HOSTFILE:-}" ]; then
  options+=(--hostfile "$HOSTFILE" --force_multi)
  [ -z "${NODE_RANK:-}" ] || options+=(--no_ssh --node_rank "$NODE_RANK")
elif [ -n "${PROCESSES:-}" ]; then
  options+=(--num_accelerators "$PROCESSES")
fi
exec deepspeed "${options[@]}" --module mezo_scale.cli train "$@"
