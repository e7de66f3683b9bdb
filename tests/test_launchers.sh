#!/bin/sh
# Ranks that mpirun, torchrun and Slurm start: the numbers of the local transport, and failures that end.
# torchrun is that of PYTORCH_VENV, or the one on the PATH. Slurm is started here, four nodes on this machine.
. tests/lib.sh
port=$((20000 + $$ % 9000))
small="--image-size 16 --patch-size 8 --embed-dim 32 --depth 1 --num-heads 2 --batch-size 8 --threads-per-rank 1"
digits="--max-steps 4 --batch-size 8 --gradient-accumulation-steps 2 --threads-per-rank 1 --timeout 30"
here=$(pwd)
mnist_of mnist 64

# local NAME RANKS OPTIONS...: the same training on rank threads of one process
local_run() {
    name=$1 ranks=$2
    shift 2
    # shellcheck disable=SC2086
    "$train" --nproc-per-node "$ranks" $digits "$@" --quiet --output-dir "$work/$name" >/dev/null 2>&1
}

# dead NAME STATUS: the launcher failed, and one line says which rank was lost
dead() {
    wrong=""
    [ "$2" != 0 ] && [ "$2" != 124 ] || wrong="exit status $2 of the launcher"
    grep -q "^train: error: rank [0-9]* lost rank" "$work/$1.log" || wrong="found no line about a lost rank"
    verdict "$1: ends with a line that names the lost rank" "$wrong"
}

# victim RANK DIRECTORY: the process of that rank of the run in that directory
victim() {
    for p in /proc/[0-9]*; do
        tr '\0' '\n' <"$p/cmdline" | grep -qx "$work/$2" || continue
        tr '\0' '\n' <"$p/environ" | grep -qxE "(RANK|SLURM_PROCID|OMPI_COMM_WORLD_RANK)=$1" || continue
        [ "$(readlink "$p/exe")" = "$(readlink -f "$train")" ] && basename "$p"
    done 2>/dev/null | head -1
}

# kill_when_trained RANK DIRECTORY: with -9, as soon as a step is logged
kill_when_trained() {
    for _ in $(seq 300); do
        grep -q '"event":"step"' "$work/$2/metrics.jsonl" 2>/dev/null && break
        sleep 0.1
    done
    pid=$(victim "$1" "$2")
    [ -n "$pid" ] && kill -9 "$pid"
}

# ------------------------------------------------------------------------------------------------------- MPI
if "$train" env 2>/dev/null | grep -q "^backends.* mpi" && command -v mpirun >/dev/null; then
    export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1 OMPI_MCA_rmaps_base_oversubscribe=1
    export OMPI_MCA_mpi_yield_when_idle=1
    for n in 2 3 4; do
        for strategy in dp ddp zero1 zero2 zero3; do
            local_run local $n --strategy $strategy
            # shellcheck disable=SC2086
            timeout 60 mpirun --bind-to none -n $n "$train" $digits --strategy $strategy --quiet \
                --output-dir "$work/mpi" >"$work/log" 2>&1 || cat "$work/log"
            wrong=$(difference mpi local)
            grep -q '"backend":[[:space:]]*"mpi"' "$work/mpi/config.json" || wrong="it was not over MPI"
            verdict "mpirun: $strategy on $n processes" "$wrong"
            rm -rf "$work/mpi" "$work/local"
        done
    done
    local_run local 2 --strategy zero3 --precision bf16
    # shellcheck disable=SC2086
    mpirun --bind-to none -n 2 "$train" $digits --strategy zero3 --precision bf16 --quiet \
        --output-dir "$work/mpi" >/dev/null 2>&1
    verdict "mpirun: zero3 in bf16" "$(difference mpi local)"
    # shellcheck disable=SC2086
    mpirun --bind-to none -n 2 "$train" $digits --strategy zero3 --precision bf16 --backend tcp --quiet \
        --output-dir "$work/tcp" >/dev/null 2>&1
    verdict "mpirun: over TCP" "$(difference tcp local)"

    if [ -x "$build/plain/test_transport" ]; then
        for n in 2 3; do
            timeout 120 mpirun --bind-to none -n $n "$build/plain/test_transport" mpi >"$work/log" 2>&1
            status=$?
            verdict "mpirun: every collective, type and size, $n processes" \
                "$([ $status = 0 ] || echo "exit status $status: $(head -1 "$work/log")")"
        done
    else
        skip "mpirun: every collective" "found no $build/plain/test_transport (make test builds it)"
    fi

    OMPI_COMM_WORLD_RANK=0 OMPI_COMM_WORLD_SIZE=2 timeout 60 "$train" env >/dev/null 2>"$work/log"
    status=$?
    wrong=""
    [ $status = 1 ] || wrong="exit status $status, expected 1"
    grep -q "^train: error: MPI says rank 0 of 1, the launcher said rank 0 of 2" "$work/log" ||
        wrong="found no line about the two sizes"
    verdict "mpirun: another MPI than the launcher's is refused" "$wrong"

    # rank 1 has one step less: its evaluation must not be taken for the others' training
    # shellcheck disable=SC2016
    timeout 60 mpirun --bind-to none -n 3 sh -c 'n=9; [ "$OMPI_COMM_WORLD_RANK" = 1 ] && n=8
        exec "$@" --max-steps $n' - "$train" --threads-per-rank 1 --quiet --timeout 20 \
        --output-dir "$work/mpi-other" >"$work/log" 2>&1
    status=$?
    wrong=""
    [ $status != 0 ] && [ $status != 124 ] || wrong="exit status $status of mpirun"
    grep -q "^train: error: ranks 0 and 1 disagree: .* against control" "$work/log" || wrong="found no such line"
    [ "$(grep -c '^train: error' "$work/log")" = 1 ] || wrong="not one line"
    verdict "mpirun: ranks that disagree" "$wrong"

    timeout 60 mpirun --bind-to none -n 3 "$train" --epochs 1000 --threads-per-rank 1 --quiet --timeout 20 \
        --output-dir "$work/mpi-killed" >"$work/log" 2>&1 &
    job=$!
    kill_when_trained 1 mpi-killed
    wait $job
    status=$?
    wrong=""
    [ $status != 0 ] && [ $status != 124 ] || wrong="exit status $status of mpirun"
    [ -z "$(victim 0 mpi-killed)$(victim 2 mpi-killed)" ] || wrong="other ranks live on"
    verdict "mpirun: a killed rank ends the others" "$wrong"
else
    skip "mpirun" "found no mpirun, or a program built without MPI (libopenmpi-dev, openmpi-bin)"
fi

# -------------------------------------------------------------------------------------------------- torchrun
torchrun=${PYTORCH_VENV:+$PYTORCH_VENV/bin/}torchrun
if command -v "$torchrun" >/dev/null; then
    # agents NAME OPTIONS...: two agents with two ranks each; their exit statuses are in $statuses
    agents() {
        name=$1 statuses=""
        shift
        port=$((port + 3))
        for node in 0 1; do
            timeout 120 "$torchrun" --no-python --nnodes 2 --node-rank $node --nproc-per-node 2 \
                --master-addr 127.0.0.1 --master-port $port "$train" "$@" --threads-per-rank 1 --quiet \
                --output-dir "$work/$name" >"$work/$name.$node" 2>&1 &
            eval "agent$node=\$!"
        done
    }
    agents_end() {
        # shellcheck disable=SC2154
        for agent in $agent0 $agent1; do
            wait "$agent"
            statuses="$statuses $?"
        done
        cat "$work/$1".? >"$work/$1.log"
    }
    # shellcheck disable=SC2086
    agents torchrun $digits --strategy zero3
    local_run local-torchrun 4 --strategy zero3
    agents_end torchrun
    wrong=$(difference torchrun local-torchrun)
    [ "$statuses" = " 0 0" ] || wrong="exit statuses$statuses, expected 0"
    verdict "torchrun: two agents of two ranks" "$wrong"

    agents torchrun-killed --epochs 1000 --timeout 20
    kill_when_trained 3 torchrun-killed
    agents_end torchrun-killed
    case $statuses in *" 0"*) bad "torchrun: a killed rank" "exit statuses$statuses, expected none of 0" ;; esac
    dead torchrun-killed 1

    # shellcheck disable=SC2086
    TORCHRUN=$torchrun DEVICE=cpu GPUS=1 RUNS=$work/script PORT=$((port + 5)) timeout 120 \
        scripts/torchrun.sh 127.0.0.1 0 "$work/mnist" $small --max-steps 2 --quiet \
        >"$work/log" 2>&1 &
    job=$!
    # shellcheck disable=SC2086
    TORCHRUN=$torchrun DEVICE=cpu GPUS=1 RUNS=$work/script PORT=$((port + 5)) timeout 120 \
        scripts/torchrun.sh 127.0.0.1 1 "$work/mnist" $small --max-steps 2 --quiet \
        >/dev/null 2>&1
    wait $job
    verdict "scripts/torchrun.sh" "$([ -s "$work/script/checkpoints/latest" ] || grep error "$work/log" | head -1)"
else
    skip "torchrun" "found none, neither in PYTORCH_VENV nor on the PATH (pip install torch)"
fi

# ----------------------------------------------------------------------------------------------------- Slurm
if ! command -v slurmctld >/dev/null || ! command -v slurmd >/dev/null || ! command -v munged >/dev/null; then
    skip "Slurm" "found no slurmctld, slurmd and munged (slurm-wlm, munge)"
    exit $failed
elif [ "$(id -u)" != 0 ]; then
    skip "Slurm" "its daemons want to be started by root"
    exit $failed
fi
slurm=$work/slurm
stop_slurm() {
    for file in "$slurm"/*.pid; do [ -s "$file" ] && kill "$(cat "$file")" 2>/dev/null; done
    [ -z "${munged:-}" ] || kill "$munged" 2>/dev/null
    sleep 0.3
    rm -rf "$work"
}
trap stop_slurm EXIT
mkdir -p "$slurm/state" "$slurm/spool" "$slurm/tmp/n0" "$slurm/tmp/n1" "$slurm/tmp/n2" "$slurm/tmp/n3"
if ! munge -n >/dev/null 2>&1; then
    install -d -o munge -g munge -m 755 /run/munge
    su munge -s /bin/sh -c /usr/sbin/munged && munged=$(cat /run/munge/munged.pid)
fi
cat >"$slurm/slurm.conf" <<END
ClusterName=test
SlurmctldHost=$(hostname -s)(127.0.0.1)
SlurmUser=root
AuthType=auth/munge
SlurmctldPort=$((port + 20))
StateSaveLocation=$slurm/state
SlurmdSpoolDir=$slurm/spool/%n
SlurmctldPidFile=$slurm/ctld.pid
SlurmdPidFile=$slurm/%n.pid
SlurmctldLogFile=$slurm/ctld.log
SlurmdLogFile=$slurm/%n.log
TmpFS=$slurm/tmp/%n
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
ReturnToService=2
SlurmdParameters=config_overrides
NodeName=n[0-3] NodeHostname=$(hostname -s) NodeAddr=127.0.0.1 Port=[$((port + 21))-$((port + 24))] CPUs=4 RealMemory=2000 State=UNKNOWN
PartitionName=p Nodes=ALL Default=YES MaxTime=INFINITE State=UP OverSubscribe=YES
END
export SLURM_CONF="$slurm/slurm.conf" MASTER_ADDR=127.0.0.1 # the nodes' names are known to Slurm alone
slurmctld -f "$SLURM_CONF"
for i in 0 1 2 3; do slurmd -f "$SLURM_CONF" -N n$i; done
for _ in $(seq 50); do
    idle=$(sinfo -h -t idle -o %D 2>/dev/null)
    [ "$idle" = 4 ] && break
    sleep 0.2
done
if [ "$idle" != 4 ]; then
    skip "Slurm" "its four nodes do not come up on this machine: $(tail -qn 1 "$slurm"/*.log | head -1)"
    exit $failed
fi

# submit NAME SECONDS OPTIONS OF ./train...: the batch script, with results in NAME-ddp and NAME-zero3, SIGTERM so
# many seconds before the limit of a minute, and its own port. Prints the number of the job.
submit() {
    name=$1 before=$2
    shift 2
    # shellcheck disable=SC2086
    MASTER_PORT=$((port + 30 + 2 * ${#name})) DEVICE=cpu RUNS="$work/$name" sbatch --parsable --nodes 2 \
        --ntasks-per-node 2 --cpus-per-task 1 --gpus-per-node 0 --chdir "$here" --output "$work/$name.log" \
        --signal "TERM@$before" --time 1 scripts/slurm.sh "$work/mnist" $small --quiet --timeout 20 "$@"
}
# finished JOB: waits for its end (sbatch -W asks too seldom)
finished() {
    for _ in $(seq 300); do
        [ -n "$(squeue -h -j "$1" 2>/dev/null)" ] || return
        sleep 0.3
    done
}

# The signal comes 5 s after the start at the earliest, and up to half a minute later: meanwhile the rest goes on.
signalled=$(submit signalled 55 --epochs 100000 --checkpoint-interval 100000)

export MASTER_PORT=$((port + 60))
# shellcheck disable=SC2086
timeout 60 srun -N 4 -n 4 -K1 "$train" $digits --strategy zero3 --quiet --output-dir "$work/srun" \
    >"$work/log" 2>&1 || cat "$work/log"
local_run local-srun 4 --strategy zero3
verdict "srun: four nodes of one rank" "$(difference srun local-srun)"

# a rank is killed: -K1 ends the step
export MASTER_PORT=$((port + 62))
timeout 60 srun -N 2 -n 2 -K1 "$train" --epochs 1000 --threads-per-rank 1 --timeout 20 --quiet \
    --output-dir "$work/srun-killed" >"$work/srun-killed.log" 2>&1 &
job=$!
kill_when_trained 1 srun-killed
wait $job
status=$?
verdict "srun: a killed rank ends the others" \
    "$([ $status != 0 ] && [ $status != 124 ] || echo "exit status $status")"

# The batch script, DDP then ZeRO-3; and after SIGTERM, from whose checkpoint the same script goes on.
finished "$(submit batch 1 --max-steps 4)"
wrong=""
for strategy in ddp zero3; do
    [ "$(cat "$work/batch-$strategy/checkpoints/latest" 2>/dev/null)" = step-00000004 ] ||
        wrong="$strategy: $(tail -1 "$work/batch.log")"
done
verdict "sbatch scripts/slurm.sh" "$wrong"

finished "$signalled"
wrong=""
latest=$(cat "$work/signalled-ddp/checkpoints/latest" 2>/dev/null)
[ -n "$latest" ] || wrong="found no checkpoint: $(tail -1 "$work/signalled.log")"
[ ! -e "$work/signalled-zero3" ] || wrong="the script went on after the signal"
verdict "sbatch: SIGTERM before the time limit writes a checkpoint" "$wrong"
if [ -n "$latest" ]; then
    steps=$(($(echo "$latest" | sed "s/step-0*//") + 2))
    job=$(submit signalled 1 --max-steps $steps --checkpoint-interval 100000)
    for _ in $(seq 150); do # until DDP is through; ZeRO-3, which would do all the steps, is not waited for
        last=$(sed 's/step-0*//' "$work/signalled-ddp/checkpoints/latest")
        [ "$last" = $steps ] && break
        sleep 0.2
    done
    scancel "$job"
    finished "$job"
    verdict "sbatch: submitted again, it goes on" "$([ "$last" = $steps ] || echo "ended at $last, expected $steps")"
fi
exit $failed
