#!/bin/sh
# A real Slurm on this machine: munged, slurmctld and two virtual nodes of four processors each, in a folder of its own.
# Nothing of an installed Slurm is touched: own configuration, keys, ports and sockets.
#
# usage: sh tests/slurm/cluster.sh start FOLDER    then SLURM_CONF=FOLDER/slurm.conf srun ...
#        sh tests/slurm/cluster.sh stop FOLDER
#        sh tests/slurm/cluster.sh missing         prints the Debian packages that are missing
#
# PORT: the first of four TCP ports (default: 16817).
set -eu
PATH=$PATH:/usr/sbin:/sbin

missing() {
    for command in munged:munge slurmctld:slurmctld slurmd:slurmd srun:slurm-client; do
        command -v "${command%:*}" >/dev/null || echo "${command#*:}"
    done
    # What Slurm's PMIx support loads, and an Open MPI that speaks it.
    find /usr/lib -path '*/pmix2/lib/libpmix.so' 2>/dev/null | grep -q . || echo libpmix-dev
    /sbin/ldconfig -p | grep -q libmpi.so.40 || echo libopenmpi3
}

stop() {
    for file in "$folder"/run/*.pid; do
        [ ! -f "$file" ] || kill "$(cat "$file")" 2>/dev/null || true
    done
}

start() {
    mkdir -p "$folder/state" "$folder/spool" "$folder/log" "$folder/run"
    chmod 755 "$folder" "$folder/run" # munged refuses a socket that others cannot reach
    folder=$(cd "$folder" && pwd)
    user=$(id -un)
    port=${PORT:-16817}
    # MPICH names its shared memory after the job: a number that an earlier cluster had might meet what was left there.
    first_job=$(($(od -An -N3 -tu4 /dev/urandom | tr -d ' ') + 1))
    cat >"$folder/slurm.conf" <<CONF
ClusterName=test
SlurmctldHost=localhost(127.0.0.1)
SlurmctldPort=$port
SlurmctldPidFile=$folder/run/slurmctld.pid
SlurmctldLogFile=$folder/log/slurmctld.log
SlurmdPidFile=$folder/run/slurmd.%n.pid
SlurmdLogFile=$folder/log/slurmd.%n.log
SlurmdSpoolDir=$folder/spool/%n
StateSaveLocation=$folder/state
SlurmUser=$user
SlurmdUser=$user
SlurmdParameters=config_overrides
AuthType=auth/munge
AuthInfo=socket=$folder/run/munge.socket
CredType=cred/munge
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
ReturnToService=2
KillWait=2
FirstJobId=$first_job
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
NodeName=n[1-2] NodeHostname=localhost NodeAddr=127.0.0.1 Port=[$((port + 1))-$((port + 2))] CPUs=4 State=UNKNOWN
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP OverSubscribe=YES
CONF
    SLURM_CONF=$folder/slurm.conf
    export SLURM_CONF
    head -c 1024 /dev/urandom >"$folder/munge.key"
    chmod 400 "$folder/munge.key"
    munged --force --key-file="$folder/munge.key" --socket="$folder/run/munge.socket" \
        --pid-file="$folder/run/munged.pid" --log-file="$folder/log/munged.log" --seed-file="$folder/run/munged.seed"
    slurmctld -c
    slurmd -N n1
    slurmd -N n2
    for _ in $(seq 100); do
        [ "$(sinfo -h -o %T 2>/dev/null)" != idle ] || exit 0
        sleep 0.1
    done
    echo "error: the nodes did not come up in 10 s; the logs are in $folder/log" >&2
    stop
    exit 1
}

folder=${2:-}
case ${1:-}:$folder in
    missing:) missing ;;
    start:?*) start ;;
    stop:?*) stop ;;
    *)
        sed -n 's/^# \{0,1\}//; 2,8p' "$0" >&2
        exit 2
        ;;
esac
