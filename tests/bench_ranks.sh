#!/bin/sh
# Two rank threads (ddp) against one process with two threads, the same global batch, in turn: prints the step time of
# each round and the median of the ratios. tests/bench_ranks.sh [ROUNDS] [train options for both]
set -eu
rounds=${1:-9}
[ $# -gt 0 ] && shift
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
options=${*:-"--dataset synthetic --model vit_tiny_patch16_224 --limit-train 80 --limit-val 8 --batch-size 8 --max-steps 9"}

# The median step time of a run, without its first two steps; the batch size is that of all ranks.
run() {
    name=$1 ranks=$2 threads=$3
    batch=$(echo "$options" | sed -n 's/.*--batch-size \([0-9]*\).*/\1/p')
    rm -rf "$work/out"
    # shellcheck disable=SC2086
    ./train $options --batch-size $((batch / ranks)) --nproc-per-node "$ranks" --threads-per-rank "$threads" --quiet \
        --output-dir "$work/out" >/dev/null
    sed -n 's/.*"event":"step".*"step_time_s":\([0-9.e+-]*\),.*/\1/p' "$work/out/metrics.jsonl" | tail -n +3 | sort -g |
        awk '{ t[NR] = $1 } END { print t[int((NR + 1) / 2)] }'
}

echo "step time, $options"
for i in $(seq "$rounds"); do
    one=$(run single 1 2)
    two=$(run ddp 2 1)
    echo "$one $two" | awk '{ printf "  1 process x 2 threads %.4f s   2 ranks x 1 thread %.4f s   ratio %.3f\n", $1, $2, $2 / $1 }'
    echo "$one $two" | awk '{ print $2 / $1 }' >>"$work/ratios"
done
sort -g "$work/ratios" | awk '{ r[NR] = $1 } END { printf "median ratio of %d rounds: %.3f (%.3f to %.3f)\n", NR, r[int((NR + 1) / 2)], r[1], r[NR] }'
