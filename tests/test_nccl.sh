#!/bin/sh
# dist_nccl.c over tests/fake_nccl.c, a second implementation of NCCL's interface, and vit_cuda.cu on the CPU: the
# numbers of the local transport, processes that the program starts itself, failures. NCCL itself needs a GPU
# (make test-gpu).
. tests/lib.sh
fake=$build/cuda_on_cpu/train
[ -x "$fake" ] && "$fake" env | grep -q '^backends .*nccl' ||
    { skip "NCCL" "the program was built without it (nvcc, nccl.h)"; exit 0; }
export CUDA_ON_CPU_DEVICES=4
options="--max-steps 4 --limit-val 16 --batch-size 8 --gradient-accumulation-steps 2 --threads-per-rank 1 --quiet"

# cuda NAME OPTIONS...: a run on devices; its exit status is in $status
cuda() {
    name=$1
    shift
    timeout 60 "$fake" --device cuda --deterministic --timeout 20 "$@" --output-dir "$work/$name" \
        >"$work/$name.log" 2>&1
    status=$?
}

# over NAME OPTIONS...: the same over NCCL and, as NAME-local, by threads; prints what differs
over() {
    pair=$1
    shift
    cuda "$pair-local" --backend local "$@"
    cuda "$pair" "$@"
    difference "$pair" "$pair-local"
}

for n in 2 3; do
    for strategy in dp ddp zero1 zero2 zero3; do
        # shellcheck disable=SC2086
        wrong=$(over nccl --nproc-per-node $n --strategy $strategy $options)
        grep -q '"backend":[[:space:]]*"nccl"' "$work/nccl/config.json" || wrong="it was not over NCCL"
        verdict "$strategy on $n processes" "$wrong"
        rm -rf "$work/nccl" "$work/nccl-local"
    done
done
# shellcheck disable=SC2086
verdict "zero3 in bf16" "$(over half --nproc-per-node 2 --strategy zero3 --precision bf16 $options)"

# the optimizer in host memory: the same files, and the ledger says where it lies
for run in "2 ddp bf16" "2 zero1 fp16" "2 zero3 fp32"; do
    # shellcheck disable=SC2086
    set -- $run
    # shellcheck disable=SC2086
    wrong=$(over offload --offload optimizer --nproc-per-node $1 --strategy $2 --precision $3 $options)
    here=$(jq -s "map(select(.event == \"memory\" and .optimizer_bytes == 0 and .host_bytes > 0)) | length" \
        "$work/offload/metrics.jsonl")
    [ "$here" = "$1" ] || wrong="found $here lines of memory with an optimizer on the host, expected $1"
    verdict "offload: $2 on $1, $3" "$wrong"
    rm -rf "$work/offload" "$work/offload-local"
done

# steps as graphs, with the collectives in them: the third and the fourth are replayed
for strategy in dp ddp zero1 zero2 zero3; do
    # shellcheck disable=SC2086
    cuda launched --nproc-per-node 2 --strategy $strategy $options
    # shellcheck disable=SC2086
    cuda graphs --cuda-graphs --nproc-per-node 2 --strategy $strategy $options
    wrong=$(difference launched graphs)
    sent() { jq -c 'select(.event == "communication") | [.rank, .op, .calls_per_step, .wire_bytes_per_step]' \
        "$work/$1/metrics.jsonl"; }
    [ -n "$(sent graphs)" ] && [ "$(sent graphs)" = "$(sent launched)" ] || wrong="$wrong other traffic: $(sent graphs)"
    verdict "$strategy on 2 processes as CUDA graphs" "$wrong"
    rm -rf "$work/launched" "$work/graphs"
done

# one rank, as far as NCCL can be tried on a machine with one GPU
# shellcheck disable=SC2086
RANK=0 WORLD_SIZE=1 MASTER_ADDR=127.0.0.1 MASTER_PORT=$((20000 + $$ % 9000)) cuda one --backend nccl \
    --strategy zero3 $options
# shellcheck disable=SC2086
cuda one-local --strategy single $options
verdict "one rank" "$(difference one one-local)"

export NCCL_DEBUG=WARN NCCL_SOCKET_IFNAME=lo
# shellcheck disable=SC2086
cuda settings --nproc-per-node 2 $options
verdict "NCCL's settings are recorded" "$(jq -r '.run.NCCL_DEBUG + " " + .run.NCCL_SOCKET_IFNAME' \
    "$work/settings/config.json" | grep -vx "WARN lo")"

# one_error NAME PATTERN: exit status 1, and one line of an error, which matches
one_error() {
    wrong=""
    grep -q "^train: error: .*$2" "$work/$1.log" || wrong="found no error with '$2': $(tail -1 "$work/$1.log")"
    [ "$(grep -c "^train: error: " "$work/$1.log")" = 1 ] || wrong="found not one error line: $(cat "$work/$1.log")"
    [ "$status" = 1 ] || wrong="exit status $status, expected 1"
    verdict "$1" "$wrong"
}
FAKE_NCCL_FAIL=1:7 cuda asynchronous --nproc-per-node 3 --epochs 1000 --quiet
one_error asynchronous "rank 1: NCCL: a remote process has failed (fake), after [a-z_]* [0-9]* ("
CUDA_ON_CPU_DEVICES=2 cuda devices --nproc-per-node 3
one_error devices "found 2 CUDA devices, .*--backend local"
cuda data --nproc-per-node 2 --data-path /nowhere
one_error data "/nowhere"

"$fake" --device cuda --nproc-per-node 3 --epochs 1000 --quiet --timeout 20 --output-dir "$work/killed" \
    >"$work/killed.log" 2>&1 &
job=$!
for _ in $(seq 100); do
    grep -q '"event":"step"' "$work/killed/metrics.jsonl" 2>/dev/null && break
    sleep 0.1
done
begin=$(date +%s)
for child in $(cat /proc/$job/task/$job/children); do
    tr '\0' '\n' <"/proc/$child/environ" | grep -qx RANK=1 && kill -9 "$child"
done
wait $job
status=$?
one_error killed "lost rank 1 after [a-z_]* [0-9]* ("
verdict "killed: at once" "$([ $(($(date +%s) - begin)) -le 5 ] || echo "it took longer than 5 s")"

"$fake" --device cuda --nproc-per-node 2 --epochs 1000 --quiet --output-dir "$work/stopped" >/dev/null 2>&1 &
job=$!
for _ in $(seq 100); do
    grep -q '"event":"step"' "$work/stopped/metrics.jsonl" 2>/dev/null && break
    sleep 0.1
done
kill -TERM $job
wait $job
status=$?
wrong=""
[ "$status" = 130 ] || wrong="exit status $status, expected 130"
[ -s "$work/stopped/checkpoints/latest" ] || wrong="found no checkpoint"
verdict "SIGTERM to the program that has started the ranks" "$wrong"

# The GPU's figures: fixed ones, from tests/fake_nvml.c; a GPU does not tell all of them, or there is no library
LD_LIBRARY_PATH=$build/plain
export LD_LIBRARY_PATH
# shellcheck disable=SC2086
cuda figures --nproc-per-node 2 --strategy zero3 --precision fp16 $options
unset LD_LIBRARY_PATH
wrong=$(jq -r -s --slurpfile config "$work/figures/config.json" --argjson images 1438 --argjson val 16 \
    --argjson channels 1 -f tests/metrics.jq "$work/figures/metrics.jsonl" 2>&1 | head -3)
found=$(jq -c 'select(.event == "step") | [.gpu_utilization, .gpu_memory_bytes, .gpu_power_w, .gpu_temperature_c]' \
    "$work/figures/metrics.jsonl" | sort -u)
[ "$found" = "[0.87,5000000000,null,61]" ] || wrong="$wrong found $found"
verdict "figures of NVML in metrics.jsonl" "$wrong"
# shellcheck disable=SC2086
CUDA_ON_CPU_DEVICES=1 cuda no-figures $options
wrong=""
if jq -e 'select(.event == "step") | has("gpu_power_w")' "$work/no-figures/metrics.jsonl" >/dev/null; then
    [ -n "$(ldconfig -p 2>/dev/null | grep libnvidia-ml)" ] || wrong="found figures"
else
    grep -q '^train: warning: NVML: ' "$work/no-figures.log" || wrong="found no warning"
fi
verdict "no NVML: a warning, and no figures" "$wrong"

# The same starter over TCP, on the CPU
# shellcheck disable=SC2086
"$train" --backend tcp --nproc-per-node 3 --strategy zero2 $options --output-dir "$work/tcp" >/dev/null 2>&1
# shellcheck disable=SC2086
"$train" --nproc-per-node 3 --strategy zero2 $options --output-dir "$work/threads" >/dev/null 2>&1
verdict "--backend tcp --nproc-per-node 3" "$(difference tcp threads)"
exit $failed
