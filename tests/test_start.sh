#!/bin/sh
# Ranks that the program starts itself as processes: the numbers of rank threads, one error line in all, and
# ends that are everyone's.
. tests/lib.sh
common="--batch-size 8 --threads-per-rank 1 --quiet --timeout 20"

for strategy in dp ddp zero1 zero2 zero3; do
    set -- --max-steps 4 --strategy $strategy --gradient-accumulation-steps 2 --nproc-per-node 3
    # shellcheck disable=SC2086
    "$train" --backend tcp "$@" $common --output-dir "$work/tcp" >"$work/out" 2>"$work/err"
    wrong=$([ $? = 0 ] || echo "exit status not 0: $(head -1 "$work/err")")
    # shellcheck disable=SC2086
    "$train" "$@" $common --output-dir "$work/local" >/dev/null 2>&1
    verdict "$strategy on 3 processes" "$wrong$(difference tcp local)"
    rm -rf "$work/tcp" "$work/local"
done

"$train" env --nproc-per-node 2 --backend tcp >"$work/out" 2>&1
verdict "env: said once" "$([ "$(grep -c '^version' "$work/out")" = 1 ] &&
    grep -q 'all-reduce over 2 ranks (fp32, tcp' "$work/out" || echo "found: $(cat "$work/out")")"

# fails NAME STATUS PATTERN ARGUMENTS...: this exit status, and one line of an error that matches
fails() {
    name=$1 expected=$2 pattern=$3
    shift 3
    timeout 60 "$train" "$@" >"$work/out" 2>"$work/err"
    status=$? wrong=""
    grep -q "^train: error: .*$pattern" "$work/err" || wrong="found no error with '$pattern'"
    [ "$(grep -c '^train: error' "$work/err")" = 1 ] || wrong="not one line: $(cat "$work/err")"
    [ $status = "$expected" ] || wrong="exit status $status, expected $expected"
    verdict "$name" "$wrong"
}
fails "no data" 1 "nowhere" --backend tcp --nproc-per-node 3 --data-path "$work/nowhere"
fails "wrong usage" 2 "backend" --backend udp --nproc-per-node 3
fails "one rank" 1 "backend tcp: found one rank" --backend tcp
fails "compare" 1 "a command that runs in one process" compare --strategies ddp --backend tcp --nproc-per-node 2
fails "nccl on the CPU" 1 "backend nccl: found --device cpu, expected cuda" --backend nccl --nproc-per-node 2
if "$train" env --device cuda >/dev/null 2>&1; then
    fails "more ranks than devices" 1 "backend local lets ranks share" --device cuda --nproc-per-node 1000
else
    skip "more ranks than devices" "found no GPU"
    fails "no device, several ranks" 1 "no CUDA device\|not built with CUDA" --device cuda --nproc-per-node 2
fi

# long NAME: a training on 3 processes that does not end; waits for its first step; its pid is $pid, and
# those of its ranks $ranks
long() {
    # shellcheck disable=SC2086
    "$train" --backend tcp --nproc-per-node 3 --epochs 100000 $common --checkpoint-interval 100000 \
        --eval-interval 100000 --output-dir "$work/$1" >"$work/out" 2>"$work/err" &
    pid=$!
    for _ in $(seq 100); do
        grep -q '"event":"step"' "$work/$1/metrics.jsonl" 2>/dev/null && break
        sleep 0.1
    done
    ranks=$(grep -l "^PPid:[[:space:]]*$pid\$" /proc/[0-9]*/status 2>/dev/null | cut -d / -f 3)
}

# ended NAME STATUS PATTERN SECONDS: so it ends, and so do all its ranks, with one error line or none (PATTERN "")
ended() {
    begin=$(date +%s) wrong=""
    wait "$pid"
    status=$?
    [ $(($(date +%s) - begin)) -le "$4" ] || wrong="it took longer than $4 s"
    [ $status = "$2" ] || wrong="exit status $status, expected $2"
    lines=$(grep -c '^train: error' "$work/err")
    [ "$lines" = "$([ -z "$3" ] && echo 0 || echo 1)" ] || wrong="found $lines lines of errors: $(cat "$work/err")"
    grep -q "$3" "$work/err" || wrong="found no error with '$3'"
    [ "$(echo "$ranks" | wc -w)" = 3 ] || wrong="found ranks '$ranks', expected three"
    for r in $ranks; do
        if kill -0 "$r" 2>/dev/null; then wrong="a rank lives on"; fi
    done
    verdict "$1" "$wrong"
}
long killed
victim=$(for r in $ranks; do tr '\0' '\n' <"/proc/$r/environ" | grep -qx RANK=1 && echo "$r"; done)
kill -9 "$victim"
ended "a rank is killed" 1 "lost rank 1\|rank 1 was killed" 12
long stopped
kill -TERM $pid
ended "SIGTERM" 130 "" 20
verdict "SIGTERM: a checkpoint" "$([ -s "$work/stopped/checkpoints/latest" ] || echo "found none")"
long orphaned
# shellcheck disable=SC2086
kill -9 $pid
wait $pid 2>/dev/null
wrong="ranks live on without their starter"
for _ in $(seq 100); do
    alive=$(for r in $ranks; do kill -0 "$r" 2>/dev/null && echo "$r"; done)
    [ -z "$alive" ] && wrong="" && break
    sleep 0.1
done
verdict "the starter is killed" "$wrong"
exit $failed
