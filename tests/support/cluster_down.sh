#!/usr/bin/env bash
# Stops the cluster that cluster_up.sh started with the same CLUSTER_DIR, and nothing else; its logs stay. Safe to repeat.
set -euo pipefail
DIR=${CLUSTER_DIR:-/tmp/mezo-scale-cluster}
[ -f "$DIR/slurm.conf" ] || exit 0

ours() { # daemons of this cluster name its folder on their command line; pids may have been reused
  [ -r "/proc/$1/cmdline" ] && tr '\0' ' ' < "/proc/$1/cmdline" | grep -qF "$DIR/"
}
stop() { # NAME: the daemon whose pid is in run/NAME.pid
  local pid
  pid=$(cat "$DIR/run/$1.pid" 2>/dev/null) || return 0
  ours "$pid" || return 0
  kill "$pid" 2>/dev/null || true
  for ((t = 0; t < 50; t++)); do ours "$pid" || return 0; sleep 0.1; done
  kill -9 "$pid" 2>/dev/null || true
}

stop slurmctld
touch "$DIR/run/namespaces"
while read -r ns; do
  stop "slurmd-${ns#mezo-}"
  stop "sshd-${ns#mezo-}"
  for signal in TERM KILL; do # what jobs left running: whatever lives in a namespace that cluster_up.sh made
    left=$(ip netns pids "$ns")
    [ -n "$left" ] || break
    # shellcheck disable=SC2086
    kill -$signal $left 2>/dev/null || true
    for ((t = 0; t < 30; t++)); do [ -n "$(ip netns pids "$ns")" ] || break; sleep 0.1; done
  done
  ip netns del "$ns"
  freezer=/sys/fs/cgroup/freezer/slurm_${ns#mezo-}
  [ ! -d "$freezer" ] || find "$freezer" -depth -type d -exec rmdir {} + 2>/dev/null || true
done < "$DIR/run/namespaces"
stop munged
ip link del mezobr0 2>/dev/null || true
rm -f "$DIR/slurm.conf" "$DIR/env.sh"
