#!/usr/bin/env bash
# A real SLURM cluster (munge, slurmctld, one slurmd per node) of virtual nodes on this machine, from Debian's packages.
# Each node has its own network, hostname and mounts: "localhost" of one node is not that of another, and $DIR/local is
# a disk that every node has for itself. Everything else of the file system is shared, as on a cluster's parallel disk.
# Needs root. Afterwards: . $CLUSTER_DIR/env.sh; sbatch, srun, squeue. Stop with cluster_down.sh.
#   CLUSTER_DIR    state and logs, absolute (default /tmp/mezo-scale-cluster)
#   CLUSTER_NODES  how many nodes (default 2); each claims 8 CPUs and 4 GPUs, which need not exist
# Partitions: main (default) and preempt, whose jobs are requeued when a job in main needs the node.
set -euo pipefail
DIR=${CLUSTER_DIR:-/tmp/mezo-scale-cluster}
NODES=${CLUSTER_NODES:-2}
NET=10.214.91 # .1 is the controller, .11 and up are the nodes
HERE=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
die() { echo "cluster_up: $*" >&2; tail -n 5 "$DIR"/log/*.log >&2 2>/dev/null || true; exit 1; }
ready() { [ "$(SLURM_CONF=$DIR/slurm.conf timeout 10 sinfo -h -N -p main -t idle,mixed,allocated,completing -o %N 2>/dev/null | wc -l)" = "$NODES" ]; }

[ "$(id -u)" = 0 ] || die "must be root (it makes network namespaces)"
case $DIR in /*) ;; *) die "CLUSTER_DIR=$DIR is not an absolute path" ;; esac
if [ -f "$DIR/env.sh" ] && ready; then echo "cluster_up: already up, source $DIR/env.sh"; exit 0; fi
[ ! -e "$DIR" ] || [ -f "$DIR/log/cluster" ] || die "$DIR exists and is not the folder of a cluster"
CLUSTER_DIR=$DIR bash "$HERE/cluster_down.sh"
# What a cluster left whose processes all ended without cluster_down.sh (a kill, the end of a container) is removed.
for ns in $(ip netns list 2>/dev/null | awk '/^mezo-node/ {print $1}'); do
  [ -z "$(ip netns pids "$ns")" ] || die "another cluster is up ($ns has processes): stop it with its own CLUSTER_DIR"
  ip netns del "$ns"
done
if pgrep -x slurmctld -a | grep -q 'mezo-'; then die "another cluster's slurmctld is up: stop it with its own CLUSTER_DIR"; fi
ip link del mezobr0 2>/dev/null || true

missing=()
for package in munge slurmctld slurmd slurm-client openssh-server openssh-client pdsh iproute2; do
  dpkg-query -W -f='${Status}' "$package" 2>/dev/null | grep -q 'ok installed' || missing+=("$package")
done
if ((${#missing[@]})); then # RUNLEVEL=1: the packages must not start daemons of their own
  export DEBIAN_FRONTEND=noninteractive RUNLEVEL=1
  apt-get -o DPkg::Lock::Timeout=120 update -qq >/dev/null || die "apt-get update failed"
  apt-get -o DPkg::Lock::Timeout=120 install -y -qq --no-install-recommends "${missing[@]}" >/dev/null || die "apt-get install failed"
fi

rm -rf "$DIR"
install -d "$DIR" "$DIR"/{state,spool,log,run,dev,local}
install -d -m 700 "$DIR/ssh"
touch "$DIR/log/cluster"
(umask 077 && head -c 1024 /dev/urandom > "$DIR/run/munge.key")
nodes="node[1-$NODES]"
# The kernel's freezer lets SLURM end whatever a step left behind, as clusters do; without it only direct children.
tracking=linuxproc
if grep -q '^[^ ]* /sys/fs/cgroup/freezer cgroup rw' /proc/mounts; then tracking=cgroup; fi
# SLURM 22.05 refuses to start without a cgroup plugin; this one touches only the freezer, and only for tracking.
printf '%s\n' CgroupPlugin=cgroup/v1 CgroupAutomount=no > "$DIR/cgroup.conf"
for gpu in 0 1 2 3; do mknod "$DIR/dev/gpu$gpu" c 1 3; done # stand-ins: SLURM insists on device nodes
echo "NodeName=$nodes Name=gpu File=$DIR/dev/gpu[0-3]" > "$DIR/gres.conf"
touch "$DIR/plugstack.conf"
cp /etc/hosts "$DIR/hosts"
for ((i = 1; i <= NODES; i++)); do echo "$NET.$((10 + i)) node$i" >> "$DIR/hosts"; done
cat > "$DIR/slurm.conf" <<CONF
ClusterName=virtual
SlurmctldHost=$(hostname -s)($NET.1)
SlurmctldPort=26917
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket=$DIR/run/munge.sock,cred_expire=6
StateSaveLocation=$DIR/state
SlurmdSpoolDir=$DIR/spool/%n
SlurmctldPidFile=$DIR/run/slurmctld.pid
SlurmdPidFile=$DIR/run/slurmd-%n.pid
SlurmctldLogFile=$DIR/log/slurmctld.log
SlurmdLogFile=$DIR/log/slurmd-%n.log
PlugStackConfig=$DIR/plugstack.conf
ProctrackType=proctrack/$tracking
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SwitchType=switch/none
MpiDefault=none
MailProg=/bin/true
SlurmdParameters=config_overrides
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=sched_interval=1,bf_interval=2
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmctldParameters=preempt_send_user_signal
JobRequeue=1
EnforcePartLimits=ALL
ReturnToService=2
KillWait=10
GresTypes=gpu
$(for ((i = 1; i <= NODES; i++)); do
  echo "NodeName=node$i NodeAddr=$NET.$((10 + i)) CPUs=8 RealMemory=64000 Gres=gpu:4"
done)
PartitionName=main Nodes=$nodes Default=YES MaxTime=INFINITE PriorityTier=10 PreemptMode=OFF
PartitionName=preempt Nodes=$nodes MaxTime=INFINITE PriorityTier=1 PreemptMode=REQUEUE GraceTime=30
CONF
export SLURM_CONF=$DIR/slurm.conf

ssh-keygen -q -t ed25519 -N '' -f "$DIR/ssh/id"
printf '%s\n' "IdentityFile $DIR/ssh/id" 'StrictHostKeyChecking no' 'UserKnownHostsFile /dev/null' 'LogLevel ERROR' > "$DIR/ssh/config"
printf '%s\n' "HostKey $DIR/ssh/id" "AuthorizedKeysFile $DIR/ssh/id.pub" 'StrictModes no' 'PermitRootLogin prohibit-password' \
  'PasswordAuthentication no' 'UsePAM no' > "$DIR/ssh/sshd_config"
install -d /run/sshd

ip link add mezobr0 type bridge
ip addr add $NET.1/24 dev mezobr0
ip link set mezobr0 up
munged --key-file="$DIR/run/munge.key" --socket="$DIR/run/munge.sock" --pid-file="$DIR/run/munged.pid" \
  --log-file="$DIR/log/munged.log" --seed-file="$DIR/run/munge.seed" </dev/null >/dev/null 2>&1 || die "munged did not start"
slurmctld -f "$SLURM_CONF" </dev/null >/dev/null 2>&1 || die "slurmctld did not start"
for ((i = 1; i <= NODES; i++)); do
  ns=mezo-node$i
  install -d "$DIR/spool/node$i"
  ip netns add "$ns"
  echo "$ns" >> "$DIR/run/namespaces"
  ip link add "mezov$i" type veth peer name eth0 netns "$ns"
  ip link set "mezov$i" master mezobr0 up
  ip -n "$ns" addr add "$NET.$((10 + i))/24" dev eth0
  ip -n "$ns" link set lo up
  ip -n "$ns" link set eth0 up
  # nsenter and not "ip netns exec", which mounts another /sys and so hides the freezer
  nsenter --net="/run/netns/$ns" unshare --uts --mount sh -euc "
    hostname node$i
    mount --bind '$DIR/hosts' /etc/hosts
    mount --bind '$DIR/ssh/config' /etc/ssh/ssh_config
    mount -t tmpfs tmpfs '$DIR/local'
    /usr/sbin/sshd -f '$DIR/ssh/sshd_config' -o PidFile='$DIR/run/sshd-node$i.pid' -E '$DIR/log/sshd-node$i.log'
    exec slurmd -f '$SLURM_CONF' -N node$i" </dev/null >"$DIR/log/start-node$i.log" 2>&1 || die "node$i did not start"
done
echo "export SLURM_CONF=$DIR/slurm.conf" > "$DIR/env.sh"
for ((t = 0; t < 150; t++)); do
  ready && { echo "cluster_up: $NODES nodes, $(slurmctld -V), source $DIR/env.sh"; exit 0; }
  sleep 0.2
done
die "the nodes did not register within 30 s"
