#!/bin/sh
# An all-reduce of 64 MB between processes of this machine: ./train's transport against gloo's, in turn.
#   tests/bench_allreduce.sh [ROUNDS [RANKS [BACKEND]]]     BACKEND: tcp, or mpi under mpirun
# PYTORCH_VENV names a virtual environment with torch (default: build/venv, which make bench-pytorch makes).
set -eu
rounds=${1:-9} ranks=${2:-2} backend=${3:-tcp} python=${PYTORCH_VENV:-build/venv}/bin/python
[ -x "$python" ] || { echo "found no $python, expected a Python with torch (PYTORCH_VENV)" >&2; exit 1; }
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
port=$((20000 + $$ % 9000))

# processes COMMAND...: as every rank; what rank 0 prints lies in $work/0
processes() {
    port=$((port + 2)) pids=""
    for r in $(seq 0 $((ranks - 1))); do
        RANK=$r WORLD_SIZE=$ranks MASTER_ADDR=127.0.0.1 MASTER_PORT=$port "$@" >"$work/$r" &
        pids="$pids $!"
    done
    for pid in $pids; do wait "$pid"; done
}

echo "all-reduce of 64 MB between $ranks processes, $backend against gloo"
for _ in $(seq "$rounds"); do
    if [ "$backend" = mpi ]; then
        mpirun --allow-run-as-root --oversubscribe -n "$ranks" ./train env --backend mpi >"$work/0"
    else
        processes ./train env --backend "$backend"
    fi
    ours=$(awk '$1 == 67108864 { print $2 * 1e-6 }' "$work/0")
    processes "$python" tests/bench_allreduce.py
    echo "$ours $(cat "$work/0")" | tee -a "$work/pairs" |
        awk '{ printf "  %s s, gloo %s s: %.3f of its speed\n", $1, $2, $2 / $1 }'
done
awk '{ print $2 / $1 }' "$work/pairs" | sort -g | awk '{ r[NR] = $1 } END {
    printf "median of %d rounds: %.3f of gloo (%.3f to %.3f)\n", NR, r[int((NR + 1) / 2)], r[1], r[NR] }'
