#!/bin/sh
# Ranks in processes of their own, over TCP: the numbers of the local transport, and failures that end.
. tests/lib.sh
port=$((20000 + $$ % 9000))

# processes NAME RANKS SIZE ARGUMENTS...: starts the ranks (a list, "0 1 2"), each with its output in
# NAME.RANK, and puts their exit statuses into $statuses
processes() {
    name=$1 ranks=$2 size=$3 pids="" statuses=""
    shift 3
    port=$((port + 2))
    for r in $ranks; do
        RANK=$r WORLD_SIZE=$size MASTER_ADDR=127.0.0.1 MASTER_PORT=$port timeout 60 "$train" "$@" \
            >"$work/$name.$r" 2>&1 &
        pids="$pids $!"
    done
    for pid in $pids; do
        wait "$pid"
        statuses="$statuses $?"
    done
}

for n in 2 3 4; do
    for strategy in dp ddp zero1 zero2 zero3; do
        set -- --max-steps 4 --strategy $strategy --batch-size 8 --gradient-accumulation-steps 2 \
            --threads-per-rank 1 --quiet --timeout 30
        processes run "$(seq -s ' ' 0 $((n - 1)))" $n "$@" --output-dir "$work/tcp"
        "$train" --nproc-per-node $n "$@" --output-dir "$work/local" >/dev/null 2>&1
        verdict "$strategy on $n processes" "$(difference tcp local)"
        rm -rf "$work/tcp" "$work/local"
    done
done

for flavour in asan tsan; do
    if [ ! -x "$build/$flavour/train" ]; then
        skip "zero3 on 2 processes, $flavour" "$build/$flavour/train is not built"
        continue
    fi
    plain=$train train=$build/$flavour/train
    processes $flavour "0 1" 2 --max-steps 2 --strategy zero3 --batch-size 8 --threads-per-rank 1 --quiet \
        --timeout 50 --limit-val 32 --output-dir "$work/$flavour"
    train=$plain
    wrong=""
    [ "$statuses" = " 0 0" ] || wrong="exit statuses$statuses: $(cat "$work/$flavour".? | head -3 | tr '\n' ' ')"
    verdict "zero3 on 2 processes, $flavour" "$wrong"
done

# fails NAME PATTERN: all statuses are 1, and a line of an error matches
fails() {
    wrong=""
    for s in $statuses; do [ "$s" = 1 ] || wrong="exit statuses$statuses, expected 1"; done
    grep -q "^train: error: .*$2" "$work/$1".? || wrong="found no error with '$2'"
    verdict "$1" "$wrong"
}
processes missing "0" 3 env --timeout 1
fails missing "missing: 1 2"
processes alone "1" 2 env --timeout 1
fails alone "nobody answers"
processes twice "0 1 1" 3 env --timeout 5
fails twice "two processes say that they are rank 1"

# a rank is killed in the middle
port=$((port + 2))
for r in 0 1 2; do
    RANK=$r WORLD_SIZE=3 MASTER_ADDR=127.0.0.1 MASTER_PORT=$port "$train" --epochs 1000 --quiet \
        --threads-per-rank 1 --timeout 20 --output-dir "$work/killed" >"$work/killed.$r" 2>&1 &
    eval "pid$r=\$!"
done
sleep 2
# shellcheck disable=SC2154
kill -9 "$pid1"
begin=$(date +%s) statuses=""
# shellcheck disable=SC2154
for pid in $pid0 $pid2; do
    wait "$pid"
    statuses="$statuses $?"
done
fails killed "lost rank 1"
verdict "killed: at once" "$([ $(($(date +%s) - begin)) -le 5 ] || echo "it took longer than 5 s")"
verdict "killed: one line" "$([ "$(cat "$work"/killed.? | grep -c 'train: error')" = 1 ] || echo "not one line")"

# SIGTERM to one rank stops all after the same step, with a checkpoint
port=$((port + 2))
for r in 0 1; do
    RANK=$r WORLD_SIZE=2 MASTER_ADDR=127.0.0.1 MASTER_PORT=$port "$train" --epochs 1000 --quiet \
        --threads-per-rank 1 --timeout 20 --output-dir "$work/stopped" >"$work/stopped.$r" 2>&1 &
    eval "pid$r=\$!"
done
sleep 2
kill -TERM "$pid1"
statuses=""
for pid in $pid0 $pid1; do
    wait "$pid"
    statuses="$statuses $?"
done
wrong=""
[ "$statuses" = " 130 130" ] || wrong="exit statuses$statuses, expected 130"
[ -s "$work/stopped/checkpoints/latest" ] || wrong="found no checkpoint"
verdict "SIGTERM to rank 1" "$wrong"
exit $failed
