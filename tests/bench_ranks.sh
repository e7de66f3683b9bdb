#!/bin/sh
# Two rank threads (ddp) against one process with two threads, the same global batch, in turn: prints the
# median step time of each run and the median of the ratios.
#   tests/bench_ranks.sh [ROUNDS [MODEL [GLOBAL_BATCH [STEPS]]]]
set -eu
rounds=${1:-9} model=${2:-vit_tiny_patch16_224} batch=${3:-8} steps=${4:-9}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

# run RANKS THREADS: the median step time, without the first two steps
run() {
    rm -rf "$work/out"
    ./train --dataset synthetic --model "$model" --limit-train $((batch * 10)) --limit-val "$batch" \
        --batch-size $((batch / $1)) --max-steps "$steps" --nproc-per-node "$1" --threads-per-rank "$2" \
        --checkpoint-interval 1000 --quiet --output-dir "$work/out" >/dev/null
    sed -n 's/.*"event":"step".*"step_time_s":\([0-9.e+-]*\),.*/\1/p' "$work/out/metrics.jsonl" |
        tail -n +3 | sort -g | awk '{ t[NR] = $1 } END { print t[int((NR + 1) / 2)] }'
}

echo "step time of $model, global batch $batch"
for _ in $(seq "$rounds"); do
    one=$(run 1 2)
    two=$(run 2 1)
    echo "$one $two" |
        awk '{ printf "  1 x 2 threads %.4f s   2 ranks %.4f s   ratio %.3f\n", $1, $2, $2 / $1 }'
    echo "$one $two" | awk '{ print $2 / $1 }' >>"$work/ratios"
done
sort -g "$work/ratios" | awk '{ r[NR] = $1 } END {
    printf "median ratio of %d rounds: %.3f (%.3f to %.3f)\n", NR, r[int((NR + 1) / 2)], r[1], r[NR] }'
