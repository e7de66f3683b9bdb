#!/bin/sh
# Two ways to make the same steps, in turn: the median step time of each run and the median of the ratios.
#   tests/bench_ranks.sh [ROUNDS [MODEL [GLOBAL_BATCH [STEPS [ONE [OTHER]]]]]]
# ONE and OTHER are STRATEGY:RANKS:THREADS: by default one process of 2 threads, and two ranks of ddp.
set -eu
rounds=${1:-9} model=${2:-vit_tiny_patch16_224} batch=${3:-8} steps=${4:-9}
one=${5:-single:1:2} other=${6:-ddp:2:1}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

# run STRATEGY:RANKS:THREADS: the median step time, without the first two steps
run() {
    strategy=${1%%:*} threads=${1##*:} ranks=${1#*:} ranks=${ranks%:*}
    rm -rf "$work/out"
    ./train --dataset synthetic --model "$model" --limit-train $((batch * 10)) --limit-val "$batch" \
        --batch-size $((batch / ranks)) --max-steps "$steps" --strategy "$strategy" \
        --nproc-per-node "$ranks" --threads-per-rank "$threads" --checkpoint-interval 1000 --quiet \
        --output-dir "$work/out" >/dev/null
    sed -n 's/.*"event":"step".*"step_time_s":\([0-9.e+-]*\),.*/\1/p' "$work/out/metrics.jsonl" |
        tail -n +3 | sort -g | awk '{ t[NR] = $1 } END { print t[int((NR + 1) / 2)] }'
}

echo "step time of $model, global batch $batch: $other against $one (strategy:ranks:threads)"
for _ in $(seq "$rounds"); do
    a=$(run "$one")
    b=$(run "$other")
    echo "$a $b" | awk -v one="$one" -v other="$other" '{
        printf "  %s %.4f s   %s %.4f s   ratio %.3f\n", one, $1, other, $2, $2 / $1 }'
    echo "$a $b" | awk '{ print $2 / $1 }' >>"$work/ratios"
done
sort -g "$work/ratios" | awk '{ r[NR] = $1 } END {
    printf "median ratio of %d rounds: %.3f (%.3f to %.3f)\n", NR, r[int((NR + 1) / 2)], r[1], r[NR] }'
